"""Models of x-transformers: token ids to logits as any language model, embeddings to hidden states step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvloom
from kvloom import InvalidRequest, LanguageModel, UnsupportedModel

x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is not installed")

VOCABULARY = 97
VARIANTS: dict[str, dict[str, Any]] = {
    "absolute positions": {},
    "rotary and flash": {"rotary_pos_emb": True, "attn_flash": True},
    "alibi, grouped heads": {"alibi_pos_bias": True, "attn_kv_heads": 2},
    "tied layers": {"weight_tie_layers": True, "rotary_pos_emb": True},
}


def wrapper(decoder: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    layers = x_transformers.Decoder(dim=48, depth=2, heads=4, attn_dim_head=16, **decoder)
    model = x_transformers.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=96, attn_layers=layers, **options)
    # Freshly made, it gives about the same logits whatever it reads; its embeddings are too small to matter.
    torch.nn.init.normal_(model.token_emb.emb.weight)
    return model.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return kvloom.attach(wrapper(VARIANTS[request.param]))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(2, 24, (20,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def test_greedy_decoding_on_the_cache_is_that_without_it(lm: LanguageModel, prompts: list[list[int]]) -> None:
    assert lm.binding.name == "x-transformers cache"
    cached = lm.generate(prompts, max_new_tokens=10)
    uncached = lm.generate(prompts, max_new_tokens=10, use_cache=False)
    assert [out.token_ids for out in cached] == [out.token_ids for out in uncached]
    assert len({tuple(out.token_ids) for out in cached}) > 15, "prompts that all go on alike would prove little"


def test_greedy_decoding_is_the_likeliest_token_of_the_wrapper_itself(prompts: list[list[int]]) -> None:
    model = wrapper(VARIANTS["rotary and flash"])
    tokens = list(prompts[0])
    for _ in range(8):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert kvloom.attach(model).generate(prompts[0], max_new_tokens=8).token_ids == tokens[len(prompts[0]) :]


def test_beams_on_the_cache_are_those_without_it(lm: LanguageModel, prompts: list[list[int]]) -> None:
    cached = lm.beam_search(prompts, num_beams=3, max_new_tokens=8)
    uncached = lm.beam_search(prompts, num_beams=3, max_new_tokens=8, use_cache=False)
    assert [[beam.token_ids for beam in own] for own in cached] == [
        [beam.token_ids for beam in own] for own in uncached
    ]
    scores = [[beam.score for own in found for beam in own] for found in (cached, uncached)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_samples_contexts_and_verify_hold(lm: LanguageModel, prompts: list[list[int]]) -> None:
    options = {"do_sample": True, "temperature": 0.9, "seed": 5, "max_new_tokens": 8}
    cached = lm.generate(prompts[:3], **options)
    assert [o.token_ids for o in cached] == [o.token_ids for o in lm.generate(prompts[:3], **options, use_cache=False)]
    whole = prompts[4] + prompts[5]
    context = lm.prefill(prompts[4])
    extended = lm.extend(context, prompts[5])
    own = lm.binding.forward_own(torch.tensor([whole]), last=len(prompts[5]))[0]
    torch.testing.assert_close(extended.logits, own, atol=1e-4, rtol=1e-4)
    after = lm.generate(context=extended.context.fork(), max_new_tokens=6)
    assert after.token_ids == lm.generate(whole, max_new_tokens=6, use_cache=False).token_ids
    assert lm.verify(max_new_tokens=6).ok


@pytest.mark.parametrize(
    ("decoder", "options", "reason"),
    [
        ({"shift_tokens": 1}, {}, "shift_tokens"),
        ({"attn_selective": True}, {}, "attn_selective"),
        ({"attn_data_dependent_alibi": True}, {}, "attn_data_dependent_alibi"),
        ({"attn_orthog_projected_values": True}, {}, "differs from the model's own"),
        ({"cross_attend": True}, {}, "wrapper.attn_layers"),
        ({}, {"max_mem_len": 8}, "max_mem_len"),
        ({}, {"num_memory_tokens": 2}, "num_memory_tokens"),
        ({}, {"recycling": True}, "recycling"),
        ({}, {"num_output_heads": 2}, "num_output_heads"),
    ],
)
def test_what_cannot_be_cached_is_refused_with_the_reason(
    decoder: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        kvloom.attach(wrapper(decoder, **options))


def test_other_parts_of_the_package_and_arguments_of_callables_are_refused() -> None:
    model = wrapper({})
    with pytest.raises(UnsupportedModel, match="`net` of an AutoregressiveWrapper"):
        kvloom.attach(x_transformers.AutoregressiveWrapper(model).eval())
    with pytest.raises(InvalidRequest, match="knows its own"):
        kvloom.attach(model, vocab_size=VOCABULARY)
    with pytest.raises(UnsupportedModel, match="training mode"):
        kvloom.attach(model.train())
