"""The limit that a decode step meets: how fast memory can be read."""

from __future__ import annotations

import time

import torch
from torch import nn

from kvloom.native import Library, native
from kvloom.native.bandwidth import memory_bandwidth

PROBED_BYTES = 1 << 30
REPEATS = 6


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which `device` reads its memory, the best of several readings by all of PyTorch's threads.

    On a CPU the native kernels read, from pages as large as packed weights'; elsewhere PyTorch sums up a gibibyte.
    """
    kernels = native() if device.type == "cpu" else None
    if isinstance(kernels, Library):
        return memory_bandwidth(kernels, threads=torch.get_num_threads())
    ones = torch.ones(PROBED_BYTES // 4, device=device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        ones.sum().item()
        times.append(time.perf_counter() - start)
    return ones.nbytes / min(times)


def weight_bytes_a_step(model: nn.Module) -> int | None:
    """Bytes of weights that every decode step reads; None where steps choose among weights (mixtures of experts).

    Of an embedding a step reads a few rows, unless the same weights also give the logits.
    """
    if any("experts" in name.split(".")[-1] for name, _ in model.named_modules()):
        return None
    unembeddings = {id(own.weight) for own in model.modules() if isinstance(own, nn.Linear)}
    looked_up = {
        id(own.weight)
        for own in model.modules()
        if isinstance(own, nn.Embedding) and id(own.weight) not in unembeddings
    }
    return sum(own.numel() * own.element_size() for own in model.parameters() if id(own) not in looked_up)
