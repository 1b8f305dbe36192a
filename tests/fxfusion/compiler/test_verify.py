"""verify: right rewrites pass in every precision, and every kind of wrong one fails, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfusion
from fxfusion.compiler.capture import CapturedGraph
from fxfusion.compiler.observe import Seen
from fxfusion.compiler.pipeline import FusedGraph, fuse_captured
from fxfusion.compiler.verify import Comparison, Form, Proof, lowest_bits, made_up_inputs, prove
from fxfusion.errors import VerificationError
from fxfusion.graph import ops
from fxfusion.passes import end_folded
from fxfusion.passes.build_wide import WideBuilder
from fxfusion.passes.choose_form import Target
from fxfusion.plan.policy import FusionPolicy
from tests.helpers import Float32Rms, Gated, Plain, Rms, Stack, capture, fuse, randomise, stack, tokens

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def proved(model: Callable[..., Any], *inputs: Any, **policy: Any) -> FusedGraph:
    """The model's only graph, fused with wide weights and proved."""
    setting = Target(request="concatenated")
    return fuse_captured(capture(model, *inputs), FusionPolicy(**policy), verify="numeric", compiled_for=setting)


def rows(fused: FusedGraph) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in fused.report.verifications}


def half_precise(dtype: torch.dtype) -> type[nn.Module]:
    return Float32Rms if dtype.itemsize == 2 else nn.LayerNorm


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_rewrite_passes(dtype: torch.dtype) -> None:
    model = stack(Plain, half_precise(dtype), hidden=32, dtype=dtype)
    fused = proved(model, tokens(hidden=32, dtype=dtype))
    assert list(rows(fused)) == ["group 0", "whole graph", "clean-up"] and fused.notes == ()
    row = rows(fused)["group 0"]
    assert row["passed"] and 0 < row["error"] <= row["limit"] and row["group"] == 0
    assert row["dtype"] == str(dtype).removeprefix("torch.")
    if dtype in (torch.float64, torch.float32):
        assert row["limit"] == {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    assert rows(fused)["whole graph"]["passed"] and rows(fused)["whole graph"]["group"] is None


def test_what_is_not_fused_is_not_run() -> None:
    assert proved(nn.Linear(8, 8), torch.randn(2, 8)).report.verifications == ()


# --- wrong packing, of every group -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_perturbed_weight_fails_by_the_name_of_its_group(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wrong: int
) -> None:
    """The down projection of one of two groups is 10 % too large; in float64 one entry is off by 1e-6."""
    right = end_folded.down_weight

    def down_weight(wide: WideBuilder) -> fx.Node:
        node = right(wide)
        if wide.index != wrong:
            return node
        change = 1.1 if dtype != torch.float64 else torch.ones((), dtype=dtype) + 1e-6
        made = wide.editor.call(torch.mul, node, float(change))
        node.meta.pop("fxfusion_pack")
        made.meta["fxfusion_pack"] = wide.index
        return made

    model = stack(Gated, Float32Rms if dtype.itemsize == 2 else Rms, count=4, hidden=32, dtype=dtype)
    two = {"groups": [["layers.0.ffn", "layers.1.ffn"], ["layers.2.ffn", "layers.3.ffn"]]}
    x = tokens(hidden=32, dtype=dtype)
    assert len(fuse(model, x, plan=two, verify="numeric")[1].verifications) == 4
    monkeypatch.setattr(end_folded, "down_weight", down_weight)
    with pytest.raises(VerificationError, match=f"group {wrong} differs from the parallel form"):
        fuse(model, x, plan=two, verify="numeric")


@pytest.mark.parametrize(("norm", "left_out"), [("fold", "_reread"), ("last", "_share_last_norm")])
def test_a_pass_that_does_not_make_groups_parallel_is_caught(
    monkeypatch: pytest.MonkeyPatch, norm: str, left_out: str
) -> None:
    """What the parallel form is, is not taken from the pass."""
    from fxfusion.passes import parallelise

    def by_members() -> FusedGraph:
        setting = Target(request="members")
        return fuse_captured(captured, FusionPolicy(norm=norm), verify="numeric", compiled_for=setting)

    captured = capture(stack(), tokens())
    found = rows(by_members())
    assert list(found) == ["group 0", "whole graph", "clean-up"] and found["group 0"]["error"] <= 1e-10
    monkeypatch.setattr(parallelise, left_out, lambda *_: None)
    with pytest.raises(VerificationError, match="group 0 differs from the parallel form"):
        by_members()


