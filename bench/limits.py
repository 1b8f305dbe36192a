"""What the machine can do at most, measured in the same run: bytes read and operations computed per second.

A model of few tokens cannot be faster than its weights are read, one of many not faster than its products are
computed. Memory that is read was written before: pages that never were are one page of zeros, read from the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class Limits:
    """`bandwidth`: bytes read per second; `rate`: floating-point operations per second of one large product."""

    bandwidth: float
    rate: dict[torch.dtype, float]

    def seconds(self, parameters: int, tokens: int, dtype: torch.dtype) -> float:
        """The least time in which `parameters` weights can be read and multiplied with so many tokens."""
        return max(parameters * dtype.itemsize / self.bandwidth, 2 * parameters * tokens / self.rate[dtype])

    def to_dict(self) -> dict[str, object]:
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.rate.items()}
        return {"bandwidth_bytes_per_second": self.bandwidth, "operations_per_second": rates}


def measure_limits(device: str, *, small: bool = False) -> Limits:
    """Takes a few seconds."""
    gpu = device != "cpu"
    size = 2**22 if small else 2**31 if gpu else 2**28  # bytes; far more than a cache holds
    side = 256 if small else 8192 if gpu else 1024
    rate = {dtype: _rate(device, dtype, side) for dtype in (torch.bfloat16, torch.float32)}
    return Limits(bandwidth=_bandwidth(device, size), rate=rate)


def _bandwidth(device: str, size: int) -> float:
    """The best of a sum and of products of one vector with a matrix, over the same written memory."""
    written = torch.randn(size // 4, device=device)
    columns = 2**12
    runs: list[Callable[[], object]] = [lambda: written.sum()]
    for dtype in (torch.float32, torch.bfloat16):
        matrix = written.to(dtype).view(-1, columns)
        vector = torch.ones(1, columns, device=device, dtype=dtype)
        runs.append(lambda m=matrix, v=vector: F.linear(v, m))
    sizes = (size, size, size // 2)
    return max(nbytes / _best(run, device) for run, nbytes in zip(runs, sizes, strict=True))


def _rate(device: str, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: F.linear(left, right), device)


def _best(run: Callable[[], object], device: str, repeats: int = 8) -> float:
    """The shortest of a few calls [s]."""
    found = []
    for _ in range(repeats + 2):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[2:])
