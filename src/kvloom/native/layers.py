"""Decoder layers as one call: `src/layers.cpp`.

A layer is x += output(attention(q, k, v of norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))), as Llama has made
it common. What runs between two linears is small; strung together in C++ it costs next to nothing, and every row's
bits depend on its own history alone, as those of the linears and of attention do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvloom.native.library import Library
from kvloom.native.linear import DTYPES, PackedWeight


class _Weight(ctypes.Structure):
    _fields_ = (("packed", c_void_p), ("bias", c_void_p), ("outputs", c_int64))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("epsilon", c_float), ("unused", c_int32))


NORMS = ("input_norm", "query_norm", "key_norm", "post_norm")
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")
SIZES = ("hidden", "heads", "kv_heads", "dim", "group")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in NORMS),
        *((name, _Weight) for name in PROJECTIONS),
        *((name, c_int64) for name in SIZES),
        ("scale", c_float),
        ("unused", c_int32),
    )


class _KeysValues(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        ("stride", c_int64),
        ("sealed", c_int64 * 10),
        ("bounds", c_int64 * 3),
    )


LANDING = ("earlier_slots", "filled_blocks", "filled_from", "open_rows", "open_slots")
LANDED = ("earlier_slots", "filled_blocks", "open_rows")
"""Those of which the library is told how many there are."""


class _Landing(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in LANDING), *(("number_of_" + name, c_int64) for name in LANDED))


class _Group(ctypes.Structure):
    _fields_ = (
        ("slots", c_void_p),
        ("landing", _Landing),
        *((name, c_void_p) for name in ("schedule", "turn", "observed")),
    )


BUFFERS = ("hidden", "normed", "query", "key", "value", "attended", "gate", "up")
FACTORS = ("cosines", "sines")

MIN_SHARED_PRODUCTS = 1 << 21
"""Products a layer from which on several threads work on it. Below, waiting for each other costs more than they
bring, and on a busy machine far more."""


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in (*BUFFERS, *FACTORS)),
        ("groups", POINTER(_Group)),
        ("memory", c_void_p),
        ("rows", c_int64),
        ("dtype", c_int32),
        ("threads", c_int32),
    )


class _Ends(ctypes.Structure):
    _fields_ = (
        ("embeddings", c_void_p),
        ("norm", _Norm),
        ("head", _Weight),
        ("vocabulary", c_int64),
        ("half", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("frequencies", c_void_p),
        ("logit_rows", c_void_p),
        ("logit_count", c_int64),
        ("logits", c_void_p),
        ("scaling", c_float),
        ("unused", c_int32),
    )


@dataclass(frozen=True)
class KeysValues:
    """Where layers keep keys and values: as the library takes them, and what must live as long."""

    arguments: ctypes.Array[_KeysValues]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class NormWeight:
    """weight[columns] and epsilon of an RMS norm."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class ProjectionWeight:
    """A packed weight and its bias[outputs], if it has one."""

    packed: PackedWeight
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """A decoder layer, by numbers.

    Attributes:
        query_norm, key_norm: of each head, before it is rotated; None if there are none.
        heads, kv_heads, dim: of its attention; `dim` is that of keys and of values.
        scale: factor on the scores.
        group: which group of layers it belongs to, by reach.
    """

    input_norm: NormWeight
    query_norm: NormWeight | None
    key_norm: NormWeight | None
    post_norm: NormWeight
    query: ProjectionWeight
    key: ProjectionWeight
    value: ProjectionWeight
    output: ProjectionWeight
    gate: ProjectionWeight
    up: ProjectionWeight
    down: ProjectionWeight
    heads: int
    kv_heads: int
    dim: int
    scale: float
    group: int

    @property
    def hidden(self) -> int:
        """Width of the rows that go through the layer."""
        return self.query.packed.inner


class Landing(Protocol):
    """Where new tokens land where full blocks are sealed: int64 tensors, see `cache.landing`."""

    @property
    def earlier_slots(self) -> Tensor: ...
    @property
    def filled_blocks(self) -> Tensor: ...
    @property
    def filled_from(self) -> Tensor: ...
    @property
    def open_rows(self) -> Tensor: ...
    @property
    def open_slots(self) -> Tensor: ...


@dataclass(frozen=True)
class GroupStep:
    """What the layers of one group write and read in a pass.

    Attributes:
        writes: where the rows' keys and values go: int64[rows] slots, or a landing where full blocks are sealed.
        schedule: address of the attention schedule; see `attention.schedule`.
        turn: address of how queries are turned back; None if none is.
        observed: address of what attention masses are added to; None if nobody wants to know.
    """

    writes: Tensor | Landing
    schedule: int
    turn: int | None = None
    observed: int | None = None


