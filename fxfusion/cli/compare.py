"""`fxfusion compare MODEL`: fxfusion's plans and what others do, at equal FFN depth, on the same text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli import options
from fxfusion.cli.options import read, read_layers, read_roads
from fxfusion.cli.results_folder import COMPARISON, COMPARISON_PLOT, COMPARISON_TABLE, MODEL
from fxfusion.cli.session import Session, Work, command
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from fxfusion.planning.comparison import Cell, Comparison

Depths = Annotated[
    str | None,
    typer.Option(
        metavar="DEPTHS", help="FFN depths, such as 27,23,18.", show_default="0.9, 0.75 and 0.6 of the model's"
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="METHODS",
        help="Some of drop,hoist,wide,remove,mixed,pairs,shortgpt,sleb,llm-drop,ffn-drop,replaceme.",
        show_default="all",
    ),
]
Refit = Annotated[bool, typer.Option("--refit", help="Also measure every plan after `fxfusion refit`.")]
Probes = Annotated[
    int, typer.Option(min=0, help="Also ask so many generative probes of each kind (copying, recall, sums, ...).")
]
Generate = Annotated[int, typer.Option(min=0, help="Also continue so many prompts greedily, and compare the texts.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Length of these continuations.")]
Output = Annotated[
    Path | None,
    typer.Option(metavar="CSV", help="Where the table goes.", show_default=f"{COMPARISON_TABLE} in --results"),
]

_TRACED = 16  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What is compared, and by which measures."""

    depths: Depths = None
    methods: Methods = None
    refit: Refit = False
    probes: Probes = 0
    generate: Generate = 0
    new_tokens: NewTokens = 32
    max_window: options.MaxWindow = None
    hardware: options.Hardware = "h100"
    tp: options.Tp = 1
    precision: options.Precision = "bf16"

    def arguments(self, model_dir: Path) -> dict[str, Any]:
        """Of `fxfusion.planning.arena.compare`, checked against the layers of a model without its weights."""
        from fxfusion.cli.inputs import graph_without_weights
        from fxfusion.planning.arena import METHODS, ArenaOptions
        from fxfusion.planning.price import table_of_model

        given: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        given["methods"] = tuple(read(self.methods, read_roads, "--methods") or METHODS)
        wanted = read(self.depths, read_layers, "--depths")
        ArenaOptions(**{**given, "depths": tuple(wanted or (1,))})  # before torch builds anything
        outline, graph = graph_without_weights(model_dir, _TRACED)
        ffns = len(graph.blocks.layers)
        given["depths"] = _depths(ffns) if wanted is None else tuple(wanted)
        asked = ArenaOptions(**given)
        asked.check_depths(ffns)
        asked.check_device(table_of_model(outline, graph))
        return given


@command
def compare(run: Session, choices: Choices, output: Output = None) -> dict[str, Any]:
    """Compare fxfusion's plans with other ways to a shorter model: perplexity, KL, flips, text, predicted latency.

    The last quarter of the text judges; everything is chosen, and fitted, on the rest. Each measurement is kept as soon
    as it is made: the same command goes on from there.
    """
    table = run.folder.file(COMPARISON_TABLE) if output is None else output
    run.check(MODEL, COMPARISON, COMPARISON_PLOT, (table, "comparison"))
    from fxfusion.planning import arena

    arguments = choices.arguments(run.model_dir)
    arena.divided(run.batches)
    tokenizer = run.tokenizer if choices.probes else None
    if run.dry_run:
        return run.plan_dry_run(_work(arguments), [COMPARISON, table, COMPARISON_PLOT])
    cache = run.folder.file("comparison")
    found = arena.compare(run.model, run.batches, **arguments, tokenizer=tokenizer, cache=cache, progress=True)
    _keep(run, found, table)
    _show(run, found)
    return found.to_dict()


def _keep(run: Session, found: Comparison, table: Path) -> None:
    run.folder.write(COMPARISON, {"text": run.text_facts, **found.to_dict()})
    found.to_csv(table, overwrite=run.overwrite)
    found.plot(run.folder.file(COMPARISON_PLOT), overwrite=run.overwrite)
    files = (table, run.folder.file(COMPARISON_PLOT), run.folder.file(COMPARISON))
    run.screen.note(f"written: {', '.join(map(str, files))}")


def _depths(ffns: int) -> tuple[int, ...]:
    """Where nobody names any."""
    found = sorted({round(share * ffns) for share in (0.9, 0.75, 0.6)} - {0, ffns}, reverse=True)
    if not found:
        raise OptionError(f"the model has {ffns} FFNs: there is nothing to make shorter")
    return tuple(found)


def _work(arguments: dict[str, Any]) -> list[Work]:
    cells = len(arguments["depths"]) * len(arguments["methods"])
    parts = [Work(f"choosing for {cells} cells"), Work("measuring each on the text that judges", cells)]
    return [*parts, *([Work(f"a refit for each of at most {cells} plans")] if arguments["refit"] else [])]


def _show(run: Session, found: Comparison) -> None:
    best = list(found.best.values())
    rows = [_row(cell, any(cell is one for one in best)) for cell in found.cells if not cell.problem]
    heads = ("method", "FFNs", "ms", "perplexity", "loss", "KL", "flips %", "text", "probes %")
    run.screen.table(heads, rows)
    for cell in found.cells:
        if cell.problem:
            run.screen.line(f"{cell.name} at depth {cell.depth}: {cell.problem}", "bold red")
    chosen, judged = found.tokens
    run.screen.line(
        f"* least KL at its depth. Intact: {found.ffns} FFNs, {found.latency_ms:.4g} ms (of a token, predicted for "
        f"{found.predicted_for}). Loss: above the intact model's. Text: share of greedy tokens before the first that "
        f"differs. Chosen and fitted on {chosen:,} tokens, judged by {judged:,} others.",
        "dim",
    )


def _row(cell: Cell, is_best: bool) -> tuple[str, ...]:
    def number(value: float | None, text: str, factor: float = 1.0) -> str:
        return "" if value is None else format(value * factor, text)

    top1 = cell.value("top1")
    return (
        f"{cell.name}{' *' if is_best else ''}",
        str(cell.ffns),
        number(cell.latency_ms, ".4g"),
        number(cell.value("perplexity"), ".2f"),
        number(cell.value("loss_increase"), "+.4f"),
        number(cell.value("kl"), ".4f"),
        number(None if top1 is None else 1 - top1, ".1f", 100),
        number(cell.agreement, ".2f"),
        number((cell.probes or {}).get("all"), ".0f", 100),
    )
