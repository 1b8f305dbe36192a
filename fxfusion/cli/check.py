"""`fxfusion check MODEL`: is a model folder or file whole, and does it compute what it says?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxfusion.cli.fuse import engines_of, say_engines
from fxfusion.cli.options import check_model
from fxfusion.cli.session import Conversion, command
from fxfusion.errors import FxFusionError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 8  # times the dtype's epsilon: attention over stored keys is summed in another order

Verdict = tuple[bool, str]


@command
def check(run: Conversion) -> dict[str, Any]:
    """Check a model folder or GGUF file: files, tensors, plan, logits, cache; exit code 1 where something is wrong.

    Nothing of the folder is trusted: no pickle is read and no code of it is run. Of a folder with a plan, the fused
    model is compared with the parallel form of its members. Of a nemotron-nas folder, says which engines load it; of a
    GGUF file, what its layers are (one of architecture deci runs in llama.cpp alone).
    """
    check_model(run.model_dir)
    planned, rows = _checks(run), list[dict[str, Any]]()
    result: dict[str, Any] = {"model": str(run.model_dir)}
    if run.dry_run:
        run.screen.line(f"would check: {', '.join(planned)}")
        return result | {"dry_run": True, "would_check": list(planned)}
    for what, check in planned.items():
        try:
            good, detail = check()
        except FxFusionError as error:
            good, detail = False, first_line(error)
        run.screen.verdict(good, f"{what}: {detail}")
        rows.append({"what": what, "good": good, "detail": detail})
        if not good:  # what follows needs it
            run.exit_code = 1
            return result | {"good": False, "checks": rows}
    engines = engines_of(run.model_dir)
    say_engines(run.screen, engines)
    return result | {"good": True, "checks": rows, "engines": engines or None}


def _checks(run: Conversion) -> dict[str, Callable[[], Verdict]]:
    """What can be checked of a folder, one after the other; each needs those before it."""
    from fxfusion.checkpoints.gguf.header import GgufFile, is_gguf
    from fxfusion.checkpoints.gguf.layers import ARCHITECTURES
    from fxfusion.cli.inputs import lists_layers, stored_plan

    folder = _Folder(run)
    found = {"files": folder.files, "loads": folder.loads, "computes": folder.computes, "cache": folder.caches}
    if is_gguf(run.model_dir):
        kind = GgufFile.read(run.model_dir).architecture
        layers = {"layers": folder.layers} if kind in ARCHITECTURES else {}
        return {"files": folder.files} | layers | ({} if kind == "deci" else found)
    plan = stored_plan(run.model_dir)
    has_members = plan is not None and plan.groups and not lists_layers(run.model_dir)
    return found | ({"fused": lambda: folder.fuses(plan)} if has_members else {})


@dataclass(slots=True)
class _Folder:
    run: Conversion
    model: Any = None
    ids: Any = None
    logits: Any = None

    def files(self) -> Verdict:
        from fxfusion.checkpoints.gguf.header import GgufFile, is_gguf
        from fxfusion.checkpoints.reading import CheckpointReader

        path = self.run.model_dir
        stored = GgufFile.read(path).tensors if is_gguf(path) else CheckpointReader.open(path).stored.values()
        return True, f"{len(stored)} tensors, {sum(one.nbytes for one in stored) / 2**20:,.1f} MiB"

    def layers(self) -> Verdict:
        """Of a GGUF file, as its header has them."""
        from fxfusion.checkpoints.gguf.header import GgufFile
        from fxfusion.checkpoints.gguf.layers import layers_of, rows_of

        file = GgufFile.read(self.run.model_dir)
        found = layers_of(file)
        self.run.screen.table(("layers", "heads", "key-value heads", "FFN"), rows_of(found))
        return True, f"{len(found)} of {file.architecture}, numbers as tensors have them"

    def loads(self) -> Verdict:
        self.model = self.run.load()
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        return True, f"{type(self.model).__name__}, {layers} layers, {self.model.dtype}".replace("torch.", "")

    def computes(self) -> Verdict:
        from fxfusion.models.surgery_proof import full_logits, proof_tokens

        self.ids = proof_tokens(self.model)
        self.logits = full_logits(self.model, self.ids)
        good = bool(self.logits.isfinite().all())
        return good, f"logits of {self.ids.numel()} tokens are {'' if good else 'not '}finite"

    def caches(self) -> Verdict:
        from fxfusion.models.surgery_proof import cached_logits

        try:
            decoded = cached_logits(self.model, self.ids)
        except Exception as error:
            raise FxFusionError(f"decoding with a cache fails: {error}") from error
        if decoded is None:
            return True, "the model has none"
        good, words = self._against(decoded)
        return good, f"decoding token by token is {words}"

    def fuses(self, plan: Any) -> Verdict:
        """The fused model as it was read against one that is fused, and proved, from the members."""
        from fxfusion.models.ffn_surgery.fuse import fuse
        from fxfusion.models.surgery_proof import full_logits, relative

        again = self.run.load(fused=False)
        members = full_logits(again, self.ids)
        fuse(again, plan)
        good, words = self._against(full_logits(again, self.ids), " from what `fuse` makes and proves")
        price = relative(self.logits, members)
        return good, f"{words}; that is off by {price:.1g} from the model without fusion"

    def _against(self, logits: Tensor, what: str = "") -> Verdict:
        import torch

        from fxfusion.models.surgery_proof import relative

        off, limit = relative(logits, self.logits), _ROUNDING * torch.finfo(self.logits.dtype).eps
        return off <= limit, f"off by {off:.1g}{what} (allowed {limit:.1g})"
