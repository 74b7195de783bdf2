"""Plans are made: of a model that is not loaded, or of one that is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from kvloom.cache import CacheLayout
from kvloom.cache.retention import TopBlocks
from kvloom.engine import Engine
from kvloom.engine.planner import default_budget_bytes, longest_kept
from kvloom.engine.scheduler import STEP_TOKENS
from kvloom.errors import InvalidRequest, UnsupportedModel
from kvloom.loading import load_config, read_dtype
from kvloom.models import Binding, HostedModel, check_codec_of
from kvloom.models.hosted.weightless import Weightless, build_weightless
from kvloom.models.packing.packings import choose_packing
from kvloom.models.proofs.selfcheck import check_bytes
from kvloom.planning.batch import Batch
from kvloom.planning.counts import BatchBlocks
from kvloom.planning.footprint import product_bytes, resident_bytes, warm_up
from kvloom.planning.rehearsal import step_bytes
from kvloom.planning.report import GroupPlan, MemoryPlan
from kvloom.planning.weights import Weights, count_weights, held_bytes


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
    batch = Batch.checked(options)
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
    return _plan(batch, weightless.binding, weightless, weights, name=name, baseline=resident_bytes())


def plan_for(engine: Engine, options: dict[str, Any]) -> MemoryPlan:
    """Plan a batch of requests on a model that is loaded; see `LanguageModel.plan`."""
    binding = engine.binding
    if not isinstance(binding, HostedModel) or engine.cache is None:
        raise InvalidRequest("this model keeps no cache: each step computes whole sequences, so there is none to plan.")
    if options.get("dtype") is not None:
        raise InvalidRequest(
            f"the model is loaded in {binding.dtype}; to plan it in another dtype, call kvloom.plan()."
        )
    batch = Batch.checked(
        {"block_tokens": engine.cache.layout.block_tokens, "codec": engine.cache.layout.codec}
        | {name: value for name, value in options.items() if name != "dtype"}
    )
    weightless = build_weightless(binding.model.config, binding.dtype)
    resident = resident_bytes()
    return _plan(
        batch,
        binding,
        weightless,
        count_weights(weightless.binding.model),
        name=Path(str(getattr(binding.model.config, "_name_or_path", "") or binding.model.config.model_type)).name,
        baseline=None if resident is None else max(resident - held_bytes(binding), 0),
        budget_bytes=engine.cache.store.allocated_bytes,
        step_tokens=engine.step_tokens,
    )


def _plan(
    batch: Batch,
    binding: Binding,
    weightless: Weightless,
    weights: Weights,
    *,
    name: str,
    baseline: int | None,
    budget_bytes: int | None = None,
    step_tokens: int = STEP_TOKENS,
) -> MemoryPlan:
    policy, rows = batch.retention, batch.rows
    layout = _layout(batch, binding)
    limit = None if policy is not None and policy.reindexes else binding.max_tokens
    source = batch.source(binding.encoder)
    prompt, new = batch.lengths(limit, binding.encoder)
    if policy is not None:
        policy.check(prompt_tokens=prompt, block_tokens=layout.block_tokens)
    blocks = BatchBlocks(
        binding=binding,
        layout=layout,
        prompts=batch.prompts,
        rows=rows,
        new_tokens=new,
        source_tokens=0 if source is None else source.tokens,
        step_tokens=step_tokens,
        retention=policy,
    )
    budget = batch.budget_bytes or budget_bytes or _default_budget(layout, binding, weights)
    pool = layout.pool_blocks(budget)
    return MemoryPlan(
        model=name,
        dtype=binding.dtype,
        max_tokens=binding.max_tokens,
        prompt_tokens=prompt,
        max_new_tokens=new,
        num_beams=batch.num_beams,
        num_return_sequences=batch.num_return_sequences,
        batch=batch.prompts,
        source_tokens=blocks.source_tokens,
        rows=rows,
        retention=policy,
        layout=layout,
        groups=_groups(blocks, prompt),
        weights=weights,
        budget_bytes=budget,
        budget_is_default=batch.budget_bytes is None,
        pool_blocks=pool,
        pool_open_blocks=layout.open_blocks(pool) if layout.seals else 0,
        requests_at_once=blocks.prompts_at_once(pool, prompt),
        longest_sequence=blocks.longest_sequence(pool),
        longest_prompt=blocks.longest_prompt(pool, limit),
        scratch_bytes=step_bytes(
            weightless,
            layout,
            prompt_tokens=prompt,
            new_tokens=new,
            rows=rows,
            batch=batch.prompts,
            step_tokens=step_tokens,
            source=source,
            retention=policy,
        ),
        check_bytes=check_bytes(weightless.binding),
        products_bytes=product_bytes(weightless.binding.model, choose_packing()),
        baseline_bytes=baseline,
        _blocks=blocks,
    )


def _layout(batch: Batch, binding: Binding) -> CacheLayout:
    check_codec_of(binding, batch.codec)
    return CacheLayout(
        layers=binding.layers,
        dtype=binding.dtype,
        block_tokens=batch.block_tokens,
        block_bounds=isinstance(batch.retention, TopBlocks),
        codec=batch.codec,
    )


def _default_budget(layout: CacheLayout, binding: Binding, weights: Weights) -> int:
    return default_budget_bytes(
        layout, max_tokens=longest_kept(binding), device=binding.device, taken_bytes=weights.load_bytes
    )


def _groups(blocks: BatchBlocks, prompt_tokens: int) -> tuple[GroupPlan, ...]:
    layout = blocks.layout
    return tuple(
        GroupPlan(
            reach=str(group.reach),
            layers=len(group.layers),
            bytes_per_block=layout.bytes_per_block(group),
            blocks=shared,
            apart_blocks=apart,
            bytes_per_open_block=layout.bytes_per_open_block(group),
            open_blocks=blocks.prompts * blocks.rows if layout.seals else 0,
        )
        for group, shared, apart in zip(
            layout.groups, blocks.at(prompt_tokens), blocks.at(prompt_tokens, apart=True), strict=True
        )
    )
