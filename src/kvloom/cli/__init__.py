"""The command `kvloom`. What a program reads goes to stdout; progress, notes and summaries go to stderr.

Nothing here imports torch before a model is loaded, so that help and usage errors come at once.
"""

from __future__ import annotations

import click

from kvloom import __version__
from kvloom.cli.bench.command import bench
from kvloom.cli.chat import chat
from kvloom.cli.doctor import doctor
from kvloom.cli.explain import explain
from kvloom.cli.generate.command import generate
from kvloom.cli.group import Loom
from kvloom.cli.plan.command import plan
from kvloom.cli.score import score
from kvloom.cli.verify import verify

__all__ = ["kvloom", "main"]


@click.group(cls=Loom, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="kvloom %(version)s")
def kvloom() -> None:
    """Decode Hugging Face models on a paged, forkable, bounded and provable key/value cache.

    \b
    kvloom generate "Once upon a time"
    kvloom generate "Once upon a time" --num-beams 4 --num-return-sequences 2
    kvloom plan Qwen/Qwen2.5-0.5B-Instruct --num-beams 8
    kvloom verify --model Qwen/Qwen2.5-0.5B-Instruct

    Exit status: 0 on success, 1 if `verify` finds a difference, 2 for wrong use, 130 after Ctrl-C.
    """


kvloom.add_command(bench)
kvloom.add_command(chat)
kvloom.add_command(doctor)
kvloom.add_command(explain)
kvloom.add_command(generate)
kvloom.add_command(plan)
kvloom.add_command(score)
kvloom.add_command(verify)


def main() -> None:
    """The entry point of the command."""
    kvloom.main(prog_name="kvloom")
