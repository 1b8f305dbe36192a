"""Load the trained reference model, its tokenizer and the token ids that measurements run on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODEL_FOLDER = Path(__file__).parent / "model"
HELD_OUT_FILE = "heldout_ids.safetensors"
CALIBRATION_FILE = "calibration_ids.safetensors"


def load_model(dtype: torch.dtype = torch.float32, folder: Path = MODEL_FOLDER) -> PreTrainedModel:
    """The trained model in eval mode on the CPU; the stored weights are bfloat16.

    OSError when `folder` holds no model (train it by `python -m bench.reference.train`).
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.eval()
    return model


def load_tokenizer(folder: Path = MODEL_FOLDER) -> PreTrainedTokenizerBase:
    """The byte-level BPE tokenizer of the model (4,096 tokens)."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def heldout_batches(
    batch: int = 8, seq: int = 256, limit: int | None = None, folder: Path = MODEL_FOLDER
) -> list[Tensor]:
    """Token ids of files that training never saw: `int64 [batch, seq]` each (the last may be smaller).

    `limit` keeps the first so many batches. The same arguments always give the same batches, and rows come
    from files in a fixed random order, so that a few batches already span the library. ValueError when `seq`
    exceeds the stored blocks (1,024 tokens); what remains of a block after its last whole row is left out.
    """
    return _batches(folder / HELD_OUT_FILE, batch, seq, limit)


def calibration_batches(
    batch: int = 8, seq: int = 256, limit: int | None = None, folder: Path = MODEL_FOLDER
) -> list[Tensor]:
    """Token ids of training files, for whatever is fitted (scores, refit); as `heldout_batches` otherwise."""
    return _batches(folder / CALIBRATION_FILE, batch, seq, limit)


def _batches(file: Path, batch: int, seq: int, limit: int | None) -> list[Tensor]:
    stored = load_file(file)["input_ids"].to(torch.int64)  # [blocks, 1024]
    blocks, length = stored.shape
    if not 1 <= seq <= length:
        raise ValueError(f"seq must lie between 1 and {length}, the length of the stored blocks; got {seq}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    # Piece by piece over all blocks, not block by block: neighbouring rows then come from different files.
    pieces = stored[:, : length // seq * seq].reshape(blocks, -1, seq).transpose(0, 1).reshape(-1, seq)
    return list(pieces.split(batch))[:limit]
