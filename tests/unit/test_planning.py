"""The planner: predicted bytes equal used bytes, from a config alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, MambaConfig

import families
import kvloom
import tiny
from kvloom.cache import CacheLayout, KVCache
from kvloom.engine.planner import default_budget_bytes, worst_case_blocks
from kvloom.errors import (
    CacheFull,
    InvalidRequest,
    ModelNotFound,
    PromptTooLong,
    UnknownOption,
    UnsupportedModel,
)
from kvloom.models import AttentionInterfaceBinding
from kvloom.models.hosted.weightless import build_weightless
from kvloom.models.packing.packings import choose_packing
from kvloom.planning import MemoryPlan, count_weights
from kvloom.planning.rehearsal import LiveBytes, step_bytes

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2_048,
    "dtype": "float16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a config is written, and mostly nothing else."""
    return tmp_path


def config_only(folder: Path, family: str, **changes: object) -> Path:
    tiny.tiny_config(family, **changes).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


def llama_7b(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA_7B | changes))
    return folder


def two_layers(folder: Path, **changes: object) -> Path:
    """Two layers of LLaMA-7B: a block of 16 tokens takes half a MiB."""
    return llama_7b(folder, num_hidden_layers=2, **changes)


# ---- what the real model is --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.SUPPORTED_FAMILIES)
def test_a_model_without_weights_is_to_the_planner_what_the_real_one_is_to_attach(family: str) -> None:
    real = AttentionInterfaceBinding(tiny.tiny_model(family))
    planned = build_weightless(tiny.tiny_config(family), torch.float32).binding
    for fact in ("layers", "max_tokens", "vocab_size", "dtype", "device"):
        assert getattr(planned, fact) == getattr(real, fact), fact
    assert [planned.regime(n) for n in (10, 45, 100)] == [real.regime(n) for n in (10, 45, 100)]
    assert count_weights(planned.model) == count_weights(real.model)
    assert all(isinstance(own.data, FakeTensor) for own in planned.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "mixtral"])
def test_in_16_bits_the_weights_are_counted_as_loading_makes_them(
    folder: Path, family: str, dtype: torch.dtype
) -> None:
    tiny.tiny_model(family, dtype=dtype).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert count_weights(build_weightless(loaded.config, dtype).binding.model) == count_weights(loaded)


def test_what_attach_refuses_the_planner_refuses(folder: Path) -> None:
    MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match="keeps a recurrent state"):
        kvloom.plan(folder)


def small_config(folder: Path, name: str) -> Path:
    """The config of a small model of any family of transformers."""
    family = next(family for family in families.all_families() if family.name == name)
    families.build(family).config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["lfm2", "minimax"])
def test_states_that_only_the_kinds_of_layers_tell_of_are_refused_without_weights(folder: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"keeps a state in layers of `(conv|linear_attention)`"):
        kvloom.plan(small_config(folder, name))


@pytest.mark.parametrize("name", ["dbrx", "jetmoe"])
def test_a_model_whose_course_depends_on_numbers_is_refused_as_such(folder: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"cannot be followed without weights.*Attaching it may work"):
        kvloom.plan(small_config(folder, name))


@pytest.mark.parametrize("name", ["gemma3", "modernbert-decoder"])
def test_weights_that_are_drawn_again_until_they_fit_are_planned_though_there_are_none(folder: Path, name: str) -> None:
    assert kvloom.plan(small_config(folder, name), prompt_tokens=20, max_new_tokens=4).cache_bytes > 0


@pytest.mark.parametrize("family", [*tiny.SUPPORTED_FAMILIES, *tiny.OWN_ATTENTION_FAMILIES])
def test_a_request_holds_no_more_than_was_planned_and_the_pool_exactly_what_was(family: str) -> None:
    lm = kvloom.attach(tiny.tiny_model(family), budget_bytes=2_000_000)
    # Past the switch of both length-dependent rotary families, so that rows compute their prompts apart.
    plan = lm.plan(prompt_tokens=40, max_new_tokens=12, num_beams=3)
    assert plan.allocated_bytes == lm.engine.cache.store.allocated_bytes
    assert plan.layout == lm.engine.cache.layout
    prompt = tiny.random_ids(lm.binding.model, tokens=40, seed=4)
    results = lm.beam_search(prompt, num_beams=3, max_new_tokens=12)
    assert 0 < results[0].usage.peak_bytes <= plan.cache_bytes


