"""Configuration of a decoder whose layers differ: without attention, without FFN, or with an FFN of another width.

    "block_configs": [{"attention": {"no_op": false, "n_heads_in_group": 4, ...}, "ffn": {"ffn_mult": 4.0, ...}}, ...]

One entry for each layer. `n_heads_in_group`: query heads for each key-value head; `ffn_mult`: 1.5 * width /
hidden_size, where the width is a multiple of 256. This file is copied into checkpoint folders: it needs transformers
and nothing else.
"""

import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

WIDTH_MULTIPLE = 256
# Of other releases of the format: a layer with one of these set is not what its other entries say.
_CHANGES_THE_LAYER = ("mamba", "moe", "llama4", "parallel_blocks")


@dataclass
class AttentionBlock:
    """The attention of one layer."""

    n_heads_in_group: int | None = None
    no_op: bool = False
    num_sink_tokens: int | None = None
    replace_with_linear: bool = False
    sparsify: list[str] | None = None
    unshifted_sink: bool = False
    use_prefill_window_in_sink_attention: bool = False
    window_length: int | None = None


@dataclass
class FFNBlock:
    """The gated FFN of one layer."""

    ffn_mult: float | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: list[str] | None = None


@dataclass
class Block:
    """One layer. With neither attention nor FFN it is padding: the stream passes through."""

    attention: AttentionBlock
    ffn: FFNBlock


@strict  # which looks at real types: no `from __future__ import annotations` here
class DeciLMConfig(LlamaConfig):
    """A `LlamaConfig` with `block_configs`, a list of `Block`s or of dicts with the same keys.

    `intermediate_size` and `num_key_value_heads` may be null, as in published files: then they are the widest FFN's
    and the first attention's. What a layer has is said by its block alone.
    """

    model_type: ClassVar[str] = "nemotron-nas"
    # There is none without blocks. Older transformers (5.19, under vLLM) would make one, only to print another.
    has_no_defaults_at_init: ClassVar[bool] = True

    intermediate_size: int | None = None  # type: ignore[assignment]  # null in published files
    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.block_configs = [self._block(number, found) for number, found in enumerate(self.block_configs or ())]
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(
                f"block_configs has {len(self.block_configs)} entries for num_hidden_layers = {self.num_hidden_layers}"
            )
        groups = [block.attention.n_heads_in_group for block in self.block_configs if block.attention.n_heads_in_group]
        if self.num_key_value_heads is None and groups:
            self.num_key_value_heads = self.num_attention_heads // groups[0]
        if self.intermediate_size is None:
            self.intermediate_size = max((self.ffn_width(layer) for layer in range(len(self.block_configs))), default=0)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def ffn_width(self, layer: int) -> int:
        """Intermediate channels of a layer's FFN; 0 where it has none."""
        ffn = self.block_configs[layer].ffn  # type: ignore[index]  # a list since __post_init__
        if ffn.no_op or ffn.ffn_mult is None:
            return 0
        width = int(2 * ffn.ffn_mult * self.hidden_size / 3)
        return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def unsupported(self) -> str | None:
        """What a block asks for that `modeling_decilm.py` does not compute, or None."""
        for layer, block in enumerate(self.block_configs or ()):
            for part, found in (("attention", block.attention), ("ffn", block.ffn)):
                for name in ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens"):
                    value = getattr(found, name, None)
                    if not found.no_op and value:
                        return f"block_configs[{layer}].{part}.{name} = {value!r} is not supported"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the rotary embedding also as older readers and other engines look for it."""
        found: dict[str, Any] = super().to_dict()
        found["block_configs"] = [asdict(block) for block in self.block_configs or ()]
        found.pop("kv_sharing_modes", None)  # the model sets it, from the blocks
        rope = dict(found.get("rope_parameters") or {})
        if "rope_theta" in rope:
            found["rope_theta"] = rope.pop("rope_theta")
        found["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return found

    def _block(self, number: int, found: Any) -> Block:
        if isinstance(found, Block):
            return found
        where = f"block_configs[{number}]"
        if not isinstance(found, dict) or not {"attention", "ffn"} <= found.keys():
            raise ValueError(f'{where} must be {{"attention": {{...}}, "ffn": {{...}}}}, not {found!r}')
        _warn_of_others(where, found, ("attention", "ffn"))
        ffn = dict(found["ffn"])
        width = ffn.pop("intermediate_size", None)  # what some files say instead of `ffn_mult`
        if width is not None and ffn.get("ffn_mult") is None:
            if width % WIDTH_MULTIPLE:
                raise ValueError(f"{where}.ffn.intermediate_size = {width} is no multiple of {WIDTH_MULTIPLE}")
            ffn["ffn_mult"] = 1.5 * width / self.hidden_size
        if (activation := ffn.pop("hidden_act", None)) not in (None, self.hidden_act):
            raise ValueError(f"{where}.ffn.hidden_act = {activation!r} is not the model's {self.hidden_act!r}")
        block = Block(
            attention=_read(AttentionBlock, f"{where}.attention", found["attention"]),
            ffn=_read(FFNBlock, f"{where}.ffn", ffn),
        )
        _check(where, block, self.num_attention_heads)
        return block


def _read(kind: type[Any], where: str, found: dict[str, Any]) -> Any:
    names = [one.name for one in fields(kind)]
    _warn_of_others(where, found, names)
    return kind(**{name: found[name] for name in names if found.get(name) is not None})


def _warn_of_others(where: str, found: dict[str, Any], known: Any) -> None:
    for name in found.keys() - set(known):
        if name in _CHANGES_THE_LAYER and found[name]:
            raise ValueError(f"{where}.{name} is not supported: {found[name]!r}")
        if found[name]:
            warnings.warn(f"{where}.{name} is unknown and left out", stacklevel=2)


def _check(where: str, block: Block, heads: int) -> None:
    attention, ffn = block.attention, block.ffn
    for part, one in (("attention", attention), ("ffn", ffn)):
        if one.no_op and one.replace_with_linear:
            raise ValueError(f"{where}.{part} has both no_op and replace_with_linear")
    group = attention.n_heads_in_group
    if attention.no_op or attention.replace_with_linear:
        attention.n_heads_in_group = None
    elif type(group) is not int or group < 1 or heads % group:
        raise ValueError(f"{where}.attention.n_heads_in_group = {group!r} must divide the {heads} attention heads")
    if ffn.no_op or ffn.replace_with_linear:
        ffn.ffn_mult = None
    elif type(ffn.ffn_mult) not in (int, float) or not 0 < ffn.ffn_mult < 2**20:  # type: ignore[operator]
        raise ValueError(f"{where}.ffn.ffn_mult = {ffn.ffn_mult!r} must be a positive number")
    else:
        ffn.ffn_mult = float(ffn.ffn_mult)  # type: ignore[arg-type]


__all__ = ["DeciLMConfig"]
