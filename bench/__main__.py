"""`make bench`: every CPU benchmark, one after the other, within 10 minutes; results into bench/results/.

    python -m bench [--seconds 570] [--only NAME]

Each runs in a process of its own. What a benchmark leaves out for lack of time stands in its file; one that would have
no time at all is named here.
"""

from __future__ import annotations

import subprocess
import sys
import time

from bench.record import arguments
from bench.show import seconds, table

# Command, the least seconds that it needs, the most that it is given. In order of importance.
SUITE = (
    ("chain_speed", 60, 180),
    ("scale", 60, 100),
    ("grid", 50, 70),
    ("memory", 20, 60),
    ("whole_models", 90, 105),
    ("pass_time", 30, 130),
    ("whole_models --windows", 80, 85),
)
UNLIMITED = ("memory", "pass_time")  # the others keep to a time by themselves


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=570.0)
    parser.add_argument("--only", action="append", choices=[name for name, *_ in SUITE])
    chosen = parser.parse_args()
    start = time.perf_counter()
    rows: list[tuple[str, str | None, str]] = []
    for name, least, most in SUITE:
        left = chosen.seconds - (time.perf_counter() - start)
        if chosen.only and name not in chosen.only:
            continue
        if left < least:
            rows.append((name, None, f"left out: {least} s needed, {max(0.0, left):.0f} s left"))
            continue
        print(f"== {name}", flush=True)
        begun = time.perf_counter()
        rows.append((name, run(name, min(most, left), left), seconds(time.perf_counter() - begun)))
    print(table(rows, ("benchmark", "end", "time")))
    if any(end not in (None, "done") for _, end, _ in rows):
        sys.exit(1)


def run(command: str, share: float, left: float) -> str:
    """Run one benchmark within `left` seconds; "done", or what went wrong."""
    limit = [] if command in UNLIMITED else ["--seconds", f"{share:.0f}"]
    module, *more = command.split()
    try:
        done = subprocess.run([sys.executable, "-m", f"bench.{module}", *more, *limit], timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return "stopped: no time left"
    return f"failed with {done.returncode}" if done.returncode else "done"


if __name__ == "__main__":
    main()
