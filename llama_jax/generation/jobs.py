"""Requests on an engine's core: prompts in, news of their texts out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from llama_jax.engine.compiled import Compiled
from llama_jax.engine.core import Core, Drawn
from llama_jax.engine.publishing import publish
from llama_jax.engine.sequence import GROUP
from llama_jax.engine.settings import EngineSettings
from llama_jax.generation.answer import Answer
from llama_jax.generation.request import Requests
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.plan.step_costs import Peak
from llama_jax.text.tokenizer import Tokenizer

Progress = Callable[[Compiled], None]
"""Told of each program that is compiled before an engine is ready."""


def opened(model: Model | str | Path | None, tokenizer: Tokenizer | None) -> tuple[Model, Tokenizer | None]:
    """A model and its tokenizer as they are given, or loaded by a name; None is the default model."""
    if isinstance(model, Model):
        return model, tokenizer
    return load() if model is None else load(model)


@dataclass(frozen=True)
class News:
    """News of one continuation.

    Attributes:
      copy: which continuation of the request; text: what is new and certain of it.
      last: whether nothing follows for the request.
    """

    answer: Answer
    copy: int
    text: str
    drawn: Drawn
    last: bool


class Jobs:
    """Answers that a core is working on. Not safe for threads."""

    def __init__(self, core: Core, tokenizer: Tokenizer | None):
        self.core, self._tokenizer = core, tokenizer
        self._of: dict[int, tuple[Answer, int]] = {}

    @classmethod
    def start(
        cls,
        model: Model,
        tokenizer: Tokenizer | None,
        settings: EngineSettings,
        adapters: Params | None,
        *,
        ahead: bool,
        peak: Peak | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """A core without requests; `ahead`: with all of its programs compiled, of which `progress` is told."""
        core = Core(model, settings, adapters=adapters, peak=peak)
        publish(core)
        if ahead or settings.strict:
            core.make_ready(progress)
        return cls(core, tokenizer)

    def add(
        self, requests: Requests, index: int, *, priority: int = 0, domain: tuple[tuple[str, str], ...] = ()
    ) -> Answer:
        """Queues one of the requests with all of its continuations.

        Raises:
          DoesNotFit: it never will.
          Overloaded: too many wait already.
        """
        prompt, params = requests.prompts[index], requests.params[index]
        rows = requests.continuations[index]
        answer = Answer(self._tokenizer, prompt, params, rows[0].limit, self.core.model.eos_token_ids)
        if not self.core.settings.prefix_cache:  # continuations of one prompt share its pages all the same
            domain = (*domain, (GROUP, secrets.token_hex(8)))
        try:
            for copy, row in enumerate(rows):
                seed = secrets.randbits(64) if row.params.seed is None else row.params.seed
                number = self.core.add(
                    prompt,
                    replace(row.params, seed=seed),
                    row.limit,
                    priority=priority,
                    adapter=requests.adapter_ids[index],
                    domain=domain,
                )
                self._of[number] = (answer, copy)
                answer.numbers.append(number)
        except BaseException:
            self.cancel(answer)
            raise
        return answer

    def cancel(self, answer: Answer) -> None:
        """Ends what is left of a request; one that has ended is left alone."""
        for number in answer.numbers:
            if self._of.pop(number, None):
                self.core.cancel(number)

    def step(self) -> Sequence[News]:
        """Runs a step of the engine."""
        news = []
        for drawn in self.core.step():
            answer, copy = self._of[drawn.id]
            text = answer.take(copy, drawn)
            news.append(News(answer, copy, text, drawn, answer.left == 0))
            if answer.rows[copy].finish_reason:
                self.core.cancel(drawn.id)  # a stop string, of which the device knows nothing
                del self._of[drawn.id]
        return news

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, for nobody."""
        return not self._of and self.core.idle
