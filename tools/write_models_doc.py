"""Write docs/models.md: attach a small random model of every causal family, and say what came of it.

python tools/write_models_doc.py       # some minutes
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import Judgement, all_families, judge  # noqa: E402

HEAD = """\
# Models

What became of a small random model of every causal family (`AutoModelForCausalLM`) that transformers {version}
can build from a config alone: attached, and greedy decoding and beam search compared with the model's own uncached
output. Written by `tools/write_models_doc.py`; `tests/equivalence/test_families_sweep.py` runs the same (`make
test-all`).

{works} work, {refused} are refused with the reason below, {unbuilt} could not be built small, {wrong} are wrong. Of
the families that let their attention be replaced (`_supports_attention_backend`) and could be built, {share}
work.

| family | | by, or why not |
|---|---|---|
"""


def row(own: Judgement) -> str:
    """One line of the table."""
    said = (own.binding if own.verdict == "works" else own.reason).replace("|", "\\|").replace("\n", " ")
    return f"| `{own.family.name}` | {own.verdict} | {said} |"


def main() -> None:
    """Judge all, and write the page."""
    torch.set_num_threads(1)
    families = all_families()
    judged = [judge(family) for family in track(families, "families", console=Console(stderr=True))]
    count = Counter(own.verdict for own in judged)
    declared = [own for own in judged if own.family.declares_backend and own.verdict != "not built"]
    working = sum(own.verdict == "works" for own in declared)
    head = HEAD.format(
        version=transformers.__version__,
        works=count["works"],
        refused=count["refused"],
        unbuilt=count["not built"],
        wrong=count["WRONG"],
        share=f"{working} of {len(declared)}",
    )
    (ROOT / "docs" / "models.md").write_text(head + "\n".join(row(own) for own in judged) + "\n")
    print(f"docs/models.md: {dict(count)}")


if __name__ == "__main__":
    main()
