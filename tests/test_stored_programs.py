"""Programs of an engine that are read from the disk, and found only where nothing has changed that they depend on."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import pytest
from engines import run, small_settings, some_requests, tiny_model, tokens

from llama_jax import plugins, runtime
from llama_jax.aot import stored
from llama_jax.engine.core import Core
from llama_jax.engine.program_set import Key
from llama_jax.engine.settings import EngineSettings
from llama_jax.model.loaded import Model

SETTINGS = small_settings(rows=7, decode_rows=(7,), mixed_tokens=(24,), pages=11, context=80)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "programs"
    monkeypatch.setattr(stored.runtime, "programs_dir", lambda platform: folder)
    monkeypatch.setattr("llama_jax.engine.core.compiled_before", lambda *_: {})  # not what other engines have compiled
    # What jax's own cache has is not stored: no other tests have these sizes, and here it is given none.
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield folder
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of programs that compile in no time."""
    keys = [Key("mark"), Key("scrub")]
    monkeypatch.setattr("llama_jax.engine.compiled.program_set", lambda settings, on_cpu: keys)


def compiled(core: Core) -> tuple[int, int]:
    """Programs that were read from the folder, and all."""
    reads: list[bool] = []

    def note(*args: Any) -> tuple[Any, bool]:
        program, read = stored.compile_stored(*args)
        reads.append(read)
        return program, read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.engine.compiled.compile_stored", note)
        assert len(list(core.compile_all())) == len(reads)
    return sum(reads), len(reads)


def new_core(**changes: object) -> Core:
    return Core(tiny_model(), dataclasses.replace(SETTINGS, **changes))  # type: ignore[arg-type]


def answers(core: Core, model: Model) -> list[list[int]]:
    return [list(tokens(news)) for news in run(core, some_requests(model, 3, 0))]


@pytest.mark.slow
def test_read_programs_do_the_same(folder: Path) -> None:
    model = tiny_model()
    first = new_core()
    total = len(first.programs.keys)
    compiled(first)
    files = {file: file.stat().st_size for file in folder.iterdir()}
    assert len(files) == total
    for settings in ({}, {"strict": True, "waiting": 3}):  # which change no program
        second = new_core(**settings)
        assert compiled(second) == (total, total)
        assert answers(second, model) == answers(first, model)
        assert second.snapshot().programs_from_cache == total
        assert second.snapshot().late_compilations == 0
    assert {file: file.stat().st_size for file in folder.iterdir()} == files


def paths(folder: Path, model: Model, settings: EngineSettings) -> set[Path | None]:
    """Where the programs of an engine lie, without compiling them."""
    core = Core(model, settings)
    found: set[Path | None] = set()

    def note(program: object, about: object, devices: object, mesh: object) -> tuple[None, bool]:
        found.add(stored._path(folder, program, about, devices, mesh))  # type: ignore[arg-type]
        return None, False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.engine.compiled.compile_stored", note)
        for key in core.programs.keys:  # on this thread
            core.programs._compile(key)
    return found


