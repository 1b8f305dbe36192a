"""The one result schema of all benchmarks, its files, their samples and intervals, and runs of many parts.

    samples = measure({"unfused": f, "fused": g}, rounds=12, threads=1)        # interleaved; seconds
    record("chain_speed", measurements=[Measurement.of({"tokens": 1}, samples, [("unfused", "fused")])])

    with Session("grid", seconds=120) as session:    # each part is kept when it is done, and not done again
        for cell in cells:
            session.do(cell.place, lambda: measure(cell))

A measurement is one cell of a benchmark's grid: every sample of every candidate, the medians, and ratios between
candidates. What a file says about its samples is computed again when it is read, so the numbers cannot drift apart.
Needs torch and pydantic alone, since the GPU benchmark runs without the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from fxfusion.cost.interleaved import sample
from fxfusion.files import whole

RESULTS = Path(__file__).parent / "results"
VERSION: Literal[2] = 2
Scalar = bool | int | FiniteFloat | str | None

_LIBRARIES = ("torch", "triton", "transformers", "pydantic", "networkx")
_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")  # a list of nothing else
_ROUNDING = 2e-3  # relative: some files keep samples with five digits


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Strict):
    """An estimate with a 95 % bootstrap interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @classmethod
    def exact(cls, value: float) -> Interval:
        return cls(value=value, low=value, high=value)


def measure(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int, threads: int, sample_seconds: float = 0.02
) -> dict[str, list[float]]:
    """Seconds per call of each candidate in each round, after a warm-up: `fxfusion.cost.interleaved` on so many
    threads of torch. An A/A control (two compiles of the same thing) shows how much of a difference is noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return sample(candidates, rounds, sample_seconds=sample_seconds)
    finally:
        torch.set_num_threads(before)


def ratio(slow: Sequence[float], fast: Sequence[float], *, seed: int = 0, draws: int = 2000) -> Interval:
    """How many times faster `fast` is than `slow`: geometric mean over the rounds. Rounded to four digits."""
    logs = [math.log(a / b) for a, b in zip(slow, fast, strict=True)]
    low, high = _bootstrap(logs, lambda drawn: drawn.mean(1), seed, draws)
    ends = {"value": statistics.fmean(logs), "low": low, "high": high}
    return Interval(**{name: round(math.exp(end), 4) for name, end in ends.items()})


def median(samples: Sequence[float], *, seed: int = 0, draws: int = 500) -> Interval:
    """The median and its interval, in the samples' unit."""
    low, high = _bootstrap(samples, lambda drawn: drawn.quantile(0.5, dim=1), seed, draws)
    return Interval(value=statistics.median(samples), low=low, high=high)


def _bootstrap(
    samples: Sequence[float], estimate: Callable[[Tensor], Tensor], seed: int, draws: int
) -> tuple[float, float]:
    """Ends of the 95 % interval of an estimate; `estimate` takes resampled rounds `[draws, rounds]`."""
    values = torch.tensor(samples, dtype=torch.float64)
    drawn = torch.randint(len(samples), (draws, len(samples)), generator=torch.Generator().manual_seed(seed))
    found = estimate(values[drawn]).sort().values
    return float(found[int(0.025 * draws)]), float(found[max(0, int(0.975 * draws) - 1)])


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
            command=" ".join(["python -m", _module(), *map(_portable, sys.argv[1:])]),
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
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        with whole(target) as scratch:
            scratch.write_text(_NUMBERS.sub(_on_one_line, text) + "\n", encoding="utf-8")
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


class Session:
    """One run over many parts, which may be stopped. `seconds`: no part is begun after that. `fresh`: forget what an
    earlier run found. What does not fit into the time is named in the record as left out. A part that fails is named
    with its error, and the others go on; the command then ends with an error too."""

    def __init__(self, benchmark: str, *, seconds: float, path: Path | None = None, fresh: bool = True) -> None:
        self.benchmark, self.path, self.seconds = benchmark, path, seconds
        self.start = time.perf_counter()
        self.measurements: list[Measurement] = []
        self.results: dict[str, Any] = {}
        self.predictions: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self.done = False  # until the end is reached: a run that was stopped is no complete one
        if not fresh:
            self._take_up()

    def _take_up(self) -> None:
        """Go on from the file, if it was written on the same kind of machine with the same versions."""
        try:
            before = Record.read(self.path or self.benchmark)
        except FileNotFoundError:
            return
        here = Record.of(self.benchmark)
        ours, theirs = ((one.machine.processor, one.machine.gpu, one.versions) for one in (here, before))
        if ours != theirs:
            print(f"{self.benchmark}: results of another machine or other versions are not continued", file=sys.stderr)
            return
        self.measurements, self.results = list(before.measurements), dict(before.results)
        self.results.pop("failed", None)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    def has(self, place: Mapping[str, Scalar]) -> bool:
        return any(one.place == place for one in self.measurements)

    def do(self, place: Mapping[str, Scalar], measure: Callable[[], Measurement], *, needs: float = 0.0) -> None:
        """Measure one part, unless it is known or `needs` more seconds [s] than are left; then write the file."""
        name = ", ".join(f"{key} {value}" for key, value in place.items())
        if self.has(place):
            return
        if self.left < needs:
            self.left_out.append(name)
            return
        began = time.perf_counter()
        try:
            found = measure()
        except Exception as error:  # one part that cannot run here must not cost the others
            self.failed[name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name}: FAILED: {self.failed[name]}", file=sys.stderr, flush=True)
        else:
            self.measurements.append(found)
            print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> Path:
        found = Record.of(
            self.benchmark,
            measurements=tuple(self.measurements),
            results=self.results | ({"failed": self.failed} if self.failed else {}),
            predictions=self.predictions,
            complete=self.done and not self.left_out and not self.failed,
            left_out=tuple(self.left_out),
        )
        return found.write(self.path)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.done = True
            print("recorded:", self.write().name, file=sys.stderr)
            if self.left_out:
                print(f"left out for lack of time: {len(self.left_out)} parts", file=sys.stderr)
            if self.failed:
                raise SystemExit(f"{len(self.failed)} parts failed: {', '.join(self.failed)}")


def arguments(about: str | None, *, seconds: float | None = None, rounds: int | None = None) -> argparse.ArgumentParser:
    """The command line of a benchmark; with `seconds`, of one in a `Session`. Both are defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help="no part is begun that would end after that")
        parser.add_argument("--continue", dest="go_on", action="store_true", help="keep the parts of an earlier run")
    return parser


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


def _portable(argument: str) -> str:
    """A path as seen from the checkout, or its name alone: where others keep things is not ours to tell."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    root = RESULTS.parents[1]
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _commit() -> str:
    """The commit, with a plus sign where the tree differs from it; "unknown" outside a clone."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"
