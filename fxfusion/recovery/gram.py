"""Ridge regression from sums over tokens: the change of a linear layer that brings its result nearest to a target.

    G = sum h^T h  [width, width]      C = sum h^T r  [width, hidden]      r: what the result lacks, `[tokens, hidden]`
    change^T = (G + penalty * I)^-1 (C - penalty * (W - W0)^T)
    which minimises  ||h change^T - r||^2 + penalty * ||W + change - W0||^2

Products are taken in float32 (float64 for float64 models), a batch at a time, and summed in float64. Of G only the
lower triangle is computed, in blocks of rows. Memory at most, in bytes, for c candidate penalties:

    24 width^2 + (8 + 16 c) width hidden + 4 ROWS width

Where that is more than may be taken, a layer is solved in parts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fxfusion.errors import OptionError

ROWS = 1024  # rows of G that are computed at a time
_MEMINFO = Path("/proc/meminfo")
_GROUPS = (  # of a container: what it may have, what it has
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_SMALLEST = 16  # channels that are solved together at least


def bytes_needed(width: int, hidden: int, candidates: int) -> int:
    """Memory that the sums and the solution take at most: G, its factor, and a copy that is made to solve with it.
    `width` counts a bias as one more channel."""
    return 24 * width**2 + (8 + 16 * candidates) * width * hidden + 4 * ROWS * width


class GramSums:
    """`gram` and `cross` are sums over `tokens` tokens; `bias`: the last channel is the constant one of a bias."""

    def __init__(self, width: int, hidden: int, device: torch.device, bias: bool = False) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(width, hidden, dtype=torch.float64, device=device)
        self.tokens, self.bias = 0, bias

    def add(self, inputs: Tensor, lacking: Tensor) -> None:
        """`inputs`: `[tokens, width]`, `lacking`: `[tokens, hidden]`, both of one dtype, float32 or float64."""
        width = inputs.shape[1]
        for start in range(0, width, ROWS):
            end = min(start + ROWS, width)
            self.gram[start:end, :end] += inputs[:, start:end].t() @ inputs[:, :end]
        self.cross += inputs.t() @ lacking
        self.tokens += inputs.shape[0]

    @property
    def is_finite(self) -> bool:
        return bool(self.gram.diagonal().isfinite().all() and self.cross.isfinite().all())

    @property
    def scale(self) -> float:
        """Mean of the diagonal, that of a bias left out: penalties are given as parts of it."""
        diagonal = self.gram.diagonal()
        return float(diagonal[:-1].mean() if self.bias else diagonal.mean())

    def penalty(self, share: float) -> Tensor:
        """Of each channel, `[width]`. `share`: as a part of `scale`."""
        found = torch.full_like(self.gram.diagonal(), share * self.scale)
        if self.bias:
            found[-1] = share * self.gram[-1, -1]  # the mean square of a bias's channel is one, whatever that of others
        return found

    def factor(self, share: float) -> Tensor | None:
        """The lower Cholesky factor of `G + penalty`, `[width, width]`; None where that is singular."""
        diagonal = self.gram.diagonal()
        before = diagonal.clone()
        diagonal += self.penalty(share)
        factor, info = torch.linalg.cholesky_ex(self.gram)
        diagonal.copy_(before)
        return None if int(info) else factor

    def solve(self, share: float, moved: Tensor | None = None, factor: Tensor | None = None) -> Tensor | None:
        """The change, `[hidden, width]` in float64; None where the sums are singular. `share`: the penalty as a part of
        `scale`. `moved`: `W - W0`, `[hidden, width]`, where an earlier step has changed W already. `factor`: where it
        is known."""
        factor = self.factor(share) if factor is None else factor
        if factor is None:
            return None
        wanted = self.cross if moved is None else self.cross - self.penalty(share)[:, None] * moved.t().to(self.cross)
        change = torch.cholesky_solve(wanted, factor)
        return change.t() if bool(change.isfinite().all()) else None


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; for a CPU what the system, or the container, has left."""
    if device.type != "cpu":
        free, _ = torch.accelerator.get_memory_info(device)
        return int(free)
    found = []
    if _MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for most, now in _GROUPS:
        if most.exists() and now.exists() and most.read_text().strip().isdecimal():
            found.append(int(most.read_text()) - int(now.read_text()))
    if not found:
        raise OptionError("memory_limit: how much memory is free cannot be told on this system; give the bytes")
    return max(min(found), 0)


def limit_or_half(memory_limit: int | None, device: torch.device) -> int:
    """Raises `OptionError` for what is no number of bytes."""
    if memory_limit is None:
        return free_memory(device) // 2
    if type(memory_limit) is not int or memory_limit < 1:
        raise OptionError(f"memory_limit: expected bytes, got {memory_limit!r}")
    return memory_limit


def parts_of(width: int, hidden: int, candidates: int, limit: int, name: str, unit: int = 1) -> list[slice]:
    """Equal runs of channels, as few as fit into the limit, of whole units. Raises `OptionError` where none does."""
    count = 1
    while bytes_needed(-(-width // count), hidden, candidates) > limit:
        if -(-width // count) <= _SMALLEST:
            least = bytes_needed(_SMALLEST, hidden, candidates)
            raise OptionError(f"memory_limit: {name} takes at least {least:,} bytes, and the limit is {limit:,}")
        count += 1
    step = -(-width // (count * unit)) * unit
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]
