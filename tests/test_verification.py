"""Numbers against Hugging Face transformers: every golden case, and what must not pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_models import LLAMA, write_hf

from llama_jax.checkpoint import load_params, open_checkpoint
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.errors import RequestError, VerificationError
from llama_jax.measure.verification import CHUNK, Inputs, compare, compute, read_inputs, save

GOLDENS = Path(__file__).parent / "data" / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/expected.npz"))
SMALL = "llama-biases"


def verify(*args: object) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, args)])


def only_line(result: Result) -> dict:
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(GOLDENS / SMALL, tmp_path_factory.mktemp("checkpoint") / SMALL)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / SMALL / "expected.npz") as file:
        return dict(file)


def changed(path: Path, expected: dict[str, np.ndarray], **arrays: np.ndarray | None) -> Path:
    """Writes the expected arrays with some replaced, or left out if None."""
    np.savez(path, **{k: v for k, v in (expected | arrays).items() if v is not None})
    return path


# --- Every case -------------------------------------------------------------------------------------------------------


def test_there_are_cases_of_every_kind() -> None:
    assert len(CASES) >= 29


ALWAYS = {"llama3.1-rope", "llama4-text", "mixtral-moe", "qwen3-qknorm", "smollm3-nope", "mistral-sliding"}
"""One of each kind; the others are for the slow run."""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [c if c in ALWAYS else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_golden(case: str, tmp_path: Path) -> None:
    folder = tmp_path / case
    runner = CliRunner()
    assert runner.invoke(cli, ["convert", str(GOLDENS / case), str(folder), "--quiet"]).exit_code == 0
    result = verify(folder, "--expected", GOLDENS / case / "expected.npz")
    assert result.exit_code == 0, result.output
    line = only_line(result)
    assert list(line) == ["max_abs_diff", "max_rel_diff", "greedy_match", "ok"]
    assert line["ok"] is True
    assert line["greedy_match"] is True
    assert 0 <= line["max_rel_diff"] < 5e-5


# --- What must not pass -----------------------------------------------------------------------------------------------


def shown_logit(expected: dict[str, np.ndarray]) -> tuple[int, ...]:
    """Index of some logit where the mask is 1."""
    return (*map(int, np.argwhere(expected["attention_mask"])[-3]), 17)


def test_one_logit_off(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    logits = expected["logits"].copy()
    logits[shown_logit(expected)] += 1e-2
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, logits=logits))
    assert result.exit_code == 4
    line = only_line(result)
    assert line["max_abs_diff"] == pytest.approx(1e-2, rel=1e-2)
    assert line["max_rel_diff"] == pytest.approx(line["max_abs_diff"] / np.abs(logits).max())
    assert (line["greedy_match"], line["ok"]) == (True, False)


@pytest.mark.parametrize("step", [0, 15])
def test_one_token_changed(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path, step: int) -> None:
    greedy = expected["greedy"].copy()
    greedy[1, step] = (greedy[1, step] + 1) % 96
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, greedy=greedy))
    assert result.exit_code == 4
    assert only_line(result)["greedy_match"] is False
    assert f"row 1 at step {step}" in result.stderr


@pytest.mark.parametrize("other", ["llama-gelu", "llama2-mha"])
def test_file_of_another_case(checkpoint: Path, other: str) -> None:
    result = verify(checkpoint, "--expected", GOLDENS / other / "expected.npz")
    assert result.exit_code == 4
    assert only_line(result)["ok"] is False


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_expected_logit(
    checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path, value: float
) -> None:
    logits = expected["logits"].copy()
    logits[shown_logit(expected)] = value
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, logits=logits))
    assert result.exit_code == 4
    assert only_line(result) == {"max_abs_diff": None, "max_rel_diff": None, "greedy_match": True, "ok": False}


def test_nonfinite_weights(expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    inputs = Inputs(expected["input_ids"][:1], np.ones((1, 20), bool), 2)
    checkpoint = open_checkpoint(convert(GOLDENS / SMALL, tmp_path / "c"))
    params = load_params(checkpoint.path)
    params["final_norm"]["weight"] = params["final_norm"]["weight"] * np.nan
    computed = compute(params, checkpoint.config, inputs)
    zeros = np.zeros(computed.logits.shape, np.float32)
    np.savez(tmp_path / "e.npz", input_ids=inputs.tokens, logits=zeros)
    result = compare(computed, inputs, tmp_path / "e.npz")
    assert not result.ok
    assert "computed logits are NaN" in result.reasons[0]


def test_padding_is_not_compared(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    logits = expected["logits"].copy()
    hidden = expected["attention_mask"] == 0
    assert hidden.any()
    logits[hidden] = np.nan
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, logits=logits))
    assert result.exit_code == 0, result.output


def test_wrong_shape(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = changed(tmp_path / "e.npz", expected, logits=expected["logits"][..., :-1])
    result = verify(checkpoint, "--expected", path)
    assert result.exit_code == 4
    assert "logits has shape [2, 20, 95], the model gives [2, 20, 96]" in result.stderr
    assert only_line(result)["ok"] is False


# --- Files that hold less, or nothing usable --------------------------------------------------------------------------


def test_without_greedy(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, greedy=None))
    assert result.exit_code == 0, result.output
    assert only_line(result)["greedy_match"] is None


def test_without_logits(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, logits=None))
    assert result.exit_code == 0, result.output
    assert only_line(result) == {"max_abs_diff": None, "max_rel_diff": None, "greedy_match": True, "ok": True}


def test_without_mask(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    full = expected["attention_mask"].all(axis=1)
    assert full.any()
    rows = {name: array[full] for name, array in expected.items()}
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", rows, attention_mask=None))
    assert result.exit_code == 0, result.output


def test_right_padding(checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    """The goldens are padded on the left: the same rows padded on the right give the same numbers."""
    rolled = {"greedy": expected["greedy"]}
    for name in ("input_ids", "attention_mask", "logits"):
        shift = [int(np.argmax(mask)) for mask in expected["attention_mask"]]
        rolled[name] = np.stack([np.roll(row, -n, axis=0) for row, n in zip(expected[name], shift, strict=True)])
    assert not rolled["attention_mask"][:, -1].all()
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", rolled))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input_ids": None}, "no input_ids"),
        ({"input_ids": np.zeros((2, 20))}, "integers"),
        ({"input_ids": np.zeros(20, int)}, "integers"),
        ({"attention_mask": np.ones((2, 19))}, "attention_mask has shape"),
        ({"attention_mask": np.zeros((2, 20))}, "hides all of row 0"),
        ({"greedy": np.ones((3, 4), int)}, "greedy has shape"),
        ({"logits": None, "greedy": None}, "neither logits nor greedy"),
        ({"logits": np.array([None, {}], dtype=object)}, "logits cannot be read"),
        ({"input_ids": np.array([["a"]])}, "input_ids holds"),
    ],
)
def test_unusable_arrays(
    checkpoint: Path, expected: dict[str, np.ndarray], tmp_path: Path, arrays: dict, says: str
) -> None:
    result = verify(checkpoint, "--expected", changed(tmp_path / "e.npz", expected, **arrays))
    assert result.exit_code == 2
    assert says in result.stderr
    assert not result.stdout


def test_unusable_files(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.npz"
    data = (GOLDENS / SMALL / "expected.npz").read_bytes()
    for content in (b"", b"PK", b"\x93NUMPY", data[: len(data) // 2]):
        damaged.write_bytes(content)
        with pytest.raises(RequestError, match="damaged"):
            read_inputs(damaged)
    with pytest.raises(RequestError, match="No such file"):
        read_inputs(tmp_path / "none.npz")
    with pytest.raises(RequestError, match="directory"):
        read_inputs(tmp_path)


def test_only_shapes_of_the_expected_values_are_read_before_computing(
    expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Inputs can be read from a file whose expected arrays cannot, and the number of greedy tokens with them."""
    damaged = changed(tmp_path / "e.npz", expected, logits=np.array([{}], dtype=object))
    assert read_inputs(damaged).greedy == 16


