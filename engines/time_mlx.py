"""Speed of model folders in mlx-lm; usage: see `interleave.py`."""

from pathlib import Path

import mlx.core as mx
from interleave import PROMPT, Workloads, main
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from protocol import versions

NEW_TOKENS, PREFILL = 16, 32


def workloads(model) -> Workloads:
    prompt, text = mx.array(PROMPT), mx.array([PROMPT * (PREFILL // len(PROMPT))])

    def generate() -> list:
        return list(generate_step(prompt, model, max_tokens=NEW_TOKENS))

    def prefill() -> None:
        mx.eval(model(text))

    return {"generate, 1 sequence": (NEW_TOKENS, generate), f"prefill, {PREFILL} tokens": (PREFILL, prefill)}


if __name__ == "__main__":
    main(lambda folder, _: load_model(Path(folder))[0], workloads, versions("mlx", "mlx-lm"))
