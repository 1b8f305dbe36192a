"""Benchmarks, the reference model and their results. Not part of the installed package."""
