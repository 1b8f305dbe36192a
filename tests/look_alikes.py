"""Blocks that must not fuse: `y = block(m, x)` on the stream x, `[2, 4, 8]`, with the refusal each deserves.

Each is stacked twice, so that the two would fuse with each other if the guard that refuses them fell.
Everything is as square as it can be (hidden = width, batch and seq alike where that hides a mistake).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fxfusion.errors import RefusalCode

HIDDEN, BATCH, SEQ = 8, 2, 4
Stream = Callable[["Weights", Tensor], Tensor]
LOOK_ALIKES: dict[str, tuple[Stream, RefusalCode]] = {}


class Weights(nn.Module):
    """The weights of one block; `tokens` and `other` are for what differs from an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.gate, self.up, self.down, self.other = (nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.5) for _ in range(4))
        self.tokens = nn.Parameter(torch.randn(SEQ, SEQ))
        self.by_token = nn.Parameter(torch.randn(SEQ, HIDDEN))
        self.vector = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.kernel = nn.Parameter(torch.randn(HIDDEN, HIDDEN, 3) * 0.5)
        self.register_buffer("state", torch.ones(HIDDEN))

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (HIDDEN,), self.gain, 1e-6)

    def hidden(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return F.silu(F.linear(n, self.gate)) * F.linear(n, self.up)

    def ffn(self, x: Tensor) -> Tensor:
        return F.linear(self.hidden(x), self.down)


class Twice(nn.Module):
    """The block two times, with weights of their own."""

    def __init__(self, block: Stream) -> None:
        super().__init__()
        self.block = block
        self.layers = nn.ModuleList(Weights() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.block(layer, x)
        return x


def refused(code: RefusalCode) -> Callable[[Stream], Stream]:
    def add(block: Stream) -> Stream:
        LOOK_ALIKES[block.__name__] = (block, code)
        return block

    return add


# --- tokens see each other ------------------------------------------------------------------------------


@refused(RefusalCode.TOKEN_MIXING)
def attention(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x)
    q, k, v = (F.linear(n, w) for w in (m.gate, m.up, m.other))
    return x + F.linear(F.scaled_dot_product_attention(q, k, v), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def attention_by_hand(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x)
    scores = F.linear(n, m.gate) @ F.linear(n, m.up).transpose(-1, -2)
    return x + F.linear(torch.softmax(scores, -1) @ n, m.down)


@refused(RefusalCode.TOKEN_MIXING)
def convolution(m: Weights, x: Tensor) -> Tensor:
    h = F.conv1d(F.linear(m.norm(x), m.up).transpose(1, 2), m.kernel, padding=1)
    return x + F.linear(h.transpose(1, 2), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def cumulative_sum(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(torch.cumsum(F.linear(m.norm(x), m.up), 1), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def constant_on_the_left(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(m.tokens @ F.linear(m.norm(x), m.up)), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def linear_over_tokens(m: Weights, x: Tensor) -> Tensor:
    mixed = F.linear(m.norm(x).transpose(1, 2), m.tokens).transpose(1, 2)
    return x + F.linear(F.silu(F.linear(mixed, m.up)), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def shifted_tokens(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(torch.roll(m.norm(x), 1, 1), m.up)), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def padded_tokens(m: Weights, x: Tensor) -> Tensor:
    before = F.pad(m.norm(x), (0, 0, 1, -1))
    return x + F.linear(F.silu(F.linear(before, m.up)), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def mean_over_tokens(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x - x.mean(1, keepdim=True))


@refused(RefusalCode.TOKEN_MIXING)
def mean_over_batch(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x - x.mean(0, keepdim=True))


@refused(RefusalCode.TOKEN_MIXING)
def norm_over_everything(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x / x.abs().amax())


@refused(RefusalCode.TOKEN_MIXING)
def softmax_over_tokens(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(torch.softmax(x, 1))


@refused(RefusalCode.UNKNOWN_OP)
def layer_norm_over_two_axes(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(F.layer_norm(x, (SEQ, HIDDEN)), m.up)), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def tokens_as_channels(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x).reshape(BATCH, HIDDEN, SEQ)
    n = (n * 2).reshape(BATCH, SEQ, HIDDEN)
    return x + F.linear(F.silu(F.linear(n.relu(), m.up)), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def first_token_only(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x - x[:, :1])


@refused(RefusalCode.OTHER_ACTIVATION)
def learned_positions(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x + m.by_token)


@refused(RefusalCode.TOKEN_MIXING)
def mean_on_the_wrong_axis(m: Weights, x: Tensor) -> Tensor:
    flat = x.reshape(-1, HIDDEN)  # as many tokens as channels: the means are broadcast over the channels
    return x + m.ffn(flat - flat.mean(-1)).view_as(x)


@refused(RefusalCode.TOKEN_MIXING)
def tokens_of_another_shape(m: Weights, x: Tensor) -> Tensor:
    flat = x.reshape(-1, HIDDEN)
    return x + m.ffn(flat * flat.unsqueeze(0)).view_as(x)


@refused(RefusalCode.TOKEN_MIXING)
def means_of_other_tokens(m: Weights, x: Tensor) -> Tensor:
    moved = x.mean(-1).reshape(BATCH * SEQ, 1).relu().reshape(BATCH, SEQ)
    return x + m.ffn(x - moved.unsqueeze(-1))


@refused(RefusalCode.BROADCAST)
def repeated_tokens(m: Weights, x: Tensor) -> Tensor:
    n = x.unsqueeze(1).expand(BATCH, 3, SEQ, HIDDEN)
    return x + F.linear(F.silu(F.linear(n, m.up)).mean(1), m.down)


@refused(RefusalCode.OTHER_ACTIVATION)
def reads_nothing(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(torch.ones(BATCH, SEQ, HIDDEN))


@refused(RefusalCode.ROUTER)
def mixture_of_experts(m: Weights, x: Tensor) -> Tensor:
    weight, chosen = torch.topk(torch.softmax(F.linear(x, m.other)[..., :2], -1), 1)
    return x + torch.where(chosen == 0, weight, 1 - weight) * m.ffn(x)


# --- channels see each other between the linear layers ----------------------------------------------------


@refused(RefusalCode.TOKEN_MIXING)
def softmax_over_parts_of_the_channels(m: Weights, x: Tensor) -> Tensor:
    h = F.linear(m.norm(x), m.up)
    return x + F.linear(torch.softmax(h.unflatten(-1, (2, -1)), -1).flatten(-2), m.down)


@refused(RefusalCode.TOKEN_MIXING)
def norm_over_parts_of_the_channels(m: Weights, x: Tensor) -> Tensor:
    h = F.linear(m.norm(x), m.up).unflatten(-1, (2, -1))
    return x + F.linear(F.rms_norm(h, (HIDDEN // 2,)).flatten(-2), m.down)


@refused(RefusalCode.NOT_POINTWISE)
def channels_turned_round_between(m: Weights, x: Tensor) -> Tensor:
    h = F.linear(m.norm(x), m.up)
    return x + F.linear(h[..., [*range(1, HIDDEN), 0]], m.down)


@refused(RefusalCode.TOKEN_MIXING)
def reversed_channels(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(torch.flip(F.linear(m.norm(x), m.up), (-1,)), m.down)


@refused(RefusalCode.STRUCTURE)
def channel_gate(m: Weights, x: Tensor) -> Tensor:
    h = F.linear(m.norm(x), m.up)
    return x + F.linear(h * torch.sigmoid(h[..., :1]), m.down)


@refused(RefusalCode.LINEAR_COUNT)
def one_linear(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(m.norm(x)), m.down)


@refused(RefusalCode.LINEAR_COUNT)
def einsum_only(m: Weights, x: Tensor) -> Tensor:
    return x + torch.einsum("bsh,oh->bso", m.norm(x), m.up)


@refused(RefusalCode.LINEAR_COUNT)
def three_linears(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(F.silu(F.linear(m.norm(x), m.up)), m.other)), m.down)


@refused(RefusalCode.STRUCTURE)
def gate_on_another_value(m: Weights, x: Tensor) -> Tensor:
    h = F.silu(F.linear(x, m.gate)) * F.linear(m.norm(x), m.up)
    return x + F.linear(h, m.down)


@refused(RefusalCode.STRUCTURE)
def normed_value_in_the_middle(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x)
    return x + F.linear(F.silu(F.linear(n, m.up)) * n, m.down)


@refused(RefusalCode.STRUCTURE)
def stream_in_the_middle(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(m.norm(x), m.up)) + x, m.down)


@refused(RefusalCode.LINEAR_COUNT)
def weight_per_token(m: Weights, x: Tensor) -> Tensor:
    stacked = torch.stack([m.up, m.other])  # [batch, in, out]: another weight for each batch row
    return x + F.linear(torch.matmul(m.norm(x), stacked), m.down)


# --- what follows the last linear layer -------------------------------------------------------------------


@refused(RefusalCode.OUTPUT_NORM)
def norm_of_the_output_and_the_stream(m: Weights, x: Tensor) -> Tensor:
    return x + F.rms_norm(m.ffn(x) + m.norm(x), (HIDDEN,), m.vector)


@refused(RefusalCode.OUTPUT_NORM)
def norm_over_parts_of_the_output(m: Weights, x: Tensor) -> Tensor:
    return x + F.rms_norm(m.ffn(x).unflatten(-1, (2, -1)), (HIDDEN // 2,)).flatten(-2)


@refused(RefusalCode.OUTPUT_NORM)
def norm_of_the_output_with_a_gain_per_token(m: Weights, x: Tensor) -> Tensor:
    return x + F.rms_norm(m.ffn(x), (HIDDEN,)) * m.by_token


@refused(RefusalCode.TOKEN_MIXING)
def norm_of_the_output_over_tokens(m: Weights, x: Tensor) -> Tensor:
    b = m.ffn(x)
    return x + b * torch.rsqrt(b.square().mean(1, keepdim=True))


@refused(RefusalCode.STRUCTURE)
def activation_on_the_output(m: Weights, x: Tensor) -> Tensor:
    return x + torch.tanh(m.ffn(x))


@refused(RefusalCode.STRUCTURE)
def gate_on_the_output(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x) * torch.sigmoid(x)


@refused(RefusalCode.STRUCTURE)
def scale_per_token(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x) * m.by_token


@refused(RefusalCode.STRUCTURE)
def scaled_addition(m: Weights, x: Tensor) -> Tensor:
    return torch.add(x, m.ffn(x), alpha=2)


# --- the stream is not a plain sum ------------------------------------------------------------------------


@refused(RefusalCode.SCALED_STREAM)
def scaled_stream(m: Weights, x: Tensor) -> Tensor:
    return x * 0.5 + m.ffn(x)


@refused(RefusalCode.SCALED_STREAM)
def gated_stream(m: Weights, x: Tensor) -> Tensor:
    return x * m.vector + m.ffn(x)


@refused(RefusalCode.POST_NORM)
def post_norm(m: Weights, x: Tensor) -> Tensor:
    return m.norm(x + m.ffn(x))


@refused(RefusalCode.BROADCAST)
def broadcast_branch(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x[:, :1])


@refused(RefusalCode.DIFFERENT_DTYPE)
def wider_branch(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x.to(torch.float32)).to(torch.float64)


@refused(RefusalCode.OTHER_ACTIVATION)
def parallel_block(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x)
    mixed = F.linear(F.scaled_dot_product_attention(n, n, n), m.other)
    return (x + mixed) + m.ffn(x)


# --- semantics that a wide FFN could not keep -------------------------------------------------------------


@refused(RefusalCode.RANDOM)
def dropout_in_training(m: Weights, x: Tensor) -> Tensor:
    return x + F.dropout(m.ffn(x), 0.3, training=True)


@refused(RefusalCode.RANDOM)
def noise(m: Weights, x: Tensor) -> Tensor:
    h = m.hidden(x)
    return x + F.linear(h * torch.rand_like(h), m.down)


@refused(RefusalCode.MODE_CHANGE)
def detached(m: Weights, x: Tensor) -> Tensor:
    return x + m.ffn(x.detach())


@refused(RefusalCode.MODE_CHANGE)
def detached_middle(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(m.hidden(x).detach(), m.down)


@refused(RefusalCode.MODE_CHANGE)
def no_grad_inside(m: Weights, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.hidden(x)
    return x + F.linear(h, m.down)


@refused(RefusalCode.MODE_CHANGE)
def autocast_inside(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        h = F.silu(F.linear(n, m.up))
    return x + F.linear(h.float(), m.down)


@refused(RefusalCode.HIGHER_ORDER)
def checkpointed(m: Weights, x: Tensor) -> Tensor:
    return x + torch.utils.checkpoint.checkpoint(m.ffn, x, use_reentrant=False)


@refused(RefusalCode.MUTATION)
def stream_written_by_the_branch(m: Weights, x: Tensor) -> Tensor:
    x = x * 1.0
    n = x.mul_(1.5)
    return x + F.linear(F.silu(F.linear(n, m.up)), m.down)


@refused(RefusalCode.MUTATION)
def stream_written_later(m: Weights, x: Tensor) -> Tensor:
    y = x + m.ffn(x)
    x.mul_(1.0)
    return y


@refused(RefusalCode.MUTATION)
def inner_value_written_and_read(m: Weights, x: Tensor) -> Tensor:
    h = F.linear(m.norm(x), m.up)
    return x + F.linear(h.sigmoid_() * h, m.down)


@refused(RefusalCode.MUTATION)
def addition_in_place(m: Weights, x: Tensor) -> Tensor:
    x += m.ffn(x)
    return x


@refused(RefusalCode.MUTATION)
def weight_written(m: Weights, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.state.mul_(0.9)
    return x + F.linear(m.hidden(x) * m.state, m.down)


@refused(RefusalCode.SHARED_WEIGHT)
def one_weight_twice(m: Weights, x: Tensor) -> Tensor:
    n = m.norm(x)
    return x + F.linear(F.silu(F.linear(n, m.up)) * F.linear(n, m.up), m.down)


@refused(RefusalCode.SHARED_WEIGHT)
def tied_up_and_down(m: Weights, x: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(m.norm(x), m.up)), m.up.t())
