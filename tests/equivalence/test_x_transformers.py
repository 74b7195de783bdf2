"""Models of x-transformers: token ids to logits as any language model, embeddings to hidden states step by step."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import kvloom
from kvloom import CacheFull, CacheMismatch, EmbeddingModel, InvalidRequest, LanguageModel, UnsupportedModel
from kvloom.errors import ContextClosed

x_transformers = pytest.importorskip("x_transformers", reason="x-transformers is not installed")

VOCABULARY = 97
VARIANTS: dict[str, dict[str, Any]] = {
    "absolute positions": {},
    "rotary and flash": {"rotary_pos_emb": True, "attn_flash": True},
    "alibi, grouped heads": {"alibi_pos_bias": True, "attn_kv_heads": 2},
    "tied layers": {"weight_tie_layers": True, "rotary_pos_emb": True},
    "layers in an order of their own": {"layers_execute_order": (2, 3, 0, 1, 0), "rotary_pos_emb": True},
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


def test_its_linears_are_packed_for_our_passes_alone_and_ragged_rows_share_them(
    lm: LanguageModel, prompts: list[list[int]]
) -> None:
    wrapped = lm.binding._cached_function.__closure__[0].cell_contents
    assert lm.binding._packed.packed_bytes > 0
    calls: list[int] = []
    handle = wrapped.register_forward_hook(lambda *_: calls.append(1))
    lm.generate(prompts[:4], max_new_tokens=1, eos_token_id=None)
    prefill = len(calls)
    lm.generate(prompts[4:8], max_new_tokens=6, eos_token_id=None)
    handle.remove()
    # Absolute positions, ALiBi and rotary ones all bear padding on the left.
    assert len(calls) - prefill == len({len(own) for own in prompts[4:8]}) + 5
    assert not any("forward" in vars(module) for module in wrapped.modules())


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
        ({"cross_attend": True, "only_cross": True}, {}, "has no self-attention"),
        ({"cross_attend": True, "attn_max_attend_past": 50}, {}, "attn_max_attend_past"),
        ({"cross_attend": True, "attn_use_rel_proj_pos_bias": True}, {}, "attn_use_rel_proj_pos_bias"),
        ({"cross_attend": True, "sandwich_coef": 2}, {}, "none of its layers attends"),
        ({"attn_sparse_topk": 24}, {}, "cannot be run on its own cache: selected index k"),
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


# ---- token ids beside a source ---------------------------------------------------------------------------------


SOURCED: dict[str, dict[str, Any]] = {
    "absolute positions": {},
    "rotary, flash, another width": {"rotary_pos_emb": True, "attn_flash": True, "cross_attn_dim_context": 32},
    "alibi, grouped heads": {"alibi_pos_bias": True, "attn_kv_heads": 2},
    "relative positions": {"rel_pos_bias": True},
    "tied layers": {"weight_tie_layers": True, "rotary_pos_emb": True},
    "a window over its own tokens": {"attn_max_attend_past": 3, "cross_attn_max_attend_past": None},
}
BEGUN = [[1, 2, 3], [4], [5, 6, 7, 8]]


@pytest.fixture(scope="module", params=SOURCED)
def sourced(request: pytest.FixtureRequest) -> LanguageModel:
    return kvloom.attach(wrapper({"cross_attend": True, **SOURCED[request.param]}))


def encoded(lm: LanguageModel, *lengths: int) -> list[Tensor]:
    return [2 * inputs(1, tokens, lm.binding.encoder.dim, seed=tokens)[0] for tokens in lengths]


def test_a_wrapper_with_cross_attention_decodes_from_embeddings_as_it_does_itself(sourced: LanguageModel) -> None:
    model, sources = sourced.binding._wrapper, encoded(sourced, 5, 17, 9)
    outs = sourced.generate(sources, decoder_input_ids=BEGUN, max_new_tokens=8)
    for out, source, begun in zip(outs, sources, BEGUN, strict=True):
        tokens = list(begun)
        for _ in range(8):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]), context=source[None])[0, -1].argmax()))
        assert out.token_ids == tokens[len(begun) :]
    assert len({tuple(out.token_ids) for out in outs}) == 3
    moved = sourced.generate(sources[1], decoder_input_ids=BEGUN[0], max_new_tokens=8)
    assert moved.token_ids != outs[0].token_ids, "another source makes a difference"


def test_beams_samples_scores_and_contexts_share_one_pass_over_the_source(sourced: LanguageModel) -> None:
    sources = encoded(sourced, 6, 20)
    beams = {"decoder_input_ids": BEGUN[:2], "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}
    cached, uncached = (sourced.beam_search(sources, use_cache=use, **beams) for use in (True, False))
    assert [[o.token_ids for o in own] for own in cached] == [[o.token_ids for o in own] for own in uncached]
    usage = cached[1][0].usage
    assert (usage.source_tokens, usage.computed_source_tokens) == (20, 20)
    # The source's two blocks are held once for three beams.
    assert sourced.generate(sources[1], decoder_input_ids=[1], max_new_tokens=2).usage.computed_source_tokens == 0
    drawn = {"do_sample": True, "seed": 4, "num_return_sequences": 3, "max_new_tokens": 6, "decoder_input_ids": [1, 2]}
    pair = [sourced.generate(sources[0], use_cache=use, **drawn) for use in (True, False)]
    assert [own.token_ids for own in pair[0]] == [own.token_ids for own in pair[1]]
    context = sourced.prefill(sources[0], decoder_input_ids=[1, 2, 3])
    went_on = sourced.generate([9], context=context, max_new_tokens=5)
    whole = sourced.generate(sources[0], decoder_input_ids=[1, 2, 3, 9], max_new_tokens=5, use_cache=False)
    assert went_on.token_ids == whole.token_ids
    scores = [sourced.score([[3, 4], [5]], prompt=sources[0], decoder_input_ids=[1], use_cache=use) for use in (1, 0)]
    assert [own.logprob for own in scores[0]] == pytest.approx([own.logprob for own in scores[1]], abs=1e-4)


def test_a_wrapper_with_cross_attention_verifies_and_says_what_a_source_is() -> None:
    lm = kvloom.attach(wrapper({"cross_attend": True}))
    report = lm.verify(max_new_tokens=5)
    assert report.ok and len(report.source_tokens) == 2
    context = lm.prefill(encoded(lm, 4)[0], decoder_input_ids=[1])
    for call, message in [
        (lambda: lm.generate(encoded(lm, 4)[0]), "the decoder's first token is not known"),
        (lambda: lm.generate([5, 6], decoder_input_ids=[1]), "source is embeddings, float"),
        (lambda: lm.generate(torch.zeros(3, 47), decoder_input_ids=[1]), r"shape \[tokens, 48\]"),
        (lambda: lm.generate(torch.zeros(2, 3, 48), decoder_input_ids=[1]), "Pass several sources as a list"),
        (lambda: context.save("x.kv"), "keeps no keys and values that another process would know"),
        (lambda: kvloom.attach(wrapper({"cross_attend": True}), codec="int8"), "computes its attention itself"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            call()


def test_other_parts_of_the_package_and_arguments_of_callables_are_refused() -> None:
    model = wrapper({})
    with pytest.raises(UnsupportedModel, match="`net` of an AutoregressiveWrapper"):
        kvloom.attach(x_transformers.AutoregressiveWrapper(model).eval())
    with pytest.raises(InvalidRequest, match="knows its own"):
        kvloom.attach(model, vocab_size=VOCABULARY)
    with pytest.raises(UnsupportedModel, match="training mode"):
        kvloom.attach(model.train())


# ---- embeddings to hidden states ---------------------------------------------------------------------------------


def decoder(**options: Any) -> Any:
    torch.manual_seed(4)
    plain = {"dim": 48, "depth": 2, "heads": 4, "attn_dim_head": 16, "rotary_pos_emb": True}
    return x_transformers.Decoder(**{**plain, **options}).eval()


def inputs(batch: int = 3, tokens: int = 10, dim: int = 48, seed: int = 0) -> Tensor:
    return torch.randn((batch, tokens, dim), generator=torch.Generator().manual_seed(seed))


def held_blocks(em: EmbeddingModel) -> list[int]:
    return [em.cache.blocks - group.pool.free for group in em.cache.groups]


def test_a_decoder_with_cross_attention_driven_step_by_step_equals_the_full_pass() -> None:
    model = decoder(dim=128, depth=4, heads=4, cross_attend=True, attn_flash=True, attn_dim_head=64)
    em = kvloom.attach(model)
    x, encoded = inputs(dim=128), inputs(dim=128, seed=1)
    with torch.no_grad():
        full = model(x, context=encoded)
    for again in (True, False):  # the encoder's outputs may be passed in each step, or in the first only
        context, rows = None, []
        for token in range(10):
            given = encoded if again or token == 0 else None
            out = em.extend(context, x[:, token : token + 1], encoder_outputs=given)
            context = out.context
            rows.append(out.outputs)
        torch.testing.assert_close(torch.cat(rows, dim=1), full, atol=1e-5, rtol=0)
        assert (context.tokens, context.batch, context.source_tokens) == (10, 3, 10)


@pytest.mark.parametrize("options", [{}, {"attn_flash": True}, {"alibi_pos_bias": True, "rotary_pos_emb": False}])
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_of_any_size_equal_the_full_pass(options: dict[str, Any], batch: int) -> None:
    model = decoder(**options)
    em = kvloom.attach(model, block_tokens=4)
    x = inputs(batch, 23)
    with torch.no_grad():
        full = model(x)
    context, rows = None, []
    for chunk in x.split([6, 1, 9, 7], dim=1):
        out = em.extend(context, chunk, start=0 if context is None else context.tokens)
        context = out.context
        rows.append(out.outputs)
    torch.testing.assert_close(torch.cat(rows, dim=1), full, atol=1e-5, rtol=0)


def test_contexts_are_immutable_shared_by_forks_and_freed_when_dropped() -> None:
    model = decoder(cross_attend=True)
    em = kvloom.attach(model, block_tokens=4)
    x, y, encoded = inputs(), inputs(seed=2), inputs(tokens=7, seed=1)
    prefix = em.extend(None, x[:, :6], encoder_outputs=encoded).context
    assert held_blocks(em) == [3 * 2, 3 * 2]
    fork = prefix.fork()
    assert held_blocks(em) == [3 * 2, 3 * 2], "a fork shares what it forks"
    for own, context in ((x, prefix), (y, fork), (x, prefix)):
        whole = torch.cat([x[:, :6], own[:, 6:]], dim=1)
        with torch.no_grad():
            full = model(whole, context=encoded)
        out = em.extend(context, own[:, 6:])
        torch.testing.assert_close(out.outputs, full[:, 6:], atol=1e-5, rtol=0)
        assert context.tokens == 6 and out.context.tokens == 10
    assert held_blocks(em)[1] == 3 * 2, "the encoder's outputs are kept once, whatever continues them"
    del prefix, context
    fork.close()
    out = em.extend(out.context, x[:, :1])
    del out
    assert held_blocks(em) == [0, 0]
    with pytest.raises(ContextClosed, match="was closed"):
        em.extend(fork, x[:, :1])


def test_a_wrong_slice_of_input_is_an_error_that_says_what_to_pass() -> None:
    em = kvloom.attach(decoder(cross_attend=True))
    x, encoded = inputs(), inputs(seed=1)
    context = em.extend(None, x[:, :6], encoder_outputs=encoded).context
    held = held_blocks(em)
    wrong: list[tuple[type[Exception], str, tuple[Any, Tensor], dict[str, Any]]] = [
        (CacheMismatch, r"begin with all 6 .* Pass inputs\[:, 6:\]", (context, x), {}),
        (CacheMismatch, r"start at position 6.*start=0", (context, x), {"start": 0}),
        (CacheMismatch, "holds 3 sequences, and the new tokens are of 2", (context, x[:2, 6:]), {}),
        (CacheMismatch, "not those that the context was begun with", (context, x[:, 6:]), {"encoder_outputs": x}),
        (InvalidRequest, r"shape \[batch, tokens, 48\].*got \[3, 48\]", (context, x[:, 6]), {}),
        (InvalidRequest, r"shape \[batch, tokens, 48\].*got \[3, 4, 47\]", (context, x[:, 6:, 1:]), {}),
        (InvalidRequest, r"none of them 0; got \[3, 0, 48\]", (context, x[:, 10:]), {}),
        (InvalidRequest, "must be torch.float32", (context, x[:, 6:].double()), {}),
        (InvalidRequest, "pass `encoder_outputs`", (None, x), {}),
        (InvalidRequest, "must be of 3 sequences", (None, x), {"encoder_outputs": encoded[:2]}),
        (InvalidRequest, "Pass its `.context`", (em.extend(context, x[:, 6:]), x), {}),
    ]
    for kind, message, (given, embeddings), options in wrong:
        with pytest.raises(kind, match=message):
            em.extend(given, embeddings, **options)
    wrong.clear()
    del given
    assert held_blocks(em) == held, "bad input leaks nothing"
    repeated = em.extend(context, x, start=6)
    assert repeated.context.tokens == 16, "a repetition that is meant is said so by `start`"


def test_contexts_in_reference_cycles_do_not_keep_the_pool_full() -> None:
    em = kvloom.attach(decoder(), budget_bytes=16_384 * 6, block_tokens=16)
    gc.disable()
    try:
        cycle: list[object] = [em.extend(None, inputs(2, 33)).context]
        cycle.append(cycle)
        del cycle
        assert em.extend(None, inputs(2, 34)).context.tokens == 34
    finally:
        gc.enable()


def test_a_full_cache_and_changed_weights_are_said_and_leave_everything_as_it_was() -> None:
    model = decoder()
    em = kvloom.attach(model, budget_bytes=16_384 * 6, block_tokens=16)
    x = inputs(2, 16)
    context = em.extend(None, x).context
    held = held_blocks(em)
    with pytest.raises(CacheFull, match="Drop contexts, or attach with a larger budget_bytes"):
        em.extend(context, inputs(2, 200))
    assert held_blocks(em) == held
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(CacheMismatch, match="weights were changed"):
        em.extend(context, x[:, :1])
    context.close()
    assert held_blocks(em) == [0], "what failed holds nothing"
    model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        em.extend(None, x)


def test_decoders_that_cannot_be_cached_and_options_of_language_models_are_refused() -> None:
    for options, reason in (
        ({"shift_tokens": 1}, "shift_tokens"),
        ({"attn_orthog_projected_values": True}, "differs"),
        ({"cross_attend": True, "attn_max_attend_past": 50}, "attn_max_attend_past"),
    ):
        with pytest.raises(UnsupportedModel, match=reason):
            kvloom.attach(decoder(**options))
    with pytest.raises(UnsupportedModel, match="not causal"):
        kvloom.attach(x_transformers.Encoder(dim=48, depth=1, heads=2).eval())
    with pytest.raises(InvalidRequest, match="a bare decoder reads embeddings"):
        kvloom.attach(decoder(), max_tokens=5)