@pytest.mark.parametrize(("family", "blocks"), [("llama", 3 + 3 * 2), ("llama_dynamic_rope", 3 * 4)])
def test_rows_whose_rotary_factors_change_with_length_are_planned_as_admission_reserves_them_apart(
    family: str, blocks: int
) -> None:
    lm = kvloom.attach(tiny.tiny_model(family), budget_bytes=2_000_000)
    plan = lm.plan(prompt_tokens=40, max_new_tokens=12, num_beams=3)
    assert plan.groups[0].blocks == blocks
    reserved = lm.engine._keeping.admission.worst_case(prompt_tokens=40, new_tokens=12, rows=3, context=None)
    assert reserved == (blocks,)


def test_one_sequence_holds_to_the_byte_what_was_planned() -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"), budget_bytes=1_000_000)
    usage = lm.generate(list(range(1, 38)), max_new_tokens=12).usage
    # The last token is chosen and never run: 48 tokens, three full blocks.
    assert usage.peak_bytes == lm.plan(prompt_tokens=37, max_new_tokens=11).cache_bytes == 3 * 16 * 3 * 2 * 24 * 4


@pytest.mark.parametrize("budget_bytes", [100_000, 1_234_567, 8 << 20])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_budget_is_allocated_to_the_planned_byte(folder: Path, family: str, budget_bytes: int) -> None:
    plan = kvloom.plan(config_only(folder, family), budget_bytes=budget_bytes, prompt_tokens=20, max_new_tokens=4)
    cache = KVCache(plan.layout, budget_bytes=budget_bytes, device=torch.device("cpu"))
    assert plan.allocated_bytes == cache.store.allocated_bytes <= budget_bytes
    assert plan.pool_blocks == cache.blocks


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_needed_budget_is_the_smallest_that_admits_the_batch_at_once(prompts: int) -> None:
    model = tiny.tiny_model("gemma2")
    plan = kvloom.attach(model).plan(prompt_tokens=40, max_new_tokens=20, num_beams=2, batch=prompts)
    ids = [tiny.random_ids(model, tokens=40, seed=seed) for seed in range(prompts)]
    lm = kvloom.attach(model, budget_bytes=plan.needed_budget_bytes)
    lm.generate(ids, num_beams=2, max_new_tokens=20)
    exact = lm.plan(prompt_tokens=40, max_new_tokens=20, num_beams=2, batch=prompts)
    assert (exact.requests_at_once, exact.fits) == (prompts, True)
    less = lm.plan(
        prompt_tokens=40, max_new_tokens=20, num_beams=2, batch=prompts, budget_bytes=plan.needed_budget_bytes - 1
    )
    assert less.requests_at_once == prompts - 1
    if prompts == 1:
        with pytest.raises(CacheFull):
            kvloom.attach(model, budget_bytes=plan.needed_budget_bytes - 1).generate(
                ids, num_beams=2, max_new_tokens=20
            )


# ---- known sizes -------------------------------------------------------------------------------------------


def test_llama_7b_keeps_1024_tokens_in_512_mebibytes(folder: Path) -> None:
    plan = kvloom.plan(llama_7b(folder), prompt_tokens=1_024, max_new_tokens=0)
    assert plan.cache_bytes == 512 * 2**20
    assert plan.weights.plain_bytes == 2 * 6_738_415_616 + 2 * 64 * 4  # and twice 64 rotary frequencies in float32
    assert plan.rows == 1 and plan.apart_bytes == plan.cache_bytes


