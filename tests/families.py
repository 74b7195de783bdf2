"""Every family of causal language models that the installed transformers can build from a config alone, small.

`all_families` lists them; `build` shrinks a family's default config and makes a random model of it; `judge` attaches
it and compares greedy decoding and beam search with the model's own uncached output. `docs/models.md` is what `judge`
said.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import kvloom
import tiny
from kvloom.attention import Wanted
from kvloom.errors import KVLoomError

VOCABULARY = 97
CONTEXT = 128
MOST_PARAMETERS = 15_000_000
SECONDS = 60
PROMPT = [11, 45, 3, 78, 23, 45, 9, 61, 30, 2, 84, 17, 55, 8, 39, 70, 12, 91, 27]
NEW_TOKENS = 8
MARGIN = 1e-3
"""Of the logits' spread: where the two best tokens are nearer, either may come."""

Verdict = Literal["works", "refused", "not built", "WRONG"]

# Fields that say the same under the names of different families, and what a small model has of it.
SMALL: dict[int, tuple[str, ...]] = {
    64: ("hidden_size", "n_embd", "d_model", "n_embed", "word_embed_proj_dim", "embedding_size", "embed_dim", "dim"),
    128: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"),
    2: ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"),
    4: ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads"),
}
SMALL_HERE = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "n_positions": CONTEXT,
    "n_ctx": CONTEXT,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "rotary_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "is_decoder": True,
    "add_cross_attention": False,
}


SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
}
"""What the default config of a family leaves open, or makes too large, under names of its own."""


@dataclass(frozen=True)
class Variant:
    """What is done otherwise for families that cannot bear the usual."""

    sizes: dict[str, Any] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    fills_none: bool = False


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VARIANTS = (
    Variant(),
    Variant({"head_dim": 8, "num_key_value_heads": 4}),  # the rotated part alone, where keys are latent
    Variant(left=frozenset({"head_dim"})),
    Variant(IDS),
    Variant(IDS | {"head_dim": 8, "num_key_value_heads": 4}),
    Variant(fills_none=True),
    Variant(IDS, left=frozenset(SMALL_HERE) - {"vocab_size", "max_position_embeddings", *IDS}),
)


@dataclass(frozen=True)
class Family:
    """One family: its model type and class, and whether transformers says that attention can be replaced."""

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]

    @property
    def declares_backend(self) -> bool:
        return bool(getattr(self.model_class, "_supports_attention_backend", False))


@dataclass(frozen=True)
class Judgement:
    """What became of a family, by which binding, or why not."""

    family: Family
    verdict: Verdict
    binding: str = ""
    reason: str = ""


class NotBuilt(Exception):
    """A family that no small model can be made of here, and why."""


def all_families() -> list[Family]:
    """In the order of their names."""
    families = []
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        first = model_class[0] if isinstance(model_class, tuple) else model_class
        families.append(Family(config_class.model_type, config_class, first))
    return sorted(families, key=lambda own: own.name)


def build(family: Family) -> PreTrainedModel:
    """A small random model in evaluation mode. Raises `NotBuilt`."""
    reasons = []
    for make_config in _small_configs(family.config_class):
        try:
            config = make_config()
            if not isinstance(config, family.model_class.config_class):
                config = config.get_text_config(decoder=True)  # as `AutoModelForCausalLM` takes it
            with torch.device("meta"):  # a family whose sizes have other names may be huge
                size = sum(own.numel() for own in family.model_class(copy.deepcopy(config)).parameters())
            if size > MOST_PARAMETERS:
                reasons.append(f"{size:,} parameters when shrunk as the others")
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = family.model_class._from_config(config, attn_implementation="eager")
                tiny._draw_weights(model)
            model = model.float().eval().requires_grad_(False)
            for name in ("eos_token_id", "pad_token_id", "forced_eos_token_id", "forced_bos_token_id"):
                setattr(model.generation_config, name, None)
            logits = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
            if logits.shape[:2] == (1, len(PROMPT)) and bool(logits.isfinite().all()):
                return model
            reasons.append(f"its own forward gives logits of shape {list(logits.shape)}, or not finite ones")
        except Exception as error:  # whatever a family's own code raises for sizes it does not like
            reasons.append(_line(error))
    raise NotBuilt(reasons[0])


def judge(family: Family) -> Judgement:
    """Attach a small model and compare; never raises but for Ctrl-C."""
    try:
        with _quiet(), _limited(SECONDS):
            model = build(family)
    except (NotBuilt, TimeoutError) as error:
        return Judgement(family, "not built", reason=_line(error))
    try:
        with _quiet(), _limited(SECONDS):
            lm = kvloom.attach(model)
            wrong = _difference(lm, model)
    except KVLoomError as error:
        return Judgement(family, "refused", reason=_line(error))
    except Exception as error:
        return Judgement(family, "WRONG", reason=f"{type(error).__name__}: {_line(error)}")
    return Judgement(family, "WRONG" if wrong else "works", binding=lm.binding.name, reason=wrong)


