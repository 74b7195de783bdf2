"""The runs that checks compare.

Every run has a cache of its own, which is freed with it: nothing that a user holds is touched, and "cold" means
cold. All runs decode without EOS and without the model's generation config, so that each is as long as was asked
for, and what decides is the logits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kvloom.engine import Engine
from kvloom.engine.planner import worst_case_blocks
from kvloom.errors import NumericalError
from kvloom.prompts import Prompt
from kvloom.verify.beams import Watch
from kvloom.verify.compare import Decoded
from kvloom.verify.lossy import SHARE_OF_COST, cost_of, recompute
from kvloom.verify.passes import passes_over
from kvloom.verify.report import Cost
from kvloom.verify.samples import Shape

NUM_BEAMS = 4

# How far cached logits may differ from uncached ones, relative to the largest |logit|. Two correct forward
# passes differ by some 1e-6 in float32; in bfloat16 (float16) by a few units in the last of 8 (11) bits, which
# layers add up. A mistake (a lost block, a wrong position) differs by a good part of the logits themselves.
RELATIVE_TOLERANCE = {
    torch.float64: 2e-5,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

Progress = Callable[[str, int, int], None]
"""Called with what is running, how many runs are done, and how many there are."""


class Decodes(Protocol):
    """What the checks need of a language model."""

    def generate(self, prompt: Any, **options: Any) -> Any:
        """See `LanguageModel.generate`."""
        ...

    def beam_search(self, prompt: Any, **options: Any) -> Any:
        """See `LanguageModel.beam_search`."""
        ...


class Runs:
    """Decodes the prompts in every way that is to be compared."""

    def __init__(
        self,
        make: Callable[[Engine], Decodes],
        engine: Engine,
        prompts: list[Prompt],
        shape: Shape,
        seed: int,
        on_progress: Progress | None,
    ) -> None:
        assert engine.cache is not None, "only a cache can be verified"
        self.prompts = prompts
        self.shape = shape
        self.seed = seed
        self.bit_identical = engine.binding.bit_identical
        self.relative_tolerance = RELATIVE_TOLERANCE.get(engine.binding.dtype, RELATIVE_TOLERANCE[torch.bfloat16])
        self.binding = engine.binding
        self._make = make
        self._engine = engine
        self._layout = engine.cache.layout
        self.lossy = self._layout.seals
        self.share_of_cost = SHARE_OF_COST.get(engine.binding.dtype, 0.0)
        self._on_progress = on_progress
        self._done = 0

    def decode(self, lm: Decodes, prompt: Prompt, **options: Any) -> Decoded:
        """The one sequence of a prompt."""
        return self._sequences(lm.generate, [prompt], options)[0][0]

    def decode_batch(self, lm: Decodes) -> list[Decoded]:
        """Greedy output of all prompts, decoded together."""
        return [own for (own,) in self._sequences(lm.generate, self.prompts, {"do_sample": False})]

    def search(self, lm: Decodes, prompt: Prompt, **options: Any) -> tuple[list[Decoded], Watch]:
        """All hypotheses of a beam search, and what it saw."""
        watch = Watch()
        beams = {"num_beams": NUM_BEAMS, "num_return_sequences": NUM_BEAMS, "logits_processor": [watch]}
        return self._sequences(lm.beam_search, [prompt], beams | options)[0], watch

    def own_forward(self, prompt: Prompt, follows: Decoded) -> Decoded:
        """What the model's own forward would choose after each token of a sequence, were it there."""
        binding = self._engine.binding
        whole = [*prompt.token_ids, *follows.token_ids[:-1]]
        passes = passes_over(binding, prompt_tokens=len(prompt.token_ids), new_tokens=len(follows.token_ids))
        ids = [torch.tensor([whole[:tokens]], device=binding.device) for tokens, _ in passes]
        rows = [
            binding.forward_own(own, last=last, source=prompt.source, media=prompt.media)[0]
            for own, (_, last) in zip(ids, passes, strict=True)
        ]
        logits = torch.cat(rows).float().cpu()
        chosen = logits.argmax(dim=-1)
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None])[:, 0]
        return Decoded(
            token_ids=chosen.tolist(), logprobs=logprobs.tolist(), logits=logits, score=0.0, cached_prompt_tokens=0
        )

    def uncached(self) -> Decodes:
        """The user's model, to be run with `use_cache=False`."""
        return self._make(self._engine)

    def cached(self, *prompts: Prompt, rows: int = 1, step_tokens: int | None = None) -> Decodes:
        """The model on a cold cache that holds just these prompts; a prompt is one chunk unless told otherwise."""
        total = sum(len(prompt.token_ids) for prompt in prompts)
        return self._make(self._cold(*prompts, rows=rows, step_tokens=step_tokens or total))

    def recomputed(self, prompt: Prompt, decoded: Decoded) -> Tensor:
        """The logits of a run's new tokens, all computed in one chunk on a cold cache of the same codec."""
        engine = self._cold(prompt, rows=1, step_tokens=len(prompt.token_ids) + len(decoded.token_ids))
        return recompute(engine, prompt, decoded)

    def cost(self, prompt: Prompt, decoded: Decoded, recomputed: Tensor) -> Cost:
        """What the codec makes of a run."""
        return cost_of(self.binding, self._layout.codec, prompt, decoded, recomputed)

    def _cold(self, *prompts: Prompt, rows: int, step_tokens: int) -> Engine:
        worst = [self._worst_case(prompt, rows, step_tokens) for prompt in prompts]
        blocks = max(sum(group) for group in zip(*worst, strict=True))
        return Engine(
            self._engine.binding,
            budget_bytes=self._layout.budget_for(blocks, open_blocks=rows * len(prompts)),
            block_tokens=self._layout.block_tokens,
            codec=self._layout.codec,
            step_tokens=step_tokens,
            block_bounds=self._layout.block_bounds,
        )

    def _worst_case(self, prompt: Prompt, rows: int, step_tokens: int) -> tuple[int, ...]:
        """Blocks that a request can come to hold in each layer group, whether or not its rows share the prompt."""
        shared, apart = (
            worst_case_blocks(
                self._layout,
                prompt_tokens=len(prompt.token_ids),
                source_tokens=0 if prompt.source is None else prompt.source.tokens,
                new_tokens=self.shape.new_tokens,
                rows=rows,
                step_tokens=step_tokens,
                shares_prompt=shares_prompt,
            )
            for shares_prompt in (True, False)
        )
        return tuple(map(max, shared, apart))

    def tell(self, what: str) -> None:
        """Report that a run begins."""
        if self._on_progress is not None:
            self._on_progress(what, self._done, 8 * len(self.prompts) + 1)
        self._done += 1

    def _sequences(
        self, call: Callable[..., Any], prompts: list[Prompt], options: dict[str, Any]
    ) -> list[list[Decoded]]:
        """Decode, and keep numbers only: a `Generation` would keep its cache alive."""
        fixed: dict[str, Any] = {"max_new_tokens": self.shape.new_tokens, "eos_token_id": None, "output_logits": True}
        passed: list[Any] = list(prompts)
        if self._engine.binding.encoder is not None:
            fixed["decoder_input_ids"] = [own.token_ids for own in prompts]
            passed = [own.source.token_ids or own.source.inputs for own in prompts if own.source is not None]
        try:
            results = call(passed, **fixed, **options)
        except NumericalError:
            if options.get("use_cache") is False:
                raise
            # The model itself gives numbers; that the cache does not is a finding, and no reason to stop.
            nothing = Decoded.nothing(self._engine.binding.vocab_size)
            return [[nothing] * options.get("num_return_sequences", 1) for _ in prompts]
        return [[Decoded.of(generation) for generation in (own if isinstance(own, list) else [own])] for own in results]
