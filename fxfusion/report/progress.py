"""How far a long job is, on the error stream: a bar on a terminal, elsewhere a line at most every 30 seconds.

    attention scores (loss) ━━━━━━━╸━━━━━━━━━━━━━ 120/480 0:01:12
    attention scores (loss): 120/480 (25 %), 0:01:12 left
    attention scores (loss): 480/480 (100 %) after 0:01:36

Jobs inside of each other share one display. Where a job has parts whose times are estimated (`whole`), each line also
says how far all of it is:

    refit: 12/120 (10 %), 0:04:12 left; in all 43 %, 0:06:50 left
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
Advance = Callable[..., None]
"""`advance(steps=1, text="")`: so many steps more, and words to show beside them."""

_EVERY = 30.0  # seconds between two lines
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

_LEAST_LEFT = 0.05  # of the time that a part has taken: it is never taken to be at its end before it is
_bars: Any = None  # the display on the terminal, while there is one
_whole: _Whole | None = None


@contextmanager
def whole(parts: Mapping[str, float]) -> Iterator[Callable[[str], None]]:
    """A job of several parts with their estimated seconds, in order. Yields what is called with the name of each as it
    begins: it says so on the error stream. What is reported inside says how far all of it is, too."""
    global _whole
    before, own = _whole, _Whole(parts)
    _whole = own
    try:
        yield own.begin
    finally:
        _whole = before


class _Whole:
    """`factor`: how many times longer the parts that are over have taken than was estimated."""

    def __init__(self, parts: Mapping[str, float]) -> None:
        self.parts, self.names = dict(parts), list(parts)
        self.start = self.begun = time.monotonic()
        self.place, self.factor = -1, 1.0

    def begin(self, name: str) -> None:
        now = time.monotonic()
        self.place = self.names.index(name)
        over = sum(self.parts[one] for one in self.names[: self.place])
        self.factor = (now - self.start) / over if over > 0 else 1.0
        self.begun = now
        print(f"({self.place + 1} of {len(self.names)}) {name}{self.words()}", file=sys.stderr, flush=True)

    def words(self) -> str:
        now = time.monotonic()
        spent, own = now - self.start, now - self.begun
        later = sum(self.parts[one] for one in self.names[self.place + 1 :])
        current = self.parts[self.names[self.place]]
        left = self.factor * later + max(self.factor * current - own, _LEAST_LEFT * own)
        share = spent / (spent + left) if spent + left > 0 else 0.0
        return f"; in all {100 * share:.0f} %, {_duration(left)} left"


def _in_all() -> str:
    return "" if _whole is None or _whole.place < 0 else _whole.words()


@contextmanager
def reporting(
    shown: bool, what: str, total: int | None = None, *, done: int = 0, is_bytes: bool = False
) -> Iterator[Advance]:
    """What a job calls after each step, or what does nothing where nothing is to be shown.

    Args:
        what: the job, in words. total: its steps, None where that is not known.
        done: steps that need not be done again; they say nothing about the time left.
        is_bytes: steps are bytes.
    """
    if not shown:
        yield lambda steps=1, text="": None
    elif sys.stderr.isatty():
        with _bar(what, total, done, is_bytes) as advance:
            yield advance
    else:
        lines = _Lines(what, total, done, is_bytes)
        try:
            yield lines.advance
        finally:
            lines.end()


def each(items: Iterable[T], shown: bool, what: str) -> Iterable[T]:
    """`items`, one step each; themselves where nothing is to be shown."""
    return _each(items, what) if shown else items


def _each(items: Iterable[T], what: str) -> Iterator[T]:
    with reporting(True, what, len(items) if isinstance(items, Sized) else None) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def _bar(what: str, total: int | None, done: int, is_bytes: bool) -> Iterator[Advance]:
    global _bars
    own = _new_bars() if _bars is None else None
    if own is not None:
        own.start()
        _bars = own
    bars = _bars
    task = bars.add_task(what, total=total, completed=done, count=_count(done, total, is_bytes), text="")
    now = done

    def advance(steps: int = 1, text: str = "") -> None:
        nonlocal now
        now += steps
        bars.update(task, completed=now, count=_count(now, total, is_bytes), text=text + _in_all())

    try:
        yield advance
    finally:
        if own is not None:
            own.stop()
            _bars = None
        else:
            bars.remove_task(task)


def _new_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    words = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[count]", "fields[text]")]
    return Progress(words[0], BarColumn(), words[1], TimeRemainingColumn(), words[2], console=Console(stderr=True))


class _Lines:
    """The same as lines. Nothing is said before 30 seconds are over, but at the end."""

    def __init__(self, what: str, total: int | None, done: int, is_bytes: bool) -> None:
        self.what, self.total, self.now, self.is_bytes = what, total, done, is_bytes
        self._done, self._text = done, ""
        self._start = self._said = time.monotonic()

    def advance(self, steps: int = 1, text: str = "") -> None:
        self.now += steps
        self._text = f", {text}" if text else ""
        moment = time.monotonic()
        if moment - self._said >= _EVERY:
            self._said = moment
            self._say(self._left(moment - self._start))

    def end(self) -> None:
        self._say(f" after {_duration(time.monotonic() - self._start)}")

    def _left(self, taken: float) -> str:
        fresh = self.now - self._done
        if self.total is None or fresh <= 0:
            return ""
        return f", {_duration(taken / fresh * max(0, self.total - self.now))} left"

    def _say(self, words: str) -> None:
        part = f" ({100 * self.now // self.total} %)" if self.total else ""
        count = _count(self.now, self.total, self.is_bytes)
        print(f"{self.what}: {count}{part}{words}{self._text}{_in_all()}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _count(now: int, total: int | None, is_bytes: bool) -> str:
    size, unit = next((one for one in _BYTES if is_bytes and (total or now) >= one[0]), (1.0, "bytes"))
    numbers = [f"{value / size:.1f}" if size > 1 else str(value) for value in (now, total) if value is not None]
    return "/".join(numbers) + (f" {unit}" if is_bytes else "")
