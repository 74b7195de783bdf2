"""Rotary factors that depend on length belong to a sequence: the module is lent them and gets its own back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvloom.models.hosted.rotary import RotaryRegimes
from tiny import DYNAMIC_ROPE_SWITCH, LONGROPE_SWITCH, MAX_POSITIONS, random_ids, tiny_model

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": MAX_POSITIONS / LONGROPE_SWITCH,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.7 * i for i in range(8)],
    "original_max_position_embeddings": LONGROPE_SWITCH,
}


def make(kind: str) -> PreTrainedModel:
    """A fresh model whose full-attention layers have rotary factors of that kind."""
    if kind == "dynamic":
        return tiny_model("llama_dynamic_rope")
    if kind == "longrope":
        return tiny_model("phi3_longrope")
    own = DYNAMIC if kind == "dynamic by layer type" else LONGROPE
    return tiny_model(
        "gemma3",
        max_position_embeddings=DYNAMIC_ROPE_SWITCH,
        rope_parameters={"full_attention": own, "sliding_attention": DEFAULT},
    )


KINDS = ("dynamic", "longrope", "dynamic by layer type", "longrope by layer type")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return make(kind)


def rotary_of(model: PreTrainedModel) -> nn.Module:
    return model.model.rotary_emb


def state(module: nn.Module) -> dict[str, Any]:
    """Every attribute and buffer, tensors by place and by bits."""
    everything = {**module.__dict__, **module._buffers}
    return {
        name: (value.data_ptr(), value.tolist()) if isinstance(value, Tensor) else repr(value)
        for name, value in everything.items()
    }


def cosines(model: PreTrainedModel, tokens: int) -> list[Tensor]:
    """What the rotary module returns for a row of that many tokens."""
    rotary: Any = rotary_of(model)
    hidden, positions = torch.zeros(1, tokens, 1), torch.arange(tokens)[None]
    if isinstance(rotary.rope_type, dict):
        return [part for layer_type in rotary.rope_type for part in rotary(hidden, positions, layer_type)]
    return list(rotary(hidden, positions))


def far(model: PreTrainedModel) -> None:
    """The owner's own long call, which leaves the factors of its length on the module."""
    with torch.no_grad():
        model(torch.tensor([random_ids(model, tokens=90)]))


@pytest.mark.parametrize("length", [5, 60, 120])
def test_a_regime_gives_the_factors_of_a_fresh_model_whatever_ran_before(kind: str, length: int) -> None:
    used = make(kind)
    far(used)
    regimes = RotaryRegimes(used)
    with regimes.fixed(regimes.regime(length)):
        got = cosines(used, length)
        short = cosines(used, 3)
    for own, lent in zip(cosines(make(kind), length), got, strict=True):
        assert torch.equal(own, lent)
    for long, start in zip(got, short, strict=True):
        assert torch.equal(long[:, :3], start), "the regime decides, not the positions of the row"


@pytest.mark.parametrize("history", ["fresh", "after a long call"])
@pytest.mark.parametrize("length", [5, 60])
def test_the_module_gets_back_every_attribute_and_buffer(model: PreTrainedModel, length: int, history: str) -> None:
    if history != "fresh":
        far(model)
    regimes = RotaryRegimes(model)
    before = state(rotary_of(model))
    with regimes.fixed(regimes.regime(length)):
        cosines(model, length)
    assert state(rotary_of(model)) == before


def test_the_module_gets_everything_back_after_an_exception_too(model: PreTrainedModel) -> None:
    regimes = RotaryRegimes(model)
    before = state(rotary_of(model))
    with pytest.raises(KeyboardInterrupt), regimes.fixed(regimes.regime(60)):
        raise KeyboardInterrupt
    assert state(rotary_of(model)) == before


@pytest.mark.parametrize(
    ("kind", "lengths", "regimes"),
    [
        ("dynamic", [1, DYNAMIC_ROPE_SWITCH, DYNAMIC_ROPE_SWITCH + 1, 90], [(0,), (0,), (49,), (90,)]),
        ("longrope", [1, LONGROPE_SWITCH, LONGROPE_SWITCH + 1, 90], [(0,), (0,), (1,), (1,)]),
        ("longrope by layer type", [LONGROPE_SWITCH, LONGROPE_SWITCH + 1], [(0,), (1,)]),
    ],
    indirect=["kind"],
)
def test_a_regime_says_when_a_longer_sequence_needs_other_factors(
    model: PreTrainedModel, lengths: list[int], regimes: list[tuple[int, ...]]
) -> None:
    own = RotaryRegimes(model)
    assert [own.regime(length) for length in lengths] == regimes


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_factors_that_do_not_depend_on_length_have_one_regime(family: str) -> None:
    regimes = RotaryRegimes(tiny_model(family))
    assert regimes.regime(1) == regimes.regime(200) == ()
    with regimes.fixed(regimes.regime(200)):
        pass