def test_kv_heads_are_counted_and_not_query_heads(folder: Path) -> None:
    plan = kvloom.plan(two_layers(folder, num_key_value_heads=8), prompt_tokens=1_024, max_new_tokens=0)
    assert plan.cache_bytes == 8 * 2**20


@pytest.mark.parametrize(("tokens", "blocks"), [(16, 1), (17, 2), (1_009, 64)])
def test_lengths_are_rounded_up_to_blocks(folder: Path, tokens: int, blocks: int) -> None:
    plan = kvloom.plan(two_layers(folder), prompt_tokens=tokens, max_new_tokens=0)
    assert plan.cache_bytes == blocks * 2**19


def test_eight_beams_hold_the_prompt_once_and_apart_eight_times(folder: Path) -> None:
    plan = kvloom.plan(two_layers(folder), prompt_tokens=1_024, max_new_tokens=64, num_beams=8)
    assert plan.groups[0].blocks == 64 + 8 * (4 + 1)
    assert plan.groups[0].apart_blocks == 8 * (64 + 4)
    assert plan.apart_bytes == 8 * 68 * 2**19


def test_samples_are_counted_as_beams_are_and_prompts_of_a_batch_apart(folder: Path) -> None:
    wanted = {"prompt_tokens": 100, "max_new_tokens": 30}
    beams = kvloom.plan(two_layers(folder), **wanted, num_beams=4)
    samples = kvloom.plan(folder, **wanted, num_return_sequences=4)
    batch = kvloom.plan(folder, **wanted, num_beams=4, batch=3)
    assert samples.cache_bytes == beams.cache_bytes
    assert batch.cache_bytes == 3 * beams.cache_bytes


def test_a_window_stops_growing_and_full_layers_go_on(folder: Path) -> None:
    config_only(folder, "gemma2", max_position_embeddings=20_000)
    short, long = (kvloom.plan(folder, prompt_tokens=tokens, max_new_tokens=16) for tokens in (5_000, 10_000))
    full, window = zip(short.groups, long.groups, strict=True)
    assert (full[0].reach, window[0].reach) == ("full attention", "window of 8 tokens")
    assert full[1].blocks == pytest.approx(2 * full[0].blocks, rel=0.01)
    assert window[1].blocks == window[0].blocks < full[0].blocks
    # Every group gets as many blocks as the hungriest needs.
    assert long.needed_budget_bytes == full[1].blocks * (full[1].bytes_per_block + window[1].bytes_per_block)


def test_long_generations_in_a_short_window_are_bounded_by_the_window() -> None:
    layout = CacheLayout(
        layers=AttentionInterfaceBinding(tiny.tiny_model("mistral")).layers, dtype=torch.float32, block_tokens=16
    )
    several, alone = (
        worst_case_blocks(layout, prompt_tokens=100, new_tokens=100_000, rows=rows, step_tokens=512) for rows in (4, 1)
    )
    assert several == (4 * alone[0],)


def test_tied_weights_are_counted_once(folder: Path) -> None:
    (folder / "tied").mkdir()
    (folder / "untied").mkdir()
    tied = kvloom.plan(two_layers(folder / "tied", tie_word_embeddings=True), prompt_tokens=8, max_new_tokens=1)
    untied = kvloom.plan(two_layers(folder / "untied"), prompt_tokens=8, max_new_tokens=1)
    assert untied.weights.plain_bytes - tied.weights.plain_bytes == 32_000 * 4_096 * 2


