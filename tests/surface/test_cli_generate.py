"""`kvloom generate`: what goes to stdout and stderr, in a pipe and in a terminal."""

from __future__ import annotations

import itertools
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kvloom
from kvloom.cli import kvloom as command

KVLOOM = [sys.executable, "-m", "kvloom"]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def lm(stories260k: Path) -> kvloom.LanguageModel:
    return kvloom.load(stories260k)


@pytest.fixture
def run(stories260k: Path) -> Any:
    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(command, ["generate", *arguments, "--model", str(stories260k)], input=stdin)

    return run


def json_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


# ---- what is printed -------------------------------------------------------------------------------------------


def test_greedy_ids_are_the_golden_ones(run: Any, stories260k: Path) -> None:
    golden = json.loads((stories260k / "golden_greedy.json").read_text())
    for case in golden[:3]:
        count = len(case["greedy_ids"])
        found = json_of(run(case["prompt"], "--json", "--max-new-tokens", str(count), "--eos-token-id", "none"))
        assert found["prompt_token_ids"] == case["prompt_ids"]
        assert found["generations"][0]["token_ids"] == case["greedy_ids"]


def test_stdout_is_exactly_the_text_and_stderr_tells_what_it_cost(run: Any, lm: kvloom.LanguageModel) -> None:
    shown = run(PROMPT, "--max-new-tokens", "40")
    assert shown.exit_code == 0
    assert shown.stdout == lm.generate(PROMPT, max_new_tokens=40).text
    assert "5 tokens, 0 found in the cache, 5 computed" in shown.stderr
    assert "40 tokens, " in shown.stderr and "tokens/s" in shown.stderr
    assert "3 blocks at the peak, 60.0 KiB of keys and values" in shown.stderr
    assert "length, as long as was asked for" in shown.stderr


def test_quiet_leaves_stderr_empty(run: Any) -> None:
    assert run(PROMPT, "--max-new-tokens", "4", "-q", "--length-penalty", "2").stderr == ""


@pytest.mark.parametrize("arguments", [["-"], []])
def test_the_prompt_may_come_through_a_pipe_and_loses_one_newline(
    run: Any, lm: kvloom.LanguageModel, arguments: list[str]
) -> None:
    expected = lm.generate(PROMPT, max_new_tokens=8).text
    assert run(*arguments, "--max-new-tokens", "8", stdin=PROMPT + "\n").stdout == expected
    two = run(*arguments, "--max-new-tokens", "8", "--json", stdin=PROMPT + "\n\n")
    assert json_of(two)["prompt"] == PROMPT + "\n"


def test_without_a_number_it_writes_128_tokens_or_what_the_context_leaves(run: Any, lm: kvloom.LanguageModel) -> None:
    assert json_of(run(PROMPT, "--json"))["usage"]["new_tokens"] == 128
    ids = " ".join(["5"] * 500)
    assert json_of(run(ids, "--token-ids", "--json"))["usage"]["new_tokens"] == 12


def test_json_holds_everything_and_stands_alone_on_stdout(run: Any, lm: kvloom.LanguageModel) -> None:
    shown = run(PROMPT, "--json", "--max-new-tokens", "6", "--logprobs", "3")
    assert shown.stdout.count("\n") == 1
    found = json_of(shown)
    expected = lm.generate(PROMPT, max_new_tokens=6, top_logprobs=3)
    (own,) = found["generations"]
    assert own["text"] == expected.text
    assert own["token_ids"] == expected.token_ids
    assert own["tokens"] == expected.tokens
    assert own["logprobs"] == pytest.approx(expected.logprobs)
    assert own["top_logprobs"][0]["token_ids"] == expected.top_logprobs[0].token_ids
    assert own["finish_reason"] == "length" and own["score"] is None
    assert found["settings"]["max_new_tokens"] == 6 and found["settings"]["do_sample"] is False
    assert found["usage"]["prompt_tokens"] == 5 and found["usage"]["peak_blocks"] == 1
    assert (found["dtype"], found["device"], found["kvloom"]) == ("float32", "cpu", kvloom.__version__)


def test_beams_are_shown_best_first_with_their_scores(run: Any, lm: kvloom.LanguageModel) -> None:
    arguments = ["--num-beams", "4", "--num-return-sequences", "3", "--max-new-tokens", "12", "--length-penalty", "0.5"]
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12, "length_penalty": 0.5}
    expected = lm.beam_search(PROMPT, **options)
    sections = "\n\n".join(f"[{n}] score {own.score:.4f}\n{own.text}" for n, own in enumerate(expected, start=1))
    shown = run(PROMPT, *arguments)
    assert shown.stdout == sections + "\n"
    found = json_of(run(PROMPT, *arguments, "--json"))["generations"]
    assert [own["score"] for own in found] == pytest.approx([own.score for own in expected])
    assert run(PROMPT, *arguments[:2], *arguments[4:]).stdout == lm.beam_search(PROMPT, **options)[0].text


