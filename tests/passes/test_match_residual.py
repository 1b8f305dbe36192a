"""Walking the stream: what is a residual branch, who else reads or writes, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfusion
from fxfusion.errors import RefusalCode
from fxfusion.graph import ops
from tests.helpers import (
    Attention,
    Custom,
    Float32Rms,
    Stack,
    assert_fuses,
    assert_not_fused,
    capture,
    customs,
    fuse_captured_graph,
    match,
    randomise,
    refusal_with,
    refused,
    stack,
    tokens,
)

Run = Callable[[Any, Tensor], Any]


def ffn(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x * m.g, m.w1)), m.w2)


class Wired(nn.Module):
    """Two hand-written blocks `a` and `b`, wired by a function of the module and the input."""

    def __init__(self, run: Run, **sizes: int) -> None:
        super().__init__()
        self.a, self.b = Custom(ffn, seed=1, **sizes), Custom(ffn, seed=2, **sizes)
        self.run = run
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def f1(m: Any, x: Tensor) -> Tensor:
    return ffn(m.a, x)


def f2(m: Any, x: Tensor) -> Tensor:
    return ffn(m.b, x)


# --- spellings of the same sum ------------------------------------------------------------------------


def in_place_on_branches(m: Any, x: Tensor) -> Tensor:
    y = f1(m, x).add_(x)
    return f2(m, y).add_(y)


def two_dimensional(m: Any, x: Tensor) -> Tensor:
    y = x + f1(m, x.view(-1, 8)).view(2, 5, 8)
    return y + f2(m, y.view(-1, 8)).view(2, 5, 8)


def flat_stream(m: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, 8)
    y = (flat + f1(m, flat)).view(2, 5, 8)
    again = y.view(-1, 8)
    return (again + f2(m, again)).view(2, 5, 8)


def with_casts(m: Any, x: Tensor) -> Tensor:
    y = x.to(torch.float64) + f1(m, x.to(torch.float64)).type_as(x)
    return y.to(torch.float64) + f2(m, y)


def dropout_in_eval(m: Any, x: Tensor) -> Tensor:
    y = F.dropout(x + F.dropout(f1(m, x), 0.1, training=False), 0.1, training=False)
    return y + F.dropout(f2(m, y), 0.1, training=False)


SAME_SUM: dict[str, Run] = {
    "stream first": lambda m, x: (y := x + f1(m, x)) + f2(m, y),
    "branch first": lambda m, x: f2(m, y := f1(m, x) + x) + y,
    "torch.add": lambda m, x: torch.add(y := torch.add(x, f1(m, x)), f2(m, y)),
    "method": lambda m, x: (y := x.add(f1(m, x))).add(f2(m, y)),
    "in place on the branches": in_place_on_branches,
    "two-dimensional branches": two_dimensional,
    "two-dimensional stream": flat_stream,
    "casts that do nothing": with_casts,
    "in place on the stream": lambda m, x: (y := x + f1(m, x)).add_(f2(m, y)),
    "in place on the stream, which is returned": lambda m, x: ((y := x + f1(m, x)).add_(f2(m, y)), y)[1],
    "dropout in eval mode": dropout_in_eval,
    "a module that returns its input's alias": lambda m, x: (y := (x + f1(m, x)).view(2, 5, 8)) + f2(m, y),
}


@pytest.mark.parametrize("run", SAME_SUM.values(), ids=SAME_SUM)
def test_every_spelling_of_the_residual_sum_fuses(run: Run) -> None:
    model, x = Wired(run), tokens()
    with torch.no_grad():
        fused, report = fuse_captured_graph(capture(model, x, how="symbolic"))
        assert [len(group.members) for group in report.groups] == [2]
        parallel = x + f1(model, x) + f2(model, x)
        assert torch.allclose(fused, parallel, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(model(x), parallel, rtol=1e-3)


def two_losses(m: Any, x: Tensor) -> Tensor:
    y = (x := x + f1(m, x)) + f2(m, x)
    return y.mean() + F.linear(y, m.a.square).mean()


def two_choices(m: Any, x: Tensor) -> Tensor:
    y = (x := x + f1(m, x)) + f2(m, x)
    return y.argmax(-1) + F.linear(y, m.a.square).argmax(-1)


@pytest.mark.parametrize(
    "run",
    [lambda m, x: (x := x + f1(m, x)) + f2(m, x) + m.a.s, two_losses, two_choices],
    ids=["a constant", "losses", "whole numbers"],
)
def test_other_sums_are_no_candidates(run: Run) -> None:
    """They are neither matched nor refused: a report that names them would hide what matters."""
    found = match(Wired(run), tokens(), how="symbolic")
    assert len(found.ffns) == 2 and found.refusals == ()
    one_more = Wired(lambda m, x: run(m, x.sin() + F.linear(x, m.a.square)))  # a sum that is a candidate
    refusal_with(match(one_more, tokens(), how="symbolic").refusals, RefusalCode.SCALED_STREAM)


@pytest.mark.parametrize("how", ["dynamo", "export"])
def test_in_place_operators_of_other_captures(how: Any) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = f1(m, x)
        y += x
        z = f2(m, y)
        z += y
        return z

    model, x = Wired(run), tokens()
    fused, report = fuse_captured_graph(capture(model, x, how=how))
    assert [len(group.members) for group in report.groups] == [2]
    fused = fused[0] if isinstance(fused, (tuple, list)) else fused
    assert torch.allclose(fused, x + f1(model, x) + f2(model, x), rtol=1e-10, atol=1e-12)


# --- what must stay -----------------------------------------------------------------------------------


def written_input_at_the_end(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + f1(m, x)
    y = y + f2(m, y)
    return y, x.mul_(2)


def written_alias_of_the_stream(m: Any, x: Tensor) -> Tensor:
    y = x + f1(m, x)
    alias = y.view(-1, 8)
    alias.mul_(2)
    return y + f2(m, y)


def written_alias_behind_an_attribute(m: Any, x: Tensor) -> Tensor:
    y = x + f1(m, x)
    y.mT.mul_(2)
    return y + f2(m, y)


def written_weight(m: Any, x: Tensor) -> Tensor:
    y = x + f1(m, x)
    m.b.w1.mul_(2)
    return y + f2(m, y)


def copied_into_a_weight(m: Any, x: Tensor) -> Tensor:
    y = x + f1(m, x)
    m.a.w2.copy_(m.b.w2)
    return y + f2(m, y)


def written_view_of_a_weight(m: Any, x: Tensor) -> Tensor:
    m.b.w1.view(-1).mul_(2)
    y = x + f1(m, x)
    return y + f2(m, y)


def written_copy_of_a_weight(m: Any, x: Tensor) -> Tensor:
    weight = m.b.w1 * 1.0
    weight.mul_(2)
    y = x + f1(m, x)
    return y + F.linear(F.silu(F.linear(y, weight)), m.b.w2)


def written_inner_view(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.a.w1)
    h.view(-1, 12).mul_(2)
    y = x + F.linear(F.silu(h), m.a.w2)
    return y + f2(m, y)


def inner_value_read(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = F.silu(F.linear(x, m.a.w1))
    y = x + F.linear(h, m.a.w2)
    return y + f2(m, y), h.sum()


def branch_read(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    branch = f1(m, x)
    y = x + branch
    return y + f2(m, y), branch


def norm_read(m: Any, x: Tensor) -> Tensor:
    n = F.rms_norm(x, (8,))
    y = x + f1(m, n)
    return y + f2(m, y) + n.sum()


def inner_value_is_flagged(m: Any, x: Tensor) -> Tensor:
    y = x + F.linear(F.silu(F.linear(x, m.a.w1)).requires_grad_(), m.a.w2)
    return y + f2(m, y)


STAYS = refused(
    MUTATION={
        "an input written at the end": (written_input_at_the_end, "in place"),
        "an alias of the stream written": (written_alias_of_the_stream, "in place"),
        "an alias through an attribute": (written_alias_behind_an_attribute, "in place"),
        "a weight written": (written_weight, "in place"),
        "a weight copied into": (copied_into_a_weight, "in place"),
        "a view of a weight written": (written_view_of_a_weight, "in place"),
        "an inner value that gets a flag": (inner_value_is_flagged, "there for its effect"),
    },
    OTHER_ACTIVATION={"a copy of a weight written": (written_copy_of_a_weight, "also reads mul")},
    INNER_VALUE_READ={
        "a view of an inner value written": (written_inner_view, "outside the branch"),
        "an inner value read": (inner_value_read, "outside the branch"),
        "a branch's result read": (branch_read, "outside the branch"),
        "a normalised input read": (norm_read, "outside the branch"),
    },
    STREAM_READ={
        "the stream between them read": (lambda m, x: ((y := x + f1(m, x)) + f2(m, y), y), "also reads the stream")
    },
    POST_NORM={
        "the stream between them detached": (lambda m, x: (y := (x + f1(m, x)).detach()) + f2(m, y), "detach"),
        "a norm on the stream": (lambda m, x: (y := F.rms_norm(x + f1(m, x), (8,))) + f2(m, y), "rms_norm"),
        "dropout in training on the stream": (
            lambda m, x: (y := F.dropout(x + f1(m, x), 0.1, training=True)) + f2(m, y),
            "dropout",
        ),
    },
    SCALED_STREAM={
        "a scaled stream": (lambda m, x: (y := 0.5 * x + f1(m, x)) * 0.5 + f2(m, y), "not passed on as it is"),
        "a stream scaled by a parameter": (
            lambda m, x: (y := m.a.one * x + f1(m, x)) * m.b.one + f2(m, y),
            "not passed on as it is",
        ),
        "a broadcasting sum": (lambda m, x: (y := x[:, :1] + f1(m, x)) + f2(m, y), "getitem"),
    },
    OUTPUT_NORM={
        "a norm on the branch": (
            lambda m, x: (y := x + F.rms_norm(x + f1(m, x), (8,))) + F.rms_norm(y + f2(m, y), (8,)),
            "a norm stands between",
        )
    },
    DIFFERENT_LITERAL={
        "another formula before the first linear layer": (
            lambda m, x: (y := x + f1(m, x * 2 + 1)) + f2(m, y),
            "differs from",
        )
    },
    STRUCTURE={
        "a scaled sum": (lambda m, x: torch.add(y := torch.add(x, f1(m, x), alpha=2), f2(m, y), alpha=2), "alpha=2")
    },
    BROADCAST={
        "a stream repeated by the sum": (
            lambda m, x: (z := x.sum(1, keepdim=True)) + ffn(m.a, z).expand(2, 5, 8),
            "broadcasts",
        )
    },
    RANDOM={
        "dropout in training": (
            lambda m, x: (y := x + F.dropout(f1(m, x), 0.1, training=True)) + F.dropout(f2(m, y), 0.1, training=True),
            "random",
        )
    },
    TOKEN_MIXING={
        "tokens that change places": (
            lambda m, x: (y := x + torch.cat([x[:, 1:], x[:, :1]], 1)) + f2(m, y),
            "lets one token see another",
        ),
        "a weight on the left": (
            lambda m, x: (
                x + m.a.square[: x.shape[1], : x.shape[1]] @ F.silu(m.b.w1[:, : x.shape[1]] @ x)[:, : x.shape[1]]
            ),
            "matmul",
        ),
        "a convolution": (lambda m, x: x + F.conv1d(F.linear(x, m.a.w1).mT, m.b.w2[..., None]).mT, "conv"),
        "a gain made from the tokens": (
            lambda m, x: (y := x + f1(m, x * x.mean(1, keepdim=True))) + f2(m, y * y.mean(1, keepdim=True)),
            "mean",
        ),
    },
    SHARED_WEIGHT={
        "one weight twice in one feed-forward": (
            lambda m, x: (y := x + F.linear(F.silu(F.linear(x, m.a.square)), m.a.square)) + f2(m, y),
            "use one weight",
        ),
        "one weight in two members": (lambda m, x: (y := x + f1(m, x)) + f1(m, y), "use one weight"),
        "a weight read outside": (lambda m, x: ((y := x + f1(m, x)) + f2(m, y)) @ m.a.w1.t(), "outside the FFNs"),
    },
    ROUTER={
        "experts chosen by topk": (
            lambda m, x: x + f1(m, x) * F.linear(x, m.a.square).topk(2)[0].sum(-1, keepdim=True),
            "topk",
        )
    },
)


NAME_SIZES = (
    "a convolution",
    "a broadcasting sum",
    "a stream repeated by the sum",
    "a view of an inner value written",
    "a weight read outside",
)


@pytest.mark.parametrize(("run", "code", "words"), STAYS)
def test_what_must_stay_stays_with_a_reason(run: Run, code: RefusalCode, words: str) -> None:
    model = Wired(run).requires_grad_(False)
    assert_not_fused(model, [tokens()], code, words)


def test_a_result_that_is_written_into_memory_made_before_is_refused_with_a_reason() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[:, 1:] = f1(m, x)[:, 1:]
        y = x + made
        return y + f2(m, y)

    found = match(Wired(run), tokens())
    assert [str(ffn.add) for ffn in found.ffns] == ["add_1"]
    refusal_with(found.refusals, RefusalCode.MUTATION, "filled in place, by setitem")


@pytest.mark.parametrize(("run", "code", "words"), [case for case in STAYS if case.id not in NAME_SIZES])
def test_what_must_stay_stays_where_all_sizes_coincide(run: Run, code: RefusalCode, words: str) -> None:
    """Batch = sequence = hidden = width: no shape can tell the axes apart."""
    assert_not_fused(Wired(run, width=8).requires_grad_(False), [tokens(8, 8)], code, words)


@pytest.mark.parametrize(
    ("run", "extra"),
    [
        (lambda m, x, c: (y := x + f1(m, x + c)) + f2(m, y + c), (tokens(),)),
        (lambda m, x, c: (y := x + f1(m, x) * c) + f2(m, y) * c, (tokens(),)),
        (lambda m, x, c: (y := x + f1(m, x * (1 + c))) + f2(m, y * (1 + c)), (tokens()[:, :1],)),
    ],
    ids=["added before", "gate after", "gain of the norm"],
)
def test_a_second_activation_in_the_branch_is_refused(run: Any, extra: Sequence[Tensor]) -> None:
    class Conditioned(Wired):
        def forward(self, x: Tensor, c: Tensor) -> Any:
            return run(self, x, c)

    assert_not_fused(Conditioned(run), [tokens(), *extra], RefusalCode.OTHER_ACTIVATION, "also reads c")


@pytest.mark.parametrize("shape", [(5, 1), (2, 1, 1), (2, 5, 8), (1, 5, 1)])
def test_a_gain_that_differs_by_token_is_refused(shape: tuple[int, ...]) -> None:
    class ByToken(Wired):
        def __init__(self) -> None:
            super().__init__(lambda m, x: (y := x + f1(m, x * m.gain)) + f2(m, y * m.gain))
            self.gain = nn.Parameter(torch.rand(shape, dtype=torch.float64))

    assert_not_fused(ByToken(), [tokens()], RefusalCode.OTHER_ACTIVATION, "differs by token")


def test_a_parallel_block_with_attention_is_refused_and_named() -> None:
    attention = randomise(Attention())

    def run(m: Any, x: Tensor) -> Tensor:
        x = x + (m.attention(x) - x) + f1(m, x)
        return x + (m.attention(x) - x) + f2(m, x)

    model = Wired(run)
    model.attention = attention
    found = match(model, tokens(), how="symbolic")
    assert not found.ffns and found.mixers
    refusal_with(found.refusals, RefusalCode.OTHER_ACTIVATION, "parallel block with a mixer")


class Cached(nn.Module):
    """Attention whose keys reach it through a cache that they are written into, from the stream itself."""

    def __init__(self, made_inside: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.register_buffer("cache", torch.zeros(2, 5, 8, dtype=torch.float64))
        self.made_inside = made_inside

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        query = self.query(y)
        cache = torch.zeros_like(x) if self.made_inside else self.cache
        cache.index_copy_(1, torch.arange(x.shape[1]), self.key(y))
        return y + F.scaled_dot_product_attention(query, cache, cache)


@pytest.mark.parametrize("made_inside", [False, True])
def test_what_a_mixer_writes_into_its_cache_belongs_to_it(made_inside: bool) -> None:
    (mixer,) = match(randomise(Cached(made_inside)), tokens()).mixers
    assert [ops.op_name(node) for node in mixer.nodes].count("linear") == 2
    assert "index_copy" in [ops.op_name(node) for node in mixer.nodes]
    assert any(node.name.startswith("arange") for node in mixer.nodes)


def test_attention_between_feed_forwards_is_a_mixer_and_ends_the_chain() -> None:
    blocks = list(stack(count=3).layers)
    model = Stack([blocks[0], randomise(Attention()), blocks[1], blocks[2]])
    found = match(model, tokens())
    assert len(found.ffns) == 3
    assert [mixer.op for mixer in found.mixers] == ["scaled_dot_product_attention"]
    refusal_with(found.refusals, RefusalCode.TOKEN_MIXING, "scaled_dot_product_attention")


def test_grad_mode_that_changes_inside_a_branch_is_refused() -> None:
    class Frozen(Wired):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = F.linear(x, self.a.w1)
            y = x + F.linear(F.silu(h), self.a.w2)
            return y + f2(self, y)

    assert_not_fused(Frozen(lambda m, x: x), [tokens()], RefusalCode.MODE_CHANGE, "inside the branch", how="dynamo")


def test_activation_checkpointing_is_refused_and_named() -> None:
    from torch.utils.checkpoint import checkpoint

    def run(m: Any, x: Tensor) -> Tensor:
        y = x + checkpoint(lambda v: f1(m, v), x, use_reentrant=False)
        return y + checkpoint(lambda v: f2(m, v), y, use_reentrant=False)

    found = match(Wired(run), tokens().requires_grad_())
    assert not found.ffns
    refusal_with(found.refusals, RefusalCode.HIGHER_ORDER, "sub-graph")


def test_a_weight_of_a_tensor_subclass_is_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Wired(SAME_SUM["stream first"])
    model.b.w1 = nn.Parameter(TwoTensor(model.b.w1.data, model.b.w1.data))
    found = match(model, tokens(), how="dynamo")
    assert len(found.ffns) == 1
    refusal_with(found.refusals, RefusalCode.TENSOR_SUBCLASS, "TwoTensor")


def test_a_stream_that_changes_its_dtype_is_refused() -> None:
    model = Wired(lambda m, x: x.float() + f1(m, x)).requires_grad_(False)
    captured = capture(model, tokens(), how="symbolic")
    _, report = fuse_captured_graph(captured)
    assert not report.groups and report.refusals


class Moving(nn.Module):
    """Blocks whose weights are elsewhere: a branch goes there and comes back, or its weights come at each call."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = stack(), way
        for layer in self.inner.layers:
            (layer.ffn.down if way == "inside" else layer.ffn if way == "weights" else layer).to("meta")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner.layers:
            x = x + self.branch(layer, x)
        return x

    def branch(self, layer: Any, x: Tensor) -> Tensor:
        ffn = layer.ffn
        if self.way == "inside":
            n = layer.norm(x)
            return ffn.down((F.silu(ffn.gate(n)) * ffn.up(n)).to(ffn.down.weight.device)).to(x.device)
        if self.way == "weights":
            n = layer.norm(x)
            gate, up, down = (getattr(ffn, name).weight.to(x.device) for name in ("gate", "up", "down"))
            return F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)
        y = ffn(layer.norm(x.to(ffn.gate.weight.device)))
        ways = {"to": lambda: y.to(x.device), "to like": lambda: y.to(x), "type_as": lambda: y.type_as(x)}
        return {**ways, "cpu": lambda: y.cpu()}[self.way]()


