"""Random numbers that belong to a sequence: a seed gives the same text alone, in any batch, anywhere."""

from __future__ import annotations

import hashlib
import secrets

import torch
from torch import Tensor

_CHUNK = 64


def fresh_seed() -> int:
    """A seed from the operating system's entropy. PyTorch's CPU generator looks at 32 bits of a seed."""
    return secrets.randbits(32)


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request: the request's own for the first, a hash for the others.

    The hash (BLAKE2b) does not depend on the process, the platform or the library versions, so sample 3 of
    eight can be had alone again with `seed=sample_seed(seed, 3)`.
    """
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(seed: int) -> torch.Generator:
    """A CPU generator; on the CPU whatever the device, so that a seed means the same everywhere."""
    return torch.Generator(device="cpu").manual_seed(seed)


class Uniforms:
    """One uniform number in [0, 1) for each sample and step.

    The number of a sample at a step depends on the sample's seed and the step alone. Asking twice for a step
    gives the same numbers. They are drawn and sent to the device for 64 steps at a time.
    """

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [generator_for(seed) for seed in seeds]
        self._device = device
        self._chunks = 0
        self._numbers = torch.empty(0)

    def at(self, step: int) -> Tensor:
        """float64[samples], the numbers of `step`; steps may be repeated, but not go back by more than 64."""
        while self._chunks * _CHUNK <= step:
            drawn = [torch.rand(_CHUNK, generator=g, dtype=torch.float64) for g in self._generators]
            self._numbers = torch.stack(drawn).to(self._device)
            self._chunks += 1
        return self._numbers[:, step % _CHUNK]
