"""Properties of random stacks: nothing wrong is fused, everything right is, and the result is exact.

`FXFUSION_SEED` chooses other stacks (default 2503); each test prints the seed it ran with. `make test`
runs 300 graphs, `make test-slow` 700 more, `python -m bench.fuzz` as many as you like, and larger ones.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor

import fxfusion
from fxfusion.backend import last_reports, refresh
from fxfusion.testing import Ffn, Mixer, Stack, StackSpec, Tap, straddles
from fxfusion.testing.checks import check_graph, check_oracle, check_twice, directions, relative_error
from fxfusion.testing.strategies import stacks

SEED = int(os.environ.get("FXFUSION_SEED", "2503"))


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def say_the_seed() -> None:
    print(f"FXFUSION_SEED={SEED}")


@seed(SEED)
@_settings(200)
@given(stacks(max_runs=2))
def test_groups_are_right_and_exact(given_spec: StackSpec) -> None:
    check_graph(given_spec, norm="fold")


@seed(SEED + 1)
@_settings(60)
@given(stacks(max_runs=2))
def test_the_last_norm_for_all_is_exact_too(given_spec: StackSpec) -> None:
    check_graph(given_spec, norm="last")


@seed(SEED + 2)
@_settings(40)
@given(stacks(max_runs=2))
def test_no_group_straddles_and_fusing_twice_is_fusing_once(given_spec: StackSpec) -> None:
    check_oracle(given_spec)
    check_twice(given_spec)


@pytest.mark.slow
@seed(SEED + 3)
@_settings(500)
@given(stacks(max_runs=2))
def test_many_groups_are_right_and_exact(given_spec: StackSpec) -> None:
    check_graph(given_spec, norm="fold")


@pytest.mark.slow
@seed(SEED + 4)
@_settings(200)
@given(stacks(max_runs=2))
def test_many_groups_do_not_straddle(given_spec: StackSpec) -> None:
    check_oracle(given_spec)
    check_twice(given_spec)


# --- through torch.compile --------------------------------------------------------------------------------


def _check_compiled(given_spec: StackSpec, compiler: str) -> None:
    """Outputs, gradients of every parameter, and outputs after three kinds of weight change."""
    torch._dynamo.reset()
    model, x = Stack(given_spec), Stack(given_spec).example()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": compiler, "strict": True})
    groups = model.groups()
    got = compiled(x)
    found = [[member.name for member in group.members] for group in last_reports()[-1].groups]
    assert found == model.names(groups)
    want = model.parallel_forward(x, groups)
    _same(got, want, 1e-10)
    assert [out.requires_grad for out in got] == [out.requires_grad for out in want]
    _same(_gradients(model, got), _gradients(model, want), 2e-10)

    state = {name: value * 1.25 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    _same(compiled(x), model.parallel_forward(x, groups), 1e-10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    _same(compiled(x), model.parallel_forward(x, groups), 1e-10)
    for parameter in model.parameters():
        parameter.data.mul_(0.75)  # the one write that torch does not count
    refresh(model)
    _same(compiled(x), model.parallel_forward(x, groups), 1e-10)


def _gradients(model: Stack, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    parameters = list(model.parameters())
    # A tap on the model's own input depends on no parameter.
    pairs = [(out, way) for out, way in zip(outputs, directions(outputs), strict=True) if out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], parameters, [way for _, way in pairs], allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def _same(got: object, want: object, tolerance: float) -> None:
    for one, other in zip(got, want, strict=True):  # type: ignore[call-overload]
        assert relative_error(one, other) <= tolerance


@seed(SEED + 5)
@_settings(12)
@given(stacks(max_runs=2))
def test_compiled_stacks_follow_their_weights(given_spec: StackSpec) -> None:
    _check_compiled(given_spec, "eager")


@pytest.mark.slow
@seed(SEED + 6)
@_settings(70)
@given(stacks(max_runs=2))
def test_many_compiled_stacks_follow_their_weights(given_spec: StackSpec) -> None:
    _check_compiled(given_spec, "eager")


@pytest.mark.slow
@seed(SEED + 7)
@_settings(20)
@given(stacks(max_runs=2))
def test_many_stacks_through_autograd_follow_their_weights(given_spec: StackSpec) -> None:
    _check_compiled(given_spec, "aot_eager")


# --- the checks themselves can fail -----------------------------------------------------------------------

_PAIR = StackSpec(blocks=(Ffn(), Ffn(width=4)), seed=3)


def test_the_comparison_sees_one_changed_weight() -> None:
    model = Stack(_PAIR)
    x = model.example()
    fused, _ = fxfusion.fuse_graph(torch.fx.symbolic_trace(model), [x])
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert relative_error(fused(x)[0], model.parallel_forward(x, model.groups())[0]) > 1e-10


def test_parallel_and_sequential_differ() -> None:
    model = Stack(_PAIR)
    x = model.example()
    assert relative_error(model(x)[0], model.parallel_forward(x, model.groups())[0]) > 0.01


@pytest.mark.parametrize("between", [Mixer(), Mixer(kind="conv"), Tap()])
def test_the_oracle_rejects_a_group_that_straddles(between: Mixer | Tap) -> None:
    graph = torch.fx.symbolic_trace(Stack(StackSpec(blocks=(Ffn(), between, Ffn())))).graph
    adds = [node for node in graph.nodes if node.op == "call_function" and node.target.__name__ == "add"]
    stream = next(node for node in graph.nodes if node.op == "placeholder")
    mixing = ("scaled_dot_product_attention", "conv")

    def is_mixer(node: torch.fx.Node) -> bool:
        return any(word in str(node.target) for word in mixing)

    assert straddles(stream, adds[-1], is_mixer) is not None
    assert straddles(stream, adds[0], is_mixer) is None