def _difference(lm: kvloom.LanguageModel, model: PreTrainedModel) -> str:
    """Where cached output differs from the model's own uncached one; empty if it does not."""
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    ours = lm.generate(PROMPT, **options)
    ids = list(PROMPT)
    for position, token in enumerate(ours.token_ids):
        logits = _own_logits(model, ids)
        best = logits.topk(2).values
        if int(logits.argmax()) != token and float(best[0] - best[1]) > MARGIN * float(logits.std()):
            return f"greedy token {position} is {token}, and its own forward says {int(logits.argmax())}"
        ids.append(token)
    beams = lm.beam_search(PROMPT, num_beams=3, num_return_sequences=3, length_penalty=0.0, **options)
    for rank, beam in enumerate(beams):
        own = _own_score(model, beam.token_ids)
        if abs(own - float(beam.score)) > 1e-3 * max(1.0, abs(own)):
            return f"hypothesis {rank} scores {beam.score:.5f}, and its own forward says {own:.5f}"
    uncached = lm.beam_search(PROMPT, num_beams=3, length_penalty=0.0, use_cache=False, **options)
    if abs(float(uncached[0].score) - float(beams[0].score)) > 1e-3:
        return f"the best hypothesis scores {beams[0].score:.5f} with the cache, {uncached[0].score:.5f} without"
    return _unlike_inside(lm, "attentions") or _unlike_inside(lm, "hidden_states")


def _unlike_inside(lm: kvloom.LanguageModel, name: str) -> str:
    """Where attentions, or hidden states, on the cache differ from the own forward's; empty also where refused."""
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    try:
        out = lm.generate(PROMPT, **options, **{f"output_{name}": True})
    except KVLoomError:
        return ""
    whole = torch.tensor([PROMPT + out.token_ids[:1]])
    own = getattr(lm.binding.views_of(whole, Wanted(**{name: True}))[0], name)
    last = getattr(out, name)[1]
    for layer, (got, expected) in enumerate(zip(last, own, strict=True)):
        error = float((got - expected[..., -1:, :]).abs().max() / expected.abs().max())
        if not error <= 2e-3:
            return f"{name} of layer {layer} differ from those of its own forward by {error:.2g}"
    return ""


@torch.no_grad()
def _own_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()


@torch.no_grad()
def _own_score(model: PreTrainedModel, new_ids: list[int]) -> float:
    logits = model(input_ids=torch.tensor([PROMPT + new_ids]), use_cache=False).logits[0].float()
    logprobs = torch.log_softmax(logits[len(PROMPT) - 1 : -1], dim=-1)
    return float(logprobs.gather(1, torch.tensor(new_ids)[:, None]).sum())


def _small_configs(config_class: type[PreTrainedConfig]) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Makers of smaller versions of a default config, the plainest first; families differ in what they can bear."""
    for layers, variant in itertools.product((2, 4, 8), VARIANTS):
        yield lambda layers=layers, variant=variant: _shrunk(config_class, layers, variant)


def _shrunk(config_class: type[PreTrainedConfig], layers: int, variant: Variant) -> PreTrainedConfig:
    """The default config with small sizes, those of its parts included."""
    plain = config_class()
    changes = _small_fields(plain, layers, variant)
    for name, part in vars(plain).items():
        if isinstance(part, PreTrainedConfig):
            changes[name] = _shrunk(type(part), layers, variant).to_dict()
    return config_class(**(changes | SPECIAL.get(plain.model_type, {})))


def _small_fields(plain: PreTrainedConfig, layers: int, variant: Variant) -> dict[str, Any]:
    sizes: dict[str, Any] = {name: size for size, names in SMALL.items() for name in names} | SMALL_HERE
    sizes |= dict.fromkeys(SMALL[2], layers) | variant.sizes
    changes: dict[str, Any] = {}
    for name, size in sizes.items():
        value = _value(plain, name)
        if name in variant.left or value is _NOTHING:
            continue
        alike = isinstance(value, int) and isinstance(value, bool) == isinstance(size, bool)
        if alike or name.endswith("_token_id") or (value is None and variant.fills_none):
            changes[name] = size
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"):
        value = _value(plain, name)
        if isinstance(value, list | tuple) and value:
            # One of each kind, if there is room, so that none stays unseen.
            kinds = list(dict.fromkeys(value))
            changes[name] = [kinds[index % len(kinds)] for index in range(layers)]
    return changes


_NOTHING = object()


def _value(plain: PreTrainedConfig, name: str) -> Any:
    """A field of a config; nothing where there is none, or where it follows from others."""
    if isinstance(getattr(type(plain), plain.attribute_map.get(name, name), None), property):
        return _NOTHING
    try:
        return getattr(plain, name, _NOTHING)
    except Exception:  # "a per-layer attribute"
        return _NOTHING


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in what takes more of the CPU: on a busy machine a clock says nothing."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s of the CPU")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _line(error: BaseException) -> str:
    """The first line of a message, at a readable length."""
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."
