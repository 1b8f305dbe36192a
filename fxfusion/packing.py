"""Packed weights at run time: computed once, shared between graphs, never stale.

One process-wide registry, keyed by what is computed from which tensors, holds packed weights weakly:
they live as long as a compiled graph uses them and their source weights live. Every call compares the
identity, address, version and storage of the source weights (microseconds), and copies into the same
memory when one has changed.

What it cannot see: a write through `p.data.mul_(...)` bumps no version, nor does a write to an
inference tensor. `fxfusion.refresh(model)` makes the next call look at the values again.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable

from fxfusion.errors import MissingWeightsError
from fxfusion.pack_values import own, packed_values
from fxfusion.passes.lift_weights import Pack
from fxfusion.prepacked import is_packed
from fxfusion.torch_private import StorageWatch, outside_fake_mode

_lock = threading.RLock()
_registry: weakref.WeakValueDictionary[tuple[Any, ...], PackedWeights] = weakref.WeakValueDictionary()

_address = torch.Tensor.data_ptr
_version = attrgetter("_version")


class PackedWeights:
    """The packed tensors of one group, and what they were computed from.

    When one of the source tensors dies, the packed memory is freed: `alive` is False from then on.
    """

    def __init__(self, module: fx.GraphModule, sources: Sequence[torch.Tensor]) -> None:
        self.module = module
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.alive = True
        self.ids = tuple(map(id, sources))
        forget = _forgetter(weakref.ref(self))
        self.refs = tuple(weakref.ref(source, forget) for source in sources)
        self._note(sources)
        with packing_mode(sources):
            self.tensors = tuple(own(value, sources) for value in packed_values(module, sources))

    def _note(self, sources: Sequence[torch.Tensor]) -> None:
        """Remember how the sources look, before they are read."""
        self.addresses = tuple(map(_address, sources))
        self.versions = _versions(sources)
        self.watch = StorageWatch(sources)

    def is_of(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the very same tensor objects are the sources (their ids stay taken while they live)."""
        return self.alive and self.ids == tuple(map(id, sources))

    def is_fresh(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether no source changed. An address counts only while the storage that had it lives on:
        `p.data = p.data * 2`, twice, often ends at the address where it began.
        """
        return (
            self.addresses == tuple(map(_address, sources))
            and self.versions == _versions(sources)
            and not self.watch.any_expired()
        )

    def refresh(self, sources: Sequence[torch.Tensor]) -> None:
        """Compute again, into the same memory, so that CUDA graphs and other compiled graphs follow.

        Sources that changed dtype or device (`model.to(...)`) need new memory; Dynamo's guards see to it
        that each compiled graph runs only on weights that look as when it was compiled.
        """
        with _lock, packing_mode(sources):
            self.versions = ()  # not fresh until the copy is complete
            old = self.tensors
            made = (own(value, sources) for value in packed_values(self.module, sources))
            self.tensors = tuple(_written(tensor, value) for tensor, value in zip(old, made, strict=True))

    def fresh(self, sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The packed tensors, computed again first if a source has changed."""
        if not self.is_fresh(sources):
            with _lock:
                addresses, versions, watch = (
                    tuple(map(_address, sources)),
                    _versions(sources),
                    StorageWatch(sources),
                )
                self.refresh(sources)
                self.addresses, self.versions, self.watch = addresses, versions, watch
        return self.tensors


class PackBinding:
    """Connects one group of one compiled graph to its packed weights.

    `positions`: where the group's source weights stand among the graph's inputs. Modules of one class
    share a compiled graph, so a binding may know the packed weights of several.
    """

    def __init__(self, pack: Pack, positions: Sequence[int], differentiable: bool) -> None:
        self.module = pack.module
        self.code = pack.module.code
        self.positions = tuple(positions)
        self.differentiable = differentiable
        self._last: PackedWeights | None = None
        self._known: dict[tuple[int, ...], PackedWeights] = {}

    def tensors(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The packed tensors for a call with these graph inputs."""
        sources = [inputs[position] for position in self.positions]
        packed = self._last
        if packed is None or not packed.is_of(sources):
            packed = self._last = self._find(sources)
        current = packed.fresh(sources)
        if self.differentiable and torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            result: tuple[torch.Tensor, ...] = _Packed.apply(packed, *sources)  # type: ignore[no-untyped-call]
            return result
        return current

    def _find(self, sources: Sequence[torch.Tensor]) -> PackedWeights:
        """Packed weights for other source tensors than last time (or the first time)."""
        missing = [source for source in sources if source.device.type == "meta"]
        if missing:
            raise MissingWeightsError(
                f"the weights are missing: {len(missing)} of {len(sources)} weights of a fused group are on the "
                "meta device; load them before running the model (explain and fuse_graph work without)"
            )
        ids = tuple(map(id, sources))
        with _lock:
            self._known = {key: packed for key, packed in self._known.items() if packed.alive}
            packed = _registry.get((self.code, ids))
            if packed is None or not packed.is_of(sources):
                packed = _registry[self.code, ids] = PackedWeights(self.module, sources)
            self._known[ids] = packed
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
            if packed.alive and wanted.intersection(packed.ids):
                packed.versions = ()
                found += 1
    return found


def live_packs() -> int:
    """How many packed groups are alive in this process."""
    return len({id(packed) for packed in _registry.values() if packed.alive})


class _Packed(torch.autograd.Function):
    """Packed weights whose gradient goes back to the weights they were packed from."""

    @staticmethod
    def forward(ctx: Any, packed: PackedWeights, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.packed = packed
        # Saving the sources makes autograd complain if one is changed before backward, as in eager.
        ctx.save_for_backward(*sources)
        return tuple(tensor.view_as(tensor) for tensor in packed.tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors
        with packing_mode(saved), torch.enable_grad():
            sources = [source.detach().requires_grad_(wanted) for source, wanted in zip(saved, needed, strict=True)]
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


@contextlib.contextmanager
def packing_mode(sources: Sequence[torch.Tensor]) -> Iterator[None]:
    """Packed weights do not depend on who asks first: no autocast, no fake or inference mode, no gradients."""
    with (
        outside_fake_mode(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(sources[0].device.type, enabled=False),
    ):
        yield


def _forgetter(packed: weakref.ref[PackedWeights]) -> Any:
    """What to do when a source tensor dies: free the packed memory."""

    def forget(_: Any) -> None:
        found = packed()
        if found is not None:
            found.alive, found.tensors = False, ()

    return forget


def _versions(sources: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Version counters. Inference tensors have none."""
    try:
        return tuple(map(_version, sources))
    except RuntimeError:
        return tuple(-1 if source.is_inference() else source._version for source in sources)


def _written(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value in the memory of the tensor, where that can be written and looks the same; else in its own."""
    return tensor.copy_(value) if _same_look(tensor, value) and not is_packed(value) else value


def _same_look(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
