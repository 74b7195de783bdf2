"""How much memory a request will take, before anything is allocated: from a model's config alone, without weights.

Nothing here counts by itself. Layers come from the probe that also attaches models, blocks from the formula by
which admission reserves them, bytes from the cache's own layout, scratch from a rehearsed step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvloom.cache import CacheLayout, Codec, check_codec
from kvloom.cache.retention import Retention, TopBlocks
from kvloom.calls import check_length
from kvloom.engine import Engine
from kvloom.engine.engine import STEP_TOKENS
from kvloom.engine.footprint import product_bytes, resident_bytes, warm_up
from kvloom.engine.planner import default_budget_bytes, longest_kept, request_blocks, worst_case_blocks
from kvloom.engine.rehearsal import step_bytes
from kvloom.engine.retaining import check_policy
from kvloom.errors import CacheFull, InvalidRequest, UnknownOption, UnsupportedModel
from kvloom.loading import load_config, read_dtype
from kvloom.models import Binding, HostedModel, Source, check_codec_of
from kvloom.models.encoder import Encoder
from kvloom.models.packed import packable
from kvloom.models.packings import choose_packing
from kvloom.models.selfcheck import check_bytes
from kvloom.models.weightless import Weightless, build_weightless

DEFAULT_PROMPT_TOKENS = 4_096
DEFAULT_SOURCE_TOKENS = 512
DEFAULT_NEW_TOKENS = 256
CURVE_POINTS = 64

OPTIONS = (
    "prompt_tokens",
    "source_tokens",
    "max_new_tokens",
    "num_beams",
    "num_return_sequences",
    "batch",
    "dtype",
    "block_tokens",
    "budget_bytes",
    "retention",
    "codec",
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes of a model's weights.

    Attributes:
        plain_bytes: parameters, tied ones once, and buffers.
        packed_bytes: the copies of linear layers in the layout that the CPU reads fastest.
        given_up_bytes: the plain weights that `load` gives up for their packed copies.
        converted_bytes: of the checkpoint, if it is in another dtype than the weights are wanted in.
    """

    plain_bytes: int
    packed_bytes: int
    given_up_bytes: int
    converted_bytes: int = 0

    @property
    def load_bytes(self) -> int:
        """What is in memory after `load`: one copy, and a second one of what packed layers share with others."""
        return self.attach_bytes - self.given_up_bytes

    @property
    def attach_bytes(self) -> int:
        """What is in memory after `attach`: the owner's weights and the packed copies."""
        return self.plain_bytes + self.packed_bytes


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
    _blocks_at: Callable[[int, bool], tuple[int, ...]] = field(repr=False, compare=False)

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
        blocks = self._blocks_at(prompt_tokens, apart)
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
        computed = ("cache_bytes", "apart_bytes", "allocated_bytes", "needed_budget_bytes", "fits")
        plain = (
            "max_tokens",
            "prompt_tokens",
            "source_tokens",
            "max_new_tokens",
            "num_beams",
            "num_return_sequences",
            "batch",
            "rows",
        )
        budget = ("budget_bytes", "budget_is_default", "pool_blocks", "pool_open_blocks", "requests_at_once")
        lengths = ("longest_sequence", "longest_prompt")
        process = ("scratch_bytes", "check_bytes", "products_bytes", "baseline_bytes")
        peaks = ("load_peak_bytes", "attach_peak_bytes")
        return {
            "model": self.model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "codec": self.codec,
            **{name: getattr(self, name) for name in plain},
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
            **{name: getattr(self, name) for name in (*computed, *budget, *lengths, *process, *peaks)},
            "curve": [
                {"prompt_tokens": tokens, "shared_bytes": shared, "apart_bytes": apart}
                for tokens, shared, apart in self.curve
            ],
        }


