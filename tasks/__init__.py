"""Retryable pieces of a stage, as Prefect tasks, and what all stages share. Installed as ``selfcascade_tasks``."""
