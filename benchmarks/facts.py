"""What figures depend on, told beside them."""

from __future__ import annotations

import os
import platform

import click
import torch
import transformers

import kvloom


def tell_facts(**of_the_run: object) -> dict[str, object]:
    """Print, and return, what the figures depend on: versions, threads, the machine, and what the run adds."""
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvloom": kvloom.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **of_the_run,
    }
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    return facts
