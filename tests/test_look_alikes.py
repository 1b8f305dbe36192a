"""What must not fuse: refused with the right code, and every output bit as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from fxfusion import ffn_fusion
from fxfusion.backend import last_reports
from fxfusion.errors import RefusalCode
from fxfusion.report import FusionReport
from tests.look_alikes import BATCH, HIDDEN, LOOK_ALIKES, SEQ, Twice, Weights


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def compiled_equals_eager(model: nn.Module) -> FusionReport:
    """Run compiled and eager on equal inputs, compare every bit, and return the report of what was compiled."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, SEQ, HIDDEN)
    twin = copy.deepcopy(model)
    before = last_reports()
    torch.manual_seed(1)
    got = torch.compile(model, backend=ffn_fusion, options={"compiler": "eager", "strict": True})(x.clone())
    torch.manual_seed(1)
    want = twin(x.clone())
    reports = [report for report in last_reports() if all(report is not old for old in before)]
    assert len(reports) == 1, "a graph break hides what is tested"
    for one, other in zip(_tuple(got), _tuple(want), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    return reports[0]


def _tuple(value: object) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


@pytest.mark.parametrize("name", LOOK_ALIKES, ids=[f"{name}-{code.value}" for name, (_, code) in LOOK_ALIKES.items()])
def test_a_look_alike_is_refused(name: str) -> None:
    block, code = LOOK_ALIKES[name]
    report = compiled_equals_eager(Twice(block))
    assert report.groups == ()
    assert code in {refusal.code for refusal in report.refusals}, str(report)


def test_the_same_blocks_do_fuse_without_what_makes_them_look_alikes() -> None:
    """Otherwise every test above would pass for a matcher that finds nothing."""
    torch.manual_seed(0)
    model, x = Twice(lambda m, x: x + m.ffn(x)), torch.randn(BATCH, SEQ, HIDDEN)
    got = torch.compile(model, backend=ffn_fusion, options={"compiler": "eager"})(x)
    first, second = model.layers
    torch.testing.assert_close(got, x + first.ffn(x) + second.ffn(x))
    assert [len(group.members) for group in last_reports()[-1].groups] == [2]


# --- two good FFNs that do not fit each other, or have something between them ----------------------------


class Pair(nn.Module):
    """`run(first, second, x)` over two sets of weights."""

    def __init__(self, run: Callable[[Weights, Weights, Tensor], object], share: str = "") -> None:
        super().__init__()
        self.run = run
        self.first, self.second = Weights(), Weights()
        if share:
            setattr(self.second, share, getattr(self.first, share))

    def forward(self, x: Tensor) -> object:
        return self.run(self.first, self.second, x)


def _then(one: Callable[[Weights, Tensor], Tensor], other: Callable[[Weights, Tensor], Tensor]) -> Pair:
    def run(first: Weights, second: Weights, x: Tensor) -> Tensor:
        y = x + one(first, x)
        return y + other(second, y)

    return Pair(run)


def _plain(act: Callable[[Tensor], Tensor], norm: Callable[[Weights, Tensor], Tensor] = Weights.norm) -> Callable:
    return lambda m, x: F.linear(act(F.linear(norm(m, x), m.up)), m.down)


def _tapped(first: Weights, second: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + first.ffn(x)
    return y + second.ffn(y), y


def _read_by_a_view(first: Weights, second: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + first.ffn(x)
    return y + second.ffn(y), y[:, -1]


def _inner_value_out(first: Weights, second: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    h = first.hidden(x)
    y = x + F.linear(h, first.down)
    return y + second.ffn(y), h


def _branch_out(first: Weights, second: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    b = first.ffn(x)
    y = x + b
    return y + second.ffn(y), b


def _branch_twice(first: Weights, second: Weights, x: Tensor) -> Tensor:
    b = first.ffn(x)
    y = x + b + b
    return y + second.ffn(y)


def _later_reader(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = x + first.ffn(x)
    z = y + second.ffn(y)
    return z * y


def _norm_between(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = second.norm(x + first.ffn(x))
    return y + second.ffn(y)


def _mode_between(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = x + first.ffn(x)
    with torch.no_grad():
        return y + second.ffn(y)


def _reads_the_first_stream(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = x + first.ffn(x)
    return y + second.ffn(x)


def _mixer_between(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = x + first.ffn(x)
    y = y + F.linear(F.scaled_dot_product_attention(y, y, y), first.other)
    return y + second.ffn(y)


def _written_between(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = x + first.ffn(x)
    y.mul_(2.0)
    return y + second.ffn(y)


def _outside_reader(first: Weights, second: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + first.ffn(x)
    return y + second.ffn(y), F.linear(x, first.up)


def _outside_reader_of_a_cast(first: Weights, second: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + first.ffn(x)
    return y + second.ffn(y), F.linear(x, first.up.t().to(torch.float32).contiguous())


def _plain_pair(first: Weights, second: Weights, x: Tensor) -> Tensor:
    y = x + first.ffn(x)
    return y + second.ffn(y)


def _rms(eps: float) -> Callable[[Weights, Tensor], Tensor]:
    return lambda m, x: F.rms_norm(x, (HIDDEN,), m.gain, eps)


PAIRS: dict[str, tuple[Callable[[], nn.Module], RefusalCode]] = {
    "other activation": (lambda: _then(_plain(F.silu), _plain(F.relu)), RefusalCode.DIFFERENT_OPS),
    "other literal": (
        lambda: _then(_plain(lambda h: h.clamp(max=1.0)), _plain(lambda h: h.clamp(max=2.0))),
        RefusalCode.DIFFERENT_LITERAL,
    ),
    "other eps": (
        lambda: _then(_plain(F.silu, _rms(1e-5)), _plain(F.silu, _rms(1e-6))),
        RefusalCode.DIFFERENT_LITERAL,
    ),
    "other norm": (
        lambda: _then(_plain(F.silu), _plain(F.silu, lambda m, x: F.layer_norm(x, (HIDDEN,), m.gain))),
        RefusalCode.DIFFERENT_OPS,
    ),
    "no norm": (lambda: _then(_plain(F.silu), _plain(F.silu, lambda m, x: x)), RefusalCode.DIFFERENT_OPS),
    "gated and plain": (lambda: _then(Weights.ffn, _plain(F.silu)), RefusalCode.DIFFERENT_OPS),
    "other dtype inside": (
        lambda: _then(_plain(F.silu), _plain(lambda h: F.silu(h.double()).float())),
        RefusalCode.DIFFERENT_OPS,
    ),
    "gate and up swapped": (
        lambda: _then(
            lambda m, x: F.linear((lambda a, b: F.silu(a) * b)(*F.linear(x, m.other).chunk(2, -1)), m.down[:, :4]),
            lambda m, x: F.linear((lambda a, b: F.silu(b) * a)(*F.linear(x, m.other).chunk(2, -1)), m.down[:, :4]),
        ),
        RefusalCode.DIFFERENT_OPS,
    ),
    "a norm that is no gain": (
        lambda: _then(*[_plain(F.silu, lambda m, x: torch.tanh(x * m.gain))] * 2),
        RefusalCode.NORM_UNPROVED,
    ),
    "a norm with its gain before": (
        lambda: _then(*[_plain(F.silu, lambda m, x: F.rms_norm(x * m.gain, (HIDDEN,)))] * 2),
        RefusalCode.NORM_UNPROVED,
    ),
    "the stream is an output": (lambda: Pair(_tapped), RefusalCode.STREAM_READ),
    "a view of the stream is an output": (lambda: Pair(_read_by_a_view), RefusalCode.STREAM_READ),
    "the stream is read later": (lambda: Pair(_later_reader), RefusalCode.STREAM_READ),
    "an inner value is an output": (lambda: Pair(_inner_value_out), RefusalCode.INNER_VALUE_READ),
    "the branch is an output": (lambda: Pair(_branch_out), RefusalCode.INNER_VALUE_READ),
    "the branch is added twice": (lambda: Pair(_branch_twice), RefusalCode.INNER_VALUE_READ),
    "a norm between": (lambda: Pair(_norm_between), RefusalCode.POST_NORM),
    "grad mode changes between": (lambda: Pair(_mode_between), RefusalCode.MODE_CHANGE),
    "already parallel": (lambda: Pair(_reads_the_first_stream), RefusalCode.OTHER_ACTIVATION),
    "a mixer between": (lambda: Pair(_mixer_between), RefusalCode.TOKEN_MIXING),
    "the stream is written between": (lambda: Pair(_written_between), RefusalCode.MUTATION),
    "shared up": (lambda: Pair(_plain_pair, "up"), RefusalCode.SHARED_WEIGHT),
    "shared down": (lambda: Pair(_plain_pair, "down"), RefusalCode.SHARED_WEIGHT),
    "a weight read outside": (lambda: Pair(_outside_reader), RefusalCode.SHARED_WEIGHT),
    "a cast of a weight read outside": (lambda: Pair(_outside_reader_of_a_cast), RefusalCode.SHARED_WEIGHT),
}


@pytest.mark.parametrize("name", PAIRS, ids=[f"{name}-{code.value}" for name, (_, code) in PAIRS.items()])
def test_two_ffns_that_must_stay_apart(name: str) -> None:
    make, code = PAIRS[name]
    report = compiled_equals_eager(make())
    assert report.groups == ()
    assert code in {refusal.code for refusal in report.refusals}, str(report)


def test_a_shift_that_members_share_follows_their_gains() -> None:
    """Fold norms with gains of their own and one shift: n * g1 + s and n * g2 + s (once fused wrongly)."""
    torch.manual_seed(0)
    model = Pair(_layer_normed, share="vector").double()
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
    got = torch.compile(model, backend=ffn_fusion, options={"compiler": "eager"})(x)
    ffn = _plain(F.silu, _shifted)
    assert [len(group.members) for group in last_reports()[-1].groups] == [2]
    torch.testing.assert_close(got, x + ffn(model.first, x) + ffn(model.second, x), rtol=1e-10, atol=1e-10)


def _shifted(m: Weights, x: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,), m.gain, m.vector)


def _layer_normed(first: Weights, second: Weights, x: Tensor) -> Tensor:
    ffn = _plain(F.silu, _shifted)
    y = x + ffn(first, x)
    return y + ffn(second, y)


def test_a_sub_graph_inside_a_branch_is_named() -> None:
    """The activation alone is checkpointed: the linear layers are in sight, what is between them is not."""

    def block(m: Weights, x: Tensor) -> Tensor:
        h = F.linear(m.norm(x), m.up)
        return x + F.linear(torch.utils.checkpoint.checkpoint(F.silu, h, use_reentrant=False), m.down)

    report = compiled_equals_eager(Twice(block))
    assert report.groups == ()
    messages = [refusal.message for refusal in report.refusals if refusal.code is RefusalCode.HIGHER_ORDER]
    assert sum("hides part of the branch" in message for message in messages) == 2
