"""Plugins of other packages: an example package that is really installed, and packages that are broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from helpers import GOLDENS, TOLERANCE, error, golden_json, load_golden
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from server_process import KEY, serving

from llama_jax import plugins
from llama_jax.cli import cli
from llama_jax.config import config_from_hf
from llama_jax.config.families import FAMILIES, Family, find_family, renamed
from llama_jax.errors import RequestError, UnsupportedModel
from llama_jax.generation.constraints import constraints_of
from llama_jax.sampling import SamplingParams
from llama_jax.text.tools import FORMATS, ToolFormat, format_named, format_of

EXAMPLE = Path(__file__).parent / "example_plugin"
GOLDEN = "llama3.1-rope"

# --- The example package, installed -----------------------------------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
import numpy as np
from llama_jax.convert import export_hf
from llama_jax.generation import batch_generate
from llama_jax.generation.llm import LLM
from llama_jax.kernels import report
from llama_jax.kernels.dispatch import using
from llama_jax.library import resolve
from llama_jax.loading import load
from llama_jax.model import forward
from llama_jax.text.tools import format_named, format_of

folder, inputs, out = sys.argv[1:]
model, tokenizer = load(folder, dtype="float32", kernels={"add_rms_norm": "example"})
with np.load(inputs) as given, using(**model.kernels):
    mask = given["attention_mask"] > 0
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)
    logits, _ = forward(model.params, model.config, given["input_ids"].astype(np.int32), positions)
np.save(Path(out) / "logits.npy", logits)
before = sum(report().values())
(generated,) = batch_generate(model, tokenizer, ["ab"], max_tokens=3, ignore_eos=True)
llm = LLM(model, tokenizer, rows=2, context=32)
asked = {"max_tokens": 12, "ignore_eos": True, "logit_bias": {7: 90.0}}
repeating, rule = llm.generate([[3, 7]], **asked), llm.generate([[3, 7]], **asked, logits_processors=["example"])
export_hf(resolve(folder), Path(out) / "exported")
choices = [(c.operation, c.backend, c.reason) for c in report()]
tools = format_of("Call @name{...}")
parser = tools.parser(["f"])
called = [repr(delta) for delta in (*parser.feed('@f{"a": 1}'), *parser.finish())] * (format_named("example") is tools)
print(json.dumps({"called": called,
                  "family": model.config.family, "choices": choices, "traced": sum(report().values()) - before,
                  "repeating": repeating[0].outputs[0].token_ids, "not": rule[0].outputs[0].token_ids,
                  "tokens": len(generated.outputs[0].token_ids)}))
"""


