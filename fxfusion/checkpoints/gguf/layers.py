"""The layers of a GGUF file of architecture `deci` or `llama`: numbers of heads and channels against tensors' shapes.

layers   heads   kv heads   FFN
0-9         32          8   14336
10          32          8   zero        attention alone: an FFN of zeros, which llama.cpp needs there
12          64         16   57344       two attentions in one, four FFNs in one
13           0          0   14336       no attention
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fxfusion.checkpoints.gguf.header import GgufFile
from fxfusion.errors import CheckpointError

ARCHITECTURES = ("deci", "llama")
_SMALL = 256  # channels: FFNs of zeros are not wider
_NUMBERS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


@dataclass(frozen=True, slots=True)
class GgufLayer:
    """`zero`: its FFN is one of zeros."""

    heads: int
    kv_heads: int
    width: int
    zero: bool


def layers_of(file: GgufFile) -> list[GgufLayer]:
    """Raises `CheckpointError` that names the tensor or setting that does not fit the others."""
    reader = _Reader(file)
    found = [GgufLayer(*numbers, zero=reader.is_zero(layer)) for layer, numbers in enumerate(reader.numbers())]
    for number, layer in enumerate(found):
        reader.check(number, layer)
    known = {name for number, layer in enumerate(found) for name in reader.shapes(number, layer)}
    for tensor in file.tensors:
        prefix, _, rest = tensor.name.partition(".")
        if prefix == "blk" and tensor.name.endswith(".weight") and tensor.name not in known:
            raise CheckpointError(f"{file.path}: layer {rest.partition('.')[0]} has no place for {tensor.name}")
    return found


def rows_of(layers: list[GgufLayer]) -> list[tuple[str, int, int, str]]:
    """Lines of a table, one for each run of layers that are alike."""
    rows, first = [], 0
    for layer, group in groupby(layers):
        last = first + len(list(group)) - 1
        name = str(first) if first == last else f"{first}-{last}"
        rows.append((name, layer.heads, layer.kv_heads, "zero" if layer.zero else str(layer.width)))
        first = last + 1
    return rows


class _Reader:
    def __init__(self, file: GgufFile) -> None:
        self.file, self.tensors = file, {tensor.name: tensor for tensor in file.tensors}
        self.hidden, self.count = self.number("embedding_length"), self.number("block_count")
        plain = self.setting("attention.head_count")
        most = max(plain) if isinstance(plain, list) else plain
        self.size = self.setting("attention.key_length", self.hidden // max(1, most))

    def setting(self, name: str, default: Any = None) -> Any:
        found = self.file.metadata.get(f"{self.file.architecture}.{name}", default)
        if found is None:
            raise CheckpointError(f"{self.file.path} has no {self.file.architecture}.{name}")
        return found

    def number(self, name: str) -> int:
        found = self.setting(name)
        if type(found) is not int or not 0 < found < 2**31:
            raise CheckpointError(f"{self.file.path}: {self.file.architecture}.{name} is {found!r}")
        return found

    def numbers(self) -> list[tuple[int, int, int]]:
        """Heads, key-value heads and width of each layer."""
        columns = []
        if self.count > len(self.tensors):
            raise CheckpointError(f"{self.file.path} says {self.count} layers, and has {len(self.tensors)} tensors")
        for name in _NUMBERS:
            found = self.setting(name)
            column = found if isinstance(found, list) else [found] * self.count
            if len(column) != self.count or not all(type(one) is int and one >= 0 for one in column):
                raise CheckpointError(f"{self.file.path}: {name} has {len(column)} numbers, for {self.count} layers")
            columns.append(column)
        return list(zip(*columns, strict=True))

    def shapes(self, number: int, layer: GgufLayer) -> Mapping[str, tuple[int, ...]]:
        """Of the matrices and norms of a layer."""
        q, kv, hidden, prefix = layer.heads * self.size, layer.kv_heads * self.size, self.hidden, f"blk.{number}."
        found: dict[str, tuple[int, ...]] = {}
        if layer.heads:
            found |= {"attn_norm": (hidden,), "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
            found["attn_output"] = (hidden, q)
        if layer.width:
            found |= {"ffn_norm": (hidden,), "ffn_gate": (layer.width, hidden), "ffn_up": (layer.width, hidden)}
            found["ffn_down"] = (hidden, layer.width)
        return {f"{prefix}{name}.weight": shape for name, shape in found.items()}

    def check(self, number: int, layer: GgufLayer) -> None:
        where = f"{self.file.path}: layer {number}"
        if bool(layer.heads) != bool(layer.kv_heads) or (layer.heads and layer.heads % layer.kv_heads):
            raise CheckpointError(f"{where} has {layer.heads} heads and {layer.kv_heads} key-value heads")
        if layer.heads and not layer.width:
            raise CheckpointError(f"{where} has attention and no FFN, and llama.cpp would skip both")
        if number == 0 and not layer.heads:
            raise CheckpointError(f"{where} has no attention, and llama.cpp reads the size of heads off it")
        for name, shape in self.shapes(number, layer).items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.shape != shape:
                found = "missing" if tensor is None else str(list(tensor.shape))
                raise CheckpointError(f"{where}: {name} is {found}, and should be {list(shape)}")

    def is_zero(self, number: int) -> bool:
        """Whether the last projection of its FFN, if it is small, is all zeros."""
        from gguf import GGUFReader

        name = f"blk.{number}.ffn_down.weight"
        if name not in self.tensors or self.tensors[name].shape[-1] > _SMALL:
            return False
        if not hasattr(self, "data"):
            self.data = {tensor.name: tensor.data for tensor in GGUFReader(self.file.path).tensors}
        return not self.data[name].any()
