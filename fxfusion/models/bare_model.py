"""The model inside of what others wrapped around it.

torch.compile(PeftModel(LlamaForCausalLM))  ->  LlamaForCausalLM
"""

from __future__ import annotations

import sys

from torch import nn

from fxfusion.errors import SurgeryError


def bare_model(model: nn.Module) -> nn.Module:
    """What has the decoder layers and their config, out of `torch.compile` and PEFT.

    Raises `SurgeryError` for wrappers that know the parameters of what they hold (DDP, FSDP, DeepSpeed), and for
    adapters that are no layers (prompts, prefixes).
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"{type(model).__name__} is no transformers model")
    if [name for name, _ in model.named_children()] == ["module"]:
        raise SurgeryError(
            f"{type(model).__name__} knows the parameters of the model inside, which is to be changed: "
            "take the model out (`.module`), change it, and wrap it anew"
        )
    if "peft" not in sys.modules:
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    prompts = [name for name, config in model.peft_config.items() if config.is_prompt_learning]
    if prompts:
        raise SurgeryError(f"adapter {prompts[0]!r} is a learned prompt for the model as it is: change the base model")
    inner: nn.Module = model.get_base_model()
    return getattr(inner, "_orig_mod", inner)
