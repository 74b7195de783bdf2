"""The demonstration model's training: its recipe, its network, and a run that can be saved and continued."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

CONTEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result, apart from the machine's rounding. Learning rates are the peaks."""

    steps: int
    minutes: float | None  # a budget that can end the run before its steps
    batch_tokens: int = 8192
    micro_batch_tokens: int = 2048  # what one forward pass takes: 2,048 tokens still fit a CPU's cache
    short_context_tokens: int = 256  # cheaper, and enough while the model learns words and sentences
    long_context_from: float = 0.7  # the share of the run after which windows fill the whole context
    warm_up_steps: int = 50
    decay_from: float = 0.5
    matrix_learning_rate: float = 0.02  # Muon: the hidden matrices
    other_learning_rate: float = 4e-3  # AdamW: the tied embedding, norms, biases
    weight_decay: float = 0.05
    seed: int = 20


@dataclass(kw_only=True)
class Position:
    """Where a run stands, beside its weights and optimizers; it is what a checkpoint has to remember."""

    step: int = 0
    seconds: float = 0.0
    epoch: int = 0
    window_tokens: int = 0
    windows_taken: int = 0

    def progress(self, recipe: Recipe) -> float:
        """Share of the run that is done, by steps or by minutes: whichever is nearer its end.

        Everything that is scheduled follows this figure: a slow machine decays early and never stops hot.
        """
        by_steps = self.step / recipe.steps
        by_minutes = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return min(1.0, max(by_steps, by_minutes))


def learning_rate_factor(position: Position, recipe: Recipe) -> float:
    """Warm-up, then level, then linear to zero: the share of the peak learning rates for the next step."""
    warm_up = min(1.0, (position.step + 1) / recipe.warm_up_steps)
    decay = (1.0 - position.progress(recipe)) / (1.0 - recipe.decay_from)
    return min(warm_up, decay)


def context_tokens(position: Position, recipe: Recipe) -> int:
    """Window length of the next step: short at first, the model's whole context in the last part."""
    is_long = position.progress(recipe) >= recipe.long_context_from
    return CONTEXT_TOKENS if is_long else recipe.short_context_tokens


def next_windows(tokens: np.ndarray, position: Position, recipe: Recipe, length: int) -> np.ndarray:
    """A batch of windows of `length` + 1 tokens (inputs and their successors); advances `position`.

    An epoch cuts the text once from a random offset and visits the windows in random order: nothing is seen
    twice before all is seen once, and the next epoch has its cuts elsewhere. Seed and epoch alone give the
    order, so a resumed run continues it.
    """
    count = recipe.batch_tokens // length
    per_epoch = (len(tokens) - length - 1) // length
    if position.window_tokens != length or position.windows_taken + count > per_epoch:
        position.epoch += 1
        position.window_tokens = length
        position.windows_taken = 0
    generator = np.random.default_rng((recipe.seed, position.epoch))
    offset = generator.integers(length)
    chosen = generator.permutation(per_epoch)[position.windows_taken : position.windows_taken + count]
    position.windows_taken += count
    return tokens[offset + chosen[:, None] * length + np.arange(length + 1)].astype(np.int64)


def build_model(tokenizer: Tokenizer) -> Qwen2ForCausalLM:
    """The architecture: Qwen2, two queries per key/value head, one matrix for both ends of the network."""
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    # Every layer starts as the identity: without depth to disentangle, the first steps can be large.
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def build_optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices (Jordan et al., 2024), AdamW for what is a table or a vector."""
    parameters = list(model.named_parameters())
    matrices = [weight for name, weight in parameters if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in parameters if weight.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def build_loss(model: Qwen2ForCausalLM, device: str, use_compile: bool) -> Callable[[Tensor], Tensor]:
    """The mean next-token loss in nats of windows (windows, tokens + 1), matrices multiplied in bfloat16."""

    def loss(windows: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if use_compile else loss


class Training:
    """One run: the state that a checkpoint saves, and the step that advances it."""

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, tokens: np.ndarray, device: str, use_compile: bool
    ) -> None:
        """Starts from random weights drawn from the recipe's seed; `restore` goes on from a checkpoint."""
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.tokens = tokens
        self.device = device
        self.position = Position()
        self.model = build_model(tokenizer).to(device)
        self.optimizers = build_optimizers(self.model, recipe)
        self.loss = build_loss(self.model, device, use_compile)

    def step(self) -> float:
        """Takes one optimizer step; returns its training loss in nats per token."""
        began = time.monotonic()
        factor = learning_rate_factor(self.position, self.recipe)
        length = context_tokens(self.position, self.recipe)
        windows = next_windows(self.tokens, self.position, self.recipe, length)
        micro_batches = (
            torch.from_numpy(windows).to(self.device).split(max(1, self.recipe.micro_batch_tokens // length))
        )
        total = 0.0
        for micro_batch in micro_batches:
            loss = self.loss(micro_batch) / len(micro_batches)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.seconds += time.monotonic() - began
        return total

    def save(self, path: Path) -> None:
        """Writes a checkpoint; the previous one stays whole until the new one is."""
        state = {
            "position": asdict(self.position),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        unfinished = path.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint of the same recipe (its steps and minutes may have changed)."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.position = Position(**state["position"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