@dataclass(frozen=True)
class EndWeights:
    """What is before the layers and behind them.

    Attributes:
        embeddings: [vocab, hidden]; None if they are the rows of the output layer.
        head: gives the logits.
    """

    embeddings: Tensor | None
    norm: NormWeight
    head: ProjectionWeight


class Scratch:
    """Buffers of a pass, for as many rows as there have been at most; all layers use the same ones."""

    def __init__(self, layers: Sequence[LayerWeights], dtype: torch.dtype) -> None:
        self._columns = {name: max(_columns(layer, name) for layer in layers) for name in BUFFERS}
        self._columns |= dict.fromkeys(FACTORS, max(layer.dim for layer in layers) // 2)
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.rows = 0

    @property
    def bytes_per_row(self) -> int:
        """Bytes of all buffers for one row."""
        return sum(columns * self._dtype_of(name).itemsize for name, columns in self._columns.items())

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take now."""
        return self.rows * self.bytes_per_row + self._memory.nbytes

    def reserve(self, rows: int) -> None:
        """Room for `rows` rows; what was in the buffers is lost where they must grow."""
        if rows > self.rows:
            self._tensors.clear()
            self._tensors = {
                name: torch.empty(rows, columns, dtype=self._dtype_of(name)) for name, columns in self._columns.items()
            }
            self.rows = rows

    def shrink(self, rows: int) -> None:
        """Give the buffers back if they have room for more than `rows` rows."""
        if self.rows > rows:
            self._tensors.clear()
            self._memory = torch.empty(0, dtype=torch.uint8)
            self.rows = 0

    def memory(self, wanted_bytes: int) -> int:
        """The address of that much memory for attention to work in."""
        if self._memory.numel() < wanted_bytes:
            self._memory = torch.empty(wanted_bytes, dtype=torch.uint8)
        return self._memory.data_ptr()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name in FACTORS else self._dtype


class NativeLayers:
    """Decoder layers of one library, and what is around them.

    Args:
        layers: of one dtype; their weights are kept alive.
        ends: if the layers are a whole model.
    """

    def __init__(
        self, library: Library, layers: Sequence[LayerWeights], dtype: torch.dtype, ends: EndWeights | None = None
    ) -> None:
        self._weights, self._ends_weights = tuple(layers), ends
        self._dtype = dtype
        self._arguments = (_Layer * len(layers))(*map(_layer_arguments, layers))
        self._ends = None if ends is None else _ends_arguments(ends, layers[0].dim)
        self._run = library.function(
            "kvloom_layers", c_void_p, c_void_p, c_int64, POINTER(_Step), POINTER(_Ends), restype=c_int32
        )
        self.scratch = Scratch(layers, dtype)
        self._products_a_row = max(
            sum(own.packed.outputs * own.packed.inner for own in (getattr(layer, name) for name in PROJECTIONS))
            for layer in layers
        )

    def keys_values(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        sealed: Sequence[Sequence[int]] = (),
        bounds: Sequence[Sequence[int]] = (),
    ) -> KeysValues:
        """A store's tensors as `run` wants them: keys and values [kv_heads, slots, dim] of each layer.

        Args:
            sealed: where full blocks are sealed, for each layer the fields of `struct Sealed` in `src/attention.h`, of
                keys and of values; then `keys` and `values` hold the open blocks.
            bounds: where full blocks keep the bounds of their keys, for each layer the fields of `struct Bounds` there.
        """
        for own_keys, own_values in zip(keys, values, strict=True):
            assert own_keys.stride() == own_values.stride() and own_keys.stride(2) == 1, "keys and values lie alike"
        facts = zip(sealed or [()] * len(keys), bounds or [()] * len(keys), strict=True)
        arguments = (_KeysValues * len(keys))(
            *(
                _KeysValues(
                    *(own_keys.data_ptr(), own_values.data_ptr(), own_keys.stride(0)),
                    *((c_int64 * 10)(*own_sealed), (c_int64 * 3)(*own_bounds)),
                )
                for own_keys, own_values, (own_sealed, own_bounds) in zip(keys, values, facts, strict=True)
            )
        )
        return KeysValues(arguments, (*keys, *values))

    def run(
        self,
        kept: KeysValues,
        factors: tuple[Tensor, Tensor],
        groups: Sequence[GroupStep],
        memory: int,
        *,
        rows: int,
        first: int,
        count: int,
    ) -> None:
        """Take the rows in `scratch["hidden"]` through `count` layers, in place.

        Args:
            factors: cosines and sines, float32[rows, dim / 2].
            memory: address of what attention works in, behind the native order where full blocks are sealed.
        """
        for name, own in zip(FACTORS, factors, strict=True):
            self.scratch[name][:rows] = own
        self._call(kept, self._step(groups, memory, rows), None, first, count)

    def run_model(
        self,
        kept: KeysValues,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        frequencies: Tensor,
        scaling: float,
        groups: Sequence[GroupStep],
        memory: int,
    ) -> Tensor:
        """From token ids to logits.

        Args:
            token_ids, positions: int64[rows]. logit_rows: int64[n].
            frequencies: float32[dim / 2]; cosines and sines of position * frequency are multiplied by `scaling`.

        Returns:
            logits [n, vocab].

        Raises:
            IndexError: a token id is beyond the vocabulary.
        """
        assert self._ends is not None and self._ends_weights is not None, "the layers are a whole model"
        assert all(own.is_contiguous() for own in (token_ids, positions, logit_rows, frequencies)), "read by address"
        step, ends = self._step(groups, memory, len(token_ids)), self._ends
        logits = torch.empty(len(logit_rows), self._ends_weights.head.packed.outputs, dtype=self._dtype)
        ends.token_ids, ends.positions = token_ids.data_ptr(), positions.data_ptr()
        ends.frequencies, ends.scaling = frequencies.data_ptr(), scaling
        ends.logit_rows, ends.logit_count, ends.logits = logit_rows.data_ptr(), len(logit_rows), logits.data_ptr()
        if self._call(kept, step, ends, 0, len(self._weights)):
            raise IndexError(f"token ids must be 0 to {ends.vocabulary - 1}; the largest is {int(token_ids.max())}.")
        return logits

    def _step(self, groups: Sequence[GroupStep], memory: int, rows: int) -> _Step:
        assert rows <= self.scratch.rows, "the scratch has room for the rows"
        return _Step(
            **{name: self.scratch[name].data_ptr() for name in (*BUFFERS, *FACTORS)},
            groups=(_Group * len(groups))(*map(_group_arguments, groups)),
            memory=memory,
            rows=rows,
            dtype=DTYPES[self._dtype],
            threads=torch.get_num_threads() if rows * self._products_a_row >= MIN_SHARED_PRODUCTS else 1,
        )

    def _call(self, kept: KeysValues, step: _Step, ends: _Ends | None, first: int, count: int) -> int:
        layers = ctypes.addressof(self._arguments) + first * ctypes.sizeof(_Layer)
        places = ctypes.addressof(kept.arguments) + first * ctypes.sizeof(_KeysValues)
        failed: int = self._run(layers, places, count, step, ends)
        return failed


def native_order_bytes(landing: Landing, dtype: torch.dtype, *, rows: int, kv_heads: int, dim: int) -> int:
    """How many bytes of its memory a layer takes for the tokens of the blocks that a step writes, in native order."""
    numbers = kv_heads * (len(landing.earlier_slots) + rows) * dim
    return 2 * -(-numbers * dtype.itemsize // 64) * 64


def _group_arguments(group: GroupStep) -> _Group:
    others = (group.schedule, group.turn, group.observed)
    if isinstance(writes := group.writes, Tensor):
        return _Group(writes.data_ptr(), _Landing(), *others)
    tensors = [getattr(writes, name) for name in LANDING]
    counts = [len(getattr(writes, name)) for name in LANDED]
    return _Group(None, _Landing(*(own.data_ptr() for own in tensors), *counts), *others)


def _ends_arguments(ends: EndWeights, dim: int) -> _Ends:
    embeddings = ends.embeddings
    return _Ends(
        embeddings=None if embeddings is None else embeddings.data_ptr(),
        norm=_norm_arguments(ends.norm),
        head=_weight_arguments(ends.head),
        vocabulary=ends.head.packed.outputs if embeddings is None else embeddings.shape[0],
        half=dim // 2,
    )


def _layer_arguments(layer: LayerWeights) -> _Layer:
    return _Layer(
        **{name: _norm_arguments(getattr(layer, name)) for name in NORMS},
        **{name: _weight_arguments(getattr(layer, name)) for name in PROJECTIONS},
        **{name: getattr(layer, name) for name in SIZES},
        scale=layer.scale,
    )


def _norm_arguments(norm: NormWeight | None) -> _Norm:
    return _Norm() if norm is None else _Norm(norm.weight.data_ptr(), norm.epsilon)


def _weight_arguments(weight: ProjectionWeight) -> _Weight:
    bias = None if weight.bias is None else weight.bias.data_ptr()
    return _Weight(weight.packed.data.data_ptr(), bias, weight.packed.outputs)


def _columns(layer: LayerWeights, buffer: str) -> int:
    if buffer in ("hidden", "normed"):
        return layer.hidden
    if buffer == "attended":
        return layer.heads * layer.dim
    weight: ProjectionWeight = getattr(layer, buffer)
    return weight.packed.outputs
