"""KVLoom beside other engines, on one model: Qwen2.5-0.5B's shape with random weights, made on the spot.

Each peer runs in a process and, if need be, an environment of its own; runs alternate between them, and those
whose turn it is not are stopped meanwhile. What counts are ratios of medians of one run. A peer that is not
installed is named as skipped. Be alone on the machine.

    python benchmarks/bench_peers.py --runs 3 --json peers.json
    python benchmarks/bench_peers.py --make-envs       # first: an environment for each, in benchmarks/peers/envs
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from facts import tell_facts
from peers.protocol import Job, Timing
from peers.weights import VOCABULARY, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvloom.bench.bandwidth import read_bandwidth

PEERS = Path(__file__).parent / "peers"
OURS = "kvloom"
PACKAGES = {
    "openvino": ["openvino-genai", "openvino-tokenizers", "optimum-intel"],
    "llamacpp": ["llama-cpp-python", "gguf"],
    "ctranslate2": ["ctranslate2", "torch", "transformers"],
}
"""What a peer needs in an environment of its own; those not named here run in ours."""

NAMES = {
    "kvloom": "KVLoom",
    "transformers": "transformers",
    "transformers_batch": "its generate_batch",
    "openvino": "OpenVINO GenAI",
    "llamacpp": "llama.cpp",
    "ctranslate2": "CTranslate2",
}


@dataclass(frozen=True)
class Setting:
    """One kind of work; `lengths` in tokens, one a prompt. `measures`: of "prefill", "step" and "total"."""

    name: str
    beams: int
    lengths: tuple[int, ...]
    new: int
    measures: tuple[str, ...]

    def job(self, seed: int) -> Job:
        """With prompts of its own for every seed, so that no peer finds a prefix in its cache."""
        draw = random.Random(f"{self.name} {seed}")
        prompts = [[draw.randrange(VOCABULARY - 1_000) for _ in range(length)] for length in self.lengths]
        return Job(prompts, self.beams, self.new)


SETTINGS = (
    Setting("1x512", 1, (512,), 32, ("prefill", "step")),
    Setting("4x512", 4, (512,), 32, ("step",)),
    Setting("8x2048", 8, (2_048,), 64, ("prefill", "step", "total")),
    Setting("ragged", 1, tuple(64 + 448 * index // 15 for index in range(16)), 64, ("total",)),
)

TITLES = {
    ("1x512", "prefill"): "prefill of 512 tokens",
    ("1x512", "step"): "greedy step after 512 tokens",
    ("4x512", "step"): "step of 4 beams after 512",
    ("8x2048", "prefill"): "prefill for 8 beams, 2,048 tokens",
    ("8x2048", "step"): "step of 8 beams after 2,048",
    ("8x2048", "total"): "8 beams, 2,048 tokens, 64 new",
    ("ragged", "total"): "16 prompts of 64 to 512, 64 new each",
}


class Peer:
    """A running peer."""

    def __init__(self, name: str, python: Path, folder: Path, threads: int) -> None:
        self.name = name
        command = [str(python), str(PEERS / f"{name}_peer.py"), str(folder), "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.versions = str(self._answer()["versions"])
        self._process.send_signal(signal.SIGSTOP)

    def run(self, job: Job) -> Timing | str:
        """Its timing, or why there is none. It is awake for that long only."""
        self._process.send_signal(signal.SIGCONT)
        try:
            return self._ask(job)
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()

    def _ask(self, job: Job) -> Timing | str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return str(answer["unsupported"]) if "unsupported" in answer else Timing(**answer)

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer `{self.name}` ended without an answer: run its script by hand to see why.")
        return json.loads(line)


def find_python(name: str, given: dict[str, Path]) -> Path | None:
    """The interpreter of a peer; None if it has no environment."""
    if name in given or name not in PACKAGES:
        return given.get(name, Path(sys.executable))
    own = PEERS / "envs" / name / "bin" / "python"
    return own if own.exists() else None


def make_environments() -> None:
    """One for each peer that needs one; what cannot be installed is told, and skipped later."""
    for name, packages in PACKAGES.items():
        folder = PEERS / "envs" / name
        click.echo(f"{name}: {', '.join(packages)}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages]).returncode:
            click.echo(f"{name} could not be installed.", err=True)


def measure(peer: Peer, setting: Setting, seed: int) -> Timing | str:
    """One run. Where a peer cannot tell its steps, a second run of one token tells what the prompt cost."""
    timing = peer.run(setting.job(seed))
    if isinstance(timing, str) or timing.steps is not None or setting.measures == ("total",):
        return timing
    prompt = peer.run(replace(setting.job(-1 - seed), new=1))
    if isinstance(prompt, str):
        return prompt
    return Timing(timing.total, prompt.total, [(timing.total - prompt.total) / (setting.new - 1)])


def medians(timings: list[Timing], measures: tuple[str, ...]) -> dict[str, float]:
    """Seconds of each measure."""
    values = {
        "total": [own.total for own in timings],
        "prefill": [own.prefill for own in timings if own.prefill is not None],
        "step": [step for own in timings for step in own.steps or ()],
    }
    return {name: statistics.median(values[name]) for name in measures}


@contextmanager
def started(names: list[str], given: dict[str, Path], folder: Path, threads: int) -> Iterator[list[Peer]]:
    """The peers that are installed, stopped until their turn; the others are named."""
    peers: list[Peer] = []
    try:
        for name in names:
            python = find_python(name, given)
            if python is None:
                click.echo(f"{NAMES[name]} is skipped: it is not installed (see --make-envs).", err=True)
                continue
            try:
                peers.append(Peer(name, python, folder, threads))
            except RuntimeError as error:
                click.echo(f"{NAMES[name]} is skipped: {error}", err=True)
        yield peers
    finally:
        for peer in peers:
            peer.close()


def run_all(peers: list[Peer], settings: list[Setting], runs: int) -> dict[str, dict[str, dict[str, float] | str]]:
    """By setting and peer: medians, or why there are none."""
    timings: dict[tuple[str, str], list[Timing]] = {}
    reasons: dict[tuple[str, str], str] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(settings) * runs * len(peers))
        for peer in peers:
            peer.run(Job([[1, 2, 3]], 1, 4))  # threads and caches are warm before anything counts
        for setting in settings:
            for seed in range(runs):
                for peer in peers:
                    progress.update(task, description=f"{setting.name} {NAMES[peer.name]}")
                    key = setting.name, peer.name
                    result = reasons[key] if key in reasons else measure(peer, setting, seed)
                    if isinstance(result, str):
                        reasons[key] = result
                    else:
                        timings.setdefault(key, []).append(result)
                    progress.advance(task)
    return {
        setting.name: {
            peer.name: reasons.get((setting.name, peer.name))
            or medians(timings[setting.name, peer.name], setting.measures)
            for peer in peers
        }
        for setting in settings
    }


def render(results: dict[str, dict[str, dict[str, float] | str]], peers: list[Peer]) -> Table:
    """Milliseconds, and in parentheses how many times KVLoom's they are."""
    table = Table(title="milliseconds (times KVLoom's)")
    table.add_column("work")
    for peer in peers:
        table.add_column(NAMES[peer.name], justify="right")
    for setting in (own for own in SETTINGS if own.name in results):
        for name in setting.measures:
            cells = []
            ours = results[setting.name].get(OURS)
            for peer in peers:
                own = results[setting.name][peer.name]
                if isinstance(own, str):
                    cells.append("-")
                    continue
                ratio = "" if peer.name == OURS or not isinstance(ours, dict) else f" ({own[name] / ours[name]:.2f})"
                cells.append(f"{own[name] * 1e3:,.1f}{ratio}")
            table.add_row(TITLES[setting.name, name], *cells)
    return table


