"""Packed linear layers: the same products, one copy of the weights or two, and the owner's model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import kvloom
import tiny
from kvloom.errors import InvalidRequest
from kvloom.models.packing.packed import PackedLinears, packable
from kvloom.models.packing.packings import OneDnnPacking, Packing, choose_packing

PACKINGS = {"native": "1", "onednn": "0"}


@pytest.fixture(params=list(PACKINGS))
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Packing:
    """Each way to pack; what is loaded or attached in the test packs so too."""
    monkeypatch.setenv("KVLOOM_NATIVE", PACKINGS[request.param])
    chosen = choose_packing()
    if chosen is None or chosen.is_native != (request.param == "native"):
        pytest.skip("no native kernels" if request.param == "native" else "this PyTorch has no packed linear operators")
    return chosen


def model(dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    return tiny.tiny_model("qwen2", dtype=dtype, **sizes, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_packed_product_equals_the_plain_one(dtype: torch.dtype, rows: int, packing: Packing) -> None:
    layers = nn.ModuleList([nn.Linear(320, 512), nn.Linear(512, 240, bias=False)]).to(dtype)
    packed = PackedLinears(layers, packing, exclusive=False)
    for layer in layers:
        inputs = torch.randn(1, rows, layer.in_features, dtype=dtype)
        with torch.no_grad():
            plain = layer(inputs)
            with packed.active():
                result = layer(inputs)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(result, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: Conv1D(240, 320), lambda: FalconLinear(320, 240)], ids=["Conv1D", "Falcon"])
def test_products_by_another_name_are_packed_too(
    make: Callable[[], nn.Module], dtype: torch.dtype, packing: Packing
) -> None:
    layer = make().to(dtype)
    nn.init.normal_(layer.bias)
    before = layer.weight.detach().clone()
    packed = PackedLinears(nn.ModuleList([layer]), packing, exclusive=True)
    weight = layer.weight
    if packing.is_native or dtype == torch.float32:
        assert packed.packed_bytes and weight.device.type == "meta" and weight.shape == before.shape
    inputs = torch.randn(1, 7, 320, dtype=dtype)
    with torch.no_grad():
        result = layer(inputs)
        assert torch.equal(packed.plain_weight(layer), before)
        packed.restore()
        plain = layer(inputs)
    assert torch.equal(layer.weight, before) and layer.weight.stride() == before.stride()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, plain, atol=tolerance, rtol=tolerance)


def test_outside_of_our_forward_passes_the_owner_runs_plain_layers(packing: Packing) -> None:
    own = model()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = own(ids).logits
    attributes = {name: set(module.__dict__) for name, module in own.named_modules()}
    lm = kvloom.attach(own)
    lm.generate([1, 2, 3], max_new_tokens=3)
    assert lm.binding.packed.packed_bytes > 0
    assert torch.equal(own(ids).logits, before)
    assert {name: set(module.__dict__) for name, module in own.named_modules()} == attributes


def test_weights_that_their_owner_changes_are_packed_again(packing: Packing) -> None:
    own = model()
    lm = kvloom.attach(own)
    lm.generate([1, 2, 3], max_new_tokens=2)
    with torch.no_grad():
        own.model.layers[0].mlp.up_proj.weight.mul_(-1.3)
        own.model.layers[1].mlp.up_proj.weight = nn.Parameter(own.model.layers[1].mlp.up_proj.weight * 0.5)
    cached, uncached = (
        lm.generate([1, 2, 3], max_new_tokens=6, output_logits=True, use_cache=c) for c in (True, False)
    )
    torch.testing.assert_close(cached.logits, uncached.logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_keeps_one_copy_of_its_weights(tmp_path: Path, tied: bool, packing: Packing) -> None:
    own = model(tie_word_embeddings=tied)
    own.save_pretrained(tmp_path)
    lm = kvloom.load(tmp_path)
    modules = [own for own in lm.binding.model.model.modules() if isinstance(own, nn.Linear)]
    linears = [own for own in modules if own.weight.numel() >= packing.min_weights]
    assert linears and all(m.weight.device.type == "meta" for m in linears)
    embedding, head = lm.binding.model.model.embed_tokens.weight, lm.binding.model.lm_head.weight
    if packing.is_native:
        assert head.device.type == "meta" and (embedding is head) == tied
    attached = kvloom.attach(own)
    assert (
        lm.generate([5, 6, 7], max_new_tokens=8).token_ids == attached.generate([5, 6, 7], max_new_tokens=8).token_ids
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are read from /proc")
def test_pages_of_plain_weights_that_were_given_up_leave_memory(tmp_path: Path, packing: Packing) -> None:
    model(torch.bfloat16).save_pretrained(tmp_path)
    lm = kvloom.load(tmp_path)
    file = str(tmp_path / "model.safetensors")
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    resident = sum(int(re.search(r"Rss: +(\d+)", block)[1]) * 1024 for block in blocks if file in block)
    kept = sum(own.nbytes for own in lm.binding.model.parameters() if own.device.type != "meta")
    given_up = lm.binding.packed.packed_bytes
    # A page at both ends of each weight may be shared with what is kept.
    assert resident < kept + given_up / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exclusive_model_is_given_back_as_it_was(tied: bool, dtype: torch.dtype, packing: Packing) -> None:
    own = model(dtype, tie_word_embeddings=tied)
    own.lm_head.weight.requires_grad_(False)
    own.model.layers[0].mlp.up_proj.weight.note = "the owner's"
    ids = torch.tensor([[1, 2, 3, 4]])
    before, weights = own(ids).logits, {name: value.clone() for name, value in own.state_dict().items()}
    parameters = {name: id(value) for name, value in own.named_parameters(remove_duplicate=False)}
    graded = {name: value.requires_grad for name, value in own.named_parameters()}
    attributes = {name: set(module.__dict__) for name, module in own.named_modules()}

    lm = kvloom.attach(own, exclusive=True)
    held = sum(value.nbytes for value in own.parameters() if value.device.type != "meta")
    if packing.is_native:
        embedding = 0 if tied else weights["model.embed_tokens.weight"].nbytes
        assert held < embedding + 0.01 * sum(value.nbytes for value in weights.values())
    within = own(ids).logits
    torch.testing.assert_close(within, before, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
    lm.generate([1, 2, 3], max_new_tokens=4)
    lm.detach()

    after = own.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert {name: id(value) for name, value in own.named_parameters(remove_duplicate=False)} == parameters
    assert {name: value.requires_grad for name, value in own.named_parameters()} == graded
    assert {name: set(module.__dict__) for name, module in own.named_modules()} == attributes
    assert own.model.layers[0].mlp.up_proj.weight.note == "the owner's"
    assert torch.equal(own(ids).logits, before)


def test_an_exclusive_model_has_the_identity_of_its_weights(packing: Packing) -> None:
    own = model(torch.bfloat16)
    plain = kvloom.attach(own)
    identity = plain.binding.identity()
    plain.detach()
    assert kvloom.attach(own, exclusive=True).binding.identity() == identity


def test_an_exclusive_model_still_generates_for_its_owner(packing: Packing) -> None:
    own = model()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = own.generate(ids, max_new_tokens=6, do_sample=False)
    kvloom.attach(own, exclusive=True)
    assert torch.equal(own.generate(ids, max_new_tokens=6, do_sample=False), before)


def test_the_weights_of_a_callable_cannot_be_had_exclusively() -> None:
    with pytest.raises(InvalidRequest, match="`exclusive` is for transformers models"):
        kvloom.attach(lambda ids: torch.zeros(*ids.shape, 7), vocab_size=7, exclusive=True)


def test_layers_that_are_not_plain_linear_are_left_alone(packing: Packing) -> None:
    class Adapter(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    plain, hooked = nn.Linear(512, 512), nn.Linear(512, 512)
    hooked.forward = lambda input: input
    found = packable(nn.ModuleList([Adapter(512, 512), plain, hooked, nn.Embedding(512, 512)]), packing)
    assert [weight.linears for weight in found] == [[plain]]


class AdapterLayer(nn.Module):
    """As PEFT's layers are: a plain linear layer, two small ones, and a property that names what is active."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)
        self.merged_adapters: list[str] = []

    @property
    def active_adapters(self) -> list[str]:
        return ["default"]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = self.base_layer(input)
        return own if self.merged_adapters else own + self.lora_B(self.lora_A(input))

    def merge(self, sign: int = 1) -> None:
        """Through `data`, which leaves no trace on the weight."""
        self.base_layer.weight.data += sign * (self.lora_B.weight.data @ self.lora_A.weight.data)
        self.merged_adapters = ["default"] if sign == 1 else []


