"""What a batch takes, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from kvloom.cache import CacheLayout
from kvloom.cache.retention import Retention
from kvloom.planning.batch import DEFAULT_PROMPT_TOKENS
from kvloom.planning.counts import BatchBlocks
from kvloom.planning.weights import Weights
from kvloom.units import dtype_name

CURVE_POINTS = 64

# What stands in a plan's JSON under its own name: what was planned for, and what was found.
ASKED = (
    "max_tokens",
    "prompt_tokens",
    "source_tokens",
    "max_new_tokens",
    "num_beams",
    "num_return_sequences",
    "batch",
    "rows",
)
FOUND = (
    "cache_bytes",
    "apart_bytes",
    "allocated_bytes",
    "needed_budget_bytes",
    "fits",
    "budget_bytes",
    "budget_is_default",
    "pool_blocks",
    "pool_open_blocks",
    "requests_at_once",
    "longest_sequence",
    "longest_prompt",
    "scratch_bytes",
    "check_bytes",
    "products_bytes",
    "baseline_bytes",
    "load_peak_bytes",
    "attach_peak_bytes",
)


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What the layers of one reach keep for the whole batch.

    Attributes:
        reach: how far back they see, in words.
        layers: how many they are.
        bytes_per_block: of one block, over all these layers.
        blocks: the most that the batch holds at once. apart_blocks: the same if each sequence had a cache of its own.
        bytes_per_open_block: what a block takes besides while it is open, where full ones are sealed; else 0.
        open_blocks: the most blocks that are open at once; shared or apart, a sequence ends in one of its own.
    """

    reach: str
    layers: int
    bytes_per_block: int
    blocks: int
    apart_blocks: int
    bytes_per_open_block: int
    open_blocks: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a batch of requests takes. All sizes are bytes, all lengths tokens. Made by `plan` and `LanguageModel.plan`.

    Attributes:
        model, dtype, codec: what was planned for.
        max_tokens: the model's context; None if it states none.
        prompt_tokens, max_new_tokens, num_beams, num_return_sequences, batch: of the request; `batch` prompts.
        source_tokens: length of each source, of an encoder-decoder model, whose prompts are its decoder's; else 0.
        rows: sequences that each prompt fans out to.
        retention: the policy that the sequences are under; None without one.
        layout: what each layer keeps, and the block size.
        groups: blocks, for each layer group.
        weights: see `Weights`.
        budget_bytes: as asked for; else what the model has, or what `load` would choose on this machine.
        budget_is_default: whether it was not asked for.
        pool_blocks: blocks that the budget gives each layer group.
        pool_open_blocks: how many of them can be open at once.
        requests_at_once: how many of the batch's prompts fit the budget together; the others wait for them.
        longest_sequence: the longest single sequence that the budget holds; None if windows bound every layer.
        longest_prompt: the longest prompt with which the whole batch fits at once, within the model's context; None if
            none does.
        scratch_bytes: estimate, of the tensors of the largest step and its decision.
        check_bytes: estimate, of the proof that `load` and `attach` make before anything runs.
        products_bytes: estimate, of what the linear algebra library keeps for itself after attaching, and in the end.
        baseline_bytes: measured, what this process holds without the model: Python, PyTorch, transformers. None where
            it cannot be measured.
    """

    model: str
    dtype: torch.dtype
    max_tokens: int | None
    prompt_tokens: int
    max_new_tokens: int
    num_beams: int
    num_return_sequences: int
    batch: int
    rows: int
    retention: Retention | None
    layout: CacheLayout = field(repr=False)
    groups: tuple[GroupPlan, ...]
    weights: Weights
    budget_bytes: int
    budget_is_default: bool
    pool_blocks: int
    pool_open_blocks: int
    requests_at_once: int
    longest_sequence: int | None
    longest_prompt: int | None
    scratch_bytes: int
    check_bytes: int
    products_bytes: tuple[int, int]
    baseline_bytes: int | None
    source_tokens: int = 0
    _blocks: BatchBlocks = field(repr=False, compare=False)

    @property
    def cache_bytes(self) -> int:
        """The most that the batch's keys and values take; `usage.peak_bytes` of its requests add up to no more."""
        return self.bytes_at(self.prompt_tokens)

    @property
    def apart_bytes(self) -> int:
        """The same in a paged cache in which every sequence stores its own prompt."""
        return self.bytes_at(self.prompt_tokens, apart=True)

    @property
    def allocated_bytes(self) -> int:
        """What the cache's tensors take, exactly: the budget, rounded down to whole blocks.

        On a CPU the operating system hands out their pages as they are first written.
        """
        return self.layout.total_bytes(self.pool_blocks)

    @property
    def needed_budget_bytes(self) -> int:
        """The smallest budget in which the whole batch runs at once: every layer group gets as many blocks."""
        blocks, open_blocks = (max(getattr(own, name) for own in self.groups) for name in ("blocks", "open_blocks"))
        return self.layout.budget_for(blocks, open_blocks=open_blocks)

    @property
    def codec(self) -> str:
        """How full blocks are kept."""
        return self.layout.codec

    @property
    def fits(self) -> bool:
        """Whether at least one prompt of the batch fits the budget."""
        return self.requests_at_once > 0

    @property
    def load_peak_bytes(self) -> int | None:
        """Predicted peak of a process that calls `load` and then runs the batch."""
        return None if self.baseline_bytes is None else self.baseline_bytes + max(self.moments(attach=False).values())

    @property
    def attach_peak_bytes(self) -> int | None:
        """Predicted peak of a process that calls `attach` on a model it holds, and then runs the batch."""
        return None if self.baseline_bytes is None else self.baseline_bytes + max(self.moments(attach=True).values())

    def moments(self, *, attach: bool) -> dict[str, int]:
        """What the model takes besides the baseline in each phase of a process; the largest is its peak."""
        weights = self.weights
        products_of_the_proof, products = self.products_bytes
        held = min(self.cache_bytes, self.allocated_bytes)
        return {
            # Weights that are converted are read beside their file, which stays mapped meanwhile.
            "reading": weights.plain_bytes + (0 if attach else weights.converted_bytes),
            # The proof comes before packing, on the plain weights.
            "proving": weights.plain_bytes + self.check_bytes + products_of_the_proof,
            "running": (weights.attach_bytes if attach else weights.load_bytes) + held + self.scratch_bytes + products,
        }

    def bytes_at(self, prompt_tokens: int, *, apart: bool = False) -> int:
        """Cache bytes of the same batch with prompts of another length; `apart` as in `apart_bytes`."""
        blocks = self._blocks.at(prompt_tokens, apart=apart)
        return sum(
            own * group.bytes_per_block + group.open_blocks * group.bytes_per_open_block
            for own, group in zip(blocks, self.groups, strict=True)
        )

    @cached_property
    def curve(self) -> tuple[tuple[int, int, int], ...]:
        """Cache bytes against length: (prompt tokens, shared, apart), up to twice the prompt or the model's context."""
        longest = 2 * self.prompt_tokens or DEFAULT_PROMPT_TOKENS
        if self.max_tokens is not None:
            # A policy may take new tokens, but not prompts as they are drawn here, past the context.
            longest = min(longest, max(self.prompt_tokens, self.max_tokens - self.max_new_tokens))
        # Whole blocks, so that rounding to them does not show as steps.
        block = self.layout.block_tokens
        step = max(1, -(-longest // (CURVE_POINTS * block))) * block
        points = sorted({*range(0, longest, step), self.prompt_tokens, longest})
        return tuple((tokens, self.bytes_at(tokens), self.bytes_at(tokens, apart=True)) for tokens in points)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: sizes in bytes, lengths in tokens."""
        return {
            "model": self.model,
            "dtype": dtype_name(self.dtype),
            "codec": self.codec,
            **{name: getattr(self, name) for name in ASKED},
            "retention": None if self.retention is None else repr(self.retention),
            "block_tokens": self.layout.block_tokens,
            "bytes_per_token": self.layout.bytes_per_token,
            "layers": [
                {"kv_heads": own.kv_heads, "key_dim": own.key_dim, "value_dim": own.value_dim, "reach": str(own.reach)}
                for own in self.layout.layers
            ],
            "groups": [asdict(group) for group in self.groups],
            "weights": asdict(self.weights)
            | {"load_bytes": self.weights.load_bytes, "attach_bytes": self.weights.attach_bytes},
            **{name: getattr(self, name) for name in FOUND},
            "curve": [
                {"prompt_tokens": tokens, "shared_bytes": shared, "apart_bytes": apart}
                for tokens, shared, apart in self.curve
            ],
        }
