"""What llama.cpp computes of a GGUF file of architecture `deci` or `llama`, in a loop of plain torch; nothing of the
package is used. Tensors by package `gguf`, as they are: rotated by pairs of neighbours, as its NORM-style rope does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings, and tensors as float32."""
    reader = gguf.GGUFReader(path)
    tensors = {
        one.name: torch.from_numpy(gguf.dequantize(one.data.copy(), one.tensor_type)).float().reshape(*one.shape[::-1])
        for one in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def logits(path: Path, ids: Tensor, changes: dict[str, Tensor] | None = None) -> Tensor:
    """Of token ids `[batch, tokens]`: `[batch, tokens, vocabulary]`. `changes`: tensors in place of the file's."""
    settings, tensors = contents(path)
    tensors |= changes or {}
    kind = settings["general.architecture"]
    own = {name.removeprefix(f"{kind}."): value for name, value in settings.items()}
    layers, size = own["block_count"], own["attention.key_length"]

    def each(name: str) -> list[int]:
        return own[name] if isinstance(own[name], list) else [own[name]] * layers

    def norm(x: Tensor, name: str) -> Tensor:
        eps = own["attention.layer_norm_rms_epsilon"]
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * tensors[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", torch.zeros(()))

    turn = torch.polar(torch.ones(()), _angles(own, tensors, ids.shape[1], size))  # [tokens, size / 2]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # [batch, heads, tokens, size / 2]
        return torch.view_as_real(pairs * turn).flatten(-2) * _length(own)

    x = tensors["token_embd.weight"][ids]
    mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
    numbers = zip(*map(each, ("attention.head_count", "attention.head_count_kv", "feed_forward_length")), strict=True)
    for layer, (heads, kv_heads, width) in enumerate(numbers):
        name = f"blk.{layer}"
        if heads:
            y = norm(x, f"{name}.attn_norm")
            q, k, v = (
                linear(y, f"{name}.attn_{role}").unflatten(-1, (count, size)).transpose(1, 2)
                for role, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            k, v = (one.repeat_interleave(heads // kv_heads, 1) for one in (rotated(k), v))
            weights = (rotated(q) @ k.transpose(-1, -2) / size**0.5 + mask).softmax(-1)
            x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn_output")
        if not width:
            raise AssertionError("llama.cpp skips layers without an FFN")
        y = norm(x, f"{name}.ffn_norm")
        gate = linear(y, f"{name}.ffn_gate")
        x = x + linear(gate * gate.sigmoid() * linear(y, f"{name}.ffn_up"), f"{name}.ffn_down")
    x = norm(x, "output_norm")
    return x @ tensors.get("output.weight", tensors["token_embd.weight"]).T


def _angles(own: dict[str, Any], tensors: dict[str, Tensor], tokens: int, size: int) -> Tensor:
    """`[tokens, size / 2]`."""
    found = torch.empty(tokens, size // 2)
    scaling, factor = own.get("rope.scaling.type"), own.get("rope.scaling.factor", 1.0)
    for i in range(size // 2):
        plain = own["rope.freq_base"] ** (-2 * i / size) / float(tensors.get("rope_freqs.weight", torch.ones(size))[i])
        share = 1.0 if scaling == "linear" else 0.0  # of the stretched angle
        if scaling == "yarn":
            reach = own["rope.scaling.original_context_length"]
            first, last = (
                size * math.log(reach / (beta * 2 * math.pi)) / (2 * math.log(own["rope.freq_base"]))
                for beta in (own["rope.scaling.yarn_beta_fast"], own["rope.scaling.yarn_beta_slow"])
            )
            first, last = max(0, math.floor(first)), min(size - 1, math.ceil(last))
            share = min(1.0, max(0.0, (i - first) / max(0.001, last - first)))
        found[:, i] = torch.arange(tokens) * (plain / factor * share + plain * (1 - share))
    return found


def _length(own: dict[str, Any]) -> float:
    return 1 + 0.1 * math.log(own["rope.scaling.factor"]) if own.get("rope.scaling.type") == "yarn" else 1.0
