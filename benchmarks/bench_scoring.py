"""64 labels of two tokens behind a prompt of 1,024, beside one forward of transformers a label.

The model has Qwen2.5-0.5B's shape and random weights. Ours scores all labels in one call on a cold cache, prompt
included, and again behind a context that holds the prompt. transformers runs each label's whole sequence and is asked
for the logits of the label's rows only. Be alone on the machine.

    python benchmarks/bench_scoring.py                        # about five minutes
    python benchmarks/bench_scoring.py --theirs 8             # a sample of transformers' forwards, scaled to all labels
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import torch
from facts import tell_facts
from peers.weights import make_model
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import kvloom


def make_task(seed: int, *, labels: int, label_tokens: int, prompt_tokens: int) -> tuple[list[int], list[list[int]]]:
    """A prompt and labels of random tokens; each seed has its own, so that no prompt is found in the cache."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(150_000, (prompt_tokens + labels * label_tokens,), generator=generator).tolist()
    rest = token_ids[prompt_tokens:]
    return token_ids[:prompt_tokens], [rest[i : i + label_tokens] for i in range(0, len(rest), label_tokens)]


@torch.no_grad()
def score_apart(model: PreTrainedModel, prompt: list[int], label: list[int]) -> float:
    """One forward over the whole sequence."""
    token_ids = torch.tensor([prompt + label[:-1]])
    logits = model(token_ids, use_cache=False, logits_to_keep=len(label)).logits[0].float()
    return float(logits.log_softmax(-1)[range(len(label)), label].sum())


@click.command()
@click.option("--labels", default=64, show_default=True)
@click.option("--label-tokens", default=2, show_default=True)
@click.option("--prompt-tokens", default=1_024, show_default=True)
@click.option("--theirs", type=int, help="Time only so many of transformers' forwards.  [default: one a label]")
@click.option("--runs", default=3, show_default=True, help="Of ours, each with a prompt of its own.")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--threads", type=int, help="PyTorch's threads; by default as PyTorch has them.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(
    labels: int,
    label_tokens: int,
    prompt_tokens: int,
    theirs: int | None,
    runs: int,
    dtype: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Compare with transformers in one run."""
    if threads:
        torch.set_num_threads(threads)
    model = make_model(getattr(torch, dtype))
    lm = kvloom.attach(model)
    sizes = {"labels": labels, "label_tokens": label_tokens, "prompt_tokens": prompt_tokens}
    lm.score([[1, 2], [3, 4]], prompt=[5, 6, 7])  # threads and caches are warm before anything counts
    score_apart(model, [5, 6, 7], [1, 2])

    cold, warm = [], []
    for seed in range(runs):
        prompt, continuations = make_task(seed, **sizes)
        start = time.perf_counter()
        scores = lm.score(continuations, prompt=prompt)
        cold.append(time.perf_counter() - start)
        context = lm.prefill(prompt)
        start = time.perf_counter()
        lm.score(continuations, context=context)
        warm.append(time.perf_counter() - start)
        context.close()
    forwards, errors = [], []
    for label, score in list(zip(continuations, scores, strict=True))[:theirs]:
        start = time.perf_counter()
        logprob = score_apart(model, prompt, label)
        forwards.append(time.perf_counter() - start)
        errors.append(abs(logprob - score.logprob))

    whole = sum(forwards) * labels / len(forwards)
    figures = {
        "ours_cold_seconds": statistics.median(cold),
        "ours_behind_a_context_seconds": statistics.median(warm),
        "transformers_seconds": whole,
        "transformers_forwards_timed": len(forwards),
        "transformers_forward_seconds": statistics.median(forwards),
        "largest_difference_of_a_logprob": max(errors),
    }
    table = Table(title=f"{labels} labels of {label_tokens} tokens, a prompt of {prompt_tokens:,}")
    for heading in ("", "seconds", "faster"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("transformers, a forward a label", f"{whole:.2f}", "")
    for name, seconds in (("KVLoom, cold", statistics.median(cold)), ("KVLoom, context", statistics.median(warm))):
        table.add_row(name, f"{seconds:.3f}", f"{whole / seconds:.1f} x")
    Console().print(table)
    click.echo(f"largest difference of a log-probability: {max(errors):.4f} ({len(forwards)} labels compared)")
    facts = tell_facts(dtype=dtype, runs=runs)
    if json_path:
        json_path.write_text(json.dumps({"facts": facts, "sizes": sizes, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
