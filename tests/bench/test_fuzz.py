"""Random programs: the ways to change weights all change them, failures are kept, a stopped run goes on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import fuzz
from bench.fuzz import TRANSFORMS, WRITES, check_compiled, check_with_effects, main, run_block
from bench.record import Record
from fxfusion.testing import Effect, Ffn, Stack, StackSpec
from fxfusion.testing.checks import relative_error

PAIR = StackSpec(blocks=(Ffn(), Ffn(width=4)), seed=3)
WITH_MEMORY = StackSpec(blocks=(Ffn(), Effect(kind="custom_count"), Ffn(width=4), Effect(kind="copy_cache")), seed=3)


@pytest.mark.parametrize("name", sorted(WRITES))
def test_every_write_changes_the_output_and_leaves_the_memory(name: str) -> None:
    model = Stack(WITH_MEMORY)
    x = model.example()
    with torch.no_grad():
        before = model(x)[0]
        memory = {name: value.clone() for name, value in model.named_buffers()}
        fuzz._apply(WRITES[name], model)
        assert all(torch.equal(value, memory[name]) for name, value in model.named_buffers())
        assert relative_error(model(x)[0], before) > 1e-3


@pytest.mark.parametrize("name", sorted(WRITES))
def test_every_write_is_seen_by_the_next_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "WRITES", {name: WRITES[name], "another": WRITES["add_"]})
    assert check_compiled(WITH_MEMORY, 24) == 1


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_transforms_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "TRANSFORMS", {name: TRANSFORMS[name]})
    assert check_compiled(PAIR, 24) == (0 if name == "vmap" else 1)


def test_a_stale_weight_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_once = torch.compile

    def stale(model: Stack, **options: object) -> object:
        other = Stack(model.given)
        return compiled_once(other, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", stale)
    with pytest.raises(AssertionError, match="after .*: outcome . is off by"):
        check_compiled(PAIR.__class__(blocks=(*PAIR.blocks, Effect()), seed=3), 24)


def test_every_25th_program_is_compiled() -> None:
    counts: Counter[str] = Counter()
    for number in (23, 24, 49):
        check_with_effects(WITH_MEMORY, number, counts)
    assert (counts["compiled"], counts["transforms of functorch"]) == (2, 1)


def test_failures_are_kept_with_their_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> int:
        raise AssertionError("output 0 is off by 1")

    monkeypatch.setattr(fuzz, "check_effects", wrong)
    failures = run_block(0, 7, 5, Counter())
    assert len(failures) == 5
    assert failures[0]["error"] == "AssertionError: output 0 is off by 1"
    assert failures[0]["shrunken"].startswith("StackSpec(") and failures[1]["spec"].startswith("StackSpec(")


@pytest.mark.parametrize("more", [[], ["--without-effects"]])
def test_a_run_goes_on_where_it_was_stopped(more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "BLOCK", 3)
    out = tmp_path / "fuzz.json"
    for graphs in (3, 6):
        monkeypatch.setattr("sys.argv", ["fuzz", "--graphs", str(graphs), "--out", str(out), *more])
        assert main() == 0
        found = Record.read(out)
        assert found.results["counts"]["graphs"] == graphs and found.complete
    assert found.results["blocks_done"] == 2
    assert found.benchmark == ("fuzz_without_effects" if more else "fuzz")
