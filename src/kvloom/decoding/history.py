"""The tokens of live sequences, in a buffer that grows: a step adds a column, and copies nothing."""

from __future__ import annotations

import torch
from torch import Tensor


class History:
    """Sequences of equal length, int64[rows, length]."""

    def __init__(self, rows: Tensor) -> None:
        self._buffer = rows
        self._length = rows.shape[1]

    @property
    def rows(self) -> Tensor:
        """int64[rows, length]."""
        return self._buffer[:, : self._length]

    def followed_by(self, tokens: Tensor) -> Tensor:
        """int64[rows, length + 1], as if each row had got its token of int64[rows].

        Nothing changes: what lies behind the end of the buffer belongs to nobody until `advance`.
        """
        rows, room = self._buffer.shape
        if self._length == room:
            grown = self._buffer.new_empty((rows, 2 * room + 64))
            grown[:, :room] = self._buffer
            self._buffer = grown
        self._buffer[:, self._length] = tokens
        return self._buffer[:, : self._length + 1]

    def advance(self, tokens: Tensor, kept: Tensor | None) -> None:
        """Give each row its token; of the rows only those at `kept`, int64[n], stay, unless that is None."""
        self.followed_by(tokens)
        self._length += 1
        if kept is not None:
            self._buffer = torch.index_select(self._buffer, 0, kept)
