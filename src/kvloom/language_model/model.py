"""What users hold: a `LanguageModel`, whose calls give generations, streams and contexts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from kvloom.cache.retention import Retention
from kvloom.engine import Engine
from kvloom.errors import InvalidRequest
from kvloom.exclusive import uninterrupted
from kvloom.language_model.calls import UNSET, Asked, Calls, Unset
from kvloom.language_model.context import Context
from kvloom.language_model.extending import extend, run_behind
from kvloom.language_model.importing import import_cache
from kvloom.language_model.inspecting import Inspection, inspect
from kvloom.language_model.results import Extended
from kvloom.language_model.scoring import Normalize, Scores, score
from kvloom.language_model.stream import Stream
from kvloom.models import Binding
from kvloom.planning import MemoryPlan, plan_for
from kvloom.prompts import PromptReader
from kvloom.units import counted
from kvloom.verify import Report
from kvloom.verify import verify as run_checks


class LanguageModel:
    """A model, a cache and a tokenizer. Made by `load` or `attach`.

    Options of decoding have the names, defaults and meaning of `transformers.GenerationConfig`; unset ones
    come from the model's generation config. KVLoom adds `seed` (of a request: the same seed gives the same
    text alone or in any batch), `output_logits`, `top_logprobs` and `presence_penalty`.
    `output_attentions` and `output_hidden_states` let one look inside; see `Generation` for their shapes.

    A prompt is text; token ids, as a list or as a tensor of shape [tokens] or [1, tokens]; or messages in the format of
    transformers, which the chat template writes: `[{"role": "user", "content": "..."}]`. For an image-text model the
    content may be a list of blocks, `{"type": "image", "image": ...}` (an image of PIL, or its "path" or "url") and
    `{"type": "text", "text": "..."}`, and what its processor returns for one prompt is a prompt too. Behind a context,
    pass the new messages alone: an answer that the context ends with is closed as the template closes it.

    Attributes:
        engine: the model and its cache.
        tokenizer: of text prompts and texts; may be None.
        generation_config: the model's own options.
        retention: the policy of calls that name none.
        calls: makes requests of calls.
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
        self.engine = engine
        self.tokenizer = tokenizer
        self.processor = processor
        self.generation_config = generation_config
        self.retention = retention
        self.calls = Calls(engine, tokenizer, generation_config, retention, processor=processor)

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

    @property
    def reader(self) -> PromptReader:
        """Turns prompts into token ids, and images into what the model is shown."""
        return self.calls.reader

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence: the model's context, or None where its retention policy outgrows that."""
        return None if self.retention is not None and self.retention.reindexes else self.max_tokens

    # ---- generating ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any = None,
        *,
        context: Context | None = None,
        decoder_input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        retention: Retention | Unset | None = UNSET,
        **options: Any,
    ) -> Any:
        """Generate from one prompt or several of any lengths.

        Args:
            prompt: text, token ids, messages, or a list of prompts; see the class. May be left out if there is a
                context.
                Of an encoder-decoder model it is the source, which the encoder reads once: text, token ids, or
                features (a float tensor); behind a context, what continues the decoder's sequence.
            context: what the prompts continue.
            retention: a policy that lets go of tokens, such as `kvloom.SinkWindow()`, which changes the output; None
                for none. By default the context's, or that of `load` and `attach`.
            decoder_input_ids: of an encoder-decoder model, what the decoder's sequence begins with: token ids, or a
                list of them for each source. By default the start token (`decoder_start_token_id`), which is put before
                ids that do not begin with it, except for Whisper.
            options: see the class.

        Returns:
            a `Generation`; with several sequences a prompt (`num_return_sequences`) a list of them; with a list
            of prompts a list of that.

        Raises:
            InvalidRequest, CacheFull: before anything is computed. A logits processor's own exception passes
            through. Nothing is leaked in either case.
        """
        asked = Asked(
            context, generation_config, logits_processor, stopping_criteria, options, retention, decoder_input_ids
        )
        results, several = self.calls.decode(prompt, asked)
        shaped = [own[0] if len(own) == 1 else own for own in results]
        return shaped if several else shaped[0]

    def beam_search(
        self,
        prompt: Any = None,
        *,
        num_beams: int = 4,
        context: Context | None = None,
        decoder_input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        retention: Retention | Unset | None = UNSET,
        **options: Any,
    ) -> Any:
        """Beam search: `generate` with `num_beams`, whose result is always a list of hypotheses, best first.

        Scoring and stopping are those of `transformers.generate`. The prompt is computed and stored once.

        Returns:
            `Hypotheses`, `num_return_sequences` of them; a list of these for a list of prompts.
        """
        options = {**options, "num_beams": num_beams}
        asked = Asked(
            context, generation_config, logits_processor, stopping_criteria, options, retention, decoder_input_ids
        )
        results, several = self.calls.decode(prompt, asked)
        return results if several else results[0]

    def stream(
        self,
        prompt: Any = None,
        *,
        context: Context | None = None,
        decoder_input_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        retention: Retention | Unset | None = UNSET,
        **options: Any,
    ) -> Stream:
        """Generate one sequence and hand out each token as it comes.

        Returns:
            a `Stream`: iterate over its pieces, whose texts joined are the text that `generate` returns. Its
            `result` is the `Generation`, once it is exhausted. Closing it early frees what it held.
        """
        asked = Asked(
            context, generation_config, logits_processor, stopping_criteria, options, retention, decoder_input_ids
        )
        requests, several = self.calls.requests(prompt, asked)
        if several or requests[0].max_rows > 1:
            raise InvalidRequest("a stream has one prompt and one sequence. Use generate() for beams and batches.")
        return Stream(self.engine, self.tokenizer, self.calls, requests[0])

    # ---- contexts ------------------------------------------------------------------------------------------

    def prefill(
        self,
        prompt: Any,
        *,
        context: Context | None = None,
        decoder_input_ids: Any = None,
        retention: Retention | Unset | None = UNSET,
        add_generation_prompt: bool = False,
    ) -> Context:
        """Compute a prompt once, to continue it any number of times.

        Args:
            prompt: text, token ids or messages; of an encoder-decoder model, the source.
            context: what the prompt continues; unchanged.
            decoder_input_ids: as for `generate`.
            retention: the policy that the context, and what continues it, is under; as for `generate`.
            add_generation_prompt: whether messages end with the cue for an answer, so that `generate(context=...)`
                and `score` go on with one. Without it, go on with more messages.
        """
        policy = self.calls.policy(retention, context)
        whole = self.calls.prompt(prompt, context, decoder_input_ids, cue=add_generation_prompt)
        return run_behind(context, whole, self.engine, self.calls, policy=policy)[1]

    def extend(
        self,
        context: Context | None,
        token_ids: Any,
        *,
        start: int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Extended:
        """The hand-driven cache: run the new tokens of a sequence, and only these.

        Args:
            context: what came before; None at the start. Unchanged.
            token_ids: the new tokens, a list or a tensor of shape [n] or [1, n].
            start: the position of the first of them, as a check: it must be `context.tokens`.
            output_attentions, output_hidden_states: whether the result shows these of the new tokens.

        Returns:
            `Extended`: `logits` float[n, vocab], a row for each new token (row i follows token i; earlier tokens
            have no rows, so compare with the last n rows of an uncached forward), and the new `context`.

        Raises:
            CacheMismatch: `start` is not the end of the context, or the tokens repeat the whole context.
            UnsupportedOption: the model does not show its inside.
        """
        return extend(
            self.engine,
            self.calls,
            context,
            token_ids,
            start=start,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

    def import_cache(self, token_ids: Any, past_key_values: Any) -> Context:
        """A context of keys and values that transformers has computed for this model.

        `Context.export_cache` is the way back.

        They are copied and believed: what they hold is not checked beyond shapes and dtype, so nothing of this context,
        or of what continues it, enters the prefix index, and it cannot be saved.

        Args:
            token_ids: a list, or a tensor of shape [n] or [1, n]: the tokens that were computed, and any that follow.
            past_key_values: a `DynamicCache` or a tuple of (K, V) a layer, each [1, kv_heads, tokens, head_dim].

        Raises:
            InvalidRequest: other shapes or another dtype, more tokens than ids, layers that have let go of tokens, or a
                model that keeps no cache, or whose rotary factors depend on length. CacheFull: it does not fit.
        """
        return import_cache(self.engine, token_ids, past_key_values)

    def inspect(self, context: Context) -> Inspection:
        """What the cache holds of a context: its blocks, who else holds them, bytes a layer, keys and values.

        Example::

            seen = lm.inspect(lm.prefill("Once upon a time"))
            seen.groups[0].blocks, seen.bytes_by_layer
            seen.keys(layer=0, first=2, end=5).shape         # [kv_heads, 3, head_dim]

        Raises:
            ContextClosed: the context was closed, or belongs to another model.
        """
        return inspect(self.engine, context)

    def restore(self, path: str | os.PathLike[str]) -> Context:
        """The context that `Context.save` wrote: the same tokens, keys and values, in blocks of this model's cache.

        It continues exactly as the saved one would have, and its full blocks are found by later prompts that begin
        alike. Budget and block size may differ from those it was saved under; but not the block size under the int8
        codec or a retention policy. What a policy has scored and let go of is restored, too.

        Raises:
            SnapshotNotFound, SnapshotMismatch, CorruptSnapshot: no such file; made by another model (config, weights
                or adapters), dtype or codec; damaged or incomplete.
            CacheFull: the context does not fit; nothing was loaded.
            InvalidRequest: the context is under a policy that this model cannot honour as it is attached.
        """
        with uninterrupted():  # between what is held and its holder
            own = self.engine.contexts.restore(path)
            return Context(self.engine, own.token_ids, own.holding, own.retention, source=own.source, media=own.media)

    def score(
        self,
        continuations: Any,
        *,
        prompt: Any = None,
        context: Context | None = None,
        decoder_input_ids: Any = None,
        normalize: Normalize = "none",
        use_cache: bool = True,
    ) -> Scores:
        """Log-probabilities of continuations of one prompt: labels, answer candidates, whole completions.

        All continuations run in one forward pass behind the prompt, which is computed once, or not at all where the
        cache holds it (in passes of 512 tokens if they are longer together). A continuation of one token costs
        nothing more.

        Args:
            continuations: a list; each is text, or token ids (a list, or a tensor of shape [n] or [1, n]), with or
                without an EOS token at the end. Text is tokenized as it stands behind the prompt, so it mostly begins
                with a space. None may be empty.
            prompt: text, token ids or messages; may be left out if there is a context. Of an encoder-decoder model it
                is the source, and continuations are what its decoder may write.
            context: what the prompt continues; unchanged.
            decoder_input_ids: as for `generate`.
            normalize: what `Score.score` is: "none", the sum of log-probabilities; "tokens" or "bytes", the same
                divided by the number of tokens, or of bytes of UTF-8.
            use_cache: False computes the whole sequence anew for each continuation.

        Returns:
            `Scores`: a list with a `Score` for each continuation, in the order passed, and what it cost in `usage`.

        Raises:
            InvalidRequest: before anything is computed; also for text that the tokenizer would merge with the end of
                the prompt, so that no token begins where the continuation does.
            CacheFull: prompt and continuations do not fit the cache together; nothing was computed.

        Example::

            scores = lm.score([" yes", " no"], prompt="Is water wet? Answer:")
            best = max(scores, key=lambda own: own.score)
        """
        return score(
            self.engine,
            self.tokenizer,
            continuations,
            calls=self.calls,
            read=lambda: self.calls.prompt_to_score(prompt, context, decoder_input_ids),
            context=context,
            normalize=normalize,
            use_cache=use_cache,
        )

    def plan(self, **options: Any) -> MemoryPlan:
        """How much memory a batch of requests takes on this model, before anything is computed for it.

        Args:
            prompt_tokens: length of each prompt; by default 4,096, or what the model's context leaves.
            source_tokens: of an encoder-decoder model, length of each source; by default 512, or what its encoder
                reads. Its prompts are those of the decoder, by default one token.
            max_new_tokens: new tokens of each sequence; by default 256, or what the context leaves. 0 plans a context.
            num_beams: sequences that share each prompt in a beam search; by default 1.
            num_return_sequences: of the beams; without beams, samples that share each prompt. By default 1.
            batch: prompts in one call, each counted as if it shared nothing with the others; by default 1.
            block_tokens, budget_bytes, codec, retention: by default those of this model.

        Returns:
            a `MemoryPlan`: exact bytes of weights and cache, an estimate of what a process takes besides, and what
            fits the budget. `kvloom.plan` makes the same for a model that is not loaded.

        Raises:
            InvalidRequest: counts, lengths or options that make no sense, or a model that keeps no cache.
            CacheFull: the budget is below one block.

        Example::

            plan = lm.plan(prompt_tokens=1024, num_beams=8)
            plan.cache_bytes, plan.fits, plan.longest_prompt
        """
        return plan_for(self.engine, {"retention": self.retention, **options})

    def verify(
        self,
        prompts: Any = None,
        *,
        max_new_tokens: int | None = None,
        seed: int = 0,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> Report:
        """Prove on this model that cached output equals uncached output.

        Greedy decoding, sampling and beam search are compared with `use_cache=False`, and that with the model's own
        forward; then a cold with a warm prefix, one chunk with many, alone with in a ragged batch. The checks run on
        caches of their own, which are freed; contexts and other requests are not touched.

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
            lambda engine: LanguageModel(engine, self.tokenizer, None, processor=self.processor),
            self.engine,
            self.tokenizer,
            self.reader,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            retention=self.retention,
            on_progress=on_progress,
        )

    def detach(self) -> None:
        """Give the model back to its owner; contexts and this object cannot be used any more."""
        self.engine.shut_down()

    def __repr__(self) -> str:
        cache = self.engine.cache
        held = "no cache"
        if cache is not None:
            held = f"{counted(cache.blocks, 'block')} of {counted(cache.layout.block_tokens, 'token')}"
        dtype = str(self.binding.dtype).removeprefix("torch.")
        return f"LanguageModel({self.binding.name}, {held}, {dtype} on {self.binding.device})"

    def __reduce__(self) -> NoReturn:
        raise InvalidRequest(
            "a language model cannot be pickled or copied: its cache and kernels belong to this process. Load or "
            "attach it where it is to run."
        )
