"""Attaching proves itself: right models pass, wrong ones are refused by the layer's name, nobody else notices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedModel

import kvloom
from kvloom.attention import torch_ops
from kvloom.attention.native import NativeAttention
from kvloom.cache import Reach, Store
from kvloom.errors import AttachMismatch, CacheMismatch, UnsupportedModel
from kvloom.models import AttentionInterfaceBinding
from kvloom.models.hosted import probe
from kvloom.models.proofs import running, selfcheck, small_windows
from tiny import (
    LENGTH_DEPENDENT_ROPE_FAMILIES,
    SUPPORTED_FAMILIES,
    WINDOW_TOKENS,
    random_ids,
    tiny_model,
)

MIXED = ("gemma2", "gemma3", "gpt_oss", "cohere2")
"""Families whose even layers have a window and whose odd layers see everything."""


def attach(model: PreTrainedModel) -> AttentionInterfaceBinding:
    selfcheck.prove(binding := AttentionInterfaceBinding(model))
    return binding


# ---- right models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_supported_family_proves_itself(family: str) -> None:
    binding = AttentionInterfaceBinding(tiny_model(family))
    assert selfcheck.prove(binding) < 1e-4
    assert len(binding.layers) == binding.model.config.num_hidden_layers
    assert binding.vocab_size == binding.model.config.vocab_size


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in SUPPORTED_FAMILIES),
        *((family, torch.float16) for family in ("llama", "gemma2", "gpt_oss")),
        *((family, torch.float64) for family in ("llama", "gemma2")),
    ],
    ids=str,
)
def test_models_of_every_dtype_attach(family: str, dtype: torch.dtype) -> None:
    assert attach(tiny_model(family, dtype=dtype)).dtype == dtype


def test_the_reach_of_every_layer_is_found() -> None:
    for family in MIXED:
        reaches = [layer.reach for layer in AttentionInterfaceBinding(tiny_model(family)).layers]
        assert reaches == [Reach(window_tokens=WINDOW_TOKENS), Reach()] * 2, family
    mistral = AttentionInterfaceBinding(tiny_model("mistral"))
    assert {layer.reach for layer in mistral.layers} == {Reach(window_tokens=WINDOW_TOKENS)}


@pytest.mark.parametrize("chunk_tokens", [8, 100])
def test_chunked_attention_proves_itself_whatever_the_size_of_a_chunk(chunk_tokens: int) -> None:
    config = Llama4TextConfig(
        vocab_size=131,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        hidden_size=48,
        intermediate_size=80,
        intermediate_size_mlp=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=chunk_tokens,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    binding = attach(model)
    assert [layer.reach for layer in binding.layers] == [Reach(chunk_tokens=chunk_tokens), Reach()]


@pytest.mark.parametrize("tokens", [12, 20, 30])
def test_a_model_with_a_short_context_is_proven_within_it(tokens: int) -> None:
    attach(tiny_model("gpt2", n_positions=tokens))


# ---- models that cannot be decoded on the cache ------------------------------------------------------------


def test_a_model_that_ignores_the_attention_interface_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="BloomForCausalLM never calls transformers' attention interface"):
        attach(tiny_model("bloom"))


def test_a_context_too_short_to_be_checked_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="context of 8 tokens is too short"):
        attach(tiny_model("gpt2", n_positions=8))


def test_training_mode_is_refused_wherever_it_is() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.train()
    with pytest.raises(UnsupportedModel, match=r"training mode.*Call model\.eval\(\) first"):
        attach(model)
    attach(model.eval())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_gradient_checkpointing_is_refused() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModel, match="gradient checkpointing"):
        attach(model)
    model.gradient_checkpointing_disable()
    attach(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_autocast_is_refused_where_work_begins_and_leaves_no_trace(family: str) -> None:
    model = tiny_model(family)
    lm = kvloom.attach(model)
    prompt = random_ids(model, tokens=20)
    expected = lm.generate(prompt, max_new_tokens=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (
            lambda: kvloom.attach(model),
            lambda: lm.generate(prompt, max_new_tokens=4),
            lambda: lm.prefill(prompt),
            lambda: lm.score([[5]], prompt=prompt),
            lambda: kvloom.attach(cached_callable_of(model)),
        ):
            with pytest.raises(UnsupportedModel, match=r"autocast is switched on for cpu.*Leave the autocast block"):
                call()
        with pytest.raises(CacheMismatch, match=r"keeps torch.float32, and was given .* values of torch.bfloat16"):
            model(torch.tensor([prompt]), past_key_values=paged_cache_of(model))
    assert lm.generate(prompt, max_new_tokens=4).token_ids == expected.token_ids


def cached_callable_of(model: PreTrainedModel) -> Callable[..., Any]:
    def call(ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return model(ids, past_key_values=past_key_values, use_cache=use_cache)

    return call


def paged_cache_of(model: PreTrainedModel) -> kvloom.PagedCache:
    with torch.autocast("cpu", enabled=False):
        return kvloom.PagedCache.for_model(model, budget_bytes=2**20)


def test_training_mode_after_attaching_is_refused_when_asked() -> None:
    binding = attach(tiny_model("llama"))
    binding.model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        binding.check_ready()


def test_a_model_without_a_language_modelling_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="LlamaModel has no language-modelling head"):
        attach(tiny_model("llama").model)


# ---- deliberately wrong attention --------------------------------------------------------------------------


@pytest.fixture
def without_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The probe takes every layer for one that sees everything, as long as its window is the check's own."""
    found = probe._reach

    def blind(*arguments: Any) -> Reach:
        reach = found(*arguments)
        return Reach() if reach.window_tokens == small_windows.SMALL_WINDOW else reach

    monkeypatch.setattr(probe, "_reach", blind)
    yield


