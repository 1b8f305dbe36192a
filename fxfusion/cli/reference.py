"""Find and load the trained reference model and its held-out token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxfusion.errors import FxFusionError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

HELD_OUT_FILE = "heldout_ids.safetensors"
_IN_THE_CLONE = Path("bench/reference/model")
_NEEDED = ("config.json", "model.safetensors", HELD_OUT_FILE)


def find_folder(given: Path | None) -> Path:
    """The folder of the reference model: `given`, or the one in the clone that this package runs from.

    Raises `FxFusionError` that says what is missing.
    """
    if given is not None:
        candidates = [given]
    else:
        candidates = [Path(__file__).resolve().parents[2] / _IN_THE_CLONE, Path.cwd() / _IN_THE_CLONE]
    for folder in candidates:
        if all((folder / name).is_file() for name in _NEEDED):
            return folder
    if given is not None:
        missing = next(name for name in _NEEDED if not (given / name).is_file())
        raise FxFusionError(f"--model {given}: the folder has no {missing}")
    raise FxFusionError(
        f"there is no reference model in {candidates[0]}: run this from a clone of the repository "
        f"(an installed package does not hold the model), or give --model DIR with {', '.join(_NEEDED)}"
    )


def load(folder: Path) -> PreTrainedModel:
    """The model in float32 and eval mode on the CPU, without a key-value cache."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.config.use_cache = False
    model.eval()
    return model


def held_out(folder: Path, sequences: int, length: int, batch: int) -> list[Tensor]:
    """The first `sequences` held-out rows, `int64 [batch, length]` each; neighbours come from different files."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(folder / HELD_OUT_FILE)["input_ids"].to(torch.int64)  # [blocks, block length]
    blocks, block = stored.shape
    pieces = stored[:, : block // length * length].reshape(blocks, -1, length).transpose(0, 1).reshape(-1, length)
    full = min(sequences, len(pieces)) // batch * batch
    if full == 0:
        raise FxFusionError(f"{folder / HELD_OUT_FILE} holds fewer than {batch} sequences of {length} tokens")
    return list(pieces[:full].split(batch))
