"""Write a decoder as one GGUF file, which llama.cpp and its kin run; or say what would be written.

    settings of the layers, plan, tokenizer | names, shapes, types of tensors | tensors, a few rows at a time

The file is proved before (`proof.py`), read back after, and only then takes its place.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.companions import base_name
from fxfusion.checkpoints.gguf.header import SUFFIX, GgufFile, require
from fxfusion.checkpoints.llama_cpp.decoder import BLOCK, GgufDecoder, Piece
from fxfusion.checkpoints.llama_cpp.proof import prove
from fxfusion.checkpoints.llama_cpp.vocabulary import Setting, vocabulary_of
from fxfusion.errors import CheckpointError, OptionError
from fxfusion.files import check_file, replacing
from fxfusion.models.bare_model import bare_model
from fxfusion.report.progress import reporting

if TYPE_CHECKING:
    import numpy as np

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
KIND = "GGUF model"
_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_DTYPES = {name: dtype for dtype, name in _OF_DTYPE.items()}
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # gguf.LlamaFileType
_TABLES = ("token_embd.weight", "output.weight")
_ALIGNMENT = 32
_VALUES = 2**20  # at a time


@dataclass(frozen=True, slots=True)
class GgufExport:
    """What would be written. `types`: of each tensor, by its name; `rounded`: why some are not of the type asked for,
    None where all are."""

    decoder: GgufDecoder
    type: str
    types: dict[str, str]
    rounded: str | None

    @classmethod
    def of(cls, model: nn.Module, type: str | None = None) -> GgufExport:
        """Look through a causal language model; works on the meta device. Raises `CheckpointError` that names what
        GGUF cannot say, `OptionError` for a type that is not one of `TYPES`."""
        require("gguf")
        if type is not None and type not in TYPES:
            raise OptionError(f"gguf_type: expected one of {', '.join(TYPES)}, got {type!r}")
        decoder = GgufDecoder.of(bare_model(model))
        own = _OF_DTYPE.get(decoder.dtype)
        if type is None:
            _check_dtype(decoder)
        if own is None:
            raise CheckpointError(f"no GGUF type holds {decoder.dtype}: model.to(torch.float32) has one")
        wanted = type or own
        types, short = {}, []
        for name, piece in decoder.pieces.items():
            types[name] = "f32" if len(piece.shape) == 1 else wanted
            if wanted == "q4_0" and name in _TABLES:
                types[name] = "q8_0"
            if types[name] not in _DTYPES and piece.shape[-1] % BLOCK:
                types[name] = own
                short.append(f"{name} {list(piece.shape)}")
        words = None
        if short:
            words = f"{len(short)} tensors stay {own}: rows of {short[0]} are no whole blocks of {BLOCK} values"
        return cls(decoder, wanted, types, words)

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(self.size(piece) for piece in self.decoder.pieces.values())

    def size(self, piece: Piece) -> int:
        """Bytes of a tensor in the file."""
        from gguf import GGML_QUANT_SIZES

        block, nbytes = GGML_QUANT_SIZES[_kind(self.types[piece.name])]
        return math.prod(piece.shape) // block * nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        decoder = self.decoder
        tensors = [
            {"name": name, "shape": list(piece.shape), "type": self.types[name]}
            for name, piece in decoder.pieces.items()
        ]
        layers = [asdict(one) for one in decoder.layers]
        found = {"architecture": decoder.architecture, "settings": decoder.settings(), "layers": layers}
        return {**found, "tensors": tensors, "bytes": self.nbytes, "type": self.type}


def check_model(model: nn.Module, source: Path, type: str | None = None) -> None:
    """Raises `CheckpointError` where `save` could not write the model of a folder or file, or its tokenizer, as far as
    that shows without weights: before long work."""
    found = GgufExport.of(model, type)
    vocabulary_of(str(source), None, found.decoder.vocabulary)


def check_target(path: str | os.PathLike[str], *, overwrite: bool = False, reads: tuple[Any, ...] = ()) -> None:
    """Raises `CheckpointError` where `save` could not put a file there, before long work."""
    if Path(path).suffix.lower() != SUFFIX:
        raise CheckpointError(f"{os.fspath(path)}: format gguf is one file, so name one that ends in {SUFFIX}")
    check_file(path, KIND, overwrite=overwrite, reads=reads, error=CheckpointError)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    type: str | None = None,
    tokenizer: Any = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a causal language model as a GGUF file, all of it or nothing. The model stays as it is, and no second copy
    of it is made: tensors go through memory a few rows at a time.

    Args:
        path: a new file, or one that was written here and has not changed since, which is replaced.
        type: of matrices, one of `TYPES`; None: the model's own dtype. Norms and biases are float32, and with q4_0
            embedding and head are q8_0.
        tokenizer: one of transformers; without it, that of where the model came from.
        about: further settings by their names, texts or numbers; `general.name` and so on.
        progress: say how far it is, on the error stream.
        overwrite: replace whatever file is there.

    Returns:
        What was proved, as a sentence.

    Raises:
        CheckpointError: what GGUF cannot say, or a file that cannot be written. Nothing was changed then.
        OptionError: no such type.
    """
    check_target(path, overwrite=overwrite)
    bare = bare_model(model)
    found = GgufExport.of(bare, type)
    if any(value.is_meta for value in found.decoder.state.values()):
        raise CheckpointError("the model is on the meta device: there are no weights to write")
    vocabulary = vocabulary_of(base_name(bare), tokenizer, found.decoder.vocabulary)
    if found.rounded is not None:
        warnings.warn(found.rounded, stacklevel=3)
    proof = prove(bare, found.decoder)
    with replacing(path, KIND, overwrite=overwrite, error=CheckpointError) as scratch:
        _write_header(scratch, found, [*(Setting(*one) for one in (about or {}).items()), *vocabulary])
        with reporting(progress, "Writing", 2 * found.nbytes, is_bytes=True) as step:
            _write_tensors(scratch, found, step)
            _check(scratch, found, step)
    return proof