@pytest.mark.parametrize("native", ["1", "0"])
def test_load_keeps_one_copy_of_the_weights_and_attach_two(
    folder: Path, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLOOM_NATIVE", native)
    if choose_packing() is None:
        pytest.skip("neither native kernels nor oneDNN's packed operators are here")
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "vocab_size": 600}
    model = tiny.tiny_model("qwen2", dtype=torch.bfloat16, **fields)
    model.save_pretrained(folder)
    weights = kvloom.plan(folder, prompt_tokens=8, max_new_tokens=1).weights
    loaded = kvloom.load(folder).binding
    in_memory = sum(own.nbytes for own in loaded.model.parameters() if own.device.type != "meta")
    buffers = sum(own.nbytes for own in loaded.model.buffers())
    assert loaded.packed.packed_bytes == weights.packed_bytes > 0
    assert in_memory + buffers + loaded.packed.packed_bytes == weights.load_bytes
    if choose_packing().is_native:
        # Every size is one of whole tiles but 600, whose last tile is filled up with eight rows of zeros.
        assert weights.load_bytes - weights.plain_bytes == 8 * 256 * 2
    else:
        # The output layer is packed, and its plain weight is the embedding.
        assert weights.load_bytes - weights.plain_bytes == 600 * 256 * 2
    attached = kvloom.attach(model).binding
    assert weights.attach_bytes == weights.plain_bytes + attached.packed.packed_bytes


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(folder: Path) -> None:
    own = kvloom.plan(two_layers(folder), prompt_tokens=16, max_new_tokens=0)
    asked = kvloom.plan(folder, prompt_tokens=16, max_new_tokens=0, dtype="float32")
    assert (own.dtype, asked.dtype) == (torch.float16, torch.float32)
    assert asked.cache_bytes == 2 * own.cache_bytes
    # Loading converts, and the file is mapped meanwhile.
    assert asked.moments(attach=False)["reading"] > asked.weights.plain_bytes == asked.moments(attach=True)["reading"]


def test_a_config_without_a_dtype_takes_that_of_the_weights_or_float32(folder: Path) -> None:
    tiny.tiny_model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: own for name, own in fields.items() if name != "dtype"}))
    assert kvloom.plan(folder).dtype == torch.bfloat16 == kvloom.load(folder).binding.dtype
    (folder / "model.safetensors").unlink()
    assert kvloom.plan(folder).dtype == torch.float32


# ---- what fits ---------------------------------------------------------------------------------------------


def test_the_longest_sequence_and_prompt_fit_and_one_token_more_does_not(folder: Path) -> None:
    config_only(folder, "llama", max_position_embeddings=100_000)
    plan = kvloom.plan(folder, prompt_tokens=100, max_new_tokens=20, num_beams=4, batch=2, budget_bytes=1_000_000)
    assert plan.longest_sequence == plan.pool_blocks * 16
    blocks = [
        2 * worst_case_blocks(plan.layout, prompt_tokens=tokens, new_tokens=20, rows=4, step_tokens=512)[0]
        for tokens in (plan.longest_prompt, plan.longest_prompt + 1)
    ]
    assert blocks[0] <= plan.pool_blocks < blocks[1]


def test_where_windows_bound_every_layer_any_length_fits(folder: Path) -> None:
    config_only(folder, "mistral", max_position_embeddings=100_000)
    assert kvloom.plan(folder, prompt_tokens=100, max_new_tokens=20, budget_bytes=1_000_000).longest_sequence is None
    small = kvloom.plan(folder, prompt_tokens=100, max_new_tokens=20, budget_bytes=20_000)
    assert small.longest_sequence == small.pool_blocks * 16


def test_the_prompt_is_no_longer_than_the_models_context(folder: Path) -> None:
    plan = kvloom.plan(config_only(folder, "llama"), max_new_tokens=56, budget_bytes=1 << 30)
    assert plan.longest_prompt == plan.prompt_tokens == tiny.MAX_POSITIONS - 56


def test_what_does_not_fit_is_said_and_planned_all_the_same(folder: Path) -> None:
    plan = kvloom.plan(two_layers(folder), prompt_tokens=1_024, max_new_tokens=16, budget_bytes=4 << 20)
    assert (plan.fits, plan.requests_at_once) == (False, 0)
    assert plan.longest_prompt == 7 * 16
    assert plan.needed_budget_bytes > plan.allocated_bytes == 4 << 20


