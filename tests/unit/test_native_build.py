"""Building and loading the native kernels: once, safely, and never as a condition for anything to work."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kvloom.errors import InvalidRequest
from kvloom.native import Absent, Library, native
from kvloom.native import library as library_module
from kvloom.native.build import TARGETS, BuildError, build, find_compiler
from kvloom.native.library import load
from native_targets import targets

try:
    find_compiler()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

BUILD = "import sys, pathlib; from kvloom.native.build import build; print(build('native', pathlib.Path(sys.argv[1])))"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Two files that compile in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    (folder / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and an empty temporary one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "cache" / "kvloom"


@pytest.fixture
def forgetful() -> None:
    """Each process loads once; such a test wants to see it happen."""
    for remembered in (library_module._native, library_module._outcome):
        remembered.cache_clear()
    yield
    for remembered in (library_module._native, library_module._outcome):
        remembered.cache_clear()


def test_what_was_built_is_found_again(sources: Path, cache: Path) -> None:
    first = build("native", sources)
    assert first.parent == cache
    written = first.stat().st_mtime_ns
    assert build("native", sources) == first and first.stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [first]


def test_a_changed_source_is_built_anew(sources: Path, cache: Path) -> None:
    first = build("native", sources)
    (sources / "two.cpp").write_text('extern "C" int two() { return 3; }\n')
    assert build("native", sources) != first


def test_of_processes_that_start_at_once_one_builds_a_whole_library_for_all(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counter, compiler = tmp_path / "calls", tmp_path / "slow"
    compiler.write_text(f'#!/bin/sh\necho >> {counter}\nsleep 1\nexec {find_compiler().command} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILD, str(sources)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(paths) == 1 and list(cache.iterdir()) == [Path(paths.pop())]
    assert counter.read_text().count("\n") == 3, "two files, one library"


def test_a_lock_of_a_process_that_was_killed_stops_nobody(sources: Path, cache: Path, tmp_path: Path) -> None:
    name = build("native", sources).name
    (cache / name).rename(cache / f"{name}.lock")
    assert build("native", sources) == cache / name
    assert list(cache.iterdir()) == [cache / name]


def test_without_a_writable_cache_folder_a_private_temporary_one_serves(
    sources: Path, tmp_path: Path, cache: Path
) -> None:
    cache.parent.write_text("a file where a folder should be")
    path = build("native", sources)
    assert path.parent.parent == tmp_path / "temporary"
    assert path.parent.stat().st_mode & 0o077 == 0
    assert build("native", sources) == path


def test_a_temporary_folder_that_others_can_write_to_is_not_trusted(sources: Path, tmp_path: Path, cache: Path) -> None:
    cache.parent.write_text("a file where a folder should be")
    path = build("native", sources)
    path.parent.chmod(0o777)
    with pytest.raises(BuildError, match=r"neither .* nor .* can be written"):
        build("native", sources)


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
def test_without_a_working_compiler_one_line_says_so(
    command: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forgetful: None
) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.delenv("KVLOOM_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING):
        found = [native(), native()]
    assert isinstance(found[0], Absent) and command in found[0].reason
    assert [record.getMessage() for record in caplog.records] == [
        f"No native kernels: {found[0].reason}. PyTorch's operators serve instead, slower."
    ]


def test_what_failed_once_is_not_tried_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None, tmp_path: Path
) -> None:
    counter = tmp_path / "calls"
    compiler = tmp_path / "fails"
    compiler.write_text(f"#!/bin/sh\necho >> {counter}\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    calls = []
    for spelled in ("1", "native", "1", ""):
        monkeypatch.setenv("KVLOOM_NATIVE", spelled)
        assert "exit status 3" in native().reason
        calls.append(counter.read_text().count("\n"))
    assert calls[0] > 0 and set(calls) == {calls[0]}


def test_a_full_disk_leaves_us_without_kernels_and_says_so(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvloom.native.build.os.replace", full)
    with pytest.raises(BuildError, match="cannot take the kernels: No space left"):
        build("native", sources)
    assert list(cache.iterdir()) == []


def test_a_source_that_does_not_compile_is_told_by_its_first_error(sources: Path, cache: Path) -> None:
    (sources / "two.cpp").write_text("int two() { return three; }\n")
    with pytest.raises(BuildError, match="three"):
        build("native", sources)
    assert list(cache.iterdir()) == []


def test_the_environment_switches_the_kernels_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forgetful: None
) -> None:
    monkeypatch.setenv("KVLOOM_NATIVE", "0")
    with caplog.at_level(logging.WARNING):
        assert native() == Absent("$KVLOOM_NATIVE is 0")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("target", ["avx512", "avx2", "portable"])
def test_the_environment_lowers_the_instructions(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if target not in targets():
        pytest.skip(f"this machine has no {target}")
    monkeypatch.setenv("KVLOOM_NATIVE", target)
    found = native()
    assert isinstance(found, Library)
    assert found.target == target and found.instructions.lower() == target


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLOOM_NATIVE", "fast")
    with pytest.raises(InvalidRequest, match="set it to 0, 1, native"):
        native()


def test_instructions_that_the_cpu_lacks_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.native.build.cpu_flags", lambda: frozenset({"sse2"}))
    if "avx2" in TARGETS:
        with pytest.raises(BuildError, match=r"the CPU has no avx2, .*which avx2 needs"):
            build("avx2")


@pytest.mark.parametrize("target", targets())
def test_vectors_agree_with_numpy_on_every_target(target: str) -> None:
    pointer = ctypes.c_void_p
    check = load(target).function("kvloom_vector_check", *[pointer] * 4)
    rounded = load(target).function("kvloom_round_bf16", pointer, pointer, ctypes.c_int64)
    special = np.float32([0, -0.0, 1, -1, 88.7, 89.5, -87.3, -87.4, -200, -np.inf, np.inf, np.nan, 1e-30, 0.5, 3, -3])
    ordinary = np.random.default_rng(0).uniform(-20, 20, 16).astype(np.float32)
    for x in (special, ordinary):
        exponentials, total, largest = np.empty(16, np.float32), np.empty(1, np.float32), np.empty(1, np.float32)
        check(x.ctypes.data, exponentials.ctypes.data, total.ctypes.data, largest.ctypes.data)
        with np.errstate(over="ignore"):
            expected = np.where(x < np.float32(-87.33), 0, np.exp(x.astype(np.float64)).astype(np.float32))
        np.testing.assert_allclose(exponentials, expected, rtol=3e-7)
        assert not exponentials[x < -88].any()
    np.testing.assert_allclose(total[0], ordinary.sum(), rtol=1e-5)
    assert largest[0] == ordinary.max()

    bits = torch.randint(-(2**31), 2**31 - 1, (1003,), dtype=torch.int32)
    bits[:3] = torch.tensor([0x7F800001, 0x3F808000, 0x3F818000])  # NaN, and two ties
    x, y = bits.view(torch.float32), torch.zeros(1003, dtype=torch.bfloat16)
    rounded(x.data_ptr(), y.data_ptr(), x.numel())
    expected = x.to(torch.bfloat16)
    same = (y.view(torch.int16) == expected.view(torch.int16)) | (y.isnan() & expected.isnan())
    assert bool(same.all())


def test_the_package_carries_its_sources() -> None:
    from importlib.resources import files

    names = {file.name for file in files("kvloom.native").joinpath("src").iterdir()}
    assert {"simd.h", "about.cpp"} <= names
    assert os.path.isdir(str(files("kvloom.native")))
