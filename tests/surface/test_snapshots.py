"""Snapshots: the same bits in another process, whole or not at all, and of this model or refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvloom
import tiny
from kvloom import CacheFull, InvalidRequest, LanguageModel
from kvloom.errors import ContextClosed, CorruptSnapshot, SnapshotError, SnapshotMismatch, SnapshotNotFound
from kvloom.models.identity import ROW_BYTES, tensor_digest


def ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(90, (count,), generator=generator).tolist()


@pytest.fixture
def lm() -> LanguageModel:
    return kvloom.attach(tiny.tiny_model("llama"), budget_bytes=4 << 20)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.kv"


def again(model: PreTrainedModel, **options: Any) -> LanguageModel:
    """As another process would see it: other engine, empty cache."""
    return kvloom.attach(model, **{"budget_bytes": 4 << 20, **options})


def state_of(lm: LanguageModel) -> list[tuple[int, int]]:
    """Blocks that anything but the prefix index holds, and blocks that it knows."""
    assert lm.engine.cache is not None
    return [(g.pool.total - g.pool.free - len(g.index.idle()), len(g.index)) for g in lm.engine.cache.groups]


def logits_behind(lm: LanguageModel, context: kvloom.Context) -> list[torch.Tensor]:
    """A chunk, and a few decode steps one by one."""
    step = lm.extend(context, ids(7, seed=9))
    logits = [step.logits]
    for token in ids(3, seed=8):
        step = lm.extend(step.context, [token])
        logits.append(step.logits)
    return logits


# ---- the same context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.SUPPORTED_FAMILIES)
@pytest.mark.parametrize("tokens", [1, 16, 45])
def test_a_restored_context_gives_the_same_bits(path: Path, family: str, tokens: int) -> None:
    model = tiny.tiny_model(family)
    first, second = again(model), again(model)
    context = first.prefill(ids(tokens))
    context.save(path)
    restored = second.restore(path)
    assert restored.token_ids == context.token_ids
    assert (restored.cached_tokens, restored.blocks) == (context.cached_tokens, context.blocks)
    expected = logits_behind(first, context)
    for mine, theirs in zip(logits_behind(second, restored), expected, strict=True):
        assert torch.equal(mine, theirs)
    # And beside the original, in the same cache.
    beside = first.restore(path)
    for mine, theirs in zip(logits_behind(first, beside), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["llama", "mistral", "gemma3", "phi3_longrope", "cohere2"]),
    prompt=st.integers(1, 60),
    new=st.integers(0, 12),
    block_tokens=st.sampled_from([1, 4, 16, 64]),
)
def test_whatever_was_generated_and_whatever_the_block_size_it_goes_on_as_without_a_cache(
    tmp_path: Path, family: str, prompt: int, new: int, block_tokens: int
) -> None:
    model = tiny.tiny_model(family)
    lm = again(model)
    if new:
        context = lm.generate(ids(prompt), max_new_tokens=new).context
        assert context.cached_tokens == context.tokens - 1, "the last token was chosen, but never run"
    else:
        context = lm.prefill(ids(prompt))
    context.save(tmp_path / "a.kv")
    other = again(model, block_tokens=block_tokens)
    restored = other.restore(tmp_path / "a.kv")
    assert (restored.token_ids, restored.cached_tokens) == (context.token_ids, context.cached_tokens)
    out = other.generate(ids(3, seed=5), context=restored, max_new_tokens=4)
    plain = lm.generate([*context.token_ids, *ids(3, seed=5)], max_new_tokens=4, use_cache=False)
    assert out.token_ids == plain.token_ids
    del restored, out
    assert all(tables == 0 for tables, _ in state_of(other))


def test_only_what_follows_a_restored_context_is_computed(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(70)).save(path)
    other = again(lm.binding.model)
    restored = other.restore(path)
    usage = other.generate(ids(5, seed=1), context=restored, max_new_tokens=2).usage
    assert (usage.cached_prompt_tokens, usage.computed_prompt_tokens) == (70, 5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_blocks_of_a_restored_context_are_found_by_their_prefix(path: Path, family: str) -> None:
    model = tiny.tiny_model(family)
    again(model).prefill(ids(64)).save(path)
    other = again(model)
    context = other.restore(path)
    usage = other.generate([*ids(64), *ids(10, seed=1)], max_new_tokens=2).usage
    assert (usage.cached_prompt_tokens, usage.computed_prompt_tokens) == (64, 10)
    context.close()
    assert other.prefill(ids(64)).cached_tokens == 64


def test_a_window_group_is_saved_with_what_it_still_holds(path: Path) -> None:
    lm = again(tiny.tiny_model("gemma3"))
    context = lm.prefill(ids(90))
    context.save(path)
    tables = context.tables_for(lm.engine).cached.tables
    with safe_open(path, framework="pt") as file:
        for index, table in enumerate(tables):
            held = file.get_tensor(f"positions.{index}").tolist()
            assert held == list(range(table.first_held, 90))
        for layer, group in enumerate(lm.engine.cache.layout.group_of_layer):
            assert file.get_slice(f"keys.{layer}").get_shape()[1] == tables[group].held
    assert tables[1].held < 3 * 16 < tables[0].held == 90


def test_what_the_cache_holds_no_more_is_computed_before_it_is_saved(lm: LanguageModel, path: Path) -> None:
    context = lm.beam_search(ids(40), num_beams=3, max_new_tokens=20)[0].context
    assert context.cached_tokens == 0  # hypotheses outlive their rows
    before = state_of(lm)
    context.save(path)
    assert [tables for tables, _ in state_of(lm)] == [tables for tables, _ in before]
    restored = again(lm.binding.model).restore(path)
    assert restored.cached_tokens == restored.tokens == context.tokens


def test_a_snapshot_is_a_safetensors_file_that_any_reader_opens(lm: LanguageModel, path: Path) -> None:
    context = lm.prefill(ids(33))
    context.save(path)
    tensors = load_file(path)
    store = lm.engine.cache.store
    slots = torch.from_numpy(context.tables_for(lm.engine).cached.tables[0].slots())
    assert tensors["token_ids"].tolist() == ids(33)
    for layer in range(3):
        assert torch.equal(tensors[f"keys.{layer}"], store.keys[layer][:, slots])
        assert torch.equal(tensors[f"values.{layer}"], store.values[layer][:, slots])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["dtype"]) == ("kvloom-snapshot", "2", "float32")
    assert str(path.parent) not in json.dumps(metadata)


def test_another_process_with_packed_weights_restores_the_same_bits(path: Path, root: Path) -> None:
    folder = root / "src/kvloom/demo_model"
    lm = kvloom.load(folder)
    assert any(own.device.type == "meta" for own in lm.binding.model.parameters()), "weights were given up"
    context = lm.prefill(
        "Once upon a time there was a king who had three sons, and each of them went to seek his luck."
    )
    context.save(path)
    script = (
        "import sys, hashlib, torch, kvloom\n"
        "lm = kvloom.load(sys.argv[1])\n"
        "step = lm.extend(lm.restore(sys.argv[2]), [300, 301, 302])\n"
        "print(hashlib.sha256(step.logits.view(torch.uint8).numpy().tobytes()).hexdigest())\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(path)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    logits = lm.extend(context, [300, 301, 302]).logits
    assert shown.stdout.strip() == hashlib.sha256(logits.view(torch.uint8).numpy().tobytes()).hexdigest()
    # The owner's own copy of the model, which keeps its plain weights, is the same model.
    assert kvloom.attach(AutoModelForCausalLM.from_pretrained(folder)).restore(path).tokens == context.tokens


# ---- refused by name ---------------------------------------------------------------------------------------------


def test_models_that_differ_in_one_number_are_told_apart(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(20)).save(path)
    for layer, row, column in ((0, 0, 0), (2, 47, 79), (1, 20, 33)):
        other = tiny.tiny_model("llama")
        other.model.layers[layer].mlp.down_proj.weight[row, column] += 1e-3
        with pytest.raises(SnapshotMismatch, match="made by another model: a llama model of 3 layers"):
            again(other).restore(path)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}]
)
def test_a_model_of_another_config_is_refused(lm: LanguageModel, path: Path, change: dict[str, Any]) -> None:
    lm.prefill(ids(20)).save(path)
    other = again(tiny.tiny_model("llama", **change))
    before = state_of(other)
    with pytest.raises(SnapshotMismatch, match="another model"):
        other.restore(path)
    assert state_of(other) == before


def test_what_says_nothing_about_keys_and_values_does_not_matter(lm: LanguageModel, path: Path, tmp_path: Path) -> None:
    lm.prefill(ids(20)).save(path)
    lm.binding.model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    loaded.config.pad_token_id = 3
    loaded.config.use_cache = False
    assert again(loaded).restore(path).tokens == 20


def test_a_model_that_was_changed_in_place_is_another(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(20)).save(path)
    assert lm.restore(path).tokens == 20
    lm.binding.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(SnapshotMismatch, match="another model"):
        lm.restore(path)


def test_another_dtype_is_refused_with_the_one_to_load(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(20)).save(path)
    with pytest.raises(SnapshotMismatch, match=r"of dtype float32; this model keeps bfloat16. Load .* dtype='float32'"):
        again(tiny.tiny_model("llama", dtype=torch.bfloat16)).restore(path)


@pytest.mark.parametrize(("field", "said"), [("version", "version 99 of the format"), ("codec", "of codec 99; this")])
def test_another_version_or_codec_is_refused(lm: LanguageModel, path: Path, field: str, said: str) -> None:
    lm.prefill(ids(20)).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, field: "99"})
    with pytest.raises(SnapshotMismatch, match=said):
        lm.restore(path)


def test_a_file_that_is_missing_or_is_no_snapshot_is_named(lm: LanguageModel, path: Path, tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound, match=r"document.kv` does not exist"):
        lm.restore(path)
    with pytest.raises(SnapshotNotFound, match="is a folder"):
        lm.restore(tmp_path)
    save_file({"keys.0": torch.zeros(3)}, path)
    with pytest.raises(CorruptSnapshot, match="not a snapshot of KVLoom"):
        lm.restore(path)
    path.write_text("once upon a time")
    with pytest.raises(CorruptSnapshot, match="damaged or incomplete"):
        lm.restore(path)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, bytes, list[torch.Tensor], Path]:
    """A model with windows, a snapshot's bytes, the logits behind it, and a place to write to."""
    lm = again(tiny.tiny_model("gemma3"))
    place = tmp_path_factory.mktemp("damaged") / "a.kv"
    context = lm.prefill(ids(40))
    context.save(place)
    return again(lm.binding.model), place.read_bytes(), logits_behind(lm, context), place


