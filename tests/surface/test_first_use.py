"""What somebody meets who knows transformers and vLLM, and has never seen KVLoom."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import kvloom
from kvloom.cli import kvloom as command
from kvloom.decoding.options.refusals import ELSEWHERE
from tiny import tiny_model


@pytest.fixture(scope="module")
def lm() -> kvloom.LanguageModel:
    return kvloom.load()


def run(*arguments: str) -> str:
    """What a command that is refused says."""
    done = CliRunner().invoke(command, [*arguments])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    return done.stderr


# ---- the package -------------------------------------------------------------------------------------------------


def test_completion_shows_the_public_names_and_nothing_else() -> None:
    shown = {name for name in dir(kvloom) if not name.startswith("__")}
    assert shown == set(kvloom.__all__) - {"__version__"}


def test_importing_the_package_and_asking_for_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, kvloom, kvloom.__main__, kvloom.cli; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()"


# ---- names of elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "here"), [("stop", "stop_strings"), ("n", "num_return_sequences")])
def test_an_option_of_another_library_is_answered_with_its_name_here(
    lm: kvloom.LanguageModel, name: str, here: str
) -> None:
    with pytest.raises(kvloom.errors.UnknownOption, match=f"`{here}`"):
        lm.generate("A fox", max_new_tokens=2, **{name: 1})


def test_every_name_that_is_recommended_is_an_option_that_is_known(lm: kvloom.LanguageModel) -> None:
    for here in set(ELSEWHERE.values()):
        lm.generate("A fox", **{"max_new_tokens": 1, here: None if here != "max_new_tokens" else 1})


@pytest.mark.parametrize("name", ["input_ids", "inputs"])
def test_a_tokenizers_output_spread_into_generate_is_sent_to_where_it_is_taken(
    lm: kvloom.LanguageModel, name: str
) -> None:
    with pytest.raises(kvloom.errors.UnknownOption, match=r"kvloom\.generate\(lm"):
        lm.generate(**{name: torch.tensor([[1, 2]])})


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "there is no prompt"),
        ({"role": "user", "content": "Hello"}, "Put the message into a list"),
        ({"input_ids": [1, 2]}, r"kvloom\.generate\(lm"),
        (torch.empty(2, dtype=torch.long, device="meta"), "meta device"),
        (torch.tensor([1, 2]).to_sparse(), "sparse"),
    ],
)
def test_what_is_no_prompt_is_refused_with_what_to_pass(lm: kvloom.LanguageModel, prompt: object, said: str) -> None:
    with pytest.raises(kvloom.InvalidRequest, match=said):
        lm.generate(prompt)


def test_a_result_or_a_context_in_the_place_of_a_prompt_is_told_where_it_belongs(lm: kvloom.LanguageModel) -> None:
    out = lm.generate("A fox", max_new_tokens=2)
    with pytest.raises(kvloom.InvalidRequest, match=r"pass its `\.context`"):
        lm.generate(out)
    with pytest.raises(kvloom.InvalidRequest, match="Pass a context as `context`"):
        lm.generate(out.context)


def test_a_text_longer_than_the_model_raises_one_error_and_no_advice_of_transformers(
    lm: kvloom.LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(kvloom.errors.PromptTooLong):
        lm.generate("a fox " * 2_000)
    assert not caplog.records


# ---- load and attach ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "mps"}, "not supported"),
        ({"device": "meta"}, "not supported"),
        ({"dtype": "float8_e4m3fn"}, "Pass float64, float32, bfloat16 or float16"),
        ({"threads": 1_000_000}, "1,024 at most"),
    ],
)
def test_what_a_model_cannot_be_loaded_with_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(kvloom.InvalidRequest, match=said):
        kvloom.load(**options)  # type: ignore[arg-type]


def test_attach_says_what_it_was_given_in_the_place_of_a_model(lm: kvloom.LanguageModel) -> None:
    for given, said in [("gpt2", r"kvloom\.load\('gpt2'\)"), (lm, "attached already"), (type(lm), "is a class")]:
        with pytest.raises(kvloom.UnsupportedModel, match=said):
            kvloom.attach(given)
    with pytest.raises(kvloom.UnsupportedModel, match="meta device"):
        kvloom.attach(tiny_model("llama").to("meta"))


# ---- results -----------------------------------------------------------------------------------------------------


def test_what_is_printed_of_a_result_is_short_and_says_what_one_looks_for(lm: kvloom.LanguageModel) -> None:
    out = lm.generate("Once upon a time", max_new_tokens=100)
    assert len(repr(out)) < 250
    assert out.text[:100] in repr(out)
    assert "100 new tokens" in repr(out)
    score = lm.score([" a"], prompt="Once upon")[0]
    assert f"logprob={score.logprob:.4f}" in repr(score)
    assert repr(lm.prefill("A")) == "Context(1 token, 1 cached, 1 block)"


def test_results_can_be_pickled_and_copied_without_their_context(lm: kvloom.LanguageModel) -> None:
    beams = lm.beam_search("A fox", num_beams=2, num_return_sequences=2, max_new_tokens=3)
    assert beams[0].context.tokens == len(beams[0].token_ids) + len(lm.tokenizer("A fox").input_ids)
    for twins in (pickle.loads(pickle.dumps(beams)), copy.deepcopy(beams)):
        assert [own.token_ids for own in twins] == [own.token_ids for own in beams]
        assert torch.equal(twins.sequences, beams.sequences)
        with pytest.raises(kvloom.errors.ContextClosed, match="stayed with the original"):
            _ = twins[0].context


def test_a_copied_context_is_a_fork_that_outlives_the_first(lm: kvloom.LanguageModel) -> None:
    context = lm.prefill("Once upon a time")
    expected = lm.generate(context=context, max_new_tokens=4).token_ids
    for copied in (copy.copy(context), copy.deepcopy(context)):
        twin = copied.fork()
        copied.close()
        assert lm.generate(context=twin, max_new_tokens=4).token_ids == expected


def test_what_cannot_leave_its_process_says_so_when_it_is_pickled(lm: kvloom.LanguageModel) -> None:
    with pytest.raises(kvloom.InvalidRequest, match=r"context\.save"):
        pickle.dumps(lm.prefill("A"))
    with pytest.raises(kvloom.InvalidRequest, match="Load or attach it"):
        pickle.dumps(lm)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--version"], "See `kvloom generate --help`"),
        (["generate", "x", "--max-new-tokens", "abc"], "not a valid integer."),
        (["generate", "x", "--no-cache", "--codec", "int8"], "contradict each other"),
        (["generate", "x", "--model", __file__], "is a file"),
        (["plan", "a", "--model", "b"], "name two models"),
        (["plan", "--num-beams", "99999999"], "65,536 sequences at most"),
    ],
)
def test_wrong_use_is_answered_with_one_line(arguments: list[str], said: str) -> None:
    stderr = run(*arguments)
    assert said in stderr
    assert stderr.count("\n") == 1


def test_plan_takes_its_model_as_the_other_commands_do() -> None:
    runner = CliRunner()
    outputs = [runner.invoke(command, ["plan", *own]).output for own in (["./nope"], ["--model", "./nope"])]
    assert outputs[0] == outputs[1]
    assert "there is no model folder `./nope`" in outputs[0]


def test_the_list_of_commands_cuts_no_sentence_off() -> None:
    assert "..." not in CliRunner().invoke(command, ["--help"]).output.split("Commands:")[1]