def plan(
    model: str | os.PathLike[str] | None = None, *, dtype: torch.dtype | str | None = None, **options: Any
) -> MemoryPlan:
    """Plan a batch of requests on a model that is not loaded: its `config.json` is enough.

    Args:
        model: a folder or a hub id; by default the bundled demonstration model.
        dtype: of weights and cache; by default the checkpoint's.
        options: see `LanguageModel.plan`.

    Raises:
        InvalidRequest: counts, lengths or options that make no sense.
        CacheFull: the budget is below one block.
        ModelError: the model cannot be found, or not be decoded on the cache.

    Example::

        plan = kvloom.plan("Qwen/Qwen2.5-0.5B-Instruct", prompt_tokens=2048, num_beams=8)
        print(plan.cache_bytes, plan.apart_bytes)
    """
    request = _Request.checked(options)
    config, own_dtype = load_config(model)
    asked = read_dtype(dtype)
    if (quantized := getattr(config, "quantization_config", None)) and not isinstance(asked, torch.dtype):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise UnsupportedModel(
            f"the checkpoint is quantized ({method or 'by a method that it does not name'}), so its config does not "
            "say what its weights take. Pass `dtype` to plan it with plain weights, such as `dtype=bfloat16`."
        )
    weightless = build_weightless(config, asked if isinstance(asked, torch.dtype) else own_dtype)
    weights = count_weights(weightless.binding.model, checkpoint_dtype=own_dtype)
    name = "demonstration model" if model is None else os.fspath(model)
    warm_up(weightless.binding.dtype, choose_packing())
    return _plan(request, weightless.binding, weightless, weights, name=name, baseline=resident_bytes())


def plan_for(engine: Engine, options: dict[str, Any]) -> MemoryPlan:
    """Plan a batch of requests on a model that is loaded; see `LanguageModel.plan`."""
    binding = engine.binding
    if not isinstance(binding, HostedModel) or engine.cache is None:
        raise InvalidRequest("this model keeps no cache: each step computes whole sequences, so there is none to plan.")
    if options.get("dtype") is not None:
        raise InvalidRequest(f"the model is loaded in {binding.dtype}; kvloom.plan() plans it in another dtype.")
    request = _Request.checked(
        {"block_tokens": engine.cache.layout.block_tokens, "codec": engine.cache.layout.codec}
        | {name: value for name, value in options.items() if name != "dtype"}
    )
    weightless = build_weightless(binding.model.config, binding.dtype)
    resident = resident_bytes()
    return _plan(
        request,
        binding,
        weightless,
        count_weights(weightless.binding.model),
        name=Path(str(getattr(binding.model.config, "_name_or_path", "") or binding.model.config.model_type)).name,
        baseline=None if resident is None else max(resident - _held_bytes(binding), 0),
        budget_bytes=engine.cache.store.allocated_bytes,
        step_tokens=engine.step_tokens,
    )


def count_weights(model: PreTrainedModel, *, checkpoint_dtype: torch.dtype | None = None) -> Weights:
    """Bytes of a model's weights, and of what `load` and `attach` make of them."""
    packing = choose_packing()
    weights = packable(model, packing)
    tensors = [*model.parameters(), *model.buffers()]
    checkpoint = model.dtype if checkpoint_dtype is None else checkpoint_dtype
    elements = sum(parameter.numel() for parameter in model.parameters())
    return Weights(
        plain_bytes=sum(tensor.nbytes for tensor in tensors),
        packed_bytes=sum(packing.packed_bytes(own.parameter) for own in weights) if packing else 0,
        given_up_bytes=sum(own.parameter.nbytes for own in weights if packing and own.can_be_given_up(packing)),
        converted_bytes=0 if checkpoint == model.dtype else elements * checkpoint.itemsize,
    )


