"""`measure_quality`: what it decodes, compares, counts and keeps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import kvloom
import tiny
from counting import available_blocks
from kvloom.bench.quality import CONTROLS, POLICIES, Answer, Setting, measure_quality
from kvloom.bench.quality.controls import Control, EveryKth, Random, Recent
from kvloom.bench.quality.decode import UNCOUNTED, Subject
from kvloom.bench.quality.measure import Run, compare, model_under
from kvloom.bench.quality.settings import REFERENCE, all_settings
from kvloom.cache.retention import Held
from kvloom.errors import InvalidRequest
from kvloom.language_model.model import LanguageModel
from kvloom.loading.checkpoint import DEMO_MODEL

BLOCK = 16


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Random weights: what is measured must be right whatever the model says."""
    return kvloom.attach(tiny.tiny_model("qwen2"))


def held(tokens: int, prompt: int | None = None) -> Held:
    """What a sequence holds that has lost nothing."""
    firsts = np.arange(0, tokens, BLOCK, dtype=np.int32)
    counts = np.minimum(BLOCK, tokens - firsts).astype(np.int32)
    return Held(firsts, counts, np.zeros(0, dtype=np.float32), tokens, range(tokens if prompt is None else prompt))


def kept(policy: Control, tokens: int) -> list[int]:
    """The numbers of the blocks that stay."""
    return np.flatnonzero(policy.keep(held(tokens))).tolist()


# ---- what is decoded -----------------------------------------------------------------------------------------


