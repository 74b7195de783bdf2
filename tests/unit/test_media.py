"""Images of a sequence: places, rotary positions, cuts; features by content; marks in the prefix index."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.blocks import chain_digests
from kvloom.models.images.features import FeatureCache, Features
from kvloom.models.images.media import Media, Medium, join


def picture(*places: int, pixel: float = 0.0) -> Medium:
    return Medium("image", {"pixel_values": torch.full((2,), pixel)}, np.array(places, dtype=np.int64))


def square(first: int, before: int) -> Media:
    """`before` words, a picture of 2 x 2 features at `first`, whose positions begin there, and one word."""
    assert first == before
    grid = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]) + before
    words = torch.arange(before).expand(3, -1)
    positions = torch.cat([words, grid, torch.full((3, 1), before + 2)], dim=1)
    return Media((picture(*range(before, before + 4)),), before + 5, positions, before + 3)


def test_tokens_behind_an_image_go_on_from_its_larger_side() -> None:
    media = square(3, 3)
    assert media.positions_of(2, 8)[0].tolist() == [2, 3, 3, 3, 3, 5, 6, 7]
    assert media.positions_of(2, 8)[2].tolist() == [2, 3, 4, 3, 4, 5, 6, 7]
    assert media.positions_of(20, 2).tolist() == [[18, 19]] * 3


@given(first=st.integers(1, 9), words=st.integers(0, 9), second=st.integers(1, 9))
def test_what_is_joined_stands_behind_what_was_before(first: int, words: int, second: int) -> None:
    before, own = square(first, first), square(second, second)
    at = before.tokens + words
    whole = join(before, own, at=at)
    assert whole.tokens == at + own.tokens
    assert torch.equal(whole.positions_of(0, at), before.positions_of(0, at))
    moved = whole.positions_of(at, own.tokens + 3) - own.positions_of(0, own.tokens + 3)
    assert moved.unique().tolist() == [int(before.positions_of(at, 1)[0, 0])]
    assert [place for place, _ in whole.marks] == [first, at + second]
    behind_text = join(None, own, at=words)
    assert (behind_text.positions_of(words, own.tokens) - own.positions).unique().tolist() == [words]
    cut = whole.cut(at)
    assert torch.equal(cut.positions_of(0, at + 4), before.positions_of(0, at + 4))
    assert len(cut.items) == 1 and whole.cut(first) is None


def test_a_cut_through_an_image_is_seen() -> None:
    media = square(3, 3)
    assert [media.split_by(tokens) is not None for tokens in range(9)] == [False] * 4 + [True] * 3 + [False] * 2


def test_content_is_told_apart_and_place_is_not_content() -> None:
    assert picture(1, 2).digest == picture(5, 6).digest != picture(1, 2, pixel=0.5).digest


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    place=st.integers(0, 39),
    size=st.integers(1, 6),
)
def test_a_mark_changes_the_digests_from_its_block_on(tokens: list[int], place: int, size: int) -> None:
    plain = chain_digests(tokens, size, b"key")
    one, other = (chain_digests(tokens, size, b"key", marks=[(place, content)]) for content in (b"one", b"other"))
    block = place // size
    assert plain[:block] == one[:block] == other[:block]
    assert all(len({*own}) == 3 for own in zip(plain[block:], one[block:], other[block:], strict=True))


def test_features_are_kept_by_content_up_to_the_budget_and_as_long_as_a_step_needs_them() -> None:
    encoded: list[float] = []

    def encode(medium: Medium) -> Features:
        encoded.append(float(medium.inputs["pixel_values"][0]))
        return Features(torch.zeros(4, 2))  # 32 bytes

    cache = FeatureCache(encode, budget_bytes=64)
    pictures = [picture(0, pixel=float(number)) for number in range(3)]
    assert len(cache.of([*pictures, pictures[0]], key=b"")) == 4
    assert cache.nbytes == 96, "one step needs them all"
    cache.of(pictures[2:], key=b"")
    assert cache.nbytes == 64 and encoded == [0, 1, 2]
    cache.of(pictures[:1], key=b"")
    cache.of(pictures[1:2], key=b"")
    assert encoded == [0, 1, 2, 1], "the least recently used was given up"
    cache.of(pictures[1:2], key=b"other weights")
    assert encoded == [0, 1, 2, 1, 1]
    cache.clear()
    assert cache.nbytes == 0
