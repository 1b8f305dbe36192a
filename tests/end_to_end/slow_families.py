"""All other families with plain pre-norm FFNs: decoders, encoders, seq2seq decoders, vision towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.end_to_end.families import Family
from tests.end_to_end.family_table import FLOAT32

IMAGE = {"image_size": 16, "patch_size": 8}
DENSE = {"mlp_layer_types": ["dense"] * 4}
LINEAR_AFTER_FIRST = {
    "layer_types": ["full_attention"] + ["linear_attention"] * 3,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4},
    **{"qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
SHORT_CONVOLUTIONS = {"norms": ("operator_norm",), "ffn_norm": "ffn_norm"}
BLOCK = {"block_ff_dim": 48, "block_auto_adjust_ff_dim": False}
GPT = {"layers": "transformer.h", "mixers": ("attn",)}


def sublayers(name: str, layers: str, **changes: Any) -> Family:
    """Decoders that name their norms after the sub-layer before them."""
    given = {"stub": "zeros", "norms": ("self_attn_layer_norm",), "ffn_norm": "final_layer_norm"}
    return Family(name=name, layers=layers, **(given | changes))


def seq2seq(name: str, **changes: Any) -> Family:
    """Decoders of encoder-decoder models; their cross-attention goes with their self-attention."""
    config = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_start_token_id": 2,
    }
    return sublayers(
        name,
        "decoder.layers",
        kind="seq2seq",
        mixers=("self_attn", "encoder_attn"),
        norms=("self_attn_layer_norm", "encoder_attn_layer_norm"),
        config=config,
        **changes,
    )


def nested(name: str, arity: int = 3, variant: str = "", **config: Any) -> Family:
    """Decoders whose block is a list of sub-layers, each with its norm and residual addition."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 4, "num_heads": 4}
    return Family(
        name=name,
        kind="seq2seq",
        layers="decoder.block",
        mixers=("layer.0.SelfAttention", "layer.1.EncDecAttention"),
        stub="zeros",
        arity=arity,
        variant=variant,
        norms=("layer.0.layer_norm", "layer.1.layer_norm"),
        ffn_norm="layer.2.layer_norm",
        config=sizes | {"decoder_start_token_id": 2} | config,
    )


def encoder(name: str, layers: str = "encoder.layer", **changes: Any) -> Family:
    """Encoders whose attention block owns its norm and its residual addition."""
    given = {"mixers": ("attention",), "stub": "same", "norms": (), "ffn_norm": "ln"}
    return Family(name=name, kind="encoder", layers=layers, **(given | changes))


def vision(
    name: str, layers: str, norm: str, ffn_norm: str, mixers: Sequence[str] = ("attention",), **changes: Any
) -> Family:
    config = IMAGE | changes.pop("config", {})
    return Family(
        name=name,
        kind="vision",
        layers=layers,
        mixers=mixers,
        norms=(norm,),
        ffn_norm=ffn_norm,
        config=config,
        **changes,
    )


