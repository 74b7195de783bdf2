"""`kvloom chat`, and the conversation behind it."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import kvloom
import tiny
from counting import available_blocks
from kvloom.cli import kvloom as command
from kvloom.conversation import Conversation
from kvloom.errors import InvalidRequest, PromptTooLong

SHARED = Path(__file__).parents[3] / "shared"
TOKENIZER = SHARED / "tokenizers" / "qwen2"


@pytest.fixture(scope="module")
def lm() -> kvloom.LanguageModel:
    """The demonstration model, which has no chat template."""
    return kvloom.load(dtype="float32")


@pytest.fixture(scope="module")
def chat_lm() -> kvloom.LanguageModel:
    """A random model with Qwen's tokenizer and chat template."""
    if not TOKENIZER.exists():
        pytest.skip("needs ../shared/tokenizers/qwen2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert tokenizer.chat_template
    return kvloom.attach(tiny.tiny_model("qwen2", vocab_size=151_936, max_position_embeddings=512), tokenizer)


def talk(lm: kvloom.LanguageModel, **options: object) -> Conversation:
    return Conversation(lm, options={"max_new_tokens": 12, "do_sample": False, **options})


def run(lines: str, *arguments: str) -> Result:
    return CliRunner().invoke(command, ["chat", "--max-new-tokens", "8", *arguments], input=lines)


def test_a_turn_computes_its_new_tokens_only(lm: kvloom.LanguageModel) -> None:
    talking = talk(lm)
    "".join(talking.say("Once upon a time there was a king who had three sons."))
    before = talking.tokens
    "".join(talking.say(" The youngest"))
    assert talking.last is not None
    said = len(lm.tokenizer(" The youngest").input_ids)
    # The last token of the answer before was chosen but never run.
    assert talking.last.usage.computed_prompt_tokens == said + 1
    assert talking.last.usage.cached_prompt_tokens == before - 1
    whole = lm.generate(list(talking.context.token_ids[: before + said]), max_new_tokens=12, do_sample=False)
    assert whole.token_ids == talking.last.token_ids


def test_with_a_template_the_text_is_what_the_template_says(chat_lm: kvloom.LanguageModel) -> None:
    talking = Conversation(chat_lm, "Be brief.", {"max_new_tokens": 6, "do_sample": False})
    first = "".join(talking.say("Hello 世界 🙂"))
    "".join(talking.say("And now?"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello 世界 🙂"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And now?"},
    ]
    text = chat_lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat_lm.tokenizer.decode(talking.context.token_ids).startswith(text)
    ids = list(talking.context.token_ids)[: talking.last.usage.prompt_tokens]
    assert chat_lm.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False).token_ids == talking.last.token_ids


@pytest.mark.parametrize(("answer", "shown"), [("hello", "hello"), ("ðŁĻ", "\ufffd")])
def test_an_answer_that_the_tokenizer_would_write_otherwise_is_not_computed_again(
    chat_lm: kvloom.LanguageModel, answer: str, shown: str
) -> None:
    tokenizer = chat_lm.tokenizer
    spelled = tokenizer.convert_tokens_to_ids(list(answer))  # the second: three of the four bytes of an emoji
    left = iter(spelled)

    def spell(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(left)]), 0.0)

    talking = Conversation(chat_lm, None, {"max_new_tokens": len(spelled), "logits_processor": [spell]})
    assert "".join(talking.say("Say it.")) == shown
    assert tokenizer(shown).input_ids != spelled
    before, talking.options = talking.tokens, {"max_new_tokens": 3}
    "".join(talking.say("Go on."))
    assert list(talking.context.token_ids[:before])[-len(spelled) :] == spelled
    assert talking.last.usage.cached_prompt_tokens == before - 1


def test_a_template_that_writes_earlier_answers_otherwise_is_followed(chat_lm: kvloom.LanguageModel) -> None:
    talking = Conversation(chat_lm, None, {"max_new_tokens": 6, "do_sample": False})
    "".join(talking.say("Say it."))
    talking.turns[-1] = dataclasses.replace(talking.turns[-1], answer="Otherwise.")  # as a template would drop thoughts
    "".join(talking.say("Go on."))
    assert "Otherwise.<|im_end|>" in chat_lm.tokenizer.decode(talking.context.token_ids)


def test_undo_goes_back_to_before_the_turn(lm: kvloom.LanguageModel) -> None:
    talking = talk(lm)
    "".join(talking.say("A fox met a wolf"))
    tokens, context = talking.tokens, talking.context.token_ids
    once = "".join(talking.say(" and said"))
    assert talking.undo().answer == once
    assert (talking.tokens, talking.context.token_ids) == (tokens, context)
    assert "".join(talking.say(" and said")) == once
    talking.undo(), talking.undo()
    assert talking.tokens == 0 and talking.context is None
    with pytest.raises(kvloom.InvalidRequest, match="no turn"):
        talking.undo()


