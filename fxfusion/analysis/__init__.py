"""Measures of a model: what a rewrite costs in quality."""
