"""vLLM serves what `format="transformers"` writes, by its Transformers backend. `make engines` runs this."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fxfusion
from bench.engines import Answer, run_script
from fxfusion.checkpoints.per_layer.export import save
from fxfusion.plan.fusion_plan import FusionPlan
from tests.end_to_end.families import randomise

pytestmark = pytest.mark.engines

HOISTED = FusionPlan(dropped_attention=[1, 2, 5], groups=[[1, 2], {"members": [3, 4], "mixers": "hoist"}], norm="last")
"""Layer 0 has the wide FFN of 1 and 2 behind it, 3 has no FFN, 4 that of two, and that of 5 behind it."""
WIDE = FusionPlan(dropped_attention=[1], groups=[[0, 1], {"members": [3, 4], "mixers": "wide"}])
"""One layer has twice the heads and keys of the others."""
PLANS = {"qwen3": HOISTED, "llama": WIDE}
PROMPTS = [[5, 9, 33, 71, 12, 8], [90, 3, 3, 41]]
NEW_TOKENS = 12
ERROR = 2e-4  # of a log-probability, between two implementations in float32


def intact(family: str) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 6, "head_dim": 32, "vocab_size": 97}
    config = AutoConfig.for_model(
        family, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 0)
    return model


@torch.inference_mode()
def tokens_of(model: Any) -> tuple[list[list[int]], list[list[float]], float]:
    """Greedy tokens after each prompt, whatever they are, their log-probabilities, and the least lead of one."""
    tokens, chances, nearest = [], [], float("inf")
    for prompt in PROMPTS:
        ids = list(prompt)
        chosen: list[float] = []
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best, second = logits.topk(2).values.tolist()
            ids.append(int(logits.argmax()))
            chosen.append(best)
            nearest = min(nearest, best - second)
        tokens.append(ids[len(prompt) :])
        chances.append(chosen)
    return tokens, chances, nearest


def test_vllm_says_what_the_fused_model_says(tmp_path: Path) -> None:
    wanted = {}
    for family, plan in PLANS.items():
        before = intact(family)
        model = fxfusion.fuse(copy.deepcopy(before), plan)
        save(model, tmp_path / family)
        wanted[family] = tokens_of(model)
        assert wanted[family][2] > 2 * ERROR, "two tokens are nearly tied: choose another prompt"
        assert wanted[family][0] != tokens_of(before)[0], "the models are too close to tell them apart"
    options = {"model_impl": "transformers", "skip_tokenizer_init": True}
    asked = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "options": options}
    (tmp_path / "request.json").write_text(json.dumps(asked))
    scratch = tmp_path / "answers"
    scratch.mkdir()
    folders = [tmp_path / family for family in PLANS]
    run_script("vllm", "in_vllm.py", [tmp_path / "request.json", scratch, *folders], scratch, timeout=400)
    assert "Using Transformers modeling backend" in (scratch / "in_vllm.log").read_text()
    for family, (tokens, chances, _) in wanted.items():
        found = Answer.read(scratch / family)
        assert found.tokens == tokens
        assert torch.allclose(torch.tensor(found.logprobs), torch.tensor(chances), atol=ERROR)