def test_branches_do_not_see_each_other(lm: kvloom.LanguageModel) -> None:
    talking = talk(lm)
    "".join(talking.say("A fox met a wolf"))
    branch = talking.fork()
    "".join(branch.say(" in the dark forest"))
    assert len(talking.turns) == 1 and len(branch.turns) == 2
    assert branch.context.token_ids[: talking.tokens] == talking.context.token_ids


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(lm: kvloom.LanguageModel) -> None:
    talking = talk(lm)
    pieces = []
    for piece in talking.say("Once upon a time", stop=lambda: len(pieces) >= 3):
        pieces.append(piece)
    assert len(pieces) < 8 and talking.turns[0].answer == "".join(pieces)
    assert talking.last.finish_reason == "stop"
    "".join(talking.say(" and then"))
    assert talking.last.usage.computed_prompt_tokens <= 4


def test_a_saved_conversation_goes_on_as_the_first_would_have(lm: kvloom.LanguageModel, tmp_path: Path) -> None:
    talking = talk(lm)
    "".join(talking.say("The old woman lived in a hut"))
    talking.save(tmp_path / "talk.json")
    expected = "".join(talking.say(" near the sea"))
    again = talk(lm)
    assert again.load(tmp_path / "talk.json") is None
    assert "".join(again.say(" near the sea")) == expected
    assert again.last.usage.computed_prompt_tokens == talking.last.usage.computed_prompt_tokens


@pytest.mark.parametrize(
    "changes",
    [{"turns": None}, {"turns": [{"a": 1}]}, {"token_ids": "x"}, {"system": 5}],
    ids=lambda own: next(iter(own)),
)
def test_a_damaged_conversation_is_refused_and_the_present_one_stays(
    lm: kvloom.LanguageModel, tmp_path: Path, changes: dict[str, object]
) -> None:
    talking = talk(lm)
    "".join(talking.say("A fox"))
    talking.save(tmp_path / "fox")
    told = json.loads((tmp_path / "fox").read_text()) | changes
    (tmp_path / "fox").write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    with pytest.raises(InvalidRequest, match="is a damaged conversation"):
        talking.load(tmp_path / "fox")
    assert len(talking.turns) == 1


def test_a_device_is_not_replaced_by_a_conversation(lm: kvloom.LanguageModel, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    talking = talk(lm)
    with pytest.raises(InvalidRequest, match="not a regular file"):
        talking.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_another_models_keys_and_values_are_not_used(lm: kvloom.LanguageModel, tmp_path: Path) -> None:
    talking = talk(lm)
    "".join(talking.say("The old woman lived in a hut"))
    talking.save(tmp_path / "talk.json")
    other = kvloom.load()  # bfloat16
    again = talk(other)
    reason = again.load(tmp_path / "talk.json")
    assert reason is not None and "float32" in reason
    assert again.turns == talking.turns and again.tokens == 0
    "".join(again.say(" near the sea"))
    assert again.last.usage.prompt_tokens > talking.tokens


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(lm: kvloom.LanguageModel) -> None:
    talking = talk(lm)
    "".join(talking.say("A fox"))
    before = talking.context.token_ids
    with pytest.raises(PromptTooLong, match="leaves no room"):
        "".join(talking.say("word " * 2_000))
    assert talking.context.token_ids == before and len(talking.turns) == 1


def test_blocks_come_back_when_a_conversation_is_dropped(lm: kvloom.LanguageModel) -> None:
    gc.collect()
    before = available_blocks(lm.engine.cache)
    talking = talk(lm)
    "".join(talking.say("A fox met a wolf"))
    branch = talking.fork()
    "".join(branch.say(" and"))
    branch.undo()
    assert available_blocks(lm.engine.cache) < before
    del talking, branch
    gc.collect()
    assert available_blocks(lm.engine.cache) == before


def test_the_command_takes_lines_and_commands(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    result = run(
        f"A fox\n/fork b\n and a wolf\n/switch\n/switch main\n/save {file}\n/undo\n/load {file}\n"
        "/undoo\n/fork b\n//a\n/quit\nno\n"
    )
    assert result.exit_code == 0, result.stderr
    for words in (
        "/help lists the commands",
        "* b: 2 turns",
        "in `main` now: 1 turn",
        "saved 1 turn",
        "took back 'A fox'",
        "Did you mean `/undo`?",
        "there is a branch `b` already",
        "tokens computed",
    ):
        assert words in result.stderr, words
    assert len(result.stdout.splitlines()) >= 3
    assert json.loads(file.read_text())["turns"][0]["said"] == "A fox"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("/undo\n", "no turn to take back"),
        ("/load nowhere.json\n", "cannot be read"),
        ("/save\n", "needs the name of a file"),
        ("/save no/such/folder/x\n", "`no/such/folder/x` cannot be written"),
        ("/switch other\n", "no branch `other`"),
        ("/fork\n", "needs a name"),
    ],
)
def test_wrong_commands_are_told_and_the_program_goes_on(lines: str, words: str) -> None:
    result = run(lines + "A fox\n", "-q")
    assert result.exit_code == 0 and words in result.stderr and result.stdout.strip()


def test_a_system_message_needs_a_template() -> None:
    result = run("Hello\n", "--system", "Be brief.")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no chat template" in result.stderr and result.stderr.count("\n") == 1


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    arguments = [sys.executable, "-m", "kvloom", "chat", "--max-new-tokens", "900"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("Once upon a time\n")
        process.stdin.flush()
        process.stdout.read(5)  # the answer has begun
        process.send_signal(signal.SIGINT)
        process.stdin.write(" and so\n/quit\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err.count("tokens computed") == 2 and "Traceback" not in err
    assert out.count("\n") >= 2
