"""A GGUF file computes what the model in memory does, in a loop that knows nothing of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

import fxfusion
from fxfusion.checkpoints.llama_cpp import export
from fxfusion.checkpoints.llama_cpp.export import GgufExport, save
from fxfusion.errors import CheckpointError, OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.checkpoints import gguf_eager
from tests.fxfusion.checkpoints.nemotron_models import HEADS, HIDDEN, LAYERS, WIDTH, decoder, ids, logits, off

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no tokenizer is written")]

PLANS = {
    "intact": None,
    "dropped": FusionPlan(dropped_attention=[2, 3], groups=[[1, 2, 3]]),
    "first dropped": FusionPlan(dropped_attention=[0]),
    "hoisted": FusionPlan(groups=[[1, 2], [3, 4, 5]], hoist=True),
    "wide": FusionPlan(groups=[{"members": [1, 2, 3], "mixers": "wide"}]),
    "both": FusionPlan(dropped_attention=[1], groups=[[0, 1], {"members": [3, 4], "mixers": "wide"}]),
}
HEAD_COUNTS = {
    "intact": HEADS,
    "dropped": [HEADS, HEADS, HEADS, HEADS],
    "first dropped": [1, *[HEADS] * 5],
    "hoisted": [HEADS] * LAYERS,
    "wide": [HEADS, 3 * HEADS, HEADS, HEADS],
    "both": [HEADS, HEADS, 2 * HEADS, HEADS],
}
WIDTHS = {
    "intact": WIDTH,
    "dropped": [WIDTH, 3 * WIDTH, WIDTH, WIDTH],
    "first dropped": [WIDTH] * LAYERS,
    "hoisted": [WIDTH, 32, 2 * WIDTH, 32, 32, 3 * WIDTH],
    "wide": [WIDTH, 3 * WIDTH, WIDTH, WIDTH],
    "both": [2 * WIDTH, WIDTH, 2 * WIDTH, WIDTH],
}


def made(name: str, **others: Any) -> Any:
    plan = PLANS[name]
    return decoder(**others) if plan is None else fxfusion.fuse(decoder(**others), plan)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return gguf_eager.contents(path)[1]


@pytest.mark.parametrize("name", PLANS)
def test_the_file_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    model, file = made(name), tmp_path / "model.gguf"
    fxfusion.save_pretrained(model, file, format="gguf")
    settings, tensors = gguf_eager.contents(file)
    assert settings["general.architecture"] == ("llama" if name == "intact" else "deci")
    prefix = settings["general.architecture"]
    assert settings[f"{prefix}.attention.head_count"] == HEAD_COUNTS[name]
    assert settings[f"{prefix}.feed_forward_length"] == WIDTHS[name]
    assert off(gguf_eager.logits(file, ids()), logits(model)) < 2e-5
    down = max((one for one in tensors if "ffn_down" in one), key=lambda one: tensors[one].shape[-1])
    without = tensors[down].clone()
    without[:, :WIDTH] = 0  # one member
    assert off(gguf_eager.logits(file, ids(), {down: without}), logits(model)) > 1e-2, "the comparison can fail"


def test_a_layer_without_attention_has_no_heads_and_no_tensors_of_it(tmp_path: Path) -> None:
    model = fxfusion.drop_attention(decoder(), [2])
    save(model, tmp_path / "model.gguf")
    settings, tensors = gguf_eager.contents(tmp_path / "model.gguf")
    assert settings["deci.attention.head_count"] == [4, 4, 0, 4, 4, 4]
    assert settings["deci.attention.head_count_kv"] == [2, 2, 0, 2, 2, 2]
    assert not [name for name in tensors if name.startswith("blk.2.attn")]
    assert off(gguf_eager.logits(tmp_path / "model.gguf", ids()), logits(model)) < 2e-5


def test_attention_alone_gets_the_smallest_ffn_of_zeros(tmp_path: Path) -> None:
    save(made("hoisted"), tmp_path / "model.gguf")
    tensors = tensors_of(tmp_path / "model.gguf")
    for role, shape in (("gate", [32, HIDDEN]), ("up", [32, HIDDEN]), ("down", [HIDDEN, 32])):
        assert list(tensors[f"blk.1.ffn_{role}.weight"].shape) == shape
        assert not tensors[f"blk.1.ffn_{role}.weight"].any()
    assert torch.equal(tensors["blk.1.ffn_norm.weight"], torch.ones(HIDDEN))


@pytest.mark.parametrize(
    "others",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"num_key_value_heads": HEADS},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
    ids=["biases", "tied", "head size", "no groups", "linear rope"],
)
@pytest.mark.parametrize("name", ["hoisted", "wide"])
def test_other_llamas(name: str, others: dict[str, Any], tmp_path: Path) -> None:
    model = made(name, **others)
    save(model, tmp_path / "model.gguf")
    tensors = tensors_of(tmp_path / "model.gguf")
    assert ("output.weight" in tensors) != others.get("tie_word_embeddings", False)
    assert ("blk.0.attn_q.bias" in tensors) == others.get("attention_bias", False)
    assert off(gguf_eager.logits(tmp_path / "model.gguf", ids()), logits(model)) < 2e-5


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_types(type: str, tmp_path: Path) -> None:
    model, file = made("hoisted"), tmp_path / "model.gguf"
    fxfusion.save_pretrained(model, file, format="gguf", gguf_type=type)  # type: ignore[arg-type]
    reader = gguf.GGUFReader(file)
    kinds = {one.name: one.tensor_type.name.lower() for one in reader.tensors}
    assert {kinds[name] for name in kinds if "norm" in name} == {"f32"}
    assert {kinds[name] for name in kinds if name.startswith("blk") and "norm" not in name} == {type}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == {"q4_0": "q8_0"}.get(type, type)
    own = model.model.layers[0].mlp.down_proj.weight.detach()
    found = tensors_of(file)["blk.0.ffn_down.weight"]
    exact = {"f32": own, "f16": own.half().float(), "bf16": own.bfloat16().float()}
    if type in exact:
        assert torch.equal(found, exact[type])
    else:
        kind = gguf.GGMLQuantizationType[type.upper()]
        assert torch.equal(found, torch.from_numpy(gguf.dequantize(gguf.quantize(own.numpy(), kind), kind)))
        assert 1e-4 < off(found, own) < {"q8_0": 5e-3, "q4_0": 0.1}[type]


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_type_is_the_dtype_of_the_model(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    model = made("wide").to(dtype)
    save(model, tmp_path / "model.gguf")
    assert GgufExport.of(model).type == name.lower()
    found = tensors_of(tmp_path / "model.gguf")
    assert torch.equal(found["blk.0.ffn_up.weight"].to(dtype), model.model.layers[0].mlp.up_proj.weight)


def test_rows_that_are_no_whole_blocks_stay_as_they_are_and_that_is_said(tmp_path: Path) -> None:
    model = decoder(intermediate_size=40)
    with pytest.warns(UserWarning, match=r"6 tensors stay f32: rows of blk.0.ffn_down.weight \[64, 40\] are no whole"):
        save(model, tmp_path / "model.gguf", type="q8_0")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F32" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    model = made("hoisted")
    card = {"base_model": "org/base", "license": "mit", "quality": {"perplexity": 21.4}}
    fxfusion.save_pretrained(model, tmp_path / "model.gguf", format="gguf", card=card)
    settings = gguf_eager.contents(tmp_path / "model.gguf")[0]
    assert settings["general.name"] == "org/base fused"
    assert settings["general.base_model.0.name"] == "org/base" and settings["general.license"] == "mit"
    plan = json.loads(settings["fxfusion.plan"])
    assert [group["members"] for group in plan["groups"]] == [[1, 2], [3, 4, 5]]
    assert json.loads(settings["fxfusion.quality"]) == {"perplexity": 21.4}
    assert settings["deci.context_length"] == 128 and settings["general.file_type"] == 0


def test_tensors_go_through_memory_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("wide")
    save(model, tmp_path / "whole.gguf")
    monkeypatch.setattr(export, "_VALUES", 7 * HIDDEN)
    seen: list[int] = []
    stored = export._stored
    monkeypatch.setattr(export, "_stored", lambda *given: seen.append(given[1].numel()) or stored(*given))
    save(model, tmp_path / "parts.gguf")
    assert max(seen) <= max(7 * HIDDEN, 3 * WIDTH)
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_file_of_others_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="overwrite"):
        fxfusion.save_pretrained(decoder(), file, format="gguf")
    assert file.read_bytes() == b"mine"
    fxfusion.save_pretrained(decoder(), file, format="gguf", overwrite=True)
    fxfusion.save_pretrained(decoder(seed=1), file, format="gguf")  # its own file it may replace
    assert off(gguf_eager.logits(file, ids()), logits(decoder(seed=1))) < 2e-5


def test_a_write_that_goes_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    save(decoder(), file)
    before = file.read_bytes()
    write = export._write_tensors

    def damaged(path: Path, *rest: Any) -> None:
        write(path, *rest)
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(export, "_write_tensors", damaged)
    with pytest.raises(CheckpointError, match="read back from the file, is not what the model has"):
        save(decoder(seed=1), file)
    assert file.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == [".fxfusion_files.json", "model.gguf"]


@pytest.mark.parametrize(("value", "type"), [(float("nan"), None), (1e5, "f16"), (float("inf"), "q8_0")])
def test_values_that_the_type_does_not_hold(value: float, type: str | None, tmp_path: Path) -> None:
    model = decoder()
    found = GgufExport.of(model, type)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    rows = found.decoder.pieces["blk.1.ffn_up.weight"].rows(found.decoder.state)
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight has values up to"):
        export._stored("blk.1.ffn_up.weight", rows, type or "f32")


def test_names_and_types_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name one that ends in \.gguf"):
        fxfusion.save_pretrained(decoder(), tmp_path / "model", format="gguf")
    with pytest.raises(OptionError, match=r"gguf_type: expected one of f32, .*'q9'"):
        fxfusion.save_pretrained(decoder(), tmp_path / "model.gguf", format="gguf", gguf_type="q9")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="gguf_type is of format gguf"):
        fxfusion.save_pretrained(decoder(), tmp_path / "model", gguf_type="q8_0")
    mixed = decoder()
    mixed.lm_head.half()
    with pytest.raises(CheckpointError, match=r"torch.float16 \(lm_head.weight\): say what to write \(gguf_type=...\)"):
        GgufExport.of(mixed)
    assert not list(tmp_path.iterdir())
