"""`batch_invariant`: a request gets the same tokens and log-probabilities, to the bit, in any company."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import Asked, run, small_settings
from helpers import TINY, random_params, tiny_config

from llama_jax.config import LayerSpec, LlamaConfig
from llama_jax.engine.core import Core, Drawn
from llama_jax.engine.program_set import program_set
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import Sizes, settings_for
from llama_jax.errors import RequestError
from llama_jax.model.loaded import Model
from llama_jax.sampling import BadWords, SamplingParams

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 1.1, "top_k": 7},
    {"temperature": 1.0},
    {"temperature": 0.0, "logit_bias": {5: 2.5, 6: -4.0}, "min_tokens": 3},
    {"temperature": 0.7, "presence_penalty": 0.8, "stop_token_ids": [7, 9, 11]},
    {"temperature": 0.0, "prompt_logprobs": 1},
)


@functools.cache
def model(hidden: int, layers: int) -> Model:
    layer = LayerSpec(mlp=2 * hidden)
    return in_bfloat16(tiny_config(*[layer] * layers, hidden_size=hidden, head_dim=16, vocab_size=2 * hidden))


def in_bfloat16(config: LlamaConfig) -> Model:
    config = config.replace(max_position_embeddings=256)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    return Model(params, config, name=f"{config.hidden_size} {config.layers}")


def settings(**changes: Any) -> EngineSettings:
    """Chunks of 32 tokens, of which a step has two; pages for two of the longest sequences, and a half."""
    fields: dict[str, Any] = {"mixed_tokens": (64,), "pages": 15, "batch_invariant": True}
    return small_settings(**fields | changes)


def some_requests(rng: np.random.Generator, vocab: int, count: int, kinds: Sequence[dict[str, Any]]) -> list[Asked]:
    """Of these kinds, with prompts of one token to three chunks, most of which begin with a prefix that others have."""
    shared = np.random.default_rng(7).integers(3, vocab, 80)
    asked = []
    for _ in range(count):
        tail = rng.integers(3, vocab, int(rng.integers(1, 40))).tolist()
        head = shared[: int(rng.choice([0, 20, 31, 32, 63, 64, 65, 80]))].tolist()
        kind = kinds[int(rng.integers(len(kinds)))]
        most = int(rng.integers(3, 16))
        params = SamplingParams(seed=int(rng.integers(1000)), logprobs=2, max_tokens=most, **kind)
        asked.append(((head + tail)[:80], params))
    return asked


def bits(news: list[Drawn]) -> list[Any]:
    """Everything that a request got."""
    found: list[Any] = [news[-1].ending, [token for drawn in news for token in drawn.tokens]]
    for name in ("logprobs", "prompt_logprobs"):
        each = [logprobs for drawn in news if (logprobs := getattr(drawn, name)) is not None]
        for part in ("token", "top_ids", "top"):
            found.append(b"".join(getattr(logprobs, part).tobytes() for logprobs in each))
    return found


@dataclasses.dataclass
class Comparison:
    """Answers of requests in company, beside those that they get alone in the same engine.

    Attributes:
      different: those that differ in a bit.
      flips: of those that differ in a token, how much less likely the first one was that differs.
      worst: the largest difference of the log-probabilities of tokens before that.
    """

    requests: int = 0
    different: int = 0
    flips: list[float] = dataclasses.field(default_factory=list)
    worst: float = 0.0
    prefix_hits: int = 0
    preemptions: int = 0

    def add(self, alone: list[Drawn], together: list[Drawn]) -> None:
        self.requests += 1
        self.different += bits(alone) != bits(together)
        (one, p), (other, q) = map(drawn_of, (alone, together))
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        self.worst = max([self.worst, *np.abs(p[:same] - q[:same])])
        if one[same:] != other[same:]:
            self.flips.append(abs(float(p[same] - q[same])))


def drawn_of(news: list[Drawn]) -> tuple[list[int], np.ndarray]:
    """Tokens and their log-probabilities."""
    logprobs = [drawn.logprobs.token for drawn in news if drawn.logprobs is not None]
    return [token for drawn in news for token in drawn.tokens], np.concatenate(logprobs)


def compare(
    model: Model,
    settings: EngineSettings,
    seeds: range,
    kinds: Sequence[dict[str, Any]] = KINDS,
    size: int = 6,
    forbidden: Sequence[int] = (),
) -> Comparison:
    """Batches of requests that arrive at random, with a cold and then with a warm prefix cache.

    Args:
      forbidden: ids that the host, step by step, keeps every other request from drawing.
    """
    found = Comparison()

    def rules(count: int) -> dict[int, list[BadWords]]:
        return {i: [BadWords([[token] for token in forbidden])] for i in range(0, count, 2) if forbidden}

    for seed in seeds:
        rng = np.random.default_rng(seed)
        asked = some_requests(rng, model.config.vocab_size, size, kinds)
        alone = [run(Core(model, settings), [x], constraints=rules(1 - i % 2))[0] for i, x in enumerate(asked)]
        core, arrivals = Core(model, settings), rng.integers(0, 12, size).tolist()
        for _ in range(2):
            together = run(core, asked, arrivals=arrivals, constraints=rules(size))
            for one, other in zip(alone, together, strict=True):
                found.add(one, other)
        counts = core.snapshot().counts
        found.prefix_hits += counts.prefix_hit_tokens
        found.preemptions += counts.preemptions
    return found


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_company_changes_no_bit_in_many_batches(steps: int) -> None:
    found = compare(model(128, 2), settings(steps=steps), range(64) if steps == 1 else range(64, 72), size=4)
    assert found.different == 0
    assert found.preemptions == 0
    assert found.prefix_hits > 10 * 32


@pytest.mark.slow
@pytest.mark.parametrize("case", ["biased", "softmax-moe", "sigmoid-moe"])
def test_company_changes_no_bit_of_other_layers(case: str) -> None:
    """Sliding and chunked attention, routed experts."""
    assert compare(in_bfloat16(TINY[case]), settings(), range(6)).different == 0


@pytest.mark.slow
def test_company_changes_no_bit_where_the_host_has_a_say() -> None:
    """Rows that wait for it leave others alone in a step."""
    found = compare(model(128, 2), settings(steps=4), range(6), forbidden=range(3, 120))
    assert found.different == 0


@pytest.mark.slow
def test_what_company_changes_without() -> None:
    """Nearly every request differs in some bit, by what bfloat16 rounds away; where a token does, it was as likely."""
    off = small_settings(pages=15, decode_rows=(1, 3), mixed_tokens=(8, 24))
    found = compare(model(256, 2), off, range(6))
    assert found.different > found.requests / 2
    assert 0 < found.worst < 0.05
    assert len(found.flips) <= found.requests / 10
    assert max(found.flips, default=0.0) < 0.05


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"drafts": 2}, "drafts"),
        ({"decode_rows": (1, 3)}, "batch_invariant"),
        ({"mixed_tokens": (32, 64)}, "batch_invariant"),
        ({"few_tokens": (32,), "few_rows": 1}, "batch_invariant"),
    ],
    ids=str,
)
def test_what_it_does_not_go_with(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as e:
        settings(**changes)
    assert e.value.param == param


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("rows", [1, 8, 256, 700])
@pytest.mark.parametrize("page_size", [16, 256])
def test_default_sizes(on_cpu: bool, rows: int, page_size: int) -> None:
    """One size of each program, as small as the scheduler allows, and none for greedy requests alone."""
    config = tiny_config(max_position_embeddings=1024)
    sizes: dict[str, Any] = {"rows": rows, "page_size": page_size, "on_cpu": on_cpu, "free": None}
    made = settings_for(config, "bfloat16", None, **sizes, batch_invariant=True)
    assert made.decode_rows == (rows,)
    assert made.boundary is not None
    assert made.boundary % page_size == 0
    assert made.boundary <= made.budget
    names = [(key.name, key.size) for key in program_set(made, on_cpu=on_cpu)]
    assert len(set(names)) == len(names) == (4 if on_cpu else 5)
    assert settings_for(config, "bfloat16", None, **sizes).boundary is None


def test_such_an_engine_does_not_grow() -> None:
    """A larger one has programs of other shapes."""
    sizes = Sizes(model(64, 1), {"batch_invariant": True})
    assert sizes(10) == sizes(200)
    assert sizes(10).context == sizes.longest == 256
