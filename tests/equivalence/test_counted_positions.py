"""RoBERTa counts positions from its PAD id on, and gives PAD none: cached as by its own uncached forward.

M2M100 counts alike, but by itself, so that PAD among a decoder's tokens is refused.

`transformers.generate` (5.23) is no reference here: it hands the model positions 0, 1, 2, ..., which its own forward
never uses, so that even with `use_cache=False` it chooses other tokens than the model does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)

import kvloom
from kvloom.errors import InvalidTokens, PromptTooLong
from kvloom.models.hosted.positions import Counting, counting_of
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


# ---- models that count by themselves -----------------------------------------------------------------------------


@cache
def m2m100(vocab_size: int) -> PreTrainedModel:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = M2M100Config(
        vocab_size=vocab_size,
        d_model=48,
        encoder_layers=1,
        decoder_layers=2,
        max_position_embeddings=POSITIONS,
        **heads,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = M2M100ForConditionalGeneration._from_config(config, attn_implementation="eager")
        _draw_weights(model)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("vocab_size", [11, 97])
def test_a_vocabulary_of_any_size_passes_the_check_and_decodes_as_without_a_cache(vocab_size: int) -> None:
    lm = kvloom.attach(m2m100(vocab_size), budget_bytes=1 << 20, block_tokens=4)
    assert counting_of(m2m100(vocab_size)) == Counting(1, by_itself=True)
    begun = {"decoder_input_ids": [2, 5, 8, 4, 7, 3], "bad_words_ids": [[1]], **GREEDY}
    # Sources may hold it: they are read as a whole.
    for source in ([5, 6, 7], [5, 1, 6, 1]):
        assert lm.generate(source, **begun).token_ids == lm.generate(source, use_cache=False, **begun).token_ids
    assert len(lm.generate([5, 6], max_new_tokens=3, output_attentions=True).attentions) == 3


def test_pad_among_the_decoders_tokens_is_refused_where_the_model_counts_it_in_its_cache_alone() -> None:
    model = m2m100(97)
    own = {"input_ids": torch.tensor([[5, 6]])}
    past = model(**own, decoder_input_ids=torch.tensor([[2, 1]])).past_key_values
    cached = model(**own, decoder_input_ids=torch.tensor([[9]]), past_key_values=past).logits[0, -1]
    whole = model(**own, decoder_input_ids=torch.tensor([[2, 1, 9]]), use_cache=False).logits[0, -1]
    assert (cached - whole).abs().max() > 1e-2, "transformers' own cache disagrees with the own forward"
    lm = kvloom.attach(model, budget_bytes=1 << 20)
    context = lm.prefill([5, 6])
    refused: list[Any] = [
        lambda: lm.generate([5, 6], decoder_input_ids=[2, 1, 9]),
        lambda: lm.prefill([5, 6], decoder_input_ids=[2, 1, 9]),
        lambda: lm.generate([9, 1], context=context),
        lambda: lm.extend(context, [1]),
        lambda: lm.score([[9], [4, 1]], prompt=[5, 6]),
        lambda: kvloom.generate(model, own["input_ids"], decoder_input_ids=torch.tensor([[2, 1, 9]])),
    ]
    for call in refused:
        with pytest.raises(InvalidTokens, match=r"token 1, at index \d, is this model's PAD.*Leave it out"):
            call()
    uncached = lm.generate([5, 6], decoder_input_ids=[2, 1, 9], use_cache=False, output_logits=True, max_new_tokens=1)
    torch.testing.assert_close(uncached.logits[0], whole, atol=1e-4, rtol=1e-4)