@settings(max_examples=150)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(
    snapshot: tuple[LanguageModel, bytes, list[torch.Tensor], Path], data: st.DataObject
) -> None:
    lm, content, logits, place = snapshot
    header = 8 + int.from_bytes(content[:8], "little")
    # The header is a small part of the file, and the one with the most ways to go wrong.
    at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1)))
    damaged = bytearray(content)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    place.write_bytes(damaged)
    before = [tables for tables, _ in state_of(lm)]
    try:
        restored = lm.restore(place)
    except SnapshotError as error:
        assert str(place) in str(error) and "\n" not in str(error)
        assert at < header or isinstance(error, CorruptSnapshot)
    else:
        assert at < header, "a flipped bit in the data was not seen"
        # White space in the header, for instance, has no meaning.
        for mine, theirs in zip(logits_behind(lm, restored), logits, strict=True):
            assert torch.equal(mine, theirs)
        restored.close()
    assert [tables for tables, _ in state_of(lm)] == before


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_corrupt(
    snapshot: tuple[LanguageModel, bytes, list[torch.Tensor], Path], share: float
) -> None:
    lm, content, _, place = snapshot
    place.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptSnapshot, match="damaged or incomplete"):
        lm.restore(place)


def test_tensors_of_other_shapes_are_corrupt_even_if_the_header_is_in_order(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(20)).save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for change in (
        {"keys.1": tensors["keys.1"][:, :-1].contiguous()},
        {"values.2": tensors["values.2"].half()},
        {"positions.0": tensors["positions.0"].flip(0)},
        {"positions.0": tensors["positions.0"] + 1},
        {"extra": torch.zeros(1)},
        {"digest": torch.zeros(32, dtype=torch.uint8)},
    ):
        save_file({**tensors, **change}, path, metadata=metadata)
        before = state_of(lm)
        with pytest.raises(CorruptSnapshot, match="is damaged"):
            lm.restore(path)
        assert [tables for tables, _ in state_of(lm)] == [tables for tables, _ in before]
    del tensors["keys.0"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CorruptSnapshot, match="other tensors"):
        lm.restore(path)


