"""Compiler options of decode steps on several GPUs."""

from __future__ import annotations

import jax
import pytest

from llama_jax.sharding import capture, capture_options
from llama_jax.targets import find


@pytest.fixture
def on_two_h100s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "in_use", lambda: True)
    monkeypatch.setattr(capture, "current", lambda: find("h100"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_one_device_and_cpus_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capture_options() == {}
    monkeypatch.setattr(capture, "in_use", lambda: True)
    assert capture_options() == {}  # a CPU


@pytest.mark.usefixtures("on_two_h100s")
def test_amd_gpus_keep_what_xla_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "current", lambda: find("mi300x"))
    assert capture_options() == {}


@pytest.mark.usefixtures("on_two_h100s")
def test_xla_knows_the_options() -> None:
    """A name or a value that this jaxlib does not have would be an error."""
    options = capture_options()
    assert "COLLECTIVES" in options["xla_gpu_enable_command_buffer"].split(",")
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid enum"):
        jax.jit(lambda x: x + 2, compiler_options={"xla_gpu_enable_command_buffer": "NONE_SUCH"})(1)


@pytest.mark.usefixtures("on_two_h100s")
def test_what_the_user_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = capture_options()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_gpu_enable_command_buffer=FUSION")
    assert set(whole) - set(capture_options()) == {"xla_gpu_enable_command_buffer"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer_va_remapping=true")
    assert capture_options() == whole
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    assert set(whole) - set(capture_options()) == {"xla_gpu_enable_command_buffer"}
