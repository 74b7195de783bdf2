"""Sequences under policies, forked, cut and dropped at random: no block is lost, none is freed while somebody holds it.

Attention masses are drawn; what each sequence must hold is computed on plain lists of positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

import naive_retention as naive
from kvloom.blocks import PoolExhausted
from kvloom.cache import CachedSequence, CacheLayout, KVCache, LayerShape, Reach
from kvloom.cache.retention import CompressedPrompt, HeavyHitters, LastQuery, Retained, Retention, SinkWindow, TopBlocks
from kvloom.engine.retaining import begin, retain

POLICIES: list[Retention] = [
    SinkWindow(sink_tokens=1, window_tokens=3),
    SinkWindow(sink_tokens=0, window_tokens=5, pins=[(2, 3), (6, 9)]),
    HeavyHitters(budget_tokens=6, recent_tokens=2),
    LastQuery(budget_tokens=5),
    CompressedPrompt(budget_tokens=4, observed_tokens=2, pooled_tokens=3),
    TopBlocks(budget_tokens=4),
]
LAYOUT = [
    LayerShape(kv_heads=1, key_dim=2, value_dim=2),
    LayerShape(kv_heads=1, key_dim=2, value_dim=2, reach=Reach(window_tokens=4)),
]


@dataclass(eq=False)
class Sequence:
    cached: CachedSequence
    policy: Retention
    prompt: int
    held: list[int]
    scores: dict[int, float]
    exact: int | None = None


class RetentionMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(block_tokens=st.sampled_from([1, 2, 4]), blocks=st.integers(12, 40))
    def start(self, block_tokens: int, blocks: int) -> None:
        layout = CacheLayout(layers=tuple(LAYOUT), dtype=torch.float32, block_tokens=block_tokens, block_bounds=True)
        self.size, self.live, self.known = block_tokens, list[Sequence](), dict[bytes, int]()
        self.cache = KVCache(layout, budget_bytes=blocks * layout.bytes_per_row_of_blocks, device=torch.device("cpu"))

    @rule(target=sequences, policy=st.sampled_from(POLICIES), prompt=st.integers(9, 14))
    def open(self, policy: Retention, prompt: int) -> Sequence:
        cached = begin(self.cache.open(), policy, prompt_tokens=prompt, trained_tokens=None)
        exact = prompt if isinstance(policy, TopBlocks) else None
        self.live.append(sequence := Sequence(cached, policy, prompt, [], {}, exact))
        return sequence

    @rule(
        chosen=st.lists(sequences, min_size=1, max_size=3, unique_by=id),
        count=st.integers(1, 5),
        random=st.randoms(use_true_random=False),
        fails=st.booleans(),
    )
    def step(self, chosen: list[Sequence], count: int, random, fails: bool) -> None:
        # A chunk ends where the prompt does, and a token is decoded at a time, as the scheduler has it.
        counts = [min(count, max(1, own.prompt - own.cached.tokens)) for own in chosen]
        before = [table.runs.tolist() for own in chosen for table in own.cached.tables]
        states = [own.cached.retained for own in chosen]
        try:
            extension = self.cache.extend([(own.cached, n) for own, n in zip(chosen, counts, strict=True)])
        except PoolExhausted:
            return
        if fails:
            self.cache.rollback(extension)
            assert [table.runs.tolist() for own in chosen for table in own.cached.tables] == before
            assert [own.cached.retained for own in chosen] == states
            return
        masses = [self.observe(own, n, random) for own, n in zip(chosen, counts, strict=True)]
        self.cache.commit(extension)
        groups = [
            SimpleNamespace(observation=SimpleNamespace(masses=lambda: masses)),
            SimpleNamespace(observation=None),
        ]
        retain(self.cache, extension.sequences, SimpleNamespace(groups=groups))
        for own in chosen:
            self.decide(own)

    def observe(self, own: Sequence, count: int, random) -> np.ndarray | None:
        end = own.cached.tokens
        own.held += range(end - count, end)
        observed = own.cached.retained.observed(end - count, count)
        mass = {position: random.randint(0, 4) for position in own.held}
        for position in own.held:
            before = 0 if isinstance(own.policy, LastQuery) and observed else own.scores.get(position, 0)
            own.scores[position] = before + (mass[position] if observed else 0)
        return np.array([mass[position] for position in own.held], np.float32) if observed else None

    def decide(self, own: Sequence) -> None:
        tokens, policy, before = own.cached.tokens, own.policy, own.held
        if isinstance(policy, SinkWindow):
            seen = set(range(policy.sink_tokens)) | {p for first, end in policy.pins for p in range(first, end)}
            seen |= set(range(tokens - policy.window_tokens, tokens))
            later = {p for p in seen if p < tokens} | {tokens - 1}
            own.held = [p for block in naive.blocks_of(own.held, self.size) if later & set(block) for p in block]
            hidden = next(
                p for p in range(50) if not (p < policy.sink_tokens or any(a <= p < b for a, b in policy.pins))
            )
            own.exact = hidden + policy.window_tokens
            return
        if isinstance(policy, TopBlocks):
            return
        if isinstance(policy, CompressedPrompt):
            if tokens != own.prompt:
                return
            best = {p: max(own.scores.get(q, -1) for q in (p - 1, p, p + 1)) for p in own.held}
            own.held = naive.drop(own.held, best, 4, self.size, 2, tokens)
        elif tokens >= own.prompt:
            budget, recent = (6, 2) if isinstance(policy, HeavyHitters) else (5, 0)
            own.held = naive.drop(own.held, own.scores, budget, self.size, recent, tokens)
        if len(own.held) < len(before) and own.exact is None:
            own.exact = tokens

    @rule(target=sequences, own=sequences)
    def fork(self, own: Sequence) -> Sequence:
        child = Sequence(
            self.cache.fork(own.cached), own.policy, own.prompt, list(own.held), dict(own.scores), own.exact
        )
        self.live.append(child)
        return child

    @rule(own=sequences, data=st.data())
    def truncate(self, own: Sequence, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(0, own.cached.tokens))
        possible = self.cache.can_truncate(own.cached, tokens)
        if not possible:
            return
        self.cache.truncate(own.cached, tokens)
        own.held = [position for position in own.held if position < tokens]
        own.prompt = min(own.prompt, tokens)

    @rule(own=sequences)
    def remember(self, own: Sequence) -> None:
        """Tokens are their positions: whatever is found must be exact."""
        extra_key = repr(own.policy).encode()
        self.cache.remember(own.cached, list(range(own.cached.tokens)), extra_key=extra_key)
        exact = own.cached.tokens if own.exact is None else own.exact
        self.known[extra_key] = max(self.known.get(extra_key, 0), exact)
        found = self.cache.open(range(60), extra_key=extra_key)
        assert found.tokens <= self.known[extra_key]
        self.cache.close(found)

    @rule(own=consumes(sequences))
    def close(self, own: Sequence) -> None:
        self.cache.close(own.cached)
        self.live.remove(own)

    @invariant()
    def tables_hold_what_the_policies_keep(self) -> None:
        for own in getattr(self, "live", []):
            assert own.cached.tables[0].positions().tolist() == own.held
            state = own.cached.retained
            assert isinstance(state, Retained)
            if own.policy.scored:
                assert state.scores[0].tolist() == [own.scores[position] for position in own.held]
            if own.exact is not None:
                assert own.cached.exact_tokens == min(own.exact, own.cached.tokens)

    @invariant()
    def free_and_referenced_are_all(self) -> None:
        if not hasattr(self, "cache"):
            return
        for index, group in enumerate(self.cache.groups):
            holders = np.zeros(group.pool.total, dtype=int)
            for own in self.live:
                holders[own.cached.tables[index].blocks] += 1
            holders[list(group.index._digest_by_block)] += 1
            assert holders.tolist() == group.pool.references.tolist()
            assert group.pool.free + group.pool.referenced == group.pool.total


TestRetentionMachine = RetentionMachine.TestCase
