"""What lies beside the model: tokenizer and licence files go with it, and its card says what is known of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from bench.reference import MODEL_FOLDER, load_tokenizer
from fxfusion.checkpoints.companions import Card, Companions, card_text, how_to_run
from fxfusion.errors import CheckpointError
from fxfusion.plan.fusion_plan import FusionPlan


def model_from(name: object) -> Any:
    return SimpleNamespace(name_or_path=str(name))


def saved(companions: Companions, folder: Path) -> set[str]:
    folder.mkdir()
    companions.save_pretrained(folder)
    return {path.name for path in folder.iterdir()}


def test_files_of_the_models_own_folder_are_taken(tmp_path: Path) -> None:
    names = saved(Companions.of(model_from(MODEL_FOLDER)), tmp_path / "m")
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (MODEL_FOLDER / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_given_is_saved_and_the_licence_still_comes_along(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "tokenizer.json", "modeling_x.py", "pytorch_model.bin"):
        (base / name).write_text("old")
    names = saved(Companions.of(model_from(base), load_tokenizer()), tmp_path / "m")
    assert names == {"LICENSE", "NOTICE.txt", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "m" / "tokenizer.json").read_text() != "old"


@pytest.mark.parametrize("name", ["", "nobody/has-this-model"])
def test_a_missing_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match=f"no tokenizer is saved: none was given, and ({name}|where)"):
        assert saved(Companions.of(model_from(name)), tmp_path / "m") == set()


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{tmp_path} has none"):
        Companions.of(model_from(tmp_path))


def test_links_out_of_the_base_folder_are_not_followed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "secret").write_text("x")
    (base / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        saved(Companions.of(model_from(base)), tmp_path / "m")


def test_errors_of_a_tokenizer_are_told(tmp_path: Path) -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def save_pretrained(self, folder: Path) -> None:
            raise self.error

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for error, kind in ((RuntimeError("odd"), CheckpointError), (OSError(28, "full"), OSError)):
            with pytest.raises(kind, match="odd|full"):
                Companions.of(model_from(""), Broken(error)).save_pretrained(tmp_path)


PLAN = FusionPlan(dropped_attention=[4, 5, 6], groups=[[4, 5], [6, 7, 8]])


def card(model: Any, plan: FusionPlan = PLAN, form: str = "canonical", given: Any = None) -> ModelCard:
    return ModelCard(card_text(model, plan, form, given))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    found = card(model_from("org/base"), given={"license": "apache-2.0", "language": ["en"]}).data.to_dict()
    assert found == {
        "base_model": "org/base",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["fxfusion", "ffn-fusion"],
    }


def test_plan_quality_and_engines_are_written() -> None:
    given = Card(quality={"perplexity": 21.4}, engines=["mlx-lm 0.32.2", "vLLM 0.32.0"], notes="Trained on code.")
    text = card(model_from("org/base"), given=given).text
    for part in (
        "# org/base, with fused feed-forward layers",
        "attention dropped in layers 4, 5, 6 (3 of ?)",
        "- FFNs 4, 5 fused into one\n- FFNs 6, 7, 8 fused into one\n",
        "| perplexity | 21.4 |",
        "Engines verified: mlx-lm 0.32.2, vLLM 0.32.0.",
        "Plain `transformers` loads the folder as the unfused model, without the attention that was dropped.",
        "Trained on code.",
    ):
        assert part in text


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    text = card(model_from(""), FusionPlan(), "nemotron-nas")
    assert "base_model" not in text.data.to_dict() and "license" not in text.data.to_dict()
    for part in (
        "nothing was dropped or fused",
        "Nothing was measured",
        "Engines verified: none yet",
        "licence is not",
    ):
        assert part in text.text


def test_each_engine_that_loads_it_has_its_command() -> None:
    found = {"transformers": None, "vllm": None, "mlx-lm": "no layer has attention", "tensorrt-llm": "not tested"}
    text = card_text(model_from("org/base"), PLAN, "nemotron-nas", None, found)
    for engine in ("transformers", "vllm"):
        assert f"\n```python\n{how_to_run('nemotron-nas', engine)}```\n" in text
    assert "Not in mlx-lm (no layer has attention), TensorRT-LLM (not tested).\n" in text
    assert how_to_run("nemotron-nas", "mlx-lm") not in text
    served = card_text(model_from("org/base"), PLAN, "transformers", None, {"vllm": None})
    assert 'LLM("this folder", model_impl="transformers", trust_remote_code=True)' in served and "Not in" not in served


def test_licence_and_language_come_from_the_base_models_card(tmp_path: Path) -> None:
    base = tmp_path / "models--org--base" / "snapshots" / "0123"
    base.mkdir(parents=True)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlanguage: [de]\nbase_model: x/y\n---\nHi\n"
    )
    found = card(model_from(base)).data.to_dict()
    assert found["base_model"] == "org/base"
    assert (found["license"], found["license_name"], found["language"]) == ("other", "own", ["de"])


@pytest.mark.parametrize("content", ["", "no front matter", "---\n: [\n---\n", "---\nlicense: [1, 2]\n---\n", "\0\xff"])
def test_a_readme_that_is_no_card_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_text(content)
    found = card(model_from(tmp_path))
    assert "license" not in found.data.to_dict()
    assert str(tmp_path) not in str(found), "a card does not tell where it was made"
    assert tmp_path.name in found.text


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown field 'licence'.*known: base_model"):
        card(model_from("org/base"), given={"licence": "mit"})