def test_the_default_budget_is_that_of_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.engine.planner.available_memory_bytes", lambda device: 1 << 20)
    tiny.tiny_model("llama").save_pretrained(folder)
    plan = kvloom.plan(folder)
    assert plan.budget_is_default
    assert plan.budget_bytes == default_budget_bytes(
        plan.layout, max_tokens=plan.max_tokens, device=torch.device("cpu"), taken_bytes=plan.weights.load_bytes
    )
    monkeypatch.setattr("kvloom.engine.planner.available_memory_bytes", lambda device: 1 << 40)
    assert kvloom.plan(folder).allocated_bytes == kvloom.load(folder).engine.cache.store.allocated_bytes


def test_a_loaded_model_is_planned_on_its_own_budget_and_blocks() -> None:
    lm = kvloom.attach(tiny.tiny_model("llama"), budget_bytes=500_000, block_tokens=8)
    plan = lm.plan()
    assert (plan.layout.block_tokens, plan.allocated_bytes) == (8, lm.engine.cache.store.allocated_bytes)
    assert lm.plan(block_tokens=32, budget_bytes=900_000).layout.block_tokens == 32
    assert isinstance(plan, kvloom.MemoryPlan)


# ---- scratch -----------------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_tensors_that_live_together() -> None:
    with LiveBytes() as counted:
        first = torch.empty(1_000, dtype=torch.uint8)
        view = first[10:].view(-1, 99)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        second.add_(1)
        assert (counted.live, counted.peak) == (1_500, 1_500)
        del view
        assert (counted.live, counted.peak) == (500, 1_500)


def test_the_scratch_of_a_step_grows_with_its_rows_and_not_with_the_number_of_equal_layers() -> None:
    def scratch(rows: int = 1, **changes: int) -> int:
        model = build_weightless(tiny.tiny_config("llama", **changes), torch.float32)
        layout = CacheLayout(layers=model.binding.layers, dtype=torch.float32)
        return step_bytes(model, layout, prompt_tokens=40, new_tokens=10, rows=rows, batch=1, step_tokens=512)

    assert scratch(rows=64) > 2 * scratch()
    assert scratch(num_hidden_layers=12) == scratch()
    assert scratch(intermediate_size=800) > scratch()


def test_the_scratch_of_a_step_holds_what_a_policy_observes() -> None:
    model = build_weightless(tiny.tiny_config("llama"), torch.float32)
    layout = CacheLayout(layers=model.binding.layers, dtype=torch.float32)
    work = {"prompt_tokens": 250, "new_tokens": 5, "rows": 1, "batch": 1, "step_tokens": 512}
    plain, observed = (
        step_bytes(model, layout, **work, retention=policy) for policy in (None, kvloom.HeavyHitters(budget_tokens=64))
    )
    # Scores of 4 heads x 250 queries x 250 keys and their weights, in float32, live at the same time.
    assert observed > plain and observed > 2 * 4 * 250 * 250 * 4, (observed, plain)


