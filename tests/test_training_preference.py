"""Preference pairs: their data, and the loss against each text alone, finite differences and numbers by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, assert_gradient, random_params
from tiny_chat_model import write_chat_model

from llama_jax.config import LlamaConfig
from llama_jax.errors import DataError, RequestError
from llama_jax.model import forward
from llama_jax.params import flatten
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.training import (
    Batch,
    Dpo,
    Pair,
    Rows,
    Text,
    entropies,
    full,
    gradients,
    read_pairs,
    settings_from,
    train,
)
from llama_jax.training.reference import measure, with_reference, write
from llama_jax.training.reference import read as read_numbers

BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "hf", layers=2)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


# --- The loss ---------------------------------------------------------------------------------------------------------


def pairs_of(config: LlamaConfig, count: int = 5) -> list[Pair]:
    rng = np.random.default_rng(4)

    def text() -> Text:
        size = int(rng.integers(3, 9))
        return Text(rng.integers(0, config.vocab_size, size).astype(np.int32), np.arange(size) >= rng.integers(1, size))

    return [Pair(text(), text()) for _ in range(count)]


def plain(params: Any, config: LlamaConfig, text: Text) -> jax.Array:
    """The log-probability of a text's learned tokens, through `forward` and a softmax of all its logits."""
    logits, _ = forward(params, config, jnp.asarray(text.tokens[None]))
    found = jax.nn.log_softmax(logits[0, :-1], axis=-1)[np.arange(len(text.tokens) - 1), text.tokens[1:]]
    return jnp.sum(found * text.learned[1:])


def batches(config: LlamaConfig, reference: Any, rows: int) -> tuple[list[Pair], Batch]:
    pairs = pairs_of(config)
    made = Rows(pairs, length=20, rows=rows, pack=True)
    values = measure(made, pairs, None, jax.jit(lambda batch: entropies(reference, config, batch, logits=900)))
    compared = with_reference(pairs, values)
    for pair in compared:
        for text in pair.texts:
            assert text.reference is not None
            found = -np.sum(text.reference[:-1] * text.learned[1:])
            np.testing.assert_allclose(found, plain(reference, config, text), rtol=1e-5)
    return pairs, Rows(compared, length=20, rows=rows, pack=True).batch(0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "softmax-moe"])
def test_loss_and_gradient_are_those_of_each_text_alone(name: str) -> None:
    config = TINY[name]
    params, reference = random_params(config), random_params(config, seed=7)
    pairs, batch = batches(config, reference, rows=4)
    packed = Rows(pairs, length=20, rows=4)
    assert packed.packing().rows <= 4
    present = {id(place.text) for place in packed.places(0)}
    assert all(id(text) in present for pair in pairs for text in pair.texts)
    # Rows behind the first epoch's are those of the next: each pair counts as often as it is there.
    times = [sum(place.text is pair.chosen for place in packed.places(0)) for pair in pairs]
    before = [[float(plain(reference, config, text)) for text in pair.texts] for pair in pairs]

    def margins(params: Any) -> jax.Array:
        gains = [
            [plain(params, config, text) - old for text, old in zip(pair.texts, olds, strict=True)]
            for pair, olds in zip(pairs, before, strict=True)
        ]
        return BETA * jnp.stack([chosen - rejected for chosen, rejected in gains])

    def wanted(params: Any) -> jax.Array:
        return -jnp.sum(jnp.log(1 / (1 + jnp.exp(-margins(params)))) * jnp.asarray(times)) / sum(times)

    exact, slopes = jax.value_and_grad(wanted)(params)
    parts = jax.tree.map(lambda x: x.reshape(2, 2, -1), batch)
    found, gradient = jax.jit(
        lambda p: gradients(full(config, jnp.float32), p, None, parts, objective=Dpo(BETA), logits=900)
    )(params)
    np.testing.assert_allclose(found["loss"], exact, rtol=2e-5)
    weights = np.asarray(times) / sum(times)
    each = np.asarray(margins(params))
    np.testing.assert_allclose(found["margin"], weights @ each, rtol=1e-4)
    np.testing.assert_allclose(found["accuracy"], weights @ (each > 0), rtol=1e-6)
    np.testing.assert_allclose(found["chosen"] - found["rejected"], found["margin"], rtol=1e-4)
    for leaf, y in flatten(slopes).items():
        np.testing.assert_allclose(
            flatten(gradient)[leaf], y, rtol=0, atol=3e-5 * (np.abs(y).max() + 1e-3), err_msg=leaf
        )


