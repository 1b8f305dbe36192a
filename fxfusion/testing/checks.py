"""Assertions about one random stack; `tests/test_properties.py` and `bench/fuzz.py` share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fxfusion.compiler.capture import captured_from_graph
from fxfusion.compiler.pipeline import analyse, fuse_graph, normalising_passes
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.graph.provenance import module_path
from fxfusion.plan.policy import FusionPolicy, NormMode
from fxfusion.testing.oracles import straddles
from fxfusion.testing.spec import Mixer, StackSpec
from fxfusion.testing.stack import Stack

TOLERANCE = 1e-10
GRADIENT_TOLERANCE = 2e-10


def check_graph(given: StackSpec, norm: NormMode = "fold") -> int:
    """Groups are the right ones, values and input gradients those of the parallel form. Returns how many groups."""
    model = Stack(given)
    x = model.example().requires_grad_()
    fused, report = fuse_graph(_traced(model), [x], policy={"norm": norm})
    groups = model.groups()
    found = [[member.name for member in group.members] for group in report.groups]
    refusals = [(refusal.code.value, refusal.layer, refusal.message) for refusal in report.refusals]
    assert found == model.names(groups), f"fused {found}, right is {model.names(groups)}; refused: {refusals}"
    got, want = fused(x), model.parallel_forward(x, groups, norm)
    _assert_close(got, want, TOLERANCE, "output")
    _assert_close(_input_gradient(got, x), _input_gradient(want, x), GRADIENT_TOLERANCE, "input gradient")
    return len(groups)


def check_effects(given: StackSpec, norm: NormMode = "fold") -> int:
    """Outputs, the input and the stack's memory after a call are those of the parallel form, random draws included.

    Where all effects are understood the groups are the right ones, elsewhere they are parts of them. Returns how many.
    """
    model = Stack(given)
    x = model.example()
    with torch.no_grad():
        fused, report = fuse_graph(_traced(model), [x], policy={"norm": norm})
        found = [[member.name for member in group.members] for group in report.groups]
        refusals = [(refusal.code.value, refusal.layer, refusal.message) for refusal in report.refusals]
        if given.is_certain:
            right = model.names(model.groups())
            assert found == right, f"fused {found}, right is {right}; refused: {refusals}"
        groups = model.numbered(found)
        check_outcome(model, x, fused, lambda y: model.parallel_forward(y, groups, norm))
    return len(groups)


def check_outcome(
    model: Stack, x: Tensor, run: Callable[[Tensor], Sequence[Tensor]], right: Callable[[Tensor], Sequence[Tensor]]
) -> None:
    """Both from the same memory and random state, each on an input of its own; the memory is left as it was."""
    assert torch.equal(x, model.example()), "the input was written before the graph ran"
    before = {name: value.clone() for name, value in model.named_buffers()}
    outcomes = []
    for function in (run, right):
        given = x.clone()
        torch.manual_seed(model.given.seed)
        # All that can be seen: outputs, the input, the memory, and how many random numbers were drawn.
        outputs = [output.clone() for output in function(given)]
        outcomes.append([*outputs, given, *(value.clone() for _, value in model.named_buffers()), torch.rand(1)])
        for name, value in model.named_buffers():
            value.copy_(before[name])
    _assert_close(outcomes[0], outcomes[1], TOLERANCE, "outcome")


def check_twice(given: StackSpec) -> None:
    """Fusing what was fused finds nothing more and changes no bit."""
    model = Stack(given)
    x = model.example()
    once, _ = fuse_graph(_traced(model), [x])
    twice, report = fuse_graph(once, [x])
    assert report.groups == (), f"fused again: {[[m.name for m in group.members] for group in report.groups]}"
    for one, other in zip(once(x), twice(x), strict=True):
        assert torch.equal(one, other), "fusing nothing changed the result"


def check_oracle(given: StackSpec) -> None:
    """No group has a mixer or an outside reader inside, by path search, and no reader of two groups' insides."""
    model = Stack(given)
    captured = captured_from_graph(_traced(model), [model.example()]).copy()
    run_passes(captured.module, normalising_passes(captured.weights), History())
    found = analyse(captured, FusionPolicy())
    mixers = {f"blocks.{index}" for index, block in enumerate(given.blocks) if isinstance(block, Mixer)}

    def is_mixer(node: fx.Node) -> bool:
        return ".".join(module_path(node).split(".")[:2]) in mixers

    for group in found.groups:
        wrong = straddles(group.members[0].stream, group.members[-1].add, is_mixer)
        assert wrong is None, f"group {[member.name for member in group.members]}: {wrong}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted value; NaN and shape mismatches count as infinite."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = got.detach(), want.detach()
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)) if want.numel() else 0.0
    return error if error == error else float("inf")


def _assert_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float, what: str) -> None:
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        error = relative_error(one, other)
        assert error <= tolerance, f"{what} {index} is off by {error:.3g}"


def directions(outputs: Sequence[Tensor]) -> list[Tensor]:
    """One fixed cotangent per output, different for each element: a sum could hide a wrong gradient."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]


def _input_gradient(outputs: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, [x], directions(outputs)))


def _traced(model: Stack) -> fx.GraphModule:
    """A traced graph; every other one with its modules opened already, which takes another way in."""
    tracer = _Tracer() if model.given.seed % 2 else _OpenTracer()
    return fx.GraphModule(model, tracer.trace(model))


class _Tracer(fx.Tracer):
    """Makes nodes of buffers as of parameters: an effect on one would otherwise happen while it is traced."""

    proxy_buffer_attributes = True


class _OpenTracer(_Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False
