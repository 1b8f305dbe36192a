"""The model inside of what others wrapped around it, where it computes the same.

torch.compile(PeftModel(model))  ->  model, the adapters in its layers
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The same model by its own names, out of `torch.compile` and PEFT; anything else as it is."""
    model = getattr(model, "_orig_mod", model)
    if "peft" not in sys.modules:
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel) or learned_prompts(model):
        return model
    inner = model.get_base_model()
    return getattr(inner, "_orig_mod", inner)


def learned_prompts(model: Any) -> list[str]:
    """Names of a PEFT model's adapters that are no part of the model inside."""
    return [name for name, config in getattr(model, "peft_config", {}).items() if config.is_prompt_learning]


def offloaded(model: Any) -> str:
    """A sentence where weights come only while their module is called (accelerate's offload to CPU or disk): they are
    on the meta device, beside others that are not, or under a `forward` of the instance. Else empty."""
    if not isinstance(model, nn.Module):
        return ""
    found = {name: value.is_meta for name, value in model.named_parameters()}
    missing = [name for name, is_meta in found.items() if is_meta]
    hooked = any("forward" in vars(model.get_submodule(name.rpartition(".")[0])) for name in missing)
    if not missing or (len(missing) == len(found) and not hooked):
        return ""
    return f"{len(missing)} of {len(found)} weights are not there ({missing[0]} is on the meta device: offloaded?)"
