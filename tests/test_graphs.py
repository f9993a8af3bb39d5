"""Compiler options and NCCL's settings for programs of many decode steps."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import Mock

import jax
import pytest
from helpers import random_params, tiny_config

from llama_jax import SamplingParams, batch_generate, stream_generate
from llama_jax.config import LayerSpec, MoeSpec
from llama_jax.decode import graphs
from llama_jax.decode.graphs import graph_options, small_places
from llama_jax.model.fuse import fuse_params
from llama_jax.model.loaded import Model
from llama_jax.sharding import make_mesh, mesh
from llama_jax.targets import find

COMMANDS = "xla_gpu_enable_command_buffer"


@pytest.fixture
def on_h100s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "current", lambda: find("h100"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture(params=["one device", "several"])
def options(request: pytest.FixtureRequest, on_h100s: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(graphs, "in_use", lambda: request.param == "several")
    return graph_options()


def test_cpus_and_amd_gpus_keep_what_xla_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graph_options() == {}  # a CPU
    monkeypatch.setattr(graphs, "current", lambda: find("mi300x"))
    assert graph_options() == {}


@pytest.mark.usefixtures("on_h100s")
def test_a_graph_loops_on_one_device_and_sums_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def commands() -> set[str]:
        return set(graph_options()[COMMANDS].split(","))

    one = commands()
    monkeypatch.setattr(graphs, "in_use", lambda: True)
    several = commands()
    assert one - several == {"WHILE"}
    assert several - one == {"COLLECTIVES"}


def test_xla_knows_the_options(options: dict[str, str]) -> None:
    """A name or a value that this jaxlib does not have would be an error."""
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid enum"):
        jax.jit(lambda x: x + 2, compiler_options={COMMANDS: "NONE_SUCH"})(1)


def test_what_the_user_sets_stays(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{COMMANDS}=FUSION")
    assert set(options) - set(graph_options()) == {COMMANDS}
    monkeypatch.setenv("XLA_FLAGS", f"--{COMMANDS}_va_remapping=true")
    assert graph_options() == options
    monkeypatch.setenv("XLA_FLAGS", f"--{COMMANDS}=")
    assert set(options) - set(graph_options()) == {COMMANDS}


def test_small_arrays_have_places_that_cannot_grow_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert small_places(tuple(jax.devices())) == []  # a CPU
    made: list[Mock] = []

    def put(array: Any, device: Any) -> Mock:
        made.append(Mock(nbytes=array.nbytes, device=device))
        return made[-1]

    monkeypatch.setattr(graphs.jax, "device_put", put)
    monkeypatch.setattr(graphs.jax, "block_until_ready", lambda arrays: arrays)
    gpus: Any = tuple(Mock(platform="gpu", id=i) for i in range(2))
    kept = small_places(gpus)
    assert {array.device.id for array in made} == {0, 1}
    for device in gpus:
        for size in graphs.SMALL:
            of_size = [array for array in made if array.device is device and array.nbytes == size]
            assert [array.delete.called for array in of_size] == [False, *[True, False] * graphs.EACH]
            assert all(any(array is one for one in kept) != array.delete.called for array in of_size)


@pytest.mark.parametrize(
    ("device", "before", "after"), [("h100", None, "0"), ("h100", "1", "1"), ("mi300x", None, None)]
)
def test_a_mesh_tells_nccl_that_nothing_runs_beside_a_graph(
    device: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NCCL_GRAPH_MIXING_SUPPORT"
    monkeypatch.setenv(name, before or "")  # also has it put back afterwards
    if before is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(mesh, "of_device", lambda _: find(device))
    make_mesh(tensor=1)
    assert os.environ.get(name) == after


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sampling", "page_size"),
    [
        ({"temperature": 0.0, "logprobs": 3}, None),
        ({"temperature": 0.7, "top_k": 20, "frequency_penalty": 0.5}, 16),
        ({"temperature": 1.5, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2}, None),
        ({"temperature": 1.0, "top_p": 0.9999}, None),  # a cut that has to be searched for
        ({"temperature": 1.0, "top_k": 700}, None),
    ],
    ids=str,
)
def test_a_graph_that_loops_makes_the_tokens_of_single_steps(sampling: dict[str, Any], page_size: int | None) -> None:
    config = tiny_config(
        LayerSpec(mlp=256),
        LayerSpec("sliding", 24, mlp=MoeSpec(4, 2, 128)),
        LayerSpec(mlp=256),
        **{"vocab_size": 1000, "hidden_size": 128, "head_dim": 32, "max_position_embeddings": 256},
    )
    model = Model(fuse_params(random_params(config), config), config)
    prompts = [[1, 2, 3], list(range(10, 60))]
    params = SamplingParams(seed=7, max_tokens=150, ignore_eos=True, **sampling)
    batch = batch_generate(model, None, prompts, params, page_size=page_size)
    for prompt, output in zip(prompts, batch, strict=True):
        steps = list(stream_generate(model, None, prompt, params, page_size=page_size))
        assert len(steps) == 150
        assert list(output.outputs[0].token_ids) == [step.token for step in steps]
