"""From a pile of pictures to clean, deterministic shards."""
