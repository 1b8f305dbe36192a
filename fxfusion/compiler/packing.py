"""Packed weights at run time, for inference: computed once, shared between graphs, never stale.

One process-wide registry, keyed by what is computed from which tensors, holds packed weights weakly: they live as long
as a compiled graph uses them and their source weights are where they were. Every call of a compiled graph compares how
all its source weights look (`weight_look`, tens of microseconds), and what changed is computed again, into the same
memory. While gradients are recorded nothing is packed (`choose_form`). What is seen:

    a write that torch counts, of any size; other tensors or memory (`.data =`, `load_state_dict(assign=True)`,
    `swap_tensors`)                                                                          by the next call
    a step of an optimizer of torch or derived from it, whatever kernel it has               by the next call
    another write that changes a weight widely (`weight_probe`), by whatever route: `.data`, numpy, DLPack, NCCL,
    another process; inference tensors                                                       CPU: by the next call
        other devices: at the latest one call later, with a warning
    another write that changes a few elements only                    not; `fxfusion.refresh(model)` makes it seen
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fxfusion.compiler.pack_values import own, packed_values
from fxfusion.compiler.weight_look import Look
from fxfusion.errors import GradientError, MissingWeightsError
from fxfusion.graph.prepacked import is_packed
from fxfusion.graph.torch_private import outside_fake_mode
from fxfusion.passes.lift_weights import Pack

_lock = threading.RLock()
_registry: weakref.WeakValueDictionary[tuple[Any, ...], PackedWeights] = weakref.WeakValueDictionary()
_changes = 0
"""How often packed weights were computed, forgotten or freed. A graph that saw another number looks at each of its
packs: another graph may have followed a change that was taken back since."""


class PackedWeights:
    """The packed tensors of one group, and how the weights looked that they were computed from.

    `look` is None where they are to be computed again. All methods are for holders of the lock.
    """

    def __init__(self, module: fx.GraphModule, sources: Sequence[torch.Tensor]) -> None:
        self.module = module
        self.tensors: tuple[torch.Tensor, ...] = ()
        self.look: Look | None = None
        self.last: Look
        self.alive = True
        self._compute(sources)

    def follow(self, sources: Sequence[torch.Tensor]) -> None:
        """Compute the packed tensors again if a source has changed."""
        if self.look is None or not self.look.is_of(sources):
            self._compute(sources)

    def forget(self) -> None:
        """Have them computed again at the next call."""
        self.look = None
        _count_change()

    def free(self) -> None:
        """Give the memory back; whoever needs these packed weights makes new ones."""
        self.alive, self.tensors = False, ()
        _count_change()

    def _compute(self, sources: Sequence[torch.Tensor]) -> None:
        """Into the same memory, so that CUDA graphs and other compiled graphs follow.

        Sources that changed dtype or device (`model.to(...)`) need new memory; Dynamo's guards see to it
        that each compiled graph runs only on weights that look as when it was compiled.
        """
        self.forget()  # not fresh until the copy is complete
        with packing_mode(sources):
            self.last = Look(sources)  # before they are read: what is written meanwhile is seen at the next call
            old = self.tensors or [None] * len(_results(self.module))
            made = (own(value, sources) for value in packed_values(self.module, sources))
            self.tensors = tuple(_written(tensor, value) for tensor, value in zip(old, made, strict=True))
        self.look = self.last


class PackBinding:
    """Connects one group of one compiled graph to its packed weights.

    `positions`: where the group's source weights stand among the graph's inputs.
    """

    def __init__(self, pack: Pack, positions: Sequence[int]) -> None:
        self.module = pack.module
        self.code = pack.module.code
        self.positions = tuple(positions)

    def find(self, inputs: Sequence[Any]) -> PackedWeights:
        """The packed weights for these graph inputs, fresh. For holders of the lock."""
        sources = [inputs[position] for position in self.positions]
        key = (self.code, tuple(map(id, sources)))
        packed = _registry.get(key)
        if packed is None or not packed.alive:
            packed = _registry[key] = PackedWeights(self.module, sources)
        packed.follow(sources)
        return packed


class _Seen:
    """The packed weights of a graph for one set of source weights, as they were found."""

    def __init__(self, look: Look, packs: Sequence[PackedWeights]) -> None:
        self.look, self.packs, self.changes = look, tuple(packs), _changes


class GraphPacks:
    """All packed weights of one compiled graph, behind one check.

    Modules of one class share a compiled graph, so there may be several sets of source weights.
    """

    def __init__(self, bindings: Sequence[PackBinding]) -> None:
        self.bindings = tuple(bindings)
        self.positions = sorted({position for binding in bindings for position in binding.positions})
        self._seen: dict[tuple[int, ...], _Seen] = {}

    def tensors(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """The packed tensors for a call with these graph inputs, in group order."""
        sources = [inputs[position] for position in self.positions]
        seen = self._seen.get(tuple(map(id, sources)))
        if seen is None or seen.changes != _changes or not seen.look.was_of(sources):
            seen = self._look_again(inputs, sources)
        return [tensor for packed in seen.packs for tensor in packed.tensors]

    def _look_again(self, inputs: Sequence[Any], sources: Sequence[torch.Tensor]) -> _Seen:
        """Every pack looks for itself, under the lock: another thread may have been first."""
        missing = [source for source in sources if source.device.type == "meta"]
        if missing:
            raise MissingWeightsError(
                f"the weights are missing: {len(missing)} of {len(sources)} weights of the fused groups are on the "
                "meta device; load them before running the model (explain and fuse_graph work without)"
            )
        with _lock, packing_mode(sources):
            _start_hooks()
            look = Look(sources)  # before the packs look: what is written meanwhile is seen at the next call
            packs = [binding.find(inputs) for binding in self.bindings]
            _sweep(dict(zip(look.ids, look.kinds, strict=True)))
            self._seen = {ids: seen for ids, seen in self._seen.items() if not seen.look.is_gone()}
            found = self._seen[look.ids] = _Seen(look, packs)
            return found


class FusedCallable:
    """What the backend gives to Dynamo: the compiled graph, fed with packed weights."""

    def __init__(self, compiled: Callable[..., Any], packs: GraphPacks) -> None:
        self.compiled = compiled
        self.packs = packs

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
            raise GradientError(
                "gradients are recorded, but this graph was compiled for inference: its packed weights have none. "
                "torch.compile sees to it that this does not happen; call the model through it"
            )
        return self.compiled(*inputs, *self.packs.tensors(inputs))


def forget_looks(tensors: Sequence[torch.Tensor]) -> int:
    """Make the next call recompute every packed group that has one of these tensors, or their memory, as a source."""
    ids = {id(tensor) for tensor in tensors}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout == torch.strided}
    with _lock:
        found = [
            packed
            for packed in _alive()
            if not ids.isdisjoint(packed.last.ids) or not storages.isdisjoint(packed.last.storages)
        ]
        for packed in found:
            packed.forget()
    return len(found)


def live_packs() -> int:
    """How many packed groups are alive in this process."""
    with _lock:
        _sweep({})
        return len(_alive())


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


@cache
def _start_hooks() -> None:
    """Once there are packed weights, look at every optimizer's step, and free what died at full garbage collections."""
    register_optimizer_step_post_hook(_after_step)
    gc.callbacks.append(_after_collection)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _registry:
        forget_looks([weight for group in optimizer.param_groups for weight in group["params"]])


def _after_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2 and _lock.acquire(blocking=False):
        try:
            _sweep({})
        finally:
            _lock.release()


def _sweep(kinds: dict[int, tuple[torch.dtype, torch.device]]) -> None:
    """Free packed weights whose sources died or moved. `kinds`: dtype and device, by id, of weights as they are now."""
    for packed in _alive():
        look = packed.last
        left = any(kinds.get(name, kind) != kind for name, kind in zip(look.ids, look.kinds, strict=True))
        if left or look.is_gone():
            packed.free()


def _alive() -> list[PackedWeights]:
    return [packed for packed in list(_registry.values()) if packed.alive]


def _count_change() -> None:
    global _changes
    _changes += 1


def _results(module: fx.GraphModule) -> Sequence[fx.Node]:
    roots: Sequence[fx.Node] = list(module.graph.nodes)[-1].args[0]
    return roots


def _written(tensor: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """The value in the memory of the tensor, where that can be written and looks the same; else in its own."""
    if tensor is None or is_packed(value) or not _same_look(tensor, value):
        return value
    return tensor.copy_(value)


def _same_look(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