@pytest.mark.parametrize("way", ["to", "to like", "type_as", "cpu", "inside", "weights"])
def test_branches_that_move_between_devices_are_refused(way: str) -> None:
    report = fxfusion.explain(Moving(way), tokens())
    assert not report.groups and all("weights are not there" in note for note in report.notes)
    found = [refusal for refusal in report.refusals if refusal.code is RefusalCode.DIFFERENT_DEVICE]
    assert len(found) == 3 and all("is on meta (offloaded?), the stream on cpu" in each.message for each in found)
    assert all(f"layers_modules_{index}_" in each.message for index, each in enumerate(found))


def test_a_stream_that_goes_on_on_another_device_starts_another_group() -> None:
    class Split(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x.to(layer.ffn.down.weight.device))
            return x

    blocks = stack(count=4).layers
    for block in blocks[2:]:
        block.to("meta")
    report = fxfusion.explain(Split(blocks), tokens())
    assert [[member.name for member in group.members] for group in report.groups] == [
        ["layers.0.ffn", "layers.1.ffn"],
        ["layers.2.ffn", "layers.3.ffn"],
    ]


def test_a_hand_written_gelu_is_no_residual_node() -> None:
    """`h + 0.0447 * h**3` inside the activation is a sum of a value and a branch that reads it."""

    def gelu(m: Any, x: Tensor) -> Tensor:
        h = F.linear(x * m.g, m.w1)
        return F.linear(0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * h**3))), m.w2)

    model = customs(gelu)
    found = match(model, tokens(), how="symbolic")
    assert len(found.ffns) == 2 and not found.refusals
    assert_fuses(model, tokens())


