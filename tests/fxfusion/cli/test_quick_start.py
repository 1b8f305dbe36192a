"""`--help` of every command answers at once: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

CHOOSING = ("score", "matrix", "plan", "explain", "eval", "sweep", "report", "simulate")
KEEPING = ("fuse", "refit", "recover", "unfuse", "export", "check", "generate")
COMMANDS = ("auto", *CHOOSING, *KEEPING, "demo")
HEAVY = ("torch", "transformers", "networkx", "jinja2", "tabulate", "pydantic", "matplotlib", "yaml")
LIMIT = 0.5  # seconds
HELP = "import sys; sys.argv = ['fxfusion', *{words}]\nfrom fxfusion.cli import main\nmain()"


def processor_seconds(statement: str) -> float:
    """User and system time of a fresh interpreter: unlike wall time, it does not depend on what else runs."""
    command = [sys.executable, "-c", statement]
    code = (
        f"import resource, subprocess\nsubprocess.run({command!r}, check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\nprint(used.ru_utime + used.ru_stime)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=["all", *COMMANDS])
def test_help_is_quick(words: list[str]) -> None:
    statement = HELP.format(words=[*words, "--help"])
    found = []
    while len(found) < 3 and min(found, default=LIMIT) >= LIMIT:  # the best of three: the first may read the disk
        found.append(processor_seconds(statement))
    assert min(found) < LIMIT


def test_a_slow_start_would_be_seen() -> None:
    started = time.perf_counter()
    assert processor_seconds("import torch") > LIMIT, f"torch loads in {time.perf_counter() - started:.2f} s"


def loaded_by(statement: str) -> str:
    code = f"import sys\n{statement}\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_command_line_loads_nothing_heavy() -> None:
    modules = ", ".join(f"fxfusion.cli.{name}" for name in COMMANDS)
    assert loaded_by(f"import fxfusion.cli, {modules}") == "[]"
    assert loaded_by("import fxfusion.cli.collect") != "[]"


def test_every_command_is_there_with_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-m", "fxfusion.cli", "--help"], check=True, capture_output=True, text=True)
    shown = done.stdout.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in shown if line.strip()] == list(COMMANDS)
    assert not [line for line in shown if line.rstrip().endswith("...")]
