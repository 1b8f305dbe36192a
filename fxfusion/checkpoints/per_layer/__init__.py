"""Folders for transformers itself: `per_layer_config`, and one file of the family's own classes."""