def test_every_refusal_names_its_layer_and_source_line() -> None:
    blocks = list(stack(norm=Float32Rms, count=1).layers)
    model = Stack([*blocks, randomise(Attention())])
    refusal = refusal_with(match(model, tokens()).refusals, RefusalCode.TOKEN_MIXING)
    assert refusal.layer.startswith("layers.1")
    assert refusal.source.startswith("blocks.py:")


def test_a_module_that_cannot_be_opened_is_refused_with_its_name() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x  # data-dependent: symbolic_trace cannot open it

    class Leaf(Custom):
        def __init__(self) -> None:
            super().__init__(ffn)
            self.odd = Opaque()

        def forward(self, x: Tensor) -> Tensor:
            return x + ffn(self, self.odd(x))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Opaque)

    from fxfusion.compiler.capture import CapturedGraph
    from fxfusion.graph.dataflow import GraphFacts
    from fxfusion.passes.match_residual import match_residual

    model = Stack([Leaf(), Leaf()])
    graph = Tracer().trace(model)
    for node in graph.nodes:  # no capture can fill these in: shapes by hand
        if node.op in ("placeholder", "call_module", "call_function"):
            width = 12 if "linear" in node.name and node.args[1].name.endswith("w1") or "silu" in node.name else 8
            node.meta["example_value"] = torch.empty(2, 5, width, dtype=torch.float64, device="meta")
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            node.meta["example_value"] = getattr(model.get_submodule(owner), name).to("meta")
    captured = CapturedGraph(module=torch.fx.GraphModule(model, graph), inputs=(tokens(),))
    found = match_residual(GraphFacts(captured.module.graph, ()), {})
    assert not found.ffns
    refusal_with(found.refusals, RefusalCode.UNKNOWN_OP, "could not be opened")


