"""The command line of the scripts beside this file, which run inside an engine's own environment.

    python in_ENGINE.py REQUEST.json ANSWERS MODEL_FOLDER...

REQUEST.json is {"prompts": [...], "new_tokens": N, "options": {...}}. For each folder writes ANSWERS/NAME.json with
"prompt_ids", "tokens" (greedy), "text", where there are any "logprobs" (of those tokens), and facts of the engine;
and, where the engine shows them, ANSWERS/NAME.safetensors with the logits "0", "1", ... of the prompts, float32
[prompt and new tokens, vocabulary]. `bench/engines.py` reads both.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(answer: Callable[[str, dict], tuple[dict, dict]], save_file: Callable[[dict, str], Any] | None = None) -> None:
    """Answer for each folder. `answer(folder, request)` returns what goes into the two files."""
    request, answers = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    for folder in sys.argv[3:]:
        found, logits = answer(folder, request)
        name = Path(folder).stem  # of a file without its ending
        if save_file is not None:
            save_file(logits, str(answers / f"{name}.safetensors"))
        (answers / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
        print("answered for", name, flush=True)


def versions(*distributions: str) -> dict:
    return {"versions": {name: version(name) for name in distributions}}
