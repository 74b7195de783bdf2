"""`kvloom doctor`: what is in use here, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import kvloom
import tiny
from kvloom.cli import kvloom as command
from kvloom.native import Library, native
from kvloom.native.build import cpu_name


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(command, ["doctor", *arguments], env={"COLUMNS": "120", **environment})


@pytest.fixture
def kernels() -> Library:
    found = native()
    if not isinstance(found, Library):
        pytest.skip(f"no native kernels: {found.reason}")
    return found


def test_it_names_the_kernels_the_machine_and_the_versions(kernels: Library) -> None:
    result = run()
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    for words in (f"native kernels {kernels.instructions}, for float32, bfloat16", "linear layers native", cpu_name()):
        assert words in text
    assert f"threads {torch.get_num_threads()}" in text and "GB/s, read by" in text
    assert f"kvloom {kvloom.__version__}" in text and f"torch {torch.__version__}" in text
    assert str(kernels.path.parent) in text.replace(" ", "")


def test_json_holds_the_same(kernels: Library) -> None:
    found = json.loads(run("--json").stdout)
    assert found["kernels"]["in_use"] and found["kernels"]["library"] == str(kernels.path)
    # Between a memory stick of twenty years ago and what no CPU has.
    assert 1e8 < found["bytes_per_second"] < 1e13
    assert found["compiler_problem"] is None and found["versions"]["torch"] == torch.__version__


def test_kernels_that_are_switched_off_are_said_to_be() -> None:
    result = run(KVLOOM_NATIVE="0")
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "native kernels none: $KVLOOM_NATIVE is 0. PyTorch's operators serve" in text
    assert "GB/s, read by" in text


def test_lowered_instructions_are_said_to_be(kernels: Library) -> None:
    text = " ".join(run(KVLOOM_NATIVE="portable").stdout.split())
    assert "native kernels portable ($KVLOOM_NATIVE is portable), for float32, bfloat16" in text


def test_a_value_of_the_variable_that_means_nothing_is_one_line_and_wrong_use() -> None:
    result = run(KVLOOM_NATIVE="quick")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "set it to 0, 1, native" in result.stderr


def test_operations_of_a_model_that_are_not_native_are_named(tmp_path: Path) -> None:
    tiny.tiny_model("qwen2").save_pretrained(tmp_path)
    result = run("--model", str(tmp_path), KVLOOM_NATIVE="0")
    assert result.exit_code == 0, result.stderr
    assert "operations are not native" in result.stdout
    found = json.loads(run("--model", str(tmp_path), "--json", KVLOOM_NATIVE="0").stdout)
    assert found["operations"] and not any(own["native"] for own in found["operations"])
    assert all(own["reason"] for own in found["operations"])


def test_a_dtype_without_a_model_is_refused() -> None:
    result = run("--dtype", "float32")
    assert result.exit_code == 2 and "--model" in result.stderr