def theirs(name: str) -> str:
    """The name of one of Llama's tensors in the example's checkpoints; written out again, apart from the package."""
    for old, new in (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.(\d+)\.input_layernorm\.", r"transformer.h.\1.norm_1."),
        (r"^model\.layers\.(\d+)\.post_attention_layernorm\.", r"transformer.h.\1.norm_2."),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj\.", r"transformer.h.\1.attn.out."),
        (r"^model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"transformer.h.\1.attn.\2."),
        (r"^model\.norm\.", "transformer.norm."),
    ):
        name = re.sub(old, new, name)
    return name


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a process that finds the example package."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")  # the build writes beside its sources
    options = ["--no-deps", "--no-build-isolation", "--offline", "--python", sys.executable]
    command = ["uv", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return os.environ | {"PYTHONPATH": str(folder / "site"), "LLAMA_JAX_CACHE": str(folder / "cache")}


def run(environment: dict[str, str], *args: str) -> dict:
    command = [sys.executable, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model as one of the example family, without what are that family's defaults."""
    folder = tmp_path_factory.mktemp("model") / "example"
    folder.mkdir()
    config = golden_json(GOLDEN) | {"model_type": "example", "architectures": ["ExampleForCausalLM"]}
    for key in ("bos_token_id", "eos_token_id"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDENS / GOLDEN / "model.safetensors")
    renamed_tensors = {theirs(name): tensor for name, tensor in tensors.items()}
    assert not renamed_tensors.keys() & {name for name in tensors if "self_attn" in name or "norm" in name}
    save_file(renamed_tensors, folder / "model.safetensors")
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 3, "b": 4, "c": 5}, [])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
def test_the_example_package(environment: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """Its family is Llama by other names: the logits are those that transformers computed with the same weights."""
    expected = load_golden(GOLDEN)
    found = run(environment, "-c", RUN, str(folder), str(GOLDENS / GOLDEN / "expected.npz"), str(tmp_path))
    logits = np.load(tmp_path / "logits.npy")
    assert error(logits, expected.logits, expected.mask) < TOLERANCE
    assert found["family"] == "example"
    assert found["tokens"] == 3
    assert found["called"] == ["Call(name='f')", """Arguments(text='{"a": 1}')"""]
    norms = {tuple(choice) for choice in found["choices"] if choice[0] == "add_rms_norm"}
    assert norms == {("add_rms_norm", "example", "named by using() or load(kernels=)")}
    assert set(found["repeating"]) == {7}
    assert found["not"][1::2] == [7] * 6
    assert 7 not in found["not"][::2]
    assert found["traced"] > 0  # so generation's own programs are among these
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    source = load_file(folder / "model.safetensors")
    assert exported.keys() == source.keys()
    for name, tensor in source.items():
        np.testing.assert_array_equal(exported[name], tensor)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "example"


@pytest.mark.slow
def test_the_example_on_the_command_line(environment: dict[str, str], folder: Path) -> None:
    listed = run(environment, "-m", "llama_jax.cli", "plugins", "--json")
    rows = {(row["group"], row["name"], row["state"], row["problem"]) for row in listed["plugins"]}
    assert rows == {(group, "example", "ok", "") for group in listed["groups"]}
    origins = {row["origin"].partition(" (")[0] for row in listed["plugins"]}
    assert origins == {"llama-jax-example 1.0"}
    plan = run(environment, "-m", "llama_jax.cli", "plan", str(folder), "--target", "Example GPU", "--json")
    assert "example-gpu" in json.dumps(plan)


@pytest.mark.slow
def test_the_example_on_a_server(environment: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its route is behind the key, described, and asks the model."""
    for name in ("PYTHONPATH", "LLAMA_JAX_CACHE"):
        monkeypatch.setenv(name, environment[name])
    with serving(folder) as (_, said):

        def answered(path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
            data = None if body is None else json.dumps(body).encode()
            headers = {"content-type": "application/json"} | headers
            try:
                with urllib.request.urlopen(urllib.request.Request(said["url"] + path, data, headers)) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, json.load(error)

        key = {"x-api-key": KEY}
        assert answered("/example/length", {"text": "abc"}, **key) == (200, {"characters": 3, "tokens": 3})
        assert answered("/example/length", {"text": "abc"})[0] == 401
        assert answered("/example/length", {"text": 3}, **key)[0] == 400
        assert answered("/example/length", {"text": "a", "model": "other"}, **key)[0] == 404
        assert "/example/length" in answered("/openapi.json", **key)[1]["paths"]


@pytest.mark.slow
def test_without_the_package_its_model_is_unknown(environment: dict[str, str], folder: Path) -> None:
    env = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "llama_jax.cli", "show", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == UnsupportedModel.exit_code
    assert "model type 'example' is not supported" in done.stderr


# --- Broken packages --------------------------------------------------------------------------------------------------

GOOD = Family(
    architecture="GoodForCausalLM",
    defaults=FAMILIES["llama"].defaults,
    tensor_names={"model.layers.{n}.mlp": "blocks.{n}.ffn"},
)
GOOD_TOO = Family("GoodForCausalLM", {})
NOT_A_FAMILY = {"architecture": "Odd"}
WINDOWS = Family("Odd", {}, windows="some")  # type: ignore[arg-type]
BIAS = Family("Odd", {}, qkv_bias="sometimes")  # type: ignore[arg-type]
CHUNKS = Family("Odd", {}, windows="chunked")
HOLES = Family("Odd", {}, tensor_names={"model.layers.{n}.mlp": "blocks.ffn"})
TWICE = Family("Odd", {}, tensor_names={"model.layers.{n}.mlp": "b.{n}", "model.layers.{n}.attn": "b.{n}"})


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Name and value of entry points of families, as if packages had them; the other groups are empty."""
    points: list[tuple[str, str]] = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        here = points if group == plugins.FAMILIES.name else []
        return [importlib.metadata.EntryPoint(name, f"{__name__}:{value}", group) for name, value in here]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    plugins.load.cache_clear()
    yield points
    plugins.load.cache_clear()


def test_a_family_is_found_by_its_model_type(families: list[tuple[str, str]]) -> None:
    families.append(("good", "GOOD"))
    assert find_family("good") is GOOD
    golden = golden_json(GOLDEN)
    config = config_from_hf(golden | {"model_type": "good", "architectures": ["GoodForCausalLM"]})
    assert config.replace(family="llama") == config_from_hf(golden).replace(
        qkv_bias=False, o_bias=False, mlp_bias=False
    )
    with pytest.raises(UnsupportedModel, match="architecture 'LlamaForCausalLM'"):
        config_from_hf(golden | {"model_type": "good"})


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("odd", "MISSING", "AttributeError"),
        ("odd", "NOT_A_FAMILY", "it is not a llama_jax.config.families.Family"),
        ("llama", "GOOD", "another model type 'llama'"),
        ("mllama", "GOOD", "another model type 'mllama'"),
        ("good", "GOOD_TOO", "another model type 'good'"),
        ("odd", "WINDOWS", "its windows is 'some'"),
        ("odd", "BIAS", "its qkv_bias is 'sometimes'"),
        ("odd", "CHUNKS", "no attention_chunk_size"),
        ("odd", "HOLES", "do not have the same holes"),
        ("odd", "TWICE", "two modules one name"),
    ],
)
def test_a_broken_family_is_reported_and_harms_no_other(
    families: list[tuple[str, str]], name: str, value: str, problem: str
) -> None:
    families += [("good", "GOOD"), (name, value)]
    with pytest.warns(RuntimeWarning, match=rf"the plugin '{name}' of an unknown package .* is broken: .*{problem}"):
        loaded = plugins.load(plugins.FAMILIES)
    assert [plugin.state for plugin in loaded].count("broken") == 1
    assert len(plugins.sound(plugins.FAMILIES)) == 1
    assert find_family("llama") is FAMILIES["llama"]
    with pytest.raises(UnsupportedModel, match="'no-such'") as caught:
        find_family("no-such")
    assert problem in str(caught.value.hint)
    done = CliRunner().invoke(cli, ["plugins"])
    assert done.exit_code == 0
    assert problem in done.stdout
    rows = json.loads(CliRunner().invoke(cli, ["plugins", "--json"]).stdout)["plugins"]
    assert {(row["name"], row["state"]) for row in rows} == {("good", "ok"), (name, "broken")} or name == "good"


