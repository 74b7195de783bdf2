"""What every test has at hand. The small models themselves are in `tiny.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before torch and transformers are imported, and inherited by every command that a test starts:
# nothing reaches for the network, and small models run faster on one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import register_random, settings

ROOT = Path(__file__).resolve().parent.parent

# Shared machines are slow now and then; that is no failure. The same examples are drawn every time, so that a change
# fails for what it changed; `make test-all` draws others each time.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("others", deadline=None, print_blob=True)
settings.load_profile("same")


class TorchRandom:
    """torch's generator, as Hypothesis wants it: an example draws the same tensors when it is repeated."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps a weak reference only.
register_random(TORCH_RANDOM)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, tokenizers and texts that lies beside the checkout (or in it)."""
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if (folder / "models").is_dir():
            return folder
    pytest.skip("no shared/ folder with test data beside the checkout or in it")


def _part_of(shared: Path, name: str) -> Path:
    if not (shared / name).exists():
        pytest.skip(f"the shared/ folder has no {name}")
    return shared / name


@pytest.fixture(scope="session")
def stories260k(shared: Path) -> Path:
    """A real Llama-architecture model with golden greedy output; its stories end with id 1."""
    return _part_of(shared, "models/stories260K")


@pytest.fixture(scope="session")
def gpt2_capp(shared: Path) -> Path:
    """A real GPT-2-architecture model with a vocabulary of 53 and no tokenizer."""
    return _part_of(shared, "models/gpt2-capp")


@pytest.fixture(scope="session")
def qwen2_tokenizer(shared: Path) -> Path:
    """The tokenizer files of Qwen2 and Qwen2.5, without weights."""
    return _part_of(shared, "tokenizers/qwen2")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., object]:
    """`tiny_model(family, seed=0, **config_fields)`: a fresh random model on each call, see `tiny.py`."""
    import tiny

    return tiny.tiny_model
