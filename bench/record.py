"""The one result schema of all benchmarks, and reading and writing of its files.

    record = Record.of("chain_speed", measurements=[Measurement.of({"tokens": 1}, samples, [("unfused", "fused")])])
    record.write()                                   # bench/results/chain_speed.json, replaced whole

A measurement is one cell of a benchmark's grid: every sample of every candidate, the medians, and ratios between
candidates. What a file says about its samples is computed again when it is read, so the numbers cannot drift apart.
Needs torch and pydantic alone, since the GPU benchmark runs without the rest.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from bench.timing import Interval, median, ratio

RESULTS = Path(__file__).parent / "results"
VERSION: Literal[2] = 2
Scalar = bool | int | FiniteFloat | str | None

_LIBRARIES = ("torch", "triton", "transformers", "pydantic", "networkx")
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")  # a list of nothing else
_ROUNDING = 2e-3  # relative: some files keep samples with five digits


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(_Strict):
    """Where it ran. No host name, no path. `load_average`: over 1, 5 and 15 minutes, when the file was written."""

    system: str
    processor: str | None
    cores: int | None
    memory_gib: FiniteFloat | None
    threads: int | None = Field(description="of torch, within one operation")
    gpu: str | None = None
    gpu_memory_gib: FiniteFloat | None = None
    load_average: tuple[FiniteFloat, ...] | None = None

    @classmethod
    def here(cls) -> Machine:
        gpu = torch.cuda.is_available()
        return cls(
            system=f"{platform.system()} {platform.machine()}",
            processor=_processor(),
            cores=os.cpu_count(),
            memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if gpu else None,
            gpu_memory_gib=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpu else None,
            load_average=tuple(round(load, 2) for load in os.getloadavg()),
        )


class Measurement(_Strict):
    """One cell: `place` says which, `samples` hold one value per round and candidate, all in `unit`.

    `ratios["a/b"]`: geometric mean over the rounds of a's value over b's, with a 95 % interval, so how many times
    faster b is where the unit is seconds. `facts`: what else is known of the cell, such as its limit.
    """

    place: Mapping[str, Scalar]
    unit: Literal["seconds", "bytes"] = "seconds"
    samples: Mapping[str, tuple[FiniteFloat, ...]]
    medians: Mapping[str, Interval]
    ratios: Mapping[str, Interval] = Field(default_factory=dict)
    facts: Mapping[str, Scalar] = Field(default_factory=dict)

    @classmethod
    def of(
        cls,
        place: Mapping[str, Scalar],
        samples: Mapping[str, Sequence[float]],
        ratios: Iterable[tuple[str, str]] = (),
        *,
        unit: Literal["seconds", "bytes"] = "seconds",
        facts: Mapping[str, Scalar] | None = None,
    ) -> Measurement:
        """Medians, and the ratios that are named: of the first candidate over the second. Samples get six digits."""
        kept = {name: tuple(float(f"{one:.6g}") for one in found) for name, found in samples.items()}
        return cls(
            place=dict(place),
            unit=unit,
            samples=kept,
            medians={name: median(found) for name, found in kept.items()},
            ratios={f"{slow}/{fast}": ratio(kept[slow], kept[fast]) for slow, fast in ratios},
            facts=dict(facts or {}),
        )

    @model_validator(mode="after")
    def _follows_from_its_samples(self) -> Measurement:
        if not all(self.samples.values()):
            raise ValueError(f"{self.place}: a candidate without samples")
        if set(self.medians) != set(self.samples):
            raise ValueError(f"{self.place}: medians of {sorted(self.medians)}, samples of {sorted(self.samples)}")
        for name, found in self.medians.items():
            self._same(f"median of {name}", found.value, median(self.samples[name], draws=1).value)
        for name, found in self.ratios.items():
            slow, _, fast = name.partition("/")
            if not {slow, fast} <= set(self.samples):
                raise ValueError(f"{self.place}: ratio {name!r} is not of two candidates {sorted(self.samples)}")
            self._same(f"ratio {name}", found.value, ratio(self.samples[slow], self.samples[fast], draws=1).value)
        return self

    def _same(self, what: str, stored: float, computed: float) -> None:
        if abs(stored - computed) > _ROUNDING * abs(computed):
            raise ValueError(f"{self.place}: the {what} is {stored} in the file, {computed} by its samples")


class Record(_Strict):
    """One run of one benchmark. `results`: findings that are no timings, in a shape of the benchmark's own.

    `complete`: False where the run was stopped or ran out of time; `left_out` names what it did not measure.
    """

    version: Literal[2] = VERSION
    benchmark: str
    date: str
    command: str
    commit: str
    machine: Machine
    versions: Mapping[str, str]
    complete: bool = True
    left_out: tuple[str, ...] = ()
    predictions: Mapping[str, Any] = Field(default_factory=dict)
    results: Mapping[str, Any] = Field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    @classmethod
    def of(cls, benchmark: str, **found: Any) -> Record:
        """A record of this process: here, now, by this command."""
        return cls(
            benchmark=benchmark,
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            command=" ".join(["python -m", _module(), *sys.argv[1:]]),
            commit=_commit(),
            machine=Machine.here(),
            versions=versions(),
            **found,
        )

    @classmethod
    def read(cls, name: str | Path) -> Record:
        """A benchmark's file, by name or path. Raises `ValueError` (pydantic's) that names the wrong field."""
        return cls.model_validate_json(_path(name).read_text("utf-8"))

    def write(self, path: Path | None = None) -> Path:
        """Replace the benchmark's file (or `path`), whole or not at all; returns its path."""
        target = path or _path(self.benchmark)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(".part")
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        scratch.write_text(_NUMBERS.sub(_on_one_line, text) + "\n", encoding="utf-8")
        scratch.replace(target)
        return target


def record(
    name: str,
    results: Mapping[str, Any] | None = None,
    *,
    measurements: Iterable[Measurement] = (),
    predictions: Mapping[str, Any] | None = None,
) -> Path:
    """Write what a benchmark found in this process to `bench/results/<name>.json`; returns its path."""
    found = {"results": dict(results or {}), "predictions": dict(predictions or {})}
    return Record.of(name, measurements=tuple(measurements), **found).write()


def versions() -> dict[str, str]:
    """Python, the libraries that matter, and CUDA where torch has it."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # triton is not there on the CPU
    found["torch"] = torch.__version__
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _path(name: str | Path) -> Path:
    return name if isinstance(name, Path) else RESULTS / f"{name}.json"


def _on_one_line(found: re.Match[str]) -> str:
    return " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec.name if spec else "bench").removesuffix(".__main__")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _commit() -> str:
    """The commit, with a plus sign where the tree differs from it; "unknown" outside a clone."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            cwd=RESULTS.parent,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
