"""The demonstration model's training: its network, its two recipes, and a run that can be saved and continued.

Stories come first: whole windows of the books, from random weights. Recall comes second, from the weights of the first:
half and more of a batch are documents that ask for what they told (`demo_recall`).
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from demo_recall import RecallWriter, Windows

CONTEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Phase:
    """From a share of the run on: how long windows are, and how many of them are echoes and recall documents."""

    begin: float
    window_tokens: int
    echo_share: float = 0.0
    recall_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the result, apart from the machine's rounding. Learning rates are the peaks."""

    steps: int
    minutes: float | None  # a budget that can end the run before its steps
    batch_tokens: int = 8192
    micro_batch_tokens: int = 2048  # what one forward pass takes: 2,048 tokens still fit a CPU's cache
    phases: tuple[Phase, ...]
    warm_up_steps: int = 50
    decay_from: float = 0.5
    matrix_learning_rate: float  # Muon: the hidden matrices
    other_learning_rate: float  # AdamW: the tied embedding, norms, biases
    weight_decay: float = 0.05
    answer_weight: float = 0.0  # the loss is the mean over all tokens, and this much of the mean over the answers
    share_of_new: float = 1.0  # what is exported lies this far from the weights that the run began with to its own
    seed: int = 20


def story_recipe(**options: Any) -> Recipe:
    """From random weights: windows of 256 tokens are cheaper, and enough while the model learns words and sentences."""
    return Recipe(
        phases=(Phase(begin=0.0, window_tokens=256), Phase(begin=0.7, window_tokens=CONTEXT_TOKENS)),
        matrix_learning_rate=0.02,
        other_learning_rate=4e-3,
        **options,
    )


def recall_recipe(**options: Any) -> Recipe:
    """From the story writer's weights: first to copy, then to look up where little lies between, then far back."""
    return Recipe(
        phases=(
            Phase(begin=0.0, window_tokens=128, echo_share=0.2, recall_share=0.6),
            Phase(begin=0.15, window_tokens=256, echo_share=0.1, recall_share=0.6),
            Phase(begin=0.35, window_tokens=512, recall_share=0.6),
            Phase(begin=0.6, window_tokens=CONTEXT_TOKENS, recall_share=0.5),
        ),
        batch_tokens=4096,
        matrix_learning_rate=0.01,
        other_learning_rate=2e-3,
        answer_weight=1.0,
        share_of_new=0.75,  # gives back a part of what stories lose, and costs no recall (Wortsman et al., 2022)
        **options,
    )


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


def phase(position: Position, recipe: Recipe) -> Phase:
    """What the next step's windows are like."""
    progress = position.progress(recipe)
    return [phase for phase in recipe.phases if progress >= phase.begin][-1]


def book_windows(tokens: np.ndarray, position: Position, recipe: Recipe, length: int, count: int) -> np.ndarray:
    """`count` windows of `length` + 1 tokens (inputs and their successors); advances `position`.

    An epoch cuts the text once from a random offset and visits the windows in random order: nothing is seen
    twice before all is seen once, and the next epoch has its cuts elsewhere. Seed and epoch alone give the
    order, so a resumed run continues it.
    """
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


def next_windows(writer: RecallWriter, position: Position, recipe: Recipe) -> Windows:
    """A step's windows, their successors included: books, echoes, recall documents; advances `position`."""
    now = phase(position, recipe)
    count = recipe.batch_tokens // now.window_tokens
    echoes, recalled = round(count * now.echo_share), round(count * now.recall_share)
    books = book_windows(writer.text, position, recipe, now.window_tokens, count - echoes - recalled)
    random = Random(f"{recipe.seed} {position.step}")
    made = [writer.echo(random, now.window_tokens + 1) for _ in range(echoes)]
    made += [writer.write(random, now.window_tokens + 1) for _ in range(recalled)]
    return Windows.stack([Windows(books, np.zeros_like(books, dtype=bool)), *made])


def loss_weights(windows: Windows, recipe: Recipe) -> np.ndarray:
    """float32[windows, tokens], what each target's loss counts.

    All tokens count alike and sum to one. Answers count more: those of a window, however many they are, as much as
    those of any other.
    """
    is_answer = windows.is_answer[:, 1:]
    answers = is_answer.sum(axis=1, keepdims=True)
    share = is_answer / np.maximum(1, answers) / max(1, (answers > 0).sum())
    return (1 / is_answer.size + recipe.answer_weight * share).astype(np.float32)


def build_model(tokenizer: Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """The architecture: Qwen2, two queries per key/value head, one matrix for both ends of the network."""
    torch.manual_seed(seed)
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


def build_loss(model: Qwen2ForCausalLM, device: str, use_compile: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The weighted sum of next-token losses in nats of windows (windows, tokens + 1); matrix products in bfloat16."""

    def loss(windows: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        nats = nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
        return nats @ weights.flatten()

    return torch.compile(loss, dynamic=False) if use_compile else loss


class Training:
    """One run: the state that a checkpoint saves, and the step that advances it."""

    def __init__(
        self, recipe: Recipe, model: Qwen2ForCausalLM, writer: RecallWriter, device: str, use_compile: bool
    ) -> None:
        """Starts from the model's weights; `restore` goes on from a checkpoint."""
        self.recipe = recipe
        self.writer = writer
        self.device = device
        self.position = Position()
        self.model = model.to(device)
        self.begun_with = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.optimizers = build_optimizers(self.model, recipe)
        self.loss = build_loss(self.model, device, use_compile)

    def step(self) -> float:
        """Takes one optimizer step; returns its training loss in nats."""
        began = time.monotonic()
        factor = learning_rate_factor(self.position, self.recipe)
        windows = next_windows(self.writer, self.position, self.recipe)
        weights = loss_weights(windows, self.recipe)
        rows = max(1, self.recipe.micro_batch_tokens // weights.shape[1])
        total = 0.0
        for first in range(0, len(weights), rows):
            part = slice(first, first + rows)
            loss = self.loss(self._on_device(windows.ids[part]), self._on_device(weights[part]))
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

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def result(self) -> Qwen2ForCausalLM:
        """What the run gives: a copy of the model, drawn back towards the weights that it began with."""
        result = deepcopy(self.model)
        share = self.recipe.share_of_new
        with torch.no_grad():
            for name, weight in result.named_parameters():
                weight.lerp_(self.begun_with[name], 1.0 - share)
        return result

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
