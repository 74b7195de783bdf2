"""From a call to requests, and from finished requests to results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from kvloom.cache.retention import Retention
from kvloom.context import Context, check_context
from kvloom.decoding import Hypothesis, Options, make_decoder, resolve
from kvloom.engine import Engine, Request, Usage
from kvloom.engine.holding import Holding
from kvloom.engine.retaining import check_policy, settle
from kvloom.errors import InvalidRequest, PromptTooLong
from kvloom.prompts import read_prompts
from kvloom.results import Generation, Hypotheses
from kvloom.text import decode_new, token_strings

OWN_OPTIONS = ("retention", "context", "generation_config", "logits_processor", "stopping_criteria")


class Unset:
    """What an argument is that was not passed, where None means something."""

    def __repr__(self) -> str:
        return "unset"


UNSET = Unset()


@dataclass(frozen=True)
class Asked:
    """The arguments of one call, as they were passed."""

    context: Context | None
    generation_config: GenerationConfig | None
    logits_processor: Iterable[LogitsProcessor] | None
    stopping_criteria: Iterable[StoppingCriteria] | None
    options: dict[str, Any]
    retention: Retention | Unset | None = UNSET


class Calls:
    """Turns calls into requests on one engine, and what became of them into results."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        generation_config: GenerationConfig | None,
        retention: Retention | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._generation_config = generation_config
        self._retention = retention

    def decode(self, prompt: Any, asked: Asked) -> tuple[list[Hypotheses], bool]:
        """The sequences of each prompt, and whether several prompts were passed."""
        requests, several = self.requests(prompt, asked)
        self.submit(requests)
        self._engine.run(requests)
        return [self.results(request) for request in requests], several

    def requests(self, prompt: Any, asked: Asked) -> tuple[list[Request], bool]:
        """A checked request for each prompt; nothing is queued yet."""
        check_context(asked.context)
        policy = self.policy(asked.retention, asked.context)
        options = resolve(
            self._generation_config,
            asked.generation_config,
            asked.options,
            vocab_size=self._engine.binding.vocab_size,
            max_position_embeddings=None
            if policy is not None and policy.reindexes
            else self._engine.binding.max_tokens,
            known=OWN_OPTIONS,
        )
        self.policy(asked.retention, asked.context, use_cache=options.use_cache)
        token_ids, several = self._whole_prompts(prompt, asked.context)
        return [self._request(own, options, asked, policy) for own in token_ids], several

    def policy(
        self, asked: Retention | Unset | None, context: Context | None, *, use_cache: bool = True
    ) -> Retention | None:
        """The policy of a call: what it asks for, else its context's, else the model's.

        Raises `InvalidRequest` if the context was computed under another one, or if there is no cache to keep.
        """
        own = self._retention if context is None else context.retention
        policy = own if isinstance(asked, Unset) else asked
        check_policy(policy)
        if context is not None and own is not None and not own.same_as(policy):
            raise InvalidRequest(
                f"the context was computed under {own!r}, and goes on under it alone, not under `retention={policy!r}`."
                " Leave `retention` away, or prefill the context anew."
            )
        if policy is not None and not use_cache:
            raise InvalidRequest(
                f"{type(policy).__name__} lets go of a part of the cache, and `use_cache=False` has none. Leave one "
                "away: `retention=None` compares with the model's own forward."
            )
        return policy

    def _whole_prompts(self, prompt: Any, context: Context | None) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, the context's included."""
        check_context(context)
        if context is not None:
            context.tables_for(self._engine)
            if prompt is None:
                return [list(context.token_ids)], False
        read = read_prompts(
            prompt, self._tokenizer, vocab_size=self._engine.binding.vocab_size, continues=context is not None
        )
        before = () if context is None else context.token_ids
        return [[*before, *own] for own in read.token_ids], read.several

    def settled(self, policy: Retention | None, *, prompt_tokens: int, new_tokens: int) -> Retention | None:
        """The policy as one request applies it; raises `InvalidRequest` if the request does not fit the model."""
        binding, cache = self._engine.binding, self._engine.cache
        if policy is None:
            check_length(binding.max_tokens, prompt_tokens, new_tokens)
            return None
        layout = None if cache is None else cache.layout
        return settle(policy, binding, layout, prompt_tokens=prompt_tokens, new_tokens=new_tokens)

    def _request(self, prompt_ids: list[int], options: Options, asked: Asked, policy: Retention | None) -> Request:
        new_tokens = options.lengths(len(prompt_ids)).new_tokens
        retention = self.settled(policy, prompt_tokens=len(prompt_ids), new_tokens=new_tokens)
        decoder = make_decoder(
            options,
            prompt_ids,
            vocab_size=self._engine.binding.vocab_size,
            device=self._engine.binding.device,
            tokenizer=self._tokenizer,
            logits_processor=asked.logits_processor,
            stopping_criteria=asked.stopping_criteria,
        )
        return Request(
            prompt_ids=prompt_ids,
            decoder=decoder,
            max_new_tokens=new_tokens,
            max_rows=max(options.num_beams, options.num_return_sequences),
            use_cache=options.use_cache,
            context=None if asked.context is None else asked.context.tables_for(self._engine),
            context_owner=asked.context,
            retention=retention,
            keep_tables=options.num_beams == 1,
        )

    def submit(self, requests: list[Request]) -> None:
        """Queue all or none."""
        try:
            for request in requests:
                self._engine.submit(request)
        except BaseException:
            for request in requests:
                self._engine.abort(request)
            raise

    def results(self, request: Request) -> Hypotheses:
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
        tokenizer = self._tokenizer
        result = Generation(
            text="" if tokenizer is None else decode_new(tokenizer, request.prompt_ids, own.token_ids),
            tokens=[] if tokenizer is None else token_strings(tokenizer, own.token_ids),
            token_ids=own.token_ids,
            logprobs=own.logprobs,
            top_logprobs=own.top_logprobs,
            logits=own.logits,
            finish_reason=own.finish_reason,
            score=own.score,
            usage=usage,
            _make_context=lambda: Context(self._engine, token_ids, holding, request.retention),
        )
        if holding is not None:
            # A context that was asked for keeps the tables itself.
            result.when_dropped(self._engine.release_unclaimed, holding)
        return result


def check_length(limit: int | None, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `PromptTooLong` unless both fit the model's context of `limit` tokens."""
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
