"""From a folder to a Model: what it holds, in which dtype, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_chat_model import write_chat_model
from tiny_models import LLAMA, write_hf

from llama_jax.checkpoint import is_checkpoint
from llama_jax.errors import CheckpointError, LlamaJaxError, ModelNotFound, RequestError
from llama_jax.generation import batch_generate
from llama_jax.library import resolve
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.params import flatten


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("loading") / "tiny", temperature=0.6)


def test_load_gives_all_that_generation_needs(folder: Path) -> None:
    said: list[str] = []
    steps: list[object] = []
    model, tokenizer = load(folder, notify=said.append, progress=lambda *step: steps.append(step))
    assert len(said) == 1
    assert str(folder) in said[0]
    assert steps
    assert model.name == str(folder)
    assert model.mesh is None
    assert model.generation_config == {"eos_token_id": 2, "temperature": 0.6}
    assert model.config.vocab_size == tokenizer.vocab_size == 3008
    assert model.device == jax.devices()[0]
    assert tokenizer.chat_template
    assert batch_generate(model, tokenizer, ["a"], max_tokens=2)[0].outputs[0].token_ids


def test_the_second_time_nothing_is_converted(folder: Path) -> None:
    load(folder)
    said: list[str] = []
    again, _ = load(folder, notify=said.append)
    assert said == []
    converted = resolve(folder)
    assert is_checkpoint(converted)
    direct, _ = load(converted, notify=said.append)
    assert said == []
    for name, leaf in flatten(direct.params).items():
        np.testing.assert_array_equal(leaf, flatten(again.params)[name])


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", jnp.float16])
def test_dtype(folder: Path, dtype: object) -> None:
    model, _ = load(folder, dtype=dtype)  # type: ignore[arg-type]
    want = jnp.dtype(jnp.float32 if dtype is None else dtype)  # float32 is the default of a CPU
    assert model.dtype == want
    assert {leaf.dtype for leaf in flatten(model.params).values()} == {want}


@pytest.mark.parametrize("dtype", ["int8", "float64", "complex64"])
def test_dtypes_that_weights_cannot_have(folder: Path, dtype: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(folder, dtype=dtype)
    assert caught.value.param == "dtype"


def test_mesh_of_one_device(folder: Path) -> None:
    """Reserved for several devices; the parameters are replicated over it."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",))
    model, tokenizer = load(folder, mesh=mesh)
    assert model.mesh is mesh
    assert {leaf.sharding.mesh for leaf in flatten(model.params).values()} == {mesh}
    plain, _ = load(folder)
    texts = [batch_generate(m, tokenizer, ["The"], max_tokens=4)[0].text for m in (model, plain)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("extra", "want"), [(None, (2,)), (5, (2, 5)), ([5, 2], (2, 5)), ((7,), (2, 7)), ([], (2,)), (0, (0, 2))]
)
def test_end_of_text_ids(folder: Path, extra: object, want: tuple[int, ...]) -> None:
    model, _ = load(folder)
    generation_config = {} if extra is None else {"eos_token_id": extra}
    assert Model(model.params, model.config, generation_config=generation_config).eos_token_ids == want
    assert Model(model.params, model.config, generation_config={"eos_token_id": None}).eos_token_ids == (2,)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        load(tmp_path / "nothing")


def test_damaged_checkpoint_is_refused_and_verify_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    """One flipped bit: found by default."""
    import shutil

    copied = tmp_path / "copy"
    shutil.copytree(resolve(folder), copied)
    largest = max((p for p in (copied / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(CheckpointError):
        load(copied)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    with pytest.raises(LlamaJaxError) as caught:
        load(tmp_path / "hf")
    assert caught.value.hint
    assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text()) == {}
