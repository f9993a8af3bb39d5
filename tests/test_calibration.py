"""GPTQ, AWQ and HQQ: on one weight, in a model, in the command; `eight_devices_calibration.py` is about meshes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import TINY, error, on_eight_devices, random_params, random_tokens, run, tiny_config
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.checkpoint import load_params, open_checkpoint, verify
from llama_jax.cli import cli
from llama_jax.config import LayerSpec
from llama_jax.convert import calibrating, convert
from llama_jax.convert.verify import verify_source
from llama_jax.errors import KernelError, RequestError
from llama_jax.measure import quality
from llama_jax.model import calibration
from llama_jax.model.loaded import Model
from llama_jax.model.quantization import dequantize_params, quantize_params
from llama_jax.model.scaled_inputs import INPUTS, with_scaled_inputs
from llama_jax.params import by_leaf, flatten
from llama_jax.quantized import Layout, codes, gptq, hqq, layout_named, nearest
from llama_jax.quantized.awq import output_error
from llama_jax.quantized.grid import by_group, numbers, spanning
from llama_jax.quantized.grid import nearest as nearest_codes
from llama_jax.quantized.methods import METHODS
from llama_jax.quantized.searched import searched
from llama_jax.recipe import recipe
from llama_jax.sharding import ONE_DEVICE

TEXT = " ".join(f"Sentence {i} says that {i * i} is the square of {i}." for i in range(400))


def layout(name: str) -> Layout:
    found = layout_named(name)
    assert found is not None
    return found


def layer_inputs(columns: int, rows: int = 600) -> np.ndarray:
    """Inputs [rows, columns] that go together and are of very different sizes, as those of a model are."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((rows, columns)) @ (np.eye(columns) + 0.1 * rng.standard_normal((columns, columns)))
    return mixed * np.exp(rng.standard_normal(columns))


def weight(*shape: int) -> jax.Array:
    return 0.1 * jax.random.normal(jax.random.key(0), shape) + 0.01


def gram_of(inputs: np.ndarray) -> jax.Array:
    return jnp.asarray(inputs.T @ inputs / len(inputs), jnp.float32)


# ---- one weight


