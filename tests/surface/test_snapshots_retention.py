"""Snapshots of contexts under a retention policy: positions with holes, scores and the policy itself come back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kvloom
from kvloom import InvalidRequest, LanguageModel
from kvloom.cache.retention import Held, Keep, Retention
from kvloom.errors import CorruptSnapshot, SnapshotMismatch
from tiny import random_ids, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
HEAVY = kvloom.HeavyHitters(budget_tokens=16)
POLICIES = [
    kvloom.SinkWindow(sink_tokens=2, window_tokens=14, pins=((5, 7),)),
    kvloom.SinkWindow(sink_tokens=2, window_tokens=30, reindex=True),
    HEAVY,
    kvloom.LastQuery(budget_tokens=16),
    kvloom.CompressedPrompt(budget_tokens=16, observed_tokens=4),
    kvloom.TopBlocks(budget_tokens=16),
]


def attached(model: Any, **options: Any) -> LanguageModel:
    return kvloom.attach(model, **{"block_tokens": 4, "budget_bytes": 2 << 20} | options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.kv"


def held_blocks(lm: LanguageModel) -> int:
    assert lm.engine.cache is not None
    return sum(group.pool.referenced - len(group.index.idle()) for group in lm.engine.cache.groups)


def going_on(lm: LanguageModel, context: kvloom.Context) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of a chunk and of steps one by one, far enough that blocks go and new ones come; what is held then."""
    step = lm.extend(context, [3, 9, 7, 1, 5, 6, 8, 2])
    logits = [step.logits]
    for token in range(10, 34):
        step = lm.extend(step.context, [token])
        logits.append(step.logits)
    tables = step.context.tables_for(lm.engine).cached.tables
    return torch.cat(logits), [table.positions().tolist() for table in tables]


@pytest.mark.parametrize("codec", ["native", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda own: type(own).__name__)
def test_a_restored_context_goes_on_with_the_same_bits_and_drops_the_same_tokens(
    path: Path, policy: Retention, family: str, codec: str
) -> None:
    model = tiny_model(family)
    first, second = (attached(model, retention=policy, codec=codec) for _ in range(2))
    prompt = random_ids(model, tokens=70)
    # Another sequence's blocks lie between this one's, and it has let go of some of its own.
    beside = first.prefill(random_ids(model, tokens=9, seed=1))
    context = first.generate(prompt, max_new_tokens=23, **GREEDY).context
    context.save(path)
    beside.close()
    restored = second.restore(path)
    assert (restored.token_ids, restored.retention) == (context.token_ids, context.retention)
    assert (restored.cached_tokens, restored.blocks) == (context.cached_tokens, context.blocks)
    expected, kept = going_on(first, context)
    logits, positions = going_on(second, restored)
    assert torch.equal(logits, expected) and positions == kept
    restored.close()
    assert held_blocks(second) == 0


def test_the_file_has_holes_scores_and_the_policy(path: Path) -> None:
    model = tiny_model("llama")
    lm = attached(model)
    context = lm.prefill(random_ids(model, tokens=60), retention=HEAVY)
    context.save(path)
    cached = context.tables_for(lm.engine).cached
    with safe_open(path, framework="pt") as file:
        positions, scores = file.get_tensor("positions.0"), file.get_tensor("scores.0")
        metadata = file.metadata()
        assert file.get_slice("keys.0").get_shape()[1] == len(positions)
    assert positions.tolist() == cached.tables[0].positions().tolist()
    assert len(positions) <= 16 and positions[-1] == 59
    assert torch.equal(scores.float(), torch.from_numpy(cached.retained.scores[0])) and (scores > 0).any()
    known = {"policy": "HeavyHitters", "budget_tokens": 16, "recent_tokens": None}
    assert json.loads(metadata["retention"])["policy"] == known


def test_what_was_computed_after_a_drop_is_not_found_by_others(path: Path) -> None:
    model = tiny_model("llama")
    prompt = random_ids(model, tokens=60)
    first, second = attached(model), attached(model)
    first.prefill(prompt, retention=kvloom.SinkWindow(sink_tokens=2, window_tokens=10)).save(path)
    context = second.restore(path)
    usage = second.generate([*prompt, 5], max_new_tokens=1, **GREEDY).usage
    # Of twelve exact tokens the second and third block have gone.
    assert usage.cached_prompt_tokens == 4
    context.close()
    assert held_blocks(second) == 0


def test_a_context_that_lost_its_tables_is_computed_under_its_policy(path: Path) -> None:
    model = tiny_model("llama")
    policy = kvloom.SinkWindow(sink_tokens=2, window_tokens=14)
    lm = attached(model)
    context = lm.generate(random_ids(model, tokens=40), max_new_tokens=9, retention=policy, **GREEDY).context
    lm.engine._keeping.holdings.release_all()
    context.save(path)
    restored = attached(model).restore(path)
    assert (restored.retention, restored.cached_tokens) == (policy, 49) and restored.blocks < 7
    assert held_blocks(lm) == 0


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[-1]], ids=lambda own: type(own).__name__)
def test_a_context_that_was_truncated_into_its_prompt_is_saved_and_goes_on(path: Path, policy: Retention) -> None:
    model = tiny_model("llama")
    first, second = (attached(model, retention=policy) for _ in range(2))
    prompt = random_ids(model, tokens=40)
    with first.prefill(prompt[:12]) as beginning:
        context = first.prefill(prompt[12:], context=beginning).truncate(37)
    context.save(path)
    restored = second.restore(path)
    assert list(restored.token_ids) == prompt[:37]
    assert torch.equal(going_on(second, restored)[0], going_on(first, context)[0])