def test_a_rehearsal_leaves_the_model_as_it_was() -> None:
    model = build_weightless(tiny.tiny_config("gemma2"), torch.float32)
    layout = CacheLayout(layers=model.binding.layers, dtype=torch.float32)
    before = [set(module.__dict__) for module in model.binding.model.modules()]
    for _ in range(2):
        step_bytes(model, layout, prompt_tokens=40, new_tokens=10, rows=2, batch=2, step_tokens=16)
    assert [set(module.__dict__) for module in model.binding.model.modules()] == before


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_tokens": -1}, InvalidRequest, r"`prompt_tokens` must be a whole number of at least 1; got -1"),
        ({"prompt_tokens": 0}, InvalidRequest, r"`prompt_tokens` must be a whole number of at least 1; got 0"),
        ({"max_new_tokens": 1.5}, InvalidRequest, r"`max_new_tokens` must be a whole number"),
        ({"num_beams": 0}, InvalidRequest, r"`num_beams` must be a whole number of at least 1; got 0"),
        ({"batch": True}, InvalidRequest, r"`batch` must be"),
        ({"block_tokens": 0}, InvalidRequest, r"`block_tokens` must be"),
        ({"budget_bytes": 0}, InvalidRequest, r"`budget_bytes` must be"),
        ({"budget_bytes": 1_000}, CacheFull, r"budget_bytes=1,000 is below one block: .* takes \S+ bytes"),
        (
            {"num_beams": 2, "num_return_sequences": 3},
            InvalidRequest,
            r"`num_return_sequences=3` exceeds `num_beams=2`",
        ),
        ({"num_beam": 2}, UnknownOption, r"unknown option `num_beam`. Did you mean `num_beams`\?"),
        (
            {"codec": "int4"},
            InvalidRequest,
            r"`codec=int4` does not exist. Pass 'native' or 'int8'",
        ),
        ({"retention": "sinks"}, InvalidRequest, r"`retention` must be a policy"),
        ({"prompt_tokens": 250, "max_new_tokens": 7}, PromptTooLong, r"250 prompt tokens and 7 new ones exceed .* 256"),
        ({"prompt_tokens": 300}, PromptTooLong, r"300 tokens; the model's context of 256 leaves no room"),
        ({"max_new_tokens": 256}, PromptTooLong, r"1 prompt tokens and 256 new ones exceed .* 256"),
        ({"dtype": "int8"}, InvalidRequest, r"`dtype=int8` is not a floating-point dtype"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_sentence(
    folder: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kvloom.plan(config_only(folder, "llama"), **options)


def test_the_present_ways_may_be_named(folder: Path) -> None:
    assert isinstance(kvloom.plan(config_only(folder, "llama"), codec="native", retention=None), MemoryPlan)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"holds no config\.json"):
        kvloom.plan(folder)


@pytest.mark.parametrize("family", tiny.ENCODER_DECODER_FAMILIES)
def test_encoder_decoder_models_are_planned_with_their_sources(folder: Path, family: str) -> None:
    plan = kvloom.plan(config_only(folder, family), num_beams=3, max_new_tokens=20, batch=2)
    own, cross = plan.groups
    assert (own.layers, cross.layers, plan.prompt_tokens) == (3, 3, 1)
    assert own.blocks == 2 * 3 * 2
    assert cross.blocks == 2 * -(-plan.source_tokens // 16) and cross.apart_blocks == 3 * cross.blocks
    assert plan.source_tokens == {"t5": 512, "whisper": 20}.get(family, 256)
    attached = kvloom.attach(tiny.tiny_model(family)).plan(num_beams=3, max_new_tokens=20, batch=2)
    assert (attached.groups, attached.weights) == (plan.groups, plan.weights)


def test_a_model_that_writes_no_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModel, match="the config describes no language model"):
        kvloom.plan(folder)


def test_a_quantized_checkpoint_is_planned_only_with_the_plain_weights_that_are_asked_for(folder: Path) -> None:
    two_layers(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"quantized \(awq\).*Pass `dtype`"):
        kvloom.plan(folder)
    assert kvloom.plan(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_callable_without_a_cache_has_nothing_to_plan() -> None:
    lm = kvloom.attach(lambda ids: torch.zeros(*ids.shape, 7), vocab_size=7)
    with pytest.raises(InvalidRequest, match="keeps no cache"):
        lm.plan()


def test_a_loaded_model_is_not_planned_in_another_dtype() -> None:
    with pytest.raises(InvalidRequest, match=r"loaded in torch.float32; to plan it in another"):
        kvloom.attach(tiny.tiny_model("llama")).plan(dtype="bfloat16")


# ---- the whole process -------------------------------------------------------------------------------------

PREDICT = """
import json, sys, kvloom
model, options = json.loads(sys.argv[1])
if options.get("retention"):
    options["retention"] = kvloom.HeavyHitters(budget_tokens=256)
plan = kvloom.plan(model, **options)
print(plan.load_peak_bytes, plan.cache_bytes)
"""

RUN = """
import json, sys, torch, kvloom
model, options = json.loads(sys.argv[1])
policy = kvloom.HeavyHitters(budget_tokens=256) if options.get("retention") else None
lm = kvloom.load(model, dtype=options.get("dtype"), codec=options.get("codec", "native"), retention=policy)
tokens = options["source_tokens" if lm.binding.encoder else "prompt_tokens"]
prompt = torch.randint(5, lm.vocab_size, (tokens,)).tolist()
result = lm.beam_search(prompt, num_beams=options["num_beams"], max_new_tokens=options["max_new_tokens"])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024, result[0].usage.peak_bytes)
"""


def in_a_process(program: str, *arguments: object) -> tuple[int, int]:
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = done.stdout.split()[-2:]
    return int(first), int(second)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"hidden_size": 512, "intermediate_size": 1_024, "num_hidden_layers": 6, "vocab_size": 8_000}, {}),
        ({"hidden_size": 1_024, "intermediate_size": 2_816, "num_hidden_layers": 18, "vocab_size": 32_000}, {}),
        (
            {"hidden_size": 1_024, "intermediate_size": 2_816, "num_hidden_layers": 18, "vocab_size": 32_000},
            {"dtype": "float32"},
        ),
        (
            {"hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24, "vocab_size": 151_936}
            | {"num_attention_heads": 14, "tie_word_embeddings": True},
            {},
        ),
    ],
    ids=["45 MB", "550 MB", "550 MB in float32", "1 GB, tied"],
)
def test_the_peak_of_a_process_is_within_a_twentieth_of_what_was_predicted(
    tmp_path: Path, fields: dict[str, int], options: dict[str, object]
) -> None:
    model = tiny.tiny_model("qwen2", dtype=torch.bfloat16, **({"num_attention_heads": 16} | TIED_NOT | fields))
    model.save_pretrained(tmp_path)
    del model
    wanted = {"prompt_tokens": 200, "max_new_tokens": 16, "num_beams": 4} | options
    predicted, cache_bytes = in_a_process(PREDICT, str(tmp_path), wanted)
    peak, used = in_a_process(RUN, str(tmp_path), wanted)
    assert predicted == pytest.approx(peak, rel=0.05)
    assert 0.8 * cache_bytes < used <= cache_bytes


