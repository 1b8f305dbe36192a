"""`fxfusion plan MODEL_DIR`: which attention to drop and which FFNs to fuse, under a budget, as a plan file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxfusion.cli import options, road_options
from fxfusion.cli.options import Method, read, read_drop, read_layers, read_share
from fxfusion.cli.results_folder import COMPILED, MODEL, PLAN, PLANS
from fxfusion.cli.road_options import Preset, Road, RoadChoice
from fxfusion.cli.score import work as score_work
from fxfusion.cli.session import Session, Work, measuring
from fxfusion.errors import OptionError

Drop = Annotated[
    str | None, typer.Option(metavar="NUMBER", help="Attention layers to drop: 5, or 0.4, or 40%.", show_default=False)
]
Perplexity = Annotated[
    str | None,
    typer.Option(
        "--max-perplexity-increase", metavar="SHARE", help="Against the intact model, such as 5%.", show_default=False
    ),
]
MaxKl = Annotated[float | None, typer.Option(min=0, help="KL from the intact model [nats].", show_default=False)]
TargetDepth = Annotated[
    int | None, typer.Option(min=1, help="FFNs one behind the other that remain.", show_default=False)
]
PresetOption = Annotated[
    Preset | None,
    typer.Option(
        "--preset",
        help="paper: each run of FFNs without its first and last one, norm last. automatic: see --automatic.",
        show_default=False,
    ),
]
Splits = Annotated[
    str | None,
    typer.Option(metavar="LAYERS", help="With --preset: layers at which a new group begins.", show_default=False),
]
Out = Annotated[Path | None, typer.Option(help="The plan file.", show_default="plan.yaml in --results")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for, as arguments of `make_plan`."""

    drop: int | float | None = None
    dropped_attention: list[int] | None = None
    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    target_depth: int | None = None
    max_members: int | None = None
    max_width: int | None = None
    max_bytes: int | None = None
    max_dependency: float | None = None
    norm: Literal["fold", "last"] | None = None
    method: Literal["cosine", "loss", "kl"] = "loss"
    preset: Literal["paper", "automatic"] | None = None
    splits: list[int] | None = None
    roads: list[Road] | None = None
    after_refit: bool | None = None
    max_window: int | None = None
    hardware: str | None = None
    tp: int = 1
    precision: str = "bf16"
    max_latency: float | None = None

    @property
    def over_roads(self) -> bool:
        """Whether attention may move, or the planner itself decides where it is dropped."""
        return self.roads is not None or self.preset == "automatic"

    def __post_init__(self) -> None:
        if self.over_roads:
            for name in ("dropped_attention", "splits"):
                if getattr(self, name) is not None:
                    option = "--drop-attention" if name == "dropped_attention" else "--splits"
                    raise OptionError(f"{option}: over several roads the planner itself decides that")
            if self.preset == "paper":
                raise OptionError("--preset paper is a rule for dropped attention; it goes without --roads")
            return
        if self.drop is not None and self.dropped_attention is not None:
            raise OptionError("--drop and --drop-attention were both given; the second names the layers itself")
        if self.preset is None:
            if self.splits is not None:
                raise OptionError("--splits goes with --preset paper: otherwise the cuts are found by measurement")
            return
        budgets = ("max_perplexity_increase", "max_kl", "target_depth", "max_members", "max_width", "max_dependency")
        given = next((name for name in budgets if getattr(self, name) is not None), None)
        if given is not None:
            raise OptionError(f"--{given.replace('_', '-')}: --preset is a rule that keeps no such budget")
        if self.norm == "fold":
            raise OptionError("--norm: --preset paper takes the norm of a group's last FFN, --norm last")


@measuring
def command(
    run: Session,
    limits: options.GroupLimits,
    choice: RoadChoice,
    drop: Drop = None,
    drop_attention: options.DropAttention = None,
    max_perplexity_increase: Perplexity = None,
    max_kl: MaxKl = None,
    target_depth: TargetDepth = None,
    norm: options.NormOption = None,
    method: options.MethodOption = Method.loss,
    preset: PresetOption = None,
    splits: Splits = None,
    automatic: road_options.Automatic = False,
    after_refit: road_options.AfterRefit = None,
    out: Out = None,
) -> dict[str, Any]:
    """Choose which attention to drop or move and which FFNs to fuse, by measurement, and write a plan file.

    Of all plans within the budget, the one with the fewest FFNs one behind the other (over several roads, with
    --hardware: with the least predicted latency), and among those the one with the least loss. What was scored or
    measured before with the same --results is not measured again.
    """
    wish = Wish(
        drop=read(drop, read_drop),
        dropped_attention=read(drop_attention, partial(read_layers, option="--drop-attention")),
        max_perplexity_increase=read(max_perplexity_increase, partial(read_share, option="--max-perplexity-increase")),
        max_kl=max_kl,
        target_depth=target_depth,
        norm=None if norm is None else norm.value,
        method=method.value,
        preset=_preset(preset, automatic),
        splits=read(splits, partial(read_layers, option="--splits")),
        after_refit=after_refit,
        **limits.arguments(),
        **choice.arguments(),
    )
    options.check_folder(run.common.model_dir)
    run.require_text()
    target = out or run.folder.file(PLAN)
    run.check_writes(MODEL, PLAN, COMPILED, (target, "plan"))
    if run.common.dry_run:
        return run.plan_dry_run(work(run, wish), [target, COMPILED, PLANS])
    return _make(run, wish, target)


def _preset(named: Preset | None, automatic: bool) -> Literal["paper", "automatic"] | None:
    if automatic and named is not None:
        raise OptionError(f"--automatic and --preset {named.value} were both given; give one of them")
    return "automatic" if automatic else None if named is None else named.value


def _make(run: Session, wish: Wish, target: Path) -> dict[str, Any]:
    if wish.over_roads:
        from fxfusion.cli.road_planning import make as make_over_roads

        return make_over_roads(run, wish, target)

    from fxfusion.cli.planning import make

    return make(run, wish, target)


def work(run: Session, wish: Wish) -> list[Work]:
    """For dry runs: the scores are needed where the layers are not named."""
    from fxfusion.planning.budget import Budget

    if wish.over_roads:
        return [Work("loss of each window alone"), *([Work("refits")] if wish.after_refit is not False else [])]
    number = Budget(drop=wish.drop).count(len(run.mixers))
    scored = [score_work(run, wish.method, greedy=False), score_work(run, wish.method, greedy=True, drop=number)]
    matrices = [Work("dependency matrix of each set of dropped layers")]
    parts = [*(scored if wish.dropped_attention is None else []), *(matrices if wish.preset is None else [])]
    return [*parts, tried_work(run)]


def tried_work(run: Session) -> Work:
    """The measurements of whole plans."""
    known = len((run.folder.read(PLANS) or {}).get("plans", {}))
    return Work(f"quality of the plans that are tried ({known} are measured)", None, "begun" if known else "")