def test_a_restored_stream_goes_past_the_trained_length(path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    policy = kvloom.SinkWindow(sink_tokens=2, window_tokens=14)
    first, second = attached(model), attached(model)
    # Begun within the trained length, so nothing was re-indexed yet.
    context = first.generate(random_ids(model, tokens=30), max_new_tokens=9, retention=policy, **GREEDY).context
    assert context.retention == policy
    context.save(path)
    options = {"max_new_tokens": 60, "output_logits": True, **GREEDY}
    expected = first.generate([5], context=context, **options)
    assert torch.equal(second.generate([5], context=second.restore(path), **options).logits, expected.logits)


# ---- refused by name ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MyOwn(Retention):
    """Keeps everything."""

    def keep(self, held: Held) -> Keep:
        return held.everything

    def most_blocks(self, **sizes: int) -> int:
        return 100


def test_a_policy_that_another_process_would_not_know_is_refused(path: Path) -> None:
    model = tiny_model("llama")
    context = attached(model).prefill(random_ids(model, tokens=20), retention=MyOwn())
    with pytest.raises(InvalidRequest, match="under MyOwn cannot be saved: another process would not know"):
        context.save(path)
    assert not list(path.parent.iterdir())


def test_a_model_that_cannot_honour_the_policy_as_it_is_attached_refuses_it(path: Path) -> None:
    model = tiny_model("llama")
    policy = kvloom.TopBlocks(budget_tokens=8)
    attached(model, retention=policy).prefill(random_ids(model, tokens=20)).save(path)
    lm = attached(model)
    with pytest.raises(InvalidRequest, match="Pass a TopBlocks as `retention` there"):
        lm.restore(path)
    assert held_blocks(lm) == 0


def test_another_block_size_is_refused_since_policies_go_by_blocks(path: Path) -> None:
    model = tiny_model("llama")
    attached(model).prefill(random_ids(model, tokens=40), retention=HEAVY).save(path)
    lm = attached(model, block_tokens=8)
    with pytest.raises(SnapshotMismatch, match=r"of block_tokens 4; this model keeps 8. Load .* block_tokens=4"):
        lm.restore(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"policy": {"policy": "NoPolicy"}},
        {"policy": {"policy": "HeavyHitters", "budget_tokens": -1}},
        {"policy": {"policy": "HeavyHitters", "no_such_setting": 3}},
        {"policy": {"policy": "LastQuery", "budget_tokens": 16}},
        {"prompt": [9, 3]},
        {"prompt": 7},
        {"exact_tokens": "all"},
        {"exact_tokens": 10_000},
        {},
    ],
)
def test_a_damaged_policy_is_seen(path: Path, damage: dict[str, Any]) -> None:
    model = tiny_model("llama")
    lm = attached(model)
    lm.prefill(random_ids(model, tokens=40), retention=HEAVY).save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if damage:
        metadata["retention"] = json.dumps(json.loads(metadata["retention"]) | damage)
    else:
        tensors["scores.0"] = tensors["scores.0"][:-1].contiguous()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CorruptSnapshot, match="is damaged"):
        lm.restore(path)
    assert held_blocks(lm) == 0
