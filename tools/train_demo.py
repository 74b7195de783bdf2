"""Trains the bundled demonstration model, a small story writer, from scratch and exports it.

    python tools/train_demo.py                                    # CPU, about an hour on two free cores
    python tools/train_demo.py --device cuda --steps 6000         # longer, where there is a GPU

A run that was stopped goes on where its last checkpoint left it: call the same command again. Every
checkpoint is exported as well, so that the output folder holds a model that loads from the first minutes on.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from demo_corpus import train_tokenizer, training_tokens
from demo_export import export_model
from demo_training import Recipe, Training

FOLDER = click.Path(path_type=Path, file_okay=False)


def prepare_text(corpus: Path, work: Path) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the tokens, made once a work folder: a resumed run must see the same ones."""
    tokenizer_path, tokens_path = work / "tokenizer.json", work / "tokens.npy"
    if not tokens_path.exists():
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(corpus)
        tokenizer.save(str(tokenizer_path))
        np.save(tokens_path, training_tokens(corpus, tokenizer))
    return Tokenizer.from_file(str(tokenizer_path)), np.load(tokens_path)


def run(training: Training, checkpoint: Path, save: Callable[[], None], save_minutes: float) -> None:
    """Steps until the run is complete, with a progress bar, saving now and then."""
    recipe, position = training.recipe, training.position
    log = checkpoint.with_name("log.jsonl")
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    saved_at = position.seconds
    with Progress(*columns) as bar, log.open("a", buffering=1) as lines:
        task = bar.add_task("starting", total=recipe.steps, completed=position.step)
        while position.progress(recipe) < 1.0:
            loss = training.step()
            bar.update(task, completed=position.step, description=f"loss {loss:.3f}")
            lines.write(json.dumps(asdict(position) | {"loss": round(loss, 4)}) + "\n")
            # The first export comes early, for whoever waits for a model that loads, not for one that writes.
            if position.seconds - saved_at > 60 * save_minutes or position.step == recipe.warm_up_steps:
                save()
                saved_at = position.seconds
    save()


@click.command(context_settings={"show_default": True})
@click.option("--corpus", type=FOLDER, default=Path("../shared/corpus"), help="Folder of books.")
@click.option("--out", type=FOLDER, default=Path("src/kvloom/demo_model"), help="Model folder.")
@click.option("--work", type=FOLDER, default=Path("build/train_demo"), help="Checkpoint folder.")
@click.option("--steps", default=2000, help="Optimizer steps of the whole run, 8,192 tokens each.")
@click.option("--minutes", type=float, help="End the run by then, decaying in time.")
@click.option("--save-minutes", default=5.0, help="Minutes between checkpoints, each of which is exported.")
@click.option("--threads", default=2, help="CPU threads.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to train.")
@click.option("--compile/--no-compile", "use_compile", default=True, help="Needs a C++ compiler.")
def main(
    corpus: Path,
    out: Path,
    work: Path,
    steps: int,
    minutes: float | None,
    save_minutes: float,
    threads: int,
    device: str,
    use_compile: bool,
) -> None:
    """Train the demonstration model from scratch, or go on with an unfinished run."""
    torch.set_num_threads(threads)
    micro_batch_tokens = Recipe.micro_batch_tokens if device == "cpu" else Recipe.batch_tokens
    recipe = Recipe(steps=steps, minutes=minutes, micro_batch_tokens=micro_batch_tokens)
    tokenizer, tokens = prepare_text(corpus, work)
    training = Training(recipe, tokenizer, tokens, device, use_compile)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        training.restore(checkpoint)

    def save() -> None:
        training.save(checkpoint)
        export_model(training.model, tokenizer, out)

    parameters = sum(weight.numel() for weight in training.model.parameters())
    start = training.position.step
    click.echo(f"{parameters:,} parameters, {len(tokens):,} tokens of text, from step {start}")
    run(training, checkpoint, save, save_minutes)


if __name__ == "__main__":
    main()