def test_a_snapshot_that_does_not_fit_is_refused_before_anything_is_loaded(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(100)).save(path)
    layout = lm.engine.cache.layout
    small = again(lm.binding.model, budget_bytes=9 * layout.bytes_per_row_of_blocks)
    held = small.prefill(ids(33, seed=1))
    before = state_of(small)
    with pytest.raises(CacheFull, match=r"a snapshot of 100 tokens needs 7 blocks .* has 9, 3 of them held .* close"):
        small.restore(path)
    assert state_of(small) == before
    held.close()
    assert small.restore(path).blocks == 7


def test_blocks_that_nobody_claims_make_way_for_a_snapshot(lm: LanguageModel, path: Path) -> None:
    lm.prefill(ids(100)).save(path)
    small = again(lm.binding.model, budget_bytes=9 * lm.engine.cache.layout.bytes_per_row_of_blocks)
    results = [small.generate(ids(60, seed=n), max_new_tokens=3) for n in (1, 2)]
    assert small.restore(path).blocks == 7
    assert len(results) == 2


def test_a_callable_has_nothing_to_save(lm: LanguageModel, path: Path) -> None:
    model = lm.binding.model
    plain = kvloom.attach(lambda token_ids: model(token_ids).logits, vocab_size=lm.vocab_size)
    with pytest.raises(InvalidRequest, match="keeps no keys and values"):
        plain.prefill(ids(5)).save(path)
    lm.prefill(ids(5)).save(path)
    with pytest.raises(InvalidRequest, match="keeps no keys and values"):
        plain.restore(path)


