"""Under int8 a source is sealed as a whole: all that decodes from it reads the same codes, and nothing else changes.

In float64, as in test_int8.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvloom
import tiny
from kvloom import LanguageModel
from kvloom.cache import Int8Store, LayerShape, Reach
from kvloom.cache.layout import CacheLayout
from kvloom.errors import InvalidRequest

START = 2
FAMILIES = ("bart", "marian", "whisper")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return kvloom.attach(tiny.tiny_model(request.param, dtype=torch.float64), codec="int8")


def again(lm: LanguageModel, **options: Any) -> LanguageModel:
    return kvloom.attach(lm.binding.model, **{"codec": "int8", **options})


def sources(lm: LanguageModel, *lengths: int) -> list[Any]:
    return [tiny.random_source(lm.binding.model, tokens=tokens, seed=tokens) for tokens in lengths]


def begun(lm: LanguageModel, tokens: int, seed: int = 1) -> list[int]:
    return [START, *tiny.random_ids(lm.binding.model, tokens=tokens - 1, seed=seed)]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
def test_what_is_read_of_a_source_is_within_half_a_scale_of_what_was_written(tokens: int) -> None:
    shape = LayerShape(kv_heads=2, key_dim=8, value_dim=6, reach=Reach(cross=True))
    own = LayerShape(kv_heads=2, key_dim=8, value_dim=6)
    store = Int8Store(CacheLayout(layers=(own, shape), dtype=torch.float32, codec="int8"), 8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn((2, tokens, dim), generator=generator) for dim in (8, 6))
    blocks = torch.tensor([5, 2, 7])
    slots = (blocks[:, None] * 16 + torch.arange(16)).flatten()[:tokens]
    store.write_source(1, slots, keys, values)
    for kept, written in zip(store.source(1), (keys, values), strict=True):
        read = kept.sealed.read(slots, torch.float32)
        largest = written.abs().amax()
        assert 0 < (read - written).abs().max() <= largest / 127 * 0.51
    # The arena has no room for what is never open.
    assert store.open.keys[1].numel() == 0 and store.open.keys[0].numel() > 0


def test_ragged_batches_beams_chunks_and_found_sources_change_nothing(lm: LanguageModel) -> None:
    texts, ids = sources(lm, 3, 20, 33), [begun(lm, 1), begun(lm, 20), begun(lm, 37)]
    options: dict[str, Any] = {"max_new_tokens": 20, "output_logits": True, "eos_token_id": None}
    together = lm.generate(texts, decoder_input_ids=ids, **options)
    warm = lm.generate(texts, decoder_input_ids=ids, **options)
    for out, found, text, own in zip(together, warm, texts, ids, strict=True):
        alone = again(lm).generate(text, decoder_input_ids=own, **options)
        for other in (out, found):
            torch.testing.assert_close(other.logits, alone.logits, **EXACT)
        assert found.usage.computed_source_tokens == 0
    cold = again(lm)
    whole = [*ids[2], *together[2].token_ids]
    context, logits = cold.prefill(texts[2], decoder_input_ids=whole[:1]), []
    for first, end in ((1, 20), (20, 21), (21, 50), (50, len(whole) - 1)):
        step = cold.extend(context, whole[first:end])
        context, logits = step.context, [*logits, step.logits]
    torch.testing.assert_close(torch.cat(logits)[-19:].float(), together[2].logits[1:], rtol=1e-6, atol=1e-6)
    beams = lm.beam_search(texts[1], num_beams=4, num_return_sequences=4, max_new_tokens=20, output_logits=True)
    for beam in beams:
        whole = [START, *beam.token_ids[:-1]]
        extended = cold.extend(cold.prefill(texts[1]), whole[1:]).logits
        torch.testing.assert_close(extended.float(), beam.logits[1:], rtol=1e-6, atol=1e-6)


def test_a_source_takes_half_the_bytes_and_a_plan_says_so(lm: LanguageModel) -> None:
    native = again(lm, codec="native")
    text = sources(lm, 50)[0]
    tokens = lm.generate(text, max_new_tokens=1).usage.source_tokens
    for own in (lm, native):
        plan = own.plan(source_tokens=tokens, max_new_tokens=20, num_beams=3)
        out = own.beam_search(text, num_beams=3, max_new_tokens=20)
        assert 0 < out[0].usage.peak_bytes <= plan.cache_bytes
        assert plan.groups[1].open_blocks == 0 or plan.groups[1].bytes_per_open_block == 0
    sizes = [own.engine.cache.layout.bytes_per_block(own.engine.cache.groups[1].group) for own in (lm, native)]
    assert sizes[0] < 0.2 * sizes[1], "against float64"
    del out
    for group in lm.engine.cache.groups:
        assert group.pool.free + len(group.index.idle()) == group.pool.total
        assert group.pool.open_blocks.free == group.pool.open_blocks.total


def test_codes_of_a_source_are_saved_and_verified(lm: LanguageModel, tmp_path: Path) -> None:
    text = sources(lm, 20)[0]
    context = lm.prefill(text, decoder_input_ids=begun(lm, 21))
    context.save(tmp_path / "a.kv")
    other = again(lm)
    restored = other.restore(tmp_path / "a.kv")
    outs = [
        own.generate([5], context=held, max_new_tokens=6, output_logits=True)
        for own, held in ((lm, context), (other, restored))
    ]
    assert torch.equal(outs[0].logits, outs[1].logits)
    assert other.generate(text, max_new_tokens=1).usage.computed_source_tokens == 0
    report = lm.verify(max_new_tokens=18)
    assert report.ok and report.cost is not None and 0 < report.cost.mean_divergence < 0.1


def test_models_that_attend_by_themselves_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="computes its attention itself"):
        kvloom.attach(tiny.tiny_model("t5"), codec="int8")
