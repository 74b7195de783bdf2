"""Classify texts by how likely a model finds each label behind them. No training, no generation.

Labels of several words are scored together: each text is computed once, and every label is a fork of its cache.
A label's own frequency is taken out by scoring it behind a prompt without a text (Holtzman et al. 2021, "Surface
Form Competition", section 3: domain-conditional pointwise mutual information).

    python examples/classify_texts.py                      # the bundled demonstration model
    python examples/classify_texts.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

import argparse

import kvloom

QUESTION = " It was all about"
LABELS = [" a royal palace", " the wide sea", " the dark forest", " a poor cottage"]
TEXTS = [
    "The king sat upon his golden throne, and the princess wore a crown of pearls.",
    "The fisherman cast his net from the boat, and the waves rose high in the storm.",
    "The wolf crept through the forest, and the fox hid behind the old oak tree.",
    "The mother baked bread in the oven and swept the floor of the little kitchen.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify a few texts.")
    parser.add_argument("--model", help="a folder or a hub id; by default the bundled demonstration model")
    lm = kvloom.load(parser.parse_args().model, dtype="float32")

    expected = [own.logprob for own in lm.score(LABELS, prompt="The" + QUESTION)]
    for text in TEXTS:
        scores = lm.score(LABELS, prompt=text + QUESTION)
        gains = [own.logprob - before for own, before in zip(scores, expected, strict=True)]
        best = max(range(len(LABELS)), key=gains.__getitem__)
        print(f"{LABELS[best].strip():<16} {gains[best]:+.2f}  {text}")
    usage = scores.usage
    print(f"the last text: {usage.prompt_tokens} tokens, {usage.new_tokens} tokens of labels, {usage.seconds:.3f} s")


if __name__ == "__main__":
    main()
