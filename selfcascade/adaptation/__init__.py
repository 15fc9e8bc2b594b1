"""Adaptation: the feature upsampler trained on a frozen base, and the small base itself."""
