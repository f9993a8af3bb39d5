"""Scores of SmolLM2-135M-Instruct against lm-eval's `hf` model (tests/data/scoring), and lm-eval's own tasks.

A float64 forward pass in numpy gives -3079.38889 for the last pair; lm-eval in float32 gives -3079.38184. So long sums
have a tolerance for each token.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.errors import RequestError
from llama_jax.model.loaded import Model
from llama_jax.scoring.pairs import encode_pair
from llama_jax.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data" / "scoring"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
TEXT = (DATA / "text.txt").read_text()
LENGTH: int = EXPECTED["max_length"]
SUM, EACH = 1e-3, 1e-5
"""Tolerances of a sum, and of each of its tokens."""


def given(pair: dict[str, Any], part: str) -> str:
    return pair[part] if part in pair else TEXT[slice(*pair[f"{part}_from"])]


PAIRS = [(given(p, "context"), given(p, "continuation")) for p in json.loads((DATA / "pairs.json").read_text())]


def test_token_ids_of_pairs(smollm2: tuple[Model, Tokenizer]) -> None:
    _, tokenizer = smollm2
    for (context, continuation), want in zip(PAIRS, EXPECTED["pairs"], strict=True):
        pair = encode_pair(tokenizer, context, continuation)
        assert (len(pair.context), len(pair.continuation)) == (want["context_tokens"], want["continuation_tokens"])
        if "context_ids" in want:
            assert [list(pair.context), list(pair.continuation)] == [want["context_ids"], want["continuation_ids"]]
    # No-break spaces are white space too, and a context of nothing else is an empty one.
    assert encode_pair(tokenizer, "a\u00a0", "b") == encode_pair(tokenizer, "a", "\u00a0b")
    assert encode_pair(tokenizer, " ", "Paris") == encode_pair(tokenizer, "", " Paris")
    # The prefix token is not doubled.
    assert encode_pair(tokenizer, "", "<|im_start|>user").context == (EXPECTED["prefix_token_id"],)
    assert encode_pair(tokenizer, "", "<|im_start|>user").continuation == tuple(tokenizer.encode("user"))
    for context, continuation in (("unbeliev", "able"), ("a", ""), ("", "")):
        with pytest.raises(RequestError) as caught:
            encode_pair(tokenizer, context, continuation)
        assert caught.value.param == "continuation"


@pytest.mark.slow
def test_pairs(smollm2: tuple[Model, Tokenizer]) -> None:
    found = lj.score(*smollm2, PAIRS, max_length=LENGTH)
    for score, want in zip(found, EXPECTED["pairs"], strict=True):
        n = want["continuation_tokens"]
        assert len(score.token_ids) == len(score.logprobs) == n
        assert score.logprob == pytest.approx(want["loglikelihood"], abs=max(SUM, EACH * n))
        assert score.is_greedy == want["is_greedy"]
        assert score.dropped == max(want["context_tokens"] + n - 1 - LENGTH, 0)
    assert found[-1].logprob == pytest.approx(-3079.38889, abs=SUM)  # float64


@pytest.mark.slow
def test_rolling(smollm2: tuple[Model, Tokenizer]) -> None:
    rolling = EXPECTED["rolling"]
    (found,) = lj.score_rolling(*smollm2, [TEXT], max_length=LENGTH)
    want = rolling["by_max_length"][str(LENGTH)]
    assert (found.words, found.bytes, found.tokens) == (rolling["words"], rolling["bytes"], rolling["tokens"])
    assert found.windows == math.ceil(found.tokens / LENGTH)
    assert found.logprob == pytest.approx(want["loglikelihood"], abs=EACH * found.tokens)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert getattr(found, name) == pytest.approx(want[name], rel=1e-4)


def test_perplexity_command(tmp_path: Path) -> None:
    """The numbers of `score_rolling`, of a model whose tokenizer adds BOS, from standard input."""
    folder = convert(write_chat_model(tmp_path / "hf"), tmp_path / "tiny")
    options = ["--window", "64", "--overlap", "16", "-q", "-m", str(folder)]
    done = CliRunner().invoke(cli, ["perplexity", "-", "--json", *options], input=TEXT[:600])
    facts = json.loads(done.stdout)
    (want,) = lj.score_rolling(*lj.load(folder), [TEXT[:600]], max_length=64, overlap=16)
    assert want.windows > 2
    assert facts["loglikelihood"] == pytest.approx(want.logprob, abs=1e-3)
    for name in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert facts[name] == pytest.approx(getattr(want, name), rel=1e-4)
    assert {name: facts[name] for name in ("tokens", "words", "bytes", "windows")} == {
        name: getattr(want, name) for name in ("tokens", "words", "bytes", "windows")
    }
    done = CliRunner().invoke(cli, ["perplexity", "-", *options], input=TEXT[:600])
    assert f"{want.tokens} tokens, {want.words} words, 600 bytes" in done.stdout
    done = CliRunner().invoke(cli, ["perplexity", "-", "--json", *options], input="-".join(TEXT[:600].split()))
    facts = json.loads(done.stdout)
    assert (facts["words"], facts["word_perplexity"]) == (1, None)  # exceeds a float
    done = CliRunner().invoke(cli, ["perplexity", "-", "--json", *options], input="")
    assert (done.exit_code, json.loads(done.stdout)["error"]["param"]) == (2, "texts")


@pytest.mark.slow
def test_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`llama-jax eval` with the task file: accuracy, and each item's values."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(DATA / "task")
    monkeypatch.setenv("LLAMA_JAX_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    output = tmp_path / "out.json"
    command = ["eval", "smol_mc", "--include_path", ".", "--max-length", str(LENGTH), "--output", str(output)]
    done = CliRunner().invoke(cli, [*command, "--dtype", "float32", "--json", "-q"])
    want = EXPECTED["task"]
    results = json.loads(done.stdout)["results"]["smol_mc"]
    assert {name: results[name] for name in ("acc,none", "acc_norm,none")} == {
        name: want["results"][name] for name in ("acc,none", "acc_norm,none")
    }
    samples = sorted(json.loads(output.read_text())["samples"]["smol_mc"], key=lambda sample: sample["doc_id"])
    assert len(samples) == want["n"] == len(want["items"])
    for sample, item in zip(samples, want["items"], strict=True):
        answers = [answer[0] for answer in sample["resps"]]
        assert [greedy for _, greedy in answers] == item["is_greedy"]
        assert [logprob for logprob, _ in answers] == pytest.approx(item["loglikelihoods"], abs=SUM)
        assert (sample["acc"], sample["acc_norm"]) == (item["acc"], item["acc_norm"])


@pytest.mark.slow
def test_adapter(smollm2: tuple[Model, Tokenizer]) -> None:
    """Answers to lm-eval's own requests to a model."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from llama_jax.scoring.lm_eval import LlamaJaxLM

    assert get_model("llama-jax") is LlamaJaxLM
    lm = LlamaJaxLM(*smollm2, max_length=256)

    def requests(kind: str, *arguments: Any) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in arguments]  # type: ignore[arg-type]

    (want,) = lj.score_rolling(*smollm2, [TEXT[:1500]], max_length=256)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("",), (TEXT[:1500],)))
    assert found == pytest.approx([0.0, want.logprob], abs=SUM)
    assert want.windows == 2
    chat = lm.apply_chat_template([{"role": "user", "content": "What is the capital of Japan?"}])
    assert chat.endswith("<|im_start|>assistant\n")
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\nHello, ")
    settings = {"until": ["<|im_end|>", "\n"], "do_sample": False, "temperature": 0.7, "max_gen_toks": 24}
    long = ("word " * 400 + "The capital of France is", settings | {"until": "."})
    answer, cut, long_answer = lm.generate_until(
        requests("generate_until", (chat, settings), (chat, settings | {"until": [" Tokyo"]}), long)
    )
    assert answer == "The capital of Japan is Tokyo."
    assert cut == "The capital of Japan is"
    assert "." not in long_answer
    with pytest.raises(RequestError, match="top_z"):
        lm.generate_until(requests("generate_until", (chat, {"top_z": 1})))
    with pytest.raises(RequestError, match="no room"):
        lm.generate_until(requests("generate_until", (chat, {"max_gen_toks": 256})))


def test_eval_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before a model is loaded."""
    monkeypatch.setitem(sys.modules, "llama_jax.scoring.lm_eval", None)
    done = CliRunner().invoke(cli, ["eval", "smol_mc", "--json", "-m", "./no-such-model"])
    assert done.exit_code == 2
    assert "--extra eval" in json.loads(done.stdout)["error"]["hint"]
