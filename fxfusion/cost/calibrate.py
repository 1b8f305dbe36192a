"""The constants of a device at hand, measured in less than a minute: `calibrate().save("here.json")`.

What is measured is what kernels reach, so both fractions of the result are 1. Memory is written before it is read:
pages that nobody touched are all one page of zeros, and reading them shows ten times the bandwidth that there is.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from fxfusion.cost.hardware import Hardware, Precision
from fxfusion.errors import OptionError, first_line
from fxfusion.report.progress import each

if TYPE_CHECKING:
    import torch

_LIMIT = 60.0
_PARTS = 6  # measurements that share the time
_CALLS = 200  # small kernels in one sample
_READ_BYTES = {"cpu": 2**29, "cuda": 2**31}  # far above the last cache
_EDGE = {"cpu": 2048, "cuda": 8192}  # of the square GEMM
_SMALL = 256
_DTYPES: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


def calibrate(
    device: str = "cpu", *, seconds: float = 30.0, name: str | None = None, progress: bool = False
) -> Hardware:
    """Measure a CPU (with the threads that torch uses) or a CUDA device, in about `seconds`, 60 at most.

    Gives bandwidth of reading weights, GEMM rates, the cost of a small kernel (on CUDA under a graph), and the least
    time of a GEMM. A link is not measured: add it to the file for tensor parallelism. Raises `OptionError` for a device
    that is not there.
    """
    import torch

    if not 0 < seconds <= _LIMIT:
        raise OptionError(f"seconds: expected more than 0 and at most {_LIMIT:g}, got {seconds!r}")
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device {device!r} cannot be used here: {first_line(error)}") from None
    if where.type not in _EDGE:
        raise OptionError(f"device {device!r}: expected cpu or cuda")
    bench = _Bench(where, seconds / _PARTS)
    kinds = _DTYPES[where.type]
    steps: list[Callable[[], float]] = [bench.bandwidth, bench.latency, bench.small_gemm]
    steps += [partial(bench.rate, kind) for kind in kinds]
    bandwidth, latency, small_gemm, *rates = [measure() for measure in each(steps, progress, "calibrate")]
    return Hardware(
        name=name or _name(where),
        memory=_memory(where),
        memory_bandwidth=bandwidth,
        flops=dict(zip(kinds, rates, strict=True)),
        processors=_processors(where),
        bandwidth_fraction=1.0,
        compute_fraction=1.0,
        kernel_latency=latency,
        gemm_floor=max(0.0, small_gemm - latency),
        tiled=where.type == "cuda",
        sources=_sources(where),
    )


class _Bench:
    """Measurements on one device; each takes about `budget` seconds."""

    def __init__(self, where: torch.device, budget: float) -> None:
        self.where, self.budget = where, budget

    def bandwidth(self) -> float:
        """Bytes per second of `matrix @ vector`, as decoding reads weights."""
        import torch

        columns = 4096
        rows = _READ_BYTES[self.where.type] // (4 * columns)
        matrix = torch.empty(rows, columns, device=self.where)
        matrix.normal_()  # written, so that it is memory and not one page of zeros
        vector = torch.ones(columns, device=self.where)
        result = torch.empty(rows, device=self.where)
        return float(matrix.numel() * 4 / self._time(lambda: torch.mv(matrix, vector, out=result), 1))

    def latency(self) -> float:
        """Seconds of one small element-wise kernel among others."""
        import torch

        value = torch.zeros(_SMALL, device=self.where)
        return self._time(lambda: value.add_(1.0), _CALLS)

    def small_gemm(self) -> float:
        """Seconds of one small GEMM among others."""
        import torch

        weight = torch.randn(_SMALL, _SMALL, device=self.where)
        value, result = torch.randn(1, _SMALL, device=self.where), torch.empty(1, _SMALL, device=self.where)
        return self._time(lambda: torch.mm(value, weight, out=result), _CALLS)

    def rate(self, kind: Precision) -> float:
        """FLOP/s of a square GEMM."""
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
        edge = _EDGE[self.where.type]
        one, other, result = (torch.randn(edge, edge, device=self.where).to(dtype) for _ in range(3))
        return float(2 * edge**3 / self._time(lambda: torch.mm(one, other, out=result), 1))

    def _time(self, call: Callable[[], Any], calls: int) -> float:
        """Median time of one of `calls` calls in a row, over all samples that fit the budget."""
        run = self._graphed(call, calls) if self.where.type == "cuda" else _repeated(call, calls)
        samples: list[float] = []
        end = time.perf_counter() + self.budget
        self._once(run)  # warm-up
        while len(samples) < 3 or time.perf_counter() < end:
            samples.append(self._once(run) / calls)
        return median(samples)

    def _once(self, run: Callable[[], Any]) -> float:
        import torch

        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)
        started = time.perf_counter()
        run()
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)
        return time.perf_counter() - started

    def _graphed(self, call: Callable[[], Any], calls: int) -> Callable[[], Any]:
        import torch

        with torch.cuda.device(self.where):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                call()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    call()
        return graph.replay


def _repeated(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def _name(where: torch.device) -> str:
    import torch

    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def _memory(where: torch.device) -> float:
    import torch

    if where.type == "cuda":
        return float(torch.cuda.get_device_properties(where).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _processors(where: torch.device) -> int:
    import torch

    if where.type == "cuda":
        return int(torch.cuda.get_device_properties(where).multi_processor_count)
    return torch.get_num_threads()


def _sources(where: torch.device) -> dict[str, str]:
    import torch

    made = f"measured by fxfusion.cost.calibrate with torch {torch.__version__}"
    return {
        "memory_bandwidth": f"{made}: float32 matrix times vector",
        "flops": f"{made}: square matrices of {_EDGE[where.type]}",
        "kernel_latency": f"{made}: element-wise kernels on {_SMALL} numbers, {_CALLS} in a row",
        "gemm_floor": f"{made}: {_SMALL} x {_SMALL} matrix times one row, less kernel_latency",
        "memory": "the operating system" if where.type == "cpu" else "the driver",
        "processors": "threads of torch" if where.type == "cpu" else "the driver",
    }
