"""Workloads for measuring engines: seeded mixes of requests.

Lengths, ids and arrivals depend only on the mix, the seed and the request's number, so that the first N requests of a
longer run are those of a shorter one, and all compared engines get the same requests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.errors import RequestError

FIRST_ID, MOST_IDS = 10, 128_000
"""Ids below the first are control tokens in many vocabularies, and larger vocabularies have them after the last."""

SIGMA = 1.0
"""Standard deviation of the logarithm of log-normal lengths, whose mean is exp(mu + sigma^2 / 2)."""

PREFIXES = 8


@dataclass(frozen=True)
class Work:
    """One request.

    Attributes:
      arrival_s: seconds after the start.
      prompt: token ids; output_tokens: number of tokens to generate, whatever they are.
    """

    id: int
    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int

    @property
    def length(self) -> int:
        """Number of tokens of prompt and output."""
        return len(self.prompt) + self.output_tokens


class _Dice:
    """Random numbers of one request of a mix."""

    def __init__(self, seed: int, number: int, vocab: int):
        self._seed, self._vocab = seed, vocab
        self._rng = np.random.default_rng([seed, number])

    def between(self, least: int, most: int) -> int:
        return int(self._rng.integers(least, most + 1))

    def lognormal(self, mean: float, least: int, most: int) -> int:
        return int(np.clip(round(self._rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA)), least, most))

    def happens(self, probability: float) -> bool:
        return self._rng.random() < probability

    def ids(self, n: int) -> list[int]:
        return self._rng.integers(FIRST_ID, self._vocab, n).tolist()

    def prefix(self) -> _Dice:
        """Random numbers of one prefix, the same for every request with that prefix."""
        return _Dice(self._seed, 10**9 + int(self._rng.integers(PREFIXES)), self._vocab)


Drawn = tuple[list[list[int]], int]
"""The parts of a prompt, and the output's length."""


def _sharegpt(dice: _Dice) -> Drawn:
    n = dice.lognormal(230, 4, 1024)
    return [dice.ids(n)], min(dice.lognormal(203, 4, 1024), 2048 - n)


def _chat(dice: _Dice) -> Drawn:
    return [dice.ids(dice.between(30, 300))], dice.between(50, 400)


def _summarise(dice: _Dice) -> Drawn:
    return [dice.ids(dice.between(2000, 7000))], dice.between(100, 300)


def _prefix(dice: _Dice) -> Drawn:
    shared = []
    if dice.happens(0.8):
        common = dice.prefix()
        shared = common.ids(common.between(1000, 2000))
    return [shared, dice.ids(dice.between(20, 200))], dice.between(50, 200)


def _mixed(dice: _Dice) -> Drawn:
    return [dice.ids(dice.between(5, 160))], dice.between(8, 32)


def _fixed(dice: _Dice) -> Drawn:
    return [dice.ids(512)], 128


@dataclass(frozen=True)
class Mix:
    """A distribution of requests.

    Attributes:
      requests: default number of requests.
      shared: whether prompts share prefixes, so that repeating the same requests is informative.
      steady_target: the share of steady decoding that a job of this mix should reach, if there is a target.
    """

    about: str
    draw: Callable[[_Dice], Drawn]
    requests: int = 256
    shared: bool = False
    steady_target: float | None = None


MIXES: Mapping[str, Mix] = {
    "sharegpt": Mix("log-normal lengths, 230 tokens in and 203 out in the mean", _sharegpt),
    "chat": Mix("30-300 tokens in, 50-400 out", _chat),
    "summarise": Mix("2k-7k in, 100-300 out", _summarise),
    "prefix": Mix("four of five begin with one of 8 prefixes of 1k-2k; 50-200 out", _prefix, shared=True),
    "mixed": Mix("a small job: 5-160 in, 8-32 out", _mixed, requests=60, steady_target=0.6),
    "fixed": Mix("512 in, 128 out, each", _fixed, requests=64),
}


def workload(
    mix: str,
    vocab: int,
    *,
    requests: int | None = None,
    rate: float = math.inf,
    seed: int = 0,
    scale: float = 1.0,
) -> list[Work]:
    """The requests of a mix.

    Args:
      vocab: size of the vocabulary; ids are below it.
      requests: their number; by default that of the mix.
      rate: arrivals per second, Poisson; infinite: all at once.
      scale: factor on all lengths, for small models: prompts, prefixes and outputs are shortened to at least one
        token each.

    Raises:
      RequestError: there are too few ids, or the scale is not in (0, 1].
    """
    if vocab <= FIRST_ID:
        raise RequestError(f"a vocabulary of {vocab} ids is too small; {FIRST_ID} are left out", param="vocab")
    if not 0 < scale <= 1:
        raise RequestError(f"scale must be in (0, 1], got {scale}", param="scale", hint="0.1 for small models")
    chosen = MIXES[mix]
    count = chosen.requests if requests is None else requests
    arrivals = np.random.default_rng([seed, 2**31]).exponential(1.0, count).cumsum() / rate
    works = []
    for number, arrival in enumerate(arrivals.tolist()):
        parts, output = chosen.draw(_Dice(seed, number, min(vocab, MOST_IDS)))
        prompt = [id for part in parts for id in part[: _scaled(len(part), scale)]]
        works.append(Work(number, round(arrival, 6), tuple(prompt), _scaled(output, scale)))
    return works


def _scaled(n: int, scale: float) -> int:
    return max(1, round(n * scale))


def renamed(works: Sequence[Work], by: int, vocab: int) -> list[Work]:
    """The same requests with all ids shifted by `by`: common prefixes are kept, and nothing computed for the original
    requests can be reused."""
    ids = min(vocab, MOST_IDS) - FIRST_ID
    return [
        dataclasses.replace(work, prompt=tuple((id - FIRST_ID + by) % ids + FIRST_ID for id in work.prompt))
        for work in works
    ]
