"""Snapshots of contexts that stand on more than tokens: the source of an encoder-decoder model, images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import kvloom
import tiny
from kvloom import LanguageModel
from kvloom.cache.retention import Retention
from kvloom.cache.snapshot import Beside
from kvloom.errors import CorruptSnapshot, SnapshotError
from kvloom.models import beside
from tiny_vision import Picture, prompt, tiny_vision_model

START = 2
VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "context.kv"


def goes_on_alike(
    first: LanguageModel, context: kvloom.Context, second: LanguageModel, restored: kvloom.Context, after: Any
) -> Any:
    """Compare what follows, bit by bit; returns the usage of the restored one."""
    options: dict[str, Any] = {"max_new_tokens": 6, "output_logits": True}
    expected, got = (
        first.generate(after, context=context, **options),
        second.generate(after, context=restored, **options),
    )
    assert torch.equal(got.logits, expected.logits)
    return got.usage


@pytest.mark.parametrize("family", tiny.ENCODER_DECODER_FAMILIES)
def test_a_context_is_restored_with_its_source_which_is_not_encoded_again(path: Path, family: str) -> None:
    model = tiny.tiny_model(family)
    first, second = kvloom.attach(model), kvloom.attach(model)
    source = tiny.random_source(model, tokens=25, seed=3)
    context = first.prefill(source, decoder_input_ids=[START, *tiny.random_ids(model, tokens=36)])
    context.save(path)
    restored = second.restore(path)
    assert restored.source is not None and context.source is not None
    assert (restored.token_ids, restored.source.key) == (context.token_ids, context.source.key)
    usage = goes_on_alike(first, context, second, restored, [5])
    assert (usage.cached_prompt_tokens, usage.computed_source_tokens) == (37, 0)
    # The source is found by others, and so is the decoder's prefix.
    usage = second.generate(source, decoder_input_ids=list(context.token_ids), max_new_tokens=2).usage
    assert (usage.computed_source_tokens, usage.cached_prompt_tokens) == (0, 32)


@pytest.mark.parametrize("family", VISION)
def test_a_context_is_restored_with_its_images(path: Path, family: str) -> None:
    model = tiny_vision_model(family)
    first, second = kvloom.attach(model), kvloom.attach(model)
    video = [] if family == "llava" else [Picture(4, 4, frames=2), 3]
    shown = prompt(model, 5, Picture(4, 6), 27, *video)
    context = first.prefill(shown)
    context.save(path)
    restored = second.restore(path)
    usage = goes_on_alike(first, context, second, restored, prompt(model, 5, Picture(4, 8, seed=5), 3, seed=4))
    assert usage.cached_prompt_tokens == context.tokens
    assert second.generate(shown, max_new_tokens=2).usage.cached_prompt_tokens >= 32
    # Another image behind the same placeholders shares what stands before it, and nothing else.
    other = second.generate(prompt(model, 5, Picture(4, 6, seed=9), 27, *video), max_new_tokens=2)
    assert other.usage.cached_prompt_tokens < 16


def test_what_was_given_up_is_computed_from_what_the_file_holds_besides(path: Path) -> None:
    model = tiny_vision_model("qwen2_vl")
    lm = kvloom.attach(model)
    context = lm.prefill(prompt(model, 5, Picture(4, 6), 7))
    context.save(path)
    restored = lm.restore(path)
    expected = lm.generate([5], context=context, max_new_tokens=6).token_ids
    lm.engine.contexts._kept.holdings.release(restored.tables_for(lm.engine))
    assert lm.generate([5], context=restored, max_new_tokens=6).token_ids == expected
    again = path.with_name("again.kv")
    restored.save(again)
    assert lm.generate([5], context=lm.restore(again), max_new_tokens=6).token_ids == expected
    bart = kvloom.attach(tiny.tiny_model("bart"))
    context = bart.prefill(tiny.random_source(bart.binding.model, tokens=9, seed=1), decoder_input_ids=[START, 4, 5])
    expected = bart.generate(context=context, max_new_tokens=4).token_ids
    bart.engine.contexts._kept.holdings.release(context.tables_for(bart.engine))
    context.save(path)
    assert bart.generate(context=bart.restore(path), max_new_tokens=4).token_ids == expected


def sourced_file(path: Path) -> LanguageModel:
    model: PreTrainedModel = tiny.tiny_model("bart")
    lm = kvloom.attach(model)
    lm.prefill(tiny.random_source(model, tokens=9, seed=1), decoder_input_ids=[START, 4, 5]).save(path)
    return lm


def test_a_changed_source_is_damage(path: Path) -> None:
    lm = sourced_file(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for change in (
        {"beside.source": torch.zeros_like(tensors["beside.source"])},
        {"beside.source": tensors["beside.source"][:, :4]},
        {"beside.other": torch.zeros(3)},
    ):
        save_file({**tensors, **change}, path, metadata=metadata)
        with pytest.raises(CorruptSnapshot):
            lm.restore(path)
    save_file({name: own for name, own in tensors.items() if name != "beside.source"}, path, metadata=metadata)
    with pytest.raises(CorruptSnapshot):
        lm.restore(path)
    save_file(tensors, path, metadata={**metadata, "beside": json.dumps({"source_tokens": 8})})
    with pytest.raises(CorruptSnapshot):
        lm.restore(path)
    assert [group.pool.referenced - len(group.index.idle()) for group in lm.engine.cache.groups] == [0, 0]


PICTURE = {"0.places": torch.arange(2), "0.x": torch.ones(1)}


def media(**facts: Any) -> dict[str, Any]:
    return {"media": {"kinds": ["image"], "tokens": 4, "following": 4, **facts}}


@pytest.mark.parametrize(
    ("facts", "tensors"),
    [
        ({"source_tokens": 3}, {}),
        ({"source_tokens": "3"}, {"source": torch.ones(1, 3)}),
        (media(), {}),
        (media(kinds=[]), {}),
        (media(kinds=["sound"]), PICTURE),
        (media(tokens=9), PICTURE),
        (media(tokens=-1), PICTURE),
        (media(), PICTURE | {"positions": torch.zeros(3, 5)}),
        (media(), PICTURE | {"0.places": torch.tensor([3, 9])}),
        (media(), PICTURE | {"0.places": torch.tensor([2, 2])}),
        (media(), PICTURE | {"0.places": torch.ones(2)}),
    ],
)
def test_what_does_not_fit_the_tokens_is_no_media_and_no_source(facts: Any, tensors: Any) -> None:
    with pytest.raises(ValueError):
        beside.read_beside(Beside(facts, tensors), tokens=8)


POLICIES = [
    kvloom.SinkWindow(sink_tokens=2, window_tokens=14),
    kvloom.HeavyHitters(budget_tokens=16),
    kvloom.LastQuery(budget_tokens=16),
    kvloom.CompressedPrompt(budget_tokens=16, observed_tokens=4),
    kvloom.TopBlocks(budget_tokens=16),
]


@pytest.mark.parametrize("codec", ["native", "int8"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda own: type(own).__name__)
def test_a_context_with_images_under_a_policy_goes_on_with_the_same_bits_and_drops_the_same_tokens(
    path: Path, policy: Retention, codec: Any
) -> None:
    model = tiny_vision_model("qwen2_vl")
    options: dict[str, Any] = {"block_tokens": 4, "retention": policy, "codec": codec, "budget_bytes": 4 << 20}
    first, second = (kvloom.attach(model, **options) for _ in range(2))
    shown = prompt(model, 5, Picture(4, 8), 9, Picture(4, 4, seed=2), 16)
    with first.prefill(shown) as computed:
        context = first.generate([7, 8], context=computed, max_new_tokens=6).context
    context.save(path)
    restored = second.restore(path)
    assert (restored.retention, restored.blocks) == (policy, context.blocks)
    # A turn with another image, and one behind it.
    turn = prompt(model, 3, Picture(4, 8, seed=5), 4, seed=4)
    goes_on_alike(first, context, second, restored, turn)
    after = [
        own.generate(turn, context=of, max_new_tokens=6).context for own, of in ((first, context), (second, restored))
    ]
    goes_on_alike(first, after[0], second, after[1], [5, 9, 3])
    held = [
        [table.positions().tolist() for table in own.tables_for(lm.engine).cached.tables]
        for own, lm in zip(after, (first, second), strict=True)
    ]
    assert held[0] == held[1]
    if not isinstance(policy, kvloom.TopBlocks):
        assert len(held[0][0]) < 30, "images have left the cache"
        # Which they can be computed from, though their keys have gone.
        second.engine.contexts._kept.holdings.release(restored.tables_for(second.engine))
    again = second.generate(turn, context=restored, max_new_tokens=6)
    assert len(again.token_ids) == 6


def test_a_flipped_bit_anywhere_in_a_file_with_images_and_scores_is_seen(path: Path) -> None:
    model = tiny_vision_model("qwen2_vl")
    lm = kvloom.attach(model, block_tokens=4, budget_bytes=4 << 20)
    with lm.prefill(prompt(model, 5, Picture(4, 8), 20), retention=POLICIES[1]) as context:
        context.save(path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(0)
    offsets = [generator.randrange(len(content)) for _ in range(40)] + [generator.randrange(end) for _ in range(40)]
    for offset in offsets:
        damaged = bytearray(content)
        damaged[offset] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            restored = lm.restore(path)
        except SnapshotError:
            continue
        pytest.fail(f"byte {offset} of {len(content)} ({content[offset - 20 : offset + 20]!r}) gave {restored}")
    assert [group.pool.referenced - len(group.index.idle()) for group in lm.engine.cache.groups] == [0]
