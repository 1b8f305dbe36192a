"""The reference model: a small Llama trained on the Python standard library, and text to measure it on.

Loads the trained model, its tokenizer and the token ids that measurements run on; and says what `bench.reference.train`
learns: the library's own source files, and the shapes of the model and of a second one.

Every file belongs to one of two parts by a rule that needs no list: it is held out if the SHA-256 of its path
below the library folder, modulo 100, is less than `HELD_OUT_PERCENT`. The library differs from one Python to
the next, so the ids used for measurements are exported with the model.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MODEL_FOLDER = Path(__file__).parent / "model"
HELD_OUT_FILE = "heldout_ids.safetensors"
CALIBRATION_FILE = "calibration_ids.safetensors"
VOCABULARY = 4096
HELD_OUT_PERCENT = 8
END_OF_TEXT = "<|endoftext|>"
_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})

TokenIds = npt.NDArray[np.uint16]
SHAPES = ("llama", "gpt2")
_WRITERS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")  # what writes to the residual stream


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


# --- the text, as token ids ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Both parts as token ids (`uint16 [tokens]`, each file ends with end-of-text), and the tokenizer."""

    train: TokenIds
    held_out: TokenIds
    tokenizer: Tokenizer


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this path (POSIX, below the library folder) belongs to the held-out part."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def library_files() -> Iterator[tuple[str, str]]:
    """Yield `(relative path, text)` of every `.py` file of the running Python's library, in sorted order.

    Files that are not UTF-8 (a few tests of the tokenizer of Python itself) are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE of `VOCABULARY` tokens (the end-of-text token has id 0)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> TokenIds:
    """Encode files and join them, each followed by the end-of-text token: `uint16 [tokens]`."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.uint16)
    parts: list[TokenIds] = []
    for encoding in tokenizer.encode_batch(texts):
        parts += [np.array(encoding.ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def load_corpus(work: Path) -> Corpus:
    """Read the corpus from `work`, or build it there first (about a minute on one core)."""
    tokenizer_file, ids_file = work / "tokenizer.json", work / "corpus.npz"
    if not ids_file.exists():
        _build_corpus(tokenizer_file, ids_file)
    with np.load(ids_file, allow_pickle=False) as ids:
        return Corpus(ids["train"], ids["held_out"], Tokenizer.from_file(str(tokenizer_file)))


def _build_corpus(tokenizer_file: Path, ids_file: Path) -> None:
    tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[bool, list[str]] = {False: [], True: []}
    for relative, text in library_files():
        parts[is_held_out(relative)].append(text)
    # The tokenizer sees the training part only: held-out files must not shape their own measure.
    tokenizer = train_tokenizer(parts[False])
    tokenizer.save(str(tokenizer_file))
    partial = ids_file.with_suffix(".partial.npz")
    np.savez(partial, train=encode(tokenizer, parts[False]), held_out=encode(tokenizer, parts[True]))
    partial.replace(ids_file)


def blocks(ids: TokenIds, length: int, seed: int) -> TokenIds:
    """Cut ids into non-overlapping blocks and shuffle them by `seed`: `uint16 [tokens // length, length]`."""
    count = len(ids) // length
    order = np.random.default_rng(seed).permutation(count)
    return ids[: count * length].reshape(count, length)[order]


# --- shapes of the reference model and of a second one, of another family ------------------------------


def build_config() -> LlamaConfig:
    """12 layers, hidden 256, 4 heads (2 key-value heads), FFN 640, tied embeddings: 9.3 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        rms_norm_eps=1e-5,
    )


def build_second_config() -> GPT2Config:
    """Another family, to check against: 12 layers, hidden 128, 4 heads, FFN 512; learned positions, LayerNorm, GELU,
    biases. 3.0 M parameters, trained in a few minutes."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=1024,
        n_embd=128,
        n_layer=12,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def build_model(seed: int, shape: str = "llama") -> PreTrainedModel:
    """The reference model, or that of the second family, with random float32 weights, decided by `seed`."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    model = LlamaForCausalLM(build_config()) if shape == "llama" else GPT2LMHeadModel(build_second_config())
    with torch.no_grad():  # what writes to the residual stream starts smaller, by the number of writers
        for name, weight in model.named_parameters():
            if name.endswith(_WRITERS):
                weight.div_(math.sqrt(2 * model.config.num_hidden_layers))
    return model
