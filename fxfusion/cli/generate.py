"""`fxfusion generate MODEL_DIR --prompt TEXT`: text from a model folder, fused as its plan says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fxfusion.cli.conversion import Conversion, Plan, converting
from fxfusion.cli.options import ModelDir, Seed
from fxfusion.errors import OptionError

Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="May be repeated.", show_default=False)
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write for each prompt, at most.")]
Beams = Annotated[int, typer.Option(min=1, help="1 is greedy.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 does not sample.")]
Cache = Annotated[str, typer.Option(help="dynamic or static.")]
Draft = Annotated[
    Path | None, typer.Option(metavar="MODEL_DIR", help="A model that guesses ahead (assisted decoding).")
]


@converting
def command(
    run: Conversion,
    model_dir: ModelDir,
    prompt: Prompt = None,
    plan: Plan = None,
    new_tokens: NewTokens = 64,
    beams: Beams = 1,
    temperature: Temperature = 0.0,
    cache: Cache = "dynamic",
    draft: Draft = None,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Continue prompts with the model of a folder: canonical, nemotron-nas, or any model of transformers.

    With --plan the model is fused by that plan first; with --draft the text is the same, and the draft guesses it.
    """
    if not prompt:
        raise OptionError("--prompt: give the text to continue")
    if cache not in ("dynamic", "static"):
        raise OptionError(f"--cache: expected dynamic or static, got {cache!r}")
    import torch

    from fxfusion.cli.inputs import load_tokenizer
    from fxfusion.models.ffn_surgery.fuse import fuse
    from fxfusion.plan import FusionPlan

    chosen = None if plan is None else FusionPlan.load(plan)
    tokenizer = load_tokenizer(model_dir)
    model = run.load(model_dir)
    if chosen is not None:
        with run.screen.busy("fusing"):
            fuse(model, chosen)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": temperature > 0}
    settings |= {"temperature": temperature} if temperature > 0 else {}
    settings |= {"cache_implementation": "static"} if cache == "static" else {}
    if draft is not None:
        settings["assistant_model"] = run.load(draft)
    texts = []
    for text in prompt:
        torch.manual_seed(seed)
        texts.append(_continue(run, model, tokenizer, text, settings))
    return {"model": str(model_dir), "plan": None if plan is None else str(plan), "texts": texts}


def _continue(run: Conversion, model: Any, tokenizer: Any, text: str, settings: dict[str, Any]) -> dict[str, Any]:
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise OptionError(f"--prompt: {text!r} has no tokens")
    start = time.perf_counter()
    with run.screen.busy("writing"):
        ids = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **settings)
    seconds = time.perf_counter() - start
    written = ids[0, length:].tolist()
    continuation = tokenizer.decode(written, skip_special_tokens=True)
    run.screen.line(text, "dim")
    run.screen.line(continuation)
    return {"prompt": text, "text": continuation, "tokens": written, "seconds": seconds}
