"""Train the reference model: a small Llama on the Python standard library's own source files.

    python -m bench.reference.train            # train (resumes by itself), then write bench/reference/model
    python -m bench.reference.train --export   # only write the newest checkpoint there
    python -m bench.reference.train --shape gpt2 --steps 400 --work W --output O     # the second family, in minutes

One CPU thread takes about an hour, a GPU minutes. Stop it at any time: the next start goes on from the newest
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from bench import reference as ref
from bench.show import render
from fxfusion.analysis.quality import Quality, evaluate
from fxfusion.files import whole

HERE = Path(__file__).parent
SEQUENCE, BATCH = 256, 8
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that drives singular values towards 1
_ITERATIONS = 5
HELD_OUT_BLOCKS = 32  # for the loss logged while training; the export measures on far more


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights. A checkpoint of another recipe is refused, unless only `steps` differs."""

    steps: int = 1300
    learning_rate: float = 3e-3
    final_fraction: float = 0.02
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    autocast: bool = True
    shape: str = "llama"

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to `final_fraction` of the peak."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz: about the nearest (semi-)orthogonal matrix to each of `[n, rows, columns]`."""
    a, b, c = _COEFFICIENTS
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x: Tensor = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.mT


class Muon(Optimizer):
    """Muon: momentum SGD (Nesterov) with orthogonal updates and decoupled weight decay, for matrices of hidden layers.

    Why not AdamW alone: in one run of each on the reference model (2,048 tokens a step; peak rates 3e-3 and 2e-3,
    neither tuned) 200 steps of Muon reached the held-out loss of 400 steps of AdamW, 4.58 to 4.57, at about 1.35 times
    the time a step. `torch.optim.Muon` goes one matrix at a time and in bfloat16, which some processors only emulate.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of the update is that of
    arXiv 2502.16982, so that learning rates and weight decays of AdamW fit.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters; those of one shape go together, which is far faster for small matrices."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                updates = orthogonalise(torch.stack([self._average(w, group["momentum"]) for w in weights]))
                # An orthogonal matrix has entries of rms max(shape) ** -0.5; updates of AdamW have about 0.2.
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.unbind()), alpha=scale)

    def _average(self, weight: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for embeddings and norm gains, which are no linear maps."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        is_embedding = any(word in name for word in ("embed", "wte", "wpe"))
        (matrices if weight.ndim == 2 and not is_embedding else others).append(weight)
    rate = recipe.learning_rate
    return [
        Muon(matrices, lr=rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class Trainer:
    """Model, optimizer and position in the recipe; everything that a checkpoint holds."""

    def __init__(self, recipe: Recipe, corpus: ref.Corpus, work: Path, device: str, compiled: bool) -> None:
        self.recipe, self.work, self.device = recipe, work, torch.device(device)
        self.step, self.seconds = 0, 0.0
        self.schedules = [[0, recipe.steps]]  # from which step on, length of the schedule
        model: nn.Module = ref.build_model(recipe.seed, recipe.shape)
        self.model = model.to(self.device)
        self.optimizers = build_optimizers(self.model, recipe)
        self.train_blocks = ref.blocks(corpus.train, SEQUENCE + 1, recipe.seed)
        self.held_out = ref.blocks(corpus.held_out, SEQUENCE + 1, recipe.seed)[:HELD_OUT_BLOCKS]
        self.loss: Callable[[Tensor], Tensor] = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, ids: Tensor) -> Tensor:
        """Mean next-token loss of `int64 [batch, SEQUENCE + 1]` ids, in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def _ids(self, rows: ref.TokenIds) -> Tensor:
        return torch.from_numpy(rows.astype("int64")).to(self.device)

    def advance(self) -> float:
        """One optimizer step; returns its training loss. The batch depends on the step number alone."""
        rate = self.recipe.rate(self.step)
        batches = len(self.train_blocks) // BATCH
        start = self.step % batches * BATCH
        loss = self.loss(self._ids(self.train_blocks[start : start + BATCH]))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean next-token loss in nats on the first held-out blocks."""
        rows = range(0, len(self.held_out), BATCH)
        losses = [float(self.loss(self._ids(self.held_out[row : row + BATCH]))) for row in rows]
        return sum(losses) / len(losses)

    def save(self) -> None:
        """Write the checkpoint; a crash while writing leaves the one before intact."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "schedules": self.schedules,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with whole(self.work / "checkpoint.pt") as scratch:
            torch.save(state, scratch)

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one; from there on, the schedule is that of this recipe.

        ValueError when a recipe made it that differs in more than its number of steps.
        """
        file = self.work / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location=self.device, weights_only=True)
        if {"shape": "llama"} | state["recipe"] | {"steps": self.recipe.steps} != asdict(self.recipe):
            raise ValueError(f"{file} is of another recipe ({state['recipe']}): delete it or use --work")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.schedules = state["step"], state["seconds"], state["schedules"]
        if self.schedules[-1][1] != self.recipe.steps:
            self.schedules.append([self.step, self.recipe.steps])


class Log:
    """The training log, a JSON object a line. Lines past the resumed step are dropped: they come again."""

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        file.write_text("".join(line + "\n" for line in kept))

    def add(self, record: dict[str, float]) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


@contextmanager
def progress_bar(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on the terminal; yields `update(done, text)`. Without a terminal the texts are printed."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        task = progress.add_task("compiling", total=total, completed=done)

        def update(step: int, text: str) -> None:
            progress.update(task, completed=step, description=text or None)
            if text and not progress.console.is_terminal:
                print(text, flush=True)

        yield update


def train(trainer: Trainer, stop_after: int, log_every: int, evaluate_every: int, save_every: int) -> None:
    """Run the recipe from the trainer's step up to `stop_after`, logging and saving on the way."""
    log, recipe, losses = Log(trainer.work / "log.jsonl", trainer.step), trainer.recipe, []
    earlier, started = trainer.seconds, time.perf_counter()
    last_step, last_time = trainer.step, started
    with progress_bar(recipe.steps, trainer.step) as update:
        while trainer.step < stop_after:
            rate = recipe.rate(trainer.step)
            losses.append(trainer.advance())
            now, step = time.perf_counter(), trainer.step
            trainer.seconds = earlier + now - started
            final, text = step in (recipe.steps, stop_after), ""
            if step % log_every == 0 or final:
                speed = (step - last_step) * BATCH * SEQUENCE / (now - last_time)
                record = {"step": step, "loss": round(sum(losses) / len(losses), 4), "lr": rate}
                record |= {"tokens_per_second": round(speed, 1), "seconds": round(trainer.seconds, 1)}
                if step % evaluate_every == 0 or final:
                    record["held_out_loss"] = round(trainer.held_out_loss(), 4)
                log.add(record)
                losses, text = [], " ".join(f"{key} {value:.5g}" for key, value in record.items())
                last_step, last_time = step, time.perf_counter()
            if step % save_every == 0 or final:
                trainer.save()
            update(step, text)


