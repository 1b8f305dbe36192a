"""Compare the first calls of a compiled graph with its parallel form in eager mode (`verify="paranoid"`).

The parallel form reads the inputs and the model's own weights of that very call, so what is compared is all that lies
between: the rewrite, the compiler, and packed weights that should be fresh. Tolerances are those of `verify`, by the
lowest precision inside the whole graph. Compared are outputs, and inputs that the graph writes; gradients are not.
A graph is not compared, with a warning and a note in the report, where that would do something twice that is not
understood, or where the compiler draws other random numbers than eager mode.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

from fxfusion.compiler.observe import Seen, detached, leaves, observe, unknown_effects, written_inputs
from fxfusion.compiler.verify import Comparison, Form, lowest_bits
from fxfusion.errors import VerificationError
from fxfusion.graph.effects import effect_of
from fxfusion.graph.torch_private import FakeTensor

log = logging.getLogger("fxfusion")


def why_not_compared(graph: fx.Graph, draws_as_eager: bool) -> str:
    """Why calls of the graph cannot be compared; empty where they can. `draws_as_eager`: whether the compiler does."""
    unknown = unknown_effects(graph)
    if unknown:
        return f"{unknown[0]}, and it might do anything twice"
    drawn = [node.name for node in graph.nodes if effect_of(node).draws]
    if drawn and not draws_as_eager:
        return (
            f"{drawn[0]} draws random numbers, of which Inductor draws others (its key fallback_random=True mends that)"
        )
    return ""


class ParanoidCallable:
    """A compiled graph whose first calls are compared. `constants`: tensors of its attributes, by node name; `name`:
    what errors call the graph. Calls raise `VerificationError` after the fact: what the graph writes is written."""

    def __init__(
        self,
        call: Callable[..., Any],
        parallel: Form,
        constants: Mapping[str, torch.Tensor],
        calls: int,
        name: str,
    ) -> None:
        self.call, self.name = call, name
        self.number, self.calls = 0, calls
        self._parallel: Form | None = parallel
        graph = parallel.module.graph
        self._places = [node.name for node in graph.nodes if node.op == "placeholder"]
        self._constants = dict(constants)
        self._written = written_inputs(graph)
        self._bits = lowest_bits(graph)

    def __call__(self, *inputs: Any) -> Any:
        parallel = self._parallel
        if parallel is None or any(isinstance(value, FakeTensor) for value in inputs):
            return self.call(*inputs)
        self.number += 1
        if self.number == self.calls:
            self._parallel = None
        return self._compared(parallel, inputs)

    def _compared(self, parallel: Form, inputs: tuple[Any, ...]) -> Any:
        part = f"call {self.number} of the graph of {self.name}"
        values = {**self._constants, **dict(zip(self._places, inputs, strict=True))}
        with torch.no_grad():
            before = detached(values, self._written)
        module, reads = parallel.module, parallel.reads
        one = observe(module, before, reads=reads, written=self._written)
        result = self.call(*inputs)
        if one.not_run:
            raise VerificationError(
                f"{part}: {next(iter(one.not_run.values()))} in the parallel form, not when compiled"
            )
        with torch.no_grad():
            other = Seen({f"output {place}": _plain(value) for place, value in enumerate(leaves(result))})
            other.values |= {f"{name}, which is written,": _plain(values[name]) for name in self._written}
            truth = cache(lambda: observe(module, before, reads=reads, written=self._written, like=one, exact=True))
            names = [name for name in one.values if not name.startswith("value ")]
            found = Comparison(one, other, truth).of(part, list(dict.fromkeys([*names, *other.values])), self._bits)
        log.info("fxfusion: %s equals its parallel form: error %.1e, limit %.0e", part, found.error, found.limit)
        return result


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