def test_token_outside_of_the_vocabulary(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    params = load_params(checkpoint)
    for token in (-1, 96):
        with pytest.raises(VerificationError, match="vocabulary has 96"):
            compute(params, opened.config, Inputs(np.full((1, 3), token), np.ones((1, 3), bool), 1))


# --- Long inputs, saving ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_chunks_give_the_numbers_of_one_pass(tmp_path: Path) -> None:
    import jax.numpy as jnp

    from llama_jax.model import forward

    length = CHUNK + 37
    write_hf(tmp_path / "hf", LLAMA | {"max_position_embeddings": 1024})
    checkpoint = open_checkpoint(convert(tmp_path / "hf", tmp_path / "c"))
    params = load_params(checkpoint.path)
    tokens = np.random.default_rng(0).integers(0, 48, (2, length))
    mask = np.ones((2, length), bool)
    mask[1, :CHUNK] = False
    computed = compute(params, checkpoint.config, Inputs(tokens, mask, 3))
    whole, _ = forward(params, checkpoint.config, jnp.asarray(tokens[:1], jnp.int32))
    np.testing.assert_allclose(computed.logits[0], whole[0], atol=1e-4 * float(np.abs(whole).max()))
    short, _ = forward(params, checkpoint.config, jnp.asarray(tokens[1:, CHUNK:], jnp.int32))
    np.testing.assert_allclose(computed.logits[1, CHUNK:], short[0], atol=1e-4 * float(np.abs(whole).max()))
    assert not computed.logits[1, :CHUNK].any()
    # Greedy decoding without any cache: each token is the likeliest after the text before it.
    for row, start in ((0, 0), (1, CHUNK)):
        text = [*tokens[row, start:], *computed.greedy[row]]
        logits, _ = forward(params, checkpoint.config, jnp.asarray([text], jnp.int32))
        assert list(logits[0, -4:-1].argmax(-1)) == list(computed.greedy[row])


def test_saved_file_is_an_expected_file(checkpoint: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.npz"
    assert verify(checkpoint, "--expected", GOLDENS / SMALL / "expected.npz", "--save-logits", ours).exit_code == 0
    result = verify(checkpoint, "--expected", ours, "--json")
    assert result.exit_code == 0
    assert only_line(result) == {"max_abs_diff": 0.0, "max_rel_diff": 0.0, "greedy_match": True, "ok": True}


def test_numbers_can_be_saved_for_inputs_alone(checkpoint: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", input_ids=np.array([[1, 2, 3]]), greedy=np.zeros((1, 16), int))
    ours = tmp_path / "ours.npz"
    assert verify(checkpoint, "--expected", tmp_path / "in.npz", "--save-logits", ours).exit_code == 4
    with np.load(ours, allow_pickle=False) as file:
        assert file["logits"].shape == (1, 3, 96)
        assert file["greedy"].shape == (1, 16)


def test_saving_without_inputs_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    result = verify(checkpoint, "--save-logits", tmp_path / "ours.npz")
    assert result.exit_code == 2
    assert "--expected" in result.stderr


def test_file_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    inputs = Inputs(np.array([[1]]), np.ones((1, 1), bool), 0)
    opened = open_checkpoint(checkpoint)
    computed = compute(load_params(checkpoint), opened.config, inputs)
    from llama_jax.errors import StorageError

    with pytest.raises(StorageError, match="no-such-folder"):
        save(tmp_path / "no-such-folder" / "o.npz", inputs, computed)


# --- Digests ----------------------------------------------------------------------------------------------------------


def test_digests(checkpoint: Path) -> None:
    result = verify(checkpoint)
    assert result.exit_code == 0
    assert "35 tensors" in result.stdout
    assert only_line(verify(checkpoint, "--json")) == {
        "path": str(checkpoint),
        "tensors": 35,
        "bytes": open_checkpoint(checkpoint).nbytes,
        "failures": [],
        "ok": True,
    }


@pytest.mark.parametrize("with_numbers", [False, True])
def test_flipped_bit(tmp_path: Path, with_numbers: bool) -> None:
    folder = convert(GOLDENS / SMALL, tmp_path / "c")
    data = max((p for p in (folder / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    args = ["--expected", GOLDENS / SMALL / "expected.npz"] if with_numbers else []
    result = verify(folder, *args)
    assert result.exit_code == 4
    assert re.search(r"tensor \S+ has digest", result.stderr)
    as_json = verify(folder, *args, "--json")
    assert as_json.exit_code == 4
    assert with_numbers or only_line(as_json)["ok"] is False


def test_other_formats_are_converted_first() -> None:
    result = verify(GOLDENS / SMALL, "--expected", GOLDENS / SMALL / "expected.npz")
    assert result.exit_code == 0, result.output
    assert only_line(result)["ok"] is True
