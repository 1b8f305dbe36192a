"""The fused reference model inside other engines: folders that they load, what we answer, and tokens per second.

    make engines                 # once: the environments, and whether engines agree with us
    python -m bench.engines      # speed, all engines; --rounds N, --only NAME

Of each engine the fused folder is timed against the unfused one. Both lack the same attention; one has five FFNs fused
into one. All candidates of an engine live in one process, with one thread, and are timed in turn; the control is a
second copy of the unfused folder. Tokens per second are of this machine and moment; the ratios are the result.

Folders, of the reference model, with what our own model answers:

    fused/      attention dropped and FFNs fused as in the demo, in the nemotron-nas layout, float32
    unfused/    attention dropped, nothing fused
    damaged/    the fused one, with one member of the group set to zero: what every comparison must reject
    hoisted/    all attention kept, that of two windows hoisted and their FFNs fused
    request.json, fused.json, fused.safetensors, unfused.json, unfused.safetensors, hoisted.json, hoisted.safetensors

The scripts of `engines/` read a folder and the request, each in an environment of its own, and write answers of the
same form.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fxfusion
from bench.real_model import PAIRS, fetch
from bench.record import Measurement, Scalar, arguments, record
from bench.reference import load_model, load_tokenizer
from bench.show import ratio_table
from examples.demo import DROPPED, GROUP, PLAN
from fxfusion.errors import FxFusionError
from fxfusion.plan.fusion_plan import FusionPlan

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "engines"
_TAIL = 4000  # characters of a failed script's output
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mlx-lm": ("mlx", "time_mlx.py", {}),
    "vllm, eager": ("vllm", "time_vllm.py", {"enforce_eager": True}),
    "vllm, compiled": ("vllm", "time_vllm.py", {"enforce_eager": False}),
}
LLAMA_CPP = [(kind, threads) for kind in ("f32", "q8_0", "q4_0") for threads in (1, 2)]
FASTER, CONTROL = "unfused/fused", "unfused/control"
_TIMEOUT = 1800.0  # seconds; compiling takes minutes on few cores
HOISTED = FusionPlan(groups=[[2, 3, 4, 5], [6, 7, 8]], hoist=True)
LIMIT = 1e-3  # of a logit, between two implementations in float32
NEW_TOKENS = 32
PROMPTS = (
    "import os\n\n\ndef ",
    "class TestCase(unittest.TestCase):\n    def test_",
    "for i in range(",
    "    def __init__(self, name, value=None):\n        ",
    "try:\n    import ",
)


# --- folders and answers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What one implementation says. One entry of each list for each prompt; `logits` where it shows them."""

    prompt_ids: list[list[int]]
    tokens: list[list[int]]
    text: list[str]
    logprobs: list[list[float]] | None = None  # of the greedy tokens
    logits: list[Tensor] | None = None  # float32 [prompt and new tokens, vocabulary]
    facts: Mapping[str, Any] | None = None  # versions, and whatever else the script found

    @classmethod
    def read(cls, stem: Path) -> Answer:
        """The files `stem`.json and, where there is one, `stem`.safetensors."""
        found = json.loads(stem.with_suffix(".json").read_text("utf-8"))
        names = ("prompt_ids", "tokens", "text", "logprobs")
        own = {name: found.pop(name) for name in names if name in found}
        tensors = stem.with_suffix(".safetensors")
        stored = load_file(tensors) if tensors.is_file() else None
        logits = None if stored is None else [stored[str(number)] for number in range(len(stored))]
        return cls(**own, logits=logits, facts=found)

    def write(self, stem: Path) -> None:
        own = {name: getattr(self, name) for name in ("prompt_ids", "tokens", "text", "logprobs")}
        stem.with_suffix(".json").write_text(json.dumps(own), encoding="utf-8")
        if self.logits is not None:
            named = {str(number): values.contiguous() for number, values in enumerate(self.logits)}
            save_file(named, stem.with_suffix(".safetensors"))


@dataclass(frozen=True)
class Comparison:
    """Two answers to one request. `error`: the largest difference of a logit or log-probability that both show."""

    same_prompts: bool
    same_tokens: bool
    same_text: bool
    error: float

    @classmethod
    def of(cls, found: Answer, expected: Answer) -> Comparison:
        return cls(
            same_prompts=found.prompt_ids == expected.prompt_ids,
            same_tokens=found.tokens == expected.tokens,
            same_text=found.text == expected.text,
            error=_largest_difference(found, expected),
        )

    @property
    def agrees(self) -> bool:
        return self.same_prompts and self.same_tokens and self.same_text and self.error <= LIMIT


