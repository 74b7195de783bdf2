"""The rows after a decision: no key or value moves, and a long sequence is not copied to grow by a token."""

from __future__ import annotations

from kvloom.decoding import HostStep
from kvloom.engine.request import Request, Row
from kvloom.engine.rows import CachedRows


def children(request: Request, host: HostStep, cached: CachedRows | None) -> list[Row]:
    """One row for each chosen token. A row's first child takes over what it has, the others fork it.

    Rows without a child let go of their tables; children that need none (finished beams) leave them to the others.

    Args:
        cached: None for rows that have no tables.
    """
    needs_tables = [cached is not None and (request.keep_tables or not end) for end in host.finished]
    heirs: dict[int, int] = {}
    for child, parent in enumerate(host.parents):
        if needs_tables[child]:
            heirs.setdefault(parent, child)
    rows = []
    for child, parent in enumerate(host.parents):
        row = request.rows[parent]
        tables = None
        if cached is not None and needs_tables[child]:
            tables = row.cached if heirs[parent] == child else cached.fork_tables(row)
        first = host.parents.index(parent) == child
        token_ids = row.token_ids if first else list(row.token_ids)
        look = None if row.look is None else row.look.after(len(row.token_ids) + 1)
        rows.append(Row(token_ids, tables, row.regime, source=row.source, media=row.media, look=look))
    for row, token in zip(rows, host.tokens, strict=True):
        row.token_ids.append(token)
    for parent, row in enumerate(request.rows):
        if cached is not None and parent not in heirs:
            cached.close(row)
    return rows
