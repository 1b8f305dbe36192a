"""The last step of an export: linear layers of the decoder's layers as integers and scales, weight-only, by torchao.

    model.safetensors  model.layers.0.mlp.up_proj.weight        float [rows, columns]
    ->                 model.layers.0.mlp.up_proj._weight_qdata       int8 [rows, columns], of 4 or 8 bits
                       model.layers.0.mlp.up_proj._weight_scale       float [rows, columns / group]
                       model.layers.0.mlp.up_proj._weight_zero_point  int8, zeros
    config.json        and quantization_config, by which transformers loads them (`TorchAoConfig`), without fxfusion

Embedding, head, norms and biases stay as they are. Layout: `IntxUnpackedToInt8Tensor`, which of those of torchao 0.18
for 4 bits is the one that transformers loads and every device computes with; a byte for a weight, of 4 bits too. Packed
ones need a GPU (`Int4Tensor`, `Int4TilePackedTo4dTensor`) or cannot be stored (`Int4OpaqueTensor`).
What was written is loaded as transformers does, and compared bit for bit with the rounded weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.canonical_load import CONFIG
from fxfusion.checkpoints.folder import remove, rename, write_file
from fxfusion.checkpoints.reading import CheckpointReader, silent
from fxfusion.checkpoints.shards import INDEX, TensorFacts, write_shards
from fxfusion.errors import CheckpointError, OptionError, first_line
from fxfusion.models.ffn_surgery.quantised import is_quantised, plain
from fxfusion.models.fingerprint import decoder_layers
from fxfusion.models.surgery_proof import full_logits, proof_tokens
from fxfusion.models.weight_grid import WeightGrid

FORMATS = ("nemotron-nas", "transformers")  # that can be quantised
KINDS = {"int4": 4, "int8": 8}
GROUP = 32
_BEFORE = "before"  # where the tensors are meanwhile


def grid_of(quantize: str | None, group_size: int | None, format: str) -> WeightGrid | None:
    """What to round to; None where nothing is asked for. Raises `OptionError` for what cannot be, `CheckpointError`
    where torchao is missing."""
    if quantize is None:
        if group_size is not None:
            raise OptionError("group_size is of quantize: say int4 or int8")
        return None
    if quantize not in KINDS:
        raise OptionError(f"quantize: expected one of {', '.join(KINDS)}, got {quantize!r}")
    if format not in FORMATS:
        how = {"gguf": "a GGUF file has gguf_type q8_0 and q4_0", "canonical": "it keeps the original weights"}[format]
        raise OptionError(f"quantize: not of format {format} ({how}), but of {' and '.join(FORMATS)}")
    if find_spec("torchao") is None:
        raise CheckpointError(
            "weights are quantised with the package torchao, which is not installed: pip install 'fxfusion[quant]'"
        )
    return WeightGrid.parse(f"{quantize}:{GROUP if group_size is None else group_size}", "group_size")


def engines_of_quantised(engines: Mapping[str, str | None]) -> dict[str, str | None]:
    """What loads such a folder, of what would load it otherwise: transformers alone was tested."""
    return {name: why if name == "transformers" else why or "not tested: quantised" for name, why in engines.items()}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the decoder's layers, by their module paths: what is quantised."""
    path, layers = decoder_layers(model)
    return {f"{path}.{name}": one for name, one in layers.named_modules() if isinstance(one, nn.Linear)}


def check_layers(model: nn.Module, grid: WeightGrid) -> None:
    """Works on the meta device. Raises `OptionError` that names the first layer that has no place on the grid, and
    `CheckpointError` where there is no linear layer."""
    found = linear_layers(model)
    for name, one in found.items():
        grid.check(name, one.in_features, one.weight.dtype)
    if not found:
        raise CheckpointError(f"{type(model).__name__} has no nn.Linear in its layers: there is nothing to quantise")


def quantise(
    folder: Path, kind: Any, names: Collection[str], grid: WeightGrid, max_shard_size: int | str, progress: bool
) -> None:
    """Replace the weights `names` of a folder that is being written. `kind`: the class that loads it.

    Raises `CheckpointError` where a weight is no number, or is not found again by transformers.
    """
    before = folder / _BEFORE
    before.mkdir()
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        rename(file, before / file.name)
    reader = CheckpointReader.open(before)
    facts, notes = _announced(reader, names, grid)
    write_shards(folder, facts, _values(reader, names, grid), max_shard_size, progress, notes)
    config = json.loads((folder / CONFIG).read_text("utf-8")) | {"quantization_config": _setting(grid)}
    remove(folder / CONFIG)
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    _prove(folder, kind, reader, names, grid)
    remove(before)


def _setting(grid: WeightGrid) -> dict[str, Any]:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    kind = getattr(torch, f"int{grid.bits}")
    found: dict[str, Any] = TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(grid.group))
    ).to_dict()
    return found


def _packed(integers: Tensor, scales: Tensor, grid: WeightGrid, dtype: torch.dtype) -> Any:
    """The tensor of torchao. Scales are kept in the weights' dtype, but for float16, which does not hold small ones."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    return IntxUnpackedToInt8Tensor(
        qdata=integers,
        scale=scales.to(torch.float32 if dtype == torch.float16 else dtype),
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{grid.bits}"),
        block_size=[1, grid.group],
        dtype=dtype,
        activation_quantization=None,
    )


def _announced(
    reader: CheckpointReader, names: Collection[str], grid: WeightGrid
) -> tuple[list[TensorFacts], dict[str, str]]:
    """Facts of the tensors that will come, and what the files say about how they belong together."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    facts: list[TensorFacts] = []
    notes: dict[str, str] = {}
    for name, one in reader.stored.items():
        value: Any = torch.empty(one.shape, dtype=one.dtype, device="meta")
        if name in names:
            scales = value.new_empty(one.shape[0], one.shape[1] // grid.group)
            value = _packed(value.to(torch.int8), scales, grid, one.dtype)
        parts, found = flatten_tensor_state_dict({name: value})
        facts += [TensorFacts.of(part, tensor) for part, tensor in parts.items()]
        notes |= found
    return facts, notes | {"tensor_names": json.dumps(list(reader.stored))}


def _values(reader: CheckpointReader, names: Collection[str], grid: WeightGrid) -> Iterator[tuple[str, Tensor]]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    for name, one in reader.stored.items():
        value: Any = reader.read(name)
        if name in names:
            try:
                value = _packed(*grid.quantised(value), grid, one.dtype)
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}, so it cannot be quantised") from error
        yield from flatten_tensor_state_dict({name: value})[0].items()


def _prove(folder: Path, kind: Any, reader: CheckpointReader, names: Collection[str], grid: WeightGrid) -> None:
    try:
        with silent():
            twin = kind.from_pretrained(folder, dtype=reader.main_dtype(), local_files_only=True).eval()
    except Exception as error:  # whatever torchao and the family's classes make of it
        raise CheckpointError(f"what was quantised cannot be loaded: {first_line(error)}") from error
    for name in reader.stored:
        found, wanted = twin.get_parameter(name), reader.read(name)
        if is_quantised(found) != (name in names):
            raise CheckpointError(f"{name} is not loaded as it was written by transformers: as {type(found).__name__}")
        if not torch.equal(plain(found), grid.nearest(wanted) if name in names else wanted):
            raise CheckpointError(f"{name}, loaded by transformers, is not what was written")
    if not bool(full_logits(twin, proof_tokens(twin)).isfinite().all()):
        raise CheckpointError("the quantised model computes numbers that are not finite")
