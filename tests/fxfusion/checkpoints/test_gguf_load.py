from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxfusion
from fxfusion.checkpoints.gguf import header
from fxfusion.checkpoints.gguf import load as gguf_load
from fxfusion.checkpoints.gguf.header import GgufFile
from fxfusion.errors import CheckpointError
from fxfusion.models.fingerprint import facts_of
from tests.fxfusion.checkpoints.gguf_models import HIDDEN, LAYERS, TOKENS, llama, write_gguf
from tests.fxfusion.checkpoints.models import plain

IDS = torch.arange(24)[None] * 7 % len(TOKENS)
PLAN = {"groups": [{"members": [0, 1], "mixers": "hoist"}]}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_is_the_model_that_was_written_to_it(tmp_path: Path, kind: str, tied: bool) -> None:
    written = write_gguf(tmp_path / "tiny.gguf", kind, tied=tied)
    model = fxfusion.from_pretrained(tmp_path / "tiny.gguf")
    assert type(model) is type(llama(tied)) and not model.training and model.dtype == torch.float32
    found = model.state_dict()
    assert all(found[name].equal(value) for name, value in written.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    expected = logits(llama(tied))
    assert (logits(model) - expected).norm() / expected.norm() < {"F32": 1e-6, "Q8_0": 0.05, "Q4_1": 0.5}[kind]


def test_the_config_has_short_numbers_and_no_quantisation(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    config = fxfusion.from_pretrained(tmp_path / "tiny.gguf").config
    assert config.rms_norm_eps == 1e-5 and getattr(config, "quantization_config", None) is None
    unlike = {"architectures", "_name_or_path", "dtype", "transformers_version", "bos_token_id", "eos_token_id"}
    found, expected = (
        {name: value for name, value in one.to_dict().items() if name not in unlike} for one in (config, llama().config)
    )
    assert found == expected and config.eos_token_id == 0


@pytest.mark.parametrize(
    ("value", "decimal"),
    [
        (1e-5, 1e-5),
        (1e-6, 1e-6),
        (0.1, 0.1),
        (2.0**-13, 2.0**-13),
        (10000.0, 10000.0),
        (1 / 3, float(np.float32(1 / 3))),
    ],
)
def test_a_float32_is_the_decimal_that_it_was_made_of(value: float, decimal: float) -> None:
    stored = float(np.float32(value))
    assert gguf_load._decimal({"a": [stored]}) == {"a": [decimal]}
    assert gguf_load._decimal(value) in (value, decimal) and gguf_load._decimal(3) == 3


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.float32)])
def test_without_a_dtype_floats_stay_as_most_of_them_are_stored(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    written = write_gguf(tmp_path / "tiny.gguf", kind)
    model = fxfusion.from_pretrained(tmp_path / "tiny.gguf")
    name = "model.layers.1.mlp.down_proj.weight"
    assert model.dtype == dtype and model.state_dict()[name].equal(written[name].to(dtype))
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert fxfusion.from_pretrained(tmp_path / "tiny.gguf", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_and_saved_it_is_the_same_model_again(tmp_path: Path, dtype: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q4_1")
    model = fxfusion.from_pretrained(tmp_path / "tiny.gguf", dtype=dtype)
    before = facts_of(model)
    fxfusion.save_pretrained(model, tmp_path / "folder", plan=PLAN)  # fuses it
    again = fxfusion.from_pretrained(tmp_path / "folder")
    assert len(again.model.layers) == LAYERS and logits(again).equal(logits(model))
    alone = plain(tmp_path / "folder")
    assert facts_of(alone) == before == facts_of(fxfusion.from_pretrained(tmp_path / "tiny.gguf", dtype=dtype))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == dtype
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "license: apache-2.0" in card and "tiny.gguf" in card


def test_a_plan_made_for_the_file_fits_the_folder_and_the_other_way_round(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q8_0")
    model = fxfusion.from_pretrained(tmp_path / "tiny.gguf")
    fxfusion.save_pretrained(model, tmp_path / "folder", plan=PLAN)
    plan = fxfusion.FusionPlan.load(tmp_path / "folder" / "fxfusion_plan.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxfusion.fuse(fxfusion.from_pretrained(tmp_path / "tiny.gguf"), plan)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = gguf_load.load_tokenizer(tmp_path / "tiny.gguf")
    ids = tokenizer("x 1 2\n")["input_ids"]
    assert tokenizer.decode(ids) == "x 1 2\n" and len(ids) == 4 and tokenizer.eos_token == "<eos>"
    fxfusion.save_pretrained(fxfusion.from_pretrained(tmp_path / "tiny.gguf"), tmp_path / "folder")
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert saved("x 1 2\n")["input_ids"] == ids and saved.eos_token == "<eos>"
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "folder").glob("*.json"))


def test_a_file_without_a_tokenizer_gives_a_model_and_a_warning(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tokenizer=False)
    model = fxfusion.from_pretrained(tmp_path / "tiny.gguf")
    with pytest.warns(UserWarning, match="no tokenizer is saved"):
        fxfusion.save_pretrained(model, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf has no tokenizer in it"):
        gguf_load.load_tokenizer(tmp_path / "tiny.gguf")


def test_a_tokenizer_that_cuts_text_by_a_rule_of_its_own_is_told(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", change={"tokenizer.ggml.pre": "of-its-own"})
    with pytest.warns(UserWarning, match="no rule 'of-its-own'"):
        gguf_load.load_tokenizer(tmp_path / "tiny.gguf")
    write_gguf(tmp_path / "known.gguf", change={"tokenizer.ggml.pre": "llama-bpe"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gguf_load.load_tokenizer(tmp_path / "known.gguf")


def test_nothing_beside_the_file_is_read(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "config.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{no JSON")
    written = write_gguf(tmp_path / "tiny.GGUF")
    found = fxfusion.from_pretrained(tmp_path / "tiny.GGUF").state_dict()
    assert all(found[name].equal(value) for name, value in written.items())
    assert gguf_load.load_tokenizer(tmp_path / "tiny.GGUF").eos_token == "<eos>"


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"architecture": "nothing"}, "does not read the architecture 'nothing' .*folder of the model"),
        ({"architecture": "deci"}, "does not read the architecture 'deci'"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"it lacks blk\.1\.ffn_up\.weight"),
        (
            {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}},
            r"no place for rope_freqs\.weight; give the folder",
        ),
        (
            {"tensors": {f"blk.{n}.attn_q.bias": np.ones(HIDDEN, np.float32) for n in range(LAYERS)}},
            r"no place for blk\.0\.attn_q\.bias and 1 more",
        ),
        ({"change": {"llama.rope.scaling.factor": 8.0}}, r"llama\.rope\.scaling\.factor is 8\.0"),
        ({"change": {"llama.embedding_length": 64}}, "has .* values, and its model"),
        ({"change": {"llama.attention.head_count": None}}, "has .* values, and its model"),
        ({"change": {"llama.block_count": 10**9}}, "asks for 1000000000 layers, and has 21 tensors"),
    ],
)
def test_what_transformers_would_leave_aside_is_an_error(tmp_path: Path, written: dict[str, Any], named: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", **written)
    with pytest.raises(CheckpointError, match=named) as caught:
        fxfusion.from_pretrained(tmp_path / "tiny.gguf")
    assert str(tmp_path / "tiny.gguf") in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as patch:
            patch.setattr(header, "find_spec", lambda name, missing=package: None if name == missing else object())
            with pytest.raises(CheckpointError, match=rf"package {package}, .*pip install 'fxfusion\[real\]'"):
                fxfusion.from_pretrained(tmp_path / "tiny.gguf")


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert gguf_load.read_config(GgufFile.read(tmp_path / "tiny.gguf")).num_hidden_layers == LAYERS
    write_gguf(tmp_path / "tiny.gguf", layers=3)
    assert gguf_load.read_config(GgufFile.read(tmp_path / "tiny.gguf")).num_hidden_layers == 3
