"""heads: which numbers of an attention's modules follow its heads, chosen by a proof, and a config for one layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch import nn
from transformers import GPT2Config

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.heads import HeadNumbers, HeadsConfig, own_configs, put_heads
from fxfusion.models.ffn_surgery.layout import Cut, Matrix, Member


class Attention(nn.Module):
    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.num_heads, self.n_head, self.num_key_value_heads, self.num_key_value_groups = 4, 4, 2, 2
        self.embed_dim, self.hidden_size, self.split_size = 32, 32, 32
        self.head_dim, self.window_size, self.layer_idx, self.rotary_dim = 8, 32, 4, 32
        self.flag = True
        self.config = config
        self.q, self.kv, self.o = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)


def recipe() -> GroupRecipe:
    """Two members with four heads of queries and two of keys and values, of eight channels."""
    members = tuple(
        Member(
            layer=layer,
            name=f"layers.{layer}",
            width=32,
            projections=(Matrix("q.weight", False, None), Matrix("kv.weight", False, None)),
            cuts=(Cut(0, 0, 32, 1), Cut(1, 0, 16, 1), Cut(1, 16, 32, 1)),
            down=Matrix("o.weight", False, None),
            prologue=(),
            roles=(),
            middle=(),
            tail=(),
        )
        for layer in (1, 0)
    )
    return GroupRecipe(members=members, norm="fold", mixers="wide", heads=(4, 2, 2, 4))


def test_numbers_by_value_and_name() -> None:
    numbers = HeadNumbers.of(recipe())
    found = numbers.own(Attention(), with_widths=False)
    assert found == {"num_heads": 8, "n_head": 8, "num_key_value_heads": 4}
    widths = {"embed_dim": 64, "hidden_size": 64, "split_size": 64}
    assert numbers.own(Attention(), with_widths=True) == found | widths


def test_a_config_for_one_layer() -> None:
    config = GPT2Config(n_head=4)
    own = HeadsConfig(config, {"n_head": 8})
    assert own.num_attention_heads == own.n_head == 8 and config.n_head == 4
    assert own.n_layer == config.n_layer
    own.n_layer = 3
    assert config.n_layer == 3 and not hasattr(own, "no_such_name")
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert copied.n_head == 8 and copied.n_layer == 3 and copied._config is not config
    model = nn.ModuleList([Attention(own)])
    both = copy.deepcopy(nn.ModuleDict({"a": Attention(own), "b": Attention(config)}))
    assert both["a"].config._config is both["b"].config
    own_configs(model.modules())
    assert model[0].config is config


@pytest.mark.parametrize(
    ("wanted", "numbers"),
    [
        ({"num_heads": 8, "embed_dim": 64}, {"num_heads": 8, "embed_dim": 64}),
        ({"num_heads": 8, "embed_dim": 32}, {"num_heads": 8, "embed_dim": 32}),
        ({"num_heads": 4, "embed_dim": 32}, {"num_heads": 4, "embed_dim": 32}),
    ],
)
@pytest.mark.parametrize("heads_of_config", [4, 8])
def test_the_proof_chooses(wanted: dict[str, int], numbers: dict[str, int], heads_of_config: int) -> None:
    config = GPT2Config(n_head=4)
    module = Attention(config)

    def prove() -> None:
        if any(getattr(module, name) != value for name, value in wanted.items()):
            raise ValueError("wrong numbers")
        if module.config.num_attention_heads != heads_of_config:
            raise ValueError("wrong config")

    put_heads(recipe(), [module], module, prove)
    assert {name: getattr(module, name) for name in numbers} == numbers
    assert (module.config is config) == (heads_of_config == 4) and config.n_head == 4
    assert module.head_dim == 8 and module.layer_idx == 4 and module.window_size == 32


def test_where_no_numbers_do_all_reasons_are_named() -> None:
    module = Attention(GPT2Config(n_head=4))
    before = {name: value for name, value in vars(module).items() if isinstance(value, int)}

    def prove() -> None:
        raise ValueError(f"{module.num_heads} heads")

    with pytest.raises(SurgeryError, match=r"layers.1 cannot have the heads of 2: ValueError: 8 heads; .*4 heads"):
        put_heads(recipe(), [module], module, prove)
    assert {name: value for name, value in vars(module).items() if isinstance(value, int)} == before
