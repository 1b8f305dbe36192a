"""Random stacks through `torch.compile`: what is written between calls, and transforms around the stack.

The graph that fxfusion made is run as it is (`compiler="eager"`), so a program takes a fraction of a second, and its
weights are packed and kept fresh as they are for any other compiler. What is right is the parallel form of the groups
that were fused, in eager, on the weights as they are at that call.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.backend import forget_reports, last_reports
from fxfusion.graph.torch_private import reset_dynamo
from fxfusion.testing import Stack, StackSpec
from fxfusion.testing.checks import TOLERANCE, check_outcome, relative_error

Write = Callable[[Stack], None]


def check_compiled(given: StackSpec, number: int) -> int:
    """Two changes of weights between three calls, in inference; without effects, a transform of functorch.

    Returns the number of groups fused. Raises `AssertionError` where an outcome is wrong.
    """
    draw = random.Random(number)
    reset_dynamo()
    forget_reports()
    model = Stack(given)
    if not given.has_effects:
        model.requires_grad_(draw.random() < 0.5)
        return _check_transform(model, draw.choice(sorted(TRANSFORMS)))
    x = model.example()
    compiled = torch.compile(model, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})
    with torch.no_grad():
        _first_call(model, compiled, x)
        groups = model.numbered(_groups_found())
        for name in (None, *draw.sample(sorted(WRITES), 2)):
            if name is not None:
                _apply(WRITES[name], model)
            try:
                check_outcome(model, x, compiled, lambda y: model.parallel_forward(y, groups))
            except AssertionError as error:
                raise AssertionError(f"after {name or 'compiling'}: {error}") from error
    return len(groups)


def _first_call(model: Stack, compiled: Callable[[Tensor], object], x: Tensor) -> None:
    """Compile, and leave the memory as it was."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    compiled(x.clone())
    for name, value in model.named_buffers():
        value.copy_(before[name])


def _apply(write: Write, model: Stack) -> None:
    """Write the weights only: the memory of the stack stays as it is."""
    torch.manual_seed(model.given.seed + 2)
    if any(True for _ in model.parameters()):
        write(model)


def _groups_found() -> list[list[str]]:
    names = [[member.name for member in group.members] for report in last_reports() for group in report.groups]
    found = [[re.search(r"blocks\.\d+", name) for name in group] for group in names]
    return [[match[0] if match else "" for match in group] for group in found]


def _optimizer(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Write:
    def step(model: Stack) -> None:
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        make(parameters).step()
        for parameter in parameters:
            parameter.grad = None

    return step


def _each(write: Callable[[nn.Parameter, Tensor], object]) -> Write:
    """A write of every parameter, towards other values of its shape."""

    def all_of_them(model: Stack) -> None:
        for parameter in model.parameters():
            write(parameter, torch.randn_like(parameter) * 0.5)

    return all_of_them


def _set_data(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value


def _low_rank(parameter: nn.Parameter, value: Tensor) -> None:
    if parameter.dim() == 2:
        parameter.data += value[:, :1] @ torch.randn(1, parameter.shape[1], dtype=parameter.dtype)


def _by_numpy(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.detach().numpy()[...] = value.numpy()


def _others(model: Stack) -> dict[str, Tensor]:
    weights = {name for name, _ in model.named_parameters()}
    return {
        name: torch.randn_like(value) * 0.5 if name in weights else value.clone()
        for name, value in model.state_dict().items()
    }


def _replace_parameters(model: Stack) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn_like(parameter) * 0.5))


WRITES: dict[str, Write] = {
    "SGD": _optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "SGD, fused": _optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True)),
    "AdamW, one by one": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False)),
    "AdamW, foreach": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True)),
    "AdamW, fused": _optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True)),
    "a merged adapter": _each(_low_rank),
    "add_": _each(lambda parameter, value: parameter.add_(value)),
    "copy_": _each(lambda parameter, value: parameter.copy_(value)),
    "copy_ through data": _each(lambda parameter, value: parameter.data.copy_(value)),
    "new data": _each(_set_data),
    "set_": _each(lambda parameter, value: parameter.set_(value)),
    "one value": _each(lambda parameter, value: parameter.view(-1)[:1].fill_(0.25)),
    "numpy": _each(_by_numpy),
    "foreach": lambda model: torch._foreach_mul_(list(model.parameters()), 0.5),
    "load_state_dict": lambda model: model.load_state_dict(_others(model)) and None,
    "load_state_dict, assigned": lambda model: model.load_state_dict(_others(model), assign=True) and None,
    "new parameters": _replace_parameters,
}
"""Ways to change weights between two calls."""


def _grad(of: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    return (torch.func.grad(lambda y: sum((out.square().sum() for out in of(y)), y.new_zeros(())))(x),)


def _vmap(of: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    return torch.func.vmap(of)(torch.stack([x, 2 * x, x - 1]))


def _jvp(of: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> Sequence[Tensor]:
    values, directions = torch.func.jvp(of, (x,), (torch.ones_like(x),))
    return (*values, *directions)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Sequence[Tensor]], Tensor], Sequence[Tensor]]] = {
    "grad": _grad,
    "vmap": _vmap,
    "jvp": _jvp,
}


def _check_transform(model: Stack, name: str) -> int:
    """The transform of the stack, compiled, is the transform of the parallel form.

    What Dynamo cannot trace without fxfusion either (jvp through a layer norm, in torch 2.13) counts as nothing fused.
    """
    transform, x = TRANSFORMS[name], model.example()
    of_model = lambda y: transform(model, y)  # noqa: E731
    try:
        got = torch.compile(of_model, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})(x)
    except Exception:
        reset_dynamo()
        try:
            torch.compile(of_model, backend="eager")(x)
        except Exception:
            return 0
        raise
    groups = model.numbered(_groups_found())
    want = transform(lambda y: model.parallel_forward(y, groups), x)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        error = relative_error(one, other)
        assert error <= 2 * TOLERANCE, f"{name}: output {index} is off by {error:.3g}"
    return len(groups)