def _check_dtype(decoder: GgufDecoder) -> None:
    for name, value in decoder.state.items():
        if value.dtype != decoder.dtype and name != "rope_freqs":
            raise CheckpointError(
                f"the model has {decoder.dtype} and {value.dtype} ({name}): say what to write (gguf_type=...), or give "
                "it one dtype (model.to(dtype))"
            )


def _kind(type: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[type.upper()]


def _write_header(path: Path, export: GgufExport, more: list[Setting]) -> None:
    import numpy as np
    from gguf import GGUFValueType, GGUFWriter

    decoder = export.decoder
    writer = GGUFWriter(path, decoder.architecture)
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[export.type])
    writer.add_quantization_version(2)
    for name, value in decoder.settings().items():
        if isinstance(value, list):
            writer.add_array(f"{decoder.architecture}.{name}", value)
            continue
        kind = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}[type(value)]
        writer.add_key_value(f"{decoder.architecture}.{name}", value, kind)
    for setting in more:
        setting.add_to(writer)
    for name, piece in decoder.pieces.items():
        writer.add_tensor_info(name, piece.shape, np.dtype(np.float32), export.size(piece), _kind(export.types[name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(path: Path, export: GgufExport, step: Callable[[int], None]) -> None:
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))
        for name, piece in export.decoder.pieces.items():
            for _, rows in _parts(piece, export.decoder.state):
                content = _stored(name, rows, export.types[name]).tobytes()
                file.write(content)
                step(len(content))
            file.write(bytes(-file.tell() % _ALIGNMENT))


def _parts(piece: Piece, state: Mapping[str, Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """A tensor, some rows at a time."""
    count = max(1, _VALUES // math.prod(piece.shape[1:]))
    for begin in range(0, piece.shape[0], count):
        end = min(begin + count, piece.shape[0])
        yield slice(begin, end), piece.rows(state, begin, end)


def _stored(name: str, rows: Tensor, type: str) -> np.ndarray[Any, Any]:
    """As the file has them. Raises `CheckpointError` for what is no number there."""
    from gguf import quants

    largest = 0.0 if not rows.numel() else float(rows.abs().max())
    limit = torch.finfo(_DTYPES[type]).max if type in _DTYPES else 127 * torch.finfo(torch.float16).max
    if not largest <= limit:  # not a number, too
        raise CheckpointError(f"{name} has values up to {largest:.3g}, which {type} does not hold")
    found: np.ndarray[Any, Any] = quants.quantize(rows.contiguous().numpy(), _kind(type))
    return found


def _check(path: Path, export: GgufExport, step: Callable[[int], None]) -> None:
    """Read the file as others do, and compare: float types with what torch makes of the model's own values, bit for
    bit; quantised ones with the quantiser's rounding of them. Raises `CheckpointError`."""
    from gguf import GGUFReader

    stored = {one.name: one for one in GgufFile.read(path).tensors}
    data = {one.name: one.data for one in GGUFReader(path).tensors}
    if list(stored) != list(export.decoder.pieces):
        raise CheckpointError(f"{path} was not written as it should be: other tensors than the model's")
    for name, piece in export.decoder.pieces.items():
        type = export.types[name]
        if stored[name].shape != piece.shape or stored[name].kind != type.upper():
            raise CheckpointError(f"{name} was written as {stored[name].kind} {list(stored[name].shape)}")
        for part, rows in _parts(piece, export.decoder.state):
            if not _same(data[name][part], rows, type):
                raise CheckpointError(f"{name}, read back from the file, is not what the model has (a bad disk?)")
        step(export.size(piece))


def _same(found: np.ndarray[Any, Any], rows: Tensor, type: str) -> bool:
    import numpy as np
    from gguf import quants

    if type not in _DTYPES:
        return bool(np.array_equal(found, quants.quantize(rows.contiguous().numpy(), _kind(type))))
    read = torch.from_numpy(quants.dequantize(np.array(found), _kind(type)).astype(np.float32, copy=False))
    return torch.equal(read, rows.to(_DTYPES[type]).float())