def test_a_closed_context_cannot_be_saved(lm: LanguageModel, path: Path) -> None:
    context = lm.prefill(ids(5))
    context.close()
    with pytest.raises(ContextClosed):
        context.save(path)
    assert not path.exists()


# ---- the fingerprint ---------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(
    count=st.sampled_from([1, 7, ROW_BYTES // 2, ROW_BYTES // 2 * 3 + 5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    data=st.data(),
)
def test_a_digest_sees_any_changed_or_exchanged_number(count: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.arange(1, count + 1).to(torch.float32).sqrt().to(dtype)
    index = data.draw(st.integers(0, count - 1))
    below = (index + ROW_BYTES // dtype.itemsize) % count  # in the same column
    other = data.draw(st.one_of(st.integers(0, count - 1), st.just(below)))
    changed = tensor.clone()
    changed[index] = torch.nextafter(changed[index], torch.tensor(torch.inf, dtype=dtype))
    assert tensor_digest(changed) != tensor_digest(tensor) == tensor_digest(tensor.clone())
    exchanged = tensor.clone()
    exchanged[index], exchanged[other] = tensor[other], tensor[index]
    assert (tensor_digest(exchanged) == tensor_digest(tensor)) == torch.equal(exchanged, tensor)


def test_a_digest_knows_shape_and_dtype_but_no_place() -> None:
    tensor = torch.arange(4096, dtype=torch.float32)
    other = [tensor.view(64, 64), tensor.view(torch.int32), tensor[:-1]]
    assert len({tensor_digest(own) for own in (tensor, *other)}) == 4
    shifted = torch.cat([torch.zeros(1), tensor])[1:]  # not where 64-bit numbers begin
    assert tensor_digest(shifted) == tensor_digest(tensor)


# ---- whole or not at all -----------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_file_and_no_other(lm: LanguageModel, path: Path, monkeypatch: Any) -> None:
    lm.prefill(ids(20)).save(path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            lm.prefill(ids(30)).save(path)
    assert os.listdir(path.parent) == [path.name]
    assert lm.restore(path).tokens == 20


def test_a_save_goes_where_a_link_points(lm: LanguageModel, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.kv"
    link.symlink_to(path)
    lm.prefill(ids(20)).save(link)
    assert link.is_symlink() and path.is_file()


@pytest.mark.parametrize(("place", "said"), [("no/such/a.kv", "there is no folder"), (".", "is a folder")])
def test_a_place_where_no_file_can_be_is_refused(lm: LanguageModel, tmp_path: Path, place: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        lm.prefill(ids(20)).save(tmp_path / place)
    assert os.listdir(tmp_path) == []


def test_a_device_is_not_replaced_by_a_snapshot(lm: LanguageModel, path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InvalidRequest, match="not a regular file"):
        lm.prefill(ids(20)).save(path)
    assert path.is_fifo()


KILLED_50_TIMES_THEN_TWO_AT_ONCE = """
import os, random, signal, sys, time
import torch, tiny, kvloom
folder, path = sys.argv[1], sys.argv[1] + "/a.kv"
lm = kvloom.attach(tiny.tiny_model("llama", hidden_size=256, max_position_embeddings=8192), budget_bytes=256 << 20)
policies = [None, kvloom.HeavyHitters(budget_tokens=600)]
contexts = [
    lm.prefill([token] * count, retention=policy)
    for (token, count), policy in zip(((1, 800), (2, 900)), policies)
]
start = time.perf_counter()
contexts[0].save(path)
seconds = time.perf_counter() - start
random.seed(0)
strays = 0
for round in range(50):
    pid = os.fork()
    if not pid:
        while True:
            for context in contexts:
                context.save(path)
    time.sleep(random.uniform(0, 3 * seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    others = [name for name in os.listdir(folder) if name != "a.kv"]
    assert len(others) <= 1, others
    strays += len(others)
    whole = lm.restore(path)
    known = [(own.token_ids, own.retention, own.blocks) for own in contexts]
    assert (whole.token_ids, whole.retention, whole.blocks) in known
    whole.close()
contexts[1].save(path)
assert os.listdir(folder) == ["a.kv"] and lm.restore(path).tokens == 900

writers = []
for context in contexts:
    pid = os.fork()
    if not pid:
        try:
            for _ in range(20):
                context.save(path)
        except BaseException:
            os._exit(1)
        os._exit(0)
    writers.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in writers] == [0, 0]
assert os.listdir(folder) == ["a.kv"] and lm.restore(path).tokens in (800, 900)
print(strays)
"""


def test_writers_that_are_killed_or_meet_leave_a_whole_file(tmp_path: Path, root: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"}
    command = [sys.executable, "-c", KILLED_50_TIMES_THEN_TWO_AT_ONCE, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout) >= 5, "hardly any writer was killed while it wrote"