def _held_bytes(binding: HostedModel) -> int:
    """Bytes of the weights that a loaded model holds in memory."""
    tensors = [*binding.model.parameters(), *binding.model.buffers()]
    plain: int = sum(tensor.nbytes for tensor in tensors if tensor.device.type != "meta")
    return plain + (0 if binding.packed is None else binding.packed.packed_bytes)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The options of a plan, checked; lengths that were left out are chosen when the model's context is known."""

    prompt_tokens: int | None
    source_tokens: int | None
    max_new_tokens: int | None
    num_beams: int
    num_return_sequences: int
    batch: int
    block_tokens: int
    budget_bytes: int | None
    retention: Retention | None
    codec: Codec

    @classmethod
    def checked(cls, options: dict[str, Any]) -> _Request:
        given = {name: value for name, value in options.items() if value is not None}
        for name in given:
            if name not in OPTIONS:
                raise UnknownOption.named(name, OPTIONS)
        check_policy(retention := given.pop("retention", None))
        codec = check_codec(given.pop("codec", "native"))
        for name, value in given.items():
            least = 0 if name in ("prompt_tokens", "max_new_tokens") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequest(f"`{name}` must be a whole number of at least {least}; got {value!r}.")
        beams, returned = given.get("num_beams", 1), given.get("num_return_sequences", 1)
        if 1 < beams < returned:
            raise InvalidRequest(f"`num_return_sequences={returned}` exceeds `num_beams={beams}`. Raise `num_beams`.")
        return cls(
            prompt_tokens=given.get("prompt_tokens"),
            source_tokens=given.get("source_tokens"),
            max_new_tokens=given.get("max_new_tokens"),
            num_beams=beams,
            num_return_sequences=returned,
            batch=given.get("batch", 1),
            block_tokens=given.get("block_tokens", 16),
            budget_bytes=given.get("budget_bytes"),
            retention=retention,
            codec=codec,
        )

    def lengths(self, limit: int | None, encoder: Encoder | None) -> tuple[int, int]:
        """Prompt and new tokens, within the model's context. A decoder's prompt is its start token."""
        if encoder is not None and self.prompt_tokens is None:
            return replace(self, prompt_tokens=1).lengths(limit, encoder)
        new = self.max_new_tokens
        if new is None:
            # Half of a short context, or what the prompt leaves of it.
            taken = self.prompt_tokens if self.prompt_tokens is not None else (limit or 0) // 2
            new = DEFAULT_NEW_TOKENS if limit is None else max(0, min(DEFAULT_NEW_TOKENS, limit - taken))
        prompt = self.prompt_tokens
        if prompt is None:
            prompt = DEFAULT_PROMPT_TOKENS if limit is None else max(0, min(DEFAULT_PROMPT_TOKENS, limit - new))
        check_length(limit, prompt, new)
        if prompt + new == 0:
            raise InvalidRequest("`prompt_tokens` and `max_new_tokens` are both 0, so there is nothing to plan.")
        return prompt, new


def _source(request: _Request, encoder: Encoder | None) -> Source | None:
    """A source as long as was asked for; features are as long as they must be."""
    if encoder is None:
        if request.source_tokens is not None:
            raise InvalidRequest("`source_tokens` is for encoder-decoder models; this model has no encoder.")
        return None
    longest = encoder.max_tokens
    tokens = request.source_tokens
    if tokens is None:
        tokens = DEFAULT_SOURCE_TOKENS if longest is None else min(DEFAULT_SOURCE_TOKENS, longest)
    if encoder.reads_features and request.source_tokens not in (None, longest):
        raise InvalidRequest(f"this model's sources are always {longest:,} positions long.")
    return encoder.random_source(torch.Generator().manual_seed(0), tokens=tokens)


