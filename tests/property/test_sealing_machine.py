"""Sealing under random operations, against a plain model of what every block must hold.

In the model a block is a list of tokens. It takes tokens until it is full; then it is sealed, and its codes follow from
those tokens. Whoever holds it holds these codes for ever: a fork, a sequence that was cut inside of it, a prompt that
found it by its prefix, and a file.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvloom.blocks import PoolExhausted
from kvloom.cache import CachedSequence, CacheLayout, Extension, Int8Store, KVCache, LayerShape, Reach
from kvloom.cache.landing import land
from kvloom.cache.snapshot import Beside, Origin, open_snapshot, write_snapshot

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
REACHES = st.one_of(
    st.integers(1, 9).map(lambda tokens: Reach(window_tokens=tokens)),
    st.integers(1, 9).map(lambda tokens: Reach(chunk_tokens=tokens)),
)
KEY_DIM, VALUE_DIM = 3, 2

History = tuple[int, ...]


@functools.cache
def key_of(history: History, layer: int) -> np.ndarray:
    """float32[KEY_DIM], the key of the last token of a history, as in a model; the value is the front of it, halved."""
    digest = hashlib.blake2b(bytes([layer, *history]), digest_size=2 * KEY_DIM).digest()
    return np.frombuffer(digest, dtype=np.int16).astype(np.float32) * np.float32([1, 100, 0.01])


def value_of(history: History, layer: int) -> np.ndarray:
    return key_of(history, layer)[:VALUE_DIM] / 2


def quantized(numbers: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by the definition, with bfloat16 scales."""
    scales = (
        torch.from_numpy(np.abs(numbers).max(axis=axis, keepdims=True) / np.float32(127)).bfloat16().float().numpy()
    )
    codes = np.divide(numbers, scales, out=np.zeros_like(numbers), where=scales != 0)
    return np.clip(np.rint(codes), -127, 127), scales


@dataclass(eq=False)
class Block:
    """Histories of the tokens that it took; sealed once these are as many as a block holds."""

    histories: list[History]
    sealed: bool


@dataclass
class Piece:
    """The first `count` tokens of a block."""

    block: Block
    count: int


@dataclass(eq=False)
class Sequence:
    cached: CachedSequence
    history: list[int]
    pieces: list[Piece] = field(default_factory=list)

    def append(self, tokens: list[int], size: int) -> None:
        for token in tokens:
            self.history.append(token)
            last = self.pieces[-1] if self.pieces else None
            if last is None or last.block.sealed:
                self.pieces.append(last := Piece(Block([], False), 0))
            elif last.count < len(last.block.histories) or last.count:
                # Somebody else may go on with the same block in another way.
                last.block = Block(last.block.histories[: last.count], False)
            last.block.histories.append(tuple(self.history))
            last.count += 1
            last.block.sealed = last.count == size

    def cut(self, tokens: int) -> None:
        del self.history[tokens:]
        before = 0
        kept = []
        for piece in self.pieces:
            if before < tokens:
                kept.append(Piece(piece.block, min(piece.count, tokens - before)))
            before += piece.count
        self.pieces = kept


class SealingMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    @initialize(target=sequences, limited=REACHES, size=st.sampled_from([1, 2, 4]), blocks=st.integers(3, 20))
    def start(self, limited: Reach, size: int, blocks: int) -> Sequence:
        shape = {"key_dim": KEY_DIM, "value_dim": VALUE_DIM}
        layers = LayerShape(kv_heads=1, reach=limited, **shape), LayerShape(kv_heads=2, **shape)
        layout = CacheLayout(layers=layers, dtype=torch.float32, block_tokens=size, codec="int8")
        self.cache = KVCache(layout, budget_bytes=layout.budget_for(blocks), device=torch.device("cpu"))
        assert isinstance(self.cache.store, Int8Store)
        self.size = size
        self.live: list[Sequence] = []
        return self.open([0])

    @rule(target=sequences, tokens=TOKENS)
    def open(self, tokens: list[int]) -> Sequence:
        cached = self.cache.open(tokens)
        self.live.append(sequence := Sequence(cached, []))
        sequence.append(tokens[: cached.tokens], self.size)
        assert all(piece.block.sealed for piece in sequence.pieces), "only sealed blocks are found"
        return sequence

    @rule(
        chosen=st.lists(sequences, min_size=1, max_size=4, unique_by=id),
        data=st.data(),
        fate=st.sampled_from(["commit", "commit", "commit", "roll back", "fail after writing"]),
    )
    def extend(self, chosen: list[Sequence], data: st.DataObject, fate: str) -> None:
        tokens = [data.draw(TOKENS) for _ in chosen]
        before = self.state()
        try:
            extension = self.cache.extend([(own.cached, len(new)) for own, new in zip(chosen, tokens, strict=True)])
        except PoolExhausted:
            assert self.state() == before
            return
        if fate != "roll back":
            self.write(extension, chosen, tokens)
        if fate == "commit":
            for own, new in zip(chosen, tokens, strict=True):
                own.append(new, self.size)
            for own in chosen:  # before windows let go of what the index may want
                self.cache.remember(own.cached, own.history)
            self.cache.commit(extension)
        else:
            self.cache.rollback(extension)
            assert self.state() == before

    def write(self, extension: Extension, sequences: list[Sequence], tokens: list[list[int]]) -> None:
        histories = [
            (*own.history, *new[: i + 1]) for own, new in zip(sequences, tokens, strict=True) for i in range(len(new))
        ]
        for layer, shape in enumerate(self.cache.layout.layers):
            landing = land(self.cache.written(extension, self.cache.layout.group_of_layer[layer]), "cpu")
            keys, values = (
                torch.from_numpy(np.stack([of(own, layer) for own in histories])).expand(shape.kv_heads, -1, -1)
                for of in (key_of, value_of)
            )
            self.cache.store.write(layer, landing, keys, values)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: Sequence) -> Sequence:
        pieces = [Piece(own.block, own.count) for own in sequence.pieces]
        self.live.append(child := Sequence(self.cache.fork(sequence.cached), list(sequence.history), pieces))
        return child

    @rule(sequence=sequences, data=st.data())
    def truncate(self, sequence: Sequence, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(0, len(sequence.history)))
        unsealed = self.cache.unsealed_length(sequence.cached, tokens)
        if self.cache.can_truncate(sequence.cached, tokens):
            before = len(sequence.history)
            self.cache.truncate(sequence.cached, tokens)
            sequence.cut(tokens)
            last = sequence.pieces[-1] if sequence.pieces else None
            cut_sealed = (
                tokens < before and last is not None and last.block.sealed and last.count < len(last.block.histories)
            )
            assert unsealed == (tokens - last.count if cut_sealed and last is not None else tokens)

    @rule(target=sequences, sequence=sequences)
    def save_and_restore(self, sequence: Sequence) -> Any:
        if not sequence.history:
            return multiple()
        origin = Origin.of("numbers", "0", self.cache.layout)
        with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
            write_snapshot(
                f"{folder}/a.kv",
                self.cache,
                sequence.cached,
                token_ids=sequence.history,
                regime=None,
                origin=origin,
                beside=Beside(),
            )
            with open_snapshot(f"{folder}/a.kv") as file:
                assert file.origin == origin
                try:
                    cached = self.cache.place(file.placements(self.cache.layout), tokens=file.tokens)
                except PoolExhausted:
                    return multiple()
                file.load(self.cache, cached)
        pieces = [Piece(own.block, own.count) for own in sequence.pieces]
        self.live.append(copy := Sequence(cached, list(sequence.history), pieces))
        return copy

    @rule(sequence=consumes(sequences))
    def close(self, sequence: Sequence) -> None:
        self.cache.close(sequence.cached)
        self.live.remove(sequence)

    def state(self) -> list[object]:
        return [
            *[[(table.runs.tolist(), table.position) for table in own.cached.tables] for own in self.live],
            *[(group.pool.open_blocks.free, self.open_places(index)) for index, group in enumerate(self.cache.groups)],
        ]

    def open_places(self, group: int) -> dict[int, int]:
        """Open blocks that are held, and their places."""
        pool = self.cache.groups[group].pool
        held = np.unique(np.concatenate([own.cached.tables[group].blocks for own in self.live] or [[]])).astype(int)
        return {block: pool.open_blocks.place(block) for block in held.tolist() if pool.is_open(block)}

    # ---- what holds after every step --------------------------------------------------------------------

    @invariant()
    def every_place_is_free_or_that_of_one_block_that_is_held(self) -> None:
        for index, group in enumerate(self.cache.groups):
            places = self.open_places(index)
            assert group.pool.open_blocks.free + len(places) == group.pool.open_blocks.total
            assert len(set(places.values())) == len(places)
            assert self.cache.open_blocks_held([own.cached for own in self.live])[index] == len(places)

    @invariant()
    def every_run_holds_what_its_block_was_given(self) -> None:
        """And of a sealed block the codes that were made of it then, whatever happened since."""
        store = self.cache.store
        for own in self.live:
            starts = np.cumsum([0, *(piece.count for piece in own.pieces)])
            for layer, index in enumerate(self.cache.layout.group_of_layer):
                table, pool = own.cached.tables[index], self.cache.groups[index].pool
                for block, offset, count, first in table.runs.tolist():
                    piece = own.pieces[int(np.searchsorted(starts, first, side="right")) - 1]
                    assert (piece.count, offset) == (count, 0), "a run is what its sequence has of a block"
                    assert piece.block.sealed == (not pool.is_open(block))
                    keys = np.stack([key_of(history, layer) for history in piece.block.histories])
                    values = np.stack([value_of(history, layer) for history in piece.block.histories])
                    slots = slice(block * self.size, block * self.size + count)
                    if not piece.block.sealed:
                        place = pool.open_blocks.place(block) * self.size
                        assert (store.open.keys[layer][:, place : place + count].numpy() == keys[:count]).all()
                        assert (store.open.values[layer][:, place : place + count].numpy() == values[:count]).all()
                        continue
                    for sealed, numbers, axis in (
                        (store.sealed_keys[layer], keys, 0),
                        (store.sealed_values[layer], values, 1),
                    ):
                        codes, scales = quantized(numbers, axis)
                        assert (sealed.codes[:, slots].numpy() == codes[:count]).all()
                        assert (sealed.read(slots, torch.float32).numpy() == (codes * scales)[:count]).all()


TestSealing = SealingMachine.TestCase
TestSealing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
