"""Tiny hand-written modules and their parallel form, in plain eager PyTorch.

The parallel form knows nothing of graphs, so it is no copy of what it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, WIDTH = 8, 12

# --- modules ------------------------------------------------------------------------------------------


class Rms(nn.Module):
    """RMSNorm with the gain last; `offset=1.0` gives the `(1 + w)` form."""

    def __init__(self, hidden: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return n * (self.weight + self.offset) if self.offset else n * self.weight


class Float32Rms(Rms):
    """The same with statistics in float32, as most decoders write it."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Gated(nn.Module):
    """down(act(gate(n)) * up(n))"""

    def __init__(
        self,
        hidden: int = HIDDEN,
        width: int = WIDTH,
        bias: bool = False,
        act: Callable[..., Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias)
        self.up = nn.Linear(hidden, width, bias)
        self.down = nn.Linear(width, hidden, bias)
        self.act = act

    def forward(self, n: Tensor) -> Tensor:
        return self.down(self.act(self.gate(n)) * self.up(n))


class Plain(nn.Module):
    """fc2(act(fc1(n)))"""

    def __init__(
        self, hidden: int = HIDDEN, width: int = WIDTH, bias: bool = True, act: Callable[..., Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, width, bias)
        self.fc2 = nn.Linear(width, hidden, bias)
        self.act = act

    def forward(self, n: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(n)))


class Packed(nn.Module):
    """gate and up in one weight; `cut(h)` gives the two halves."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]], hidden: int = HIDDEN, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, False)
        self.down = nn.Linear(width, hidden, False)
        self.cut = cut

    def forward(self, n: Tensor) -> Tensor:
        gate, up = self.cut(self.gate_up(n))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + ffn(norm(x))"""

    def __init__(self, norm: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.ffn = norm, ffn

    def branch(self, n: Tensor) -> Tensor:
        """What is added, of the normed stream."""
        found: Tensor = self.ffn(n)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class Of(nn.Module):
    """A function of the module and the stream, with weights, modules and buffers of its own."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **own: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, value in own.items():
            put = setattr if isinstance(value, nn.Module | nn.Parameter) else nn.Module.register_buffer
            put(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Attention(nn.Module):
    """A residual token mixer: x + attention(x)."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden, False)
        self.out = nn.Linear(hidden, hidden, False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


class Stack(nn.Module):
    """Blocks one after the other, under `layers.<i>`."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def randomise(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter random, norm gains and biases too, in eval mode; the module itself is returned."""
    generator = torch.Generator().manual_seed(seed)
    module.to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scaled = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0 + 0.3 * noise
            parameter.copy_(scaled)
    return module


def stack(
    ffn: Callable[..., nn.Module] = Gated,
    norm: Callable[[int], nn.Module] = Rms,
    *,
    count: int = 3,
    hidden: int = HIDDEN,
    widths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **ffn_options: Any,
) -> Stack:
    """`count` blocks `x + ffn(norm(x))` with random weights; `widths` gives each its own width."""
    sizes = widths or [WIDTH] * count
    blocks = [Block(norm(hidden), ffn(hidden=hidden, width=width, **ffn_options)) for width in sizes]
    model = Stack(blocks)
    randomise(model, seed, dtype)
    return model


def tokens(batch: int = 2, seq: int = 5, hidden: int = HIDDEN, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random stream `[batch, seq, hidden]`."""
    return torch.randn(batch, seq, hidden, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


# --- the parallel form --------------------------------------------------------------------------------


def branch_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """F of a block `x + F(x)`: its own parts where it has them, else what it adds to the stream."""
    if isinstance(block, Block):
        return lambda x: block.branch(block.norm(x))
    return lambda x: block(x) - x


def parallel_form(
    model: Stack,
    x: Tensor,
    groups: Sequence[Sequence[int]] | None = None,
    norm: Literal["fold", "last"] = "fold",
) -> Tensor:
    """The stack with every member of a group reading the group's input. Default: one group of all.

    `norm="last"`: every member reads the input through the last member's norm (blocks only).
    """
    blocks = list(model.layers)
    groups = [list(range(len(blocks)))] if groups is None else groups
    group_at = {group[0]: group for group in groups}
    index = 0
    while index < len(blocks):
        group = group_at.get(index)
        if group is None:
            x, index = blocks[index](x), index + 1
            continue
        members = [blocks[number] for number in group]
        if norm == "last":
            normed = members[-1].norm(x)
            x = x + sum(member.branch(normed) for member in members)
        else:
            x = x + sum(branch_of(member)(x) for member in members)
        index = group[-1] + 1
    return x


# --- hand-written blocks ------------------------------------------------


class Custom(nn.Module):
    """`x + branch(self, x)` with a set of parameters to choose from.

    g, b, s: `[hidden]`; w1, w3: `[width, hidden]`; w2: `[hidden, width]`; wide: `[2 * width, hidden]`;
    square: `[hidden, hidden]`; b1, a: `[width]`; b2: `[hidden]`; one, two: a single number.
    """

    def __init__(
        self, branch: Callable[[Any, Tensor], Tensor], hidden: int = HIDDEN, width: int = WIDTH, seed: int = 0
    ) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("g", "b", "s", "b2"), (hidden,))
        shapes |= dict.fromkeys(("w1", "w3"), (width, hidden)) | dict.fromkeys(("b1", "a"), (width,))
        shapes |= {"w2": (hidden, width), "wide": (2 * width, hidden), "square": (hidden, hidden)}
        shapes |= {"one": (), "two": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.branch = branch
        randomise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self, x)


def customs(*branches: Callable[[Any, Tensor], Tensor], count: int = 2, **sizes: int) -> Stack:
    """A stack of hand-written blocks: one per branch, or `count` of the only branch."""
    chosen = branches if len(branches) > 1 else branches * count
    return Stack(Custom(branch, seed=index, **sizes) for index, branch in enumerate(chosen))
