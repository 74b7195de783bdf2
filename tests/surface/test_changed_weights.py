"""Weights that are written in place while contexts are held or texts being written: no old keys meet new weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import kvloom
import tiny

OPTIONS = {"do_sample": False, "eos_token_id": None}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.tiny_model("llama", num_hidden_layers=2)


def change(model: PreTrainedModel) -> None:
    """Enough to change what is written."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name or "v_proj" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def afresh(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], list[float]]:
    """What the model, as it is now, writes on a cold cache."""
    result = kvloom.attach(model).generate(prompt, max_new_tokens=8, **OPTIONS)
    return result.token_ids, result.logprobs


def test_a_context_from_before_is_computed_anew(model: PreTrainedModel) -> None:
    lm = kvloom.attach(model)
    prompt = tiny.random_ids(model, tokens=40)
    context = lm.prefill(prompt)
    before = lm.generate([7], context=context, max_new_tokens=8, **OPTIONS)
    change(model)
    after = lm.generate([7], context=context, max_new_tokens=8, **OPTIONS)
    assert (after.token_ids, after.logprobs) == afresh(model, [*prompt, 7])
    assert after.logprobs != before.logprobs and after.usage.cached_prompt_tokens == 0
    # Nor does the prefix index know what the context holds by the new weights' name.
    again = lm.generate([*prompt, 7], max_new_tokens=8, **OPTIONS)
    assert (again.token_ids, again.logprobs) == (after.token_ids, after.logprobs)
    assert again.usage.cached_prompt_tokens > 0


def test_a_text_that_was_being_written_leaves_nothing_to_later_requests(model: PreTrainedModel) -> None:
    lm = kvloom.attach(model)
    prompt = tiny.random_ids(model, tokens=5)
    with lm.stream(prompt, max_new_tokens=40, **OPTIONS) as pieces:
        written = [next(pieces).token_id for _ in range(4)]
        change(model)
        written += [piece.token_id for piece in pieces]
    later = lm.generate(prompt + written, max_new_tokens=8, **OPTIONS)
    assert later.usage.cached_prompt_tokens == 0
    assert (later.token_ids, later.logprobs) == afresh(model, prompt + written)


def test_a_context_from_before_is_saved_as_the_model_is_now(model: PreTrainedModel, tmp_path: Path) -> None:
    lm = kvloom.attach(model)
    prompt = tiny.random_ids(model, tokens=20)
    context = lm.prefill(prompt)
    change(model)
    context.save(tmp_path / "context.kv")
    own = kvloom.attach(model)
    result = own.generate([7], context=own.restore(tmp_path / "context.kv"), max_new_tokens=8, **OPTIONS)
    assert (result.token_ids, result.logprobs) == afresh(model, [*prompt, 7])


def test_a_context_that_must_be_computed_anew_is_counted_as_a_whole(model: PreTrainedModel) -> None:
    tokens = 64
    lm = kvloom.attach(
        model, budget_bytes=kvloom.attach(model).plan(prompt_tokens=tokens + 16, max_new_tokens=4).needed_budget_bytes
    )
    context = lm.prefill(tiny.random_ids(model, tokens=tokens))
    lm.generate([7], context=context, max_new_tokens=4, **OPTIONS)
    change(model)
    with pytest.raises(kvloom.errors.CacheFull, match="held by contexts"):
        lm.generate([7], context=context, max_new_tokens=4, **OPTIONS)
