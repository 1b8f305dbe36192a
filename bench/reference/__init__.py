"""The reference model: a small Llama trained on the Python standard library, and text to measure it on."""

from __future__ import annotations

from bench.reference.load import calibration_batches, heldout_batches, load_model, load_tokenizer

__all__ = ["calibration_batches", "heldout_batches", "load_model", "load_tokenizer"]
