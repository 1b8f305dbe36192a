"""The model inside of what others wrapped around it, where it computes the same.

torch.compile(PeftModel(LlamaForCausalLM))  ->  LlamaForCausalLM, the adapters in its layers
"""

from __future__ import annotations

import sys
from typing import Any


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
