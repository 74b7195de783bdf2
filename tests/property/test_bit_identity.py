"""Where every operation is native, the logits of a token are the same bits, whatever happens around it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvloom
from kvloom.engine import Engine
from kvloom.language_model.model import LanguageModel
from kvloom.native import Library, native
from thread_counts import on_threads
from tiny import tiny_model

if not isinstance(native(), Library):
    pytest.skip("there are no native kernels here", allow_module_level=True)

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "llama_dynamic_rope")
PROMPT = [(7 * i * i + 3 * i) % 131 for i in range(70)]
NEW = 5


@cache
def _binding(family: str, dtype: torch.dtype):
    lm = kvloom.attach(tiny_model(family, dtype=dtype), budget_bytes=1 << 20)
    assert lm.engine.binding.bit_identical, "the test is about native models"
    return lm.engine.binding


@cache
def _expected(
    family: str, dtype: torch.dtype, tokens: int, codec: str = "native", block_tokens: int = 16
) -> tuple[list[int], Tensor]:
    """Greedy tokens and their logits, without a cache, alone, on one thread.

    Under int8 the tokens are those of one run, and the logits those of one chunk over all before each, on a cold cache.
    """
    options = {"max_new_tokens": NEW, "eos_token_id": None, "output_logits": True}
    binding, prompt = _binding(family, dtype), PROMPT[:tokens]
    with on_threads(1):
        if codec == "native":
            lm = LanguageModel(Engine(binding, budget_bytes=1 << 20), None, None)
            out = lm.generate(prompt, use_cache=False, **options)
            return out.token_ids, out.logits
        kept = {"budget_bytes": 1 << 20, "block_tokens": block_tokens, "codec": codec}
        out = LanguageModel(Engine(binding, **kept), None, None).generate(prompt, **options)
        wholes = [[*prompt, *out.token_ids[:step]] for step in range(NEW)]
        return out.token_ids, torch.stack([_in_one_chunk(Engine(binding, **kept), own) for own in wholes])


def _in_one_chunk(engine: Engine, token_ids: list[int]) -> Tensor:
    """The logits behind `token_ids`."""
    return LanguageModel(engine, None, None).extend(None, token_ids).logits[-1]


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.float().view(torch.int32), expected.float().view(torch.int32))


@settings(max_examples=30, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.integers(2, len(PROMPT)),
    step_tokens=st.integers(1, 80),
    codec=st.sampled_from(["native", "int8"]),
    block_tokens=st.sampled_from([1, 3, 16]),
    warm=st.integers(0, len(PROMPT)),
    mates=st.lists(st.integers(1, 40), max_size=3),
    threads=st.integers(1, 2),
    fragments=st.lists(st.integers(1, 30), max_size=4),
    use_cache=st.booleans(),
)
def test_greedy_logits_are_the_same_bits_whatever_surrounds_them(
    family: str,
    dtype: torch.dtype,
    tokens: int,
    step_tokens: int,
    codec: str,
    block_tokens: int,
    warm: int,
    mates: list[int],
    threads: int,
    fragments: list[int],
    use_cache: bool,
) -> None:
    use_cache |= codec != "native"  # without a cache nothing is sealed
    expected_ids, expected = _expected(family, dtype, tokens, codec, block_tokens)
    kept = {"budget_bytes": 1 << 21, "block_tokens": block_tokens, "codec": codec}
    engine = Engine(_binding(family, dtype), step_tokens=step_tokens, **kept)
    lm = LanguageModel(engine, None, None)
    with on_threads(threads):
        # Contexts of which every other one is dropped leave holes in the pool; a warm prefix may end anywhere.
        kept = [lm.prefill([(own * 5 + i) % 131 for i in range(own)]) for own in fragments]
        del kept[::2]
        if warm:
            lm.generate(PROMPT[:warm], max_new_tokens=1, eos_token_id=None)
        others = [[(11 * own + 3 * i) % 131 for i in range(own)] for own in mates]
        found = lm.generate(
            [PROMPT[:tokens], *others], max_new_tokens=NEW, eos_token_id=None, output_logits=True, use_cache=use_cache
        )[0]
    assert found.token_ids == expected_ids
    assert _same_bits(found.logits, expected)


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.integers(2, 60),
    beams=st.integers(2, 6),
    step_tokens=st.integers(1, 80),
    threads=st.integers(1, 2),
    codec=st.sampled_from(["native", "int8"]),
)
def test_beams_have_the_logits_that_their_tokens_have_alone(
    family: str, dtype: torch.dtype, tokens: int, beams: int, step_tokens: int, threads: int, codec: str
) -> None:
    binding = _binding(family, dtype)
    lm = LanguageModel(Engine(binding, budget_bytes=1 << 21, step_tokens=step_tokens, codec=codec), None, None)
    with on_threads(threads):
        found = lm.beam_search(
            PROMPT[:tokens],
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=NEW,
            eos_token_id=None,
            output_logits=True,
        )
    for own in found:
        for step in {0, len(own.token_ids) - 1}:
            whole = [*PROMPT[:tokens], *own.token_ids[:step]]
            with on_threads(1):
                if codec == "int8":
                    alone = _in_one_chunk(Engine(binding, budget_bytes=1 << 20, codec=codec), whole)
                else:
                    alone = binding.forward_uncached(torch.tensor([whole]))[0, -1]
            assert _same_bits(own.logits[step], alone)


SINK_WINDOWS = st.builds(
    kvloom.SinkWindow,
    sink_tokens=st.integers(0, 5),
    window_tokens=st.sampled_from([1, 3, 9, 20, 200]),
    pins=st.sampled_from([(), ((1, 2),), ((0, 1),)]),
    reindex=st.booleans(),
)


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(FAMILIES[:3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    policy=SINK_WINDOWS,
    tokens=st.integers(2, len(PROMPT)),
    step_tokens=st.integers(1, 80),
    block_tokens=st.sampled_from([1, 3, 16]),
    mates=st.lists(st.tuples(st.integers(2, 40), st.none() | SINK_WINDOWS), max_size=3),
    threads=st.integers(1, 2),
    warm=st.booleans(),
)
def test_behind_sinks_and_a_window_logits_are_the_same_bits_whatever_surrounds_them(
    family: str,
    dtype: torch.dtype,
    policy: kvloom.SinkWindow,
    tokens: int,
    step_tokens: int,
    block_tokens: int,
    mates: list[tuple[int, kvloom.SinkWindow | None]],
    threads: int,
    warm: bool,
) -> None:
    """Beside requests of other policies, and of none; and no module of the model runs."""
    binding = _binding(family, dtype)
    if policy.reindex:
        binding.turns()
    options = {"max_new_tokens": NEW, "eos_token_id": None, "output_logits": True}
    alone = LanguageModel(Engine(binding, budget_bytes=1 << 21), None, None)
    together = LanguageModel(
        Engine(binding, budget_bytes=1 << 21, block_tokens=block_tokens, step_tokens=step_tokens), None, None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binding, "forward_by_modules", lambda *_, **__: pytest.fail("a module ran"))
        with on_threads(1):
            expected = alone.generate(PROMPT[:tokens], retention=policy, **options)
        with on_threads(threads):
            if warm:
                together.generate(PROMPT, max_new_tokens=1, eos_token_id=None)
            others = [
                together.stream([(11 * own + 3 * i) % 131 for i in range(own)], retention=its, max_new_tokens=40)
                for own, its in mates
            ]
            found = together.generate(PROMPT[:tokens], retention=policy, **options)
            del others
    assert found.token_ids == expected.token_ids
    assert _same_bits(found.logits, expected.logits)


@settings(max_examples=10, deadline=None)
@given(
    family=st.sampled_from(FAMILIES[:4]),
    tokens=st.integers(1, 30),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_scored_continuations_have_the_logprobs_that_they_have_without_a_cache(
    family: str, tokens: int, lengths: list[int]
) -> None:
    lm = LanguageModel(Engine(_binding(family, torch.bfloat16), budget_bytes=1 << 21), None, None)
    continuations = [[(17 * own + 5 * i) % 131 for i in range(own)] for own in lengths]
    cached = lm.score(continuations, prompt=PROMPT[:tokens])
    uncached = lm.score(continuations, prompt=PROMPT[:tokens], use_cache=False)
    assert [own.token_logprobs for own in cached] == [own.token_logprobs for own in uncached]


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(FAMILIES[:4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cut=st.integers(1, 60),
    more=st.integers(1, 40),
    step_tokens=st.integers(1, 80),
    threads=st.integers(1, 2),
)
def test_a_context_that_is_cut_inside_a_sealed_block_goes_on_with_the_same_bits_in_any_chunks(
    family: str, dtype: torch.dtype, cut: int, more: int, step_tokens: int, threads: int
) -> None:
    """The codes of what was cut stay, so the reference is the same cut, gone on from in one chunk on one thread."""
    binding = _binding(family, dtype)
    others = [(5 * i + 1) % 131 for i in range(more)]
    found = []
    for chunk, count in ((80, 1), (step_tokens, threads)):
        lm = LanguageModel(Engine(binding, budget_bytes=1 << 20, codec="int8", step_tokens=chunk), None, None)
        with on_threads(count):
            whole = lm.prefill(PROMPT[:64])
            context, logits = whole.truncate(cut), []
            for first in range(0, more, chunk):
                step = lm.extend(context, others[first : min(more, first + chunk)])
                context = step.context
                logits.append(step.logits)
            again = lm.extend(whole, others).logits
        found.append((torch.cat(logits), again))
    assert all(_same_bits(one, other) for one, other in zip(*found, strict=True))
