"""What an outside check of the first version found: each stays found."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, Llama4ForCausalLM, Llama4TextConfig

import kvloom
import tiny
from kvloom import CacheFull, InvalidRequest, LanguageModel, UnsupportedModel
from kvloom.errors import CorruptCheckpoint, ModelError, NumericalError


@pytest.fixture
def lm() -> LanguageModel:
    return kvloom.attach(tiny.tiny_model("llama"))


def llama4(**changes: object) -> Llama4ForCausalLM:
    config = Llama4TextConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=64,
        initializer_range=0.3,
        pad_token_id=0,
        **changes,
    )
    return Llama4ForCausalLM(config).eval()


def test_a_temperature_that_counts_rows_ends_the_context_before_it_changes() -> None:
    # Llama 4 takes it from the row's index, not from the position: harmless below 8,192 tokens, wrong beyond.
    assert kvloom.attach(llama4()).max_tokens == 8_191


def test_a_temperature_that_counts_rows_and_changes_early_is_left_to_the_cache_interface() -> None:
    # There rows begin at their positions: transformers counts from the length of the cache.
    lm = kvloom.attach(llama4(floor_scale=8))
    assert lm.binding.name == "transformers cache interface" and "cached output differs" in lm.binding.reason
    assert lm.verify(max_new_tokens=12).ok


def test_models_that_view_their_attention_output_are_attached() -> None:
    config = JetMoeConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    lm = kvloom.attach(AutoModelForCausalLM.from_config(config).eval())
    cached, uncached = (
        lm.generate([1, 2, 3], max_new_tokens=5, use_cache=c, output_logits=True) for c in (True, False)
    )
    torch.testing.assert_close(cached.logits, uncached.logits, atol=1e-4, rtol=1e-4)


def test_a_call_that_overlaps_with_decoding_is_told_so() -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model)
    errors: list[Exception] = []

    def call_until_told() -> None:
        try:
            for _ in range(2_000):
                model(torch.tensor([[1, 2, 3]]))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call_until_told)
    thread.start()
    while thread.is_alive():
        lm.generate([1, 2, 3], max_new_tokens=20)
    assert all(isinstance(error, ModelError) and "another thread" in str(error) for error in errors)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_scores_that_are_not_numbers_are_an_error(lm: LanguageModel, options: dict) -> None:
    with pytest.raises(NumericalError):
        lm.generate([1, 2], logits_processor=[lambda ids, scores: scores * float("nan")], **options)


@pytest.mark.parametrize("broken", [lambda ids, scores: None, lambda ids, scores: scores[:, :5]])
def test_a_processor_that_returns_no_scores_is_refused(lm: LanguageModel, broken: object) -> None:
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(InvalidRequest, match="logits processor must return"):
            lm.generate([1, 2], logits_processor=[broken], **options)


def test_a_model_whose_dtype_changes_must_be_attached_again(lm: LanguageModel) -> None:
    lm.binding.model.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match=r"attached as torch\.float32"):
        lm.generate([1, 2])


def test_weights_without_a_place_are_mentioned(stories260k: Path, tmp_path: Path) -> None:
    shutil.copytree(stories260k, tmp_path / "m", copy_function=shutil.copyfile)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.warns(UserWarning, match="no place for"):
        kvloom.load(tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvloom.load(stories260k)


def test_a_damaged_generation_config_is_refused(stories260k: Path, tmp_path: Path) -> None:
    shutil.copytree(stories260k, tmp_path / "m", copy_function=shutil.copyfile)
    (tmp_path / "m" / "generation_config.json").write_text("xx")
    with pytest.raises(CorruptCheckpoint, match="generation_config"):
        kvloom.load(tmp_path / "m")


def test_plausible_slips_end_in_a_typed_error(lm: LanguageModel) -> None:
    step = lm.extend(None, [1, 2])
    slips = [
        lambda: lm.generate([1], context=5),
        lambda: lm.extend(step, [5]),
        lambda: lm.extend(step.context, [5], start=True),
        lambda: lm.prefill([5], context=step),
        lambda: step.context.truncate("a"),
        lambda: step.context.truncate(True),
        lambda: lm.generate(b"abc"),
        lambda: lm.generate({"input_ids": [[1]]}),
        lambda: lm.generate([1], bad_words_ids=[1, 2]),
        lambda: kvloom.attach(tiny.tiny_model("llama"), "tokenizer"),
        lambda: kvloom.load(5),
        lambda: kvloom.load(""),
        lambda: kvloom.load(dtype=torch.int8),
    ]
    for slip in slips:
        with pytest.raises(InvalidRequest if slip is not slips[2] else ValueError):
            slip()


NEEDS_A_FREE_POOL: dict[str, Callable[[LanguageModel, Path], object]] = {
    "generate": lambda small, saved: small.generate([1, 2, 3], max_new_tokens=60),
    "prefill": lambda small, saved: small.prefill(list(range(60, 0, -1))),
    "score": lambda small, saved: small.score([[4] * 60], prompt=[1, 2, 3]),
    "restore": lambda small, saved: small.restore(saved),
    "import_cache": lambda small, saved: small.import_cache(
        range(60), small.binding.model(torch.arange(60)[None], use_cache=True).past_key_values
    ),
}


@pytest.mark.parametrize("call", NEEDS_A_FREE_POOL)
def test_contexts_in_reference_cycles_do_not_keep_the_pool_full(lm: LanguageModel, tmp_path: Path, call: str) -> None:
    lm.prefill(list(range(50, 110))).save(saved := tmp_path / "saved.kv")
    small = kvloom.attach(lm.binding.model, budget_bytes=10 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    gc.disable()
    try:
        cycle = [small.prefill(list(range(1, 90)) + list(range(1, 40)))]
        cycle.append(cycle)
        with pytest.raises(CacheFull):
            NEEDS_A_FREE_POOL[call](small, saved)
        del cycle
        NEEDS_A_FREE_POOL[call](small, saved)
    finally:
        gc.enable()


def test_the_default_budget_holds_eight_beams_of_the_whole_context(stories260k: Path) -> None:
    lm = kvloom.load(stories260k)
    lm.beam_search([1, 403, 407, 261, 378], num_beams=8, max_new_tokens=507, eos_token_id=426, early_stopping=True)
