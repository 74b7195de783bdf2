"""How much memory a step takes besides weights and cache: the step itself, run on a model without weights.

Every operator of the forward pass, of our attention and of the plan runs on fake tensors, which have shapes and no
memory, and the bytes of the tensors that live at the same time are added up. What an operator uses inside, and
what the allocator rounds up, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvloom.attention import build_plan
from kvloom.cache import CachedSequence, CacheLayout, KVCache, place_source
from kvloom.cache.retention import Retention
from kvloom.engine.retaining import begin
from kvloom.models import HostedModel, Source
from kvloom.models.hosted.weightless import Weightless, following_shapes

# A decision turns the rows' logits into float32 (4), their log-softmax and scores (4 + 4), and where tokens are drawn
# into a float64 distribution and its sums (8 + 8).
DECISION_BYTES_PER_LOGIT = 28


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the tensors that operators make, as long as they live.

    Attributes:
        live: bytes now. peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count what it made: not views, nor what it wrote into."""
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                given.add(_storage(tensor))
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.live -= size


def step_bytes(
    model: Weightless,
    layout: CacheLayout,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rows: int,
    batch: int,
    step_tokens: int,
    source: Source | None = None,
    retention: Retention | None = None,
) -> int:
    """Bytes of the larger of two steps: the last chunk of the prompts, and the last token of all sequences.

    With a source there is a third: its encoding.

    Args:
        rows: sequences a prompt. batch: prompts.
        step_tokens: the longest chunk.
        source: like those that the prompts are decoded from.
        retention: the policy of all sequences, which may observe attention.
    """
    tokens = prompt_tokens + rows * (new_tokens + layout.block_tokens) + (0 if source is None else source.tokens)
    # A copy is made before what it copies from is let go of.
    rehearsal = _Rehearsal(model, layout, source, tokens=batch * tokens, sequences=2 * batch * rows)

    def opened() -> CachedSequence:
        trained = model.binding.max_tokens
        return begin(rehearsal.open(), retention, prompt_tokens=prompt_tokens, trained_tokens=trained)

    prompts = [rehearsal.grown(opened(), prompt_tokens - min(prompt_tokens, step_tokens), step_tokens)]
    peak = max(rehearsal.encoding_bytes, rehearsal.run(prompts, min(prompt_tokens, step_tokens)))
    if new_tokens:
        # Together in a batch or one after the other, the chunks are no longer than this.
        prompts += [rehearsal.grown(opened(), prompt_tokens, step_tokens) for _ in range(batch - 1)]
        sequences = [prompt if row == 0 else rehearsal.cache.fork(prompt) for prompt in prompts for row in range(rows)]
        sequences = [rehearsal.grown(sequence, new_tokens - 1, step_tokens) for sequence in sequences]
        decision = rows * model.binding.vocab_size * DECISION_BYTES_PER_LOGIT
        peak = max(peak, rehearsal.run(sequences, 1) + decision)
    return peak


class _Rehearsal:
    """A cache and a model without memory.

    Attributes:
        encoding_bytes: the peak of encoding a source.
    """

    def __init__(
        self, model: Weightless, layout: CacheLayout, source: Source | None, *, tokens: int, sequences: int
    ) -> None:
        self._model, self._source = model, source
        self.encoding_bytes = 0
        # A few blocks more: forks copy their last block, and every sequence begins a block.
        budget = layout.budget_for(2 * layout.blocks_of(tokens) + 2, open_blocks=sequences)
        with model.fakes:
            self.cache = KVCache(layout, budget_bytes=budget, device=model.binding.device)
        # Copies on write move nothing here, and one by one they take long.
        self.cache.store.copy = lambda *_: None  # type: ignore[method-assign]

    def open(self) -> CachedSequence:
        """An empty sequence, with a source if there are any."""
        sequence = self.cache.open()
        if self._source is None:
            return sequence
        slots = torch.from_numpy(place_source(self.cache, sequence, self._source.tokens))
        if not self.encoding_bytes:
            binding = self._model.binding
            with following_shapes(binding.model), _twins_once(binding), LiveBytes() as counted:
                binding.encode(self._source, self.cache.store, slots)
            self.encoding_bytes = counted.peak
        return sequence

    def grown(self, sequence: CachedSequence, tokens: int, step_tokens: int) -> CachedSequence:
        """The sequence with `tokens` more, in chunks as they would be computed, so that windows let go as they do."""
        while tokens > 0:
            count = min(tokens, step_tokens)
            self.cache.commit(self.cache.extend([(sequence, count)]))
            tokens -= count
        return sequence

    def run(self, sequences: Sequence[CachedSequence], count: int) -> int:
        """The peak of one forward pass over `count` new tokens of each sequence."""
        binding = self._model.binding
        extension = self.cache.extend([(sequence, count) for sequence in sequences])
        counted = LiveBytes()
        with following_shapes(binding.model), _twins_once(binding), counted:
            plan = build_plan(self.cache, extension, logits=[1] * len(sequences), device=binding.device)
            token_ids = torch.zeros(count * len(sequences), dtype=torch.int64)
            regime = binding.regime(sequences[0].tokens)
            logits: Tensor = binding.forward(token_ids, plan, self.cache.store, regime=regime)
        self.cache.commit(extension)
        return max(counted.peak, logits.nbytes)


@contextmanager
def _twins_once(binding: HostedModel) -> Iterator[None]:
    """Within the block, decoder layers of equal shapes run once: a twin would take as much as the first one did."""
    first: dict[Any, nn.Module] = {}
    outputs: dict[nn.Module, Any] = {}
    changed: list[nn.Module] = []

    def running(layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs[layer] = type(layer).forward(layer, *args, **kwargs)
            return outputs[layer]

        return forward

    def repeating(twin: nn.Module) -> Callable[..., Any]:
        return lambda *_, **__: outputs[twin]

    try:
        for call in binding.calls:
            layer = _layer_around(binding.model, call.name)
            if layer is None or "forward" in layer.__dict__:
                continue
            shapes = tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())
            twin = first.setdefault((type(layer), call.shape, shapes), layer)
            layer.__dict__["forward"] = running(layer) if twin is layer else repeating(twin)
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def _layer_around(model: nn.Module, name: str) -> nn.Module | None:
    """The decoder layer that an attention module is in: the outermost member of a list of modules."""
    module: nn.Module = model
    for part in name.split("."):
        inside_a_list = isinstance(module, nn.ModuleList)
        module = module.get_submodule(part)
        if inside_a_list:
            return module
    return None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
