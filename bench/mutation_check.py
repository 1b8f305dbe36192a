"""Take each guard of the matcher away, one at a time, and see whether a test notices.

    python -m bench.mutation_check --out bench/results/mutation_check.json

A guard is a `raise Refused(...)` (becomes `pass`), a returned refusal (becomes `return None`), or, in the
normalising passes, an early `return None`, `return False` or `continue` that keeps a pass from acting
(becomes its opposite, or goes). Each mutant is a copy of the source tree in a temporary folder; the fast
tests named below run on it until one fails. A survivor is a guard that no test needs.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch._dynamo  # noqa: F401 (imported once, before the tests fork)

ROOT = Path(__file__).parent.parent
MATCHERS = (
    "passes/match_residual.py",
    "passes/match_ffn.py",
    "passes/match_pieces.py",
    "passes/match_linear.py",
    "passes/match_tail.py",
    "passes/check_group.py",
    "passes/find_chains.py",
    "passes/plan_groups.py",
    "fxfusion/graph/token_wise.py",
)
NORMALISERS = ("passes/drop_no_ops.py", "passes/drop_zero_branches.py", "passes/functionalise_adds.py")
TESTS = ("tests/test_look_alikes.py", "tests/passes")
# Guards that no test can kill, because an earlier one refuses every such branch. They stay: each states
# what the code after it relies on.
REDUNDANT = {
    "a projection's output is also normalised input": "a linear layer behind another was refused with linear_count",
    "wide, the stream is not": "sum, branch and stream have one shape, and the tail keeps the channel axis",
}
REFUSALS = ("Refused", "_refuse", "_refusal")


@dataclass(frozen=True)
class Guard:
    """One guard: where it stands, the line, what becomes of it, and its refusal code where it names one."""

    file: str
    line: int
    text: str
    becomes: str
    code: str = ""

    @property
    def likely(self) -> str:
        """The tests that should notice, as an expression for `pytest -k`."""
        own = f"test_{Path(self.file).stem}"
        return f"{own} or {self.code.lower()}" if self.code else own


def guards() -> Iterator[Guard]:
    """Every guard of the listed files, in order."""
    for file in (*MATCHERS, *NORMALISERS):
        source = (ROOT / file).read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            becomes = _mutation(node, file)
            if becomes is not None:
                assert isinstance(node, ast.stmt)
                yield Guard(file, node.lineno, lines[node.lineno - 1].strip(), becomes, _code(node))


def _mutation(node: ast.AST, file: str) -> str | None:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _called(node.exc) in REFUSALS:
        return "pass"
    if isinstance(node, ast.Return) and file in MATCHERS and node.value is not None:
        if isinstance(node.value, ast.Call) and _called(node.value) == "Refused":
            return "return None"
        if isinstance(node.value, ast.Tuple) and "RefusalCode" in ast.dump(node.value):
            return "return None"
    if file in NORMALISERS:
        if isinstance(node, ast.Continue):
            return "pass"
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and node.value.value is False:
            return "return True"
    return None


def _code(node: ast.AST) -> str:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name) and inner.value.id == "RefusalCode":
            return inner.attr
    return ""


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def mutate(tree: Path, guard: Guard) -> None:
    """Replace the guard's statement in a copy of the tree. Lines keep their numbers."""
    path = tree / guard.file
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.stmt) and node.lineno == guard.line and _mutation(node, guard.file) is not None:
            assert node.end_lineno is not None
            indent = " " * node.col_offset
            lines[node.lineno - 1 : node.end_lineno] = [indent + guard.becomes] + [""] * (node.end_lineno - node.lineno)
            break
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def copy_tree(into: Path) -> Path:
    """The parts of the repository that the tests need."""
    for name in ("fxfusion", "passes", "tests", "bench"):
        shutil.copytree(
            ROOT / name,
            into / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "results", "*.safetensors"),
        )
    shutil.copy(ROOT / "pyproject.toml", into)
    return into


class _Failures:
    """A pytest plugin that remembers which tests failed."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def run_tests(tree: Path, *flags: str) -> list[str]:
    """The tests that failed. In a forked process: torch is imported once for all."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(tree, flags, sender))
    process.start()
    sender.close()
    try:
        failed: list[str] = receiver.recv()
    except EOFError:
        failed = ["the process died"]
    process.join()
    return failed


def _run_in_child(tree: Path, flags: tuple[str, ...], sender: Connection) -> None:
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("fxfusion", "tests", "bench")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    failures = _Failures()
    quiet = ["-q", "-p", "no:cacheprovider", "--tb=no", "--no-header", "--no-summary", "--show-capture=no"]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        tests = [test for test in TESTS if (tree / test).exists()]
        pytest.main([*quiet, "-m", "not slow and not compile", *flags, *tests], plugins=[failures])
    sender.send(failures.names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/mutation_check.json")
    parser.add_argument("--only", default="", help="a part of file:line, to check some guards only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [guard for guard in guards() if options.only in f"{guard.file}:{guard.line}"]
    known = _known(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        clean = copy_tree(Path(scratch))
        broken = run_tests(clean)
        if broken:
            print(f"left out, since they fail without any mutation: {broken}", file=sys.stderr)
        for number, guard in enumerate(found):
            key = f"{guard.file}:{guard.line}: {guard.text}"
            if key not in known or options.only or not known[key]["killed"]:
                known[key] = _check(clean, guard, broken)
                _save(options.out, known)
            word = "killed  " if known[key]["killed"] else "SURVIVED"
            print(f"{number + 1}/{len(found)} {word} {key}", flush=True)
    survivors = [key for key, result in known.items() if not (result["killed"] or _why_redundant(key))]
    print(f"{sum(bool(result['killed']) for result in known.values())} killed, {len(survivors)} survived")
    return 1 if survivors else 0


def _check(clean: Path, guard: Guard, broken: list[str]) -> dict[str, object]:
    original = (clean / guard.file).read_text(encoding="utf-8")
    start = time.perf_counter()
    try:
        mutate(clean, guard)
        skipped = [f"--deselect={name}" for name in broken]
        failed = run_tests(clean, "-x", "-k", guard.likely, *skipped) or run_tests(clean, "-x", *skipped)
    finally:
        (clean / guard.file).write_text(original, encoding="utf-8")
    return {**asdict(guard), "killed": bool(failed), "by": failed[:1], "seconds": round(time.perf_counter() - start, 1)}


def _known(path: Path) -> dict[str, dict[str, object]]:
    """Results of an earlier run of the same guards, by place and text."""
    if not path.exists():
        return {}
    present = {f"{guard.file}:{guard.line}: {guard.text}" for guard in guards()}
    earlier = json.loads(path.read_text(encoding="utf-8"))["guards"]
    return {key: value for key, value in earlier.items() if key in present}


def _why_redundant(key: str) -> str:
    return next((reason for text, reason in REDUNDANT.items() if text in key), "")


def _save(path: Path, known: dict[str, dict[str, object]]) -> None:
    killed = sum(bool(result["killed"]) for result in known.values())
    redundant = {key: _why_redundant(key) for key in known if not known[key]["killed"] and _why_redundant(key)}
    result = {
        "command": "python -m bench.mutation_check",
        "tests": list(TESTS),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "guards_in_the_tree": sum(1 for _ in guards()),
        "guards_checked": len(known),
        "killed": killed,
        "redundant": redundant,
        "survived": len(known) - killed - len(redundant),
        "guards": known,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