TIED_NOT = {"tie_word_embeddings": False}
SMALL = {"hidden_size": 512, "intermediate_size": 1_024, "num_hidden_layers": 6, "vocab_size": 8_000}
BART = {
    **{"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2_048, "decoder_ffn_dim": 2_048},
    **{"encoder_attention_heads": 8, "decoder_attention_heads": 8, "vocab_size": 24_000},
    "max_position_embeddings": 1_200,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("family", "fields", "options"),
    [
        ("qwen2", TIED_NOT | {"num_attention_heads": 16} | SMALL, {"prompt_tokens": 1_500, "codec": "int8"}),
        ("qwen2", TIED_NOT | {"num_attention_heads": 16} | SMALL, {"prompt_tokens": 1_500, "retention": True}),
        ("bart", BART, {"source_tokens": 1_000, "num_beams": 4}),
    ],
    ids=["int8", "a policy that observes", "encoder-decoder"],
)
def test_the_peak_is_predicted_under_a_codec_a_policy_and_for_a_source(
    tmp_path: Path, family: str, fields: dict[str, int], options: dict[str, object]
) -> None:
    long = {} if family == "bart" else {"max_position_embeddings": 8_192}
    dtype = torch.float32 if family == "bart" else torch.bfloat16
    tiny.tiny_model(family, dtype=dtype, **fields, **long).save_pretrained(tmp_path)
    wanted = {"max_new_tokens": 24, "num_beams": 2} | options
    predicted, _ = in_a_process(PREDICT, str(tmp_path), wanted)
    peak, _ = in_a_process(RUN, str(tmp_path), wanted)
    assert predicted == pytest.approx(peak, rel=0.05)
