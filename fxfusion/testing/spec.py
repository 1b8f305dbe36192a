"""What a random stack consists of, as plain data: easy to draw, to shrink, to print and to repeat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["separate", "chunk", "split", "slices", "interleaved", "plain", "conv1d"]
NormKind = Literal["none", "rms", "rms_plus_one", "rms_manual", "layer", "layer_no_bias", "layer_plain"]
Activation = Literal["relu", "silu", "gelu", "tanh", "square"]
Inner = Literal["none", "softmax", "rms", "layer"]
Scale = Literal["none", "literal", "layer_scale"]
MixerKind = Literal["attention", "conv", "cumsum", "token_linear"]
LookAlike = Literal[
    "router",
    "one_linear",
    "three_linears",
    "channel_flip",
    "norm_of_a_sum",
    "scaled_stream",
    "second_input",
    "token_bias",
    "detach",
    "inner_read",
    "reads_earlier",
    "tied_outside",
]

EffectKind = Literal[
    "count",
    "foreach_count",
    "out_count",
    "put_count",
    "set_count",
    "view_count",
    "copy_count",
    "noise",
    "custom_count",
    "python_count",
    "copy_cache",
    "set_cache",
    "out_cache",
    "foreach_cache",
    "custom_cache",
    "add_",
    "set_channel",
    "put_batch",
    "scale_view",
    "scale_flat",
    "foreach_scale",
    "out_scale",
    "copy_from_cache",
    "custom_write",
    "view_read_later",
    "dropout",
]
Within = Literal["nothing", "scaled", "set", "out", "dropout", "counted", "kept"]
Sum = Literal["new", "into_branch", "into_stream"]

_CHANGE_STREAM = frozenset(
    "add_ set_channel put_batch scale_view scale_flat foreach_scale out_scale copy_from_cache custom_write "
    "dropout".split()
)
_UNCERTAIN = frozenset(("custom_count", "python_count", "custom_cache", "view_read_later")) | _CHANGE_STREAM
PACKED: tuple[Layout, ...] = ("chunk", "split", "slices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """A residual feed-forward block, `x + output(scale * F(norm(x)))`. `flat`: computed on `[tokens, hidden]`.

    `inner`: what is computed over all intermediate channels, between the activation and the last linear layer.
    `within`: an effect on the intermediate value, behind the activation: written in place, dropped out in training,
    read by the stack's memory. `sum`: whether the addition makes a new tensor or writes one of the two.
    """

    layout: Layout = "separate"
    norm: NormKind = "rms"
    activation: Activation = "silu"
    scale: Scale = "none"
    bias: bool = False
    flat: bool = False
    width: int = 8
    inner: Inner = "none"
    output: NormKind = "none"
    within: Within = "nothing"
    sum: Sum = "new"

    @property
    def acts(self) -> bool:
        """Whether it does more than return a value."""
        return self.within != "nothing" or self.sum != "new"

    @property
    def kind(self) -> tuple[str, ...]:
        """What two blocks must have in common to be fused. Widths and biases may differ, and scales unless a norm
        follows them.

        Without a norm nothing but linear layers sees the flat form, so flat and not flat fit each other.
        """
        layout = "packed" if self.layout in PACKED else "plain" if self.layout == "conv1d" else self.layout
        scale = self.scale if self.output != "none" else ""
        return (
            layout,
            self.norm,
            self.activation,
            str(self.flat and self.norm != "none"),
            self.inner,
            self.output,
            scale,
            self.within if self.within != "counted" else "nothing",  # which has nothing to do with the value
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """The FFN module of an earlier block, called once more. `block`: the earlier block's index."""

    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer:
    """A residual block in which tokens see each other."""

    kind: MixerKind = "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamNorm:
    """A norm on the residual stream itself (post-norm)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """The stream as it was `back` blocks ago becomes an output."""

    back: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFfn:
    """A block that looks like an FFN and must not be fused."""

    kind: LookAlike = "one_linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Something done to the stream or to the stack's memory between two blocks; see `fxfusion.testing.effects`."""

    kind: EffectKind = "count"

    @property
    def changes_stream(self) -> bool:
        return self.kind in _CHANGE_STREAM


Block = Ffn | Again | Mixer | StreamNorm | Tap | NotFfn | Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSpec:
    """Blocks in order. `seed`: of the weights; `hidden`: channels of the stream; `tokens`: `[batch, seq]`."""

    blocks: tuple[Block, ...]
    seed: int = 0
    hidden: int = 8
    tokens: tuple[int, int] = (2, 3)

    @property
    def has_effects(self) -> bool:
        return any(isinstance(block, Effect) or _acts(block) for block in self.blocks)

    def without_effects(self) -> StackSpec:
        """The same stack, which computes and does nothing else."""
        kept = [number for number, block in enumerate(self.blocks) if not isinstance(block, Effect)]
        blocks: list[Block] = []
        for number in kept:
            block = self.blocks[number]
            if isinstance(block, Again):
                block = Again(block=kept.index(block.block))
            elif isinstance(block, Ffn):
                block = replace(block, within="nothing", sum="new")
            blocks.append(block)
        return replace(self, blocks=tuple(blocks))

    @property
    def is_certain(self) -> bool:
        """Whether it is known what must be fused. Where it is not, less may be: the compiler understands less."""
        return not any(
            _acts(block) or (isinstance(block, Effect) and block.kind in _UNCERTAIN) for block in self.blocks
        )


def _acts(block: Block) -> bool:
    return isinstance(block, Ffn) and block.acts
