"""A folder under plain transformers, in a process where fxfusion cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxfusion.checkpoints.nemotron_nas.export import save
from tests.fxfusion.checkpoints.nemotron_models import fused_decoder, ids, logits, off

CHILD = """
import json, sys
sys.modules["fxfusion"] = None
try:
    import fxfusion
except ImportError:
    pass
else:
    raise SystemExit("fxfusion can be imported")
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
folder, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
found = {"module": type(model).__module__}
with torch.no_grad():
    found["logits"] = model(tokens, use_cache=False).logits.tolist()
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        parts = (tokens[:, :4], *tokens[:, 4:].split(1, dim=1))
        steps = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
        found[type(cache).__name__] = torch.cat(steps, dim=1).tolist()
options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
found["greedy"] = model.generate(tokens, **options).tolist()
found["beams"] = model.generate(tokens, num_beams=3, **options).tolist()
print(json.dumps(found))
"""


@pytest.mark.slow  # 15 s: a process of its own
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_loads_it(tmp_path: Path, tied: bool) -> None:
    model, tokens = fused_decoder(tie_word_embeddings=tied), ids()
    save(model, tmp_path / "out", max_shard_size="300KB")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "out"), json.dumps(tokens.tolist())],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules.")
    expected = logits(model)
    assert off(torch.tensor(found["logits"]), expected) < 1e-5
    for cache in ("DynamicCache", "StaticCache"):
        assert off(torch.tensor(found[cache]), expected) < 1e-4
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert found["greedy"] == model.generate(tokens, **options).tolist()
    assert found["beams"] == model.generate(tokens, num_beams=3, **options).tolist()
    assert off(torch.tensor(found["logits"]), logits(fused_decoder(seed=1))) > 1e-2