# --- the trained model, its tokenizer and the token ids for measurements -------------------------------

BLOCK, BLOCKS = 1024, 192  # 196,608 tokens each for measuring and for calibration: 0.8 MB as uint16 together


def export(work: Path, output: Path, corpus: ref.Corpus) -> Quality:
    """Write the checkpoint in `work` as a model to `output`; returns the held-out quality measured there.

    FileNotFoundError when `work` holds no checkpoint.
    """
    state = torch.load(work / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = ref.build_model(seed=0, shape=state["recipe"].get("shape", "llama"))
    model.load_state_dict(state["model"])
    model.bfloat16()
    model.save_pretrained(output)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer, bos_token=ref.END_OF_TEXT, eos_token=ref.END_OF_TEXT, model_max_length=BLOCK
    )
    tokenizer.save_pretrained(output)
    _write_ids(output / ref.HELD_OUT_FILE, corpus.held_out)
    _write_ids(output / ref.CALIBRATION_FILE, corpus.train)
    shutil.copyfile(work / "log.jsonl", output / "training_log.jsonl")
    quality = evaluate(ref.load_model(folder=output), ref.heldout_batches(folder=output), progress=True)
    parameters = sum(weight.numel() for weight in model.parameters())
    (output / "README.md").write_text(_readme(state, parameters, quality))
    print(json.dumps({"step": state["step"], **quality.to_dict()}))
    return quality


def _write_ids(file: Path, ids: ref.TokenIds) -> None:
    chosen = ref.blocks(ids, BLOCK, seed=1)[:BLOCKS]
    save_file({"input_ids": torch.from_numpy(chosen)}, file)


def _readme(state: dict[str, Any], parameters: int, quality: Quality) -> str:
    facts = {"state": state, "parameters": parameters, "quality": quality, "python": platform.python_version()}
    more = {"shape": state["recipe"].get("shape", "llama"), "schedule": _schedule(state["schedules"])}
    return render("reference_model.md.j2", {**facts, **more, "BLOCK": BLOCK, "BLOCKS": BLOCKS})


def _schedule(schedules: list[list[int]]) -> str:
    """The commands that repeat the run; more than one where the number of steps was changed on the way."""
    commands = [
        f"`--steps {steps} --stop-after {following}`"
        for (_, steps), (following, _) in zip(schedules, schedules[1:], strict=False)
    ]
    return "Options to repeat it: " + ", then ".join([*commands, f"`--steps {schedules[-1][1]}`"]) + "."


# --- the command ---------------------------------------------------------------------------------------


def bfloat16_is_fast(device: str) -> bool:
    """Whether the processor multiplies bfloat16 itself: emulated, a step took 2.7 times as long as in float32."""
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line; see `--help`."""
    defaults = Recipe()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="length of the whole schedule")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--shape", choices=ref.SHAPES, default=defaults.shape)
    parser.add_argument("--stop-after", type=int, help="stop early, on the schedule of --steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--autocast", action=yes_no, help="bfloat16 (default: where it is fast)")
    parser.add_argument("--compile", action=yes_no, default=True)
    parser.add_argument("--work", type=Path, default=HERE / "training", help="checkpoint, corpus, log")
    parser.add_argument("--output", type=Path, default=HERE / "model", help="the trained model")
    parser.add_argument("--log-every", type=int, default=10, help="steps per log line")
    parser.add_argument("--export", action="store_true", help="only export the newest checkpoint")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    autocast = bfloat16_is_fast(arguments.device) if arguments.autocast is None else arguments.autocast
    recipe = Recipe(arguments.steps, arguments.learning_rate, autocast=autocast, shape=arguments.shape)
    corpus = ref.load_corpus(arguments.work)
    print(f"{len(corpus.train):,} training tokens, {len(corpus.held_out):,} held-out tokens", flush=True)
    if not arguments.export:
        trainer = Trainer(recipe, corpus, arguments.work, arguments.device, arguments.compile)
        trainer.resume()
        stop = min(arguments.stop_after or recipe.steps, recipe.steps)
        train(trainer, stop, arguments.log_every, evaluate_every=10 * arguments.log_every, save_every=100)
        if stop < recipe.steps:
            return
    export(arguments.work, arguments.output, corpus)


if __name__ == "__main__":
    main()
