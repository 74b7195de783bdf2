"""The probe reads a model's attention from one short trial pass: synthetic masks and options, no transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvloom.cache import LayerShape, Reach
from kvloom.errors import UnsupportedModel
from kvloom.models.hosted.probe import PROBE, PROBE_TOKENS, AttentionCall, run_probe

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def window(tokens: int) -> Predicate:
    return lambda batch, head, query, key: (key <= query) & (query - key < tokens)


def chunk(tokens: int) -> Predicate:
    return lambda batch, head, query, key: (key <= query) & (query // tokens == key // tokens)


class Layer(nn.Module):
    """An attention module that asks for attention as transformers' modules do."""

    def __init__(self, *, heads: int = 4, kv_heads: int = 2, key_dim: int = 6, value_dim: int = 6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim

    def forward(self, mask: Tensor | None, *, keys: int = PROBE_TOKENS, **options: Any) -> Tensor:
        output, _ = ALL_ATTENTION_FUNCTIONS[PROBE](
            self,
            torch.ones(1, self.heads, PROBE_TOKENS, self.key_dim),
            torch.ones(1, self.kv_heads, keys, self.key_dim),
            torch.ones(1, self.kv_heads, keys, self.value_dim),
            mask,
            **options,
        )
        assert output.shape == (1, PROBE_TOKENS, self.heads, self.value_dim)
        return output


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"attention": Layer()})


def mask_of(predicate: Predicate) -> Tensor:
    mask = ALL_MASK_ATTENTION_FUNCTIONS[PROBE](
        mask_function=predicate, q_length=PROBE_TOKENS, kv_length=PROBE_TOKENS, batch_size=1
    )
    assert isinstance(mask, Tensor)
    return mask


def probe(
    model: nn.Module, predicate: Predicate | None = causal, *, max_tokens: int = 32_768, **options: Any
) -> AttentionCall:
    """The one call that `model.attention` makes."""
    mask = None if predicate is None else mask_of(predicate)
    (call,) = run_probe(model, lambda state: model["attention"](mask, kvloom=state, **options), max_tokens)
    return call


# ---- how far back ------------------------------------------------------------------------------------------

SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 100, 1000, 4096]


@pytest.mark.parametrize("max_tokens", [4097, 32_768, 131_072])
@pytest.mark.parametrize("tokens", SIZES)
def test_a_sliding_window_of_any_size_is_read_from_the_mask(model: nn.Module, tokens: int, max_tokens: int) -> None:
    assert probe(model, window(tokens), max_tokens=max_tokens).shape.reach == Reach(window_tokens=tokens)


@pytest.mark.parametrize("max_tokens", [4097, 32_768, 131_072])
@pytest.mark.parametrize("tokens", SIZES)
def test_chunks_of_any_size_are_read_from_the_mask(model: nn.Module, tokens: int, max_tokens: int) -> None:
    # A chunk of one token is a window of one.
    expected = Reach(window_tokens=1) if tokens == 1 else Reach(chunk_tokens=tokens)
    assert probe(model, chunk(tokens), max_tokens=max_tokens).shape.reach == expected


@pytest.mark.parametrize("predicate", [causal, window(64), window(100), chunk(64), chunk(100)])
def test_a_limit_that_the_context_never_meets_is_no_limit(model: nn.Module, predicate: Predicate) -> None:
    assert probe(model, predicate, max_tokens=64).shape.reach == Reach()


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_the_shortest_contexts_can_be_probed(model: nn.Module, max_tokens: int) -> None:
    assert probe(model, causal, max_tokens=max_tokens).shape.reach == Reach()


def test_without_a_mask_the_window_that_the_layer_passes_counts(model: nn.Module) -> None:
    assert probe(model, None, sliding_window=20).shape.reach == Reach(window_tokens=20)
    assert probe(model, None).shape.reach == Reach()


def test_the_mask_counts_more_than_the_window_that_the_layer_passes(model: nn.Module) -> None:
    assert probe(model, causal, sliding_window=20).shape.reach == Reach()


# ---- masks that cannot be cached ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        (lambda b, h, query, key: (key <= query) & (key != 3), "`attention` .*holes"),
        (lambda b, h, query, key: (key <= query) & ((key < 2) | (query - key < 4)), "`attention` .*holes"),
        (lambda b, h, query, key: key < query, "`attention` .*holes"),
        (lambda b, h, query, key: key >= 0, "`attention` .*later ones"),
        (lambda b, h, query, key: (key <= query) | (key < 12), "`attention` .*later ones"),
        (lambda b, h, query, key: (key <= query) & (key >= query // 2), "neither causal, nor a sliding window"),
        (
            lambda b, h, query, key: (key <= query) & (query - key < 8) & (key // 30 == query // 30),
            "neither causal, nor a sliding window",
        ),
    ],
    ids=["hole", "sinks and window", "not itself", "both ways", "prefix both ways", "half", "window in chunks"],
)
def test_a_mask_of_another_kind_is_refused_by_the_name_of_its_layer(
    model: nn.Module, predicate: Predicate, message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        probe(model, predicate)


def test_a_mask_that_the_model_builds_itself_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match=r"`attention` .*builds in a way of its own"):
        run_probe(model, lambda state: model["attention"](torch.zeros(1, 1, 8, 8), kvloom=state), 64)


# ---- what the layer passes ---------------------------------------------------------------------------------


def test_heads_and_head_sizes_are_those_of_the_keys_and_values() -> None:
    model = nn.ModuleDict({"attention": Layer(heads=6, kv_heads=3, key_dim=10, value_dim=4)})
    call = probe(model)
    assert call.shape == LayerShape(kv_heads=3, key_dim=10, value_dim=4)
    assert (call.name, call.module) == ("attention", model["attention"])


@pytest.mark.parametrize("option", ["head_mask", "position_bias", "alibi", "indices"])
def test_an_option_that_would_be_ignored_is_refused_by_name(model: nn.Module, option: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"`attention` passes `{option}` to its attention"):
        probe(model, **{option: torch.ones(1)})
    assert probe(model, **{option: None}).name == "attention"


@pytest.mark.parametrize(
    "options", [{"dropout": 0.0}, {"scaling": 0.3}, {"softcap": 5.0, "s_aux": torch.ones(4)}, {"use_cache": True}]
)
def test_options_that_are_honoured_or_change_nothing_pass(model: nn.Module, options: dict[str, Any]) -> None:
    assert probe(model, **options).name == "attention"


def test_dropout_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="`dropout`"):
        probe(model, dropout=0.1)


def test_attention_in_both_directions_is_refused(model: nn.Module) -> None:
    model["attention"].is_causal = False
    with pytest.raises(UnsupportedModel, match="`attention` attends in both directions"):
        probe(model, None)


def test_cross_attention_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="`attention` attends to other tokens"):
        probe(model, None, keys=5)


def test_query_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="5 query heads for 2 key heads"):
        probe(nn.ModuleDict({"attention": Layer(heads=5)}))


def test_a_module_that_attends_twice_is_refused(model: nn.Module) -> None:
    def twice(state: object) -> None:
        model["attention"](None, kvloom=state)
        model["attention"](None, kvloom=state)

    with pytest.raises(UnsupportedModel, match="`attention` runs more than once"):
        run_probe(model, twice, 64)


def test_a_model_that_never_asks_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="ModuleDict never calls transformers' attention interface"):
        run_probe(model, lambda state: None, 64)


def test_a_model_that_drops_keyword_arguments_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="Layer does not pass keyword arguments on"):
        run_probe(model, lambda state: model["attention"](None), 64)
