"""Proof that the tensors and numbers of a file say the model: they are computed as llama.cpp does, in float32, layer by
layer, and the logits compared. Nothing of the model's own modules is used, and of its tensors one layer at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.checkpoints.llama_cpp.decoder import GgufDecoder, Numbers
from fxfusion.errors import CheckpointError
from fxfusion.models.surgery_proof import full_logits, proof_tokens, relative

_ALLOWED = 16  # times the dtype's epsilon: the same sums, in another order
_FLOOR = 1e-5  # float32 through 30 real layers: 2e-6 was seen (SmolLM2-135M)
_ROWS = 2**14  # of the head at a time


def prove(model: nn.Module, decoder: GgufDecoder) -> str:
    """What was proved, as a sentence for people. Raises `CheckpointError` where the logits differ."""
    ids = proof_tokens(model)
    if ids.is_meta:
        return "tensors, norms, FFNs and settings were checked, but without weights not the whole computation"
    expected = full_logits(model, ids).float().cpu()
    error = relative(logits_of(decoder, ids.cpu()), expected)
    limit = max(_ALLOWED * torch.finfo(decoder.dtype).eps, _FLOOR)
    if not error <= limit:
        raise CheckpointError(
            f"GGUF's architecture {decoder.architecture} cannot say this model: tensors and settings fit, but the "
            f"logits are off by {error:.2g} (allowed {limit:.2g}), so {type(model).__name__} computes something that "
            "they do not show"
        )
    return f"logits of {ids.numel()} tokens compared with the model in memory: off by {error:.1g}"


@torch.no_grad()
def logits_of(decoder: GgufDecoder, ids: Tensor) -> Tensor:
    """What llama.cpp computes for `ids` `[batch, tokens]`: float32 `[batch, tokens, vocabulary]`, on the CPU."""
    run = _Run(decoder, ids.shape[1])
    table = decoder.pieces["token_embd.weight"]
    used, places = ids.unique(return_inverse=True)
    x = torch.cat([table.rows(decoder.state, token, token + 1) for token in used.tolist()])[places]
    for number, layer in enumerate(decoder.layers):
        prefix = f"blk.{number}."
        if layer.heads:
            x = x + run.attention(prefix, layer, run.norm(f"{prefix}attn_norm", x))
        x = x + run.ffn(prefix, run.norm(f"{prefix}ffn_norm", x))
    x = run.norm("output_norm", x)
    head = decoder.pieces.get("output.weight", table)
    starts = range(0, head.shape[0], _ROWS)
    return torch.cat([x @ head.rows(decoder.state, one, min(one + _ROWS, head.shape[0])).T for one in starts], -1)


class _Run:
    """The operations, on `[batch, tokens, channels]`."""

    def __init__(self, decoder: GgufDecoder, tokens: int) -> None:
        self.decoder, rope = decoder, decoder.rope
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] * rope.speeds()
        self.cos, self.sin = ((rope.length * part).float() for part in (angles.cos(), angles.sin()))

    def linear(self, name: str, x: Tensor) -> Tensor:
        state, pieces = self.decoder.state, self.decoder.pieces
        bias = pieces.get(f"{name}.bias")
        return F.linear(x, pieces[f"{name}.weight"].rows(state), None if bias is None else bias.rows(state))

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain = self.decoder.pieces[f"{name}.weight"].rows(self.decoder.state)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.decoder.eps) * gain

    def ffn(self, prefix: str, x: Tensor) -> Tensor:
        return self.linear(
            f"{prefix}ffn_down", F.silu(self.linear(f"{prefix}ffn_gate", x)) * self.linear(f"{prefix}ffn_up", x)
        )

    def attention(self, prefix: str, layer: Numbers, x: Tensor) -> Tensor:
        size, counts = self.decoder.head_dim, {"q": layer.heads, "k": layer.kv_heads, "v": layer.kv_heads}
        q, k, v = (
            self.linear(f"{prefix}attn_{role}", x).unflatten(-1, (count, size)).transpose(1, 2)
            for role, count in counts.items()
        )
        q, k = self.rotated(q), self.rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.linear(f"{prefix}attn_output", mixed.transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor) -> Tensor:
        """Channels 2i and 2i + 1 of each head, `[batch, heads, tokens, size]`."""
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack(
            (first * self.cos - second * self.sin, first * self.sin + second * self.cos), dim=-1
        ).flatten(-2)