SLOW = (
    Family(name="arcee", config={"mlp_bias": True}),
    Family(
        name="bamba",
        mixers=("mamba",),
        arity=0,
        ffn_norm="pre_ff_layernorm",
        config={**MAMBA, "attn_layer_indices": [0]},
    ),
    sublayers("biogpt", "biogpt.layers"),
    seq2seq("blenderbot"),
    vision("clip_vision_model", "encoder.layers", "layer_norm1", "layer_norm2", ("self_attn",)),
    Family(name="codegen", norms=(), ffn_norm="ln_1", config={"rotary_dim": 4, "n_inner": 48}, **GPT),
    Family(name="cohere2", norms=(), ffn_norm="input_layernorm", limit=FLOAT32),
    Family(
        name="ctrl",
        layers="transformer.h",
        mixers=("multi_head_attention",),
        stub="zeros",
        norms=("layernorm1",),
        ffn_norm="layernorm2",
        config={"dff": 48},
    ),
    Family(name="cwm"),
    Family(name="diffllama"),
    Family(name="ernie4_5", config={"use_bias": True}),
    Family(name="eurobert", kind="encoder", layers="layers", config={"mask_token_id": 5}),
    Family(name="gpt_bigcode", norms=("ln_1",), ffn_norm="ln_2", config={"n_inner": 48}, **GPT),
    Family(name="gpt_neox_japanese", layers="gpt_neox_japanese.layers", mixers=("attention",), stub="zeros", arity=3),
    Family(name="granite_swa", config={"residual_multiplier": 0.22}),
    Family(
        name="granitemoehybrid",
        mixers=("mamba",),
        arity=0,
        config={
            "layer_types": ["attention"] + ["mamba"] * 3,
            **MAMBA,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    Family(name="hrm_text", layers="model.L_module.layers", fused=18, passes=6),
    Family(name="hunyuan_v1_dense", config={"head_dim": 8}),
    vision("ijepa", "layers", "layernorm_before", "layernorm_after", stub="zeros"),
    Family(name="internlm3"),
    Family(name="iquestcoder"),
    Family(name="jais2", config={"head_dim": 8}),
    Family(
        name="lfm2",
        mixers=("self_attn", "conv"),
        config=BLOCK | {"layer_types": ["full_attention"] * 4},
        **SHORT_CONVOLUTIONS,
    ),
    Family(
        name="lfm2",
        variant="conv",
        mixers=("conv",),
        arity=0,
        config=BLOCK | {"layer_types": ["full_attention"] + ["conv"] * 3},
        **SHORT_CONVOLUTIONS,
    ),
    seq2seq("m2m_100"),
    seq2seq("mbart"),
    encoder("megatron-bert"),
    Family(name="ministral", config={"head_dim": 8}),
    Family(name="ministral3"),
    Family(
        name="mpt",
        layers="transformer.blocks",
        mixers=("attn",),
        stub="zeros",
        norms=("norm_1",),
        ffn_norm="norm_2",
        config={"expansion_ratio": 2},
    ),
    nested("mt5"),
    Family(name="olmo_hybrid", mixers=("linear_attn",), arity=0, config=LINEAR_AFTER_FIRST),
    seq2seq("pegasus"),
    Family(
        name="qwen3_5_text",
        mixers=("linear_attn",),
        arity=0,
        limit=FLOAT32,
        config=LINEAR_AFTER_FIRST | {"head_dim": 8},
    ),
    encoder("roberta-prelayernorm", ffn_norm="intermediate.LayerNorm"),
    Family(name="seed_oss", config={"head_dim": 8}),
    vision("siglip_vision_model", "encoder.layers", "layer_norm1", "layer_norm2", ("self_attn",)),
    nested("t5"),
    nested("t5", variant="gated", feed_forward_proj="gated-gelu"),
    nested("umt5", arity=2),
    Family(name="vaultgemma", ffn_norm="pre_feedforward_layernorm", limit=FLOAT32, config={"head_dim": 8}),
    vision("vit", "layers", "layernorm_before", "layernorm_after", stub="zeros"),
    sublayers("xglm", "model.layers", dtype=torch.float32, limit=1e-5, config={"ffn_dim": 48, "attention_heads": 4}),
    encoder("xlm-roberta-xl", ffn_norm="LayerNorm"),
    Family(name="youtu", config=LATENT),
)

DENSE_LAYERS_OF_MOE = (
    Family(name="axk1", config=LATENT | DENSE | {"first_k_dense_replace": 4}),
    Family(name="kimi_linear", config=LATENT | DENSE | {"layer_types": ["full_attention"] * 4}),
    Family(
        name="mimo_v2_flash",
        config=DENSE | {"layer_types": ["full_attention"] * 4, "head_dim": 8, "v_head_dim": 8},
    ),
    Family(
        name="exaone_moe",
        config=DENSE | {"first_k_dense_replace": 4, "head_dim": 8, "is_moe_layer": [False] * 4},
    ),
    Family(
        name="jamba",
        mixers=("mamba",),
        arity=0,
        ffn_norm="pre_ff_layernorm",
        config={
            "num_experts": 1,
            "attn_layer_period": 8,
            "attn_layer_offset": 0,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 4,
        },
    ),
    Family(name="laguna", config=DENSE | {"head_dim": 8}),
)

SCALED = (
    vision(
        "beit", "layers", "layernorm_before", "layernorm_after", stub="zeros", config={"layer_scale_init_value": 0.1}
    ),
    vision("dinov3_vit", "model.layer", "norm1", "norm2"),
)
