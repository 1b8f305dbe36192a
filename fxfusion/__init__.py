"""FFN Fusion (arXiv 2503.18908) for torch.fx and torch.compile.

    from fxfusion import ffn_fusion
    compiled = torch.compile(model, backend=ffn_fusion)

Public names only; each is imported when it is first used, so that `import fxfusion` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfusion.analysis.dependency import dependency_matrix
    from fxfusion.analysis.generation import greedy_agreement
    from fxfusion.analysis.quality import evaluate
    from fxfusion.analysis.scores import attention_scores
    from fxfusion.analysis.texts import batches_from_text
    from fxfusion.backend import ffn_fusion, last_reports, refresh
    from fxfusion.checkpoints.api import from_pretrained, save_pretrained
    from fxfusion.compiler.pipeline import explain, fuse_graph
    from fxfusion.errors import FxFusionError, Refusal, RefusalCode
    from fxfusion.models.drop_attention import drop_attention
    from fxfusion.models.ffn_surgery.fuse import fuse
    from fxfusion.models.ffn_surgery.unfuse import unfuse
    from fxfusion.plan.fusion_plan import FusionPlan
    from fxfusion.plan.policy import FusionPolicy
    from fxfusion.planning.make_plan import make_plan
    from fxfusion.planning.sweep import sweep
    from fxfusion.recovery.recover import recover
    from fxfusion.recovery.refit import refit
    from fxfusion.report import FusionReport

__version__ = "0.1.0"

_HOME = {
    "attention_scores": "fxfusion.analysis.scores",
    "batches_from_text": "fxfusion.analysis.texts",
    "dependency_matrix": "fxfusion.analysis.dependency",
    "drop_attention": "fxfusion.models.drop_attention",
    "evaluate": "fxfusion.analysis.quality",
    "fuse": "fxfusion.models.ffn_surgery.fuse",
    "greedy_agreement": "fxfusion.analysis.generation",
    "make_plan": "fxfusion.planning.make_plan",
    "sweep": "fxfusion.planning.sweep",
    "unfuse": "fxfusion.models.ffn_surgery.unfuse",
    "ffn_fusion": "fxfusion.backend",
    "last_reports": "fxfusion.backend",
    "refresh": "fxfusion.backend",
    "from_pretrained": "fxfusion.checkpoints.api",
    "save_pretrained": "fxfusion.checkpoints.api",
    "FxFusionError": "fxfusion.errors",
    "Refusal": "fxfusion.errors",
    "RefusalCode": "fxfusion.errors",
    "explain": "fxfusion.compiler.pipeline",
    "fuse_graph": "fxfusion.compiler.pipeline",
    "FusionPlan": "fxfusion.plan.fusion_plan",
    "FusionPolicy": "fxfusion.plan.policy",
    "FusionReport": "fxfusion.report",
    "recover": "fxfusion.recovery.recover",
    "refit": "fxfusion.recovery.refit",
}

__all__ = [
    "FusionPlan",
    "FusionPolicy",
    "FusionReport",
    "FxFusionError",
    "Refusal",
    "RefusalCode",
    "attention_scores",
    "batches_from_text",
    "dependency_matrix",
    "drop_attention",
    "evaluate",
    "explain",
    "ffn_fusion",
    "from_pretrained",
    "fuse",
    "fuse_graph",
    "greedy_agreement",
    "last_reports",
    "make_plan",
    "recover",
    "refit",
    "refresh",
    "save_pretrained",
    "sweep",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("testing", "cost", "analysis", "planning", "models"):
        return import_module(f"fxfusion.{name}")
    raise AttributeError(f"module 'fxfusion' has no attribute {name!r}")