def test_tied_weights_of_a_traced_model_are_one_weight() -> None:
    """Traced modules reach a tied weight by two paths."""
    model = stack(count=2)
    model.layers[1].ffn.gate.weight = model.layers[0].ffn.gate.weight
    for how in ("symbolic", "export", "dynamo"):
        assert_not_fused(model, [tokens()], RefusalCode.SHARED_WEIGHT, "use one weight", how=how)


def test_a_tied_weight_written_by_its_other_name_is_seen() -> None:
    model = Wired(lambda m, x: _written_then_read(m, x)).requires_grad_(False)
    model.b.w1 = model.a.w3
    assert_not_fused(model, [tokens()], RefusalCode.MUTATION, "written in place")


def _written_then_read(m: Any, x: Tensor) -> Tensor:
    m.a.w3.mul_(2)
    return (y := x + f1(m, x)) + f2(m, y)


def test_what_mixes_tokens_by_its_name_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is told by its operation, without a run on fake tensors for each structure."""
    monkeypatch.setattr("fxfusion.passes.match_residual.check_token_wise", lambda *_: pytest.fail("it was run"))
    (mixer,) = match(Wired(lambda m, x: x + F.scaled_dot_product_attention(x, x, x)), tokens()).mixers
    assert "attention" in mixer.op


class Latents(nn.Module):
    """A stream that the module owns: no input reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(tokens())
        self.inner = stack(count=2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inner(self.start)


@pytest.mark.parametrize("how", ["symbolic", "dynamo"])
def test_a_stream_of_weights_alone_is_refused(how: Any) -> None:
    found = match(Latents(), tokens(), how=how)
    assert not found.ffns
    assert [refusal.code for refusal in found.refusals] == [RefusalCode.STRUCTURE] * 2
    refusal_with(found.refusals, RefusalCode.STRUCTURE, "depends on no input")