def test_what_programs_depend_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = paths(folder, model, SETTINGS)
    assert len(before) == len(Core(model, SETTINGS).programs.keys)
    assert paths(folder, model, SETTINGS) == before
    config = dataclasses.replace(model.config, rms_norm_eps=2e-5)
    others = [
        paths(folder, Model(model.params, config, name="other"), SETTINGS),
        paths(folder, model, dataclasses.replace(SETTINGS, pages=13)),
        paths(folder, Model(model.params, model.config, kernels={"flash_attention": "reference"}), SETTINGS),
    ]
    narrow = paths(folder, Model(jax.tree.map(lambda x: x.astype("bfloat16"), model.params), model.config), SETTINGS)
    assert len(narrow & before) == len({Key("mark")})  # which sees no weights, keys or values
    for name, value in (("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), ("LLAMA_JAX_KERNELS", "norm=reference")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            others.append(paths(folder, model, SETTINGS))
    with jax.default_matmul_precision("highest"):
        others.append(paths(folder, model, SETTINGS))
    jax.config.update("jax_default_matmul_precision", "highest")
    others.append(paths(folder, model, SETTINGS))
    jax.config.update("jax_default_matmul_precision", None)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_package", lambda: "other files")
        others.append(paths(folder, model, SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(stored, "_user_table", lambda: "tuned")
        others.append(paths(folder, model, SETTINGS))
    for i, changed in enumerate(others):
        assert not changed & before, i
        assert None not in changed
    # Nothing is stored where other packages' kernels may be part of it.
    monkeypatch.setattr(stored.plugins, "load", lambda group: ("plugin",) if group is plugins.KERNELS else ())
    assert paths(folder, model, SETTINGS) == {None}


@pytest.mark.usefixtures("small")
def test_damaged_files_are_made_again(folder: Path) -> None:
    assert compiled(new_core()) == (0, 2)
    assert compiled(new_core()) == (2, 2)
    first, second = sorted(folder.iterdir())
    whole = second.read_bytes()
    for damaged in (whole[:32] + b"x" + whole[33:], b""):
        first.write_bytes(first.read_bytes()[:-1])
        second.write_bytes(damaged)
        assert compiled(new_core()) == (0, 2)
        assert compiled(new_core()) == (2, 2)


@pytest.mark.usefixtures("small")
def test_files_of_others_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(new_core())
    with monkeypatch.context() as patch:
        patch.setattr(stored.serialize_executable, "deserialize_and_load", Mock(side_effect=ValueError("no")))
        with pytest.warns(RuntimeWarning, match="cannot be read, and is made again: no"):
            assert compiled(new_core()) == (0, 2)
    assert compiled(new_core()) == (2, 2)


@pytest.mark.usefixtures("small")
def test_programs_are_read_from_a_disk_that_takes_no_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(new_core())
    monkeypatch.setattr(stored.os, "utime", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    assert compiled(new_core()) == (2, 2)


@pytest.mark.usefixtures("small")
def test_a_full_folder_drops_what_was_not_used_for_longest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(new_core())
    old = sorted(folder.iterdir())
    for age, file in enumerate(old):
        os.utime(file, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(stored, "KEPT", 3)
    compiled(new_core(pages=13))
    left = set(folder.iterdir())
    assert len(left) == 3
    assert left & set(old) == {old[0]}


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.warns(RuntimeWarning, match="cannot be stored in .*: File exists"):
        assert compiled(new_core()) == (0, 2)


@pytest.mark.usefixtures("small")
def test_nothing_is_read_where_others_may_have_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored program is code."""
    compiled(new_core())
    assert folder.stat().st_mode & 0o777 == 0o700
    stored._warn.cache_clear()
    for mode in (0o777, 0o770):
        folder.chmod(mode)
        with pytest.warns(RuntimeWarning, match="others may write into it.*chmod 700") as warned:
            assert compiled(new_core()) == (0, 2)
        assert len(warned) == 1
        stored._warn.cache_clear()
    folder.chmod(0o755)
    assert compiled(new_core()) == (2, 2)
    owner = folder.stat().st_uid
    monkeypatch.setattr(stored.os, "getuid", lambda: owner + 1)
    with pytest.warns(RuntimeWarning, match="belongs to somebody else"):
        assert compiled(new_core()) == (0, 2)
    stored._warn.cache_clear()


def test_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Path(jax.config.jax_compilation_cache_dir) / "programs"
    monkeypatch.delenv("LLAMA_JAX_STORED_PROGRAMS", raising=False)
    assert runtime.programs_dir("cpu") is None
    assert runtime.programs_dir("gpu") == beside
    for value, expected in (("0", None), ("1", beside)):
        monkeypatch.setenv("LLAMA_JAX_STORED_PROGRAMS", value)
        assert {runtime.programs_dir("cpu"), runtime.programs_dir("gpu")} == {expected}
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert runtime.programs_dir("gpu") is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
