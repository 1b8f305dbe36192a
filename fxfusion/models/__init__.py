"""Hugging Face models: their decoder layers as residual blocks, and surgery on them."""
