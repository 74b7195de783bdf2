"""The options that transformers has and KVLoom refuses, each with its reason.

Nothing is silently ignored: a value that would change the output is an `UnsupportedOption`. The same value
in a model's own generation config is let through only where it could not have changed the tokens (it chose
a cache class, asked for an extra output, or tuned a method that is not switched on).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvloom.errors import UnknownOption, UnsupportedOption


@dataclass(frozen=True)
class Refusal:
    """Why an option is not offered, and which of its values leave it switched off."""

    reason: str
    neutral: tuple[Any, ...] = ()
    harmless_in_checkpoint: bool = True

    def applies(self, value: Any) -> bool:
        if value is None or value is False:
            return False
        return not any(type(value) is not bool and value == neutral for neutral in self.neutral)


_ASSISTED = "assisted decoding is not offered"
_CACHE = "KVLoom keeps its own cache; see `budget_bytes`"
_MOVED = "transformers has moved this method out of the library"
_DECODER = "pass the tokens that the decoder begins with as `decoder_input_ids`"
_CALL = "it is an argument of transformers' `generate` that has no meaning here"

REFUSED: dict[str, Refusal] = {
    "num_beam_groups": Refusal(_MOVED, (1,), harmless_in_checkpoint=False),
    "diversity_penalty": Refusal(_MOVED, (0.0,)),
    "constraints": Refusal(_MOVED, harmless_in_checkpoint=False),
    "force_words_ids": Refusal(_MOVED, harmless_in_checkpoint=False),
    "penalty_alpha": Refusal("contrastive search is not offered", (0.0,), harmless_in_checkpoint=False),
    "dola_layers": Refusal("DoLa decoding is not offered", harmless_in_checkpoint=False),
    "low_memory": Refusal(_MOVED),
    "guidance_scale": Refusal(
        "classifier-free guidance needs a second pass over another prompt", (1,), harmless_in_checkpoint=False
    ),
    "watermarking_config": Refusal("pass the watermark as a `logits_processor`", harmless_in_checkpoint=False),
    "token_healing": Refusal("the prompt is decoded as it is given", harmless_in_checkpoint=False),
    "use_mtp": Refusal(_ASSISTED),
    "assistant_model": Refusal(_ASSISTED),
    "assistant_tokenizer": Refusal(_ASSISTED),
    "is_assistant": Refusal(_ASSISTED),
    "num_assistant_tokens": Refusal(_ASSISTED, (20,)),
    "num_assistant_tokens_schedule": Refusal(_ASSISTED, ("constant",)),
    "assistant_confidence_threshold": Refusal(_ASSISTED, (0.4,)),
    "assistant_early_exit": Refusal(_ASSISTED),
    "assistant_lookbehind": Refusal(_ASSISTED, (10,)),
    "target_lookbehind": Refusal(_ASSISTED, (10,)),
    "assistant_ensemble_weight": Refusal(_ASSISTED),
    "speculation_type": Refusal(_ASSISTED),
    "prompt_lookup_num_tokens": Refusal(_ASSISTED),
    "max_matching_ngram_size": Refusal(_ASSISTED),
    "cache_implementation": Refusal(_CACHE),
    "cache_config": Refusal(_CACHE),
    "max_cache_len": Refusal(_CACHE),
    "past_key_values": Refusal("pass a KVLoom context instead"),
    "prefill_chunk_size": Refusal("KVLoom chooses the chunks of a prompt itself"),
    "continuous_batching_config": Refusal("KVLoom schedules requests itself"),
    "compile_config": Refusal("KVLoom does not compile the model"),
    "prefix_allowed_tokens_fn": Refusal("pass `transformers.PrefixConstrainedLogitsProcessor` as a `logits_processor`"),
    "streamer": Refusal("use `stream`"),
    "attention_mask": Refusal("prompts are not padded, so there is nothing to mask"),
    "position_ids": Refusal("positions follow from the sequence"),
    "inputs_embeds": Refusal("prompts are text or token ids"),
    "forced_decoder_ids": Refusal(_DECODER),
    "language": Refusal(_DECODER),
    "task": Refusal(_DECODER),
    "return_timestamps": Refusal(_DECODER),
    "negative_prompt_ids": Refusal(_CALL),
    "negative_prompt_attention_mask": Refusal(_CALL),
    "custom_generate": Refusal(_CALL),
    "trust_remote_code": Refusal(_CALL),
    "synced_gpus": Refusal(_CALL),
}

# What vLLM, OpenAI's interface and CTranslate2 call options that are here, under the names of transformers.
ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "max_decoding_length": "max_length",
    "n": "num_return_sequences",
    "num_hypotheses": "num_return_sequences",
    "beam_width": "num_beams",
    "beam_size": "num_beams",
    "stop": "stop_strings",
    "stop_token_ids": "eos_token_id",
    "logprobs": "top_logprobs",
    "bad_words": "bad_words_ids",
    "logit_bias": "sequence_bias",
    "random_seed": "seed",
    "return_logits": "output_logits",
    "return_scores": "output_scores",
}
PROMPTS = ("input_ids", "inputs", "prompt_token_ids", "prompts", "text", "messages")

# Always true of KVLoom: it returns objects, and compiles nothing.
ALREADY_SO = ("return_dict_in_generate", "disable_compile", "transformers_version")


def refuse_unsupported(name: str, value: Any, from_checkpoint: bool) -> None:
    """Raise `UnsupportedOption` if `name` is one of `REFUSED` and `value` would change something."""
    refusal = REFUSED[name]
    if not refusal.applies(value) or (from_checkpoint and refusal.harmless_in_checkpoint):
        return
    message = f"`{name}` is not supported: {refusal.reason}."
    if from_checkpoint:
        message += f" The model's generation config sets it; pass `{name}=None` to do without."
    raise UnsupportedOption(message)


def unknown_option(name: str, known: Iterable[str]) -> UnknownOption:
    """The error for an option that neither transformers nor KVLoom has: how it is called here, or what was meant."""
    if name in PROMPTS:
        return UnknownOption(
            f"unknown option `{name}`. The prompt is the first argument and has no name; what `model.generate` of "
            "transformers takes, `kvloom.generate(lm, ...)` takes, too."
        )
    if name in ELSEWHERE:
        return UnknownOption(f"unknown option `{name}`. Here it is called `{ELSEWHERE[name]}`.")
    return UnknownOption.named(name, known)
