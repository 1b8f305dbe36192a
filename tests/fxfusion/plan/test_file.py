"""Plan files: what is written comes back, and what is wrong is named with file, line and field."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxfusion import FusionPlan
from fxfusion.errors import PlanError
from fxfusion.files import RECORD
from fxfusion.plan import file
from fxfusion.plan.fusion_plan import LayerScore, MadeBy, ModelFacts, ResidueFile, Scores, Versions

FULL = FusionPlan(
    groups=[[4, 5, 6], ["model.layers.8.mlp", "model.layers.9.mlp"]],
    dropped_attention=[4, 5, 6, 8, 9],
    norm="last",
    model=ModelFacts(architecture="Decoder", layers=12, hidden=256, vocabulary=4096, fingerprint="1e5", weights="0x1f"),
    scores=Scores(
        method="cosine",
        values=(LayerScore(layer=4, value=0.0123456789, error=1.5e-5), LayerScore(layer=5, value=2e-7)),
    ),
    made_by=MadeBy(command="fxfusion plan --drop 5", date="2026-01-02", seed=0, versions=Versions(torch="2.13.0")),
    residue=ResidueFile(file="fxfusion_residue.st", sha256="0123456789abcdef" * 4),
)


def load(folder: Path, text: str | bytes, name: str = "plan.yaml") -> FusionPlan:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return FusionPlan.load(path)


def error_of(folder: Path, text: str | bytes, name: str = "plan.yaml") -> str:
    """The message of the error, without the folder."""
    with pytest.raises(PlanError) as found:
        load(folder, text, name)
    return str(found.value).replace(f"{folder}{os.sep}", "")


# --- there and back -----------------------------------------------------------------------------------

texts = st.text(max_size=12) | st.sampled_from(
    ["1e5", "010", "1:30", "0x1", "yes", "~", "null", "2026-01-02", "<<", "=", "-"]
)
layers = st.integers(0, 40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plans = st.builds(
    FusionPlan,
    groups=st.lists(layers | texts.filter(bool), unique=True, max_size=12).map(
        lambda members: [members[at : at + 3] for at in range(0, len(members) - 2, 3)]
    ),
    hoist=st.booleans(),
    dropped_attention=st.lists(layers, unique=True, max_size=6),
    norm=st.sampled_from(["fold", "last"]),
    model=st.none()
    | st.builds(
        ModelFacts,
        architecture=texts,
        layers=st.integers(41, 99),
        hidden=st.none() | st.integers(1, 2**40),
        vocabulary=st.none() | st.integers(1, 2**40),
        fingerprint=st.none() | texts,
        weights=st.none() | texts,
    ),
    scores=st.none()
    | st.builds(
        Scores,
        method=texts,
        values=st.lists(
            st.builds(LayerScore, layer=layers, value=numbers, error=st.none() | numbers),
            unique_by=lambda score: score.layer,
            max_size=4,
        ),
    ),
    made_by=st.none()
    | st.builds(
        MadeBy,
        command=st.none() | texts,
        date=st.none() | texts,
        seed=st.none() | st.integers(-(2**59), 2**59),
        versions=st.none() | st.builds(Versions, torch=st.none() | texts),
    ),
    residue=st.none()
    | st.builds(ResidueFile, file=texts.filter(bool), sha256=st.text("0123456789abcdef", min_size=64, max_size=64)),
)


@settings(deadline=None, max_examples=150)
@example(FULL)
@example(FusionPlan(made_by={"command": "\x85", "date": "a\u2028 b"}))
@example(FusionPlan(groups=[[7, "a.b", 5]], made_by={"command": "a\nb\t\x7f\x85\u2028\ufeff\ud800 \U0001f600 # x: y"}))
@given(plans)
def test_what_is_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, plan: FusionPlan) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name in ("there.yaml", "there.json"):
        plan.save(folder / name)
        assert FusionPlan.load(folder / name) == plan


def test_another_plan_is_not_what_comes_back(tmp_path: Path) -> None:
    FULL.save(tmp_path / "plan.yaml")
    assert FusionPlan.load(tmp_path / "plan.yaml") != FULL.replace(norm="fold")


def test_the_file_reads_well(tmp_path: Path) -> None:
    FULL.save(tmp_path / "plan.yaml")
    lines = (tmp_path / "plan.yaml").read_text("utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert lines[: len(comments)] == comments and max(map(len, lines)) <= 112
    assert all(any(line.startswith(f"#   {name}: ") for line in comments) for name in FusionPlan.model_fields)
    assert lines[len(comments) :] == [
        "version: 1",
        "groups:",
        "- [4, 5, 6]",
        "- [model.layers.8.mlp, model.layers.9.mlp]",
        "dropped_attention: [4, 5, 6, 8, 9]",
        "norm: last",
        "model:",
        "  architecture: Decoder",
        "  layers: 12",
        "  hidden: 256",
        "  vocabulary: 4096",
        "  fingerprint: '1e5'",
        "  weights: '0x1f'",
        "scores:",
        "  method: cosine",
        "  values:",
        "  - {layer: 4, value: 0.0123457, error: 1.5e-05}",
        "  - {layer: 5, value: 2.0e-07}",
        "made_by:",
        "  command: fxfusion plan --drop 5",
        "  date: '2026-01-02'",
        "  seed: 0",
        "  versions:",
        "    torch: 2.13.0",
        "residue:",
        "  file: fxfusion_residue.st",
        f"  sha256: {'0123456789abcdef' * 4}",
    ]


def test_any_yaml_reader_understands_the_file(tmp_path: Path) -> None:
    FULL.save(tmp_path / "plan.yaml")
    FULL.save(tmp_path / "plan.json")
    expected = FULL.to_dict()
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text("utf-8")) == expected
    assert json.loads((tmp_path / "plan.json").read_text("utf-8")) == expected


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("groups: [[1, 2]]", FusionPlan(groups=[[1, 2]])),
        ("{}", FusionPlan()),
        ("groups:\n  -\n    - 1\n    - 2\nnorm: last # a comment\n", FusionPlan(groups=[[1, 2]], norm="last")),
        ("\ufeffgroups: [[1, 2]]\r\nnorm: last\r\n", FusionPlan(groups=[[1, 2]], norm="last")),
        ("made_by: {date: 2026-01-02}", FusionPlan(made_by={"date": "2026-01-02"})),
        (
            "scores: {method: kl, values: [{layer: 1, value: 1e-5}, {layer: 2, value: -1}, {layer: 3, value: +.5}]}",
            FusionPlan(
                scores={
                    "method": "kl",
                    "values": [{"layer": 1, "value": 1e-5}, {"layer": 2, "value": -1}, {"layer": 3, "value": 0.5}],
                }
            ),
        ),
    ],
)
def test_what_a_hand_may_write(tmp_path: Path, text: str, plan: FusionPlan) -> None:
    assert load(tmp_path, text) == plan


def test_json_of_other_writers(tmp_path: Path) -> None:
    """Escapes of characters beyond 16 bits, and of what YAML does not print."""
    plan = FusionPlan(made_by={"command": "\U0001f600 \x7f \ud800/"})
    text = json.dumps(plan.to_dict()).replace("/", "\\/")
    assert "\\ud83d" in text and "\\/" in text
    assert load(tmp_path, text, "plan.json") == plan
    assert load(tmp_path, text, "plan.yaml") == plan


def test_json_with_tabs(tmp_path: Path) -> None:
    text = json.dumps({"groups": [[1, 2]], "made_by": {"command": "a\tb"}}, indent="\t")
    assert load(tmp_path, text, "plan.json") == FusionPlan(groups=[[1, 2]], made_by={"command": "a\tb"})
    assert "cannot start any token" in error_of(tmp_path, text, "plan.yaml")


# --- what is wrong, and where -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "norm: last\ngroups:\n- [3, 4]\n- [4, 5]\n",
            "plan.yaml:4: groups[1]: layer 4 is in group 0 and again in group 1",
        ),
        ("norm: last\n\ngroups:\n- [3,\n   x.1,\n   -2]\n", "plan.yaml:6: groups[0][2]: layer -2 is negative"),
        ("groups:\n- [1, 2]\n- [4, 3]\n", "plan.yaml:3: groups[1]: the layers [4, 3] are not in increasing order"),
        ("groups:\n- [4, a.b, 3]\n", "plan.yaml:2: groups[0]: the layers [4, 3] are not in increasing order"),
        ("groups:\n- [4]\n", "plan.yaml:2: groups[0]: group 0 has 1 member; a group needs at least two"),
        ("groups:\n\n  3\n", "plan.yaml:1: groups: expected a list, got 3"),
        (
            "groups: [[1, 2.0]]",
            "plan.yaml:1: groups[0][1]: a member is a layer number or the module path of an FFN, got 2.0",
        ),
        (
            "groups: [[yes, 2]]",
            "plan.yaml:1: groups[0][0]: a member is a layer number or the module path of an FFN, got True",
        ),
        ("\ndropped_attention:\n- 1\n- 2\n- 1\n", "plan.yaml:5: dropped_attention[2]: layer 1 is named twice"),
        ("dropped_attention: [-1]", "plan.yaml:1: dropped_attention[0]: layer -1 is negative"),
        ("# x\n\nnorm: first\n", "plan.yaml:3: norm: Input should be 'fold' or 'last', got 'first'"),
        (
            "groups: []\ngrups: []\n",
            "plan.yaml:2: grups: unknown field 'grups' (known: groups, dropped_attention, removed, norm,",
        ),
        (
            "model:\n  architecture: A\n  layers: 4\ngroups:\n- [2, 3]\n- [3, 4]\ndropped_attention: [9]",
            "plan.yaml:6: groups[1]: layer 3 is in group 0 and again in group 1",
        ),
        (
            "model:\n  architecture: A\n  layers: 4\ngroups:\n- [2, 3]\ndropped_attention:\n- 1\n- 4\n",
            "plan.yaml:8: dropped_attention[1]: layer 4 does not exist: the model has 4 layers, counted from 0",
        ),
        ("norm: last\nmodel:\n  layers: 4\n", "plan.yaml:2: model.architecture: is missing"),
        (
            "model:\n  architecture: A\n  layers: four\n",
            "plan.yaml:3: model.layers: expected a whole number, got 'four'",
        ),
        (
            "scores:\n  method: kl\n  values:\n  - {layer: 1,\n     value: .inf}",
            "plan.yaml:5: scores.values[0].value: write the",
        ),
        (
            "scores:\n  method: kl\n  values: [{layer: 1, value: 1e999}]",
            "plan.yaml:3: scores.values[0].value: expected a finite",
        ),
        (
            "groups: [[1, 2]]\nversion: 2\nmore: 3",
            "plan.yaml:2: version: this plan has format 2, newer than this fxfusion",
        ),
        ("version: 1.0", "plan.yaml:1: version: expected 1, got 1.0"),
        ("norm: last\nnorm: fold\n", "plan.yaml:2: norm: the field was given before, in line 1"),
        ("model:\n  layers: 3\n  layers: 3\n", "plan.yaml:3: model.layers: the field was given before, in line 2"),
        ("1: 2", "plan.yaml:1: the name of a field must be text"),
        ("model: {[1]: 2}", "plan.yaml:1: model: the name of a field must be text"),
        ("<<: {norm: last}", "plan.yaml:1: the name of a field must be text"),
        ("- [1, 2]\n- [3, 4]\n", "plan.yaml:1: a plan is fields with values (name: value): groups,"),
        ("paper", "plan.yaml:1: a plan is fields with values"),
        ("groups: [[1, 2]\nnorm: last", "plan.yaml:2: not valid YAML: "),
        ("groups:\n\t- [1, 2]", "plan.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("norm: last\n---\nnorm: fold\n", "plan.yaml:2: not valid YAML: but found another document"),
        ("norm: last\ngroups: &a [[1, 2]]", "plan.yaml:2: anchors (&) and aliases (*) are not allowed"),
        ("norm: last\n\nmodel: *a", "plan.yaml:3: anchors (&) and aliases (*) are not allowed"),
        (
            "norm: !!python/object/apply:os.getcwd []",
            "plan.yaml:1: norm: the tag tag:yaml.org,2002:python/object/apply",
        ),
        ("groups: !!set {a, b}", "plan.yaml:1: groups: the tag tag:yaml.org,2002:set has no place here"),
        ("norm: !!binary aGk=", "plan.yaml:1: norm: the tag tag:yaml.org,2002:binary has no place here"),
        ("norm: !!bool maybe", "plan.yaml:1: norm: the tag tag:yaml.org,2002:bool has no place here"),
        ("groups: [[010, 11]]", "plan.yaml:1: groups[0][0]: write the number '010' in plain decimal"),
        ("groups: [[1:30, 91]]", "plan.yaml:1: groups[0][0]: write the number '1:30' in plain decimal"),
        ("groups: [[1, 9999999999999999999999]]", "plan.yaml:1: groups[0][1]: write the number"),
        ("", "plan.yaml: the file is empty"),
        ("# only a comment\n", "plan.yaml: the file is empty"),
        (b"\x80\x02}q\x00.", "plan.yaml: not a text file (UTF-8)"),
        (b"norm: last\n\x00\x01", "plan.yaml:2: not a text file: character 0 in it"),
        ("[" * 50, f"plan.yaml:1: nested more than {file.MAX_DEPTH} levels deep"),
        ("\n".join(f"x{at}: 1" for at in range(file.MAX_VALUES)), "plan.yaml:10000: more than 20000 values"),
        ("#" * (file.MAX_BYTES + 1), f"plan.yaml: larger than {file.MAX_BYTES} bytes"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert error_of(tmp_path, text).startswith(message)


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    assert error_of(tmp_path, "norm: x\nfoo: 1\ngroups: 3\n").splitlines() == [
        "plan.yaml:3: groups: expected a list, got 3",
        "plan.yaml:1: norm: Input should be 'fold' or 'last', got 'x'",
        "plan.yaml:2: foo: unknown field 'foo' "
        "(known: groups, dropped_attention, removed, norm, version, model, scores, refit, quality, made_by, "
        "residue, hoist)",
    ]


def test_aliases_cannot_blow_up(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{one}: &{one} [*{other}, *{other}]\n" for one, other in zip("bcdefg", "abcdef", strict=True)
    )
    assert yaml.safe_load(bomb)["b"] == [["x", "x"]] * 2, "the bomb is no bomb"
    assert error_of(tmp_path, bomb) == "plan.yaml:1: anchors (&) and aliases (*) are not allowed"


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "gone.yaml", "gone.yaml: cannot be read: No such file or directory"),
        ("a\x00b.yaml", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(PlanError, match=message):
            FusionPlan.load(path)
    if os.geteuid() != 0:
        FULL.save(tmp_path / "plan.yaml")
        (tmp_path / "plan.yaml").chmod(0)
        with pytest.raises(PlanError, match="cannot be read: Permission denied"):
            FusionPlan.load(tmp_path / "plan.yaml")


def test_the_largest_plan_that_is_read(tmp_path: Path) -> None:
    """A plan of a model of 1,000 layers is far below the limits."""
    scores = [{"layer": layer, "value": 0.123456, "error": 0.012345} for layer in range(1000)]
    groups = [[layer, layer + 1] for layer in range(0, 1000, 2)]
    plan = FusionPlan(groups=groups, dropped_attention=range(1000), scores={"method": "kl", "values": scores})
    plan.save(tmp_path / "plan.yaml")
    assert FusionPlan.load(tmp_path / "plan.yaml") == plan


# --- one piece or nothing -----------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Inside, writing more fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a matter of POSIX")
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    old = FusionPlan(groups=[[1, 2]])
    old.save(path)
    with (
        files_no_larger_than(100),
        pytest.raises(PlanError, match=r"plan.yaml: cannot be written \(nothing was changed"),
    ):
        FULL.save(path)
    assert FusionPlan.load(path) == old
    assert sorted(os.listdir(tmp_path)) == [RECORD, "plan.yaml"]
    FULL.save(path)
    assert FusionPlan.load(path) == FULL


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_stop_on_the_way_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "plan.yaml"
    old = FusionPlan(groups=[[1, 2]])
    old.save(path)
    before: list[FusionPlan] = []

    def stop(*_: Any) -> None:
        before.append(FusionPlan.load(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, stop)
    with pytest.raises(KeyboardInterrupt):
        FULL.save(path)
    assert before == [old] and FusionPlan.load(path) == old
    assert sorted(os.listdir(tmp_path)) == [RECORD, "plan.yaml"]


def test_saving_where_nothing_can_be_saved(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="cannot be written"):
        FULL.save(tmp_path / "file" / "plan.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(PlanError, match="folder.yaml is a folder: name a file"):
        FULL.save(tmp_path / "folder.yaml")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.yaml"]


@pytest.mark.skipif(sys.platform == "win32", reason="links and modes are a matter of POSIX")
def test_a_link_stays_a_link_and_a_mode_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    link.symlink_to(real)
    FULL.save(link)
    real.chmod(0o640)
    FusionPlan().save(link)
    assert link.is_symlink() and FusionPlan.load(real) == FusionPlan()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    FULL.save(tmp_path / "plan.yaml")
    (tmp_path / "other").touch()
    assert (tmp_path / "plan.yaml").stat().st_mode == (tmp_path / "other").stat().st_mode