@click.command()
@click.option("--peer", "names", multiple=True, type=click.Choice(list(NAMES)), help="Only these.")
@click.option(
    "--setting", "wanted", multiple=True, type=click.Choice([own.name for own in SETTINGS]), help="Only these."
)
@click.option("--runs", default=3, show_default=True, help="Alternated runs of each setting.")
@click.option("--threads", default=2, show_default=True)
@click.option("--env", "environments", multiple=True, metavar="PEER=PYTHON", help="The interpreter of a peer.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Keep the models here.")
@click.option("--make-envs", is_flag=True, help="Install the peers first, each in an environment of its own.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the figures here."
)
def main(
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    runs: int,
    threads: int,
    environments: tuple[str, ...],
    folder: Path | None,
    make_envs: bool,
    json_path: Path | None,
) -> None:
    """Compare with other engines in one run."""
    if make_envs:
        make_environments()
    given = {name: Path(python) for name, _, python in (own.partition("=") for own in environments)}
    settings = [own for own in SETTINGS if not wanted or own.name in wanted]
    bandwidth = read_bandwidth(torch.device("cpu"))
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        model = Path(place)
        if not (model / "config.json").exists():
            save(model)
        with started(list(names) or list(NAMES), given, model, threads) as peers:
            results = run_all(peers, settings, runs)
            Console(width=150).print(render(results, peers))
            for setting, own in results.items():
                for peer, reason in own.items():
                    if isinstance(reason, str):
                        click.echo(f"{setting}: {NAMES[peer]} {reason}.")
            versions = {peer.name: peer.versions for peer in peers}
            facts = tell_facts(runs=runs, **versions, **{"read bandwidth": f"{bandwidth / 1e9:.0f} GB/s"})
    if json_path:
        json_path.write_text(json.dumps({"facts": facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
