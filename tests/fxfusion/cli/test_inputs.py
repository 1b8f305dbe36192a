from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxfusion.cli import inputs
from fxfusion.errors import FxFusionError, OptionError
from tests.fxfusion.cli.conftest import VOCABULARY, make_model, make_text

CPU = torch.device("cpu")


def copied(model: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(model, folder)
    change(folder)
    return folder


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_model_is_loaded_on_its_device_in_its_precision(model: Path) -> None:
    loaded = inputs.load_model(model, CPU, "auto")
    assert loaded.dtype == torch.float32 and not loaded.training and not loaded.config.use_cache
    assert inputs.load_model(model, CPU, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "broken"),
        (without_a_weight, r"model\.layers\.1\.mlp\.up_proj\.weight are missing"),
        (lambda folder: with_other_config(folder, intermediate_size=48), "another shape|cannot be loaded"),
        (lambda folder: with_other_config(folder, model_type="t5"), "'t5' is no causal language model"),
        (lambda folder: with_other_config(folder, model_type="nothing"), "config.json cannot be used"),
        (lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
    ],
)
def test_a_folder_without_a_whole_causal_model_is_an_error_of_one_line(
    model: Path, tmp_path: Path, change: Callable[[Path], object], named: str
) -> None:
    folder = copied(model, tmp_path / "model", change)
    with pytest.raises(FxFusionError, match=named) as caught:
        inputs.load_model(folder, CPU, "float32")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path: Path) -> None:
    """Loaded as a causal model all the same: only its logits tell."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    for is_decoder in (False, True):
        config = BertConfig(num_hidden_layers=1, initializer_range=0.1, is_decoder=is_decoder, **sizes)
        BertLMHeadModel(config).save_pretrained(tmp_path / str(is_decoder))
    inputs.load_model(tmp_path / "True", CPU, "float32")
    with pytest.raises(FxFusionError, match="BertLMHeadModel is not causal"):
        inputs.load_model(tmp_path / "False", CPU, "float32")


def test_a_folder_without_a_tokenizer_is_an_error_that_names_the_way_out(model: Path, tmp_path: Path) -> None:
    def remove(folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()

    folder = copied(model, tmp_path / "model", remove)
    with pytest.raises(FxFusionError, match=r"no tokenizer can be loaded .*\.safetensors"):
        inputs.load_tokenizer(folder)
    assert inputs.load_tokenizer(model)("2 3")["input_ids"] == [2, 3]


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(OptionError, match=f"--device {name}: cannot be used here"):
        inputs.pick_device(name)
    assert inputs.pick_device("cpu") == CPU


def read(*sources: Path, tokenizer: Any = None, **sizes: int) -> list[torch.Tensor]:
    return inputs.read_batches(sources, tokenizer, **{"length": 16, "batch": 4, "sequences": 8, "seed": 0, **sizes})


def test_sources_take_turns_up_to_the_limit(model: Path, text: Path, ids: Path) -> None:
    tokenizer = inputs.load_tokenizer(model)
    one, other = read(text, tokenizer=tokenizer), read(ids)
    both = read(text, ids, tokenizer=tokenizer, sequences=12)
    assert [tuple(batch.shape) for batch in both] == [(4, 16)] * 3
    assert torch.equal(both[0], one[0]) and torch.equal(both[1], other[0]) and torch.equal(both[2], one[1])


def test_fewer_sequences_than_a_batch_are_one_small_batch(ids: Path) -> None:
    assert [tuple(batch.shape) for batch in read(ids, sequences=3)] == [(3, 16)]


def test_the_seed_decides_what_is_read(ids: Path) -> None:
    assert torch.equal(read(ids)[0], read(ids, seed=0)[0])
    assert not torch.equal(read(ids)[0], read(ids, seed=1)[0])


def test_text_that_is_missing_empty_or_short_is_named_with_the_option(model: Path, tmp_path: Path) -> None:
    tokenizer = inputs.load_tokenizer(model)
    (tmp_path / "empty.txt").touch()
    make_text(tmp_path / "short.txt", words=20)
    (tmp_path / "code").mkdir()
    make_text(tmp_path / "code" / "a.py")
    for name, named in (
        ("none.txt", "there is no file"),
        ("empty.txt", "no text"),
        ("short.txt", "smaller length or batch"),
        ("code", r"\.py \(1\): choose by --suffix"),
    ):
        with pytest.raises(OptionError, match=f"--text: .*{named}"):
            read(tmp_path / name, tokenizer=tokenizer)
    found = inputs.read_batches(
        [tmp_path / "code"], tokenizer, length=16, batch=4, sequences=8, seed=0, suffixes=[".py"]
    )
    assert len(found) == 2


def test_ids_that_the_model_does_not_know_are_refused(model: Path) -> None:
    config = inputs.causal_config(model)
    inputs.check_ids([torch.tensor([[0, VOCABULARY - 1]])], config)
    with pytest.raises(OptionError, match=f"token {VOCABULARY}, and the model knows {VOCABULARY} tokens"):
        inputs.check_ids([torch.tensor([[0, VOCABULARY]])], config)


def test_a_length_that_the_model_has_no_room_for_is_refused(tmp_path: Path) -> None:
    config = inputs.causal_config(make_model(tmp_path, layers=1, max_position_embeddings=32))
    inputs.check_length(32, config)
    with pytest.raises(OptionError, match="--length 33: the model reads 32 tokens at most"):
        inputs.check_length(33, config)