def _plan(
    request: _Request,
    binding: Binding,
    weightless: Weightless,
    weights: Weights,
    *,
    name: str,
    baseline: int | None,
    budget_bytes: int | None = None,
    step_tokens: int = STEP_TOKENS,
) -> MemoryPlan:
    policy = request.retention
    check_codec_of(binding, request.codec)
    layout = CacheLayout(
        layers=binding.layers,
        dtype=binding.dtype,
        block_tokens=request.block_tokens,
        block_bounds=isinstance(policy, TopBlocks),
        codec=request.codec,
    )
    limit = None if policy is not None and policy.reindexes else binding.max_tokens
    source = _source(request, binding.encoder)
    source_tokens = 0 if source is None else source.tokens
    prompt, new = request.lengths(limit, binding.encoder)
    if policy is not None:
        policy.check(prompt_tokens=prompt, block_tokens=layout.block_tokens)
    rows = max(request.num_beams, request.num_return_sequences)

    def blocks_at(tokens: int, apart: bool) -> tuple[int, ...]:
        """Blocks of the whole batch."""
        own = request_blocks(
            binding,
            layout,
            prompt_tokens=tokens,
            new_tokens=new,
            rows=1 if apart else rows,
            step_tokens=step_tokens,
            source_tokens=source_tokens,
            retention=policy,
        )
        return tuple(request.batch * (rows if apart else 1) * blocks for blocks in own)

    budget = request.budget_bytes or budget_bytes
    if budget is None:
        budget = default_budget_bytes(
            layout, max_tokens=longest_kept(binding), device=binding.device, taken_bytes=weights.load_bytes
        )
    pool = _pool_blocks(layout, budget)
    need, apart = blocks_at(prompt, False), blocks_at(prompt, True)
    open_blocks = request.batch * rows
    at_once = [pool * request.batch // blocks for blocks in need]
    if layout.seals:
        at_once.append(layout.open_blocks(pool) // rows)
    return MemoryPlan(
        model=name,
        dtype=binding.dtype,
        max_tokens=binding.max_tokens,
        prompt_tokens=prompt,
        max_new_tokens=new,
        num_beams=request.num_beams,
        num_return_sequences=request.num_return_sequences,
        batch=request.batch,
        source_tokens=source_tokens,
        rows=rows,
        retention=policy,
        layout=layout,
        groups=tuple(
            GroupPlan(
                reach=str(group.reach),
                layers=len(group.layers),
                bytes_per_block=layout.bytes_per_block(group),
                blocks=blocks,
                apart_blocks=apart_blocks,
                bytes_per_open_block=layout.bytes_per_open_block(group),
                open_blocks=open_blocks if layout.seals else 0,
            )
            for group, blocks, apart_blocks in zip(layout.groups, need, apart, strict=True)
        ),
        weights=weights,
        budget_bytes=budget,
        budget_is_default=request.budget_bytes is None,
        pool_blocks=pool,
        pool_open_blocks=layout.open_blocks(pool) if layout.seals else 0,
        requests_at_once=min(request.batch, *at_once),
        longest_sequence=_longest_sequence(layout, pool, step_tokens, policy),
        longest_prompt=_longest_prompt(layout, pool, limit, new, lambda tokens: blocks_at(tokens, False)),
        scratch_bytes=step_bytes(
            weightless,
            layout,
            prompt_tokens=prompt,
            new_tokens=new,
            rows=rows,
            batch=request.batch,
            step_tokens=step_tokens,
            source=source,
        ),
        check_bytes=check_bytes(weightless.binding),
        products_bytes=product_bytes(weightless.binding.model, choose_packing()),
        baseline_bytes=baseline,
        _blocks_at=blocks_at,
    )


def _pool_blocks(layout: CacheLayout, budget_bytes: int) -> int:
    blocks = layout.blocks_in(budget_bytes)
    if blocks < 1:
        raise CacheFull(
            f"budget_bytes={budget_bytes:,} is below one block: a block of {layout.block_tokens} tokens "
            f"takes {layout.total_bytes(1):,} bytes. Raise budget_bytes."
        )
    return blocks


def _longest_sequence(layout: CacheLayout, pool: int, step_tokens: int, retention: Retention | None) -> int | None:
    """The longest single sequence that a pool holds; None if every layer forgets, and what it keeps fits."""

    def fits(tokens: int) -> bool:
        need = worst_case_blocks(
            layout, prompt_tokens=tokens, new_tokens=0, rows=1, step_tokens=step_tokens, retention=retention
        )
        return max(need) <= pool

    # A group that forgets nothing fills the pool at this length.
    most = pool * layout.block_tokens
    return None if fits(most + 1) else _largest(fits, most)


def _longest_prompt(
    layout: CacheLayout, pool: int, limit: int | None, new_tokens: int, blocks_at: Callable[[int], tuple[int, ...]]
) -> int | None:
    """The longest prompt of such a batch that a pool holds; None if none does."""
    most = pool * layout.block_tokens if limit is None else limit - new_tokens
    return _largest(lambda tokens: max(blocks_at(tokens)) <= pool, most, least=1)


def _largest(holds: Callable[[int], bool], most: int, *, least: int = 0) -> int | None:
    """The largest number from `least` to `most` for which `holds`, which it does up to some number; None if none."""
    if most < least or not holds(least):
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least
