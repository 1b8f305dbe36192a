"""The backend with Inductor behind it: caches, training, modes. Few and small: each test compiles."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fxfusion import ffn_fusion, last_reports
from tests.helpers import Plain, assert_exact, error_of, parallel_form, stack, tokens

pytestmark = pytest.mark.compile


pytestmark = pytest.mark.usefixtures("clean_dynamo")


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=ffn_fusion, options={"strict": True, **options})


def test_caches_hit_and_use_the_new_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second model has the first one's graph and other weights: nothing is compiled again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models, x = [stack(dtype=torch.float32, seed=seed) for seed in (1, 2)], tokens(dtype=torch.float32)
    found = []
    with torch.no_grad():
        for model in models:
            torch._dynamo.reset()
            counters.clear()
            assert_exact(compiled(model)(x), parallel_form(model, x), torch.float32)
            found.append((dict(counters["inductor"]), dict(counters["aot_autograd"])))
        assert error_of(models[0](x), models[1](x)) > 1e-2
    (inductor, aot), (inductor_again, aot_again) = found
    assert inductor["fxgraph_cache_miss"] == 1 and aot["autograd_cache_miss"] == 1
    assert not any("bypass" in name for name in (*inductor, *aot))
    assert aot_again["autograd_cache_hit"] == 1 and not aot_again.get("autograd_cache_miss")
    assert not inductor_again.get("fxgraph_cache_miss")


def test_training_step_with_dynamic_length() -> None:
    model, twin = (stack(Plain, nn.LayerNorm, dtype=torch.float32) for _ in range(2))
    run = compiled(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(2):
        x = tokens(dtype=torch.float32)
        run(x).square().mean().backward()
        parallel_form(twin, x).square().mean().backward()
        for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert one.grad is not None and error_of(one.grad, other.grad) < 2e-4, name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_exact(run(x), parallel_form(model, x), torch.float32)
    state = {name: value * 1.2 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert_exact(run(x), parallel_form(model, x), torch.float32)


def test_reduce_overhead_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    model, x = stack(count=2, dtype=torch.float32), tokens(dtype=torch.float32)
    run = torch.compile(model, backend=ffn_fusion, mode="reduce-overhead")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fxfusion"):
        assert_exact(run(x), parallel_form(model, x), torch.float32)
    assert not [record for record in caplog.records if record.name == "fxfusion"]
    assert len(last_reports()[-1].groups) == 1
