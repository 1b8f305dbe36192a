"""A benchmark of many parts that may be stopped: each part is kept when it is done, and not done again.

    with Session("grid", seconds=120) as session:
        for cell in cells:
            session.do(cell.place, lambda: measure(cell))

What does not fit into the time is named in the record as left out. A part that fails is named with its error, and the
others go on; the command then ends with an error too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.record import Measurement, Record, Scalar


class Session:
    """One run over the parts. `seconds`: no part is begun after that. `fresh`: forget what an earlier run found."""

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
        if (before.machine.processor, before.machine.gpu, before.versions) != (
            here.machine.processor,
            here.machine.gpu,
            here.versions,
        ):
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
        more = {"failed": self.failed} if self.failed else {}
        found = Record.of(
            self.benchmark,
            measurements=tuple(self.measurements),
            results={**self.results, **more},
            predictions=self.predictions,
            complete=self.done and not self.left_out and not self.failed,
            left_out=tuple(self.left_out),
        )
        return found.write(self.path)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.done = True
            print("recorded:", self.write().name, file=sys.stderr)
            if self.left_out:
                print(f"left out for lack of time: {len(self.left_out)} parts", file=sys.stderr)
            if self.failed:
                raise SystemExit(f"{len(self.failed)} parts failed: {', '.join(self.failed)}")
