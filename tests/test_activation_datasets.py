"""Datasets of activations: what is read back is what `forward` gives, and a run that was stopped resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import TINY, error, random_params, run
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_jax as lj
import llama_jax.interp
from llama_jax.adapters import LoraConfig, new_adapter, with_adapter
from llama_jax.config import RopeSpec
from llama_jax.errors import CheckpointError, LlamaJaxError, RequestError, StorageError
from llama_jax.interp import dataset
from llama_jax.model.loaded import Model

CONFIG = TINY["sigmoid-moe"]
MODEL = Model(random_params(CONFIG), CONFIG)
NAMES = ("layers.*.out", "layers.1.attn_heads")
TEXTS = [np.random.default_rng(i).integers(0, CONFIG.vocab_size, 1 + 7 * i % 23).tolist() for i in range(12)]


def record(folder: Path, texts: object = TEXTS, **options: object) -> lj.interp.Activations:
    return lj.record_activations(MODEL, None, texts, NAMES, folder, batch_tokens=64, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_is_read_back(tmp_path: Path) -> None:
    counts: list[int] = []
    data = record(tmp_path / "a", iter(TEXTS), progress=lambda done, *_: counts.append(done))
    assert data.names == ("layers.0.out", "layers.1.out", "layers.1.attn_heads")
    assert len(data) == sum(map(len, TEXTS)) == counts[-1]
    assert len(counts) > 3  # in several batches
    for i, ids in list(enumerate(TEXTS))[::4]:
        rows = data.rows_of(i)
        np.testing.assert_array_equal(data["token_ids"][rows], ids)
        _, _, seen = run(MODEL.params, CONFIG, np.asarray([ids]), capture=NAMES)
        for name in data.names:
            assert error(np.asarray(data[name][rows]), seen[name][0]) < 1e-5
    every = np.asarray(data["layers.0.out"])
    np.testing.assert_array_equal(np.concatenate(list(data.batches("layers.0.out", 7))), every)
    stored = json.loads((tmp_path / "a" / "layers.0.out" / "zarr.json").read_text())
    assert stored["zarr_format"] == 3
    half = record(tmp_path / "b", TEXTS[:2], dtype="bfloat16")
    np.testing.assert_array_equal(half["layers.0.out"][:3], every[:3].astype(half["layers.0.out"].dtype.numpy_dtype))


@given(size=st.integers(1, 40), rows=st.integers(1, 30), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_batches_are_every_row_once(tmp_path_factory: pytest.TempPathFactory, size: int, rows: int, seed: int) -> None:
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dataset, "CHUNK_BYTES", 4 * rows)
        array = dataset.opened(folder, "x", (), "int32", create=True)
    array.resize(exclusive_max=[100]).result().write(np.arange(100, dtype=np.int32)).result()
    data = dataset.Activations(folder, dataset.Description({}, {"x": []}, "int32", texts=1, tokens=93))
    shuffled = list(data.batches("x", size, seed=seed))
    assert [len(b) for b in shuffled[:-1]] == [size] * (len(shuffled) - 1)
    found = np.concatenate(shuffled)
    assert sorted(found) == list(range(93))
    np.testing.assert_array_equal(found, np.concatenate(list(data.batches("x", size, seed=seed))))
    np.testing.assert_array_equal(np.concatenate(list(data.batches("x", size))), np.arange(93))


def test_stopped_runs_resume(tmp_path: Path) -> None:
    def until(count: int) -> Iterator[list[int]]:
        yield from TEXTS[:count]
        raise KeyboardInterrupt

    whole = record(tmp_path / "whole")
    written = []
    for count in (2, 8, 11):
        with pytest.raises(KeyboardInterrupt):
            record(tmp_path / "part", until(count))
        written.append(len(lj.open_activations(tmp_path / "part")))
    assert 0 == written[0] < written[1] < written[2] < len(whole)
    # Rows of a batch that was not finished: they do not count.
    array = dataset.opened(tmp_path / "part", "layers.0.out")
    array.resize(exclusive_max=[written[2] + 500, CONFIG.hidden_size]).result()
    part = record(tmp_path / "part")
    for name in whole.names:
        np.testing.assert_allclose(np.asarray(part[name]), np.asarray(whole[name]), atol=1e-5)
    assert part.description.digest == whole.description.digest
    more = record(tmp_path / "part", [*TEXTS, [1, 2, 3]])
    assert len(more) == len(whole) + 3
    assert record(tmp_path / "part", [*TEXTS, [1, 2, 3]]).description == more.description


def test_adapters_of_copied_weights_are_told_apart(tmp_path: Path) -> None:
    lora = LoraConfig(rank=1, target_modules=(), target_parameters=("experts.down_proj",))
    new = new_adapter(MODEL.params, CONFIG, lora, jax.random.key(0))
    first, second = (with_adapter(MODEL, jax.tree.map(lambda x, by=by: x + by, new)) for by in (0.1, 0.2))
    for _ in range(2):
        lj.record_activations(first, None, TEXTS[:2], NAMES, tmp_path)
    with pytest.raises(RequestError, match="begun with settings"):
        lj.record_activations(second, None, TEXTS[:2], NAMES, tmp_path)


def test_texts_may_have_the_whole_context(tmp_path: Path) -> None:
    """Which dynamic rope makes longer than the one of the training."""
    rope = RopeSpec(kind="dynamic", factor=2.0, original_max_positions=16)
    config = TINY["plain"].replace(rope=rope, max_position_embeddings=16)
    model = Model(random_params(config), config)
    assert len(lj.record_activations(model, None, [[1] * 32], ["final_norm"], tmp_path / "a")) == 32
    with pytest.raises(RequestError, match="33 tokens, the model's context 32"):
        lj.record_activations(model, None, [[1] * 33], ["final_norm"], tmp_path / "b")


def test_refusals(tmp_path: Path) -> None:
    record(tmp_path / "a", TEXTS[:4])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "description.json").write_text("{")
    (tmp_path / "file").write_text("")
    data = lj.open_activations(tmp_path / "a")
    lora = LoraConfig(rank=1, target_modules=("q_proj",))
    adapted = with_adapter(MODEL, new_adapter(MODEL.params, CONFIG, lora, jax.random.key(0)))
    cases: dict[str, tuple[type[LlamaJaxError], object]] = {
        "other texts": (RequestError, lambda: record(tmp_path / "a", TEXTS[1:6])),
        "holds 4 other": (RequestError, lambda: record(tmp_path / "a", TEXTS[:2])),
        "begun with dtype": (RequestError, lambda: record(tmp_path / "a", dtype="float16")),
        "begun with settings": (RequestError, lambda: record(tmp_path / "a", max_length=9)),
        "'adapter': ": (
            RequestError,
            lambda: lj.record_activations(adapted, None, TEXTS[:4], NAMES, tmp_path / "a", batch_tokens=64),
        ),
        "something else": (RequestError, lambda: record(tmp_path / "full")),
        "cut texts": (RequestError, lambda: record(tmp_path / "long", [[1] * 65])),
        "no row for each token": (
            RequestError,
            lambda: lj.record_activations(MODEL, None, TEXTS, ["layers.0.attn_probs"], tmp_path / "b"),
        ),
        "holds no activations": (CheckpointError, lambda: lj.open_activations(tmp_path / "damaged")),
        "no activation 'layers.0.in'": (RequestError, lambda: data["layers.0.in"]),
        "batches of 0 rows": (RequestError, lambda: next(data.batches("layers.0.out", 0))),
        "max_length=-1": (RequestError, lambda: record(tmp_path / "new", max_length=-1)),
        "written in 'int8'": (RequestError, lambda: record(tmp_path / "new", dtype="int8")),
        "text 1 holds token id 40": (RequestError, lambda: record(tmp_path / "ids", [[1], [40]])),
        "text 4 of 4": (RequestError, lambda: data.rows_of(4)),
        "file": (StorageError, lambda: record(tmp_path / "file" / "below")),
    }
    for message, (kind, call) in cases.items():
        with pytest.raises(kind, match=message):
            call()  # type: ignore[operator]
    (tmp_path / "a" / "layers.0.out" / "zarr.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"layers\.0\.out"):
        lj.open_activations(tmp_path / "a")["layers.0.out"]
