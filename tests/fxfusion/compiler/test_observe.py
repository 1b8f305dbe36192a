"""observe: everything that can be seen of a run is noted, nothing of the caller's is touched, every mode is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxfusion.graph.prepacked  # noqa: F401  (registers the operators)
from fxfusion.compiler.capture import CapturedGraph
from fxfusion.compiler.observe import Seen, detached, leaves, made_up, observe, unknown_effects, written_inputs
from fxfusion.graph import ops
from tests.helpers import capture


def tensors_of(captured: CapturedGraph, **others: Any) -> dict[str, Any]:
    places = [node.name for node in captured.module.graph.nodes if node.op == "placeholder"]
    return dict(zip(places, captured.inputs, strict=True)) | dict(captured.values) | others


def seen_of(function: Callable[..., Any], *inputs: Any, **options: Any) -> Seen:
    captured = capture(function, *inputs)
    return observe(captured.module, tensors_of(captured), written=written_inputs(captured.module.graph), **options)


def exact_of(function: Callable[..., Any], *inputs: Any) -> Tensor:
    """The first output of the run in float64."""
    found = seen_of(function, *inputs, like=seen_of(function, *inputs, seed=0), exact=True, seed=1).values["output 0"]
    assert isinstance(found, Tensor)
    return found


X = torch.arange(1.0, 9.0).reshape(2, 4) / 7


def test_outputs_and_written_inputs_are_noted_and_copies_are_written() -> None:
    def function(x: Tensor, cache: Tensor) -> tuple[Tensor, int]:
        cache[0].add_(x[0])
        return x * 2, x.shape[0]

    cache = torch.zeros(2, 4)
    seen = seen_of(function, X, cache)
    assert torch.equal(seen.values["output 0"], X * 2) and not cache.any() and not seen.not_run
    (written,) = (value for name, value in seen.values.items() if "which is written" in name)
    assert torch.equal(written, torch.stack([X[0], torch.zeros(4)]))


def test_only_what_understood_operations_write_counts() -> None:
    captured = capture(lambda x, y, z: (x.mul_(2) + y, z.view(-1).zero_()), X.clone(), X.clone(), X.clone())
    assert len(written_inputs(captured.module.graph)) == 2
    assert unknown_effects(captured.module.graph) == []


def test_tensors_of_one_memory_stay_so() -> None:
    whole = torch.zeros(4, 4)
    values = {"part": whole[1:3, ::2], "whole": whole, "other": torch.ones(2), "number": 3}
    found = detached(values, {"part"})
    found["part"].fill_(7)
    assert found["whole"][1, 2] == 7 and found["whole"][1, 1] == 0 and not whole.any()
    assert found["other"].data_ptr() == values["other"].data_ptr() and found["number"] == 3
    assert found["part"].stride() == values["part"].stride()


def test_made_up_values_depend_on_the_name_alone() -> None:
    example = (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64), torch.zeros(2).bool(), 5)
    one, again, other = (made_up(example, name) for name in ("a", "a", "b"))
    for first, second in zip(one, again, strict=True):
        assert torch.equal(first, second) if isinstance(first, Tensor) else first == second == 5
    assert one[0].dtype == torch.bfloat16 and not torch.equal(one[0], other[0])
    assert set(one[1].tolist()) <= {0, 1} and one[2].all()


def test_nested_results_have_leaves() -> None:
    assert list(leaves((1, [2, {"a": 3}], None))) == [1, 2, 3, None]


@pytest.mark.parametrize("seed", [None, 5])
def test_random_numbers_are_the_callers_or_the_seeds(seed: int | None) -> None:
    def function(x: Tensor) -> Tensor:
        return torch.rand_like(x)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    seen = seen_of(function, X, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen.values["output 0"], torch.rand_like(X))
    assert torch.equal(
        next(value for name, value in seen.values.items() if name.endswith("drew")), seen.values["output 0"]
    )


def test_watched_values_are_noted_and_replaced() -> None:
    captured = capture(lambda x: (x * 2) + 1, X)
    node = next(node.name for node in captured.module.graph.nodes if node.op == "call_function")
    like = Seen({"product": torch.full((2, 4), 3.0)})
    seen = observe(captured.module, tensors_of(captured), watch={node: "product"}, like=like)
    assert torch.equal(seen.values["product"], X * 2) and seen.values["output 0"].eq(4).all()


def test_a_node_reads_something_else_that_stands_before_or_behind_it() -> None:
    """`one` is read after its last use, `three` before its turn; what is in place is computed once."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        one = x * 2
        two = one + 1
        three = (two * 10).mul_(3)
        return two.sin(), three.cos()

    captured = capture(function, X)
    names = {node.name: ops.op_name(node) for node in captured.module.graph.nodes}
    one, two, ten, three, sine, cosine = (name for name, what in names.items() if what in ("mul", "add", "sin", "cos"))
    tensors = tensors_of(captured)
    seen = observe(captured.module, tensors, reads={sine: {two: three}, cosine: {three: one}})
    assert torch.equal(seen.values["output 0"], ((X * 2 + 1) * 10 * 3).sin())
    assert torch.equal(seen.values["output 1"], (X * 2).cos())
    argument = next(iter(tensors))
    seen = observe(captured.module, tensors, reads={cosine: {three: argument}, ten: {two: one}})
    assert torch.equal(seen.values["output 0"], (X * 2 + 1).sin()) and torch.equal(seen.values["output 1"], X.cos())


# --- what is not run -------------------------------------------------------------------------------------


