"""Looking inside: what the steps of a row have shown, kept until its next token is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.attention import Plan, View, Wanted
from kvloom.cache.retention import Retention
from kvloom.errors import InvalidRequest
from kvloom.models import Binding


class Look:
    """What is to be seen of one row, and what was seen.

    Args:
        wanted: what is to be seen.
        first: position of the first token whose rows are kept.
    """

    def __init__(self, wanted: Wanted, first: int) -> None:
        self.wanted = wanted
        self.first = first
        self._seen: View | None = None

    def add(self, view: View) -> None:
        """Add what a step has shown of the row's next tokens."""
        self._seen = view if self._seen is None else self._seen.followed_by(view)

    def view(self, tokens: int) -> View:
        """What was shown of a row of that many tokens, all of them run."""
        assert self._seen is not None, "rows are looked at once they have run"
        # What was computed anew, or is a context's, stands before the rows that are kept.
        return self._seen.last(tokens - self.first)

    def after(self, tokens: int) -> Look:
        """That of a row which goes on, with a token more: it is `tokens` long then."""
        return Look(self.wanted, 0 if self.wanted.every_row else tokens - 1)


def check_look(wanted: Wanted | None, binding: Binding, retention: Retention | None) -> None:
    """Refuse what cannot be shown; raises `InvalidRequest`."""
    if wanted is None:
        return
    if wanted.attentions and retention is not None:
        raise InvalidRequest(
            f"`output_attentions` cannot be shown under {type(retention).__name__}: what it hides or lets go of has no "
            "weight that could be shown. Pass `retention=None`."
        )
    binding.check_shows(wanted)


def note_views(plan: Plan, looks: Sequence[Look | None]) -> None:
    """Take what a step has shown of its rows, in the order of the plan."""
    for index, look in enumerate(looks):
        if look is not None:
            assert plan.views is not None, "a step with looks shows what they want"
            look.add(plan.views.view(index))
