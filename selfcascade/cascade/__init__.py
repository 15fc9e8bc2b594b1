"""The method: pivot, upsampler, injection, schedule, pipeline, families."""
