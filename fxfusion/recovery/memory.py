"""How much memory a refit may take, and in how many parts a layer must be solved to fit into it."""

from __future__ import annotations

from pathlib import Path

import torch

from fxfusion.errors import OptionError
from fxfusion.recovery.gram import bytes_needed

_MEMINFO = Path("/proc/meminfo")
_GROUPS = (  # of a container: what it may have, what it has
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
_SMALLEST = 16  # channels that are solved together at least


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


def parts_of(width: int, hidden: int, candidates: int, limit: int, name: str) -> list[slice]:
    """Equal runs of channels, as few as fit into the limit. Raises `OptionError` where none does."""
    count = 1
    while bytes_needed(-(-width // count), hidden, candidates) > limit:
        if -(-width // count) <= _SMALLEST:
            least = bytes_needed(_SMALLEST, hidden, candidates)
            raise OptionError(f"memory_limit: {name} takes at least {least:,} bytes, and the limit is {limit:,}")
        count += 1
    step = -(-width // count)
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]