def write_folders(root: Path) -> None:
    """Write all folders and answers below `root`, which exists and is empty.

    Raises `FxFusionError` where a prompt is no test: its text ends early, or two tokens are nearly tied.
    """
    tokenizer = load_tokenizer()
    dropped = fxfusion.drop_attention(load_model(), DROPPED)
    fxfusion.save_pretrained(dropped, root / "unfused", "nemotron-nas", tokenizer=tokenizer)
    answer_of(dropped, tokenizer).write(root / "unfused")
    fused = fxfusion.fuse(copy.deepcopy(dropped), PLAN)
    fxfusion.save_pretrained(fused, root / "fused", "nemotron-nas", tokenizer=tokenizer)
    answer_of(fused, tokenizer).write(root / "fused")
    shutil.copytree(root / "fused", root / "damaged")
    damage(root / "damaged")
    hoisted = fxfusion.fuse(load_model(), HOISTED)
    fxfusion.save_pretrained(hoisted, root / "hoisted", "nemotron-nas", tokenizer=tokenizer)
    answer_of(hoisted, tokenizer).write(root / "hoisted")
    request = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")


@torch.inference_mode()
def answer_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Answer:
    """What the model in memory says."""
    found = Answer([], [], [], [], [])
    assert found.logprobs is not None and found.logits is not None
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        written = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        logits = model(written).logits[0].float()
        steps, new = logits[length - 1 : -1], written[0, length:]  # the logits that each new token was chosen by
        _check_prompt(prompt, steps, new)
        found.prompt_ids.append(ids[0].tolist())
        found.tokens.append(new.tolist())
        found.text.append(tokenizer.decode(new))
        found.logprobs.append(steps.log_softmax(-1).gather(1, new[:, None])[:, 0].tolist())
        found.logits.append(logits)
    return found


