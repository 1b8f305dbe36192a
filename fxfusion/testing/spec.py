"""What a random stack consists of, as plain data: easy to draw, to shrink, to print and to repeat."""

from __future__ import annotations

from dataclasses import dataclass
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

PACKED: tuple[Layout, ...] = ("chunk", "split", "slices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ffn:
    """A residual feed-forward block, `x + output(scale * F(norm(x)))`. `flat`: computed on `[tokens, hidden]`.

    `inner`: what is computed over all intermediate channels, between the activation and the last linear layer.
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


Block = Ffn | Again | Mixer | StreamNorm | Tap | NotFfn


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSpec:
    """Blocks in order. `seed`: of the weights; `hidden`: channels of the stream; `tokens`: `[batch, seq]`."""

    blocks: tuple[Block, ...]
    seed: int = 0
    hidden: int = 8
    tokens: tuple[int, int] = (2, 3)