TOOLS = ToolFormat(lambda template: "tools" in template, lambda names: None, lambda *_: "")


def test_tool_parsers_that_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in formats stay what they are, and a sound plugin is found by its name and by the template."""
    points = [("five", "NOT_CALLABLE"), ("hermes", "TOOLS"), ("tools", "TOOLS")]
    found = [importlib.metadata.EntryPoint(name, f"{__name__}:{value}", "") for name, value in points]
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: found if group == plugins.TOOL_PARSERS.name else [])
    plugins.load.cache_clear()
    with pytest.warns(RuntimeWarning, match="is broken"):
        assert format_named("hermes") is FORMATS["hermes"]
    assert format_named("tools") is format_of("tools") is TOOLS
    with pytest.raises(RequestError, match="no tool parser 'five'") as caught:
        format_named("five")
    assert "it is int, and not a ToolFormat" in caught.value.hint
    assert "'hermes' exists already" in caught.value.hint
    plugins.load.cache_clear()


class Refuses:
    def __init__(self, *_: object):
        raise RequestError("only for prompts of two tokens", param="prompt", hint="give two")


def raises(*_: object) -> None:
    raise KeyError("lost")


surplus = Refuses
NOT_CALLABLE = 5


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("refuses", "only for prompts of two tokens"),
        ("raises", "the logits processor 'raises' failed: KeyError: 'lost'"),
        ("raise", "there is no logits processor 'raise'"),
        ("five", "there is no logits processor 'five'"),
    ],
)
def test_logits_processors_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, error: str) -> None:
    points = [("refuses", "Refuses"), ("raises", "raises"), ("raises", "surplus"), ("five", "NOT_CALLABLE")]

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [importlib.metadata.EntryPoint(name, f"{__name__}:{value}", group) for name, value in points]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    plugins.load.cache_clear()
    try:
        with (
            pytest.warns(RuntimeWarning, match="'five' of an unknown package .* is broken: it is int"),
            pytest.warns(RuntimeWarning, match="surplus. is broken: the logits processor 'raises' exists already"),
        ):
            plugins.load(plugins.LOGITS_PROCESSORS)
        sound = plugins.sound(plugins.LOGITS_PROCESSORS)
        assert [plugin.name for plugin in sound] == ["raises", "refuses"]
        with pytest.raises(RequestError) as caught:
            constraints_of(None, [1, 2], SamplingParams(logits_processors=[name]), 40, ())
        assert caught.value.message == error
        assert caught.value.hint
        if name == "raise":
            assert "did you mean raises" in caught.value.hint
            assert "'five' of an unknown package" in caught.value.hint
    finally:
        plugins.load.cache_clear()


def test_no_plugins(families: list[tuple[str, str]]) -> None:
    done = CliRunner().invoke(cli, ["plugins"])
    assert done.exit_code == 0
    assert "llama_jax.families" in done.stdout


NAMES = {"model.layers.{n}.q": "h.{n}.wq", "model.layers.{n}.experts.{e}.w": "h.{n}.x.{e}", "model.norm": "ln.f"}


@given(layer=st.integers(0, 500), expert=st.integers(0, 500), rest=st.sampled_from(["", ".weight", ".bias"]))
def test_names_and_back(layer: int, expert: int, rest: str) -> None:
    back = {new: old for old, new in NAMES.items()}
    for old, new in NAMES.items():
        ours, their = (text.format(n=layer, e=expert) + rest for text in (old, new))
        assert renamed(ours, NAMES) == their
        assert renamed(their, back) == ours
    for other in (
        f"model.layers.{layer}.qq{rest}",
        f"model.layers.x.q{rest}",
        f"modelXnorm{rest}",
        f"a.model.norm{rest}",
    ):
        assert renamed(other, NAMES) == other
