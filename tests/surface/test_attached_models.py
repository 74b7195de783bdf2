"""Models that ask something unusual of the binding, and what happens to a model after it was attached."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, JetMoeConfig, Llama4ForCausalLM, Llama4TextConfig

import kvloom
import tiny
from kvloom import LanguageModel, UnsupportedModel
from kvloom.errors import ModelError


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


def test_a_model_whose_dtype_changes_must_be_attached_again(lm: LanguageModel) -> None:
    lm.binding.model.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match=r"attached as torch\.float32"):
        lm.generate([1, 2])