def test_ids_in_are_ids_out(run: Any, lm: kvloom.LanguageModel) -> None:
    expected = " ".join(map(str, lm.generate([1, 403, 407], max_new_tokens=7).token_ids))
    assert run("1, 403,407", "--token-ids", "--max-new-tokens", "7").stdout == expected
    assert run("1 403 407", "--token-ids", "--max-new-tokens", "7", "--num-beams", "1").stdout == expected


def test_a_model_without_tokenizer_takes_ids_and_says_so_of_text(gpt2_capp: Path) -> None:
    shown = CliRunner().invoke(command, ["generate", "1 2 40", "--token-ids", "--model", str(gpt2_capp)])
    assert shown.exit_code == 0 and shown.stdout.replace(" ", "").isdecimal()
    refused = CliRunner().invoke(command, ["generate", "text", "--model", str(gpt2_capp)])
    assert refused.exit_code == 2 and "no tokenizer. Pass token ids with --token-ids." in refused.stderr


def test_a_table_of_tokens_stands_on_stderr(run: Any) -> None:
    shown = run(PROMPT, "--max-new-tokens", "3", "--logprobs", "2", "--quiet")
    lines = [line.split() for line in shown.stderr.splitlines() if line.strip()]
    assert lines[0] == ["#", "id", "token", "logprob", "p", "likeliest"]
    assert lines[2][:4] == ["1", "432", "','", "-0.0317"]
    assert len(run(PROMPT, "--max-new-tokens", "3", "--logprobs").stderr.splitlines()) > 5


def test_without_the_cache_the_text_is_the_same(run: Any) -> None:
    cached, uncached = (run(PROMPT, "--max-new-tokens", "20", *extra) for extra in ([], ["--no-cache"]))
    assert cached.stdout == uncached.stdout
    assert "cache   off" in uncached.stderr


def test_stop_texts_and_eos_ids_end_the_text(run: Any) -> None:
    stopped = run(PROMPT, "--max-new-tokens", "60", "--stop", "girl", "--stop", "never")
    assert stopped.stdout.endswith("girl") and "stop, a stop text was met" in stopped.stderr
    ended = run(PROMPT, "--max-new-tokens", "60", "--eos-token-id", "286", "--eos-token-id", "499")
    assert "eos, the model ended the text" in ended.stderr
    beyond = run(PROMPT, "--max-new-tokens", "60", "--eos-token-id", "286", "--min-new-tokens", "9", "--json")
    assert json_of(beyond)["usage"]["new_tokens"] >= 10


# ---- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [["--temperature", "1.5"], ["--top-p", "0.95"], ["--top-k", "9"], ["--min-p", "0.01"]]
)
def test_a_sampling_parameter_implies_sampling(run: Any, lm: kvloom.LanguageModel, option: list[str]) -> None:
    name, value = option[0].removeprefix("--").replace("-", "_"), float(option[1])
    expected = lm.generate(
        PROMPT, do_sample=True, seed=3, max_new_tokens=25, **{name: int(value) if name == "top_k" else value}
    )
    shown = run(PROMPT, *option, "--seed", "3", "--max-new-tokens", "25")
    assert shown.stdout == expected.text
    assert "seed    3 gives the same text again" in shown.stderr


def test_a_sampling_parameter_beside_no_do_sample_is_a_contradiction(run: Any) -> None:
    shown = run(PROMPT, "--top-p", "0.9", "--no-do-sample")
    assert shown.exit_code == 2 and "`--top-p` and `--no-do-sample` contradict each other" in shown.stderr


def test_the_seed_that_was_drawn_gives_the_same_text_again(run: Any) -> None:
    first = json_of(run(PROMPT, "--do-sample", "--temperature", "1.2", "--json", "--max-new-tokens", "20"))
    seed = str(first["settings"]["seed"])
    again = json_of(
        run(PROMPT, "--do-sample", "--temperature", "1.2", "--json", "--max-new-tokens", "20", "--seed", seed)
    )
    assert again["generations"] == first["generations"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seed", "3"], "`--seed` has no effect"),
        (["--early-stopping", "true"], "`--early-stopping true` has no effect: it needs --num-beams above 1"),
        (["--min-new-tokens", "9"], "minimum length"),
    ],
)
def test_an_option_without_effect_is_noted_once(run: Any, arguments: list[str], named: str) -> None:
    shown = run(PROMPT, "--max-new-tokens", "3", *arguments)
    assert shown.exit_code == 0
    assert shown.stderr.count("note: ") == 1 and named in shown.stderr


