"""Tiny folders whose layers differ, in the schemas of others, and what they compute: torch and json, nothing of ours.

Nine layers: 1 to 5 without attention, of several widths, 6 without FFN, 7 with fewer key-value heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, VOCABULARY, THETA, EPS = 64, 4, 101, 1e4, 1e-6
SIZE = HIDDEN // HEADS


class One(NamedTuple):
    """A layer: key-value heads, 0 without attention; FFN width, 0 without."""

    kv_heads: int
    width: int


LAYERS = (
    One(2, 256),
    One(0, 256),
    One(0, 512),
    One(0, 256),
    One(0, 256),
    One(0, 256),
    One(2, 0),
    One(1, 256),
    One(2, 256),
)
"""Widths are multiples of 256, as multipliers can say them."""

ODD = tuple(one._replace(width={512: 100, 256: 96}.get(one.width, 0)) for one in LAYERS)
"""The same with widths of any number, which the newer schemas can say."""

SETTINGS: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "num_attention_heads": HEADS,
    "rms_norm_eps": EPS,
    "rope_scaling": None,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


def nemotron(layers: Sequence[One] = LAYERS) -> dict[str, Any]:
    """config.json as in the Llama-Nemotron folders."""
    blocks = []
    for kv_heads, width in layers:
        attention = {"n_heads_in_group": HEADS // kv_heads if kv_heads else None, "no_op": not kv_heads}
        attention |= {"num_sink_tokens": None, "replace_with_linear": False, "sparsify": None, "unshifted_sink": False}
        attention |= {"use_prefill_window_in_sink_attention": False, "window_length": None}
        ffn = {"ffn_mult": 1.5 * width / HIDDEN if width else None, "no_op": not width}
        blocks.append({"attention": attention, "ffn": ffn | {"replace_with_linear": False, "sparsify": None}})
    code = {
        "AutoConfig": "configuration_decilm.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
    }
    kind = {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "auto_map": code}
    nulls = {"intermediate_size": None, "num_key_value_heads": None}
    return {**SETTINGS, **kind, **nulls, "num_hidden_layers": len(layers), "block_configs": blocks}


def anymodel(layers: Sequence[One] = ODD, *, null: bool = False) -> dict[str, Any]:
    """As Model-Optimizer writes it: `asdict` of its BlockConfig. `null`: an attention that is not there is null."""
    blocks = []
    for kv_heads, width in layers:
        common = {"replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
        attention: Any = {"no_op": not kv_heads, **common, "num_key_value_heads": kv_heads or None}
        attention |= {"llama4": None, "mamba": None}
        ffn = {"no_op": not width, **common, "moe": None, "intermediate_size": width or None}
        blocks.append({"attention": None if null and not kv_heads else attention, "ffn": ffn, "parallel_blocks": None})
    code = {"AutoConfig": "code_of_others.Config", "AutoModelForCausalLM": "code_of_others.Model"}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": code}
    sizes = {"num_key_value_heads": 2, "intermediate_size": layers[0].width, "head_dim": SIZE}
    return {**SETTINGS, **kind, **sizes, "num_hidden_layers": len(layers), "block_configs": blocks}


def per_layer(layers: Sequence[One] = ODD) -> dict[str, Any]:
    """As Model-Optimizer's vLLM adapter makes of it: what differs from the whole config, layer by layer."""
    found = anymodel(layers)
    del found["block_configs"]
    overrides: dict[str, Any] = {}
    for number, (kv_heads, width) in enumerate(layers):
        skip = [name for name, size in (("attention", kv_heads), ("mlp", width)) if not size]
        own: dict[str, Any] = {"skip": skip} if skip else {}
        if kv_heads not in (0, 2):
            own["num_key_value_heads"] = kv_heads
        if width not in (0, found["intermediate_size"]):
            own["intermediate_size"] = width
        if own:
            overrides[str(number)] = own
    return {
        **found,
        "architectures": ["AnyModel"],
        "base_architecture": "LlamaForCausalLM",
        "per_layer_config": overrides,
    }


def tensors(layers: Sequence[One]) -> dict[str, Tensor]:
    """Random ones: matrices of gain about one, norms around one."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number, (kv_heads, width) in enumerate(layers):
        prefix = f"model.layers.{number}."
        if kv_heads:
            shapes[f"{prefix}input_layernorm.weight"] = (HIDDEN,)
            rows = {"q": HEADS * SIZE, "k": kv_heads * SIZE, "v": kv_heads * SIZE, "o": HIDDEN}
            shapes |= {f"{prefix}self_attn.{name}_proj.weight": (size, HIDDEN) for name, size in rows.items()}
        if width:
            shapes[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
            shapes |= {f"{prefix}mlp.{name}_proj.weight": (width, HIDDEN) for name in ("gate", "up")}
            shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, width)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    random = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return {
        name: 1 + 0.3 * value if value.dim() == 1 else value * (1 if "embed" in name else value.shape[-1] ** -0.5)
        for name, value in noise.items()
    }


def write(folder: Path, config: dict[str, Any], values: dict[str, Tensor], *, subblocks: bool = False) -> Path:
    """`subblocks`: tensors in files of a folder inside, as Model-Optimizer lays them out."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_decilm.py", "modeling_decilm.py", "code_of_others.py"):
        (folder / name).write_text("raise SystemExit('this code was run')\n")
    if not subblocks:
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "subblocks_safetensors").mkdir()
    files: dict[str, list[str]] = {}
    for name in values:
        _, _, number, part, *_ = [*name.split("."), "", ""]
        kind = "attention" if part in ("input_layernorm", "self_attn") else "ffn"
        place = f"block_{number}_{kind}" if number.isdecimal() else "embeddings" if "embed" in name else "lm_head"
        files.setdefault(f"subblocks_safetensors/{place}.safetensors", []).append(name)
    for file, names in files.items():
        save_file({name: values[name] for name in names}, folder / file, {"format": "pt"})
    places = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"format": "pt"}, "weight_map": places})
    )
    return folder


def eager(layers: Sequence[One], values: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits `[batch, tokens, vocabulary]` in float64, by the equations."""
    weights = {name: value.double() for name, value in values.items()}
    x = weights["model.embed_tokens.weight"][ids]
    for number, (kv_heads, width) in enumerate(layers):
        own = {
            name.removeprefix(f"model.layers.{number}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{number}.")
        }
        if kv_heads:
            h = _norm(x, own["input_layernorm.weight"])
            q, k, v = (F.linear(h, own[f"self_attn.{name}_proj.weight"]) for name in "qkv")
            q, k, v = (value.unflatten(-1, (-1, SIZE)).transpose(1, 2) for value in (q, k, v))
            q, k = _turned(q), _turned(k)
            k, v = (value.repeat_interleave(HEADS // kv_heads, dim=1) for value in (k, v))
            scores = q @ k.transpose(-1, -2) * SIZE**-0.5
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            mixed = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2)
            x = x + F.linear(mixed, own["self_attn.o_proj.weight"])
        if width:
            h = _norm(x, own["post_attention_layernorm.weight"])
            gate, up = (F.linear(h, own[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, own["mlp.down_proj.weight"])
    return F.linear(_norm(x, weights["model.norm.weight"]), weights["lm_head.weight"])


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * gain


def _turned(x: Tensor) -> Tensor:
    """The rotary embedding, halves side by side."""
    angles = torch.arange(x.shape[-2])[:, None] * THETA ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    one, other = x.chunk(2, -1)
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)
