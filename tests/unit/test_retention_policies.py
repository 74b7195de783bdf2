"""Policies and sight, each against a plain statement of itself."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import kvloom
from kvloom.blocks.runs import COUNT, FIRST
from kvloom.cache.retention import CompressedPrompt, HeavyHitters, Held, LastQuery, Sight, SinkWindow, TopBlocks
from kvloom.cache.retention.compressed_prompt import pooled
from kvloom.cache.retention.sight import positions_of

STRETCHES = st.lists(st.integers(0, 30), max_size=6, unique=True).map(
    lambda ends: tuple(zip(sorted(ends)[0::2], sorted(ends)[1::2], strict=False))
)
SIGHTS = st.builds(Sight, STRETCHES, st.integers(1, 12), st.booleans())


def visible(sight: Sight, query: int) -> list[int]:
    """What a query sees, in words: itself and the tokens just before it, and the stretches."""
    pinned = {position for first, end in sight.always for position in range(first, end)}
    return [key for key in range(query + 1) if key > query - sight.window_tokens or key in pinned]


def runs_of(tokens: int, block_tokens: int) -> np.ndarray:
    """The runs of a table that has dropped nothing; block ids are those of its places."""
    firsts = np.arange(0, tokens, block_tokens)
    counts = np.minimum(block_tokens, tokens - firsts)
    return np.stack([firsts // block_tokens, 0 * firsts, counts, firsts], axis=1).astype(np.int32)


@given(SIGHTS, st.integers(0, 60))
def test_a_query_sees_its_window_and_the_stretches_behind_it(sight: Sight, query: int) -> None:
    keys = np.arange(70)
    assert keys[sight.sees(keys, np.array([query]))[0]].tolist() == visible(sight, query)
    assert sight.hidden(query) == query + 1 - len(visible(sight, query))


@given(SIGHTS, st.integers(0, 60))
def test_turned_queries_stand_where_the_token_has_its_place_in_the_cache(sight: Sight, query: int) -> None:
    """Xiao et al. 2024, section 3.2: positions are those within the cache."""
    seen = visible(sight, query)
    place = {key: index for index, key in enumerate(seen)}
    shifts = sight.shifts(np.array(seen), query)
    for key, shift in zip(seen, shifts.tolist(), strict=True):
        within_cache = place[query] - place[key] if sight.reindexed else query - key
        assert query - key - shift == within_cache


@given(SIGHTS, st.integers(1, 5), st.integers(0, 40), st.integers(1, 20))
def test_the_parts_of_a_chunk_hold_every_visible_pair_once(
    sight: Sight, block_tokens: int, first: int, count: int
) -> None:
    queries = np.arange(first, first + count)
    found = set()
    for part in sight.parts(runs_of(first + count, block_tokens), queries):
        keys = positions_of(part.runs)
        for index, query in enumerate(queries[part.queries :].tolist()):
            seen = keys if part.seen is None else keys[part.seen[index]]
            assert len(seen), "no query of a part is blind"
            shift = 0 if part.shift is None else int(part.shift[index])
            for key in seen.tolist():
                assert (query, key) not in found
                assert shift == sight.shifts(np.array([key]), query)[0]
                found.add((query, key))
    assert found == {(query, key) for query in queries.tolist() for key in visible(sight, query)}


@given(SIGHTS)
def test_exact_tokens_end_where_something_is_first_hidden(sight: Sight) -> None:
    first = next(query for query in range(100) if len(visible(sight, query)) < query + 1)
    assert sight.exact_tokens == first
    assert sight.hides(first) and not sight.hides(first - 1)


def test_no_distance_reaches_the_trained_length() -> None:
    """Sinks and window together are a little longer than the trained length: the sinks are seen at its end."""
    sight = Sight(((0, 4),), window_tokens=16, reindexed=True, trained_tokens=16)
    for query in range(60):
        seen = np.array(visible(sight, query))
        distances = query - seen - sight.shifts(seen, query)
        assert distances.min() >= 0 and distances.max() < 16
    assert sight.exact_tokens == 16


@given(
    st.integers(1, 4),
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(4, 30),
    st.integers(0, 4),
)
def test_heavy_hitters_let_go_of_the_lightest_blocks_but_not_of_recent_ones(
    block_tokens: int, scores: list[int], budget: int, recent: int
) -> None:
    runs = runs_of(len(scores), block_tokens)
    held = Held(runs[:, FIRST], runs[:, COUNT], np.array(scores, np.float32), len(scores), range(1))
    kept = HeavyHitters(budget_tokens=budget, recent_tokens=recent).keep(held)
    blocks = [scores[first : first + count] for _, _, count, first in runs.tolist()]
    left = dict(enumerate(blocks))
    while sum(map(len, left.values())) > budget and len(left) > 1:
        old = [b for b in left if b != len(blocks) - 1 and (b * block_tokens + len(left[b])) <= len(scores) - recent]
        candidates = old or [min(left)]
        del left[min(candidates, key=lambda b: (np.float32(sum(left[b]) / len(left[b])) if old else 0, b))]
    assert np.flatnonzero(kept).tolist() == sorted(left)


def test_a_last_query_replaces_what_earlier_ones_said() -> None:
    before = np.array([5, 5, 0], np.float32)
    mass = np.array([0, 1, 2], np.float32)
    assert LastQuery().score(before, mass).tolist() == [0, 1, 2]
    assert LastQuery().score(before, None).tolist() == [5, 5, 0]
    assert HeavyHitters().score(before, mass).tolist() == [5, 6, 2]


def test_policies_observe_the_queries_that_their_papers_name() -> None:
    prompt = range(0, 100)
    chunks = [range(0, 60), range(60, 100), range(100, 101)]
    assert [HeavyHitters().observed(own, prompt) for own in chunks] == [60, 40, 1]
    assert [LastQuery().observed(own, prompt) for own in chunks] == [0, 1, 1]
    assert [CompressedPrompt(observed_tokens=50).observed(own, prompt) for own in chunks] == [10, 40, 0]
    assert [SinkWindow().observed(own, prompt) for own in chunks] == [0, 0, 0]
    assert CompressedPrompt(observed_tokens=50).observed(range(100, 110), range(100, 110)) == 0, "too few to judge by"


def test_votes_count_for_neighbours() -> None:
    assert pooled(np.array([0, 0, 9, 0, 0, 3], np.float32), 3).tolist() == [0, 9, 9, 9, 3, 3]
    assert pooled(np.array([1, 2], np.float32), 7).tolist() == [2, 2]


def test_a_stream_needs_as_many_blocks_as_its_window() -> None:
    policy = SinkWindow(sink_tokens=4, window_tokens=1024)
    most = policy.most_blocks(prompt_tokens=20, new_tokens=100_000, step_tokens=512, block_tokens=16)
    assert 1 + 1024 // 16 <= most <= 1 + 1024 // 16 + 2 + 2
    scored = HeavyHitters(budget_tokens=256)
    assert scored.most_blocks(prompt_tokens=20, new_tokens=100_000, step_tokens=512, block_tokens=16) <= 256 // 16 + 2


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: SinkWindow(window_tokens=-1), "`window_tokens` must be a whole number of at least 1; got -1"),
        (lambda: SinkWindow(window_tokens=0), "at least 1; got 0"),
        (lambda: SinkWindow(sink_tokens=-4), "`sink_tokens` must be a whole number of at least 0; got -4"),
        (lambda: SinkWindow(sink_tokens=1.5), "got 1.5"),
        (lambda: SinkWindow(pins=[(3, 3)]), r"`pins` has the span \(3, 3\), which holds no token"),
        (lambda: SinkWindow(pins=[(-1, 3)]), "got -1"),
        (lambda: SinkWindow(pins=7), r"`pins` must be a list of \(first, end\) positions; got 7"),
        (lambda: SinkWindow(reindex="yes"), "`reindex` must be True, False or None"),
        (lambda: HeavyHitters(budget_tokens=0), "`budget_tokens` must be"),
        (lambda: HeavyHitters(budget_tokens=8, recent_tokens=9), "`recent_tokens=9` exceeds `budget_tokens=8`"),
        (lambda: LastQuery(budget_tokens=True), "got True"),
        (lambda: CompressedPrompt(pooled_tokens=4), "`pooled_tokens=4` must be odd"),
        (lambda: CompressedPrompt(budget_tokens=16), "`observed_tokens=32` exceeds `budget_tokens=16`"),
        (lambda: TopBlocks(budget_tokens=-16), "got -16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, complaint: str) -> None:
    with pytest.raises(kvloom.InvalidRequest, match=complaint):
        make()


def test_policies_are_values() -> None:
    assert SinkWindow(pins=[(5, 7), (1, 2)]) == SinkWindow(pins=((1, 2), (5, 7)))
    assert len({HeavyHitters(), HeavyHitters(budget_tokens=1024), LastQuery()}) == 2
    with pytest.raises(TypeError):
        SinkWindow(4, 1024)
