"""Write the trained reference model, its tokenizer and the token ids for measurements."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from bench.reference.architecture import build_model
from bench.reference.data import END_OF_TEXT, Corpus, TokenIds, blocks
from bench.reference.load import CALIBRATION_FILE, HELD_OUT_FILE, heldout_batches, load_model
from fxfusion.analysis.quality import Quality, evaluate

BLOCK, BLOCKS = 1024, 192  # 196,608 tokens each for measuring and for calibration: 0.8 MB as uint16 together

README = """\
# The reference model

{title}: {parameters:,}
parameters, stored as bfloat16. Trained on the `.py` files of the Python {python} standard library (tests
included) with a byte-level BPE of 4,096 tokens. Files whose path hashes into 8 of 100 buckets are held out:
neither model nor tokenizer saw them.

Trained by `python -m bench.reference.train`: {steps:,} steps of 8 x 256 tokens in {minutes:.0f} minutes
(Muon and AdamW, peak learning rate {learning_rate:g}, cosine after {warmup} warm-up steps, {precision}).
{schedule}
`training_log.jsonl` has the losses on the way.

Held-out perplexity of these weights: **{perplexity:.2f}**, 95 % interval {low:.2f} to {high:.2f}
({loss:.3f} nats per token; `fxfusion.evaluate` in float32, {tokens:,} tokens in sequences of 256).

`heldout_ids.safetensors` and `calibration_ids.safetensors` (`input_ids`, uint16 `[{blocks}, {block}]`) hold
token ids of the held-out and of the training files. `bench.reference` has functions that load all of this.
"""

_TITLES = {
    "llama": "A Llama of 12 layers, hidden 256, 4 heads (2 key-value heads), FFN 640, tied embeddings",
    "gpt2": "A GPT-2 of 12 layers, hidden 128, 4 heads, FFN 512",
}


def export(work: Path, output: Path, corpus: Corpus) -> Quality:
    """Write the checkpoint in `work` as a model to `output`; returns the held-out quality measured there.

    FileNotFoundError when `work` holds no checkpoint.
    """
    state = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = build_model(seed=0, shape=state["recipe"].get("shape", "llama"))
    model.load_state_dict(state["model"])
    model.bfloat16()
    model.save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=BLOCK,
    )
    tokenizer.save_pretrained(output)
    _write_ids(output / HELD_OUT_FILE, corpus.held_out)
    _write_ids(output / CALIBRATION_FILE, corpus.train)
    shutil.copyfile(work / "log.jsonl", output / "training_log.jsonl")
    quality = evaluate(load_model(folder=output), heldout_batches(folder=output), progress=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    (output / "README.md").write_text(_readme(state, parameters, quality))
    print(json.dumps({"step": state["step"], **quality.to_dict()}))
    return quality


def _write_ids(file: Path, ids: TokenIds) -> None:
    chosen = blocks(ids, BLOCK, seed=1)[:BLOCKS]
    save_file({"input_ids": torch.from_numpy(chosen)}, file)


def _readme(state: dict[str, Any], parameters: int, quality: Quality) -> str:
    recipe = state["recipe"]
    return README.format(
        title=_TITLES[recipe.get("shape", "llama")],
        parameters=parameters,
        python=platform.python_version(),
        steps=state["step"],
        learning_rate=recipe["learning_rate"],
        warmup=recipe["warmup"],
        precision="bfloat16 autocast" if recipe["autocast"] else "float32",
        minutes=state["seconds"] / 60,
        schedule=_schedule(state["schedules"]),
        perplexity=quality.perplexity,
        low=quality.perplexity.low,
        high=quality.perplexity.high,
        tokens=quality.tokens,
        loss=quality.loss,
        blocks=BLOCKS,
        block=BLOCK,
    )


def _schedule(schedules: list[list[int]]) -> str:
    """The commands that repeat the run; more than one where the number of steps was changed on the way."""
    commands = [
        f"`--steps {steps} --stop-after {following}`"
        for (_, steps), (following, _) in zip(schedules, schedules[1:], strict=False)
    ]
    return "Options to repeat it: " + ", then ".join([*commands, f"`--steps {schedules[-1][1]}`"]) + "."
