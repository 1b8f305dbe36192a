"""Packed weights at run time: computed once, shared between graphs, never stale.

One process-wide registry, keyed by what is computed from which tensors, holds packed weights weakly:
they live as long as a compiled graph uses them. Every call compares the identity, address and version
of the source weights (microseconds), and copies into the same memory when one has changed.

What it cannot see: a write through `p.data.mul_(...)` bumps no version, nor does a write to an
inference tensor. `fxfusion.refresh(model)` makes the next call look at the values again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.errors import FxFusionError
from fxfusion.passes.lift_weights import Pack

_lock = threading.RLock()
_registry: weakref.WeakValueDictionary[tuple[Any, ...], PackedWeights] = weakref.WeakValueDictionary()


class PackedWeights:
    """The packed tensors of one group, and what they were computed from."""

    def __init__(self, module: fx.GraphModule, sources: Sequence[torch.Tensor]) -> None:
        self.module = module
        self.refs = tuple(weakref.ref(source) for source in sources)
        self.stamp = _stamp(sources)
        with torch.no_grad():
            self.tensors: tuple[torch.Tensor, ...] = tuple(_own(value, sources) for value in module(*sources))

    def is_of(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the very same tensor objects are the sources."""
        return all(ref() is source for ref, source in zip(self.refs, sources, strict=True))

    def sources_alive(self) -> bool:
        return all(ref() is not None for ref in self.refs)

    def refresh(self, sources: Sequence[torch.Tensor]) -> None:
        """Compute again, into the same memory, so that CUDA graphs and other compiled graphs follow."""
        with _lock, torch.no_grad():
            stamp = _stamp(sources)
            for tensor, value in zip(self.tensors, self.module(*sources), strict=True):
                tensor.copy_(value)
            self.refs = tuple(weakref.ref(source) for source in sources)
            self.stamp = stamp

    def fresh(self, sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The packed tensors, computed again first if a source has changed."""
        if _stamp(sources) != self.stamp:
            self.refresh(sources)
        return self.tensors


class PackBinding:
    """Connects one group of one compiled graph to its packed weights.

    `positions`: where the group's source weights stand among the graph's inputs.
    """

    def __init__(self, pack: Pack, positions: Sequence[int], differentiable: bool) -> None:
        self.module = pack.module
        self.code = str(pack.module.graph)
        self.positions = tuple(positions)
        self.differentiable = differentiable
        self._packed: PackedWeights | None = None

    def tensors(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The packed tensors for a call with these graph inputs."""
        sources = [inputs[position] for position in self.positions]
        packed = self._packed
        if packed is None or not packed.is_of(sources):
            packed = self._packed = self._find(sources)
        current = packed.fresh(sources)
        if self.differentiable and torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            result: tuple[torch.Tensor, ...] = _Packed.apply(packed, *sources)  # type: ignore[no-untyped-call]
            return result
        return current

    def _find(self, sources: Sequence[torch.Tensor]) -> PackedWeights:
        """Packed weights for other source tensors than last time (or the first time)."""
        missing = [source for source in sources if source.device.type == "meta"]
        if missing:
            raise FxFusionError(
                f"the weights are missing: {len(missing)} of {len(sources)} weights of a fused group are on the "
                "meta device; load them before running the model (explain and fuse_graph work without)"
            )
        key = (self.code, *(id(source) for source in sources))
        with _lock:
            known = _registry.get(key)
            if known is not None and known.is_of(sources):
                return known
            old = self._packed
            if old is not None and not old.sources_alive() and _same_look(old, sources):
                # The weights were replaced (load_state_dict(assign=True)): keep the memory, follow the new ones.
                old.refresh(sources)
                _registry[key] = old
                return old
            packed = PackedWeights(self.module, sources)
            _registry[key] = packed
            return packed


class FusedCallable:
    """What the backend gives to Dynamo: the compiled graph, fed with packed weights."""

    def __init__(self, compiled: Any, bindings: Sequence[PackBinding]) -> None:
        self.compiled = compiled
        self.bindings = tuple(bindings)

    def __call__(self, *inputs: Any) -> Any:
        packed = [tensor for binding in self.bindings for tensor in binding.tensors(inputs)]
        return self.compiled(*inputs, *packed)


def forget_stamps(tensors: Sequence[torch.Tensor]) -> int:
    """Make the next call recompute every packed group that has one of these tensors as a source."""
    wanted = {id(tensor) for tensor in tensors}
    found = 0
    with _lock:
        for packed in set(_registry.values()):
            if any(id(ref()) in wanted for ref in packed.refs):
                packed.stamp = ()
                found += 1
    return found


def live_packs() -> int:
    """How many packed groups are alive in this process."""
    return len({id(packed) for packed in _registry.values()})


class _Packed(torch.autograd.Function):
    """Packed weights whose gradient goes back to the weights they were packed from."""

    @staticmethod
    def forward(ctx: Any, packed: PackedWeights, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.packed = packed
        # Saving the sources makes autograd complain if one is changed before backward, as in eager.
        ctx.save_for_backward(*sources)
        return tuple(tensor.view_as(tensor) for tensor in packed.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            sources = [
                source.detach().requires_grad_(wanted)
                for source, wanted in zip(ctx.saved_tensors, needed, strict=True)
            ]
            values = ctx.packed.module(*sources)
        pairs = [
            (value, gradient)
            for value, gradient in zip(values, gradients, strict=True)
            if gradient is not None and value.requires_grad
        ]
        wanted = [source for source in sources if source.requires_grad]
        if not pairs or not wanted:
            return (None, *(None for _ in sources))
        found = iter(
            torch.autograd.grad([value for value, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        )
        return (None, *(next(found) if source.requires_grad else None for source in sources))


def _stamp(sources: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Address and version of each source. Inference tensors have no version."""
    addresses = [source.data_ptr() for source in sources]
    try:
        return (*addresses, *(source._version for source in sources))
    except RuntimeError:
        return (*addresses, *(-1 if source.is_inference() else source._version for source in sources))


def _own(value: torch.Tensor, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """The packed value in memory of its own: contiguous, and never a view of a weight."""
    addresses = {source.untyped_storage().data_ptr() for source in sources}
    value = value.detach().contiguous()
    return value.clone() if value.untyped_storage().data_ptr() in addresses else value


def _same_look(packed: PackedWeights, sources: Sequence[torch.Tensor]) -> bool:
    """Whether the packed memory fits what these sources give (device; shapes are guarded by Dynamo)."""
    return all(tensor.device == sources[0].device for tensor in packed.tensors)