def test_the_full_cache_decodes_what_the_models_own_forward_gives(lm: LanguageModel) -> None:
    context, forced = tiny.random_ids(lm.binding.model, tokens=40, seed=1), [5, 9, 7, 30, 2]
    (decoded,) = Subject(lm, REFERENCE, seed=0).decode(context, [forced], index=0)
    whole = lm.binding.forward_uncached(torch.tensor([context + forced]), last=None)[0].float()
    # Rows that follow the second forced token and later ones, up to the one that predicts the last.
    expected = whole[len(context) + 1 : -1]
    torch.testing.assert_close(decoded.logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert decoded.new_ids == forced[UNCOUNTED:]
    assert len(decoded.seconds) == len(decoded.logits)


def test_what_is_decoded_freely_is_the_greedy_continuation(lm: LanguageModel) -> None:
    context, forced = tiny.random_ids(lm.binding.model, tokens=20, seed=2), [5, 9, 7]
    (decoded,) = Subject(lm, REFERENCE, seed=0).decode(context, [forced], index=0, free=4)
    alone = lm.generate(context + forced, max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=None)
    assert decoded.new_ids == [7, *alone.token_ids]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_with_room_for_everything_changes_nothing(lm: LanguageModel, policy: str) -> None:
    context, forced = tiny.random_ids(lm.binding.model, tokens=50, seed=3), [5, 9, 7, 1]
    full, roomy = (
        Subject(model_under(lm, setting), setting, seed=0).decode(context, [forced], index=0)[0]
        for setting in (REFERENCE, Setting(policy, 2.0, "native"))
    )
    torch.testing.assert_close(roomy.logits, full.logits, rtol=0, atol=1e-5 * float(full.logits.abs().max()))
    # The bounds of keys, which only top-blocks keeps, are the 2/16 of the keys that its documentation states.
    assert roomy.cache_bytes == full.cache_bytes * (17 / 16 if policy == "top-blocks" else 1)


@pytest.mark.parametrize("policy", CONTROLS)
def test_a_control_holds_no_more_than_its_share(lm: LanguageModel, policy: str) -> None:
    context = tiny.random_ids(lm.binding.model, tokens=8 * BLOCK, seed=4)
    full, quarter = (
        Subject(lm, setting, seed=0).decode(context, [[5, 9, 7]], index=0)[0]
        for setting in (REFERENCE, Setting(policy, 0.25, "native"))
    )
    assert full.cache_bytes == 9 * quarter.cache_bytes / 2
    assert not torch.equal(full.logits, quarter.logits)


def test_nothing_is_held_afterwards(lm: LanguageModel) -> None:
    context = tiny.random_ids(lm.binding.model, tokens=50, seed=5)
    Subject(lm, Setting("recent", 0.5, "native"), seed=0).decode(context, [[5, 9, 7], [1, 2, 3]], index=0)
    cache = lm.engine.cache
    assert cache is not None and available_blocks(cache) == cache.blocks


# ---- the controls --------------------------------------------------------------------------------------------


def test_recent_keeps_the_end() -> None:
    assert kept(Recent(budget_tokens=3 * BLOCK), 10 * BLOCK) == [7, 8, 9]


@pytest.mark.parametrize("distance", [2, 4, 8])
def test_every_kth_keeps_blocks_at_even_distances_and_the_last(distance: int) -> None:
    blocks = kept(EveryKth(budget_tokens=32 // distance * BLOCK), 32 * BLOCK)
    assert blocks[-1] == 31 and len(blocks) == 32 // distance
    assert {later - earlier for earlier, later in pairwise(blocks[:-1])} == {distance}


def test_random_keeps_what_its_seed_says_and_goes_on_keeping_it() -> None:
    chosen = {seed: kept(Random(budget_tokens=8 * BLOCK, seed=seed), 32 * BLOCK) for seed in range(20)}
    assert all(len(own) == 8 and own[-1] == 31 for own in chosen.values())
    assert len({tuple(own) for own in chosen.values()}) == 20
    # Of what it has kept nothing but the worst goes when a block more has to fit.
    policy = Random(budget_tokens=8 * BLOCK, seed=1)
    before, after = set(chosen[1]) - {31}, set(kept(policy, 33 * BLOCK)) - {32}
    assert len(before - after) <= 1


def test_a_control_drops_nothing_until_the_prompt_is_complete() -> None:
    assert Recent(budget_tokens=BLOCK).keep(held(4 * BLOCK, prompt=5 * BLOCK)).all()


# ---- what is compared ----------------------------------------------------------------------------------------


def test_divergence_agreement_and_surprise_are_those_of_the_textbook() -> None:
    torch.manual_seed(0)
    full, other = torch.randn(2, 6, 11).log_softmax(-1)
    targets = torch.randint(11, (6,))
    answers = [Answer(0.1 * index, right) for index, right in enumerate([True, True, False])]
    found = [Answer(own.depth, right) for own, right in zip(answers, [True, False, True], strict=True)]
    outcome = compare(
        Setting("recent", 0.5, "native"),
        Run(other, tuple(found), cache_bytes=7, step_seconds=0.5),
        Run(full, tuple(answers), cache_bytes=14, step_seconds=0.4),
        targets,
    )
    assert outcome.kl == pytest.approx(float(nn.functional.kl_div(other, full, log_target=True, reduction="batchmean")))
    assert outcome.agreement == pytest.approx(float((full.argmax(-1) == other.argmax(-1)).float().mean()))
    change = nn.functional.nll_loss(other, targets) - nn.functional.nll_loss(full, targets)
    assert outcome.nll_change == pytest.approx(float(change), abs=1e-6)
    # What the full cache does not know cannot be forgotten.
    assert (outcome.recalled, outcome.recallable, outcome.recall) == (1, 2, 0.5)


def test_the_demonstration_model_recalls_what_is_kept_and_nothing_else() -> None:
    demo = kvloom.load()
    report = measure_quality(
        demo, policies=["recent"], keeps=[0.2], codecs=["native"], prompt_tokens=320, new_tokens=3, passages=1
    )
    full, recent = report.outcomes
    assert (full.kl, full.agreement, full.nll_change) == (0.0, 1.0, 0.0)
    assert full.recallable >= 12, "the demonstration model was trained to recall"
    recalled = [own.depth for own in recent.answers if own.right]
    # A fact within the last fifth of a text of 320 tokens stays; one before its last quarter is gone.
    assert recalled and min(recalled) > 0.75
    assert recent.recall is not None and recent.recall < 0.5
    assert recent.cache_bytes < full.cache_bytes / 3


# ---- what is refused -----------------------------------------------------------------------------------------


def test_settings_begin_with_the_full_cache_and_have_every_policy_at_every_share_under_every_codec() -> None:
    settings = all_settings(["recent", "random", "recent"], [0.5, 0.25], ["int8", "native"])
    assert settings[0] == REFERENCE and len(settings) == len(set(settings)) == 2 * (1 + 2 * 2)
    assert [own.codec for own in settings] == ["native"] * 5 + ["int8"] * 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policies": ["heavy-hiters"]}, "Did you mean `heavy-hitters`"),
        ({"keeps": [1.0]}, "must be between 0 and 1"),
        ({"keeps": [0.0]}, "must be between 0 and 1"),
        ({"codecs": ["int4"]}, "int4"),
        ({"prompt_tokens": 1000}, "exceed the model's context of 256"),
        ({"passages": 0}, "`passages` must be a whole number"),
        ({"recall_texts": -1}, "`recall_texts` must be a whole number"),
        ({"new_tokens": 0}, "`new_tokens` must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    lm: LanguageModel, wrong: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "tokenizer", AutoTokenizer.from_pretrained(DEMO_MODEL))
    with pytest.raises(InvalidRequest, match=message):
        measure_quality(lm, **wrong)  # type: ignore[arg-type]


def test_models_without_a_tokenizer_or_a_cache_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(InvalidRequest, match="has no tokenizer"):
        measure_quality(lm)
    callable_lm = kvloom.attach(lambda ids: torch.zeros(*ids.shape, 7), vocab_size=7)
    with pytest.raises(InvalidRequest, match="keeps no keys and values"):
        measure_quality(callable_lm)
