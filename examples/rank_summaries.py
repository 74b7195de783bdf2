"""Rank summaries of a text by how much more likely the text makes them.

The text is computed once; every candidate is a fork of its cache, whatever its length. A plain log-probability
favours short and common sentences, so what each candidate scores without the text is subtracted.

    python examples/rank_summaries.py                      # the bundled demonstration model
    python examples/rank_summaries.py --model Qwen/Qwen2.5-0.5B-Instruct
"""

from __future__ import annotations

import argparse

import kvloom

STORY = (
    "A fox fell into a deep well and could not get out again. By and by a thirsty goat came past, and asked whether "
    'the water was good. "It is the best in all the land," said the fox. "Jump in and try it." The goat jumped in, '
    "and the fox climbed upon his horns, sprang out of the well, and ran away."
)
QUESTION = "\n\nThis is the story of how"
SUMMARIES = [
    " the king gave his daughter to the youngest brother.",
    " the fox and the goat were married in the church and lived happily together for many years.",
    " the fox tricked the goat and got out of the well.",
    " the goat ate the fox for his supper.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank summaries of a story.")
    parser.add_argument("--model", help="a folder or a hub id; by default the bundled demonstration model")
    lm = kvloom.load(parser.parse_args().model, dtype="float32")

    story = lm.prefill(STORY)
    told = lm.score(SUMMARIES, prompt=QUESTION, context=story)
    untold = lm.score(SUMMARIES, prompt="Once upon a time." + QUESTION)
    gains = [with_it.logprob - without.logprob for with_it, without in zip(told, untold, strict=True)]
    for place, index in enumerate(sorted(range(len(gains)), key=lambda i: -gains[i]), start=1):
        own = told[index]
        print(f"{place}. {gains[index]:+6.2f}  {own.mean_logprob:.2f} a token  {str(own.text).strip()}")
    found, tokens = told.usage.cached_prompt_tokens, told.usage.prompt_tokens
    print(f"{found} of {tokens} prompt tokens came from the cache, {told.usage.seconds:.3f} s")


if __name__ == "__main__":
    main()
