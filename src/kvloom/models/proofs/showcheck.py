"""Looking inside proves itself when it is first wanted: what the cache shows is compared with the own forward's.

Some models return as attention weights something else than what they weigh values by (Granite's with sinks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.attention import View, Wanted, build_plan
from kvloom.cache import CacheLayout, KVCache, place_source
from kvloom.errors import UnsupportedOption
from kvloom.models.binding import Binding
from kvloom.models.proofs.tolerance import TIES_QUANTILE, relative_errors, tolerance_of
from kvloom.models.sources.source import Source

TOKENS = 12
BLOCK_TOKENS = 4
FIELDS = {
    "attentions": "output_attentions",
    "cross_attentions": "output_attentions",
    "hidden_states": "output_hidden_states",
}


def prove_shows(binding: Binding, wanted: Wanted) -> None:
    """Compare over a short sequence, which is run on a cache of its own in a chunk and a single token.

    Raises:
        UnsupportedOption: the own forward shows nothing, or something else; names the option.
    """
    tokens = min(TOKENS, binding.max_tokens or TOKENS)
    token_ids = [(7 * index + 3) % binding.vocab_size for index in range(tokens)]
    if binding.counting is not None:
        token_ids = binding.counting.without_pad(token_ids)
    source = None if binding.encoder is None else binding.encoder.trial_source()
    own = binding.views_of(torch.tensor([token_ids], device=binding.device), wanted, source=source)[0]
    cached = _cached_view(binding, token_ids, wanted, source)
    tolerance = tolerance_of(binding.dtype)
    for name, option in FIELDS.items():
        error = _difference(getattr(own, name) or (), getattr(cached, name) or ())
        if not error <= tolerance:
            raise UnsupportedOption(
                f"`{option}` is not supported: the {name.replace('_', ' ')} that the model's own forward returns are "
                f"not those that it calculates with (relative difference {error:.2g}, tolerance {tolerance:.2g})."
            )


def _cached_view(binding: Binding, token_ids: list[int], wanted: Wanted, source: Source | None) -> View:
    layout = CacheLayout(layers=binding.layers, dtype=binding.dtype, block_tokens=BLOCK_TOKENS)
    blocks = layout.blocks_of(len(token_ids)) + layout.blocks_of(0 if source is None else source.tokens) + 2
    cache = KVCache(layout, budget_bytes=layout.bytes_per_row_of_blocks * blocks, device=binding.device)
    sequence = cache.open()
    if source is not None:
        slots = torch.from_numpy(place_source(cache, sequence, source.tokens)).to(binding.device)
        binding.encode(source, cache.store, slots)
    views = []
    for first, end in ((0, len(token_ids) - 1), (len(token_ids) - 1, len(token_ids))):
        extension = cache.extend([(sequence, end - first)])
        plan = build_plan(cache, extension, logits=[1], device=binding.device, wanted=[wanted])
        if binding.counting is not None:
            plan = binding.counting.of_step(plan, [(token_ids, first, end)])
        new = torch.tensor(token_ids[first:end], device=binding.device)
        binding.forward(new, plan, cache.store, regime=binding.regime(len(token_ids)))
        cache.commit(extension)
        assert plan.views is not None, "it was wanted"
        views.append(plan.views.view(0))
    return views[0].followed_by(views[1])


def _difference(own: Sequence[Tensor], cached: Sequence[Tensor]) -> float:
    """The largest relative error of a row; infinite if there are more or fewer layers, or of other shapes.

    In 16 bits a mixture of experts may route a token otherwise, so behind the first layer most rows must do.
    """
    if [layer.shape for layer in own] != [layer.shape for layer in cached]:
        return float("inf")
    largest = 0.0
    for index, (expected, got) in enumerate(zip(own, cached, strict=True)):
        errors = relative_errors(got, expected)
        strict = index == 0 or expected.dtype in (torch.float32, torch.float64)
        largest = max(largest, float(errors.max() if strict else errors.quantile(TIES_QUANTILE)))
    return largest
