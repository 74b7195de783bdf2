"""RoBERTa counts positions from its PAD id on, and gives PAD none: cached as by its own uncached forward.

`transformers.generate` (5.23) is no reference here: it hands the model positions 0, 1, 2, ..., which its own forward
never uses, so that even with `use_cache=False` it chooses other tokens than the model does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, RobertaConfig, RobertaForCausalLM

import kvloom
from kvloom.errors import PromptTooLong
from kvloom.models.positions import Counting, counting_of
from tiny import _draw_weights, tiny_model

PAD = 3
POSITIONS = 64
PROMPT = [11, 45, PAD, 78, 23, PAD, PAD, 9, 61, 30, 12, 84]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@cache
def roberta() -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        is_decoder=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RobertaForCausalLM._from_config(config, attn_implementation="eager")
        _draw_weights(model)
    return model.eval().requires_grad_(False)


def own_greedy(ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(roberta()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


def test_the_positions_are_those_that_the_model_makes_itself() -> None:
    embeddings = roberta().roberta.embeddings
    own = embeddings.create_position_ids_from_input_ids(torch.tensor([PROMPT]), PAD)[0].tolist()
    counting = counting_of(roberta())
    assert counting == Counting(PAD)
    assert counting.positions(PROMPT, 0, len(PROMPT)).tolist() == own
    assert counting.positions(PROMPT, 4, 9).tolist() == own[4:9]
    assert counting_of(tiny_model("opt")) is None


def test_prompts_with_pad_in_them_decode_as_by_the_own_forward() -> None:
    lm = kvloom.attach(roberta(), budget_bytes=1 << 20, block_tokens=4)
    lm.engine.step_tokens = 5
    prompts = [PROMPT, PROMPT[:3], [PAD, PAD, 7], PROMPT]
    for prompt, out in zip(prompts, lm.generate(prompts, **GREEDY), strict=True):
        assert out.token_ids == own_greedy(prompt, 6)
    best = lm.beam_search(PROMPT, num_beams=3, **GREEDY)[0]
    uncached = lm.beam_search(PROMPT, num_beams=3, use_cache=False, **GREEDY)[0]
    assert best.token_ids == uncached.token_ids
    with lm.prefill(PROMPT) as context:
        assert lm.generate([PAD, 5], context=context, **GREEDY).token_ids == own_greedy([*PROMPT, PAD, 5], 6)
    assert lm.verify(PROMPT, max_new_tokens=4).ok


def test_the_longest_sequence_leaves_out_the_positions_that_nothing_is_given() -> None:
    lm = kvloom.attach(roberta(), budget_bytes=1 << 20)
    assert lm.max_tokens == POSITIONS - PAD - 1
    whole = [5] * lm.max_tokens
    assert lm.extend(None, whole).logits.shape[0] == len(whole)
    with pytest.raises(RuntimeError, match="out of bounds"):
        roberta()(input_ids=torch.tensor([[*whole, 5]]))
    with pytest.raises(PromptTooLong):
        lm.extend(None, [*whole, 5])


def test_transformers_chooses_other_tokens_than_its_own_forward() -> None:
    prompt = [own for own in PROMPT if own != PAD]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "pad_token_id": PAD}
    theirs = roberta().generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    assert theirs != own_greedy(prompt, 6)