@pytest.mark.slow
def test_gradient_is_that_of_finite_differences() -> None:
    config = TINY["plain"]
    params = random_params(config)
    _, batch = batches(config, random_params(config, seed=7), rows=4)
    mean = jax.jit(lambda p: Dpo(BETA)(p, config, batch)[0] / Dpo().count(batch))
    assert_gradient(mean, params)


def test_a_model_that_is_its_own_reference_has_the_loss_log_2() -> None:
    config = TINY["plain"]
    params = random_params(config)
    pairs, batch = batches(config, params, rows=4)
    total, more = jax.jit(lambda p: Dpo(BETA)(p, config, batch))(params)
    places = list(Rows(pairs, length=20, rows=4).places(0))
    assert Dpo().count(batch) == len(places) / 2
    assert {place.segment % 2 for place in places if place.text in {pair.rejected for pair in pairs}} == {1}
    np.testing.assert_allclose(total / (len(places) / 2), np.log(2), rtol=1e-5)
    np.testing.assert_allclose(more["margin"], 0, atol=1e-5)
    for lacking in (Batch(batch.tokens, batch.labels, batch.segments), Batch(batch.tokens, batch.labels)):
        with pytest.raises(RequestError, match="needs segments and a reference"):
            Dpo()(params, config, lacking)
        with pytest.raises(RequestError, match="needs segments and a reference"):
            gradients(
                full(config, jnp.float32), params, None, jax.tree.map(lambda x: x[None], lacking), objective=Dpo()
            )


def test_numbers_of_the_reference_are_of_one_run(tmp_path: Path) -> None:
    path, about = tmp_path / "reference.npz", {"data": "a"}
    write(path, about, {"texts": np.arange(3.0)})
    found = read_numbers(path, about)
    assert found is not None
    np.testing.assert_array_equal(found["texts"], np.arange(3.0))
    assert read_numbers(path, {"data": "b"}) is None
    whole = path.read_bytes()
    for damaged in (b"", whole[:-20], whole[:90] + b"?" + whole[91:]):
        path.write_bytes(damaged)
        assert read_numbers(path, about) is None


# --- Lines ------------------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "hello"}]
GOOD, BAD = ({"role": "assistant", "content": content} for content in ("fine day", "go away from here"))


def read(tmp_path: Path, tokenizer: Tokenizer, *lines: Any, length: int = 128, **options: Any) -> Any:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_pairs([path], tokenizer, length=length, **options)


def learned_text(tokenizer: Tokenizer, text: Text) -> str:
    return tokenizer.decode(text.tokens[text.learned].tolist(), skip_special_tokens=False)


def test_the_last_answers_are_compared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = read(
        tmp_path,
        tokenizer,
        {"prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*QUESTION, GOOD], "rejected": [*QUESTION, BAD]},
        {"prompt": "one two", "chosen": " three", "rejected": " four five"},
    )
    asked, whole, text = found.texts
    for pair in (asked, whole):
        assert learned_text(tokenizer, pair.chosen) == "fine day<|im_end|>\n"
        assert learned_text(tokenizer, pair.rejected) == "go away from here<|im_end|>\n"
    assert np.array_equal(asked.chosen.tokens, whole.chosen.tokens)
    end = tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False)
    assert [learned_text(tokenizer, x) for x in text.texts] == [f" three{end}", f" four five{end}"]
    assert tokenizer.decode(text.chosen.tokens.tolist()[:-1]) == "one two three"
    without = read(tmp_path, tokenizer, {"prompt": "one", "chosen": " two", "rejected": " four"}, eos=False)
    assert learned_text(tokenizer, without.texts[0].chosen) == " two"


