"""Small random-weight transformers models: every architecture we test, built from a config, no network.

::

    model = tiny_model("mistral")                        # eval mode, float32, the same weights on every run
    model = tiny_model("llama", seed=3, num_hidden_layers=4)
    token_ids = random_ids(model, tokens=20, seed=1)     # a plain list

The weights are not those of a fresh transformers model, which hide bugs: there biases are zero, norms are
one, and logits so close that any rounding changes the winner. Here matrices are drawn wide (logits spread
over several units, attention is far from uniform), and vectors are moved off their defaults.

A tiny model has no BOS, EOS or PAD unless a test names one; the defaults of most configs point outside a
small vocabulary.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BloomConfig,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MarianConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    T5Config,
    WhisperConfig,
)

MAX_POSITIONS = 256

WINDOW_TOKENS = 8
"""The sliding window of every family that has one: half a block, so that any test crosses it."""

LONGROPE_SWITCH = 40
"""`phi3_longrope` rotates a whole row by other factors once the row is longer than this."""

DYNAMIC_ROPE_SWITCH = 48
"""`llama_dynamic_rope` scales its rotary base with the row's length, once that is longer than this.

Its `max_position_embeddings` is this number too: in dynamic rope that field is the length at which scaling
starts. And transformers keeps the scaled base on the module: after a forward over 100 tokens, one over 60
uses the base of 100, until one over fewer than 48 resets it. So compare with `tiny_model(...)` made anew.
"""

# ---- the families ------------------------------------------------------------------------------------------

_VOCABULARY = {"vocab_size": 131, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# The decoder's first token is none that is ever chosen for another reason.
_SOURCE_VOCABULARY = _VOCABULARY | {"decoder_start_token_id": 2}

_ENCODER_DECODER_SIZES = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": MAX_POSITIONS,
}

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}

_GROUPED = _VOCABULARY | _SIZES | {"num_key_value_heads": 2}

_MIXED = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW_TOKENS,
    "layer_types": ["sliding_attention", "full_attention"],  # repeated over the layers
}
"""Two layer groups in one model."""

_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED),
    "llama_dynamic_rope": (
        LlamaConfig,
        _GROUPED
        | {
            "max_position_embeddings": DYNAMIC_ROPE_SWITCH,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
    "mistral": (MistralConfig, _GROUPED | {"sliding_window": WINDOW_TOKENS}),
    "qwen2": (Qwen2Config, _GROUPED | {"tie_word_embeddings": True}),
    # Heads x size differs from the hidden size.
    "qwen3": (Qwen3Config, _GROUPED | {"head_dim": 16}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "mixtral": (MixtralConfig, _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": (
        Gemma2Config,
        _GROUPED
        | _MIXED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,  # a scaling that is not 1 / sqrt(head_dim)
            "attn_logit_softcapping": 5.0,  # low enough to bite
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (Gemma3TextConfig, _GROUPED | _MIXED | {"head_dim": 16, "query_pre_attn_scalar": 24}),
    "gpt2": (
        GPT2Config,
        _VOCABULARY | {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS},
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        _VOCABULARY
        | _SIZES
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    # Attention sinks: one extra logit a head that takes part of the softmax.
    "gpt_oss": (
        GptOssConfig,
        _GROUPED
        | _MIXED
        | {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "phi3": (Phi3Config, _GROUPED | {"original_max_position_embeddings": MAX_POSITIONS}),
    "phi3_longrope": (
        Phi3Config,
        _GROUPED
        | {
            "original_max_position_embeddings": LONGROPE_SWITCH,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "factor": MAX_POSITIONS / LONGROPE_SWITCH,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],  # one a frequency: half the head size
                "long_factor": [2.0 + 0.7 * i for i in range(6)],
                "original_max_position_embeddings": LONGROPE_SWITCH,
            },
        },
    ),
    # Its full-attention layers have no rotary positions at all.
    "cohere2": (Cohere2Config, _GROUPED | _MIXED | {"logit_scale": 1.5, "tie_word_embeddings": True}),
    "granite": (
        GraniteConfig,
        _GROUPED | {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    ),
    "olmo2": (Olmo2Config, _GROUPED),
    "opt": (
        OPTConfig,
        _VOCABULARY
        | {
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "ffn_dim": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
        },
    ),
    "bloom": (BloomConfig, _VOCABULARY | {"hidden_size": 48, "n_layer": 3, "n_head": 4}),
    # Rotary, one KV head; with `alibi=True` its positions are biases.
    "falcon": (FalconConfig, _VOCABULARY | {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "t5": (
        T5Config,
        _SOURCE_VOCABULARY
        | {
            "d_model": 48,
            "d_kv": 8,  # heads x size differs from the model's width
            "d_ff": 80,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,  # beyond it all distances are one
        },
    ),
    "bart": (BartConfig, _SOURCE_VOCABULARY | _ENCODER_DECODER_SIZES | {"forced_eos_token_id": None}),
    "marian": (
        MarianConfig,
        _SOURCE_VOCABULARY | _ENCODER_DECODER_SIZES | {"scale_embedding": True, "forced_eos_token_id": None},
    ),
    "whisper": (
        WhisperConfig,
        _SOURCE_VOCABULARY
        | {name: size for name, size in _ENCODER_DECODER_SIZES.items() if name != "max_position_embeddings"}
        | {
            "num_mel_bins": 6,
            "max_source_positions": 20,
            "max_target_positions": MAX_POSITIONS,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}

OWN_ATTENTION_FAMILIES = ("bloom", "falcon")
"""Models that ignore the attention interface without a word: they are run on the cache interface."""

ENCODER_DECODER_FAMILIES = ("t5", "bart", "marian", "whisper")
"""Models that decode from a source; `whisper` from features."""

SUPPORTED_FAMILIES = tuple(
    name for name in _FAMILIES if name not in (*OWN_ATTENTION_FAMILIES, *ENCODER_DECODER_FAMILIES)
)
"""Causal models that go through the attention interface."""

WINDOWED_FAMILIES = ("mistral", "gemma2", "gemma3", "gpt_oss", "cohere2")
"""Families with layers that see `WINDOW_TOKENS` tokens; all but mistral mix them with full layers."""

LENGTH_DEPENDENT_ROPE_FAMILIES = ("llama_dynamic_rope", "phi3_longrope")
"""Families whose rotary factors depend on the length of the row."""

# ---- the factory -------------------------------------------------------------------------------------------


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of `family`, with `changes` to its fields.

    Raises:
        ValueError: no such family, or no such field.
    """
    if family not in _FAMILIES:
        raise ValueError(f"no tiny model {family!r}; there are {', '.join(_FAMILIES)}")
    config_class, fields = _FAMILIES[family]
    plain = config_class()
    unknown = [name for name in changes if not hasattr(plain, name)]
    if unknown:
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}")
    fields = fields | changes
    if "layer_types" in fields and "layer_types" not in changes:
        fields["layer_types"] = list(islice(cycle(fields["layer_types"]), fields["num_hidden_layers"]))
    return config_class(**fields)


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    **changes: Any,
) -> PreTrainedModel:
    """A random model of `family` in eval mode: the same arguments give the same weights.

    `attn_implementation` is that of the model's own forward, which output is compared with. Eager is the
    plainest, and the only one that has soft-capping and sinks. The global random state stays as it was.
    """
    config = tiny_config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(family).from_config(config, attn_implementation=attn_implementation)
        _draw_weights(model)
    return model.to(dtype).eval().requires_grad_(False)


def _auto_class(family: str) -> Any:
    if family not in ENCODER_DECODER_FAMILIES:
        return AutoModelForCausalLM
    return AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM


def random_source(model: PreTrainedModel, *, tokens: int, seed: int = 0) -> Any:
    """What an encoder reads: `tokens` random ids, or features, which always have the length that the model wants."""
    if model.main_input_name == "input_ids":
        return random_ids(model, tokens=tokens, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=generator)


def random_ids(model: PreTrainedModel, *, tokens: int, seed: int = 0) -> list[int]:
    """`tokens` random ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()


def left_padded(model: PreTrainedModel, *lengths: int) -> dict[str, torch.Tensor]:
    """A batch of random prompts, padded on the left, in which id 0 occurs as padding only."""
    prompts = [[token or 1 for token in random_ids(model, tokens=n, seed=n)] for n in lengths]
    width = max(lengths)
    return {
        "input_ids": torch.tensor([[0] * (width - len(own)) + own for own in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in prompts]),
    }


@torch.no_grad()
def _draw_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=0.25)
        else:
            # Norm weights stand around one (or zero, where a model adds the one), biases around zero.
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
