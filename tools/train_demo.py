"""Trains the bundled demonstration model, a small story writer that can look up what it has read, and exports it.

    python tools/train_demo.py                                    # both stages: stories, then recall
    python tools/train_demo.py --start src/kvloom/demo_model      # the recall stage alone, from an exported model
    python tools/train_demo.py --device cuda --steps 6000         # longer, where there is a GPU

A run that was stopped goes on where its last checkpoint left it: call the same command again. Every
checkpoint is exported as well, so that the output folder holds a model that loads from the first minutes on.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from demo_corpus import train_tokenizer, training_tokens
from demo_export import export_model
from demo_recall import RecallWriter, examiner, measure_recall
from demo_training import Recipe, Training, build_model, recall_recipe, story_recipe

FOLDER = click.Path(path_type=Path, file_okay=False)
MEASURED_TOKENS = (256, 512, 900)
MEASURED_DOCUMENTS = 30


def prepare_text(corpus: Path, work: Path, start: Path | None) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the tokens, made once a work folder: a resumed run must see the same ones."""
    tokenizer_path, tokens_path = work / "tokenizer.json", work / "tokens.npy"
    if not tokens_path.exists():
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else train_tokenizer(corpus)
        tokenizer.save(str(tokenizer_path))
        np.save(tokens_path, training_tokens(corpus, tokenizer))
    return Tokenizer.from_file(str(tokenizer_path)), np.load(tokens_path)


class Stage:
    """One stage of the run: it trains, and saves, exports, measures and logs now and then."""

    def __init__(
        self, name: str, training: Training, tokenizer: Tokenizer, examiner: RecallWriter, work: Path, out: Path
    ) -> None:
        self.name = name
        self.training = training
        self.tokenizer = tokenizer
        self.examiner = examiner
        self.checkpoint = work / f"{name}.pt"
        self.log = work / f"{name}.jsonl"
        self.out = out
        if self.checkpoint.exists():
            training.restore(self.checkpoint)

    def run(self, save_minutes: float) -> None:
        """Steps until the stage is complete, with a progress bar."""
        position = self.training.position
        click.echo(f"{self.name}: from step {position.step}")
        saved_at = position.seconds
        with Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), "{task.description}"
        ) as bar:
            task = bar.add_task("starting", total=self.training.recipe.steps, completed=position.step)
            for loss in self._steps():
                bar.update(task, completed=position.step, description=f"loss {loss:.3f}")
                # The first export comes early, for whoever waits for a model that loads, not for one that writes.
                if (
                    position.seconds - saved_at > 60 * save_minutes
                    or position.step == self.training.recipe.warm_up_steps
                ):
                    self._save()
                    saved_at = position.seconds
        self._save()

    def _steps(self) -> Iterator[float]:
        while self.training.position.progress(self.training.recipe) < 1.0:
            loss = self.training.step()
            self._write_log(loss=round(loss, 4))
            yield loss

    def _save(self) -> None:
        self.training.save(self.checkpoint)
        result = self.training.result()
        export_model(result, self.tokenizer, self.out)
        figures = {
            f"recall_{tokens}": measure_recall(result, self.examiner, documents=MEASURED_DOCUMENTS, tokens=tokens)
            for tokens in MEASURED_TOKENS
        }
        self._write_log(**figures)

    def _write_log(self, **figures: float) -> None:
        with self.log.open("a") as lines:
            lines.write(json.dumps(asdict(self.training.position) | figures) + "\n")


@click.command(context_settings={"show_default": True})
@click.option("--corpus", type=FOLDER, default=Path("../shared/corpus"), help="Folder of books.")
@click.option("--out", type=FOLDER, default=Path("src/kvloom/demo_model"), help="Model folder.")
@click.option("--work", type=FOLDER, default=Path("build/train_demo"), help="Checkpoint folder.")
@click.option("--start", type=FOLDER, help="An exported model to begin the recall stage from, without a story stage.")
@click.option("--steps", default=2000, help="Optimizer steps of the story stage, 8,192 tokens each.")
@click.option("--minutes", type=float, help="End the story stage by then, decaying in time.")
@click.option("--recall-steps", default=1000, help="Optimizer steps of the recall stage, 4,096 tokens each.")
@click.option("--recall-minutes", type=float, help="End the recall stage by then, decaying in time.")
@click.option("--save-minutes", default=5.0, help="Minutes between checkpoints, each of which is exported.")
@click.option("--threads", default=2, help="CPU threads.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train.")
@click.option("--compile/--no-compile", "use_compile", default=True, help="Needs a C++ compiler.")
def main(
    corpus: Path,
    out: Path,
    work: Path,
    start: Path | None,
    steps: int,
    minutes: float | None,
    recall_steps: int,
    recall_minutes: float | None,
    save_minutes: float,
    threads: int,
    device: str,
    use_compile: bool,
) -> None:
    """Train the demonstration model from scratch, or go on with an unfinished run."""
    torch.set_num_threads(threads)
    tokenizer, tokens = prepare_text(corpus, work, start)
    writer = RecallWriter(tokenizer, tokens)
    # A GPU takes a whole batch at once.
    options = {} if device == "cpu" else {"micro_batch_tokens": Recipe.batch_tokens}
    recipes = {
        "stories": story_recipe(steps=steps, minutes=minutes, **options),
        "recall": recall_recipe(steps=recall_steps, minutes=recall_minutes, **options),
    }
    if start:
        model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32, local_files_only=True)
        del recipes["stories"]
    else:
        model = build_model(tokenizer, Recipe.seed)
    click.echo(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(tokens):,} tokens of text")
    for name, recipe in recipes.items():
        training = Training(recipe, model, writer, device, use_compile)
        Stage(name, training, tokenizer, examiner(tokenizer, corpus), work, out).run(save_minutes)


if __name__ == "__main__":
    main()
