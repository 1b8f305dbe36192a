"""The configuration that lies in nemotron-nas folders: ours, and as published files spell it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from tests.fxfusion.checkpoints.nemotron_models import settings


def block(group: int | None, mult: float | None, **others: Any) -> dict[str, Any]:
    """An entry with all keys, as in published files."""
    attention = {
        "n_heads_in_group": group,
        "no_op": group is None,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    ffn = {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False, "sparsify": None}
    found = {"attention": attention, "ffn": ffn}
    for path, value in others.items():
        part, _, name = path.partition("__")
        found[part][name] = value
    return found


def config(*blocks: dict[str, Any], **others: Any) -> DeciLMConfig:
    return DeciLMConfig(**settings(num_hidden_layers=len(blocks), block_configs=list(blocks), **others))


def test_blocks_answer_attributes() -> None:
    found = config(block(2, 6.0), block(None, 18.0), block(2, None), block(None, None))
    blocks = found.block_configs or []
    assert [one.attention.no_op for one in blocks] == [False, True, False, True]
    assert [one.attention.n_heads_in_group for one in blocks] == [2, None, 2, None]
    assert [one.ffn.ffn_mult for one in blocks] == [6.0, 18.0, None, None]
    assert not hasattr(blocks[0].ffn, "intermediate_size")  # vLLM asks this way which of the two is meant
    assert [found.ffn_width(layer) for layer in range(4)] == [256, 768, 0, 0]


@pytest.mark.parametrize("hidden", [64, 576, 896, 4096, 8192, 16384])
def test_a_width_survives_the_way_through_its_multiplier(hidden: int) -> None:
    """Also rounded to six digits, as mlx-lm does."""
    for width in range(256, 256 * 200, 256):
        for mult in (1.5 * width / hidden, round(1.5 * width / hidden, 6)):
            found = DeciLMConfig(hidden_size=hidden, num_hidden_layers=1, block_configs=[block(1, mult)])
            assert found.ffn_width(0) == width


def test_published_widths() -> None:
    """Of Super-49B (hidden 8192) and of Ultra-253B (16384): what their files say, and how wide the tensors are."""
    for hidden, mult, width in ((8192, 1.0, 5632), (8192, 0.5, 2816), (8192, 5.25, 28672), (16384, 39, 425984)):
        found = DeciLMConfig(hidden_size=hidden, num_hidden_layers=1, block_configs=[block(1, mult)])
        assert found.ffn_width(0) == width


def test_null_means_what_the_blocks_say() -> None:
    found = config(block(2, 6.0), block(None, 18.0), intermediate_size=None, num_key_value_heads=None)
    assert (found.intermediate_size, found.num_key_value_heads) == (768, 2)


def test_it_survives_its_own_file(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    one = config(block(2, 6.0), block(None, 18.0), rope_parameters=dict(rope))
    one.kv_sharing_modes = [None, "reuse"]
    one.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert text["block_configs"] == [block(2, 6.0), block(None, 18.0)]
    assert text["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert "kv_sharing_modes" not in text
    other = DeciLMConfig.from_pretrained(tmp_path)
    assert other.block_configs == one.block_configs and other.rope_parameters == one.rope_parameters == rope
    assert other.to_dict() == one.to_dict() | {"architectures": other.architectures}


def test_it_is_copied_and_compared_by_value() -> None:
    one = config(block(2, 6.0))
    other = copy.deepcopy(one)
    assert other == one
    (other.block_configs or [])[0].ffn.ffn_mult = 12.0
    assert other != one and one.ffn_width(0) == 256


def test_widths_in_channels_are_read_too() -> None:
    found = config(block(2, None, ffn__no_op=False, ffn__intermediate_size=512, ffn__hidden_act="silu"))
    assert found.ffn_width(0) == 512


def test_unknown_keys_are_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"block_configs\[0\].ffn.flavour is unknown"):
        found = config(block(2, 6.0, ffn__flavour="sweet", attention__colour=None))
    assert found.to_dict()["block_configs"] == [block(2, 6.0)]


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([block(3, 6.0)], r"block_configs\[0\].attention.n_heads_in_group = 3 must divide the 4"),
        ([block(None, 6.0, attention__no_op=False)], "n_heads_in_group = None"),
        ([block(2, None, ffn__no_op=False)], r"block_configs\[0\].ffn.ffn_mult = None must be a positive number"),
        ([block(2, 6.0), block(2, -1.0)], r"block_configs\[1\].ffn.ffn_mult = -1.0"),
        ([block(2, 1e30)], "ffn_mult = 1e"),
        ([block(2, "6")], "ffn_mult = '6'"),  # type: ignore[arg-type]
        ([block(2, 6.0, ffn__moe={"experts": 8})], r"block_configs\[0\].ffn.moe is not supported"),
        ([block(2, 6.0, attention__mamba={"state": 8})], "attention.mamba is not supported"),
        ([block(None, 6.0, attention__replace_with_linear=True)], "both no_op and replace_with_linear"),
        ([block(2, None, ffn__no_op=False, ffn__intermediate_size=100)], "100 is no multiple of 256"),
        ([block(2, 6.0, ffn__hidden_act="gelu")], "hidden_act = 'gelu' is not the model's 'silu'"),
        ([{"attention": {}}], r"block_configs\[0\] must be"),
        (["full"], r"block_configs\[0\] must be"),
    ],
)
def test_blocks_that_make_no_sense(blocks: list[Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config(*blocks)


def test_one_block_for_each_layer() -> None:
    with pytest.raises(ValueError, match="block_configs has 1 entries for num_hidden_layers = 6"):
        DeciLMConfig(**settings(block_configs=[block(2, 6.0)]))


@pytest.mark.parametrize(
    "others",
    [
        {"attention__replace_with_linear": True},
        {"ffn__replace_with_linear": True},
        {"attention__sparsify": ["a"]},
        {"attention__window_length": 8},
        {"attention__num_sink_tokens": 4},
    ],
)
def test_what_is_read_and_not_computed(others: dict[str, Any]) -> None:
    """The configuration can be read, which engines with more features need; the model is refused."""
    from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM

    found = config(block(2, 6.0), block(2, 6.0, **others))
    path = next(iter(others)).replace("__", ".")
    assert str(found.unsupported()).startswith(f"block_configs[1].{path} = ")
    with pytest.raises(ValueError, match="is not supported"):
        DeciLMForCausalLM(found)
    assert config(block(2, 6.0)).unsupported() is None
