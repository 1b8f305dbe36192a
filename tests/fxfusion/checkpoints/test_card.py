"""Model cards: front matter that the hub takes, and what is known about the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fxfusion.checkpoints.card import Card, card_text
from fxfusion.errors import CheckpointError
from fxfusion.plan.fusion_plan import FusionPlan

PLAN = FusionPlan(dropped_attention=[4, 5, 6], groups=[[4, 5], [6, 7, 8]])


def model_from(name: object) -> Any:
    return SimpleNamespace(name_or_path=str(name))


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
    assert "trust_remote_code=True" in text.text


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