def test_weights_in_the_wrong_order_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifted weights are computed from the right sources, in the wrong places."""
    import fxfusion.compiler.verify

    right = fxfusion.compiler.verify.packed_tensors

    def swapped(*args: Any) -> dict[str, Tensor]:
        found = right(*args)
        return dict(zip(found, reversed(found.values()), strict=True))

    monkeypatch.setattr(fxfusion.compiler.verify, "packed_tensors", swapped)
    with pytest.raises(VerificationError, match="whole graph: linear.* does not run"):
        proved(stack(hidden=8, widths=[12, 16]), tokens())


def test_mixers_that_read_one_stream_are_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.passes import concat_parallel_mixers
    from tests.passes.test_concat_parallel_mixers import decoder

    policy = {"windows": [{"members": [0, 1, 2], "mixers": "wide"}]}
    captured = capture(decoder(), tokens())

    def run() -> FusedGraph:
        setting = Target(request="concatenated")
        return fuse_captured(captured, FusionPolicy.resolve(policy), verify="numeric", compiled_for=setting)

    found = rows(run())
    assert list(found) == ["mixers 0", "group 0", "whole graph", "clean-up"]
    assert 0 < found["mixers 0"]["error"] <= found["mixers 0"]["limit"] == 1e-10 and found["mixers 0"]["group"] is None
    monkeypatch.setattr(concat_parallel_mixers, "_folded", lambda editor, linear, own: linear.weight)
    with pytest.raises(VerificationError, match="mixers 0 differs from the parallel form"):
        run()


# --- what is outside the groups --------------------------------------------------------------------------


class Cached(Stack):
    """Writes what it adds to the stream into a buffer, and into an input."""

    def __init__(self) -> None:
        super().__init__(stack().layers)
        self.key = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(2, 5, 8))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        key = self.key(x).cumsum(1)
        self.cache.copy_(key)
        cache[:, 1:3] = key[:, 1:3]
        return super().forward(x + self.cache + cache)


def cached() -> tuple[nn.Module, Tensor, Tensor]:
    return randomise(Cached()), tokens(), torch.zeros(2, 5, 8, dtype=torch.float64)


def same_graph(captured: CapturedGraph, edit: Callable[[fx.Graph], None] | None = None) -> Proof:
    """The captured graph against an edited copy of itself."""
    tensors = made_up_inputs(captured.module, captured.inputs, captured.values)
    other = captured.copy().module
    if edit is not None:
        edit(other.graph)
    return prove(Form(captured.module), other, tensors, "whole graph")


def named(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if ops.op_name(node) == name)


def test_what_the_graph_writes_is_compared_and_the_callers_stays_as_it_is() -> None:
    model, x, cache = cached()
    (row,) = same_graph(capture(model, x, cache)).rows
    assert (row.error, row.limit, row.passed) == (0.0, 1e-10, True)
    assert not proved(model, x, cache).notes and not cache.any() and not model.cache.any()


@pytest.mark.parametrize(("write", "name"), [("copy", "buffers_cache"), ("setitem", "l_args_1_")])
def test_a_wrong_write_fails_by_the_name_of_what_is_written(write: str, name: str) -> None:
    class Apart(Cached):
        """Nothing but the writes shows what is written."""

        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            super().forward(x, cache)
            return Stack.forward(self, x)

    def slightly_more(graph: fx.Graph) -> None:
        node = named(graph, write)
        value = node.args[-1]
        with graph.inserting_before(node):
            node.args = (*node.args[:-1], graph.call_function(torch.mul, (value, 1.0 + 1e-9)))

    captured = capture(randomise(Apart()), tokens(), torch.zeros(2, 5, 8, dtype=torch.float64))
    with pytest.raises(VerificationError, match=rf"whole graph: \S*{name}\S*, which is written, differs .* 1e-09"):
        same_graph(captured, slightly_more)


def test_a_lost_write_and_changed_places_fail() -> None:
    captured = capture(*cached())
    with pytest.raises(VerificationError, match=r"effect 0 was copy_ and is setitem; 2 became 1"):
        same_graph(captured, lambda graph: graph.erase_node(named(graph, "copy")))

    def swap(graph: fx.Graph) -> None:
        named(graph, "setitem").append(named(graph, "copy"))

    with pytest.raises(VerificationError, match=r"effect 0 was copy_ and is setitem; 2 became 2"):
        same_graph(captured, swap)


class Noisy(Stack):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        noise = nn.functional.dropout(self.embed(ids), 0.5, training=True)
        return super().forward(x + noise).cumsum(1)


def noisy(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    model = Noisy(stack(Gated, Float32Rms).layers)
    model.embed = nn.Embedding(100, 8)
    return randomise(model, dtype=dtype), tokens(dtype=dtype), torch.full((2, 5), 99)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_forms_draw_the_same_and_the_users_random_numbers_stay(dtype: torch.dtype) -> None:
    inputs = noisy(dtype)
    state = torch.get_rng_state()
    fused = proved(*inputs)
    assert fused.notes == (), "ids are those of the call, so all of it could be run"
    assert torch.equal(state, torch.get_rng_state())

    def draw_otherwise(graph: fx.Graph) -> None:
        node = named(graph, "dropout")
        node.args = (node.args[0], 0.25)

    with pytest.raises(VerificationError, match="value 0 that noise drew differs"):
        same_graph(capture(*inputs), draw_otherwise)


# --- what cannot be run ----------------------------------------------------------------------------------


@torch.library.custom_op("fxverify::scaled", mutates_args=("log",))
def scaled(x: Tensor, log: Tensor) -> Tensor:
    log.add_(1)
    return x * 2


@scaled.register_fake
def _(x: Tensor, log: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(Stack):
    """An operation before the FFNs and one behind them that nobody knows; they count how often they ran."""

    def __init__(self) -> None:
        super().__init__(stack().layers)
        self.register_buffer("log", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return scaled(super().forward(scaled(x, self.log)), self.log)


def test_what_is_not_understood_is_not_run_and_the_note_says_so() -> None:
    model = randomise(Opaque())
    fused = proved(model, tokens())
    assert float(model.log) == 0.0 and 0 < rows(fused)["group 0"]["error"] <= 1e-10
    (note,) = fused.notes
    assert "2 operations not run" in note and "fxverify.scaled" in note and "is not understood" in note

    def read_otherwise(graph: fx.Graph) -> None:
        node = [node for node in graph.nodes if "scaled" in node.name][-1]
        with graph.inserting_before(node):
            node.replace_input_with(node.args[0], graph.call_function(torch.neg, (node.args[0],)))

    with pytest.raises(VerificationError, match="value 0 that scaled.* reads differs"):
        same_graph(capture(model, tokens()), read_otherwise)


def test_what_fails_on_made_up_inputs_is_noted_and_the_groups_are_still_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    class Checked(Stack):
        def forward(self, x: Tensor) -> Tensor:
            chosen = torch.bernoulli(x)  # of normal numbers it has none
            return super().forward(x + chosen)

    model = randomise(Checked(stack().layers))
    x = torch.rand(2, 5, 8, dtype=torch.float64)
    fused = proved(model, x)
    (note,) = fused.notes
    assert "1 operation not run" in note and "bernoulli failed" in note
    assert 0 < rows(fused)["group 0"]["error"] <= 1e-10
    _break_packing(monkeypatch)
    with pytest.raises(VerificationError, match="group 0 differs"):
        proved(model, x)


def test_what_fails_in_the_fused_graph_only_is_an_error() -> None:
    def fail(graph: fx.Graph) -> None:
        node = named(graph, "linear")
        node.args = (node.args[0], node.args[0], None)

    with pytest.raises(VerificationError, match="whole graph: linear does not run, .*linear failed: RuntimeError"):
        same_graph(capture(stack(), tokens()), fail)


def test_nan_in_one_form_only_fails_and_in_both_is_noted() -> None:
    model = stack()
    with torch.no_grad():
        model.layers[1].ffn.down.weight.fill_(float("nan"))
    assert any("no finite value" in note for note in proved(model, tokens()).notes)

    def logarithm(graph: fx.Graph) -> None:
        node = named(graph, "silu")
        node.target, node.args, node.kwargs = torch.log, node.args[:1], {}

    with pytest.raises(VerificationError, match="whole graph: output 0 differs from the parallel form by inf"):
        same_graph(capture(stack(), tokens()), logarithm)


def test_weights_on_meta_cannot_be_verified() -> None:
    with pytest.raises(VerificationError, match="meta device"):
        proved(stack().to("meta"), tokens().to("meta"))


class GradientInside(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: Stack.forward(self, y).square().sum())(x)


def test_a_group_inside_a_transform_is_judged_by_what_the_graph_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values mean nothing outside; the operation that forbids hooks on saved tensors runs all the same."""
    model, x = randomise(GradientInside(stack().layers)), tokens()
    options = {"compiler": "eager", "verify": "numeric", "strict": True, "form": "concatenated"}

    def run() -> None:
        torch._dynamo.reset()
        torch.compile(model, backend=fxfusion.ffn_fusion, options=options)(x)

    run()
    report = fxfusion.last_reports()[-1]
    assert [row["part"] for row in report.verifications] == ["whole graph", "clean-up"]
    assert 0 < report.verifications[0]["error"] <= 1e-10
    assert report.notes == (
        "verify: group 0: inside a transform of functorch, so compared by what the whole graph shows",
    )
    _break_packing(monkeypatch)
    with pytest.raises(VerificationError, match="whole graph: output 0 differs"):
        run()


