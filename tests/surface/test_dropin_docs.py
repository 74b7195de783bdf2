"""`docs/dropin.md` lists every argument of the installed transformers, with its true state; the example runs."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from kvloom.decoding.options import ALREADY_SO, CHECKS, REFUSED
from kvloom.dropin import generate

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| `(\w+)` \| (\w+) \|(.*)\|$", (ROOT / "docs/dropin.md").read_text(), flags=re.MULTILINE)
TAKEN = {"input_ids", "attention_mask", "past_key_values", "tokenizer", *inspect.signature(generate).parameters} - {
    "model",
    "kwargs",
}


def test_no_argument_of_transformers_is_missing() -> None:
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    listed = [name for name, _, _ in ROWS]
    assert arguments | fields <= set(listed)
    assert len(listed) == len(set(listed)), "each argument has one row"


@pytest.mark.parametrize(("name", "state", "notes"), ROWS, ids=[name for name, _, _ in ROWS])
def test_the_state_of_an_argument_is_the_true_one(name: str, state: str, notes: str) -> None:
    taken = name in TAKEN or name in CHECKS or name in ALREADY_SO
    assert state == ("supported" if taken else "refused")
    if not taken:
        assert notes.strip() == REFUSED[name].reason


def test_the_example_gives_with_one_line_changed_what_the_script_gave() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/from_generate.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )
    assert "the same sequences: True" in run.stdout