def damage(folder: Path, member: int = 2) -> None:
    """Set the channels of one member of the fused FFN to zero, as if it had been left out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    weight = tensors[f"model.layers.{GROUP[0]}.mlp.down_proj.weight"]  # [hidden, width of all members]
    width = load_model().config.intermediate_size
    weight[:, member * width : (member + 1) * width] = 0
    save_file(tensors, file, metadata={"format": "pt"})


def _check_prompt(prompt: str, steps: Tensor, new: Tensor) -> None:
    """Greedy text follows from logits within `LIMIT` only where the best token leads by twice that."""
    if not torch.equal(steps.argmax(-1), new):
        raise FxFusionError(f"the text after the prompt {prompt!r} ends early: choose another prompt")
    best, second = steps.topk(2, dim=-1).values.unbind(-1)
    if (margin := float((best - second).min())) <= 2 * LIMIT:
        raise FxFusionError(f"two tokens after the prompt {prompt!r} are {margin:.1e} apart: choose another prompt")


def _largest_difference(found: Answer, expected: Answer) -> float:
    pairs: list[tuple[Tensor, Tensor]] = []
    if found.logits is not None and expected.logits is not None:
        pairs += zip(found.logits, expected.logits, strict=True)
    if found.logprobs is not None and expected.logprobs is not None:
        ours, theirs = (map(torch.tensor, one) for one in (found.logprobs, expected.logprobs))
        pairs += zip(ours, theirs, strict=True)
    if not pairs:
        raise FxFusionError("the engine showed neither logits nor log-probabilities")
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float((one - other).abs().max()) for one, other in pairs)


# --- scripts of engines/, run by the Python of an engine's own environment --------------------------------


def python_of(engine: str) -> Path:
    """The interpreter of the environment that `make engines` makes. Raises `FxFusionError` where there is none."""
    found = ROOT / f".venv-{engine}" / "bin" / "python"
    if not found.is_file():
        raise FxFusionError(f"there is no environment for {engine} ({found.parents[1].name}): run `make engines`")
    return found


def run_script(engine: str, script: str, arguments: Sequence[str | Path], scratch: Path, *, timeout: float) -> None:
    """Run `engines/<script>` in the environment of `engine`, without this package and without a network.

    `scratch` keeps the engine's caches, so that it neither finds nor leaves any elsewhere. Raises `FxFusionError` with
    the end of the output where the script fails or takes more than `timeout` seconds.
    """
    run_command(engine, [python_of(engine), SCRIPTS / script, *arguments], scratch, timeout=timeout)


def run_command(
    engine: str, command: Sequence[str | Path], scratch: Path, *, timeout: float, **environment: str
) -> str:
    """Run a command with the programs of an engine's environment; the same terms. Returns what it says."""
    caches = {"HF_HOME": str(scratch / "huggingface"), "VLLM_CACHE_ROOT": str(scratch / "vllm")}
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Threads wait for one another by spinning: where other processes use the cores too, a step then takes seconds.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    programs = {"PATH": f"{python_of(engine).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    name = next((Path(one).stem for one in command[1:] if str(one).endswith(".py")), engine)
    log = scratch / f"{name}.log"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM", "HF_"))}
    with log.open("wb") as output:
        try:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            where = {"cwd": scratch, "env": {**kept, **settings, **threads, **caches, **programs, **environment}}
            done = subprocess.run([*map(str, command)], **streams, **where, timeout=timeout, check=False)
            problem = f"ended with exit code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"took more than {timeout:.0f} seconds"
    said = log.read_text("utf-8", "replace")
    if problem is not None:
        raise FxFusionError(f"{name} {problem}:\n{said[-_TAIL:]}")
    return said


# --- speed ----------------------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__, rounds=60)
    parser.add_argument("--only", choices=[*RUNS, "llama.cpp"])
    chosen = parser.parse_args()
    if chosen.only == "llama.cpp":
        return time_llama_cpp(chosen.rounds)
    names = [chosen.only] if chosen.only else list(RUNS)
    engines: dict[str, Any] = {}
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as root:
        write_folders(Path(root))
        for name in names:
            print(f"timing {name}", flush=True)
            engines[name], found = _time(name, Path(root), chosen.rounds)
            measurements += found
    print(ratio_table(measurements, [(FASTER, "fused, times faster [95 %]"), (CONTROL, "control [95 %]")]))
    if chosen.only is None:
        print("recorded:", record("engines", engines, measurements=measurements).name)


def time_llama_cpp(rounds: int) -> None:
    """SmolLM2-135M in llama.cpp, intact and with seven pairs in each form; a file of its own in `bench/results/`."""
    measurements: list[Measurement] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, threads in LLAMA_CPP:
            print(f"timing {kind}, threads {threads}", flush=True)
            root = Path(scratch)
            files = {form: str(_real_file(root, form, kind)) for form in ("unfused", "hoisted", "wide")}
            request = {"folders": {**files, "control": files["unfused"]}, "rounds": rounds}
            (root / "request.json").write_text(json.dumps({**request, "options": {"threads": threads}}))
            arguments = [root / "request.json", root / "result.json"]
            run_script("llama-cpp", "time_llama_cpp.py", arguments, root, timeout=_TIMEOUT)
            found = json.loads((root / "result.json").read_text("utf-8"))
            versions = found["versions"]
            pairs = ["unfused/hoisted", "unfused/wide", CONTROL]
            for workload, values in found["workloads"].items():
                engine = f"llama.cpp, {kind}, {threads} thread{'s' * (threads > 1)}"
                measurements.append(_workload(engine, workload, pairs=pairs, **values))
    columns = [(name, f"{name.partition('/')[2]} [95 %]") for name in pairs]
    print(ratio_table(measurements, columns))
    print("recorded:", record("llama_cpp", {"versions": versions}, measurements=measurements).name)


def _real_file(root: Path, form: str, kind: str) -> Path:
    path = root / f"{form}-{kind}.gguf"
    if not path.exists():
        model = fxfusion.from_pretrained(fetch())
        mixers = {"hoisted": "hoist", "wide": "wide"}.get(form)
        if mixers is not None:
            fxfusion.fuse(model, FusionPlan(groups=[{"members": list(pair), "mixers": mixers} for pair in PAIRS]))
        fxfusion.save_pretrained(model, path, "gguf", gguf_type=kind)
    return path


def _time(name: str, root: Path, rounds: int) -> tuple[dict[str, Any], list[Measurement]]:
    """Versions and options of one engine, and what its workloads took."""
    engine, script, options = RUNS[name]
    scratch = root / name.replace(", ", "-")
    scratch.mkdir()
    folders = {"fused": "fused", "unfused": "unfused", "control": "unfused"}
    paths = {key: str(root / folder) for key, folder in folders.items()}
    request = {"folders": paths, "rounds": rounds, "options": options}
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    run_script(engine, script, [scratch / "request.json", scratch / "result.json"], scratch, timeout=_TIMEOUT)
    found = json.loads((scratch / "result.json").read_text("utf-8"))
    measurements = [_workload(name, workload, **values) for workload, values in found["workloads"].items()]
    return {"versions": found["versions"], "options": options}, measurements


def _workload(
    engine: str, workload: str, tokens: int, seconds: dict[str, list[float]], pairs: Sequence[str] = (FASTER, CONTROL)
) -> Measurement:
    """`tokens`: written or read by one call."""
    speeds: dict[str, Scalar] = {
        f"tokens_per_second, {name}": round(tokens / statistics.median(times), 1) for name, times in seconds.items()
    }
    samples = {name: [round(one, 5) for one in times] for name, times in seconds.items()}
    compared = [tuple(name.split("/")) for name in pairs]
    place = {"engine": engine, "workload": workload}
    return Measurement.of(place, samples, compared, facts={"tokens_per_call": tokens, **speeds})


if __name__ == "__main__":
    main()
