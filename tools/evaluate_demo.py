"""Measures the demonstration model on whole books and on planted facts, and lets it write.

    python tools/evaluate_demo.py bits       # bits per byte, the held-out books first
    python tools/evaluate_demo.py recall     # facts planted in the held-out books, by length of text
    python tools/evaluate_demo.py samples    # stories by three decoding methods

All print Markdown, as the model card quotes it. All decode with Hugging Face Transformers only: figures and stories
then do not depend on the library that the model demonstrates.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from demo_corpus import END_OF_TEXT, HELD_OUT_BOOKS, held_out_books
from demo_recall import examiner, measure_recall

# Training books that resemble the held-out ones: a coloured fairy book, a family novel, talking animals.
COMPARED_TRAINING_BOOKS = ("crimson-fairy-book.txt", "secret-garden.txt", "jungle-book.txt")
PROMPTS = (
    "Once upon a time",
    "The children ran down to the river, and",
    '"Who are you?" asked the princess.',
)
WINDOWS_A_BATCH = 8
RECALL_TOKENS = (128, 256, 384, 512, 640, 768, 896, 1024)
TOKENS_A_FACT = 60  # statement, question and answer, and some text around
FOLDER = click.Path(path_type=Path, file_okay=False)
DECODING_METHODS = {
    "greedy": {"do_sample": False},
    "greedy, repetition penalty 1.3": {"do_sample": False, "repetition_penalty": 1.3},
    "sampled, temperature 0.8, top-p 0.95": {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 0,
    },
}


def scored_windows(ids: list[int], context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most `context` + 1 ids, each with how many of its last ids to score.

    All ids but the first are scored, once; past the first window, with `context` - `stride` ids before them.
    """
    scored = 1
    while scored < len(ids):
        # The first window scores all it holds; a later one keeps context - stride ids as what came before.
        end = min(len(ids), context + 1 if scored == 1 else scored + stride)
        yield ids[max(0, end - context - 1) : end], end - scored
        scored = end


@torch.inference_mode()
def window_bits(model: PreTrainedModel, windows: list[tuple[list[int], int]]) -> float:
    """The summed negative log2-likelihood of the ids to score in scored windows of one length."""
    ids = torch.tensor([window for window, _ in windows])
    logits: Tensor = model(ids[:, :-1], use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    kept = [row[-count:].double().sum().item() for row, (_, count) in zip(nats, windows, strict=True)]
    return sum(kept) / math.log(2)


def text_bits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, stride: int) -> float:
    """Bits to write `text` after an end-of-text token, with overlapping windows of the whole context."""
    ids = tokenizer(text, verbose=False).input_ids
    if tokenizer.decode(ids) != text:
        raise ValueError("The tokenizer changes this text (NFC?): bits per byte would not count its bytes.")
    context = model.config.max_position_embeddings
    windows = list(scored_windows([tokenizer.convert_tokens_to_ids(END_OF_TEXT), *ids], context, stride))
    bits = 0.0
    for _, group in groupby(windows, key=lambda window: len(window[0])):
        same_length = list(group)
        for first in range(0, len(same_length), WINDOWS_A_BATCH):
            bits += window_bits(model, same_length[first : first + WINDOWS_A_BATCH])
    return bits


def load(folder: Path, threads: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The exported model; float32 arithmetic on its bfloat16 weights, so figures do not hang on rounding."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@click.group(context_settings={"show_default": True})
@click.option("--model", "folder", type=FOLDER, default=Path("src/kvloom/demo_model"))
@click.option("--threads", default=2, help="CPU threads.")
@click.pass_context
def main(context: click.Context, folder: Path, threads: int) -> None:
    """Evaluate an exported demonstration model."""
    context.obj = load(folder, threads)


@main.command()
@click.option("--corpus", type=FOLDER, default=Path("../shared/corpus"), help="Folder of books.")
@click.option("--stride", default=512, help="Ids that a window scores; the rest of its context is overlap.")
@click.pass_obj
def bits(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], corpus: Path, stride: int) -> None:
    """Print bits per byte of the held-out books, together and each, and of some training books."""
    model, tokenizer = loaded
    click.echo("| text | bytes | bits per byte |\n|---|---|---|")

    def report(label: str, paths: Iterable[Path]) -> None:
        total_bits, total_bytes, rows = 0.0, 0, []
        for path in paths:
            text = path.read_text("utf-8")
            book_bits, book_bytes = text_bits(model, tokenizer, text, stride), len(text.encode("utf-8"))
            rows.append(f"| {path.name} | {book_bytes:,} | {book_bits / book_bytes:.4f} |")
            total_bits, total_bytes = total_bits + book_bits, total_bytes + book_bytes
        rows.insert(0, f"| **{label}** | {total_bytes:,} | **{total_bits / total_bytes:.4f}** |")
        click.echo("\n".join(rows))

    report(f"held out ({len(HELD_OUT_BOOKS)} books)", held_out_books(corpus))
    report("trained on (similar books)", [corpus / name for name in COMPARED_TRAINING_BOOKS])


@main.command()
@click.option("--corpus", type=FOLDER, default=Path("../shared/corpus"), help="Folder of books.")
@click.option("--documents", default=100, help="Texts of each length.")
@click.option("--facts", multiple=True, type=int, default=(2, 8), help="Facts in a text; each is asked for.")
@click.option("--seed", default=1, help="Of texts, facts and places.")
@click.pass_obj
def recall(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    corpus: Path,
    documents: int,
    facts: tuple[int, ...],
    seed: int,
) -> None:
    """Print the share of questions answered to the last token, with names and values that training never used."""
    model, tokenizer = loaded
    writer = examiner(tokenizer.backend_tokenizer, corpus)
    click.echo(
        "| tokens | " + " | ".join(f"{count} facts" for count in facts) + " |\n" + "|---" * (len(facts) + 1) + "|"
    )
    for tokens in RECALL_TOKENS:
        shares = [
            measure_recall(model, writer, documents=documents, tokens=tokens, facts=count, seed=seed)
            if tokens >= TOKENS_A_FACT * count
            else None
            for count in facts
        ]
        click.echo(f"| {tokens} | " + " | ".join("" if own is None else f"{own:.1%}" for own in shares) + " |")


@main.command()
@click.option("--prompt", "prompts", multiple=True, default=PROMPTS, help="A beginning; may be repeated.")
@click.option("--tokens", default=160, help="New tokens at most.")
@click.option("--seed", default=0, help="Of the sampled stories.")
@click.pass_obj
def samples(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], prompts: tuple[str, ...], tokens: int, seed: int
) -> None:
    """Print a continuation of each prompt by each decoding method."""
    model, tokenizer = loaded
    for method, options in DECODING_METHODS.items():
        for prompt in prompts:
            set_seed(seed)
            inputs = tokenizer(prompt, return_tensors="pt")
            written = model.generate(**inputs, max_new_tokens=tokens, **options)[0]
            story = tokenizer.decode(written, skip_special_tokens=True).strip()
            quoted = "\n".join(f"> {line}".rstrip() for line in story.splitlines())
            click.echo(f"**{method}**\n\n{quoted}\n")


if __name__ == "__main__":
    main()
