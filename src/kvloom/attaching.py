"""`load` and `attach`: from a name, a model or a callable to a `LanguageModel`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from kvloom.cache import Codec, check_codec
from kvloom.cache.retention import Retention, TopBlocks
from kvloom.embeddings import EmbeddingModel
from kvloom.engine import Engine
from kvloom.engine.retaining import check_policy, settle
from kvloom.errors import InvalidRequest, KVLoomError, UnsupportedModel
from kvloom.language_model.model import LanguageModel
from kvloom.loading import check_tokenizer, load_pretrained
from kvloom.models import Binding, CachedCallableBinding, CallableBinding, HostedModel, bind
from kvloom.models.callables.cached import speaks_cache_protocol
from kvloom.models.packing.mapped import give_back_freed
from kvloom.models.proofs.selfcheck import prove
from kvloom.models.x_transformers.decoder import DecoderBinding
from kvloom.models.x_transformers.shared import is_of, x_transformers_class
from kvloom.models.x_transformers.wrapper import bind_wrapper

MOST_THREADS = 1_024
"""Far beyond what helps; a process that starts many more of them is killed without a word."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """How a language model's cache is kept, as `load` and `attach` were told."""

    budget_bytes: int | None
    block_tokens: int
    codec: Codec
    retention: Retention | None
    threads: int | None

    def check(self) -> None:
        """Raise `InvalidRequest` for what makes no sense for any model."""
        _check_sizes(budget_bytes=self.budget_bytes, block_tokens=self.block_tokens, threads=self.threads)
        check_policy(self.retention)
        check_codec(self.codec)


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    budget_bytes: int | None = None,
    block_tokens: int = 16,
    codec: Codec = "native",
    retention: Retention | None = None,
    threads: int | None = None,
) -> LanguageModel:
    """Load a model and attach it.

    For what has no argument here (a revision, code of the checkpoint's own, adapters), load the model with transformers
    and `attach` it.

    Args:
        model: a hub id or a folder; by default the bundled demonstration model.
        dtype: of weights and cache; by default the checkpoint's.
        device: "cpu" or "cuda".
        budget_bytes: the most that the cache may take; by default eight sequences of the model's context, at
            most a quarter of the available memory.
        block_tokens: tokens a block.
        codec: how keys and values are kept. "native": in the model's dtype. "int8": full blocks at 8 bits, about half
            the bytes of bfloat16; a little is lost, and `verify` says how much.
        retention: the policy of calls that name none, such as `kvloom.SinkWindow()`; none by default.
        threads: PyTorch's threads, for the whole process; by default as PyTorch has them. Processes forked from this
            one decode on one thread each.

    Returns:
        a `LanguageModel`, which generates, searches with beams, streams, scores, plans and verifies.

    Raises:
        ModelError: what is missing, damaged or unsupported; see `kvloom.errors`.
        InvalidRequest: an argument makes no sense. CacheFull: `budget_bytes` is below one block.

    Example::

        lm = kvloom.load("Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16", budget_bytes=2**30)
        print(lm.generate("Once upon a time", max_new_tokens=20).text)
    """
    settings = _Settings(
        budget_bytes=budget_bytes, block_tokens=block_tokens, codec=codec, retention=retention, threads=threads
    )
    settings.check()
    loaded, tokenizer, processor = load_pretrained(model, dtype=dtype, device=_device(device))
    binding = _bind_transformers(loaded, exclusive=True)
    return _language_model(binding, tokenizer, processor, loaded.generation_config, settings)


class BareDecoder(Protocol):
    """Attention layers of x-transformers without embeddings and logits around them."""

    causal: bool
    cross_attend: bool


@overload
def attach(
    model: BareDecoder,
    *,
    budget_bytes: int | None = None,
    block_tokens: int = 16,
    threads: int | None = None,
) -> EmbeddingModel: ...


@overload
def attach(
    model: Any,
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    block_tokens: int = 16,
    codec: Codec = "native",
    retention: Retention | None = None,
    threads: int | None = None,
    exclusive: bool = False,
) -> LanguageModel: ...


