"""Conversations: chat messages, with images and without, through the library and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from transformers import ProcessorMixin

import kvloom
from kvloom import InvalidRequest, LanguageModel
from kvloom.cli import kvloom as command
from kvloom.conversation import Conversation
from tiny_vision import CHAT_TEMPLATE, chat_model, tiny_processor

NEW = 8
QUESTION = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return tiny_processor()


@pytest.fixture(scope="module")
def lm(processor: ProcessorMixin) -> LanguageModel:
    return kvloom.attach(chat_model(processor), processor, block_tokens=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [folder / name for name in ("wide.png", "tall.jpg")]
    for path, size in zip(paths, ((60, 90, 3), (110, 50, 3)), strict=True):
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def folder(processor: ProcessorMixin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    path = tmp_path_factory.mktemp("model")
    chat_model(processor).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def asking(*images: object, text: str = "What is this?") -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": own} for own in images), QUESTION | {"text": text}]}
    ]


def transformers_answer(processor: ProcessorMixin, messages: list[dict], count: int = NEW) -> list[int]:
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    output = chat_model(processor).generate(**inputs, do_sample=False, max_new_tokens=count)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


# ---- images ------------------------------------------------------------------------------------------------------


def test_messages_with_images_are_answered_as_transformers_answers_them(
    lm: LanguageModel, processor: ProcessorMixin, photos: list[Path]
) -> None:
    wide, tall = photos
    conversations = [
        asking(wide.as_posix()),
        asking(Image.open(wide), Image.open(tall)),
        [{"role": "system", "content": "Be brief."}, *asking()],
        [*asking(Image.open(tall)), {"role": "assistant", "content": "A king."}, *asking(text="And now?")],
    ]
    for out, messages in zip(lm.generate(conversations, max_new_tokens=NEW), conversations, strict=True):
        assert out.token_ids == transformers_answer(processor, messages)
    streamed = [piece.token_id for piece in lm.stream(conversations[1], max_new_tokens=NEW)]
    assert streamed == transformers_answer(processor, conversations[1])


def test_images_come_from_paths_urls_and_base64(lm: LanguageModel, photos: list[Path]) -> None:
    import base64

    encoded = base64.b64encode(photos[0].read_bytes()).decode()
    sources = [{"path": photos[0]}, {"url": str(photos[0])}, {"base64": encoded}, {"image": Image.open(photos[0])}]
    prompts = [[{"role": "user", "content": [{"type": "image", **own}, QUESTION]}] for own in sources]
    digests = {lm.reader.read(own).media.items[0].digest for own in prompts}
    assert len(digests) == 1


def test_a_second_turn_behind_a_context_is_the_whole_conversation_computed_once(
    lm: LanguageModel, processor: ProcessorMixin, photos: list[Path]
) -> None:
    wide, tall = map(Image.open, photos)
    first = lm.generate(asking(wide), max_new_tokens=NEW)
    second = lm.generate(asking(tall, text="And this?"), context=first.context, max_new_tokens=NEW)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    closed = [*first.context.token_ids, *([] if first.token_ids[-1] == end else [end])]
    text = processor.tokenizer.decode(second.context.token_ids)
    assert text.startswith(processor.tokenizer.decode(closed) + "\n<|im_start|>user\n<|vision_start|>")
    assert second.usage.computed_prompt_tokens == second.usage.prompt_tokens - first.context.tokens + 1
    own = lm.binding.forward_uncached(
        torch.tensor([second.context.token_ids[: second.usage.prompt_tokens]]), media=second.context.media
    )
    assert int(own[0, -1].argmax()) == second.token_ids[0]


@pytest.mark.parametrize("ends", [[], ["<|im_end|>"], ["<|im_end|>", "\n"]], ids=["open", "closed", "line ended"])
def test_an_answer_that_a_context_ends_with_is_closed_once(
    lm: LanguageModel, processor: ProcessorMixin, ends: list[str]
) -> None:
    tokenizer = processor.tokenizer
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day"
    ids = tokenizer(text + "".join(ends), add_special_tokens=False).input_ids
    read = lm.reader.read([{"role": "user", "content": "Go on"}], before=ids)
    whole = tokenizer.decode([*ids, *read.token_ids])
    assert whole == f"{text}<|im_end|>\n<|im_start|>user\nGo on<|im_end|>\n<|im_start|>assistant\n"


def test_a_prefilled_image_is_asked_about_many_times(lm: LanguageModel, photos: list[Path]) -> None:
    image = [{"role": "user", "content": [{"type": "image", "path": photos[0]}]}]
    context = lm.prefill(image)
    for text in ("What is this?", "Who is this?"):
        question = [{"role": "user", "content": text}]
        out = lm.generate(question, context=context, max_new_tokens=4)
        assert out.usage.cached_prompt_tokens == context.tokens
        assert out.token_ids == lm.generate([*image, *question], max_new_tokens=4).token_ids
    cued = lm.prefill(asking(photos[0].as_posix()), add_generation_prompt=True)
    assert (
        lm.generate(context=cued, max_new_tokens=4).token_ids
        == lm.generate(asking(photos[0].as_posix()), max_new_tokens=4).token_ids
    )
    assert len(lm.score([" yes", " no"], context=cued)) == 2


# ---- text --------------------------------------------------------------------------------------------------------


def test_plain_messages_go_through_the_chat_template_of_a_text_model() -> None:
    lm = kvloom.load()
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]}
    ]
    text = "<|im_start|>user\nOnce upon a time<|im_end|>\n<|im_start|>assistant\n"
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    assert lm.generate(messages, max_new_tokens=4, do_sample=False).token_ids == (
        lm.generate(ids, max_new_tokens=4, do_sample=False).token_ids
    )
    with pytest.raises(InvalidRequest, match="takes no images"):
        lm.generate(asking("photo.png"))


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_messages_of_a_wrong_form_are_refused_in_one_sentence(lm: LanguageModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for content, message in (
        ([{"type": "image"}], "block of message 1 shows nothing"),
        ([{"type": "audio", "audio": "a.wav"}], "type 'audio'. Pass text, image or video"),
        (3, "neither text nor a list of blocks"),
        ([{"type": "image", "path": "nowhere.png"}], "image 1 cannot be read: there is no file `nowhere.png`"),
        ([{"type": "image", "path": broken}], "is not an image, or is damaged"),
        (
            [{"type": "text", "text": "<|image_pad|>"}, {"type": "image", "image": Image.new("RGB", (40, 40))}],
            "processor",
        ),
        ([{"type": "video", "video": [Image.new("RGB", (40, 40))] * 2}], "Install torchvision"),
    ):
        with pytest.raises(InvalidRequest, match=message) as refused:
            lm.generate([{"role": "user", "content": content}])
        assert "\n" not in str(refused.value)
    with pytest.raises(InvalidRequest, match="message 2 has no role"):
        lm.generate([{"role": "user", "content": "Hello"}, {"content": "Hello"}])


def test_messages_need_a_template_and_images_a_processor(lm: LanguageModel, processor: ProcessorMixin) -> None:
    import tiny

    with pytest.raises(InvalidRequest, match="the tokenizer has none"):
        kvloom.load().generate([{"role": "user", "content": "Hello"}])
    with pytest.raises(InvalidRequest, match="no tokenizer was attached"):
        kvloom.attach(tiny.tiny_model("llama")).generate([{"role": "user", "content": "Hello"}])
    without = kvloom.attach(lm.binding.model, processor.tokenizer)
    with pytest.raises(InvalidRequest, match="no processor was attached"):
        without.generate(asking("photo.png"))
    tokenizer = kvloom.load().tokenizer
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequest, match="the chat template refuses the messages: roles must alternate"):
        kvloom.attach(kvloom.load().binding.model, tokenizer).generate([{"role": "user", "content": "Hello"}])


# ---- loading and the command -------------------------------------------------------------------------------------


def test_a_checkpoint_is_loaded_with_its_vision_encoder_and_processor(
    folder: Path, processor: ProcessorMixin, photos: list[Path]
) -> None:
    lm = kvloom.load(folder)
    messages = asking(photos[0].as_posix())
    assert lm.generate(messages, max_new_tokens=NEW).token_ids == transformers_answer(processor, messages)
    assert lm.generate("Once upon a time", max_new_tokens=2).token_ids
    assert kvloom.plan(folder, prompt_tokens=40, max_new_tokens=8).cache_bytes > 0


def test_the_command_shows_images(folder: Path, processor: ProcessorMixin, photos: list[Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> Result:
        return CliRunner().invoke(command, ["generate", *map(str, arguments)])

    shown = ["--model", folder, "--image", photos[0], "--image", photos[1], "What is this?"]
    done = run(*shown, "--json", "--max-new-tokens", NEW)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    messages = asking(*(path.as_posix() for path in photos))
    assert found["generations"][0]["token_ids"] == transformers_answer(processor, messages)
    assert found["prompt"] == "What is this?"
    refused = run("--model", folder, "--image", tmp_path / "none.png", "What is this?")
    assert refused.exit_code == 2 and "there is no file" in refused.stderr
    refused = run("--image", photos[0], "What is this?")
    assert refused.exit_code == 2 and "takes no images" in refused.stderr
    refused = run("--image", photos[0], "--token-ids", "1 2 3")
    assert refused.exit_code == 2 and "`--token-ids` has none" in refused.stderr
    frames = tmp_path / "frames"
    frames.mkdir()
    for number, photo in ((2, photos[0]), (10, photos[1])):
        (frames / f"frame{number}.png").write_bytes(photo.read_bytes())
    done = run("--model", folder, "--frames", frames, "What is this?", "--json", "--max-new-tokens", NEW)
    assert json.loads(done.stdout)["generations"] == found["generations"], "2 comes before 10"
    for arguments, message in [
        (("--frames", tmp_path / "none"), "there is no folder"),
        (("--frames", folder), "holds no images"),
        (("--video", photos[0]), "Install torchvision, or pass the frames as images (`--frames FOLDER`)"),
    ]:
        refused = run("--model", folder, *arguments, "What is this?")
        assert refused.exit_code == 2 and message in refused.stderr.replace("\n", " "), refused.stderr


def test_verify_shows_images(folder: Path, photos: list[Path]) -> None:
    arguments = ["verify", "--model", folder, "--image", photos[0], "--json", "--max-new-tokens", 4]
    done = CliRunner().invoke(command, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["ok"] and len(told["prompt_tokens"]) == 1
    refused = CliRunner().invoke(command, ["verify", "--image", str(photos[0])])
    assert refused.exit_code == 2 and "takes no images" in refused.stderr


# ---- conversations with images -----------------------------------------------------------------------------------


def test_a_turn_with_an_image_computes_its_new_tokens_only(folder: Path, photos: list[Path], tmp_path: Path) -> None:
    lm = kvloom.load(folder)
    options = {"max_new_tokens": 6, "do_sample": False}
    talking = Conversation(lm, options=options)
    first = "".join(talking.say("What is this?", images=[photos[0]]))
    "".join(talking.say("And this?", images=[str(photos[1])]))
    "".join(talking.say("Thank you."))
    assert talking.last is not None and talking.context is not None and talking.context.media is not None
    assert len(talking.context.media.items) == 2
    usage = talking.last.usage
    assert usage.computed_prompt_tokens < usage.prompt_tokens / 2
    whole = lm.generate(talking._written(talking.turns.pop()), use_cache=False, **options)
    assert whole.token_ids == talking.last.token_ids
    assert talking.undo().said == "And this?"
    talking.undo()
    assert "".join(talking.say("What is this?", images=[photos[1]])) != first, "another image"
    talking.undo()
    assert "".join(talking.say("What is this?", images=[photos[0]])) == first
    talking.save(tmp_path / "talk.json")
    again = Conversation(kvloom.load(folder), options=options)
    assert again.load(tmp_path / "talk.json") is None
    assert "".join(again.say("Thank you.")) == "".join(talking.say("Thank you."))
    assert again.last is not None and again.last.usage.computed_prompt_tokens < again.last.usage.prompt_tokens / 2


def test_the_chat_command_shows_images(folder: Path, photos: list[Path]) -> None:
    def run(lines: str, *arguments: object) -> Result:
        return CliRunner().invoke(command, ["chat", "--max-new-tokens", "4", *map(str, arguments)], input=lines)

    done = run(f"/image {photos[1]}\nWhat are these?\nGo on.\n", "--model", folder, "--image", photos[0])
    assert done.exit_code == 0, done.output
    assert "2 images will be shown with what you say next" in done.stderr
    facts = [line for line in done.stderr.splitlines() if "from the cache" in line]
    assert len(facts) == 2 and "0 from the cache" in facts[0] and " 0 from the cache" not in facts[1]
    assert "needs the name of a file" in run("/image\n", "--model", folder).stderr
    assert "there is no file" in run("/image none.png\n", "--model", folder).stderr
    refused = run("Hello\n", "--image", photos[0])
    assert refused.exit_code == 2 and "takes no images" in refused.stderr
