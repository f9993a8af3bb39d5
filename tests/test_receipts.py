"""Receipts: a run is repeated to the token, and what differs is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from click.testing import CliRunner
from helpers import TINY, random_params
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.adapters import LoraConfig, new_adapter, save_adapter
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.errors import CheckpointError, LlamaJaxError, RequestError, VerificationError
from llama_jax.model.fuse import fuse_params
from llama_jax.model.loaded import Model
from llama_jax.receipts import params_digest
from llama_jax.receipts.batch import replay_batch
from llama_jax.receipts.making import params_json, params_of
from llama_jax.sampling import Grammar, SamplingParams

CONFIG = TINY["plain"]
MODEL = Model(random_params(CONFIG), CONFIG, name="tiny")
PROMPTS = [[1, 2, 3], [7], [4, 5, 6, 7]]
PARAMS = [
    SamplingParams(temperature=1.0, seed=5, max_tokens=6, n=2, logit_bias={3: 2.0}),
    SamplingParams(temperature=0.0, max_tokens=3),
    SamplingParams(seed=1, top_p=0.9, max_tokens=8, stop_token_ids=(9,)),
]


@pytest.mark.slow
def test_replay(tmp_path: Path) -> None:
    outputs = lj.batch_generate(MODEL, None, PROMPTS, PARAMS)
    receipt = lj.receipt(MODEL, outputs, PARAMS)
    receipt.save(tmp_path / "receipt.json")
    saved = lj.read_receipt(tmp_path / "receipt.json")
    assert saved.requests == receipt.requests
    found = lj.replay(saved, MODEL)
    assert (found.same, found.compared, found.changed) == (True, 4, {})
    # Requests on their own, whatever the batch was.
    alone = dataclasses.replace(saved, requests=saved.requests[2:])
    assert lj.replay(alone, MODEL).same

    changed = json.loads((tmp_path / "receipt.json").read_text())
    was = changed["requests"][0]["token_ids"][1]
    was[4] = (was[4] + 1) % CONFIG.vocab_size
    changed["requests"][2]["params"]["seed"] = 2
    changed["environment"]["versions"]["jax"] = "0.0.1"
    changed["kernels"][0]["backend"] = "another"
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    found = lj.replay(lj.read_receipt(tmp_path / "changed.json"), MODEL)
    assert [(d.request, d.copy) for d in found.tokens] == [(0, 1), (2, 0)]
    assert found.tokens[0].at == 4
    assert found.tokens[0].was == tuple(was[4:])
    assert set(found.changed) == {"jax", next(iter(found.changed.keys() - {"jax"}))}
    assert found.changed["jax"] == ("0.0.1", jax.__version__)


def test_digest_is_of_all_parameters() -> None:
    flat = jax.tree.leaves(MODEL.params)
    whole = params_digest(MODEL.params)
    assert whole == params_digest(jax.tree.map(lambda x: x + 0, MODEL.params))
    for i in range(len(flat)):
        leaves = [x.at[(0,) * x.ndim].add(1e-3) if i == j else x for j, x in enumerate(flat)]
        assert params_digest(jax.tree.unflatten(jax.tree.structure(MODEL.params), leaves)) != whole
    assert params_digest(fuse_params(MODEL.params, CONFIG)) != whole


@pytest.mark.parametrize(
    "params",
    [
        *PARAMS,
        SamplingParams(
            seed=0,
            response_format=Grammar.regex("[a-z]+"),
            stop=("x", "y"),
            bad_words=("a b",),
            allowed_token_ids=(1, 2),
            prompt_logprobs=0,
            ignore_eos=True,
            max_tokens=None,
        ),
        SamplingParams(temperature=0.0, response_format={"type": "json_object"}),
    ],
)
def test_params_survive_json(params: SamplingParams) -> None:
    assert params_of(json.loads(json.dumps(params_json(params)))) == params


def test_refusals(tmp_path: Path) -> None:
    outputs = lj.batch_generate(MODEL, None, [[1]], max_tokens=1)
    receipt = lj.receipt(MODEL, outputs, SamplingParams(temperature=0.0, max_tokens=1))
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "list").write_text("[]")
    fewer = {**receipt.requests[0], "token_ids": []}
    lora = LoraConfig(rank=1, target_modules=("q_proj",))
    named = {"a": new_adapter(MODEL.params, CONFIG, lora, jax.random.key(0))}
    newer = dataclasses.asdict(receipt) | {"format": 2}
    (tmp_path / "newer").write_text(json.dumps(newer))
    other = dataclasses.replace(MODEL, params=random_params(CONFIG, seed=1))
    cases: list[tuple[type[LlamaJaxError], str, Any]] = [
        (RequestError, "without a seed", lambda: lj.receipt(MODEL, outputs, SamplingParams())),
        (RequestError, "1 outputs but 2", lambda: lj.receipt(MODEL, outputs, PARAMS[:2])),
        (VerificationError, "has the digest|a model with the digest", lambda: lj.replay(receipt, other)),
        (CheckpointError, "damaged", lambda: lj.replay(dataclasses.replace(receipt, requests=[{}]), MODEL)),
        (CheckpointError, "damaged", lambda: lj.replay(dataclasses.replace(receipt, requests=[fewer]), MODEL)),
        (
            CheckpointError,
            "damaged",
            lambda: replay_batch(dataclasses.replace(receipt, run={"input": "a"}), MODEL, None),
        ),  # type: ignore[arg-type]
        (
            VerificationError,
            "with the adapters",
            lambda: lj.replay(receipt, dataclasses.replace(MODEL, adapters=named)),
        ),
        (RequestError, "cannot read", lambda: lj.read_receipt(tmp_path / "none")),
        *[(CheckpointError, "", lambda n=n: lj.read_receipt(tmp_path / n)) for n in ("text", "list", "newer")],
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message or "."):
            call()


@pytest.mark.slow
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convert(write_chat_model(tmp_path / "hf"), tmp_path / "tiny")

    def run(*args: object) -> Any:
        return CliRunner().invoke(cli, [*map(str, args)])

    sampled = ("--temperature", 1, "--max-tokens", 7, "-m", folder)
    for more in ((), ("--json",)):
        made = run("generate", "hello", *sampled, "--receipt", tmp_path / "one.json", *more)
        assert made.exit_code == 0, made.stderr
        assert lj.read_receipt(tmp_path / "one.json").requests[0]["params"]["seed"] > 0
        again = run("replay", tmp_path / "one.json", "--json")
        assert again.exit_code == 0, again.stderr
        assert json.loads(again.stdout) == {"same": True, "compared": 1, "differing": [], "changed": {}}

    model, _ = lj.load(folder)
    lora = new_adapter(model.params, model.config, LoraConfig(rank=2, target_modules=("q_proj",)), jax.random.key(0))
    for seed, name in ((1, "lora"), (2, "other")):
        moved = jax.tree.map(lambda x, seed=seed: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), lora)
        save_adapter(tmp_path / name, moved, model.config)
    monkeypatch.chdir(tmp_path)  # a receipt holds whole paths
    assert run("generate", "hello", *sampled, "--adapter", "lora", "--receipt", "lora.json").exit_code == 0
    named = ("--adapter", "one=lora", "--adapter", "two=other", "--receipt", "named.json")
    (tmp_path / "named.jsonl").write_text("".join(f'{{"prompt": "hi", "model": "{n}"}}\n' for n in ("one", "two")))
    assert run("batch", "named.jsonl", "named.out", *sampled, *named).exit_code == 0
    monkeypatch.chdir("/")
    for path in ("lora.json", "named.json"):
        again = run("replay", tmp_path / path)
        assert again.exit_code == 0, again.stderr
    shutil.copytree(tmp_path / "other", tmp_path / "lora", dirs_exist_ok=True)
    assert "a model with the digest" in run("replay", tmp_path / "lora.json").stderr
    assert "with the adapters" in run("replay", tmp_path / "named.json").stderr

    lines = [{"prompt": "hi"}, {"prompt": "ho", "n": 2, "temperature": 0.7}, {"prompt": 3}]
    body = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 4}}
    source, out, receipt = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "batch.json"
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, body]))
    assert run("batch", source, out, *sampled, "--receipt", receipt).exit_code == 1  # the third line is bad
    again = run("replay", receipt)
    assert again.exit_code == 0, again.stderr
    assert "4 of 4 lines have the same tokens" in again.stdout

    saved = json.loads(receipt.read_text())
    saved["requests"][1]["token_ids"][1][2] += 1
    receipt.write_text(json.dumps(saved))
    again = run("replay", receipt)
    assert again.exit_code == 4
    assert "3 of 4 lines" in again.stdout
    assert "1.1 differs from token 2 on" in again.stdout
    source.write_text("{}\n")
    assert "has the digest" in run("replay", receipt).stderr
    assert run("batch", "-", out, "--receipt", receipt).exit_code == 2
    nowhere = run("generate", "hello", "--receipt", tmp_path / "none" / "one.json")
    assert nowhere.exit_code == 2
    assert "there is no folder" in nowhere.stderr