# ---- as a process: terminals, pipes, signals ----------------------------------------------------------------------


def test_help_and_usage_errors_come_without_importing_torch() -> None:
    script = (
        "import sys\n"
        "from kvloom.cli import kvloom\n"
        "for line in (['--help'], ['generate', '--help'], ['verify', '-h'], ['generate', 'x', '--num-beem', '3']):\n"
        "    try:\n"
        "        kvloom.main(line)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


class Terminal:
    """A command whose stdin, stdout and stderr are one terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [*KVLOOM, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.output = ""

    def read_until(self, text: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output!r}"
            if not select.select([self._master], [], [], 0.5)[0]:
                continue
            try:
                self.output += os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                assert text in self.output, f"ended without {text!r}: {self.output!r}"

    def finish(self) -> int:
        status = self.process.wait(timeout=60)
        while select.select([self._master], [], [], 0.2)[0]:
            try:
                self.output += os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError:
                break
        os.close(self._master)
        return status


def test_in_a_terminal_the_prompt_stands_dim_before_the_text_and_no_bar_after_it(
    stories260k: Path, lm: kvloom.LanguageModel
) -> None:
    terminal = Terminal("generate", PROMPT, "--model", str(stories260k), "--max-new-tokens", "30")
    terminal.read_until("finish")
    assert terminal.finish() == 0
    text = lm.generate(PROMPT, max_new_tokens=30).text
    assert f"\x1b[2m{PROMPT}\x1b[0m{text}\r\n" in terminal.output
    assert terminal.output.count("\x1b[?25l") == terminal.output.count("\x1b[?25h"), "the cursor is shown again"


def test_no_ngram_is_written_twice(run: Any) -> None:
    options = ("--max-new-tokens", "60", "--json")
    for beams in ("1", "3"):
        looped, found = (
            json_of(run(PROMPT, "--num-beams", beams, "--no-repeat-ngram-size", size, *options))["generations"][0][
                "token_ids"
            ]
            for size in ("0", "2")
        )
        assert len(set(itertools.pairwise(looped))) < 59, "else it shows nothing"
        assert len(set(itertools.pairwise(found))) == 59


def test_ctrl_c_in_mid_stream_ends_with_130_and_no_traceback(stories260k: Path, tmp_path: Path) -> None:
    # So small a model is soon done: without the cache and with room for more tokens it is not before the signal.
    shutil.copytree(stories260k, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    terminal = Terminal("generate", PROMPT, "--model", str(tmp_path), "--max-new-tokens", "8000", "--no-cache")
    terminal.read_until("there was")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.output and "Exception" not in terminal.output
    assert terminal.output.endswith("\r\n")
    assert terminal.output.count("\x1b[?25l") == terminal.output.count("\x1b[?25h"), "the cursor is shown again"


def test_a_closed_pipe_ends_it_quietly(stories260k: Path) -> None:
    process = subprocess.Popen(
        [*KVLOOM, "generate", PROMPT, "--model", str(stories260k), "--max-new-tokens", "490"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(8) == b", there "
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def test_characters_of_several_tokens_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is a byte, so that most characters take two; writes are never cut inside of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import tiny

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model = tiny.tiny_model("llama", vocab_size=256)
    model.save_pretrained(tmp_path)
    written: list[str] = []
    monkeypatch.setattr(sys.modules["kvloom.cli.generate.show"], "print_piece", written.append)
    arguments = ["generate", "é", "--model", str(tmp_path), "--max-new-tokens", "200", "--temperature", "1"]
    assert CliRunner().invoke(command, [*arguments, "--seed", "6"]).exit_code == 0
    expected = kvloom.load(tmp_path).generate("é", max_new_tokens=200, temperature=1.0, do_sample=True, seed=6)
    assert "".join(written) == expected.text
    two_bytes = [character for character in expected.text if "\x80" <= character <= "\u07ff"]
    assert two_bytes and len(written) == 200
    assert all(any(character in piece for piece in written) for character in two_bytes)


def test_the_bundled_model_writes_a_story_without_being_named() -> None:
    shown = CliRunner().invoke(command, ["generate", PROMPT, "--max-new-tokens", "20"])
    assert shown.exit_code == 0, shown.stderr
    assert len(shown.stdout.split()) > 8
    assert "demonstration model, bfloat16 on cpu" in shown.stderr
