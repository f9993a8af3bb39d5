"""Which mesh is chosen, and what is said about it; `eight_devices_auto.py` runs on eight simulated devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from click.testing import CliRunner
from helpers import on_eight_devices, tiny_config

from llama_jax.cli import cli
from llama_jax.config import preset
from llama_jax.errors import RequestError
from llama_jax.plan import AutoMesh, Candidate, MeshChoice, Workload, choose_mesh, make_plan, resolve_mesh
from llama_jax.plan.automatic import explain_choice
from llama_jax.plan.device_memory import free_bytes
from llama_jax.sharding import make_mesh
from llama_jax.targets import find

CPU, MI300X = find("cpu"), find("mi300x")
USABLE = int(0.75 * MI300X.memory)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process of its own, for some tens of seconds on an idle machine
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices_auto.py")


# --- The choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch", "devices", "sizes"),
    [
        ("llama-3.1-8b", 1, 8, {}),
        ("llama-3.1-8b", 3, 8, {"data": 4}),  # batches are filled up to powers of two
        ("llama-3.1-8b", 64, 8, {"data": 8}),
        ("llama-3.1-70b", 1, 8, {}),
        ("llama-3.1-70b", 64, 7, {"data": 3, "tensor": 2}),  # the seventh is left out
        ("llama-3.1-405b", 2, 8, {"tensor": 8}),
        ("llama-3.1-405b", 64, 7, {"tensor": 4}),  # does not fit; the most that divides anything
        ("llama-3.1-8b", 64, 1, {}),
    ],
)
def test_sizes(name: str, batch: int, devices: int, sizes: dict[str, int]) -> None:
    """The chosen mesh fits by the plan's own account, and those passed over do not."""
    workload = Workload(batch, 4096, 512)
    choice = choose_mesh(preset(name), MI300X, workload, devices=devices, usable=USABLE)
    assert choice.chosen.sizes == sizes
    plans = [make_plan(preset(name), MI300X, c.sizes, workload) for c in (*choice.rejected, choice.chosen)]
    assert [plan.fits for plan in plans] == [False] * len(choice.rejected) + [choice.fits]
    assert plans[-1].needs.peak == choice.chosen.peak


def test_nothing_is_counted_where_memory_is_unknown() -> None:
    choice = choose_mesh(preset("llama-3.1-405b"), CPU, Workload(8), devices=8)
    assert (choice.fits, choice.chosen, choice.rejected) == (None, Candidate({"data": 8}, None), ())


def test_what_is_said() -> None:
    choice = MeshChoice(Candidate({"tensor": 2}, 75 * 10**9), (Candidate({}, 1412 * 10**8),), 1546 * 10**8)
    said = explain_choice(choice, Workload(1, 4096, 512), "AMD Instinct MI300X", 8)
    assert said == (
        "Loading on 2 of 8 x AMD Instinct MI300X (tensor=2), chosen for 1 row of 4096 tokens in bfloat16: each needs "
        "75 GB of 155 GB free; one device would need 141 GB; 1 row has no use for more copies, but a larger tensor=N "
        "of your own may be faster"
    )
    alone = MeshChoice(Candidate({}, 10**6), (), 2 * 10**9)
    assert explain_choice(alone, Workload(2, 64, 8, "float32"), "cpu", 1) == (
        "Loading on cpu (one device), chosen for 2 rows of 64 tokens in float32: each needs 1 MB of 2 GB free"
    )


# --- Memory -----------------------------------------------------------------------------------------------------------


def device(stats: Any) -> Any:
    def memory_stats() -> Any:
        if isinstance(stats, Exception):
            raise stats
        return stats

    return SimpleNamespace(memory_stats=memory_stats)


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device that has least; by the table where the allocator says nothing; unknown where neither does."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    tell = device({"bytes_limit": 100, "bytes_in_use": 30})
    assert free_bytes([tell, device({"bytes_limit": 90})], CPU) == 70
    assert free_bytes([device({"bytes_limit": 10, "bytes_in_use": 30})], CPU) == 0
    assert free_bytes([device(None)] * 2, MI300X) == USABLE
    assert free_bytes([device(RuntimeError("not here")), tell], MI300X) == 70
    assert free_bytes([tell, device({})], CPU) is None
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert free_bytes([device(None)], MI300X) == MI300X.memory // 2


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_workloads() -> None:
    config = tiny_config(max_position_embeddings=1000)
    assert AutoMesh().workload(config, "float32", 8) == Workload(8, 1000, 512, "float32")
    assert AutoMesh(2, 5000, 3000).workload(config, "float32", 8) == Workload(2, 1000, 1000, "float32")
    assert AutoMesh().workload(preset("llama-3.1-8b"), "bfloat16", 1) == Workload()
    for request, param in ((AutoMesh(batch=0), "batch"), (AutoMesh(context=8, prompt=9), "prompt")):
        with pytest.raises(RequestError) as caught:
            request.workload(config, "float32", 8)
        assert caught.value.param == param


def test_requests() -> None:
    config = tiny_config()
    assert resolve_mesh(None, config, "float32") is None
    mesh = make_mesh(tensor=1)
    assert resolve_mesh(mesh, config, "float32") == mesh
    for wrong in ("tensor=2", 8):
        with pytest.raises(RequestError, match="is not a mesh") as caught:
            resolve_mesh(wrong, config, "float32")  # type: ignore[arg-type]
        assert "make_mesh" in caught.value.hint


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RequestError, match="there are 2 processes"):
        resolve_mesh("auto", tiny_config(), "float32")


def test_on_one_device_it_is_that_device() -> None:
    if len(jax.devices()) > 1:
        pytest.skip("there are several devices")
    said: list[str] = []
    assert resolve_mesh("auto", tiny_config(), "float32", said.append) is None
    assert said[0].startswith(f"Loading on {jax.devices()[0].device_kind} (one device), chosen for 1 row of ")


@pytest.mark.parametrize("command", ["generate text", "chat", "bench"])
def test_auto_and_a_size(command: str) -> None:
    result = CliRunner().invoke(cli, [*command.split(), "--mesh", "auto", "--tp", "2", "-m", "no such model"])
    assert result.exit_code == 2
    assert "chooses --tp by itself" in result.output


def test_commands_that_choose_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["show", "no such model", "--mesh", "auto"])
    assert result.exit_code == 2
    assert "llama-jax plan MODEL --mesh auto" in result.output
    result = CliRunner().invoke(cli, ["verify", str(tmp_path), "--mesh", "auto"])
    assert result.exit_code == 2
    assert "--tp and --mesh need --expected" in result.output
