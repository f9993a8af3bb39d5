"""Names that are nearly right are answered with the right ones, and hints speak of options on the command line."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from llama_jax.cli import cli
from llama_jax.errors import did_you_mean


def test_close_names() -> None:
    assert did_you_mean("Generte", ["generate", "chat"], "/") == "did you mean /generate?"
    assert did_you_mean("xyzzy", ["generate", "chat"]) == ""


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["generte", "hi"], 2, "did you mean generate"),
        (["show", "smollm2"], 3, "did you mean smollm2-135m-instruct"),
        (["plan", "llama-3.1-8", "--target", "mi300x"], 3, "did you mean llama-3.1-8b"),
        (["plan", "llama-3.1-8b", "--target", "mi300"], 2, "did you mean mi300x"),
        (["generate", "hi", "--temperature", "-1"], 2, "see --temperature"),
        (["bench", "--kernels", "foo=bar"], 2, "--kernels: there is no operation 'foo'"),
        (["bench", "--kernels", "flash_attention=foo"], 70, "(named by --kernels)"),
    ],
)
def test_commands(args: list[str], code: int, said: str) -> None:
    result = CliRunner().invoke(cli, args)
    assert said in result.stderr
    assert result.exit_code == code


def test_presets_are_shown_without_files() -> None:
    facts = json.loads(CliRunner().invoke(cli, ["show", "llama-3.1-8b", "--json", "--tensors"]).stdout)
    assert (facts["parameters"], facts["tokenizer"], facts["path"]) == (8_030_261_248, None, None)
    assert facts["memory_bytes"]["bfloat16"] == 2 * facts["parameters"]
    assert facts["tensors"]["embed.weight"] == {"shape": [128256, 4096], "dtype": "bfloat16"}
    assert "sharding:" in CliRunner().invoke(cli, ["show", "llama-3.1-8b", "--tp", "8"]).stdout
