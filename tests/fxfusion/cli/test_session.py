"""What all measuring commands share: options, JSON, warnings, Ctrl-C."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from fxfusion import cli
from fxfusion.cli.options import Compiler
from fxfusion.cli.screen import Screen
from fxfusion.cli.session import Session, command, in_options
from fxfusion.errors import FxFusionError


@command
def body(run: Session, compiler: Compiler = Compiler.eager, count: int = 2) -> dict[str, Any]:
    """What it does."""
    print("a line on stdout")
    warnings.warn("look out\nsecond line", stacklevel=1)
    run.screen.line("a result")
    run.screen.note("a note")
    return {"compiler": compiler.value, "count": count, "batch": run.batch}


def call(command: Any, **more: Any) -> None:
    command(**{field.name: field.default for field in fields(Session) if field.init} | {"model_dir": Path("m")} | more)


def test_a_command_has_its_own_options_and_the_shared_ones() -> None:
    parameters = inspect.signature(body).parameters
    assert set(parameters) == {"compiler", "count", *(field.name for field in fields(Session) if field.init)}
    assert parameters["model_dir"].default is inspect.Parameter.empty and parameters["batch"].default == 8
    app = typer.Typer(rich_markup_mode=None)
    app.command()(body)
    with pytest.raises(SystemExit) as stopped:
        app(["folder", "--count", "x"])
    assert stopped.value.code == 2


def test_json_is_alone_on_stdout_and_the_rest_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    call(body, compiler=Compiler.eager, count=3, as_json=True)
    out, err = capfd.readouterr()
    assert json.loads(out) == {"compiler": "eager", "count": 3, "batch": 8}
    assert "a line on stdout" in err and "a note" in err and "a result" not in err
    assert "fxfusion: warning: look out\n" in err and "second line" not in err


def test_without_json_results_are_on_stdout_and_notes_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    call(body, compiler=Compiler.eager, count=3)
    out, err = capfd.readouterr()
    assert "a line on stdout" in out and "a result" in out and "a note" not in out and "a note" in err


def test_warnings_look_as_before_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    call(body, compiler=Compiler.eager, count=3)
    assert warnings.showwarning is before


def test_ctrl_c_says_how_to_go_on() -> None:
    @command
    def interrupted(run: Session) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(FxFusionError, match="interrupted; what was measured is in fxfusion_results: the same command"):
        call(interrupted)


def test_ctrl_c_anywhere_else_is_exit_code_1(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def app() -> None:
        raise SystemExit(130)  # what typer makes of it

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and capfd.readouterr().err == "fxfusion: error: interrupted\n"


@pytest.mark.parametrize("code", [0, 2, 3])
def test_other_exit_codes_pass(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(cli, "app", lambda: sys.exit(code))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code


def test_cells_that_look_like_markup_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().table(("name", "interval"), [("[bold]x[/]", "[1.00, 2.00]")])
    out = capsys.readouterr().out
    assert "[bold]x[/]" in out and "[1.00, 2.00]" in out


def test_the_steps_are_told_in_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.step(1, "A title [not markup]"[:7], "options={'plan': [4]}")
    screen.verdict(False, "x")
    with screen.busy("working"):
        screen.table(("", "ms"), [("fused", 1.5)])
    out = capsys.readouterr().out
    assert "1. A title" in out and "options={'plan': [4]}" in out and "FAIL  x" in out
    assert "(working ...)" in out and "fused" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("drop: 9 attention layers are to go", "--drop: 9 attention layers are to go"),
        ("max_kl: name it, such as max_kl=0.5", "--max-kl: name it, such as --max-kl 0.5"),
        ('use method="loss" or greedy=True', "use --method loss or --greedy"),
        ("choose by suffixes=", "choose by suffixes="),
        ("/tmp/max_kl/plan.yaml: we drop it", "/tmp/max_kl/plan.yaml: we drop it"),
    ],
)
def test_what_functions_refuse_is_told_in_options(text: str, shown: str) -> None:
    names = {"drop": "--drop", "max_kl": "--max-kl", "method": "--method", "greedy": "--greedy"}
    assert in_options(text, names) == shown
