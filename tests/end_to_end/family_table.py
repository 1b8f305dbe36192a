"""The families of transformers that are tested, as data."""

from __future__ import annotations

from tests.end_to_end.families import Family

EXACT = 1e-10

FAST = (
    Family(name="llama"),
    Family(name="mistral"),
    Family(name="qwen2"),
    Family(name="qwen3"),
    Family(name="smollm3", config={"mlp_bias": True, "attention_bias": True}),
    Family(name="gemma"),
    Family(name="phi3", stub="zeros"),
    Family(name="glm", config={"head_dim": 8}),
    Family(name="granite", config={"residual_multiplier": 0.22}),
    Family(name="olmo"),
    Family(name="starcoder2", limit=EXACT),
    Family(name="gpt2", layers="transformer.h", mixers=("attn",), norms=("ln_1",), ffn_norm="ln_2", limit=EXACT),
    Family(
        name="gpt_neo",
        layers="transformer.h",
        mixers=("attn",),
        norms=("ln_1",),
        ffn_norm="ln_2",
        limit=EXACT,
        config={"attention_types": [[["global", "local"], 2]]},
    ),
    Family(
        name="gpt_neox",
        layers="gpt_neox.layers",
        mixers=("attention",),
        stub="zeros",
        limit=EXACT,
    ),
    Family(
        name="gpt_neox",
        variant="sequential",
        layers="gpt_neox.layers",
        mixers=("attention",),
        stub="zeros",
        limit=EXACT,
        config={"use_parallel_residual": False},
    ),
    Family(
        name="opt",
        layers="model.decoder.layers",
        stub="zeros",
        norms=("self_attn_layer_norm",),
        ffn_norm="final_layer_norm",
        limit=EXACT,
        config={"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    Family(name="cohere", norms=(), ffn_norm="input_layernorm"),
    Family(name="nemotron", limit=EXACT),
    Family(
        name="falcon",
        layers="transformer.h",
        mixers=("self_attention",),
        norms=(),
        ffn_norm="input_layernorm",
        limit=EXACT,
        config={"ffn_hidden_size": 48, "bias": True},
    ),
    Family(
        name="falcon",
        variant="two-norms",
        layers="transformer.h",
        mixers=("self_attention",),
        norms=("ln_attn",),
        ffn_norm="ln_mlp",
        limit=EXACT,
        config={"ffn_hidden_size": 48, "new_decoder_architecture": True},
    ),
    Family(name="stablelm", limit=EXACT),
    Family(
        name="stablelm",
        variant="parallel",
        norms=(),
        ffn_norm="input_layernorm",
        limit=EXACT,
        config={"use_parallel_residual": True},
    ),
)

LEADING = tuple(family for family in FAST if family.id in {"llama", "gpt2", "opt", "phi3", "gpt_neox-sequential"})
LAST_NORM = tuple(family for family in FAST if family.id in {"gemma", "starcoder2", "cohere"})
REFUSED = ()
SLOW = ()