def with_a_failing_operation(function: Callable[[Tensor], Tensor]) -> tuple[CapturedGraph, str]:
    """The sine in a graph is one of something that fails."""
    captured = capture(function, X)
    node = next(node for node in captured.module.graph.nodes if node.name.startswith("sin"))
    node.op, node.target, node.args = "call_function", torch.linalg.cholesky, (node.args[0],)
    return captured, node.name


def test_what_fails_is_made_up_and_what_it_read_is_noted() -> None:
    captured, name = with_a_failing_operation(lambda x: (x * 2).sin() + 1)
    one, again = (observe(captured.module, tensors_of(captured)) for _ in range(2))
    assert list(one.not_run) == [name] and "cholesky failed" in one.not_run[name]
    assert torch.equal(one.values[f"value 0 that {name} reads"], X * 2)
    assert torch.equal(one.values["output 0"], again.values["output 0"])


def test_what_was_not_run_before_is_not_run() -> None:
    captured = capture(lambda x: (x * 2).sin() + 1, X)
    name = next(node.name for node in captured.module.graph.nodes if node.name.startswith("sin"))
    seen = observe(captured.module, tensors_of(captured), like=Seen(not_run={name: "a reason"}))
    assert seen.not_run == {name: "a reason"} and not torch.allclose(seen.values["output 0"], (X * 2).sin() + 1)


@pytest.mark.parametrize("cut_short", [False, True])
def test_modes_are_left_whatever_fails(monkeypatch: pytest.MonkeyPatch, cut_short: bool) -> None:
    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return x.sin() @ x.T

    def transformed(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: torch.vmap(lambda row: row.sin().sum())(y).sum())(x)

    for function in (inside, transformed):
        captured, name = with_a_failing_operation(function)
        if cut_short:
            with monkeypatch.context() as patch, pytest.raises(AttributeError):
                patch.delattr("fxfusion.compiler.observe.zlib.crc32")
                observe(captured.module, tensors_of(captured))
        else:
            assert name in observe(captured.module, tensors_of(captured)).not_run
        assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        assert torch.equal(torch.func.grad(lambda y: y.square().sum())(X), 2 * X), "no level is left open"


def test_nothing_that_is_not_understood_runs() -> None:
    ran = []

    def unknown(x: Tensor) -> Tensor:
        ran.append(x)
        return x * 2

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = X
    node = graph.call_function(unknown, (x,))
    node.meta["example_value"] = X
    graph.output(node)
    seen = observe(fx.GraphModule(torch.nn.Module(), graph), {"x": X})
    assert not ran and "unknown is not understood" in seen.not_run["unknown"]
    assert unknown_effects(graph) == ["unknown is not understood"]


# --- in float64 ------------------------------------------------------------------------------------------


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.T


CASTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "to": (lambda x: x.to(torch.bfloat16) * x.half().to(dtype=torch.float16), lambda x: x * x),
    "methods": (lambda x: x.half().float() + x.bfloat16().double(), lambda x: x + x),
    "type_as": (lambda x: x.type_as(x.half()) / 3, lambda x: x / 3),
    "truths": (lambda x: x * (x > 0.5).float() + (x > 0.5).to(torch.bfloat16), lambda x: x * (x > 0.5) + (x > 0.5)),
    "integers": (lambda x: (x * 3).long().half() + x.to(torch.int32), lambda x: (x * 3).long().double() + x.int()),
    "softmax": (lambda x: torch.softmax(x, -1, dtype=torch.float32), lambda x: torch.softmax(x, -1)),
    "made inside": (lambda x: x + torch.full((4,), 0.5, dtype=torch.float16), lambda x: x + 0.5),
    "autocast": (under_autocast, lambda x: x @ x.T),
    "written after a cast": (lambda x: x.double().mul_(2) + x, lambda x: 3 * x),
    "complex": (
        lambda x: torch.view_as_complex(x.unflatten(-1, (2, 2))).abs(),
        lambda x: x.unflatten(-1, (2, 2)).norm(dim=-1),
    ),
}


@pytest.mark.parametrize("name", CASTS)
def test_the_run_in_float64_rounds_nowhere(name: str) -> None:
    function, truth = CASTS[name]
    found = exact_of(function, X)
    assert found.dtype == torch.float64 and torch.allclose(found, truth(X.double()), rtol=1e-14, atol=0)
    assert name in ("truths", "softmax", "complex", "integers", "written after a cast") or not torch.allclose(
        seen_of(function, X).values["output 0"].double(), truth(X.double()), rtol=1e-9, atol=0
    ), "in its own precision it rounds"


def test_the_run_in_float64_leaves_ambient_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact_of(lambda x: x @ x.T, X), X.double() @ X.double().T)


def test_the_run_in_float64_draws_what_was_drawn() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.5, training=True) + torch.rand_like(x)

    first = seen_of(function, X, seed=0).values["output 0"]
    assert torch.allclose(exact_of(function, X), first.double(), rtol=1e-6)


def test_without_a_kernel_for_float64_an_operation_runs_as_it_was() -> None:
    weight = torch.ones(3, 4) / 3
    captured = capture(torch.nn.functional.linear, X, weight)
    node = next(node for node in captured.module.graph.nodes if node.name.startswith("linear"))
    node.target, node.args = torch.ops.fxfusion.packed_linear.default, (*node.args[:2], None)
    names = [node.name for node in captured.module.graph.nodes if node.op == "placeholder"]
    tensors = dict(zip(names, (X, torch.ops.fxfusion.pack_weight.default(weight, 16)), strict=True))
    seen = observe(captured.module, tensors, exact=True)
    assert not seen.not_run and seen.values["output 0"].dtype == torch.float64
    assert torch.allclose(seen.values["output 0"], (X @ weight.T).double(), rtol=1e-6)
