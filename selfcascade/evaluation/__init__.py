"""Evaluation: distances between samples, real pictures and the base's own samples, how sure they are, and the report that shows them."""