def attach(
    model: Any,
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    block_tokens: int = 16,
    codec: Codec = "native",
    retention: Retention | None = None,
    threads: int | None = None,
    exclusive: bool = False,
) -> Any:
    """Decode a model that you hold. The model stays yours: your own calls of it give what they gave before.

    Args:
        model: a language model of transformers, causal or encoder-decoder; a callable f(token_ids[B, S],
            past_key_values=..., use_cache=True) that returns `.logits` and `.past_key_values`; or any callable
            f(token_ids[B, S]) -> logits[B, S, V], which is decoded without a cache. `lm.binding.name` says how it was
            attached, and `lm.binding.reason` why not faster. Of x-transformers a `TransformerWrapper`, or a bare
            `Decoder`, which gives an `EmbeddingModel` in place of a `LanguageModel`.
        tokenizer: needed for text prompts and for text results. Of an image-text model pass its processor, which
            holds the tokenizer and turns images into the model's inputs.
        vocab_size, max_tokens, device: of a callable; a model knows its own.
        budget_bytes, block_tokens, codec, retention, threads: as for `load`.
        exclusive: whether KVLoom may have the weights for itself. By default yours stay as they are and KVLoom makes a
            second, packed copy of the linear layers'. With `exclusive=True` one copy is in memory, the packed one:
            until `detach`, which puts your weights back bit for bit, calls of your model run on it, and its parameters
            cannot be read, saved or trained.

    Your calls of the model and KVLoom's must not overlap in time. Weights that you change in place are noticed when
    the next request begins: prefixes and contexts that were computed before are computed anew. Change them between
    requests: a text that is being written meanwhile goes on, with the old weights or the new ones, as the model's
    path has it, until another request begins; nothing of it is found by later ones. Writing through `parameter.data`
    is not noticed: attach again after that.

    Raises:
        UnsupportedModel: the model cannot be decoded on the cache; `AttachMismatch` if its cached output
            differs from its own, with the first layer that does.
    """
    settings = _Settings(
        budget_bytes=budget_bytes, block_tokens=block_tokens, codec=codec, retention=retention, threads=threads
    )
    settings.check()
    _check_sizes(max_tokens=max_tokens)
    if is_of(model, "AttentionLayers"):
        given = {"tokenizer": tokenizer, "vocab_size": vocab_size, "max_tokens": max_tokens, "device": device}
        return _embedding_model(model, settings, {**given, "exclusive": exclusive or None})
    binding = _bind(model, vocab_size=vocab_size, max_tokens=max_tokens, device=device, exclusive=exclusive)
    processor = None
    if isinstance(tokenizer, ProcessorMixin) and binding.encoder is None:
        processor, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", None)
    with _detached_unless_done(binding):
        if tokenizer is not None:
            if not hasattr(tokenizer, "get_vocab"):
                raise InvalidRequest(
                    f"`tokenizer` must be a tokenizer of transformers; got {type(tokenizer).__name__}."
                )
            check_tokenizer(tokenizer, binding.vocab_size)
        return _language_model(binding, tokenizer, processor, getattr(model, "generation_config", None), settings)


def _bind(
    model: Any,
    *,
    vocab_size: int | None,
    max_tokens: int | None,
    device: torch.device | str | None,
    exclusive: bool,
) -> Binding:
    of_callables = {"vocab_size": vocab_size, "max_tokens": max_tokens, "device": device}
    # PEFT wraps a model of transformers, into which it has put its adapters.
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(wrapped, PreTrainedModel):
        _refuse_given("for callables; a transformers model knows its own", **of_callables)
        return _bind_transformers(wrapped, exclusive=exclusive)
    if isinstance(model, str | os.PathLike):
        kind = type(model).__name__
        raise UnsupportedModel(
            f"a {kind} is no model that you hold. Load one by its name: kvloom.load({str(model)!r})."
        )
    if isinstance(model, LanguageModel):
        raise UnsupportedModel("the model is attached already. Call the methods of what you passed.")
    if isinstance(model, type):
        raise UnsupportedModel(f"{model.__name__} is a class. Pass a model that was made of it.")
    if not callable(model):
        raise UnsupportedModel(f"a {type(model).__name__} is neither a transformers model nor callable. Pass either.")
    if exclusive:
        raise InvalidRequest("`exclusive` is for transformers models: only their linear layers are packed.")
    if x_transformers_class(model) is not None:
        _refuse_given("for callables; a model of x-transformers knows its own", **of_callables)
        wrapped = bind_wrapper(model)
        wrapped.pack()
        return wrapped
    if speaks_cache_protocol(model):
        cached = _bind_cached(model, vocab_size=vocab_size, max_tokens=max_tokens, device=device or "cpu")
        cached.pack()
        return cached
    if vocab_size is None:
        raise InvalidRequest("a callable f(token_ids) -> logits needs `vocab_size`: pass the width of its logits.")
    return CallableBinding(model, vocab_size=vocab_size, max_tokens=max_tokens, device=device or "cpu")