@pytest.mark.parametrize(
    ("layer_types", "first_wrong"),
    [
        (["sliding_attention", "full_attention", "sliding_attention", "full_attention"], 0),
        (["full_attention", "full_attention", "sliding_attention", "full_attention"], 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_that_ignores_its_window_is_refused_by_the_first_layer_that_differs(
    without_windows: None, layer_types: list[str], first_wrong: int, dtype: torch.dtype
) -> None:
    model = tiny_model("cohere2", layer_types=layer_types, dtype=dtype)
    with pytest.raises(AttachMismatch, match=rf"first in `model\.layers\.{first_wrong}\.self_attn`"):
        attach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_fork_whose_partial_block_is_not_copied_is_refused(
    monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(Store, "copy", lambda *_: None)
    with pytest.raises(AttachMismatch, match="first in"):
        attach(tiny_model(family, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_steps_that_see_the_wrong_past_are_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Only the rows that are decoded are wrong: they take another's position for their own."""
    build = running.build_plan

    def crossed(*arguments: Any, **named: Any) -> Any:
        plan = build(*arguments, **named)
        if plan.tokens == 3:
            plan.positions.copy_(plan.positions.roll(1))
        return plan

    monkeypatch.setattr(running, "build_plan", crossed)
    with pytest.raises(AttachMismatch, match="first in"):
        attach(tiny_model("llama", dtype=dtype))


def test_attention_that_does_not_honour_an_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncapped(ours: Any) -> Any:
        return lambda *arguments, **named: ours(*arguments, **(named | {"softcap": None}))

    monkeypatch.setattr(torch_ops, "attend", uncapped(torch_ops.attend))
    monkeypatch.setattr(NativeAttention, "attend", uncapped(NativeAttention.attend))
    attach(tiny_model("llama"))
    with pytest.raises(AttachMismatch, match=r"first in `model\.layers\.0\.self_attn`"):
        attach(tiny_model("gemma2"))


def test_a_model_that_hides_state_in_its_modules_is_refused() -> None:
    model = tiny_model("llama")

    def remember(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """Adds what the module saw last time."""
        before = getattr(module, "seen", 0.0)
        module.seen = output.mean()
        return output + before

    model.model.layers[1].post_attention_layernorm.register_forward_hook(remember)
    with pytest.raises(AttachMismatch, match=r"first in the input of `model\.layers\.2\.self_attn`"):
        attach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_treats_decode_steps_otherwise_is_refused(dtype: torch.dtype) -> None:
    """A few rows of many are wrong, and not those of attention: in 16 bits they must not pass for ties."""
    model = tiny_model("llama", dtype=dtype)

    def short_rows_count_double(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * 2 if output.shape[1] < 8 else output

    model.model.layers[1].mlp.register_forward_hook(short_rows_count_double)
    with pytest.raises(AttachMismatch, match=r"first in the input of `model\.layers\.2\.self_attn`"):
        attach(model)


def test_not_a_number_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(AttachMismatch, match=r"first in `model\.layers\.1\.self_attn`"):
        attach(model)


# ---- long windows ------------------------------------------------------------------------------------------


@pytest.fixture(params=["mistral", "gemma3", "gpt_oss"])
def long_window(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, sliding_window=100)


def test_a_long_window_is_proven_on_a_twin_with_a_small_one(long_window: PreTrainedModel) -> None:
    binding = AttentionInterfaceBinding(long_window)
    assert {layer.reach.window_tokens for layer in binding.layers} - {None} == {100}
    twin = small_windows.with_small_windows(binding)
    assert {layer.reach.window_tokens for layer in twin.layers} - {None} == {small_windows.SMALL_WINDOW}
    own, shared = (
        {name: tensor.data_ptr() for name, tensor in (*m.named_parameters(), *m.named_buffers())}
        for m in (long_window, twin.model)
    )
    assert own == shared, "the twin has no weights of its own"
    assert selfcheck.prove(binding) < 1e-4
    assert long_window.config.sliding_window == 100
    assert {m.sliding_window for m in long_window.modules() if hasattr(m, "sliding_window")} <= {100, None}


def test_a_long_window_that_is_ignored_is_refused(without_windows: None, long_window: PreTrainedModel) -> None:
    with pytest.raises(AttachMismatch, match=r"first in `model\.layers\.0\.self_attn`"):
        attach(long_window)


def test_a_model_with_a_long_window_that_cannot_be_copied_is_refused() -> None:
    model = tiny_model("mistral", sliding_window=100)
    model.handle = (_ for _ in ())  # generators cannot be copied
    with pytest.raises(UnsupportedModel, match="cannot be copied to check them"):
        attach(model)


# ---- the owner's own calls ---------------------------------------------------------------------------------

OWN_CALL_FAMILIES = [
    ("llama", "eager"),
    ("llama", "sdpa"),
    ("mistral", "sdpa"),
    ("gemma3", "eager"),
    ("gemma3", "sdpa"),
    ("gpt_oss", "eager"),
    ("gpt2", "sdpa"),
    ("opt", "eager"),
    *((family, "eager") for family in LENGTH_DEPENDENT_ROPE_FAMILIES),
]


@torch.no_grad()
def own_calls(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What an owner does with a model, in an order that moves length-dependent rotary factors about."""
    long = torch.tensor([random_ids(model, tokens=60)])
    batch = torch.tensor([random_ids(model, tokens=12, seed=seed) for seed in (1, 2)])
    padding = torch.ones_like(batch)
    padding[0, :5] = 0
    yield "long", model(long).logits
    yield "plain", model(batch).logits
    yield "padded", model(batch, attention_mask=padding).logits
    greedy: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "attention_mask": padding}
    yield "generate", model.generate(batch, do_sample=False, **greedy)
    yield "beams", model.generate(batch, do_sample=False, num_beams=3, **greedy)


@pytest.mark.parametrize(("family", "implementation"), OWN_CALL_FAMILIES)
def test_the_owners_calls_give_the_same_bits_with_and_without_attaching(family: str, implementation: str) -> None:
    alone = tiny_model(family, attn_implementation=implementation)
    attached = tiny_model(family, attn_implementation=implementation)
    binding = AttentionInterfaceBinding(attached)
    for (name, expected), (_, got) in zip(own_calls(alone), own_calls(attached), strict=True):
        assert torch.equal(expected, got), f"{name}, after the trial pass"
        selfcheck.prove(binding)  # some thirty forward passes of ours between two of theirs
    for (name, expected), (_, got) in zip(own_calls(alone), own_calls(attached), strict=True):
        assert torch.equal(expected, got), f"{name}, after forward passes on the cache"


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3_longrope"])
def test_attaching_leaves_no_trace_on_the_model(family: str) -> None:
    model = tiny_model(family)
    before = traces(model)
    attach(model).detach()
    assert traces(model) == before


def test_a_failing_forward_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3")
    binding = AttentionInterfaceBinding(model)
    before = traces(model)
    monkeypatch.setattr(Store, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        selfcheck.prove(binding)
    assert traces(model) == before


def fail(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def traces(model: PreTrainedModel) -> dict[str, Any]:
    """What a module carries besides weights: attributes, hooks, buffers, and the config."""
    found: dict[str, Any] = {"config": model.config.to_dict(), "implementation": model.config._attn_implementation}
    for name, module in model.named_modules():
        for attribute, value in module.__dict__.items():
            if isinstance(value, (bool, int, float, str, type(None))):
                found[f"{name}.{attribute}"] = value
            elif isinstance(value, dict) and attribute.endswith("hooks"):
                found[f"{name}.{attribute}"] = len(value)
        for attribute, value in module.named_buffers(recurse=False):
            found[f"{name}.{attribute}"] = (value.data_ptr(), value.tolist())
    return copy.deepcopy(found)


# ---- one forward pass --------------------------------------------------------------------------------------


@pytest.fixture
def binding() -> AttentionInterfaceBinding:
    return AttentionInterfaceBinding(tiny_model("llama"))


def test_uncached_logits_are_those_of_the_model(binding: AttentionInterfaceBinding) -> None:
    token_ids = torch.tensor([random_ids(binding.model, tokens=9)])
    own = binding.model(token_ids).logits
    assert torch.equal(binding.forward_uncached(token_ids, last=None), own)
    assert torch.allclose(binding.forward_uncached(token_ids, last=2), own[:, -2:], atol=1e-5)
    assert binding.forward_uncached(token_ids).shape == (1, 1, binding.vocab_size)


def test_the_fingerprint_changes_with_the_weights_only(binding: AttentionInterfaceBinding) -> None:
    before = binding.fingerprint()
    binding.forward_uncached(torch.tensor([[1, 2, 3]]))
    assert binding.fingerprint() == before
    binding.model.lm_head.weight[0, 0] += 1
    assert binding.fingerprint() != before


@pytest.mark.parametrize(
    ("family", "changes", "tokens"),
    [
        ("llama", {}, 256),
        ("llama_dynamic_rope", {}, 192),
        ("gpt2", {"n_positions": 77}, 77),
        ("phi3_longrope", {}, 256),
    ],
)
def test_the_longest_sequence_is_known(
    tiny_model: Callable[..., PreTrainedModel], family: str, changes: dict[str, int], tokens: int
) -> None:
    assert AttentionInterfaceBinding(tiny_model(family, **changes)).max_tokens == tokens