def gptq_by_hand(where: Layout, original: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The codes [out, in] that GPTQ finds, in float64 and as its paper derives it: after each column the inverse of
    the Gram matrix loses that column (equations 2 and 3 of arXiv:2210.17323)."""
    grid = searched(where, jnp.asarray(original), jnp.diagonal(jnp.asarray(gram)))
    left, gram = original.astype(np.float64), gram.astype(np.float64)
    columns = left.shape[1]
    size = where.group or columns
    inverse = np.linalg.inv(gram + gptq.DAMPING * np.mean(np.diag(gram)) * np.eye(columns))
    found = np.zeros(left.shape)
    for j in np.argsort(-np.diag(gram), kind="stable"):
        own = {name: x[:, j // size] for name, x in grid.items()}
        code = np.asarray(nearest_codes(where, own, jnp.asarray(left[:, j, None], jnp.float32)))
        found[:, j] = code[:, 0]
        wrong = (left[:, j] - np.asarray(numbers(where, own, jnp.asarray(code)))[:, 0]) / inverse[j, j]
        left -= wrong[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return found


@pytest.mark.parametrize(
    "name", ["int4_g32_min", "int8", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int4_g16", "int4_g32_zero"))]
)
def test_gptq_is_that_of_its_paper(name: str) -> None:
    """The same codes as by hand, over more columns than a block has; and a third less error than the nearest codes."""
    where, original, gram = layout(name), weight(12, 160), gram_of(layer_inputs(160))
    members = gptq.encode(where, original, gram)
    found = np.asarray(codes.codes_as(where, members, jnp.float32))
    expected = gptq_by_hand(where, np.asarray(original), np.asarray(gram))
    assert np.mean(found != expected) < 2e-3  # ties that float32 breaks in the other way
    assert np.abs(found - expected).max() <= 1

    def wrong(members: Any) -> float:
        return float(output_error(codes.decode(where, members, jnp.float32) - original, gram))

    assert wrong(members) < 0.67 * wrong(nearest.encode(where, original))
    joint = gptq.encode(where, original.reshape(3, 4, 160), gram)
    for member, value in joint.items():
        np.testing.assert_array_equal(value.reshape(members[member].shape), members[member])


def test_inputs_that_are_always_zero() -> None:
    """Neither NaN nor codes beyond the grid, whatever of the Gram matrix is missing."""
    where, original = layout("int4_g16_min"), weight(4, 64)
    for gram in (jnp.zeros((64, 64)), gram_of(layer_inputs(64)).at[:, 5].set(0).at[5].set(0)):
        decoded = codes.decode(where, gptq.encode(where, original, gram), jnp.float32)
        assert np.abs(decoded - original).max() < 0.2


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_min", "int4_g32_zero", "int8", "fp8_g32"])
def test_searched_grids(name: str) -> None:
    """No group has more weighted error than from end to end, and most of a symmetric one's have clearly less."""
    where, original = layout(name), weight(16, 128)
    importance = jnp.asarray(np.exp(np.random.default_rng(1).standard_normal(128)), jnp.float32)
    grouped = by_group(where, original)

    def wrong(grid: Any) -> np.ndarray:
        difference = numbers(where, grid, nearest_codes(where, grid, grouped)) - grouped
        return np.asarray(jnp.sum(difference**2 * importance.reshape(grouped.shape[1:]), axis=-1))

    found, plain = wrong(searched(where, original, importance)), wrong(spanning(where, grouped))
    assert (found <= plain).all()
    if where.kind == "int4":
        assert found.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("name", ["int4_g32", "int4_g64_min"])
def test_hqq(name: str) -> None:
    """Less of what it minimises than the nearest codes have; what lies on the grid comes out as it was."""
    where = layout(name)
    original = weight(16, 128) * (1 + 4 * (jax.random.uniform(jax.random.key(1), (16, 128)) > 0.97))

    def wrong(members: Any) -> float:
        return float(jnp.sum(jnp.abs(codes.decode(where, members, jnp.float32) - original) ** hqq.POWER))

    members = hqq.encode(where, original)
    assert wrong(members) < 0.985 * wrong(nearest.encode(where, original))
    on_grid = codes.decode(where, nearest.encode(where, original), jnp.float32)
    np.testing.assert_array_equal(codes.decode(where, hqq.encode(where, on_grid), jnp.float32), on_grid)


# ---- a model

GROUPED = tiny_config(LayerSpec(mlp=24), LayerSpec(qk_norm="rms", mlp=24), qkv_bias=True, mlp_bias=True, o_bias=True)


def test_scaled_inputs_change_nothing() -> None:
    """Norms, biases and rows divided, columns multiplied: the same logits, with heads that share values."""
    params, tokens = random_params(GROUPED), random_tokens(GROUPED, 2, 8)
    config = GROUPED.replace(schemes=quantize_params(params, GROUPED, recipe("int4", group=8))[1].schemes)
    hidden = calibration.embedded(params["embed"], np.asarray(tokens))
    layers = {}
    for i in range(2):
        leaves = by_leaf(params["layers"][str(i)])
        layouts = calibration._layouts(config, i)
        grams = calibration._grams(
            params["layers"][str(i)], config, i, hidden, sorted(set(INPUTS.values())), ONE_DEVICE
        )
        scaled, changed = with_scaled_inputs(leaves, layouts, grams, config, ONE_DEVICE)
        assert error(scaled["attn_norm"]["weight"], leaves["attn_norm"]["weight"]) > 0.05
        assert error(scaled["attn.v_proj"]["weight"], leaves["attn.v_proj"]["weight"]) > 0.05
        layers[str(i)] = calibration._tree(scaled)
        again = calibration._grams(layers[str(i)], config, i, hidden, sorted(set(INPUTS.values())), ONE_DEVICE)
        for name, gram in changed.items():
            assert error(gram, again[name]) < 1e-4
        hidden = calibration.advanced(layers[str(i)], config, i, hidden)
    expected, _ = run(params, GROUPED, tokens)
    assert error(run(params | {"layers": layers}, GROUPED, tokens)[0], expected) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_outputs_suffer_less(method: str) -> None:
    """Beside rounding to the nearest, of all leaves together; and layers see what is before them quantised."""
    params, tokens = random_params(GROUPED), np.asarray(random_tokens(GROUPED, 8, 16))
    _, config = quantize_params(params, GROUPED, recipe("int4", group=8))
    hidden, found, plain = calibration.embedded(params["embed"], tokens), dict[str, float](), dict[str, float]()
    for i in range(2):
        layer = params["layers"][str(i)]
        stored, errors = calibration.quantised_layer(layer, config, i, hidden, METHODS[method])
        plain |= calibration.quantised_layer(layer, config, i, hidden, METHODS["rtn"])[1]
        found |= errors
        if i == 0:
            seen = run(params, GROUPED, tokens, capture=("layers.0.out",))[2]["layers.0.out"]
            hidden = calibration.advanced(stored, config, i, hidden)
            assert 1e-3 < error(np.concatenate(hidden), seen) < 0.3
    assert np.mean([found[leaf] / plain[leaf] for leaf in plain]) < {"gptq": 0.8, "awq": 0.95}[method]


@pytest.mark.parametrize(
    ("options", "name", "says"),
    [
        ({"method": "gptq"}, "plain", "needs a calibration text"),
        ({"method": "awq", "calibration": np.full((1, 4), 99)}, "plain", "ids up to 99"),
        ({"method": "awq", "calibration": np.ones((1, 4), np.int32)}, "sigmoid-moe", "moe.* cannot be calibrated"),
        ({"method": "hqq", "weights": "int4_g8_zero"}, "plain", "hqq does not make int4_g8_zero"),
        ({"method": "hqq", "calibration": np.ones((1, 4), np.int32)}, "plain", "hqq takes no calibration text"),
        ({"method": "gptk"}, "plain", "'gptk' is not known"),
    ],
)
def test_refused(options: dict[str, Any], name: str, says: str) -> None:
    model = Model(random_params(TINY[name]), TINY[name])
    with pytest.raises(RequestError, match=says) as caught:
        lj.quantize(model, **{"weights": "int4_g4", **options})
    assert caught.value.hint


def test_beside_routed_experts() -> None:
    """Experts that are left as they are do not keep attention from being calibrated."""
    model = Model(random_params(TINY["sigmoid-moe"]), TINY["sigmoid-moe"])
    tokens = np.asarray(random_tokens(model.config, 1, 4))
    small = lj.quantize(model, "int4_g4", method="awq", calibration=tokens, ignore="*.moe.*")
    kinds = {leaf.split(".")[2] for leaf, _ in small.config.schemes if leaf.startswith("layers.")}
    assert kinds == {"attn", "mlp"}
    expected, found = (run(m.params, m.config, tokens)[0] for m in (model, small))
    assert 0 < error(found, expected) < 0.5


# ---- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("calibration") / "tiny", layers=2)


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder.with_name("prose.txt")
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_resumes_in_its_middle(method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was written is read, not quantised again; the bytes and the errors are those of one run."""
    wanted, whole, found = recipe("int4", group=8, method=method), dict[str, float](), dict[str, float]()
    once = convert(folder, tmp_path / "once", recipe=wanted, calibration=TEXT, quantised=whole.__setitem__)

    def stop(done: int, total: int, name: str) -> None:
        if name.startswith("layers.0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "twice", recipe=wanted, calibration=TEXT, progress=stop)
    quantised = []
    original = calibrating.quantised_layer
    monkeypatch.setattr(calibrating, "quantised_layer", lambda *args: (quantised.append(args[2]), original(*args))[1])
    twice = convert(folder, tmp_path / "twice", recipe=wanted, calibration=TEXT, quantised=found.__setitem__)
    assert quantised == [1]
    assert found == whole
    digests = [{name: info.digest for name, info in open_checkpoint(p).tensors.items()} for p in (once, twice)]
    assert digests[0] == digests[1]
    assert verify(once).ok
    with pytest.raises(RequestError, match=f"{method} has made"):
        verify_source(once, folder)


def test_in_memory_and_on_the_disk(folder: Path, text: Path, tmp_path: Path) -> None:
    """The same codes; the output that suffers most is told for each layer."""
    args = ["--weights", "int4", "--group", "8", "--method", "gptq", "--calibration", str(text)]
    done = CliRunner().invoke(cli, ["quantize", str(folder), str(tmp_path / "q"), *args])
    assert done.exit_code == 0, done.output
    assert re.search(r"layers.1: error 0.0\d+ of the outputs, most in (attn|mlp)", done.stderr)
    assert "lm_head: error 0.0047 of the weights" in done.stderr
    assert json.loads((tmp_path / "q" / "model.lock.json").read_text())["method"] == "gptq"
    model, tokenizer = lj.load(folder, fuse=False, dtype="float32")
    tokens = np.asarray(tokenizer.encode(TEXT, parse_special=False), np.int32)
    rows = tokens[: len(tokens) // 512 * 512].reshape(-1, 512)
    small = lj.quantize(model, "int4", group=8, method="gptq", calibration=rows)
    stored = flatten(load_params(tmp_path / "q"))
    same = total = 0
    for name, leaf in flatten(small.params).items():
        if leaf.dtype == jnp.uint8:
            same, total = same + int(np.sum(np.asarray(stored[name]) == np.asarray(leaf))), total + leaf.size
    assert same > 0.95 * total  # the embedding is bfloat16 on the disk, so that a few are others


def test_usage(folder: Path, text: Path, tmp_path: Path) -> None:
    for args, says in (
        (["--method", "gptq"], "the method gptq needs a calibration text"),
        (["--calibration", str(text)], "the method rtn takes no calibration text"),
        (["--method", "awq", "--calibration", str(tmp_path / "none.txt")], "cannot read"),
        (["--mesh", "rows=2"], "'rows' is not an axis"),
    ):
        done = CliRunner().invoke(cli, ["quantize", str(folder), str(tmp_path / "q"), "--weights", "int4", *args])
        assert done.exit_code == 2
        assert says in done.output
    with pytest.raises(RequestError, match="calibration text has"):
        convert(folder, tmp_path / "q", recipe=recipe("int4", group=8, method="awq"), calibration="Too short.")


def test_hqq_is_verified_against_its_source(folder: Path, tmp_path: Path) -> None:
    path = convert(folder, tmp_path / "q", recipe=recipe("int4", group=8, method="hqq"))
    assert verify_source(path, folder).ok
    model, _ = lj.load(folder, dtype="float32")
    small = lj.quantize(model, "int4", group=8, method="hqq")
    leaf = small.params["layers"]["1"]["mlp"]["down_proj"]
    for name, member in load_params(path)["layers"]["1"]["mlp"]["down_proj"].items():
        np.testing.assert_array_equal(leaf[name], member)


# ---- what it costs


def test_quality() -> None:
    """Of a model beside itself nothing; of another what numpy computes from all logits."""
    config = TINY["tied-mqa"]
    model = Model(random_params(config), config)
    text = quality.windows(np.asarray(random_tokens(config, 1, 6 * 16 + 3))[0], 16)
    assert text.shape == (6, 16)
    reference = quality.refer(model, text)
    same = quality.compare(model, reference)
    assert (same.kl, same.kl_error, same.log_ratio, same.same_top, same.tokens) == (0, 0, 0, 1, 48)
    small = lj.quantize(model, "int4", group=8)
    other = quality.compare(small, reference)

    def log_softmax(params: Any, config: Any) -> np.ndarray:
        logits = np.asarray(run(params, config, jnp.asarray(text))[0], np.float64)[:, 7:15]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    ours, theirs = (log_softmax(m.params, m.config) for m in (small, model))
    losses = [-np.take_along_axis(p, text[:, 8:, None], axis=2).mean() for p in (ours, theirs)]
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    assert other.perplexity == pytest.approx(np.exp(losses[0]), rel=1e-5)
    assert other.reference_perplexity == pytest.approx(np.exp(losses[1]), rel=1e-5)
    assert other.log_ratio == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert other.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert other.kl_error == pytest.approx(kl.mean(-1).std(ddof=1) / 6**0.5, rel=1e-2)
    assert other.same_top == (ours.argmax(-1) == theirs.argmax(-1)).mean()
    named = Model(model.params, config, kernels={"add_rms_norm": "pallas_triton"})
    with pytest.raises(KernelError, match="pallas_triton"):  # which no CPU has
        quality.refer(named, text)
    wider = config.replace(vocab_size=41)
    with pytest.raises(RequestError, match="have 41 and 40"):
        quality.compare(Model(random_params(wider), wider), reference)
    with pytest.raises(RequestError, match="two windows"):
        quality.windows(list(range(31)), 16)


@pytest.mark.slow
def test_quality_command(folder: Path, text: Path, tmp_path: Path) -> None:
    """The numbers of `quality.compare`, of a checkpoint beside what it was made of."""
    path = convert(folder, tmp_path / "q", recipe=recipe("int4", group=8))
    done = CliRunner().invoke(cli, ["quality", str(path), "--reference", str(folder), "--text", str(text), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    (model, tokenizer), (small, _) = lj.load(folder), lj.load(path)
    rows = quality.windows(tokenizer.encode(TEXT))
    assert facts == dataclasses.asdict(quality.compare(small, quality.refer(model, rows)))
    assert facts["kl"] > 5 * facts["kl_error"] > 0


def test_decoded_like_stored() -> None:
    """A calibrated model computes with its members as with the weights they stand for."""
    params, tokens = random_params(GROUPED), random_tokens(GROUPED, 2, 8)
    small, config = quantize_params(
        params, GROUPED, recipe("int4", group=8, method="awq"), calibration=np.asarray(random_tokens(GROUPED, 4, 16))
    )
    decoded, plain = dequantize_params(small, config, jnp.float32)
    assert error(run(small, config, tokens)[0], run(decoded, plain, tokens)[0]) < 2e-5


@pytest.fixture(scope="module")
def script() -> Any:
    """scripts/quality.py."""
    path = Path(__file__).parents[1] / "scripts" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_say_what_was_measured(script: Any) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_section(page) == page, "run scripts/quality.py --docs"


def test_a_rotated_model_is_the_same(script: Any) -> None:
    """But for its weights, of which none is left."""
    config = TINY["tied-mqa"]
    model = Model(random_params(config), config)
    turned, tokens = script.rotated(model), random_tokens(config, 2, 8)
    expected, _ = run(model.params, config, tokens)
    assert error(run(turned.params, turned.config, tokens)[0], expected) < 2e-5
    assert error(turned.params["embed"]["weight"], model.params["embed"]["weight"]) > 0.1
    assert error(turned.params["lm_head"]["weight"], turned.params["embed"]["weight"]) > 0.1


@pytest.mark.parametrize("name", ["smollm2-135m", "rotated-smollm2-135m"])
def test_what_was_measured_is_good_enough(name: str) -> None:
    """Calibrated, the rise of log-perplexity is at most half of that of rounding to the nearest."""
    path = Path(__file__).parents[1] / "docs" / "measured" / f"quality-{name}.json"
    rises = {(row["weights"], row["method"]): row["log_ratio"] for row in json.loads(path.read_text())["schemes"]}
    assert rises["int4_g64_min", "gptq"] < 0.5 * rises["int4_g64_min", "rtn"]
    assert abs(rises.get(("int8", "rtn"), 0)) < 0.003


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process of its own, for a minute on an idle machine
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices_calibration.py")
