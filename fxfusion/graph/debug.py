"""FXFUSION_DEBUG: one ladder of detail, and the dumps it writes.

| value | shows |
|---|---|
| 1 | one line per pass, one summary per graph |
| 2 | also every refusal |
| 3 | also each graph before and after each pass, as files under `fxfusion_debug/`, in a new folder for each graph |
| 4 | also every candidate that the matcher looked at |

Each level includes those below it. Graph dumps also go to torch's structured trace, where `tlparse`
shows them, at level 3 or whenever `TORCH_TRACE` is set.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from fxfusion.errors import OptionError
from fxfusion.graph.torch_private import emit_artifact

if TYPE_CHECKING:
    from torch import fx

    from fxfusion.graph.pass_base import PassRecord

log = logging.getLogger("fxfusion")

_folders: weakref.WeakKeyDictionary[fx.GraphModule, tuple[str, Path]] = weakref.WeakKeyDictionary()
_serial = count(1)


def level() -> int:
    """The ladder's step, read afresh at each call so that a notebook can change it."""
    text = os.environ.get("FXFUSION_DEBUG", "0") or "0"
    if text not in {"0", "1", "2", "3", "4"}:
        raise OptionError(f"FXFUSION_DEBUG: expected 0, 1, 2, 3 or 4, got {text!r}")
    return int(text)


def show(at: int, message: str) -> None:
    """Print a line when the ladder stands at `at` or higher; always offered to `logging` at DEBUG."""
    log.debug(message)
    if level() >= at:
        print(f"fxfusion: {message}", flush=True)


def log_pass(record: PassRecord) -> None:
    kind = "exact" if record.exact else "approximate"
    show(
        1,
        f"{record.name:<22} {kind:<11} changed {record.changed:>4}  "
        f"nodes {record.nodes_before} -> {record.nodes_after}  {record.seconds * 1e3:.1f} ms",
    )


def dump_graph(gm: fx.GraphModule, title: str) -> None:
    """Write the graph as text, at level 3 or when a structured trace is being recorded."""
    to_file = level() >= 3
    if not to_file and not os.environ.get("TORCH_TRACE"):
        return
    text = str(gm.graph)
    emit_artifact(f"fxfusion_{title}", text)
    if to_file:
        (_folder_of(gm) / f"{title}.txt").write_text(text, encoding="utf-8")


def _folder_of(gm: fx.GraphModule) -> Path:
    """A new folder for each graph, whatever is there already."""
    root = os.environ.get("FXFUSION_DEBUG_DIR", "fxfusion_debug")
    found = _folders.get(gm)
    if found is None or found[0] != root:
        os.makedirs(root, exist_ok=True)
        found = _folders[gm] = (root, Path(tempfile.mkdtemp(prefix=f"graph_{next(_serial):04}_", dir=root)))
    return found[1]