# --- the rule --------------------------------------------------------------------------------------------

ONE = torch.tensor([1.0, 2.0, 4.0])
VALUES: dict[str, tuple[Any, Any, Any, int, bool]] = {  # before, after, in float64, bits of the narrowest float, right
    "float64 to 1e-10": (ONE.double(), ONE.double() + 3e-10, None, 64, True),
    "float64 and no more": (ONE.double(), ONE.double() + 5e-10, None, 64, False),
    "float64 with float32 inside": (ONE.double(), ONE.double() + 3e-6, None, 32, True),
    "float32 to 1e-5": (ONE, ONE + 3e-5, None, 32, True),
    "float32 and no more": (ONE, ONE + 5e-5, None, 32, False),
    "half: twice the other's own error": (ONE + 0.01, ONE - 0.019, ONE.double(), 16, True),
    "half: more than twice": (ONE + 0.01, ONE - 0.021, ONE.double(), 16, False),
    "complex": (torch.complex(ONE, ONE), torch.complex(ONE, ONE + 3e-5), None, 32, True),
    "complex, the imaginary part": (torch.complex(ONE, ONE), torch.complex(ONE, ONE + 1e-3), None, 32, False),
    "complex with half inside": (
        torch.complex(ONE, ONE),
        torch.complex(ONE, ONE + 1e-3),
        torch.complex(ONE, ONE),
        16,
        False,
    ),
    "integers": (torch.arange(3), torch.arange(3), None, 64, True),
    "one integer": (torch.arange(3), torch.tensor([0, 1, 3]), None, 32, False),
    "integers with half inside": (torch.tensor([0, 1, 3]), torch.tensor([0, 1, 4]), torch.arange(3), 16, True),
    "integers that were right": (torch.arange(3), torch.tensor([0, 1, 3]), torch.arange(3), 16, False),
    "truths": (ONE > 1, ONE > 2, None, 64, False),
    "another dtype": (ONE, ONE.double(), None, 32, False),
    "another shape": (ONE, ONE[:2], None, 32, False),
    "no tensor": (ONE, None, None, 32, False),
    "numbers": (3, 3, None, 64, True),
    "other numbers": (3, 4, None, 64, False),
    "infinite in both": (ONE / 0, ONE / 0, None, 32, True),
    "infinite with another sign": (ONE / 0, ONE / -0.0, None, 32, False),
    "NaN in both": (ONE * torch.nan, ONE * torch.nan, None, 32, True),
    "NaN in the second": (ONE, torch.tensor([1.0, 2.0, torch.nan]), None, 32, False),
    "nothing in it": (ONE[:0], ONE[:0], None, 32, True),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_rule(name: str) -> None:
    before, after, truth, bits, right = VALUES[name]
    found = Comparison(Seen({"x": before}), Seen({"x": after}), lambda: Seen({"x": truth}))
    if right:
        assert found.of("part", ["x"], bits).passed
        return
    with pytest.raises(VerificationError, match="part: x differs from the parallel form"):
        found.of("part", ["x"], bits)


def test_float32_that_may_be_multiplied_with_less_is_judged_by_its_own_error() -> None:
    found = Comparison(Seen({"x": ONE + 0.01}), Seen({"x": ONE - 0.01}), lambda: Seen({"x": ONE.double()}))
    with pytest.raises(VerificationError):
        found.of("part", ["x"], 32)
    torch.set_float32_matmul_precision("high")
    try:
        assert found.of("part", ["x"], 32).passed
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_run_in_float64_that_fails_proves_nothing() -> None:
    found = Comparison(Seen({"x": ONE}), Seen({"x": ONE + 1}), lambda: Seen({"x": ONE}, {"linear": "no kernel"}))
    with pytest.raises(VerificationError, match="cannot verify: linear does not run in float64: no kernel"):
        found.of("part", ["x"], 16)


# --- precision -------------------------------------------------------------------------------------------


class Under(Stack):
    """The blocks under a mode of the user's."""

    def __init__(self, mode: Callable[[], Any], norm: Callable[[int], nn.Module] = Rms) -> None:
        super().__init__(stack(Gated, norm, hidden=32, widths=[48, 64, 80]).layers)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            return super().forward(x)


class Nested(Under):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x.cumsum(1) @ self.layers[0].ffn.gate.weight.T @ self.layers[0].ffn.gate.weight
            with torch.autocast("cpu", enabled=False):
                return Stack.forward(self, x + y.float())


def _autocast(dtype: torch.dtype) -> Any:
    return torch.autocast("cpu", dtype)


class HalfInside(nn.Module):
    """A float32 stream, and a branch in half precision; weights of float32 are cast at each call."""

    def __init__(self, dtype: torch.dtype, cast: bool, width: int = 64) -> None:
        super().__init__()
        self.norm = Rms(32)
        self.up, self.down = (nn.Parameter(torch.empty(width, 32)), nn.Parameter(torch.empty(32, width)))
        self.half, self.cast = dtype, cast

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.to(self.half) if self.cast else w for w in (self.up, self.down))
        h = nn.functional.silu(nn.functional.linear(self.norm(x).to(self.half), up))
        return x + nn.functional.linear(h, down).float()


