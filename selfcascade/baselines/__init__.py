"""Baselines: what the method is compared with."""
