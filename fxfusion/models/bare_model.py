"""The model inside of what others wrapped around it, to be changed or looked into by its own names."""

from __future__ import annotations

from torch import nn

from fxfusion.compiler.unwrap import learned_prompts, unwrapped
from fxfusion.errors import SurgeryError


def bare_model(model: nn.Module) -> nn.Module:
    """What has the decoder layers and their config, out of `torch.compile` and PEFT.

    Raises `SurgeryError` for wrappers that know the parameters of what they hold (DDP, FSDP, DeepSpeed), and for
    adapters that are no layers (prompts, prefixes).
    """
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        raise SurgeryError(f"{type(inner).__name__} is no transformers model")
    if [name for name, _ in inner.named_children()] == ["module"]:
        raise SurgeryError(
            f"{type(inner).__name__} knows the parameters of the model inside: "
            "take the model out (`.module`), and wrap it anew once it is as it should be"
        )
    prompts = learned_prompts(inner)
    if prompts:
        raise SurgeryError(f"adapter {prompts[0]!r} is a learned prompt for the model as it is: give the base model")
    return inner