def test_long_pairs_lose_their_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long, short = " one two three four five six" * 3, " seven"
    line = {"prompt": "a", "chosen": long, "rejected": short}
    whole = read(tmp_path, tokenizer, line).texts[0]
    sizes = [len(text.tokens) for text in whole.texts]
    found = read(tmp_path, tokenizer, line, length=sum(sizes) - 2)
    assert (found.cut, found.dropped) == (1, 0)
    assert [len(text.tokens) for text in found.texts[0].texts] == [sizes[0] - 2, sizes[1]]
    assert np.array_equal(found.texts[0].chosen.tokens, whole.chosen.tokens[:-2])
    both = read(tmp_path, tokenizer, {"prompt": "a", "chosen": long, "rejected": long + short}, length=16)
    assert [len(text.tokens) for text in both.texts[0].texts] == [8, 8]
    asked = {"prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD]}
    assert read(tmp_path, tokenizer, asked, length=8).dropped == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, 'it has no "rejected"'),
        ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "did you mean rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": [GOOD]}, "neither all text nor all lists"),
        ({"chosen": "b", "rejected": "c"}, "neither all text nor all lists"),
        ({"chosen": [*QUESTION, GOOD], "rejected": [BAD]}, "neither all text nor all lists"),
        ({"prompt": QUESTION, "chosen": [GOOD], "rejected": QUESTION}, "no token of the conversation is learned"),
        ([1], 'it has no "chosen"'),
    ],
)
def test_bad_pairs_are_named(tmp_path: Path, tokenizer: Tokenizer, line: Any, says: str) -> None:
    with pytest.raises(DataError, match="line 1") as caught:
        read(tmp_path, tokenizer, line)
    assert says in str(caught.value)
    with pytest.raises(RequestError, match="last answers are compared"):
        read(tmp_path, tokenizer, learned="all")


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_prefers_what_was_chosen_and_resumes_with_the_same_numbers(
    method: str, folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "seven", "small", "birds"]

    def line() -> dict[str, Any]:
        prompt, *answers = (" ".join(rng.choice(words, int(rng.integers(2, 6)))) for _ in range(3))
        ask = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": f"{a} {b}"}] for a, b in zip(answers, "xy", strict=True))
        return {"prompt": ask, "chosen": chosen, "rejected": rejected}

    for name, count in (("train", 20), ("held_out", 4)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line()) + "\n" for _ in range(count)))

    def run(output: str, stop_after: int = 99) -> list[Any]:
        values = {
            "model": str(folder),
            "output": str(tmp_path / output),
            "method": method,
            "loss": "dpo",
            "steps": 6,
            "data": {
                "files": [str(tmp_path / "train.jsonl")],
                "validation": [str(tmp_path / "held_out.jsonl")],
            },
            "rows": {"length": 96, "rows": 4, "parts": 2},
            "dpo": {"beta": 0.5},
            "optimizer": {"learning_rate": 0.003},
            "saving": {"every": 3},
        }
        told: list[Any] = []
        train(settings_from(values), told=told.append, stop=lambda: len(told) >= stop_after)
        return told

    whole = run("whole")
    np.testing.assert_allclose(whole[0].loss, np.log(2), rtol=1e-4)  # nothing differs yet
    assert whole[-1].loss < 0.7 * whole[0].loss
    assert whole[-1].means["margin"] > 1
    assert whole[-1].means["accuracy"] > 0.9
    run("stopped", stop_after=2)
    kept = (tmp_path / "stopped" / "reference.npz").stat().st_mtime_ns
    run("stopped")
    assert (tmp_path / "stopped" / "reference.npz").stat().st_mtime_ns == kept  # not that of the weights by now
    files = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "stopped")]
    numbers = [
        [(x["step"], x["loss"], x["grad_norm"], x["margin"]) for x in map(json.loads, lines) if "loss" in x]
        for lines in files
    ]
    assert numbers[0] == numbers[1]
    assert [step for step, *_ in numbers[0]] == list(range(1, 7))
    held_out = [x for x in map(json.loads, files[0]) if "validation_loss" in x]
    assert held_out[-1]["validation_accuracy"] > 0.7
    assert held_out[-1]["validation_loss"] < np.log(2)