def _bind_cached(
    function: Any, *, vocab_size: int | None, max_tokens: int | None, device: torch.device | str
) -> CachedCallableBinding:
    """A callable that speaks the cache protocol, proven; what it raises itself is the reason why it is refused."""
    try:
        binding = CachedCallableBinding(function, vocab_size=vocab_size, max_tokens=max_tokens, device=device)
        prove(binding)
    except KVLoomError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"the callable cannot be run on the cache: it raised {type(error).__name__}: {error}. Without the argument "
            "`past_key_values` it is decoded uncached."
        ) from error
    return binding


def _embedding_model(decoder: Any, settings: _Settings, given: dict[str, Any]) -> EmbeddingModel:
    """A bare decoder, attached; `given` are arguments that make no sense for one."""
    kept = {"codec": None if settings.codec == "native" else settings.codec, "retention": settings.retention}
    _refuse_given("for models that read token ids; a bare decoder reads embeddings", **given, **kept)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return EmbeddingModel(
        DecoderBinding(decoder), budget_bytes=settings.budget_bytes, block_tokens=settings.block_tokens
    )


def _refuse_given(reason: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InvalidRequest(f"`{name}` is {reason}. Leave it out.")


def _bind_transformers(model: PreTrainedModel, *, exclusive: bool) -> HostedModel:
    # Of a model that is attached for exclusive use the packed weights are there, too, but never all.
    if all(weight.is_meta for weight in model.parameters()):
        raise UnsupportedModel(
            "weights of the model lie on the meta device, where they have no values. Load them, for example with "
            "`from_pretrained`, before you attach the model."
        )
    binding = bind(model)
    with _detached_unless_done(binding):
        # The proofs record much, and what they freed would stay with the process beside the packed weights.
        give_back_freed()
        binding.pack(exclusive=exclusive)
        give_back_freed()
        return binding


@contextmanager
def _detached_unless_done(binding: Binding) -> Iterator[None]:
    """Whatever is raised within the block, a model that was given for exclusive use is its owner's again."""
    try:
        yield
    except BaseException:
        binding.detach()
        raise


def _language_model(
    binding: Binding,
    tokenizer: Any,
    processor: Any,
    generation_config: Any,
    settings: _Settings,
) -> LanguageModel:
    retention = settings.retention
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    engine = Engine(
        binding,
        budget_bytes=settings.budget_bytes,
        block_tokens=settings.block_tokens,
        codec=settings.codec,
        block_bounds=isinstance(retention, TopBlocks),
    )
    config = generation_config if isinstance(generation_config, GenerationConfig) else None
    if retention is not None:
        # What no call could use is refused here; pins need a prompt to be outside of.
        layout = None if engine.cache is None else engine.cache.layout
        settle(retention, binding, layout, prompt_tokens=retention.least_prompt, new_tokens=0)
    return LanguageModel(engine, tokenizer, config, retention, processor=processor)


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidRequest(f"`{name}` must be a whole number of at least 1; got {value!r}.")
    if (sizes.get("threads") or 1) > MOST_THREADS:
        raise InvalidRequest(
            f"`threads` may be {MOST_THREADS:,} at most; got {sizes['threads']:,}. This machine has "
            f"{os.cpu_count()} CPUs."
        )


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequest(f"`device={device}` is not a device of PyTorch, such as cpu or cuda.") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"`device={device}` is not supported. Use device='cpu' or device='cuda'.")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("`device=cuda` was asked for, but PyTorch finds no GPU here. Use device='cpu'.")
    return found
