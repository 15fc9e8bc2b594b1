"""Bulk sampling: prompts, seeds, the methods that are compared, and shards of pictures in the store."""
