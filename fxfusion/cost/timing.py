"""Time of a kernel and of a step on a device: a roofline with a floor.

    kernel      kernel_latency + max(bytes / bandwidth, FLOPs / rate in waves of tiles, gemm_floor)
    all-reduce  see `fxfusion.cost.hardware.Link`

The floor is what makes wide FFNs pay: a GEMM below it (18 us, 55 MB on an H100) takes as long as one at it. So the
part of the bandwidth that a GEMM reaches grows with its bytes on one device, up to `bandwidth_fraction`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from fxfusion.cost.hardware import Hardware
from fxfusion.cost.kernels import Kernel, Workload, head_kernels, kernels_of
from fxfusion.cost.sublayers import Step, Sublayer
from fxfusion.errors import OptionError

_SPLIT = 8  # into so many parts of its inner dimension a tile may be split, so that the last wave is fuller


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time goes [s]. `launch`: what kernels cost beside bytes and FLOPs, floors included."""

    bandwidth: float = 0.0
    compute: float = 0.0
    launch: float = 0.0
    all_reduce: float = 0.0

    @property
    def total(self) -> float:
        return self.bandwidth + self.compute + self.launch + self.all_reduce

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.bandwidth + other.bandwidth,
            self.compute + other.compute,
            self.launch + other.launch,
            self.all_reduce + other.all_reduce,
        )

    def __mul__(self, count: float) -> Seconds:
        return Seconds(self.bandwidth * count, self.compute * count, self.launch * count, self.all_reduce * count)


@dataclass(frozen=True, slots=True)
class Timed:
    """Time and numbers of a sublayer or a step."""

    seconds: Seconds = Seconds()
    kernels: int = 0
    all_reduces: int = 0

    def __add__(self, other: Timed) -> Timed:
        return Timed(self.seconds + other.seconds, self.kernels + other.kernels, self.all_reduces + other.all_reduces)

    def __mul__(self, count: int) -> Timed:
        return Timed(self.seconds * count, self.kernels * count, self.all_reduces * count)


def kernel_seconds(kernel: Kernel, device: Hardware) -> Seconds:
    """The time of one kernel: its work counts as what binds it, the rest of the floor as launch."""
    memory, flops = kernel.bytes / device.bandwidth, kernel.flops
    if kernel.tiles is not None and device.tiled:
        parts = math.ceil(kernel.tiles * _SPLIT / device.processors) / _SPLIT
        flops = parts * device.processors * kernel.tile_flops
    compute = flops / device.rate(kernel.precision) if flops else 0.0
    work = max(memory, compute)
    launch = device.kernel_latency
    if kernel.tiles is not None:
        launch += max(0.0, device.gemm_floor - work)
    return Seconds(launch=launch, **{"bandwidth" if memory >= compute else "compute": work})


def sublayer_time(part: Sublayer, hidden: int, work: Workload, device: Hardware) -> Timed:
    """One sublayer with its all-reduce."""
    kernels = list(kernels_of(part, hidden, work))
    found = sum((kernel_seconds(kernel, device) for kernel in kernels), Seconds())
    if work.tp == 1:
        return Timed(found, len(kernels), 0)
    return Timed(found + _all_reduce(work.tokens * hidden * work.size, work, device), len(kernels), 1)


def step_time(step: Step, work: Workload, device: Hardware) -> Timed:
    """A whole forward pass. Raises `OptionError` where the model cannot be cut so, or the device cannot do it."""
    device.rate(work.precision)
    if work.tp > 1 and device.link is None:
        raise OptionError(f"tp {work.tp}: {device.name} has no link; tensor parallelism needs one")
    if device.link is not None and work.tp > device.link.devices:
        raise OptionError(f"tp {work.tp}: the link of {device.name} joins {device.link.devices} devices")
    found = Timed()
    for part, count in Counter(step.sublayers).items():
        found = found + sublayer_time(part, step.hidden, work, device) * count
    for kernel in head_kernels(step, work):
        found = found + Timed(kernel_seconds(kernel, device), 1, 0)
    if work.tp > 1 and step.vocabulary is not None:  # half an all-reduce: everybody gets everybody's logits
        found = found + Timed(_all_reduce(work.batch * step.vocabulary * work.size / 2, work, device), 0, 0)
    return found


def _all_reduce(size: float, work: Workload, device: Hardware) -> Seconds:
    assert device.link is not None
    return Seconds(all_reduce=device.link.all_reduce_seconds(size, work.tp))
