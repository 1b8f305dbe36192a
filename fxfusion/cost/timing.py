"""Time of a kernel and of a step on a device: a roofline with a floor.

    kernel      kernel_latency + max(bytes / bandwidth, FLOPs / rate in waves of tiles, gemm_floor)
    all-reduce  see `fxfusion.cost.hardware.Link`

The floor is what makes wide FFNs pay: a GEMM below it (18 us, 55 MB on an H100) takes as long as one at it. So the
part of the bandwidth that a GEMM reaches grows with its bytes on one device, up to `bandwidth_fraction`.

    cuda-graph  the sum of that
    eager       that, or the host's time for all launches where it is longer: kernels and all-reduces x eager_latency
    megakernel  no kernel latency and no floor, but each GEMM and each attention waits once: megakernel_latency
    fused-norm  a norm behind an all-reduce that is one kernel has no kernel latency: only its bytes count
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


def kernel_time(kernel: Kernel, work: Workload, device: Hardware, merged: bool = False) -> Timed:
    """One kernel: its work counts as what binds it, the rest of the floor as launch.

    `merged`: it is part of the kernel before it.
    """
    memory, flops = kernel.bytes / device.bandwidth, kernel.flops
    if kernel.tiles is not None and device.tiled:
        parts = math.ceil(kernel.tiles * _SPLIT / device.processors) / _SPLIT
        flops = parts * device.processors * kernel.tile_flops
    compute = flops / device.rate(kernel.precision) if flops else 0.0
    least = max(memory, compute)
    launch = 0.0 if merged else device.kernel_latency
    if work.launch == "megakernel":
        launch = _known(device, work.launch) if kernel.flops else 0.0
    elif kernel.tiles is not None:
        launch += max(0.0, device.gemm_floor - least)
    seconds = Seconds(launch=launch, **{"bandwidth" if memory >= compute else "compute": least})
    return Timed(seconds, kernels=0 if merged or work.launch == "megakernel" else 1)


def sublayer_time(part: Sublayer, hidden: int, work: Workload, device: Hardware, merges: bool = False) -> Timed:
    """One sublayer with its all-reduce. `merges`: its norm is part of the all-reduce before it."""
    found = Timed()
    for kernel in kernels_of(part, hidden, work):
        found = found + kernel_time(kernel, work, device, merges and kernel.name == "norm")
    if work.tp == 1:
        return found
    return found + Timed(_all_reduce(work.tokens * hidden * work.size, work, device), 0, 1)


def step_time(step: Step, work: Workload, device: Hardware) -> Timed:
    """A whole forward pass. Raises `OptionError` where the model cannot be cut so, or the device cannot do it."""
    device.rate(work.precision)
    if work.tp > 1 and device.link is None:
        raise OptionError(f"tp {work.tp}: {device.name} has no link; tensor parallelism needs one")
    if device.link is not None and work.tp > device.link.devices:
        raise OptionError(f"tp {work.tp}: the link of {device.name} joins {device.link.devices} devices")
    merges = _merges_norms(step, work, device)
    found = Timed(Seconds(launch=device.kernel_latency), 1) if merges else Timed()  # nothing is summed before the first
    for part, count in Counter(step.sublayers).items():
        found = found + sublayer_time(part, step.hidden, work, device, merges) * count
    for kernel in head_kernels(step, work):
        found = found + kernel_time(kernel, work, device, merges and kernel.name == "norm")
    if work.tp > 1 and step.vocabulary is not None:  # half an all-reduce: everybody gets everybody's logits
        found = found + Timed(_all_reduce(work.batch * step.vocabulary * work.size / 2, work, device), 0, 0)
    if work.launch == "megakernel":
        return found + Timed(kernels=1)
    if work.launch == "eager":
        host = (found.kernels + found.all_reduces) * _known(device, work.launch)
        found = found + Timed(Seconds(launch=max(0.0, host - found.seconds.total)))
    return found


def _merges_norms(step: Step, work: Workload, device: Hardware) -> bool:
    """Whether norms are part of the all-reduces before them; in a megakernel nothing has a kernel of its own anyway."""
    if work.all_reduce == "plain" or work.launch == "megakernel" or work.tp == 1 or not step.sublayers:
        return False
    assert device.link is not None
    return device.link.is_one_kernel(work.tokens * step.hidden * work.size, work.tp)


def _known(device: Hardware, launch: str) -> float:
    name = f"{launch}_latency"
    found: float | None = getattr(device, name)
    if found is None:
        raise OptionError(f"launch {launch!r}: {device.name} has no {name}; give it in a hardware file")
    return found


def _all_reduce(size: float, work: Workload, device: Hardware) -> Seconds:
    assert device.link is not None
    return Seconds(all_reduce=device.link.all_reduce_seconds(size, work.tp))
