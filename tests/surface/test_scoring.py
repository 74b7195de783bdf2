"""Scoring: equal to each continuation apart, at the price of the prompt and the continuations once."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from transformers import AutoTokenizer, PreTrainedModel

import kvloom
import tiny
from kvloom import CacheFull, InvalidRequest, LanguageModel
from kvloom.attention import plan
from kvloom.cli import kvloom as command
from kvloom.engine import scoring
from kvloom.errors import ContextClosed, EmptyPrompt, InvalidTokens, NumericalError, PromptTooLong, UnsupportedModel
from kvloom.text import Seam, encode_start

CLOSE = {"abs": 1e-4}


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, (count,), generator=generator).tolist()


@pytest.fixture
def lm() -> LanguageModel:
    return kvloom.attach(tiny.tiny_model("llama", max_position_embeddings=4096), budget_bytes=8 << 20)


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return kvloom.load(dtype="float32")


@pytest.fixture
def ran(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward pass runs."""
    counts: list[int] = []
    forward = lm.binding.forward

    def counted(token_ids: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        counts.append(len(token_ids))
        return forward(token_ids, *arguments, **options)

    monkeypatch.setattr(lm.binding, "forward", counted)
    return counts


def state_of(lm: LanguageModel) -> list[tuple[int, int]]:
    """Blocks that anything but the prefix index holds, and holders in all."""
    assert lm.engine.cache is not None
    return [(g.pool.total - g.pool.free - len(g.index.idle()), len(g.index)) for g in lm.engine.cache.groups]


def held(lm: LanguageModel) -> int:
    return sum(tables for tables, _ in state_of(lm))


@torch.no_grad()
def apart(model: PreTrainedModel, prompt: list[int], continuation: list[int]) -> list[float]:
    """By transformers alone: one forward over the whole sequence."""
    logits = model(torch.tensor([prompt + continuation[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.float().log_softmax(-1)[range(len(continuation)), continuation].tolist()


# ---- equal to scoring each apart -------------------------------------------------------------------------------

FAMILIES = [*tiny.SUPPORTED_FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_as_if_each_continuation_were_alone(family: str) -> None:
    # Lengths on both sides of every window and of the lengths at which rotary factors change.
    prompt, continuations = ids(37), [ids(n, seed=n) for n in (1, 2, 2, 3, 1, 19, 5, 12)]
    lm = kvloom.attach(tiny.tiny_model(family))
    for own, score in zip(continuations, lm.score(continuations, prompt=prompt), strict=True):
        # A model made anew: dynamic rotary factors stay on the module.
        assert score.token_logprobs == pytest.approx(apart(tiny.tiny_model(family), prompt, own), **CLOSE)
        assert score.token_ids == own
    assert held(lm) == 0


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_lengths_passes_and_starts_the_scores_are_the_same(lm: LanguageModel, data: st.DataObject) -> None:
    prompt = ids(data.draw(st.integers(1, 90)), seed=data.draw(st.integers(0, 2)))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    continuations = [ids(n, seed=data.draw(st.integers(0, 3))) for n in lengths]
    cut = data.draw(st.integers(0, len(prompt)))
    context = lm.prefill(prompt[:cut]) if cut else None
    lm.engine.step_tokens = data.draw(st.sampled_from([1, 3, 16, 50, 512]))
    before = held(lm)
    scores = lm.score(continuations, prompt=prompt[cut:] or None, context=context)
    lm.engine.step_tokens = 512
    assert held(lm) == before
    for own, score in zip(continuations, scores, strict=True):
        assert score.token_logprobs == pytest.approx(apart(lm.binding.model, prompt, own), **CLOSE)


def test_a_callable_and_use_cache_false_score_the_same(lm: LanguageModel) -> None:
    model = lm.binding.model
    plain = kvloom.attach(lambda token_ids: model(token_ids).logits, vocab_size=lm.vocab_size)
    continuations = [ids(n, seed=n) for n in (1, 4, 9)]
    expected = lm.score(continuations, prompt=ids(30))
    for other in (
        lm.score(continuations, prompt=ids(30), use_cache=False),
        plain.score(continuations, prompt=ids(30)),
        plain.score(continuations, prompt=ids(30)[10:], context=plain.prefill(ids(30)[:10])),
    ):
        for mine, theirs in zip(expected, other, strict=True):
            assert theirs.token_logprobs == pytest.approx(mine.token_logprobs, **CLOSE)


def test_a_score_is_what_generate_says_of_the_tokens_it_chose(lm: LanguageModel) -> None:
    out = lm.generate(ids(20), max_new_tokens=9)
    (score,) = lm.score([out.token_ids], prompt=ids(20))
    assert score.token_logprobs == pytest.approx(out.logprobs, **CLOSE)


def test_the_end_of_the_text_is_scored_as_a_token(demo: LanguageModel) -> None:
    eos = demo.generation_config.eos_token_id
    with_end, without = demo.score([[725, eos], [725]], prompt="Once upon a time there was a little")
    assert with_end.logprob < without.logprob
    assert with_end.text == without.text == " girl"


# ---- the price ---------------------------------------------------------------------------------------------------


def test_all_continuations_run_in_one_pass_behind_a_prompt_that_runs_once(lm: LanguageModel, ran: list[int]) -> None:
    usage = lm.score([ids(n, seed=n) for n in (2, 2, 5, 9)], prompt=ids(100)).usage
    assert ran == [100, 1 + 1 + 4 + 8]  # the last token of each need not run
    assert (usage.computed_prompt_tokens, usage.cached_prompt_tokens, usage.new_tokens) == (100, 0, 18)


def test_continuations_of_one_token_cost_nothing_but_the_prompt(lm: LanguageModel, ran: list[int]) -> None:
    lm.score([[token] for token in range(90)], prompt=ids(40))
    assert ran == [40]


def test_a_context_of_computed_tokens_runs_its_last_token_again_and_no_other(lm: LanguageModel, ran: list[int]) -> None:
    context = lm.prefill(ids(100))
    ran.clear()
    lm.score([[1], [2], [3]], context=context)
    assert ran == [1]
    ran.clear()
    lm.score([[1, 2], [3, 4]], prompt=[5, 6, 7], context=context)
    assert ran == [3, 2]
    ran.clear()
    generated = lm.generate(context=context, max_new_tokens=4).context  # its last token was never run
    ran.clear()
    lm.score([[1, 2]], context=generated)
    assert ran == [1, 1]
    assert context.tokens == 100


def test_the_prompt_is_remembered_and_the_continuations_are_not(lm: LanguageModel) -> None:
    lm.score([ids(50, seed=1), ids(70, seed=2)], prompt=ids(100))
    assert [known for _, known in state_of(lm)] == [100 // 16]


def test_the_same_prompt_again_is_found_in_the_cache(lm: LanguageModel) -> None:
    lm.score([[1, 2]], prompt=ids(100))
    assert lm.score([[1, 2]], prompt=ids(100)).usage.computed_prompt_tokens <= 16


@pytest.mark.parametrize("tokens", [2, 4])
def test_the_prompt_is_read_once_for_all_continuations(lm: LanguageModel, monkeypatch: Any, tokens: int) -> None:
    plans: list[plan.Plan] = []
    forward = lm.binding.forward

    def noted(token_ids: torch.Tensor, own: plan.Plan, *arguments: Any, **options: Any) -> torch.Tensor:
        plans.append(own)
        return forward(token_ids, own, *arguments, **options)

    monkeypatch.setattr(lm.binding, "forward", noted)
    lm.score([ids(tokens, seed=n) for n in range(30)], prompt=ids(200))
    shared, *rest = plans[-1].groups[0].spans
    assert shared.slots == slice(0, 192) and shared.rows == slice(0, 30 * (tokens - 1))
    assert len(rest) == 1, "the prompt's last block and the continuations themselves are gathered together"


def test_a_pass_takes_no_more_than_the_step_tokens(lm: LanguageModel, ran: list[int]) -> None:
    lm.engine.step_tokens = 16
    lm.score([ids(n, seed=n) for n in (1, 11, 2, 41, 3)], prompt=ids(20))
    assert ran == [16, 4, 16, 16, 16, 5]


def test_logits_of_many_rows_are_normalised_a_few_rows_at_a_time(lm: LanguageModel, monkeypatch: Any) -> None:
    rows: list[int] = []
    log_softmax = torch.log_softmax

    def noted(logits: torch.Tensor, dim: int) -> torch.Tensor:
        rows.append(logits.numel() // lm.vocab_size)
        return log_softmax(logits, dim=dim)

    monkeypatch.setattr(torch, "log_softmax", noted)
    monkeypatch.setattr(scoring, "SOFTMAX_BYTES", 4 * lm.vocab_size * 7)
    (score,) = lm.score([ids(31)], prompt=ids(20))
    assert rows == [1, 7, 7, 7, 7, 2]
    assert score.token_logprobs == pytest.approx(apart(lm.binding.model, ids(20), ids(31)), **CLOSE)


# ---- bounded -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.integers(1, 70),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9),
    step_tokens=st.sampled_from([8, 512]),
    family=st.sampled_from(["llama", "gemma3"]),
    started=st.booleans(),
)
def test_what_admission_asks_for_is_enough_and_one_block_less_is_refused_before_any_work(
    models: dict[str, PreTrainedModel],
    prompt: int,
    lengths: list[int],
    step_tokens: int,
    family: str,
    started: bool,
) -> None:
    size = 16
    last = prompt % size
    most = done = 0
    live: dict[int, int] = {}
    # By hand: tokens are run in order, step_tokens a pass; a fork is let go of after the pass that ends it.
    flat = [index for index, n in enumerate(lengths) for _ in range(n - 1)]
    while done < len(flat):
        for index in flat[done : done + step_tokens]:
            live[index] = live.get(index, 0) + 1
        most = max(most, sum(ceil((last + n) / size) for n in live.values()))
        done += step_tokens
        live = {index: n for index, n in live.items() if n < lengths[index] - 1}
    need = ceil(prompt / size) + most
    for blocks, fits in ((need, True), (need - 1, False)):
        if not blocks:
            continue
        lm = kvloom.attach(models[family], budget_bytes=blocks * row_of_blocks(models[family]))
        lm.engine.step_tokens = step_tokens
        context = lm.prefill(ids(prompt)) if started and blocks >= ceil(prompt / size) else None
        before = state_of(lm)
        prompts = {"context": context} if context is not None else {"prompt": ids(prompt)}
        # One more block: a context's last block is copied when its last token is computed again.
        if fits and context is not None:
            with pytest.raises(CacheFull):
                lm.score([ids(n, seed=n) for n in lengths], **prompts)
            assert state_of(lm) == before
        elif fits:
            assert lm.score([ids(n, seed=n) for n in lengths], **prompts).usage.peak_blocks <= need
        else:
            with pytest.raises(CacheFull, match=rf"scoring {len(lengths)} continuations of a {prompt}-token prompt "):
                lm.score([ids(n, seed=n) for n in lengths], **prompts)
            assert state_of(lm) == before


@functools.cache
def row_of_blocks(model: PreTrainedModel) -> int:
    """Bytes of one block in every layer group."""
    cache = kvloom.attach(model, budget_bytes=1 << 20).engine.cache
    assert cache is not None
    return cache.layout.bytes_per_row_of_blocks


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: tiny.tiny_model(family) for family in ("llama", "gemma3")}


def test_a_refusal_says_what_is_needed_what_there_is_and_what_to_do(lm: LanguageModel) -> None:
    small = kvloom.attach(lm.binding.model, budget_bytes=9 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    with pytest.raises(CacheFull, match=r"needs 12 blocks of 16 tokens; the pool has 9 .*budget_bytes.*score fewer"):
        small.score([[1, 2]] * 10, prompt=ids(20))
    assert len(small.score([[1, 2]] * 7, prompt=ids(20))) == 7


def test_a_pass_that_fails_leaks_nothing(lm: LanguageModel, monkeypatch: Any) -> None:
    context = lm.prefill(ids(40))
    before = held(lm)
    passes = iter([True, False])
    forward = lm.binding.forward

    def interrupted(*arguments: Any, **options: Any) -> torch.Tensor:
        if not next(passes):
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lm.binding, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lm.score([ids(5), ids(9)], context=context)
    assert held(lm) == before
    assert len(lm.score([ids(5), ids(9)], context=context)) == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_nan_logits_are_an_error_and_leak_nothing(use_cache: bool) -> None:
    model = tiny.tiny_model("llama")
    lm = kvloom.attach(model)
    model.lm_head.weight[7] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        lm.score([[1, 2], [3]], prompt=ids(10), use_cache=use_cache)
    assert held(lm) == 0


def test_scoring_beside_a_stream_disturbs_neither(lm: LanguageModel) -> None:
    expected = lm.generate(ids(25), max_new_tokens=12).token_ids
    stream = lm.stream(ids(25), max_new_tokens=12)
    got = [next(stream).token_id for _ in range(4)]
    (score,) = lm.score([ids(6)], prompt=ids(25))
    assert score.token_logprobs == pytest.approx(apart(lm.binding.model, ids(25), ids(6)), **CLOSE)
    assert got + [piece.token_id for piece in stream] == expected


# ---- what a score is ---------------------------------------------------------------------------------------------


def test_normalisations_divide_by_tokens_or_by_bytes(demo: LanguageModel) -> None:
    texts = [" girl", " öäü girl"]
    by = {how: demo.score(texts, prompt="There was a little", normalize=how) for how in ("none", "tokens", "bytes")}
    for index, text in enumerate(texts):
        score = by["none"][index]
        assert score.logprob == pytest.approx(sum(score.token_logprobs)) and score.score == score.logprob
        assert score.bytes == len(text.encode()) == [5, 12][index]
        assert by["tokens"][index].score == pytest.approx(score.logprob / len(score.token_ids)) == score.mean_logprob
        assert by["bytes"][index].score == pytest.approx(score.logprob / score.bytes)
        assert score.text == text


def test_token_ids_are_read_as_the_text_they_spell(demo: LanguageModel) -> None:
    (score,) = demo.score([[725]], prompt="There was a little")
    assert (score.text, score.bytes) == (" girl", 5)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"continuations": []}, InvalidRequest, "no continuations"),
        ({"continuations": [1], "prompt": None}, InvalidRequest, "nothing to continue"),
        ({"continuations": "yes"}, InvalidRequest, "a list of texts .* got the text 'yes'. Put a single one into"),
        ({"continuations": torch.tensor([[1, 2]])}, InvalidRequest, "got a value of type Tensor"),
        ({"continuations": None}, InvalidRequest, "got None"),
        ({"continuations": [1, 2]}, InvalidRequest, "continuation 1 is a value of type int"),
        ({"continuations": [[1], ""]}, EmptyPrompt, "continuation 2 is empty"),
        ({"continuations": [[1], []]}, EmptyPrompt, "continuation 2 holds no tokens"),
        ({"continuations": [[1], [-1]]}, InvalidTokens, "continuation 2: token id -1 is outside"),
        ({"continuations": [[1], [0.5]]}, InvalidTokens, "continuation 2: token ids are integers"),
        ({"continuations": [[1] * 1021]}, PromptTooLong, "continuation 1 of 1,021 exceed the model's context of 1,024"),
        ({"continuations": [[1]], "normalize": "words"}, InvalidRequest, "`normalize=words` is not known"),
        ({"continuations": [[0]], "normalize": "bytes"}, InvalidRequest, "only special tokens"),
        ({"continuations": ["x"], "prompt": ""}, EmptyPrompt, "the prompt is empty"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_computed(
    demo: LanguageModel, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    before = state_of(demo)
    with pytest.raises(error, match=said) as refused:
        demo.score(**{"prompt": "Once upon a time", **arguments})
    assert "\n" not in str(refused.value)
    assert state_of(demo) == before


def test_text_without_a_tokenizer_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InvalidRequest, match="continuation 1 is text, but no tokenizer"):
        lm.score([" yes"], prompt=[1])
    with pytest.raises(InvalidRequest, match="needs a tokenizer"):
        lm.score([[1]], prompt=[1], normalize="bytes")
    assert lm.score([[1]], prompt=[1])[0].bytes is None


def test_contexts_that_are_closed_or_foreign_are_refused(lm: LanguageModel) -> None:
    context = lm.prefill(ids(5))
    with pytest.raises(ContextClosed):
        kvloom.attach(lm.binding.model).score([[1]], context=context)
    context.close()
    with pytest.raises(ContextClosed):
        lm.score([[1]], context=context)


def test_a_model_in_training_mode_is_refused(lm: LanguageModel) -> None:
    lm.binding.model.train()
    with pytest.raises(UnsupportedModel, match="training mode"):
        lm.score([[1]], prompt=[1])


# ---- where the prompt ends ---------------------------------------------------------------------------------------


def test_text_is_tokenized_as_it_stands_behind_the_prompt(demo: LanguageModel) -> None:
    prompt, texts = "Once upon a time", [" there was", ", a king", "\n\nThe"]
    context = demo.prefill(prompt)
    for scores in (demo.score(texts, prompt=prompt), demo.score(texts, context=context)):
        for text, score in zip(texts, scores, strict=True):
            assert encode_start(demo.tokenizer, prompt) + score.token_ids == encode_start(demo.tokenizer, prompt + text)


@pytest.mark.parametrize("as_context", [False, True])
def test_a_continuation_that_merges_with_the_prompt_is_refused(demo: LanguageModel, as_context: bool) -> None:
    def score(prompt: str, text: str) -> None:
        demo.score([" fine", text], **({"context": demo.prefill(prompt)} if as_context else {"prompt": prompt}))

    with pytest.raises(InvalidRequest, match=r"continuation 2, 'girl', merges .* Take the space from the end"):
        score("There was a little ", "girl")
    with pytest.raises(InvalidRequest, match=r"continuation 2, 'ttle', merges .* part where a word begins"):
        score("There was a li", "ttle")
    with pytest.raises(InvalidRequest, match="continuation 2, 're', merges"):
        score("The", "re")  # a prompt of one token
    (by_ids,) = demo.score([demo.tokenizer("ttle", add_special_tokens=False).input_ids], prompt="There was a li")
    assert by_ids.text == "ttle"


TOKENIZERS = ("demo", "stories260k", "qwen2_tokenizer")
WORDS = st.sampled_from(
    ["a", "A", " the", "ing", " ", "  ", "\n", "1", "23", "'s", "é", "日本", "😀", ".", "<|im_end|>"]
)


@pytest.fixture(scope="module")
def tokenizers(request: pytest.FixtureRequest) -> dict[str, Any]:
    def of(name: str) -> Any:
        if name == "demo":
            return request.getfixturevalue("demo").tokenizer
        return AutoTokenizer.from_pretrained(request.getfixturevalue(name))

    return {name: of(name) for name in TOKENIZERS}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100)
@given(
    prompt=st.lists(WORDS, min_size=1, max_size=60).map("".join),
    text=st.lists(WORDS, min_size=1, max_size=4).map("".join),
)
def test_the_end_of_a_prompt_is_enough_to_see_how_the_whole_is_tokenized(
    tokenizers: dict[str, Any], name: str, prompt: str, text: str
) -> None:
    tokenizer = tokenizers[name]
    prompt_ids, whole = encode_start(tokenizer, prompt), encode_start(tokenizer, prompt + text)
    assume(prompt_ids)
    seam = Seam.behind(tokenizer, prompt_ids)
    assume(seam is not None)
    merges = whole[: len(prompt_ids)] != prompt_ids
    assert seam.encode_behind(text) == (None if merges else whole[len(prompt_ids) :])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_prompts_have_a_seam(tokenizers: dict[str, Any], name: str) -> None:
    for prompt in ("Once upon a time", "Lily", "The cat sat on the mat. It was " + "very " * 50 + "happy."):
        assert Seam.behind(tokenizers[name], encode_start(tokenizers[name], prompt)) is not None


def test_a_prompt_that_ends_within_a_character_is_continued_as_by_generate(demo: LanguageModel) -> None:
    prompt = demo.tokenizer("日", add_special_tokens=False).input_ids[:1]
    assert Seam.behind(demo.tokenizer, prompt) is None
    (score,) = demo.score([" girl"], prompt=prompt)
    assert score.token_ids == [725]


# ---- the command and the examples --------------------------------------------------------------------------------


@pytest.fixture
def run(demo: LanguageModel, monkeypatch: Any) -> Callable[..., Any]:
    """The command on the demonstration model, which is loaded already."""
    monkeypatch.setattr(sys.modules["kvloom.cli.score"], "load_model", lambda **_: demo)
    return lambda *arguments, **options: CliRunner().invoke(command, ["score", *arguments], **options)


PROMPT = "Once upon a time, there was a little"


def test_the_command_ranks_best_first(run: Any, demo: LanguageModel) -> None:
    texts = [" elephant", " girl", " boy"]
    shown = run(PROMPT, *(part for text in texts for part in ("--continuation", text)))
    assert shown.exit_code == 0, shown.stderr
    scores = sorted(demo.score(texts, prompt=PROMPT), key=lambda own: -own.score)
    lines = [line.split() for line in shown.stdout.splitlines() if line[:1].isdigit()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert [" ".join(line[1:-5]) for line in lines] == [f"' {str(own.text).strip()}'" for own in scores]
    assert [float(line[-4]) for line in lines] == pytest.approx([own.logprob for own in scores], abs=1e-3)
    assert "9 tokens" in shown.stderr and "3 continuations" in shown.stderr


def test_the_command_prints_json_in_the_order_of_the_rank(run: Any, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(" elephant\n girl\n")
    shown = run("-", "--file", str(labels), "-c", " boy", "--json", "--normalize", "bytes", input=PROMPT + "\n")
    found = json.loads(shown.stdout)
    assert [own["text"] for own in found["scores"]] == [" girl", " boy", " elephant"]
    assert [own["index"] for own in found["scores"]] == [2, 0, 1]
    for own in found["scores"]:
        assert own["score"] == pytest.approx(own["logprob"] / own["bytes"])
        assert own["logprob"] == pytest.approx(sum(own["token_logprobs"]))
    assert (found["prompt"], found["normalize"]) == (PROMPT, "bytes")


def test_the_command_takes_token_ids_and_does_without_the_cache(run: Any, demo: LanguageModel) -> None:
    shown = run("5 6 7", "-c", "8,9", "-c", "10", "--token-ids", "--no-cache", "--json")
    found = {own["index"]: own["logprob"] for own in json.loads(shown.stdout)["scores"]}
    assert json.loads(shown.stdout)["usage"]["computed_prompt_tokens"] == 6
    expected = demo.score([[8, 9], [10]], prompt=[5, 6, 7])
    assert [found[0], found[1]] == pytest.approx([own.logprob for own in expected], **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PROMPT], "nothing to score. Pass `--continuation TEXT`, more than once, or `--file FILE`."),
        ([PROMPT, "-c", ""], "continuation 1 is empty"),
        ([PROMPT, "--file", "empty-line.txt"], "line 2 of `empty-line.txt` is empty"),
        ([PROMPT, "--file", "latin1.txt"], "`latin1.txt` is not UTF-8 text"),
        ([PROMPT, "--file", "missing.txt"], "'missing.txt' does not exist"),
        ([PROMPT + " ", "-c", "girl"], "Take the space from the end of the prompt"),
        (["5 6", "-c", "x", "--token-ids"], "`x` is not a token id, and with --token-ids a continuation is integers."),
        (["5 6", "-c", "0", "--token-ids", "--normalize", "bytes"], "`--normalize bytes` cannot divide"),
        ([PROMPT, "-c", " a", "--normalize", "words"], "'words' is not one of 'none', 'tokens', 'bytes'"),
        (["", "-c", " a"], "the prompt is empty"),
    ],
)
def test_wrong_use_of_the_command_ends_in_one_line(
    run: Any, tmp_path: Path, monkeypatch: Any, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty-line.txt").write_text(" a\n\n b\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    monkeypatch.chdir(tmp_path)
    shown = run(*arguments)
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert said in shown.stderr and shown.stderr.count("\n") == 1


def test_the_examples_run_and_come_to_sensible_results(root: Path, monkeypatch: Any, capsys: Any) -> None:
    def lines(name: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name])
        runpy.run_path(str(root / "examples" / name), run_name="__main__")
        shown: str = capsys.readouterr().out
        return shown.splitlines()

    labels = [line.split("+")[0].strip() for line in lines("classify_texts.py")[:4]]
    assert labels == ["a royal palace", "the wide sea", "the dark forest", "a poor cottage"]
    assert lines("rank_summaries.py")[0].endswith("the fox tricked the goat and got out of the well.")
