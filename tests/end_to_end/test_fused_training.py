"""Members that are given back after training compute, in parallel, what the trained model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxfusion
from tests.end_to_end import caching
from tests.end_to_end.caching import RED, off
from tests.end_to_end.families import parallel_form
from tests.end_to_end.family_table import family_named

pytestmark = pytest.mark.slow

MEMBERS = [1, 2, 3]
LOGITS = 1e-5
IDS = caching.token_ids()


def train(model: Any, steps: int) -> list[float]:
    """Losses of so many steps of AdamW on one batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


TRAINED = [
    *(("llama", "fold"), ("llama", "last")),  # separate gate and up
    *(("gpt2", "fold"), ("gpt2", "last")),  # Conv1D, LayerNorm, biases
    ("gemma", "fold"),  # the gain is 1 + weight
    ("phi3", "fold"),  # packed gate and up
    ("smollm3", "fold"),  # biases on gate, up and down
    ("granite", "fold"),  # a multiplier after the FFN
    ("starcoder2", "last"),
]


@pytest.mark.parametrize(("name", "norm"), TRAINED, ids=lambda value: value)
def test_members_given_back_after_training_are_the_trained_model_in_parallel(name: str, norm: Any) -> None:
    """Layer 0 is as it was, layer 1 is as wide as layers 1, 2 and 3. Training checkpoints its activations."""
    family = family_named(name)
    model: Any = caching.decoder(family, use_cache=False)
    unfused = caching.stubbed(model, family, MEMBERS)
    fxfusion.fuse(model, fxfusion.FusionPlan(dropped_attention=MEMBERS, groups=[MEMBERS], norm=norm))
    model.gradient_checkpointing_enable()
    untrained = caching.recomputed(model, IDS)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = train(model.train(), steps=4)
    assert losses[-1] < losses[0]
    assert all(off(value.detach(), before[key]) > 1e-3 for key, value in model.named_parameters())
    trained = caching.recomputed(model.eval(), IDS)
    assert off(untrained, trained) > RED

    fxfusion.unfuse(model)
    assert model.config.num_hidden_layers == 4
    again = parallel_form(model, family, {"input_ids": IDS}, last_norm=norm == "last")
    assert off(again, trained) <= LOGITS
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in unfused.state_dict().items()}
    train(model.train(), steps=1)  # members train, too
