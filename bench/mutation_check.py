"""Take each guard of the matcher and of the effects model away, one at a time, and see whether a test notices.

    python -m bench.mutation_check --out bench/results/mutation_check.json
    python -m bench.mutation_check --only passes/match_ffn.py --only check_group.py:43

A guard is one of these:

| in | statement | becomes |
|---|---|---|
| matchers | `raise Refused(...)` | `pass` |
| matchers | `return Refused(...)`, `return RefusalCode..., words` | `return None` |
| all | `return None` behind an `if`: no linear layer, no cut, no step, nothing to drop | `pass` |
| matchers | `return False` behind an `if` | `pass` |
| normalising passes | `return False` | `return True` |
| normalising passes | `continue` | `pass` |
| effects | `return Effect(...)` | `return NONE` |
| effects | `return _Known(...)` that denies something | the same, understood |
| effects | `yield from ...` (what is written), `self._join...(...)` (what shares memory) | `pass` |
| effects | `return True` behind an `if` | `pass` |
| effects | `return not any(...)` | `return True` |
| effects | another answer of a function that says yes or no | `return False` |

Each mutant is a copy of the source tree in a temporary folder; the fast tests named below run on it until
one fails. A survivor is a guard that no test needs. A guard that was killed before is not tried again while
its file and the tests are as they were.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import multiprocessing
import os
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

from bench.record import Record

ROOT = Path(__file__).parent.parent
MATCHERS = (
    "passes/match_residual.py",
    "passes/match_ffn.py",
    "passes/match_pieces.py",
    "passes/match_linear.py",
    "passes/kinds.py",
    "passes/middle_pointwise.py",
    "passes/middle_normed.py",
    "passes/end_folded.py",
    "passes/end_normed.py",
    "passes/prove_norm.py",
    "passes/check_group.py",
    "passes/find_chains.py",
    "passes/plan_groups.py",
    "fxfusion/graph/token_wise.py",
)
NORMALISERS = (
    "passes/drop_no_ops.py",
    "passes/drop_zero_branches.py",
    "passes/functionalise_adds.py",
    "passes/read_sizes_early.py",
    "passes/write_out.py",
)
EFFECTS = "fxfusion/graph/effects.py"
TESTS = (
    "tests/test_look_alikes.py",
    "tests/passes",
    "tests/fxfusion/graph/test_token_wise.py",
    "tests/fxfusion/graph/test_effects.py",
)
SHARED = ("tests/conftest.py", "tests/helpers.py", "tests/blocks.py", "tests/look_alikes.py")
EFFECTS_BECOME = {
    "Effect": "return NONE",
    "_Known": "return _Known(is_understood=True, is_registered=True)",
}
REFUSALS = ("Refused", "_refuse", "_refusal")


@dataclass(frozen=True)
class Guard:
    """One guard: where it stands, the line, what becomes of it, and its refusal code where it names one.

    `of` changes when the guard's file or a test does.
    """

    file: str
    line: int
    text: str
    becomes: str
    code: str
    of: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"

    @property
    def likely(self) -> str:
        """The tests that should notice, as an expression for `pytest -k`."""
        own = f"test_{Path(self.file).stem}"
        return f"{own} or {self.code.lower()}" if self.code else own


def guards() -> Iterator[Guard]:
    """Every guard of the listed files, in order."""
    tests = _tests_digest()
    for file in (*MATCHERS, *NORMALISERS, EFFECTS):
        source = (ROOT / file).read_text(encoding="utf-8")
        lines = source.splitlines()
        of = hashlib.sha256((source + tests).encode()).hexdigest()[:16]
        for node, becomes in _mutations(source, file):
            yield Guard(file, node.lineno, lines[node.lineno - 1].strip(), becomes, _code(node), of)


def _mutations(source: str, file: str) -> Iterator[tuple[ast.stmt, str]]:
    """Each guard's statement, and what it becomes."""
    tree = ast.parse(source)
    behind_if = {statement for node in ast.walk(tree) if isinstance(node, ast.If) for statement in node.body}
    answers = {statement for node in ast.walk(tree) if _answers(node) for statement in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            becomes = _mutation(node, file, node in behind_if, node in answers)
            if becomes is not None:
                yield node, becomes


def _mutation(node: ast.stmt, file: str, behind_if: bool, answers: bool) -> str | None:
    if file == EFFECTS:
        return _mutation_of_effects(node, behind_if, answers)
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _called(node.exc) in REFUSALS:
        return "pass"
    if isinstance(node, ast.Continue) and file in NORMALISERS:
        return "pass"
    if not isinstance(node, ast.Return) or node.value is None:
        return None
    if isinstance(node.value, ast.Constant):
        if node.value.value is False and file in NORMALISERS:
            return "return True"
        return "pass" if behind_if and (node.value.value is None or node.value.value is False) else None
    refuses = isinstance(node.value, ast.Call) and _called(node.value) == "Refused"
    refuses |= isinstance(node.value, ast.Tuple) and "RefusalCode" in ast.dump(node.value)
    return "return None" if refuses and file in MATCHERS else None


def _answers(node: ast.AST) -> bool:
    """Whether it is a function that answers yes or no."""
    return isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id == "bool"


def _mutation_of_effects(node: ast.stmt, behind_if: bool, answers: bool) -> str | None:
    value = getattr(node, "value", None)
    if isinstance(node, ast.Expr):
        joins = isinstance(value, ast.Call) and _called(value).startswith("_join")
        return "pass" if joins or isinstance(value, ast.YieldFrom) else None
    if not isinstance(node, ast.Return):
        return None
    if isinstance(value, ast.Call) and _called(value) in EFFECTS_BECOME:
        becomes = EFFECTS_BECOME[_called(value)]
        return None if ast.unparse(value) == "_Known(is_understood=True)" else becomes
    if isinstance(value, ast.Constant):
        return "pass" if behind_if and value.value is True else None
    if isinstance(value, ast.UnaryOp) and isinstance(value.operand, ast.Call) and _called(value.operand) == "any":
        return "return True"
    return "return False" if answers else None


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
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node, _ in _mutations(source, guard.file):
        if node.lineno == guard.line:
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
    parser.add_argument(
        "--only", action="append", default=[], help="a part of file:line, to check some guards only; may be repeated"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [
        guard
        for guard in guards()
        if not options.only or any(part in f"{guard.file}:{guard.line}" for part in options.only)
    ]
    known = _known(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        clean = copy_tree(Path(scratch))
        broken = run_tests(clean)
        if broken:
            print(f"left out, since they fail without any mutation: {broken}", file=sys.stderr)
        for number, guard in enumerate(found):
            key = guard.key
            if options.only or key not in known or not known[key]["killed"]:
                known[key] = _check(clean, guard, broken)
                _save(options.out, known, broken)
            word = "killed  " if known[key]["killed"] else "SURVIVED"
            print(f"{number + 1}/{len(found)} {word} {key}", flush=True)
    _save(options.out, known, broken)
    survived = sum(not result["killed"] for result in known.values())
    print(f"{len(known) - survived} killed, {survived} survived")
    return 1 if survived else 0


def _check(clean: Path, guard: Guard, broken: list[str]) -> dict[str, object]:
    original = (clean / guard.file).read_text(encoding="utf-8")
    start = time.perf_counter()
    try:
        mutate(clean, guard)
        skipped = [f"--deselect={name}" for name in broken]
        runs = (["-k", guard.likely], [], ["-m", "slow and not compile"])  # most are found by the first
        failed = next((found for more in runs if (found := run_tests(clean, "-x", *skipped, *more))), [])
    finally:
        (clean / guard.file).write_text(original, encoding="utf-8")
    return {**asdict(guard), "killed": bool(failed), "by": failed[:1], "seconds": round(time.perf_counter() - start, 1)}


def _known(path: Path) -> dict[str, dict[str, object]]:
    """Results of an earlier run of the same guards, by place and text, where guard and tests are as they were."""
    if not path.exists():
        return {}
    earlier = Record.read(path).results["guards"]
    return {guard.key: earlier[guard.key] for guard in guards() if earlier.get(guard.key, {}).get("of") == guard.of}


def _tests_digest() -> str:
    """A digest of the tests that run, and of what they share."""
    found = [path for name in (*TESTS, *SHARED) for path in [ROOT / name, *(ROOT / name).glob("**/*.py")]]
    files = {path for path in found if path.is_file()}
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _save(path: Path, known: dict[str, dict[str, object]], broken: list[str]) -> None:
    killed = sum(bool(result["killed"]) for result in known.values())
    result = {
        "tests": list(TESTS),
        "tests_left_out": broken,
        "guards_in_the_tree": sum(1 for _ in guards()),
        "guards_checked": len(known),
        "killed": killed,
        "survived": len(known) - killed,
        "guards": known,
    }
    Record.of("mutation_check", results=result).write(path)


if __name__ == "__main__":
    sys.exit(main())
