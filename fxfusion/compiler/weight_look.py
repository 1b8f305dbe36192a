"""How weights look, to tell at the next call whether one has changed.

No weight is kept alive, and none is referred to weakly, which `torch.utils.swap_tensors` would refuse.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import attrgetter

import torch

from fxfusion.compiler.weight_probe import DeviceProbe, MemoryProbe
from fxfusion.graph.torch_private import StorageWatch

log = logging.getLogger("fxfusion")

_MEMORY = torch.device("cpu")
"""Where weights are read at their addresses."""

_address = torch.Tensor.data_ptr
_version = attrgetter("_version")


class Look:
    """Identity, address, storage and version of some weights, and a few of their elements."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.ids = tuple(map(id, weights))
        self.kinds = tuple((weight.dtype, weight.device) for weight in weights)
        self.storages = frozenset(weight.untyped_storage().data_ptr() for weight in weights) - {0}
        self._addresses = tuple(map(_address, weights))
        self._versions = _versions(weights)
        self._watch = StorageWatch(weights)
        devices = dict.fromkeys(weight.device for weight in weights)
        places = {device: [n for n, weight in enumerate(weights) if weight.device == device] for device in devices}
        memory = places.pop(_MEMORY, [])
        self._memory = MemoryProbe([weights[n] for n in memory])
        self._devices = [(found, DeviceProbe([weights[n] for n in found])) for found in places.values()]

    def is_of(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether the weights look as they did; waits for devices."""
        return self._is_counted_same(weights) and all(
            probe.same([weights[n] for n in found]) for found, probe in self._devices
        )

    def was_of(self, weights: Sequence[torch.Tensor]) -> bool:
        """The same, for weights on other devices than the CPU as it was when this was last asked: does not wait."""
        if not self._is_counted_same(weights):
            return False
        for found, probe in self._devices:
            if not probe.was_same([weights[n] for n in found]):
                log.warning(
                    "fxfusion: weights on %s were written in a way that torch does not count; the call before this one "
                    "may have computed with their old values",
                    weights[found[0]].device,
                )
                return False
        return True

    def is_gone(self) -> bool:
        """Whether memory of one of the weights was freed: the weight died, or was given other memory."""
        return self._watch.any_expired()

    def _is_counted_same(self, weights: Sequence[torch.Tensor]) -> bool:
        """An address counts only while the storage that had it lives on: `p.data = p.data * 2`, twice, often ends at
        the address where it began. The probe comes last, since it may read only where a weight is known to be."""
        return (
            self.ids == tuple(map(id, weights))
            and self._addresses == tuple(map(_address, weights))
            and self._versions == _versions(weights)
            and not self._watch.any_expired()
            and self._memory.same()
        )


def _versions(weights: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Version counters. Inference tensors have none."""
    try:
        return tuple(map(_version, weights))
    except RuntimeError:
        return tuple(-1 if weight.is_inference() else weight._version for weight in weights)
