"""`kvloom explain`: the page, the picture, and whether what they say of a model is so."""

from __future__ import annotations

import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import kvloom
import tiny
from kvloom.cli import kvloom as command
from kvloom.explain import observe, write_page
from kvloom.explain.captions import CHINESE, ENGLISH

IDS = [5, 6, 7, 8, 9, 10]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["explain", *map(str, arguments)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_the_weights_shown_are_those_of_the_models_own_attention(family: str) -> None:
    model = tiny.tiny_model(family)
    seen = observe(kvloom.attach(model), IDS, layer=1, head=2)
    own = model(torch.tensor([IDS]), output_attentions=True).attentions[1][0, 2]
    torch.testing.assert_close(torch.tensor(seen.weights), own, atol=1e-5, rtol=1e-4)


def test_earlier_tokens_stay_under_the_mask_and_change_without_it() -> None:
    seen = observe(kvloom.attach(tiny.tiny_model("qwen2")), IDS)
    assert max(seen.with_mask.weights, seen.with_mask.keys, seen.with_mask.values, seen.stepwise) < 1e-5
    assert min(seen.without_mask.weights, seen.without_mask.keys, seen.without_mask.values) > 1e-3


def test_tokens_that_are_parts_of_characters_read_as_their_bytes() -> None:
    seen = observe(kvloom.load(), "从 🙂\n\nfox")
    said = "".join(seen.tokens).replace("␣", "20").replace("↵", "0A").replace(" ", "")
    assert said == "从 🙂\n\n".encode().hex().upper() + "fox"


def test_looking_leaves_the_model_as_it_was() -> None:
    model = tiny.tiny_model("llama")
    before = model(torch.tensor([IDS])).logits
    observe(kvloom.attach(model), IDS)
    assert torch.equal(model(torch.tensor([IDS])).logits, before)


def test_the_head_shown_by_default_is_the_most_widely_spread() -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"))
    seen = observe(lm, IDS)

    def entropy(weights: tuple[tuple[float, ...], ...]) -> float:
        own = torch.tensor(weights)
        return float(-(own * own.clamp_min(1e-9).log()).sum(-1).mean())

    shapes = [(layer, head) for layer in range(seen.layers) for head in range(4)]  # as tiny_model makes it
    spreads = {own: entropy(observe(lm, IDS, layer=own[0], head=own[1]).weights) for own in shapes}
    assert spreads[seen.layer, seen.head] == pytest.approx(max(spreads.values()), abs=1e-6)


class Checker(HTMLParser):
    """Notes what a page loads from elsewhere, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("words", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_page_is_whole_and_loads_nothing(words: object, tmp_path: Path) -> None:
    seen = observe(kvloom.attach(tiny.tiny_model("llama")), IDS, name="<a & b>")
    write_page(seen, words, tmp_path / "page.html")  # type: ignore[arg-type]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Checker()
    page.feed(text)
    assert not page.open and not page.loaded
    assert "[[" not in text and "<a & b>" not in text and "&lt;a &amp; b&gt;" in text
    assert text.count('class="cell"') == len(IDS) * (len(IDS) + 1) // 2
    assert not re.search(r"\{(?!token|n\}|\w+\}\\)[a-z]+\}", text.split("<script>")[0].split("</style>")[1])


def test_the_command_writes_page_and_picture(tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    result = run("The old king had three sons", "--html", page, "--plot", picture)
    assert result.exit_code == 0 and result.stdout.split() == [str(page), str(picture)]
    assert "with the causal mask" in result.stderr
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == (2000, 1200)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("The",), "2 to 40 tokens"),
        (("word " * 60,), "2 to 40 tokens"),
        (("The king", "--layer", "99"), "--layer 99"),
        (("The king", "--head", "99"), "--head 99"),
        (("The king", "--lang", "fr"), "--lang"),
        (("The king", "--html", "no/such/folder.html"), "there is no folder"),
        (("The king", "--plot", "a.gif"), "must end with .png"),
    ],
)
def test_wrong_use_ends_in_one_line_and_writes_nothing(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_callable_cannot_be_looked_at() -> None:
    logits = torch.randn(7, 7)
    lm = kvloom.attach(lambda ids: logits[ids], vocab_size=7)
    with pytest.raises(kvloom.UnsupportedModel, match="cannot be looked at"):
        observe(lm, [1, 2, 3])
