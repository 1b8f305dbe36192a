"""Other engines load what fxfusion writes, and say what the model in memory says. `make engines` runs these.

Each engine runs in a virtual environment of its own, where fxfusion is not installed.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fxfusion
from bench.engines import HOISTED, LIMIT, ROOT, SCRIPTS, Answer, Comparison, run_command, run_script, write_folders
from bench.reference import load_model, load_tokenizer
from fxfusion.checkpoints.companions import how_to_run

pytestmark = pytest.mark.engines


@dataclass(frozen=True)
class Run:
    """One start of an engine: the environment, the script, and the folders that it reads."""

    engine: str
    script: str
    folders: tuple[str, ...]
    options: dict[str, int] = field(default_factory=dict)


RUNS = {
    "mlx-lm": Run("mlx", "in_mlx.py", ("fused", "unfused", "damaged", "hoisted")),
    "older transformers": Run("vllm", "in_transformers.py", ("fused", "damaged", "hoisted")),
    "vllm": Run("vllm", "in_vllm.py", ("fused", "damaged", "hoisted")),
    # Processes of its own for each folder: no more than two, each takes half a minute.
    "vllm, tensor parallel": Run("vllm", "in_vllm.py", ("fused", "hoisted"), {"tensor_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    write_folders(folder)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def found(request: pytest.FixtureRequest, root: Path) -> dict[str, Answer]:
    """What one engine says about each of its folders."""
    run = RUNS[request.param]
    scratch = root / request.param.replace(" ", "-")
    scratch.mkdir()
    asked = scratch / "request.json"
    asked.write_text(json.dumps({**json.loads((root / "request.json").read_text("utf-8")), "options": run.options}))
    arguments = [asked, scratch, *(root / name for name in run.folders)]
    run_script(run.engine, run.script, arguments, scratch, timeout=400)
    return {name: Answer.read(scratch / name) for name in run.folders}


def test_what_is_fused_gives_our_text_and_our_numbers(found: dict[str, Answer], root: Path) -> None:
    for name in found.keys() - {"damaged"}:
        compared = Comparison.of(found[name], Answer.read(root / name))
        assert compared.same_prompts, "the tokenizer of the folder splits the prompts otherwise"
        assert compared.error <= LIMIT, name
        assert compared.same_tokens and compared.same_text, name
        assert compared.agrees


def test_a_fused_model_without_one_member_is_rejected(found: dict[str, Answer], root: Path) -> None:
    """A folder with one slice of the fused FFN set to zero; for every engine, another model's text and numbers."""
    fused, unfused = (Answer.read(root / name) for name in ("fused", "unfused"))
    pairs = [(found["fused"], unfused)] + ([(found["damaged"], fused)] if "damaged" in found else [])
    for one, other in pairs:
        compared = Comparison.of(one, other)
        assert compared.same_prompts
        assert compared.error > 100 * LIMIT
        assert not compared.same_tokens and not compared.same_text
        assert not compared.agrees


def test_the_documents_name_the_versions(found: dict[str, Answer]) -> None:
    facts = found["fused"].facts or {}
    documents = (ROOT / "docs" / "engines.md").read_text("utf-8")
    for name, version in facts["versions"].items():
        assert f"{name} {version.partition('+')[0]}" in documents
    assert not facts.get("fxfusion_installed")


@pytest.mark.parametrize(
    ("engine", "form"), [("mlx-lm", "nemotron-nas"), ("vllm", "nemotron-nas"), ("vllm", "transformers")]
)
def test_what_the_card_says_runs(engine: str, form: Any, tmp_path: Path) -> None:
    """vLLM compiles, as nothing in the card says otherwise: a minute each."""
    model = fxfusion.fuse(load_model(), HOISTED)
    fxfusion.save_pretrained(model, tmp_path / "this folder", form, tokenizer=load_tokenizer())
    words = how_to_run(form, engine)
    assert f"\n{words}```\n" in (tmp_path / "this folder" / "README.md").read_text("utf-8")
    program = "bash" if engine == "mlx-lm" else "python"
    (tmp_path / "words").write_text(words)
    few_cores = runpy.run_path(str(SCRIPTS / "vllm_settings.py"))["ENVIRONMENT"]
    said = run_command(engine.removesuffix("-lm"), [program, "words"], tmp_path, timeout=300, **few_cores)
    wanted = "Generation: 100 tokens" if engine == "mlx-lm" else "Processed prompts: 100%"
    assert wanted in said, said[-2000:]