def test_an_exclusive_model_keeps_the_plain_weights_that_adapters_wrap(packing: Packing) -> None:
    own = model()
    own.model.layers[0].mlp.up_proj = AdapterLayer(own.model.layers[0].mlp.up_proj).eval()
    plain = kvloom.attach(own).generate([1, 2, 3], max_new_tokens=5).token_ids
    lm = kvloom.attach(own, exclusive=True)
    assert own.model.layers[0].mlp.up_proj.base_layer.weight.device.type == "cpu"
    assert own.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert lm.generate([1, 2, 3], max_new_tokens=5).token_ids == plain


def test_adapters_that_are_merged_and_unmerged_after_attaching_are_noticed(packing: Packing) -> None:
    own = model()
    adapter = AdapterLayer(own.model.layers[0].mlp.up_proj).eval()
    own.model.layers[0].mlp.up_proj = adapter
    lm = kvloom.attach(own)
    prompt = list(range(1, 40))
    before = lm.binding.fingerprint()

    def check() -> None:
        out = lm.generate(prompt, max_new_tokens=4, output_logits=True, eos_token_id=None)
        whole = own(torch.tensor([prompt + out.token_ids[:-1]]), use_cache=False).logits[0, -4:]
        torch.testing.assert_close(out.logits.float(), whole.float(), atol=1e-3, rtol=1e-3)

    check()
    adapter.merge()
    assert lm.binding.fingerprint() != before, "what was cached before is not met"
    check()
    adapter.merge(-1)
    check()


def test_without_native_kernels_onednn_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_NATIVE", "0")
    assert isinstance(choose_packing(), OneDnnPacking if OneDnnPacking.exists() else type(None))
