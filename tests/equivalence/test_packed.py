"""Packed linear layers: the same products, one copy of the weights or two, and the owner's model untouched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import kvloom
import tiny
from kvloom.models.packed import PackedLinears, packable

pytestmark = pytest.mark.skipif(not packable(nn.Linear(512, 512)), reason="this PyTorch has no packed linear operators")


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny.tiny_model("qwen2", dtype=dtype, hidden_size=256, intermediate_size=512, num_attention_heads=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_a_packed_product_equals_the_plain_one(dtype: torch.dtype, rows: int) -> None:
    layers = nn.ModuleList([nn.Linear(320, 512), nn.Linear(512, 240, bias=False)]).to(dtype)
    packed = PackedLinears(layers, exclusive=False)
    for layer in layers:
        inputs = torch.randn(1, rows, layer.in_features, dtype=dtype)
        with torch.no_grad():
            plain = layer(inputs)
            with packed.active():
                result = layer(inputs)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(result, plain, atol=tolerance, rtol=tolerance)


def test_outside_of_our_forward_passes_the_owner_runs_plain_layers() -> None:
    own = model()
    ids = torch.tensor([[1, 2, 3, 4]])
    before = own(ids).logits
    attributes = {name: set(module.__dict__) for name, module in own.named_modules()}
    lm = kvloom.attach(own)
    lm.generate([1, 2, 3], max_new_tokens=3)
    assert lm.binding.packed.packed_bytes > 0
    assert torch.equal(own(ids).logits, before)
    assert {name: set(module.__dict__) for name, module in own.named_modules()} == attributes


def test_weights_that_their_owner_changes_are_packed_again() -> None:
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


def test_a_loaded_model_keeps_one_copy_of_its_weights(tmp_path) -> None:
    own = model()
    own.save_pretrained(tmp_path)
    lm = kvloom.load(tmp_path)
    linears = [m for m in lm.binding.model.modules() if isinstance(m, nn.Linear) and m.weight.numel() >= 1 << 16]
    assert linears and all(m.weight.device.type == "meta" for m in linears)
    attached = kvloom.attach(own)
    assert (
        lm.generate([5, 6, 7], max_new_tokens=8).token_ids == attached.generate([5, 6, 7], max_new_tokens=8).token_ids
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages are read from /proc")
def test_pages_of_plain_weights_that_were_given_up_leave_memory(tmp_path: Path) -> None:
    model(torch.bfloat16).save_pretrained(tmp_path)
    lm = kvloom.load(tmp_path)
    file = str(tmp_path / "model.safetensors")
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    resident = sum(int(re.search(r"Rss: +(\d+)", block)[1]) * 1024 for block in blocks if file in block)
    kept = sum(own.nbytes for own in lm.binding.model.parameters() if own.device.type != "meta")
    given_up = lm.binding.packed.packed_bytes
    # A page at both ends of each weight may be shared with what is kept.
    assert resident < kept + given_up / 4


def test_layers_that_are_not_plain_linear_are_left_alone() -> None:
    class Adapter(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    assert packable(nn.ModuleList([Adapter(512, 512), nn.Linear(512, 512), nn.Linear(8, 8)])).__len__() == 1
