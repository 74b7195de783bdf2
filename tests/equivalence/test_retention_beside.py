"""Policies that let go of tokens, where sequences stand on more than tokens: images, a source.

The reference is the model's own forward over all tokens, with the policy as a mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvloom
import tiny
from kvloom import InvalidRequest
from tiny_vision import Picture, prompt, tiny_vision_model

POLICY = kvloom.SinkWindow(sink_tokens=2, window_tokens=12)
SCORED = [
    kvloom.HeavyHitters(budget_tokens=16),
    kvloom.LastQuery(budget_tokens=16),
    kvloom.CompressedPrompt(budget_tokens=16, observed_tokens=4),
]
NEW = 10
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "output_logits": True, "eos_token_id": None}


def mask(tokens: int) -> Tensor:
    """float32[1, 1, tokens, tokens]: what each query sees under the policy."""
    queries, keys = torch.arange(tokens)[:, None], torch.arange(tokens)
    seen = (keys > queries - POLICY.window_tokens) | (keys < POLICY.sink_tokens)
    return torch.where(seen & (keys <= queries), 0.0, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_tokens_of_images_leave_the_window_like_any_others(family: str) -> None:
    model = tiny_vision_model(family)
    lm = kvloom.attach(model, block_tokens=4)
    shown = prompt(model, 5, Picture(4, 8), 9, Picture(4, 4, seed=2), 6)
    out = lm.generate(shown, retention=POLICY, **OPTIONS)
    ids = torch.cat([shown["input_ids"], torch.tensor([out.token_ids[:-1]])], dim=1)
    tokens, media = ids.shape[1], lm.reader.read(shown).media
    axes = family != "llava"
    own = model(
        **{name: own for name, own in shown.items() if name in ("pixel_values", "image_grid_thw")},
        input_ids=ids,
        attention_mask={"full_attention": mask(tokens)} if family in ("qwen2_vl", "qwen2_5_vl") else mask(tokens),
        position_ids=media.positions_of(0, tokens)[:, None] if axes else torch.arange(tokens)[None],
        **({"mm_token_type_ids": (ids == model.config.image_token_id).long()} if axes else {}),
        use_cache=False,
    ).logits[0, -NEW:]
    torch.testing.assert_close(out.logits, own, atol=1e-3, rtol=1e-4)
    assert out.usage.dropped_tokens == tokens - POLICY.window_tokens - POLICY.sink_tokens
    context = lm.prefill(shown, retention=POLICY)
    assert lm.generate(context=context, **OPTIONS).token_ids == out.token_ids
    again = lm.generate([7, 8, *out.token_ids], context=context, **OPTIONS)
    lm.engine.contexts._kept.holdings.release(context.tables_for(lm.engine))
    assert lm.generate([7, 8, *out.token_ids], context=context, **OPTIONS).token_ids == again.token_ids


@pytest.mark.parametrize("family", ["bart", "marian", "whisper"])
def test_a_decoders_tokens_leave_the_window_and_its_source_stays(family: str) -> None:
    model = tiny.tiny_model(family)
    lm = kvloom.attach(model, block_tokens=4)
    source, begun = tiny.random_source(model, tokens=30, seed=3), [2, *tiny.random_ids(model, tokens=30)]
    out = lm.generate(source, decoder_input_ids=begun, retention=POLICY, **OPTIONS)
    ids = torch.tensor([[*begun, *out.token_ids[:-1]]])
    inputs = torch.tensor([source]) if isinstance(source, list) else source[None]
    named = {model.main_input_name: inputs, "decoder_input_ids": ids, "use_cache": False}
    own = model(**named, decoder_attention_mask=mask(ids.shape[1])).logits[0, -NEW:]
    torch.testing.assert_close(out.logits, own, atol=1e-4, rtol=1e-4)
    assert (model(**named).logits[0, -NEW:] - own).abs().max() > 1e-2, "the policy makes a difference"
    assert out.usage.dropped_tokens == ids.shape[1] - POLICY.window_tokens - POLICY.sink_tokens
    held = lm.inspect(out.context).groups
    assert held[0].tokens < 24 and held[1].tokens == out.usage.source_tokens
    context = lm.prefill(source, decoder_input_ids=begun, retention=POLICY)
    assert lm.generate(context=context, **OPTIONS).token_ids == out.token_ids
    assert lm.beam_search(context=context, num_beams=3, max_new_tokens=5)[0].usage.computed_source_tokens == 0


@pytest.mark.parametrize("policy", SCORED, ids=lambda own: type(own).__name__)
def test_policies_that_score_tokens_work_beside_images_and_sources(policy: Any) -> None:
    vision, bart = tiny_vision_model("qwen2_vl"), tiny.tiny_model("bart")
    begun = {"decoder_input_ids": [2, *tiny.random_ids(bart, tokens=30)]}
    for model, prompts, more in (
        (vision, prompt(vision, 5, Picture(4, 8), 9, Picture(4, 4, seed=2), 16), {}),
        (bart, tiny.random_ids(bart, tokens=20), begun),
    ):
        lm = kvloom.attach(model, block_tokens=4)
        out = lm.generate(prompts, retention=policy, **more, **OPTIONS)
        assert out.usage.dropped_tokens > 0
        # Beside another request, in chunks of another cache: the same.
        cold = kvloom.attach(model, block_tokens=4)
        each = {name: [own, own] for name, own in more.items()}
        pair = cold.generate([prompts, prompts], retention=policy, **each, **OPTIONS)
        assert [own.token_ids for own in pair] == [out.token_ids] * 2


def test_what_cannot_be_turned_back_is_refused() -> None:
    turned = kvloom.SinkWindow(sink_tokens=2, window_tokens=12, reindex=True)
    vision = tiny_vision_model("qwen2_vl")
    lm = kvloom.attach(vision)
    with pytest.raises(InvalidRequest, match="images, whose rotary positions count no tokens"):
        lm.generate(prompt(vision, 5, Picture(4, 8), 9), retention=turned)
    with pytest.raises(InvalidRequest, match="images, whose rotary positions count no tokens"):
        lm.generate(prompt(vision, 5, Picture(4, 8), 9), retention=POLICY, max_new_tokens=600)
    with pytest.raises(InvalidRequest, match="cannot be re-indexed on this model: it decodes from a source"):
        kvloom.attach(tiny.tiny_model("bart")).generate([5, 6], retention=turned)
    with pytest.raises(InvalidRequest, match="cannot be honoured: the model decodes from a source"):
        kvloom.attach(tiny.tiny_model("t5")).generate([5, 6], retention=POLICY)
