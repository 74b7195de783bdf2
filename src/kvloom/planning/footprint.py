"""What a process holds in memory besides weights, cache and the tensors of a step."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from kvloom.models.packing.packings import Packing

WARM_UP_TOKENS = 512
WARM_UP_WIDTH = 1_024
# oneDNN keeps a compiled product for each shape of weight and each number of rows that it has met. Measured with
# PyTorch 2.13 in bfloat16 on AVX-512: half a MiB for one row to one and a half for 300.
PRODUCT_BYTES = 3 * 2**18
# Numbers of rows that attaching brings: 1, 3, 8, 19, 22, 43 and 44 in the probe and the self-check.
ATTACHING_ROW_COUNTS = 7
# Two rows in the check of the packed layers.
CHECK_ROW_COUNTS = 1
# And one request, if it is oneDNN that packs: whole chunks, the rest of the prompt, one row and all rows.
REQUEST_ROW_COUNTS = 4


def resident_bytes() -> int | None:
    """Bytes of this process that are in memory now, pages of mapped files included; None where Linux' /proc is not."""
    statm = Path("/proc/self/statm")
    if sys.platform != "linux" or not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def warm_up(dtype: torch.dtype, packing: Packing | None) -> None:
    """Run the operators of a step once, so that the libraries behind them are loaded as in any process that decodes."""
    rows = torch.randn(WARM_UP_TOKENS, WARM_UP_WIDTH)
    layer = nn.Linear(WARM_UP_WIDTH, WARM_UP_WIDTH)
    layer(rows)
    layer, rows = layer.to(dtype), rows.to(dtype)
    layer(rows)
    if packing is not None and dtype in packing.dtypes:
        packing.linear(rows, packing.pack(layer.weight), layer.bias)
    heads = rows.view(1, WARM_UP_TOKENS, -1, 64).transpose(1, 2)
    nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.log_softmax(nn.functional.silu(rows).float(), dim=-1).topk(2)


def product_bytes(model: nn.Module, packing: Packing | None) -> tuple[int, int]:
    """About what oneDNN keeps for the model's linear layers: after attaching, and after a request."""
    attaching = CHECK_ROW_COUNTS + ATTACHING_ROW_COUNTS
    after = attaching + (0 if packing is not None and packing.is_native else REQUEST_ROW_COUNTS)
    shapes = {
        (tuple(module.weight.shape), module.bias is None) for module in model.modules() if isinstance(module, nn.Linear)
    }
    return len(shapes) * attaching * PRODUCT_BYTES, len(shapes) * after * PRODUCT_BYTES
