"""The demo on a small random model with the eager compiler, and the demo's own tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bench.reference import HELD_OUT_FILE, load_model
from examples import demo
from fxfusion import cli
from fxfusion.errors import FxFusionError
from fxfusion.models.drop_attention import drop_attention

VOCABULARY = 64


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of ten layers whose FFNs are strong enough to matter, and held-out token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=10,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else 0.3 * torch.randn_like(weight))
    model.save_pretrained(folder)
    ids = torch.randint(0, VOCABULARY, (8, 1024)).to(torch.uint16)
    save_file({"input_ids": ids}, folder / HELD_OUT_FILE)
    return folder


@pytest.fixture(scope="module")
def ran(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Exit code, standard output and page of one run with --json."""
    html = tmp_path_factory.mktemp("out") / "demo.html"
    args = ["demo", "--json", "--model", model_folder, "--output", html]
    args += ["--compiler", "eager", "--sequences", 8, "--rounds", 5]
    patch, lines = pytest.MonkeyPatch(), []
    patch.setattr(sys, "argv", list(map(str, args)))
    patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(demo.app)
    finally:
        patch.undo()
    return stopped.value.code or 0, "\n".join(lines), html


@pytest.mark.slow
def test_the_whole_demo_runs_and_prints_one_json_document(ran: tuple[int, str, Path]) -> None:
    code, out, html = ran
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"model", "quality", "dropped_attention", "exactness", "speed", "html", "report", "seconds"}
    assert result["html"] == str(html) and "layers.4-8.mlp" in html.read_text("utf-8")


@pytest.mark.slow
def test_it_proves_and_shows_that_the_proof_can_fail(ran: tuple[int, str, Path]) -> None:
    found = json.loads(ran[1])["exactness"]
    assert [proof["part"] for proof in found["proofs"]] == ["group 0", "whole graph", "clean-up"]
    assert found["passed"] and all(proof["passed"] for proof in found["proofs"])
    assert 0 < found["logits"] <= found["limit"] < found["logits_with_a_changed_weight"]
    assert found["logits_with_the_weight_restored"] == found["logits"]


@pytest.mark.slow
def test_it_measures_quality_of_different_models(ran: tuple[int, str, Path]) -> None:
    quality = json.loads(ran[1])["quality"]
    assert list(quality) == ["intact", "attention_removed", "fused_fold", "fused_last", "fused_paper"]
    assert len({found["loss"]["value"] for found in quality.values()}) == 5
    assert {found["tokens"] for found in quality.values()} == {8 * 255}


@pytest.mark.slow
def test_it_measures_speed_with_a_control(ran: tuple[int, str, Path]) -> None:
    speed = json.loads(ran[1])["speed"]
    assert [found["tokens"] for found in speed.values()] == [128, 1]
    for found in speed.values():
        for key in ("fused", "control"):
            assert 0 < found[key]["low"] <= found[key]["value"] <= found[key]["high"]


# --- tools --------------------------------------------------------------------------------------------


def test_no_reference_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FxFusionError, match=r"--model .*no config\.json"):
        demo.check_model(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(FxFusionError, match=r"no model\.safetensors; `make demo` runs in a whole clone"):
        demo.check_model(tmp_path)


@pytest.mark.parametrize("norm", ["fold", "last"])
def test_the_parallel_form_is_what_the_paper_says(model_folder: Path, norm: str) -> None:
    """Against the equation, written out over the layers."""
    model = drop_attention(load_model(folder=model_folder).double(), (4, 5, 6))
    layers, x = demo.layers_of(model), torch.randn(2, 3, 32, dtype=torch.float64)
    gains = [layers[6 if norm == "last" else i].post_attention_layernorm for i in (4, 5, 6)]
    expected = x + sum(layers[i].mlp(gain(x)) for i, gain in zip((4, 5, 6), gains, strict=True))
    sequential, actual = x, x
    parallel = demo.layers_of(demo.parallel_form(model, [(4, 5, 6)], norm))
    for i in (4, 5, 6):
        sequential, actual = through(layers[i], sequential), through(parallel[i], actual)
    assert demo.relative_error(expected, actual) < 1e-12
    assert demo.relative_error(expected, sequential) > 1e-2


def through(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = layer(x, position_embeddings=None)
    return output[0] if isinstance(output, tuple) else output


def test_a_changed_weight_is_restored_even_after_an_error(model_folder: Path) -> None:
    model = load_model(folder=model_folder)
    weight = model.get_parameter("model.layers.4.mlp.down_proj.weight")
    before = weight.detach().clone()
    with pytest.raises(ZeroDivisionError), demo.one_weight_changed(model, 4):
        assert int((weight != before).sum()) == 1
        raise ZeroDivisionError
    assert torch.equal(weight, before)
