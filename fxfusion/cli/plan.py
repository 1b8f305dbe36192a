"""`fxfusion plan MODEL_DIR`: which attention to drop and which FFNs to fuse, under a budget, as a plan file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fxfusion.cli import options
from fxfusion.cli.options import Method, read, read_bytes, read_drop, read_layers, read_share
from fxfusion.cli.results_folder import COMPILED, PLAN, PLANS
from fxfusion.cli.score import work as score_work
from fxfusion.cli.session import Session, Work, measuring
from fxfusion.errors import OptionError


class Preset(str, Enum):
    """Rules instead of a budget."""

    paper = "paper"


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
        "--preset", help="paper: each run of FFNs without its first and last one, norm last.", show_default=False
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

    drop: int | float | None
    dropped_attention: list[int] | None
    max_perplexity_increase: float | None
    max_kl: float | None
    target_depth: int | None
    max_members: int | None
    max_width: int | None
    max_bytes: int | None
    max_dependency: float | None
    norm: Literal["fold", "last"] | None
    method: Literal["cosine", "loss", "kl"]
    preset: Literal["paper"] | None
    splits: list[int] | None

    def __post_init__(self) -> None:
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
    drop: Drop = None,
    drop_attention: options.DropAttention = None,
    max_perplexity_increase: Perplexity = None,
    max_kl: MaxKl = None,
    target_depth: TargetDepth = None,
    max_members: options.MaxMembers = None,
    max_width: options.MaxWidth = None,
    max_bytes: options.MaxBytes = None,
    max_dependency: options.MaxDependency = None,
    norm: options.NormOption = None,
    method: options.MethodOption = Method.loss,
    preset: PresetOption = None,
    splits: Splits = None,
    out: Out = None,
) -> dict[str, Any]:
    """Choose which attention to drop and which FFNs to fuse, by measurement, and write a plan file.

    Of all plans within the budget, the one with the fewest FFNs one behind the other, and among those the one
    with the least loss. What was scored or measured before with the same --results is not measured again.
    """
    wish = Wish(
        drop=read(drop, read_drop),
        dropped_attention=read(drop_attention, partial(read_layers, option="--drop-attention")),
        max_perplexity_increase=read(max_perplexity_increase, partial(read_share, option="--max-perplexity-increase")),
        max_kl=max_kl,
        target_depth=target_depth,
        max_members=max_members,
        max_width=max_width,
        max_bytes=read(max_bytes, partial(read_bytes, option="--max-bytes")),
        max_dependency=max_dependency,
        norm=None if norm is None else norm.value,
        method=method.value,
        preset=None if preset is None else preset.value,
        splits=read(splits, partial(read_layers, option="--splits")),
    )
    options.check_folder(run.common.model_dir)
    run.require_text()
    target = out or run.folder.file(PLAN)
    if run.common.dry_run:
        return run.plan_dry_run(work(run, wish), [target, COMPILED, PLANS])

    from fxfusion.cli.planning import make

    return make(run, wish, target)


def work(run: Session, wish: Wish) -> list[Work]:
    """For dry runs: the scores are needed where the layers are not named."""
    from fxfusion.planning.budget import Budget

    number = Budget(drop=wish.drop).count(len(run.mixers))
    scored = [score_work(run, wish.method, greedy=False), score_work(run, wish.method, greedy=True, drop=number)]
    matrices = [Work("dependency matrix of each set of dropped layers")]
    parts = [*(scored if wish.dropped_attention is None else []), *(matrices if wish.preset is None else [])]
    return [*parts, tried_work(run)]


def tried_work(run: Session) -> Work:
    """The measurements of whole plans."""
    known = len((run.folder.read(PLANS) or {}).get("plans", {}))
    return Work(f"quality of the plans that are tried ({known} are measured)", None, "begun" if known else "")
