"""Tables from names, files, configs and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fxfusion.cost import LayerTable, read_table
from fxfusion.cost.layer_table import Layer
from fxfusion.cost.read_table import UndecidedError
from fxfusion.errors import OptionError

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 100,
    "hidden_act": "silu",
}
ATTENTION = {"no_op": False, "n_heads_in_group": 4, "replace_with_linear": False}
NO_ATTENTION = {"no_op": True, "n_heads_in_group": None}
FFN = {"no_op": False, "ffn_mult": 1.3125, "replace_with_linear": False}
NO_FFN = {"no_op": True, "ffn_mult": None}


def written(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    fields = {name: value for name, value in (CONFIG | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields), "utf-8")
    return folder


def test_a_published_name() -> None:
    assert read_table("llama-3.3-70b") == LayerTable.published("llama-3.3-70b")


def test_a_table_file(tmp_path: Path) -> None:
    fields = {"name": "mine", "hidden_size": 8, "blocks": [{"attention": True, "ffn_width": 4}]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fields), "utf-8")
    assert read_table(path) == LayerTable(name="mine", hidden_size=8, layers=(Layer(has_mixer=True, ffn_width=4),))


def test_a_config_and_its_folder(tmp_path: Path) -> None:
    folder = written(tmp_path, tie_word_embeddings=True, head_dim=16)
    found = read_table(folder)
    assert found == read_table(folder / "config.json")
    assert found.name == "model" and found.tie_word_embeddings and found.head_dim == 16 and found.gated
    assert found.layers == (Layer(has_mixer=True, ffn_width=192),) * 2


def test_other_words_for_the_same(tmp_path: Path) -> None:
    names = {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": None, "vocab_size": 100, "activation_function": "silu"}
    folder = written(tmp_path, **{name: ... for name in CONFIG}, **{})
    (folder / "config.json").write_text(json.dumps(names), "utf-8")
    found = read_table(folder)
    assert (found.hidden_size, found.num_attention_heads, found.num_key_value_heads) == (64, 8, 8)
    assert found.layers == (Layer(has_mixer=True, ffn_width=256),) * 2


def test_the_text_part_of_a_larger_config(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "config.json").write_text(json.dumps({"text_config": CONFIG, "tie_word_embeddings": True}), "utf-8")
    assert read_table(folder).tie_word_embeddings and len(read_table(folder).layers) == 2


def test_windows(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    found = read_table(written(tmp_path, sliding_window=32, layer_types=kinds))
    assert [layer.window for layer in found.layers] == [32, None]
    assert [layer.window for layer in read_table(written(tmp_path, sliding_window=32)).layers] == [32, 32]
    found = read_table(written(tmp_path, sliding_window=32, use_sliding_window=False))
    assert [layer.window for layer in found.layers] == [None, None]


def test_blocks_of_their_own(tmp_path: Path) -> None:
    blocks = [
        {"attention": ATTENTION, "ffn": FFN},
        {"attention": NO_ATTENTION, "ffn": FFN | {"ffn_mult": 1.0}},
        {"attention": NO_ATTENTION, "ffn": NO_FFN},
        {"attention": ATTENTION | {"n_heads_in_group": 8}, "ffn": {"intermediate_size": 100}},
    ]
    sizes = {"hidden_size": 8192, "num_hidden_layers": 4, "intermediate_size": None}
    found = read_table(written(tmp_path, block_configs=blocks, **sizes))
    assert [layer.ffn_width for layer in found.layers] == [7168, 5632, None, 100]  # as published for these multipliers
    assert [layer.has_mixer for layer in found.layers] == [True, False, False, True]
    assert [layer.num_key_value_heads for layer in found.layers] == [2, None, None, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "config.json: it has no hidden_size or n_embd"),
        ({"intermediate_size": ...}, "config.json: it has no intermediate_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number above 0, got 0"),
        ({"num_attention_heads": "8"}, "num_attention_heads: expected a whole number above 0, got '8'"),
        ({"num_local_experts": 8}, "a mixture of 8 experts"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 2 entries, got 1"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: 'linear_attention' is unknown"),
        ({"block_configs": "many"}, "block_configs: expected a list of blocks"),
        ({"block_configs": [{"attention": ATTENTION, "ffn": FFN}]}, "config.json: block_configs has 1 entries for"),
        ({"per_layer_config": {"1": {"intermediate_size": 0}}}, "per_layer_config.1.intermediate_size = 0"),
        ({"per_layer_config": {"1": {"num_attention_heads": 4}}}, "layer 1 has 4 heads, others 8"),
    ],
)
def test_what_a_config_lacks(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        read_table(written(tmp_path, **changes))


def test_what_a_config_does_not_say(tmp_path: Path) -> None:
    folder = written(tmp_path, hidden_act="gelu")
    with pytest.raises(UndecidedError, match="hidden_act 'gelu' does not tell whether FFNs are gated"):
        read_table(folder)
    assert read_table(folder, gated=False).gated is False


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="gone: no such file or folder with a config.json, and no table of that name"):
        read_table(tmp_path / "gone")
    path = tmp_path / "broken.json"
    path.write_text("{", "utf-8")
    with pytest.raises(OptionError, match="broken.json: not valid JSON"):
        read_table(path)
    path.write_text("[]", "utf-8")
    with pytest.raises(OptionError, match="broken.json: expected fields with values"):
        read_table(path)