def half_inside(dtype: torch.dtype, cast: bool) -> nn.Module:
    model = randomise(Stack(HalfInside(dtype, cast, width) for width in (48, 64, 80)), dtype=torch.float32)
    for layer in model.layers:
        if not cast:
            layer.up.data, layer.down.data = layer.up.data.to(dtype), layer.down.data.to(dtype)
    return model


HALF = [torch.bfloat16, torch.float16]
PRECISE: dict[str, Callable[[], nn.Module]] = {
    "autocast to bfloat16": lambda: Under(lambda: _autocast(torch.bfloat16)),
    "autocast to float16": lambda: Under(lambda: _autocast(torch.float16)),
    "autocast and a float32 norm": lambda: Under(lambda: _autocast(torch.bfloat16), Float32Rms),
    "half weights, float32 stream": lambda: half_inside(torch.bfloat16, cast=False),
    "weights cast to bfloat16": lambda: half_inside(torch.bfloat16, cast=True),
    "weights cast to float16": lambda: half_inside(torch.float16, cast=True),
}


@pytest.mark.parametrize("name", PRECISE)
def test_half_precision_inside_a_float32_stream(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = PRECISE[name]().float() if name.startswith("autocast") else PRECISE[name]()
    x = tokens(hidden=32, dtype=torch.float32)
    found = rows(proved(model, x))
    assert (
        found["group 0"]["dtype"] == "float32" and 1e-5 < found["group 0"]["error"] <= found["group 0"]["limit"] < 0.05
    )
    assert found["group 0"]["passed"] and found["whole graph"]["passed"]
    _break_down(monkeypatch)
    with pytest.raises(VerificationError, match="group 0 differs"):
        proved(model, x)


def test_autocast_switched_off_inside_is_judged_as_float32() -> None:
    """What is around the group is in half precision, the group itself is not."""
    model = Nested(lambda: None).float()
    x = tokens(hidden=32, dtype=torch.float32)
    found = rows(proved(model, x))
    assert found["group 0"]["limit"] == 1e-5 and found["group 0"]["error"] > 0


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_around_the_compiled_model(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    model, x = stack(hidden=32).float(), tokens(hidden=32, dtype=torch.float32)
    options = {"compiler": "eager", "verify": "numeric", "strict": True, "form": "concatenated"}

    def run() -> None:
        torch._dynamo.reset()
        with torch.no_grad(), torch.autocast("cpu", dtype):
            torch.compile(model, backend=fxfusion.ffn_fusion, options=options)(x)

    run()
    row = fxfusion.last_reports()[-1].verifications[0]
    assert 1e-5 < row["error"] <= row["limit"] < 0.05
    _break_down(monkeypatch)
    with pytest.raises(VerificationError, match="group 0 differs"):
        run()


def test_autocast_keeps_no_cast_of_the_proof() -> None:
    """A weight that the proof cast without gradients would have none in the user's own run under the same autocast."""
    model, x = stack().float(), tokens(dtype=torch.float32)
    options = {"compiler": "eager", "verify": "numeric", "strict": True}
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=fxfusion.ffn_fusion, options=options)(x).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_float32_inside_a_float64_model() -> None:
    row = rows(proved(stack(Gated, Float32Rms), tokens()))["group 0"]
    assert (row["dtype"], row["limit"]) == ("float64", 1e-6) and row["error"] > 0


def test_the_lowest_precision_of_a_graph() -> None:
    graph = capture(lambda x: (x.float().half() + 1).double() * 2, tokens()).module.graph
    names = [node.name for node in graph.nodes]
    assert lowest_bits(graph) == 16 and lowest_bits(graph, names[-2:-1]) == 64
    assert lowest_bits(capture(lambda x: x + 1, torch.arange(3)).module.graph) == 64


# --- where the proof stands ------------------------------------------------------------------------------


def _break_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the gains out of the folded weights."""
    monkeypatch.setattr(WideBuilder, "_fold_gains", lambda self, member, rows: rows)


def _break_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """The members' down projections in another order than their gates and ups."""
    right = end_folded.down_weight

    def reversed_downs(wide: WideBuilder) -> fx.Node:
        node = right(wide)
        flipped = wide.editor.call(torch.flip, node, [1])
        flipped.meta["fxfusion_pack"] = node.meta.pop("fxfusion_pack")
        return flipped

    monkeypatch.setattr(end_folded, "down_weight", reversed_downs)


def test_the_backend_does_not_run_what_was_not_proved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _break_packing(monkeypatch)
    model, x = stack(), tokens()
    options = {"compiler": "eager", "verify": "numeric", "form": "concatenated"}
    torch._dynamo.reset()
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options=options)
    assert torch.equal(run(x), model(x)) and "differs from the parallel form" in caplog.text
    torch._dynamo.reset()
    run = torch.compile(model, backend=fxfusion.ffn_fusion, options={**options, "strict": True})
    with pytest.raises(VerificationError):
        run(x)
    with pytest.raises(VerificationError):
        fuse(model, x, verify="numeric")


def test_a_wrong_clean_up_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxfusion.passes.drop_no_ops import DropNoOps
    from fxfusion.passes.functionalise_adds import FunctionaliseAdds

    right = FunctionaliseAdds.run

    def run(self: FunctionaliseAdds, graph: fx.Graph) -> Any:
        named(graph, "silu").target = nn.functional.relu
        return right(self, graph)

    assert DropNoOps.exact and FunctionaliseAdds.exact
    monkeypatch.setattr(FunctionaliseAdds, "run", run)
    with pytest.raises(VerificationError, match="clean-up: output 0 differs"):
        proved(stack(), tokens())
