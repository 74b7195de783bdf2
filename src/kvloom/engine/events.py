"""What the engine tells. Progress bars, metrics and inspectors listen; the engine knows none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepDone:
    """One step was applied.

    Attributes:
        prompt_tokens: prompt tokens that the step computed.
        decoded_rows: rows that got a new token.
        pending_prompt_tokens: prompt tokens of live requests that are still to be computed.
        blocks_in_use: blocks held by anyone, idle cached ones included, in the fullest layer group.
    """

    prompt_tokens: int
    decoded_rows: int
    pending_prompt_tokens: int
    blocks_in_use: int


@dataclass(frozen=True)
class RequestFinished:
    """A request is done, was aborted, or failed."""

    request_id: int
    failed: bool


Event = StepDone | RequestFinished
"""Everything that a listener may be handed."""
