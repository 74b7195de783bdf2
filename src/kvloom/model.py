"""What users hold: `load` or `attach` gives a `LanguageModel`, whose calls give generations and contexts."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from kvloom.context import Context
from kvloom.decoding import Hypothesis, Options, make_decoder, resolve
from kvloom.engine import Engine, Request, Usage
from kvloom.engine.holding import Holding
from kvloom.errors import CacheMismatch, InvalidRequest, PromptTooLong, UnsupportedModel
from kvloom.loading import check_tokenizer, load_pretrained
from kvloom.models import AttentionInterfaceBinding, Binding, CallableBinding
from kvloom.models.selfcheck import prove
from kvloom.prompts import read_prompt, read_prompts
from kvloom.results import Extended, Generation, Hypotheses, Piece
from kvloom.text import Detokenizer, decode_new
from kvloom.verify import Report
from kvloom.verify import verify as run_checks

OWN_OPTIONS = ("context", "generation_config", "logits_processor", "stopping_criteria")

REPEATED_CONTEXT_TOKENS = 4
"""From this length on, new tokens that begin with the whole context are taken for the classic mistake."""


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    budget_bytes: int | None = None,
    block_tokens: int = 16,
    threads: int | None = None,
) -> LanguageModel:
    """Load a model and attach it.

    Args:
        model: a hub id or a folder; by default the bundled demonstration model.
        dtype: of weights and cache; by default the checkpoint's.
        device: "cpu" or "cuda".
        budget_bytes: the most that the cache may take; by default eight sequences of the model's context, at
            most a quarter of the available memory.
        block_tokens: tokens a block.
        threads: PyTorch's threads, for the whole process; by default as PyTorch has them.

    Raises:
        ModelError: what is missing, damaged or unsupported; see `kvloom.errors`.
    """
    _check_sizes(budget_bytes=budget_bytes, block_tokens=block_tokens, threads=threads)
    loaded, tokenizer = load_pretrained(model, dtype=dtype, device=_device(device))
    binding = _bind_transformers(loaded, exclusive=True)
    return _language_model(
        binding,
        tokenizer,
        loaded.generation_config,
        budget_bytes=budget_bytes,
        block_tokens=block_tokens,
        threads=threads,
    )


def attach(
    model: Any,
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    budget_bytes: int | None = None,
    block_tokens: int = 16,
    threads: int | None = None,
) -> LanguageModel:
    """Decode a model that you hold. The model stays yours: your own calls of it give what they gave before.

    Args:
        model: a causal language model of transformers, or any callable f(token_ids[B, S]) -> logits[B, S, V],
            which is decoded without a cache.
        tokenizer: needed for text prompts and for text results.
        vocab_size, max_tokens, device: of a callable; a model knows its own.
        budget_bytes, block_tokens, threads: as for `load`.

    Raises:
        UnsupportedModel: the model cannot be decoded on the cache; `AttachMismatch` if its cached output
            differs from its own, with the first layer that does.
    """
    _check_sizes(budget_bytes=budget_bytes, block_tokens=block_tokens, threads=threads, max_tokens=max_tokens)
    binding = _bind(model, vocab_size=vocab_size, max_tokens=max_tokens, device=device)
    if tokenizer is not None:
        check_tokenizer(tokenizer, binding.vocab_size)
    return _language_model(
        binding,
        tokenizer,
        getattr(model, "generation_config", None),
        budget_bytes=budget_bytes,
        block_tokens=block_tokens,
        threads=threads,
    )


class LanguageModel:
    """A model, a cache and a tokenizer. Made by `load` or `attach`.

    Options of decoding have the names, defaults and meaning of `transformers.GenerationConfig`; unset ones
    come from the model's generation config. KVLoom adds `seed` (of a request: the same seed gives the same
    text alone or in any batch), `output_logits`, `top_logprobs` and `presence_penalty`.
    """

    def __init__(self, engine: Engine, tokenizer: Any, generation_config: GenerationConfig | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.generation_config = generation_config

    @property
    def binding(self) -> Binding:
        """How the model is attached."""
        return self.engine.binding

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.binding.vocab_size

    @property
    def max_tokens(self) -> int | None:
        """The model's context; None if it states none."""
        return self.binding.max_tokens

    # ---- generating ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any = None,
        *,
        context: Context | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        **options: Any,
    ) -> Any:
        """Generate from one prompt or several of any lengths.

        Args:
            prompt: text, token ids (a list, or a tensor of shape [tokens] or [1, tokens]), or a list of
                prompts. May be left out if there is a context.
            context: what the prompts continue.
            options: see the class.

        Returns:
            a `Generation`; with several sequences a prompt (`num_return_sequences`) a list of them; with a list
            of prompts a list of that.

        Raises:
            InvalidRequest, CacheFull: before anything is computed. A logits processor's own exception passes
            through. Nothing is leaked in either case.
        """
        asked = _Asked(context, generation_config, logits_processor, stopping_criteria, options)
        results, several = self._decode(prompt, asked)
        shaped = [own[0] if len(own) == 1 else own for own in results]
        return shaped if several else shaped[0]

    def beam_search(
        self,
        prompt: Any = None,
        *,
        num_beams: int = 4,
        context: Context | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        **options: Any,
    ) -> Any:
        """Beam search: `generate` with `num_beams`, whose result is always a list of hypotheses, best first.

        Scoring and stopping are those of `transformers.generate`. The prompt is computed and stored once.

        Returns:
            `Hypotheses`, `num_return_sequences` of them; a list of these for a list of prompts.
        """
        options = {**options, "num_beams": num_beams}
        asked = _Asked(context, generation_config, logits_processor, stopping_criteria, options)
        results, several = self._decode(prompt, asked)
        return results if several else results[0]

    def stream(
        self,
        prompt: Any = None,
        *,
        context: Context | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        **options: Any,
    ) -> Stream:
        """Generate one sequence and hand out each token as it comes.

        Returns:
            a `Stream`: iterate over its pieces, whose texts joined are the text that `generate` returns. Its
            `result` is the `Generation`, once it is exhausted. Closing it early frees what it held.
        """
        asked = _Asked(context, generation_config, logits_processor, stopping_criteria, options)
        requests, several = self._requests(prompt, asked)
        if several or requests[0].max_rows > 1:
            raise InvalidRequest("a stream has one prompt and one sequence: beams and batches use generate().")
        self._submit(requests)
        return Stream(self, requests[0])

    # ---- contexts ------------------------------------------------------------------------------------------

    def prefill(self, prompt: Any, *, context: Context | None = None) -> Context:
        """Compute a prompt once, to continue it any number of times.

        Args:
            prompt: text or token ids.
            context: what the prompt continues; unchanged.
        """
        new_ids = read_prompt(prompt, self.tokenizer, vocab_size=self.vocab_size, continues=context is not None)
        return self._extended(context, new_ids, all_logits=False)[1]

    def extend(self, context: Context | None, token_ids: Any, *, start: int | None = None) -> Extended:
        """The hand-driven cache: run the new tokens of a sequence, and only these.

        Args:
            context: what came before; None at the start. Unchanged.
            token_ids: the new tokens, a list or a tensor of shape [n] or [1, n].
            start: the position of the first of them, as a check: it must be `context.tokens`.

        Returns:
            `Extended`: `logits` float[n, vocab], a row for each new token (row i follows token i; earlier tokens
            have no rows, so compare with the last n rows of an uncached forward), and the new `context`.

        Raises:
            CacheMismatch: `start` is not the end of the context, or the tokens repeat the whole context.
        """
        new_ids = read_prompt(token_ids, None, vocab_size=self.vocab_size)
        _check_continuation(context, new_ids, start)
        logits, extended = self._extended(context, new_ids, all_logits=True)
        return Extended(logits, extended)

    def verify(
        self,
        prompts: Any = None,
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> Report:
        """Prove on this model that cached output equals uncached output.

        Greedy decoding, sampling and beam search are compared with the model's own forward (`use_cache=False`);
        then a cold with a warm prefix, one chunk with many, alone with in a ragged batch. The checks run on caches
        of their own, which are freed; contexts and other requests are not touched.

        Args:
            prompts: a prompt or a list of prompts; by default three short ones that fit the model's context.
            max_new_tokens: of each run; by default 24, or a third of a context that is shorter than 72.
            seed: of the sampling, and of random prompts where there is no tokenizer.
            on_progress: called with what runs next, how many runs are done, and how many there are.

        Returns:
            a `Report`; `report.ok` is False if any check failed.

        Raises:
            InvalidRequest: prompts or `max_new_tokens` do not fit the model.
        """
        return run_checks(
            lambda engine: LanguageModel(engine, self.tokenizer, None),
            self.engine,
            self.tokenizer,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            on_progress=on_progress,
        )

    def detach(self) -> None:
        """Give the model back to its owner; contexts and this object cannot be used any more."""
        self.engine.shut_down()

    # ---- inside --------------------------------------------------------------------------------------------

    def _decode(self, prompt: Any, asked: _Asked) -> tuple[list[Hypotheses], bool]:
        """The sequences of each prompt, and whether several prompts were passed."""
        requests, several = self._requests(prompt, asked)
        self._submit(requests)
        self.engine.run(requests)
        return [self._results(request) for request in requests], several

    def _requests(self, prompt: Any, asked: _Asked) -> tuple[list[Request], bool]:
        """A checked request for each prompt; nothing is queued yet."""
        options = resolve(
            self.generation_config,
            asked.generation_config,
            asked.options,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_tokens,
            known=OWN_OPTIONS,
        )
        token_ids, several = self._whole_prompts(prompt, asked.context)
        return [self._request(own, options, asked) for own in token_ids], several

    def _whole_prompts(self, prompt: Any, context: Context | None) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, the context's included."""
        if context is not None:
            context.tables_for(self.engine)
            if prompt is None:
                return [list(context.token_ids)], False
        read = read_prompts(prompt, self.tokenizer, vocab_size=self.vocab_size, continues=context is not None)
        before = () if context is None else context.token_ids
        return [[*before, *own] for own in read.token_ids], read.several

    def _request(self, prompt_ids: list[int], options: Options, asked: _Asked) -> Request:
        new_tokens = options.lengths(len(prompt_ids)).new_tokens
        self._check_length(len(prompt_ids), new_tokens)
        decoder = make_decoder(
            options,
            prompt_ids,
            vocab_size=self.vocab_size,
            device=self.binding.device,
            tokenizer=self.tokenizer,
            logits_processor=asked.logits_processor,
            stopping_criteria=asked.stopping_criteria,
        )
        return Request(
            prompt_ids=prompt_ids,
            decoder=decoder,
            max_new_tokens=new_tokens,
            max_rows=max(options.num_beams, options.num_return_sequences),
            use_cache=options.use_cache,
            context=None if asked.context is None else asked.context.tables_for(self.engine),
            keep_tables=options.num_beams == 1,
        )

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        limit = self.max_tokens
        if limit is None or prompt_tokens + new_tokens <= limit:
            return
        if prompt_tokens >= limit:
            raise PromptTooLong(
                f"the prompt has {prompt_tokens:,} tokens; the model's context of {limit:,} leaves no room for a "
                "new one. Shorten the prompt."
            )
        raise PromptTooLong(
            f"{prompt_tokens:,} prompt tokens and {new_tokens:,} new ones exceed the model's context of {limit:,}. "
            f"Lower max_new_tokens to {limit - prompt_tokens:,}, or shorten the prompt."
        )

    def _submit(self, requests: list[Request]) -> None:
        """Queue all or none."""
        try:
            for request in requests:
                self.engine.submit(request)
        except BaseException:
            for request in requests:
                self.engine.abort(request)
            raise

    def _results(self, request: Request) -> Hypotheses:
        """The sequences of a request that is done."""
        hypotheses = request.decoder.results()
        usage = request.usage(sum(len(own.token_ids) for own in hypotheses))
        generations = []
        for own in hypotheses:
            token_ids = [*request.prompt_ids, *own.token_ids]
            generations.append(
                self._generation(request, own, token_ids, usage, request.kept.pop(tuple(token_ids), None))
            )
        return Hypotheses(generations, request.decoder.sequences())

    def _generation(
        self, request: Request, own: Hypothesis, token_ids: list[int], usage: Usage, holding: Holding | None
    ) -> Generation:
        tokenizer = self.tokenizer
        result = Generation(
            text="" if tokenizer is None else decode_new(tokenizer, request.prompt_ids, own.token_ids),
            tokens=[] if tokenizer is None else list(tokenizer.convert_ids_to_tokens(own.token_ids)),
            token_ids=own.token_ids,
            logprobs=own.logprobs,
            top_logprobs=own.top_logprobs,
            logits=own.logits,
            finish_reason=own.finish_reason,
            score=own.score,
            usage=usage,
            _make_context=lambda: Context(self.engine, token_ids, holding),
        )
        if holding is not None:
            # A context that was asked for keeps the tables itself.
            result.when_dropped(self.engine.release_unclaimed, holding)
        return result

    def _extended(self, context: Context | None, new_ids: list[int], *, all_logits: bool) -> tuple[Tensor, Context]:
        """Run `new_ids` behind a context; logits of these tokens, and the longer context."""
        holding = None if context is None else context.tables_for(self.engine)
        token_ids = [*(() if context is None else context.token_ids), *new_ids]
        if self.max_tokens is not None and len(token_ids) > self.max_tokens:
            raise PromptTooLong(
                f"{len(token_ids):,} tokens exceed the model's context of {self.max_tokens:,}. Shorten them."
            )
        if self.engine.cache is None:
            logits = self._uncached_logits(token_ids, len(new_ids)) if all_logits else torch.empty(0)
            return logits, Context(self.engine, token_ids, None)
        logits, extended = self.engine.compute(token_ids, context=holding, logits_of=len(new_ids) if all_logits else 1)
        return logits, Context(self.engine, token_ids, extended)

    def _uncached_logits(self, token_ids: list[int], last: int) -> Tensor:
        whole = torch.tensor([token_ids], device=self.binding.device)
        return self.binding.forward_uncached(whole, last=last)[0]

    def __repr__(self) -> str:
        cache = self.engine.cache
        held = "no cache" if cache is None else f"{cache.blocks} blocks of {cache.layout.block_tokens} tokens"
        return f"LanguageModel({self.binding.name}, {held}, {self.binding.dtype}, {self.binding.device})"


@dataclass(frozen=True)
class _Asked:
    """The arguments of one call, as they were passed."""

    context: Context | None
    generation_config: GenerationConfig | None
    logits_processor: Iterable[LogitsProcessor] | None
    stopping_criteria: Iterable[StoppingCriteria] | None
    options: dict[str, Any]


class Stream(Iterator[Piece]):
    """The pieces of one sequence, as they are generated; see `LanguageModel.stream`."""

    def __init__(self, lm: LanguageModel, request: Request) -> None:
        self._lm = lm
        self._request = request
        self._pieces = self._run()
        self.result: Generation | None = None

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating and free what was held. Called by itself when the stream is dropped."""
        self._pieces.close()
        if self.result is None:
            self._lm.engine.abort(self._request)

    def _run(self) -> Generator[Piece, None, None]:
        request, engine = self._request, self._lm.engine
        texts = None if self._lm.tokenizer is None else Detokenizer(self._lm.tokenizer, request.prompt_ids)
        shown = 0
        try:
            while not request.done or shown < len(request.streamed):
                if shown == len(request.streamed):
                    engine.step()
                    continue
                token_id, logprob = request.streamed[shown]
                shown += 1
                text = "" if texts is None else texts.push(token_id)
                if not request.done or shown < len(request.streamed):
                    yield Piece(text, token_id, logprob)
            engine.run([request])  # raises what the request failed with
            self.result = self._lm._results(request)[0]
            rest = "" if texts is None else texts.finish()
            yield Piece(text + rest, token_id, logprob, self.result.finish_reason)
        except BaseException:
            if self.result is None:
                engine.abort(request)
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _bind(model: Any, *, vocab_size: int | None, max_tokens: int | None, device: torch.device | str | None) -> Binding:
    # PEFT wraps a model of transformers, into which it has put its adapters.
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(wrapped, PreTrainedModel):
        for name, value in {"vocab_size": vocab_size, "max_tokens": max_tokens, "device": device}.items():
            if value is not None:
                raise InvalidRequest(f"`{name}` is for callables; a transformers model knows its own.")
        return _bind_transformers(wrapped, exclusive=False)
    if not callable(model):
        raise UnsupportedModel(f"a {type(model).__name__} is neither a transformers model nor callable.")
    if vocab_size is None:
        raise InvalidRequest("a callable f(token_ids) -> logits needs `vocab_size`.")
    return CallableBinding(model, vocab_size=vocab_size, max_tokens=max_tokens, device=device or "cpu")


def _bind_transformers(model: PreTrainedModel, *, exclusive: bool) -> AttentionInterfaceBinding:
    binding = AttentionInterfaceBinding(model, exclusive=exclusive)
    prove(binding)
    return binding


def _language_model(
    binding: Binding,
    tokenizer: Any,
    generation_config: Any,
    *,
    budget_bytes: int | None,
    block_tokens: int,
    threads: int | None,
) -> LanguageModel:
    if threads is not None:
        torch.set_num_threads(threads)
    engine = Engine(binding, budget_bytes=budget_bytes, block_tokens=block_tokens)
    config = generation_config if isinstance(generation_config, GenerationConfig) else None
    return LanguageModel(engine, tokenizer, config)


def _check_continuation(context: Context | None, new_ids: list[int], start: int | None) -> None:
    held = 0 if context is None else context.tokens
    if start is not None and start != held:
        raise CacheMismatch(
            f"the new tokens must start at position {held}, the end of the context; start={start} was passed. "
            f"Pass only the tokens that the context does not hold: token_ids[{held}:], start={held}."
        )
    longest = 1 if start is None else REPEATED_CONTEXT_TOKENS
    if context is not None and held >= longest and tuple(new_ids[:held]) == context.token_ids:
        raise CacheMismatch(
            f"the {len(new_ids)} new tokens begin with all {held} tokens that the context already holds, which would "
            f"store them twice. Pass token_ids[{held}:]; if the repetition is meant, extend in two calls."
        )


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidRequest(f"`{name}` must be a whole number of at least 1; got {value!r}.")


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequest(f"`device={device}` is not a device of PyTorch, such as cpu or cuda.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("`device=cuda` was asked for, but PyTorch finds no GPU here. Use device='cpu'.")
    return found
