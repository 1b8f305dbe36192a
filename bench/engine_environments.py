"""Scripts of `engines/`, run by the Python of an engine's own environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fxfusion.errors import FxFusionError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "engines"
_TAIL = 4000  # characters of a failed script's output


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
    caches = {"HF_HOME": str(scratch / "huggingface"), "VLLM_CACHE_ROOT": str(scratch / "vllm")}
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    # Threads wait for one another by spinning: where other processes use the cores too, a step then takes seconds.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [str(python_of(engine)), str(SCRIPTS / script), *map(str, arguments)]
    log = scratch / f"{Path(script).stem}.log"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM", "HF_"))}
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env={**kept, **settings, **threads, **caches},
                timeout=timeout,
                check=False,
            )
            problem = f"ended with exit code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            problem = f"took more than {timeout:.0f} seconds"
    if problem is not None:
        raise FxFusionError(f"{script} {problem}:\n{log.read_text('utf-8', 'replace')[-_TAIL:]}")
