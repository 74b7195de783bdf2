"""Which model this is, by content: the same in another process, another when a weight, the config or an adapter is.

Every byte of every weight counts. A cryptographic hash reads about a gigabyte a second, so it is fed with sums
instead: a weight's bytes, taken as a table of 64-bit numbers, give the sum of each row and of each column. These are
computed as fast as memory is read, and any change of a single row, column or number, and any exchange of two
numbers, changes them. That tells models apart; it is no defence against somebody who forges one.

Within one process `digest_of_writes` says at no cost whether a model is still what it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROW_BYTES = 8 * 1024
"""A row of the table: 1,024 numbers, so the sums are a thousandth of the weights."""

NOT_OF_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",  # of the checkpoint; the weights say what they are
        "torch_dtype",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "id2label",
        "label2id",
        "problem_type",
    }
)
"""Fields of a config that say nothing about keys and values."""

PlainWeight = Callable[[nn.Module], Tensor | None]
"""The weight of a linear layer that has given it up for a packed copy."""


@dataclass(frozen=True)
class Identity:
    """A model by content.

    Attributes:
        name: what it is, in a few words.
        fingerprint: hexadecimal digest of config, weights and active adapters.
    """

    name: str
    fingerprint: str


def identify(
    model: nn.Module, config: Any, *, adapters: str, plain_weight: PlainWeight | None, layers: int
) -> Identity:
    """The identity of a model of transformers.

    Args:
        adapters: which are active, and how.
        plain_weight: asked for weights that are on the meta device; None if there are none.
        layers: attention layers, for the name.
    """
    digest = hashlib.blake2b(json.dumps(_relevant(config.to_dict()), sort_keys=True, default=str).encode())
    digest.update(adapters.encode())
    known: dict[int, bytes] = {}
    for name, tensor, module in _weights(model):
        if id(tensor) not in known:  # tied weights are one tensor under two names
            plain: Tensor | None = tensor
            if tensor.device.type == "meta":
                plain = None if plain_weight is None else plain_weight(module)
            assert plain is not None, f"`{name}` has neither a weight nor a packed copy"
            known[id(tensor)] = tensor_digest(plain)
        digest.update(name.encode() + known[id(tensor)])
    return Identity(f"a {config.model_type} model of {layers} layers", digest.hexdigest()[:32])


@torch.no_grad()
def tensor_digest(tensor: Tensor) -> bytes:
    """16 bytes that depend on every byte of a tensor, on its shape and dtype, and not on its device."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()  # 64-bit numbers begin at multiples of their size
    whole = flat.numel() // ROW_BYTES * ROW_BYTES
    if whole:
        table = flat[:whole].view(torch.int64).view(-1, ROW_BYTES // 8)
        for sums in (table.sum(0), table.sum(1)):  # modulo 2 ** 64
            digest.update(sums.cpu().numpy().tobytes())
    digest.update(flat[whole:].cpu().numpy().tobytes())
    return digest.digest()


def digest_of_writes(modules: Iterable[nn.Module], *, adapters: str = "") -> bytes:
    """16 bytes that depend on where the weights of modules lie, and on how often each was written in place.

    No weight is read. Writing through `parameter.data` leaves no trace that PyTorch keeps.

    Args:
        adapters: which are active, and how.
    """
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for parameter in module.parameters():
            # Weights made under inference_mode count no writes, and can only be written under it.
            writes = 0 if parameter.is_inference() else parameter._version
            digest.update(f"{parameter.data_ptr()} {writes} ".encode())
    digest.update(adapters.encode())
    return digest.digest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """What a checkpoint would hold: parameters and persistent buffers. Others follow from the config."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}", parameter, module
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer, module


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _relevant(own) for key, own in value.items() if key not in NOT_OF_THE_MODEL}
    return [_relevant(own) for own in value] if isinstance(value, list | tuple) else value
