"""From a call to requests: what was asked for is read, checked and queued."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from kvloom.cache.retention import Retention
from kvloom.decoding import Allowed, Options, make_decoder, resolve
from kvloom.engine import Engine, Request
from kvloom.engine.admission import check_length
from kvloom.engine.looking import check_look
from kvloom.engine.retaining import check_policy, settle
from kvloom.errors import InvalidRequest
from kvloom.language_model.context import Context, check_context
from kvloom.language_model.generations import results_of
from kvloom.language_model.looking import first_seen, wanted_of
from kvloom.language_model.results import Hypotheses
from kvloom.models import Media
from kvloom.prompts import Prompt, PromptReader, Start, read_sourced, target_side

OWN_OPTIONS = (
    "retention",
    "context",
    "decoder_input_ids",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
)


class Unset:
    """What an argument is that was not passed, where None means something."""

    def __repr__(self) -> str:
        return "unset"


UNSET = Unset()


@dataclass(frozen=True)
class Asked:
    """The arguments of one call, as they were passed.

    `every_row` is for those who look inside without a cache; see `Wanted`. `allowed` is transformers'
    `prefix_allowed_tokens_fn` for one prompt.
    """

    context: Context | None
    generation_config: GenerationConfig | None
    logits_processor: Iterable[LogitsProcessor] | None
    stopping_criteria: Iterable[StoppingCriteria] | None
    options: dict[str, Any]
    retention: Retention | Unset | None = UNSET
    decoder_input_ids: Any = None
    every_row: bool = False
    allowed: Allowed | None = None


class Calls:
    """Turns calls into requests on one engine.

    Attributes:
        reader: of prompts that no encoder reads.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        generation_config: GenerationConfig | None,
        retention: Retention | None = None,
        *,
        processor: Any = None,
    ) -> None:
        self.reader = PromptReader(engine.binding, target_side(tokenizer, engine.binding), processor)
        self._engine = engine
        self._tokenizer = tokenizer
        self._generation_config = generation_config
        self._retention = retention

    def decode(self, prompt: Any, asked: Asked) -> tuple[list[Hypotheses], bool]:
        """The sequences of each prompt, and whether several prompts were passed."""
        requests, several = self.requests(prompt, asked)
        try:
            self.submit(requests)
            self._engine.run(requests)
            return [self.results(request) for request in requests], several
        except BaseException:
            self._engine.abort_all(requests)
            raise

    def requests(self, prompt: Any, asked: Asked, options: Options | None = None) -> tuple[list[Request], bool]:
        """A checked request for each prompt; nothing is queued yet. `options` are by default those that were asked."""
        check_context(asked.context)
        options = self.options(asked) if options is None else options
        policy = self.policy(asked.retention, asked.context, use_cache=options.use_cache)
        prompts, several = self.prompts(prompt, asked.context, asked.decoder_input_ids, options)
        return [self._request(own, options, asked, policy) for own in prompts], several

    def options(self, asked: Asked) -> Options:
        """The options of a call, with transformers' precedence and every default filled in."""
        policy = self.policy(asked.retention, asked.context)
        return resolve(
            self._generation_config,
            asked.generation_config,
            asked.options,
            vocab_size=self._engine.binding.vocab_size,
            max_position_embeddings=None
            if policy is not None and policy.reindexes
            else self._engine.binding.max_tokens,
            known=OWN_OPTIONS,
        )

    def policy(
        self, asked: Retention | Unset | None, context: Context | None, *, use_cache: bool = True
    ) -> Retention | None:
        """The policy of a call: what it asks for, else its context's, else the model's.

        Raises `InvalidRequest` if the context was computed under another one, or if there is no cache to keep.
        """
        check_context(context)
        own = self._retention if context is None else context.retention
        policy = own if isinstance(asked, Unset) else asked
        check_policy(policy)
        if context is not None and own is not None and not own.same_as(policy):
            raise InvalidRequest(
                f"the context was computed under {own!r}, and goes on under it alone, not under `retention={policy!r}`."
                " Leave `retention` out, or prefill the context again."
            )
        if policy is not None and not use_cache:
            raise InvalidRequest(
                f"{type(policy).__name__} lets go of a part of the cache, and `use_cache=False` has none. Leave one "
                "away: `retention=None` compares with the model's own forward."
            )
        return policy

    def prompts(
        self,
        prompt: Any,
        context: Context | None,
        decoder_input_ids: Any,
        options: Options | None = None,
        *,
        cue: bool = True,
    ) -> tuple[list[Prompt], bool]:
        """Each prompt, the context's tokens included, and whether several were passed.

        Args:
            prompt: what continues a context; without one, the source of an encoder-decoder model.
            decoder_input_ids: what such a model's sequences begin with.
            options: by default the model's own.
            cue: whether messages end with the cue for an answer.
        """
        check_context(context)
        binding = self._engine.binding
        if decoder_input_ids is not None and (binding.encoder is None or context is not None):
            what = "a context has begun already" if context is not None else "only encoder-decoder models have them"
            raise InvalidRequest(f"`decoder_input_ids` cannot be taken: {what}. Pass the tokens as the prompt.")
        if context is None and binding.encoder is not None:
            start = Start(decoder_input_ids, self.start_tokens(options))
            return read_sourced(prompt, self._tokenizer, binding, start)
        if context is None:
            return self.reader.read_all(prompt, cue=cue)
        context.tables_for(self._engine)
        begun = Prompt(list(context.token_ids), context.source, context.media)
        if prompt is None:
            return [begun], False
        read, several = self.reader.read_all(prompt, before=context.token_ids, cue=cue)
        return [replace(own, source=begun.source).behind(begun.token_ids, begun.media) for own in read], several

    def settled(
        self, policy: Retention | None, *, prompt_tokens: int, new_tokens: int, media: Media | None = None
    ) -> Retention | None:
        """The policy as one request applies it; raises `InvalidRequest` if the request does not fit the model."""
        binding, cache = self._engine.binding, self._engine.cache
        if policy is None:
            check_length(binding.max_tokens, prompt_tokens, new_tokens)
            return None
        layout = None if cache is None else cache.layout
        settled = settle(policy, binding, layout, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        if media is not None and settled.reindexes:
            raise InvalidRequest(
                "SinkWindow cannot be re-indexed behind images, whose rotary positions count no tokens. Stay within "
                f"the trained length of {binding.max_tokens:,} tokens, with `reindex=False`."
            )
        return settled

    def prompt(
        self, prompt: Any, context: Context | None, decoder_input_ids: Any = None, *, cue: bool = True
    ) -> Prompt:
        """A single prompt, the context's tokens included."""
        if prompt is None:
            raise InvalidRequest("there is no prompt. Pass text or token ids.")
        read, several = self.prompts(prompt, context, decoder_input_ids, cue=cue)
        if several:
            raise InvalidRequest("this call takes a single prompt, and got a list of prompts. Call once for each.")
        return read[0]

    def prompt_to_score(self, prompt: Any, context: Context | None, decoder_input_ids: Any) -> Prompt:
        """The same, where a context alone will do."""
        if prompt is None and context is None:
            raise InvalidRequest("there is nothing to continue. Pass `prompt`, `context` or both.")
        if prompt is None:
            return self.prompts(None, context, decoder_input_ids)[0][0]
        return self.prompt(prompt, context, decoder_input_ids)

    def start_tokens(self, options: Options | None) -> tuple[int, ...]:
        """The decoder's start token, or one for each source: transformers takes BOS where none is set."""
        if options is None:
            options = resolve(self._generation_config, None, {})
        if options.decoder_start_token_id:
            return options.decoder_start_token_id
        return () if options.bos_token_id is None else (options.bos_token_id,)

    def _request(self, prompt: Prompt, options: Options, asked: Asked, policy: Retention | None) -> Request:
        prompt_ids = prompt.token_ids
        new_tokens = options.lengths(len(prompt_ids)).new_tokens
        retention = self.settled(policy, prompt_tokens=len(prompt_ids), new_tokens=new_tokens, media=prompt.media)
        wanted = wanted_of(
            output_attentions=options.output_attentions,
            output_hidden_states=options.output_hidden_states,
            every_row=asked.every_row,
        )
        check_look(wanted, self._engine.binding, retention)
        decoder = make_decoder(
            options,
            prompt_ids,
            vocab_size=self._engine.binding.vocab_size,
            device=self._engine.binding.device,
            tokenizer=self._tokenizer,
            logits_processor=asked.logits_processor,
            stopping_criteria=asked.stopping_criteria,
            encoder_ids=_encoder_ids(prompt, options),
            allowed=asked.allowed,
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
            policy=policy,
            keep_tables=options.num_beams == 1,
            source=prompt.source,
            media=prompt.media,
            wanted=wanted,
            looks_from=0 if asked.every_row else first_seen(asked.context, len(prompt_ids)),
        )

    def submit(self, requests: list[Request]) -> None:
        """Queue all or none."""
        try:
            for request in requests:
                self._engine.submit(request)
        except BaseException:
            self._engine.abort_all(requests)
            raise

    def results(self, request: Request) -> Hypotheses:
        """The sequences of a request that is done."""
        return results_of(request, self._engine, self._tokenizer)


def _encoder_ids(prompt: Prompt, options: Options) -> list[int] | None:
    """What the processors that look at the encoder's input are given."""
    if prompt.source is None:
        return None
    asked = options.encoder_repetition_penalty != 1.0 or options.encoder_no_repeat_ngram_size
    if prompt.source.token_ids is None and asked:
        raise InvalidRequest(
            "`encoder_repetition_penalty` and `encoder_no_repeat_ngram_size` look at the source's tokens, of which "
            "features have none. Leave them out."
        )
    return None if prompt.source.token_ids is None else list(prompt.source.token_ids)
