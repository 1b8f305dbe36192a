"""docs/performance.md and its figures, from bench/results/*.json alone, so that no number can drift.

    python -m bench.performance_page

A test compares the page with what this makes of the recorded files. Sentences that judge are made from the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.performance_compiler import guard, memory, scale
from bench.performance_forms import grouped, windows
from bench.performance_plots import figures
from bench.performance_speed import chains, gpu, grid, whole_models
from bench.record import RESULTS, Record

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    (DOCS / "performance.md").write_text(page(), "utf-8")
    print("written:", *(path.name for path in figures(DOCS / "figures")), "performance.md")


def page() -> str:
    """The whole text."""
    parts = [introduction(), chains(), if_recorded("grouped_speed", grouped, "Norms on the FFN's output"), grid()]
    parts += [whole_models(), if_recorded("window_speed", windows, "Windows"), gpu(), scale()]
    parts += [if_recorded("memory", memory, "Memory"), if_recorded("check", guard, "Check")]
    return "\n\n".join(part.strip() for part in [*parts, reading()]) + "\n"


def if_recorded(name: str, part: Callable[[], str], title: str) -> str:
    """A benchmark's part of the page, or how it would be made."""
    there = (RESULTS / f"{name}.json").exists()
    return part() if there else f"## {title}\n\nNot recorded yet: `python -m bench.{name}`."


def introduction() -> str:
    return f"""
# Performance

Made by `python -m bench.performance_page` from `bench/results/*.json`; a test fails where the two differ. Renew the
files with `make bench` (CPU) and `python -m bench.gpu` (one GPU), see [below](#reading-and-repeating).

{no_gpu()}

Ratios are geometric means over rounds in which every candidate ran once, in an order drawn anew, with a 95 % bootstrap
interval; above 1 the second one is faster. Each table has an A/A control: two copies of the unfused form. Where its
interval is wide or lies off 1, the machine was busy, and a difference of that size means nothing. What fusing gains on
hardware that nobody here has is estimated by the cost model, `fxfusion simulate` ([cost.md](cost.md)), not measured.
"""


def no_gpu() -> str:
    if (RESULTS / "gpu.json").exists():
        return f"The GPU's part ran on {Record.read('gpu').machine.gpu}."
    return (
        "**Nothing on this page was measured on a GPU.** Of `python -m bench.gpu` only the parts ran, on a CPU, tiny; "
        "the goals for GPUs are open."
    )


def reading() -> str:
    return """## Reading and repeating

* On a CPU one core computes one member after the other anyway, and both forms read the same weights. What is saved by
  fusing is a norm, an addition and the start of two kernels per member, which shows where the FFNs are small: compare
  with *unfused frozen*. More comes from oneDNN's weight layout on huge pages, which the backend's default form uses;
  at one token it reads weights about as fast as the memory gives them.
* The backend's form keeps the members' weights beside the packed ones, looks at each call whether one has changed, and
  Dynamo guards every one of them. `fuse` has none of this, needs no more memory than the model, and any engine serves
  it; but plain `torch.compile` gives it no such layout, so that here it is the slower one.
* Compiling gets faster with every layer that is fused away.
* Under tensor parallelism a group needs one all-reduce instead of one per member. That is where the paper's gain comes
  from; no machine here can show it.

`make bench` runs every CPU benchmark within 10 minutes, each with its own share, and names what it left out;
`python -m bench.grid --continue` and the like go on from there. `python -m bench.gpu` needs torch, transformers,
networkx, tabulate and pydantic beside the checkout, takes under 8 minutes, and goes on with `--continue`.
"""


if __name__ == "__main__":
    main()
