"""`--help` of every command answers at once: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fxfusion

CHOOSING = ("score", "matrix", "plan", "explain", "eval", "sweep", "compare", "report", "simulate")
KEEPING = ("fuse", "refit", "recover", "unfuse", "export", "check", "generate")
COMMANDS = ("auto", *CHOOSING, *KEEPING)
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
    assert loaded_by("import fxfusion.cli") == "[]"
    assert loaded_by("import fxfusion.cli.inputs") != "[]"


def test_every_command_is_there_with_a_sentence() -> None:
    done = subprocess.run([sys.executable, "-m", "fxfusion", "--help"], check=True, capture_output=True, text=True)
    shown = done.stdout.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in shown if line.strip()] == list(COMMANDS)
    assert not [line for line in shown if line.rstrip().endswith("...")]


MEASURE = ["MODEL", "--text", "TEXT"]
REFUSED = [  # at once: without torch, which takes seconds to load
    ["score", "MODEL"],
    ["score", "MODEL", "--text", "none.txt"],
    ["score", "nowhere", "--text", "TEXT"],
    ["score", *MEASURE, "--method", "magic"],
    ["matrix", *MEASURE, "--drop-attention", "4-2"],
    ["plan", *MEASURE, "--drop", "many"],
    ["plan", *MEASURE, "--drop", "1", "--drop-attention", "1"],
    ["plan", *MEASURE, "--max-bytes", "5X"],
    ["plan", *MEASURE, "--max-perplexity-increase", "-5%"],
    ["plan", *MEASURE, "--splits", "2"],
    ["plan", *MEASURE, "--preset", "paper", "--max-kl", "1"],
    ["plan", *MEASURE, "--roads", "up"],
    ["plan", *MEASURE, "--roads", "hoist"],
    ["plan", *MEASURE, "--after-refit"],
    ["plan", *MEASURE, "--automatic", "--drop", "2"],
    ["plan", *MEASURE, "--automatic", "--hardware", "abacus"],
    ["plan", *MEASURE, "--output", "TEXT", "--overwrite"],
    ["sweep", *MEASURE, "--drops", "two"],
    ["sweep", *MEASURE, "--tp", "8"],
    ["sweep", *MEASURE, "--hardware", "abacus"],
    ["eval", *MEASURE, "--speed"],
    ["eval", *MEASURE, "--plan", "gone.yaml"],
    ["eval", *MEASURE, "--baseline", "nowhere"],
    ["auto", *MEASURE],
    ["auto", *MEASURE, "--output", "MODEL"],
    ["fuse", "MODEL", "--output", "new"],
    ["fuse", "MODEL", "--output", "new", "--plan", "gone.yaml"],
    ["export", "nowhere", "--output", "new"],
    ["export", "MODEL", "--output", "MODEL"],
    ["unfuse", "MODEL", "--output", "MODEL"],
    ["refit", *MEASURE, "--plan", "gone.yaml", "--output", "new"],
    ["recover", *MEASURE, "--reference", "nowhere", "--output", "new"],
    ["check", "nowhere"],
    ["generate", "MODEL"],
    ["generate", "MODEL", "--prompt", "3", "--cache", "paged"],
    ["explain", "MODEL", "--groups", "4-x"],
    ["explain", "MODEL", "--policy", "biggest"],
    ["simulate", "llama-3.3-70b", "--hardware", "abacus"],
    ["report", "--results", "nowhere"],
]
RUN_ALL = """
import json, sys
from fxfusion.cli import main

codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["fxfusion", *words]
    try:
        main()
    except SystemExit as stop:
        codes.append((words, stop.code, "torch" in sys.modules))
print(json.dumps([found for found in codes if found[1] not in (1, 2) or found[2]]))
"""


def test_what_cannot_be_is_refused_before_torch_is_loaded(model: Path, text: Path, tmp_path: Path) -> None:
    names = {"MODEL": str(model), "TEXT": str(text)}
    lines = [[names.get(word, word) for word in words] for words in REFUSED]
    command = [sys.executable, "-c", RUN_ALL, json.dumps(lines)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout) == [] and len(done.stderr.splitlines()) >= len(REFUSED)
    assert not list(tmp_path.iterdir())


def test_other_libraries_say_nothing_about_themselves(model: Path, text: Path, tmp_path: Path) -> None:
    words = ["score", str(model), "--text", str(text), "--length", "16", "--sequences", "24", "--dry-run"]
    words += ["--results", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "fxfusion", *words], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("dry run: ") and done.stderr == "(reading the text ...)\n"


def test_the_version_is_said() -> None:
    done = subprocess.run([sys.executable, "-m", "fxfusion", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"fxfusion {fxfusion.__version__}\n"
