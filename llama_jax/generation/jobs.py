"""Requests on an engine's replicas: prompts in, updates of their texts out."""

from __future__ import annotations

import gc
import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_jax.adapters.models import AdapterLike, open_adapters
from llama_jax.engine.adapter_pool import AdapterPool
from llama_jax.engine.compiled import Compiled
from llama_jax.engine.publishing import publish
from llama_jax.engine.replicas import Replicas, replicas
from llama_jax.engine.rules import Rule
from llama_jax.engine.sequence import GROUP
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import Sizes
from llama_jax.errors import EngineFailed, LateCompilation, RequestError
from llama_jax.generation.answer import Answer
from llama_jax.generation.request import Requests
from llama_jax.library import DEFAULT_MODEL
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.plan.step_costs import Peak
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

FORESEEN = 512
"""The most answer tokens that an engine reserves room for at the start. Few answers reach their limit, and an engine
that grows makes room for those that do."""

Progress = Callable[[Compiled], None]
"""Called for each program that is compiled before an engine is ready."""


def opened(
    model: Model | str | Path | None, tokenizer: Tokenizer | None, kv_dtype: str | None = None
) -> tuple[Model, Tokenizer | None]:
    """A model and its tokenizer as given, or loaded by name; None is the default model.

    Args:
      kv_dtype: of the model's caches, overriding the model's own.
    """
    if isinstance(model, Model):
        return (model if kv_dtype is None else replace(model, kv_dtype=kv_dtype)), tokenizer
    return load(DEFAULT_MODEL if model is None else model, kv_dtype=kv_dtype)


def opened_pool(
    model: Model, adapters: Mapping[str, AdapterLike] | None, count: int | None, rank: int | None
) -> AdapterPool | None:
    """Slots for adapters, by default those of the model; None without any.

    Raises:
      RequestError: see `AdapterPool`.
    """
    given = open_adapters(model, model.adapters if adapters is None else adapters)
    return AdapterPool(replicas(model), given, count=count, rank=rank) if given or count is not None else None


def no_slots() -> RequestError:
    """The error for an engine that was made without slots for adapters."""
    return RequestError(
        "the engine has no adapters", param="adapter", hint="give it some by name, or max_adapters (--max-adapters)"
    )


@dataclass(slots=True)  # as `Piece`
class News:
    """News of one continuation.

    Attributes:
      copy: index of the continuation in the request; text: its new, certain text.
      tokens: new ones, without those drawn past its end.
      last: whether this is the last news of the request.
    """

    answer: Answer
    copy: int
    text: str
    tokens: tuple[int, ...]
    last: bool


@dataclass(eq=False, slots=True)
class _Job:
    """One continuation: what a replica was asked for, kept so that it can be asked again."""

    answer: Answer
    copy: int
    params: SamplingParams
    limit: int
    rule: Rule | None
    options: Mapping[str, Any]

    @property
    def drawn(self) -> list[int]:
        """Its tokens so far."""
        return self.answer.rows[self.copy].token_ids

    @property
    def foreseen(self) -> int:
        """Tokens, prompt included, that room is made for."""
        return len(self.answer.prompt) + len(self.drawn) + min(self.limit - len(self.drawn), FORESEEN)


class Jobs:
    """Answers that an engine is working on. Not thread-safe.

    When a sequence outgrows the engine and larger sizes exist, the engine is rebuilt; unfinished answers are recomputed
    up to where they were, and resume there.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        settings: EngineSettings | None = None,
        adapters: AdapterPool | None = None,
        *,
        room: int = 0,
        draft: Model | None = None,
        peak: Peak | None = None,
        **options: Any,
    ):
        """Makes an engine without requests.

        Args:
          settings: of each replica; without them the engine starts with `room` tokens and grows as needed.
          adapters: those of its replicas.
          draft: the draft model, on the devices of the model.
          peak: peak rates of each device, for its utilisation.
          options: without `settings`, those of `default_settings`. With a context among them it does not grow.
        """
        self._models, self._tokenizer, self._adapters = replicas(model), tokenizer, adapters
        self._drafts = None if draft is None else replicas(draft)
        if self._drafts:
            options["draft"] = self._drafts[0]
        self._sizes = Sizes(self._models[0], options, settings)
        self._of: dict[int, _Job] = {}
        self._peak, self._process = peak, os.getpid()
        self._sound = True
        self._engine = self._made(self._sizes(room))

    def make_ready(self, progress: Progress | None = None, *, ahead: bool = True, early: bool = False) -> None:
        """Compiles every program if `ahead` or the engine is strict; see `Programs.compile_all` for `early`, which a
        strict engine ignores."""
        strict = self._engine.settings.strict
        if ahead or strict:
            for news in self._engine.compile_all(early=early and not strict):
                if progress is not None:
                    progress(news)

    @property
    def engine(self) -> Replicas:
        """The current engine."""
        return self._engine

    def add(
        self,
        requests: Requests,
        index: int,
        *,
        priority: int = 0,
        domain: tuple[tuple[str, str], ...] = (),
        streamed: bool = False,
    ) -> Answer:
        """Queues one of the requests with all of its continuations.

        Args:
          streamed: whether each token is read as it comes; otherwise a dispatch may draw several.

        Raises:
          DoesNotFit: it can never fit.
          RequestError: it has more stop ids or biases than there is room for, or there is no adapter of its name.
          Overloaded: the queue is full.
          EngineFailed: this process is a fork of the one that made the engine.
        """
        if os.getpid() != self._process:  # jax's threads do not survive a fork, and a step would never end
            raise EngineFailed(
                "an engine cannot be used in a forked process",
                hint='start processes with multiprocessing.get_context("spawn"), and make the engine there',
            )
        prompt, params = requests.prompts[index], requests.params[index]
        rows = requests.continuations[index]
        answer = Answer(self._tokenizer, prompt, params, rows[0].limit, self._models[0].eos_token_ids)
        if not self._engine.settings.prefix_cache:  # continuations of one prompt share its pages anyway
            domain = (*domain, (GROUP, secrets.token_hex(8)))
        slot = 0
        if name := requests.adapters[index]:
            held = self.pool.of(name)
            slot, domain = held.slot, (*domain, ("adapter", str(held.number)))
        options = {"priority": priority, "adapter": slot, "domain": domain, "streamed": streamed}
        jobs = []
        for copy, row in enumerate(rows):
            rule = Rule(row.constraints, params, self._models[0].config.vocab_size) if row.constraints else None
            own = row.params
            if own.seed is None and not own.greedy:
                own = replace(own, seed=secrets.randbits(64))
            jobs.append(_Job(answer, copy, own, row.limit, rule, options))
        self._make_room(jobs[0].foreseen)
        try:
            self._begin(jobs)
        except BaseException:
            self.cancel(answer)
            raise
        return answer

    @property
    def pool(self) -> AdapterPool:
        """The adapters.

        Raises:
          RequestError: the engine has no slots for any.
        """
        if self._adapters is None:
            raise no_slots()
        return self._adapters

    def put_adapter(self, name: str, prepared: Sequence[Params]) -> None:
        """See `AdapterPool.put`."""
        self.pool.put(name, prepared, {job.options["adapter"] for job in self._of.values()})

    def cancel(self, answer: Answer) -> None:
        """Ends the rest of a request; no effect on one that has ended."""
        for number in self._numbers(answer):
            del self._of[number]
            if self._sound:
                self._engine.of(number).cancel(number)

    def step(self) -> Sequence[News]:
        """Runs a step of the engine."""
        news, longer = [], []
        self._sound = False
        drawn_by_all = self._engine.step()
        self._sound = True
        for drawn in drawn_by_all:
            job = self._of[drawn.id]
            row = job.answer.rows[job.copy]
            known = len(row.token_ids)
            text = job.answer.take(job.copy, drawn)
            tokens = tuple(row.token_ids[known:])
            news.append(News(job.answer, job.copy, text, tokens, job.answer.left == 0))
            if row.finish_reason:
                self._engine.of(drawn.id).cancel(drawn.id)  # a stop string, which the device does not know about
                del self._of[drawn.id]
            elif drawn.ending:  # the engine's room has run out, not the answer
                longer.append(self._of.pop(drawn.id))
        if longer:
            self._make_room(max(job.foreseen for job in longer))
            self._begin(longer)
        return news

    def run[K](
        self,
        asked: Iterable[tuple[K, Requests, int]],
        *,
        ahead: int | None = None,
        before: Callable[[Iterable[Answer]], bool] = lambda _: False,
        **options: Any,
    ) -> Iterator[tuple[K, News]]:
        """Yields news of requests until all have ended. Closing the iterator, or an exception in it, cancels the rest.
        After one in a step (Ctrl-C, for example), the next run begins with a new engine of the same sizes.

        Args:
          asked: (key, requests, index of the request), taken as room allows.
          ahead: the most running or waiting at once; None for no limit.
          before: called before each step with the unfinished answers. Once it returns True, started ones are finished
            and the others are skipped.
          options: of `add`.
        """
        if not self._sound:
            self._renew()
        source, under_way, more = iter(asked), dict[Answer, K](), True
        # The device begins once there is enough for its first step, and computes it while the others are taken.
        enough: float = self._engine.settings.budget * len(self._engine.cores)
        try:
            while True:
                while more and (ahead is None or len(under_way) < ahead) and enough > 0:
                    if (following := next(source, None)) is None:
                        more = False
                    else:
                        key, requests, index = following
                        under_way[self.add(requests, index, **options)] = key
                        enough -= len(requests.prompts[index])
                enough = math.inf
                if before(under_way):
                    more = False
                    for answer in [a for a in under_way if not any(row.token_ids for row in a.rows)]:
                        self.cancel(answer)
                        del under_way[answer]
                if not under_way:
                    return
                for news in self.step():
                    key = under_way.pop(news.answer) if news.last else under_way[news.answer]
                    yield key, news
        finally:
            for answer in under_way:
                self.cancel(answer)

    def computed(self, answer: Answer) -> int:
        """Prompt tokens of a request that have been computed or are in dispatched steps. May be called from another
        thread, which gets a KeyError if the request ends meanwhile."""
        done = (self._engine.of(number).computed(number) for number in self._numbers(answer))
        return min([len(answer.prompt), *done])

    @property
    def idle(self) -> bool:
        """Whether there is no work left for any request."""
        return not self._of and self._engine.idle

    def _numbers(self, answer: Answer) -> list[int]:
        return [number for number, job in list(self._of.items()) if job.answer is answer]

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Gives continuations to the least busy replica: those of one prompt share its pages."""
        core = self._engine.next
        for job in jobs:
            prompt = job.answer.prompt
            limit = job.limit
            if self._sizes.longest > core.capacity:  # it may be continued
                limit = min(limit, core.capacity - len(prompt))
            number = core.add(prompt, job.params, limit, drawn=job.drawn, rule=job.rule, **job.options)
            self._of[number] = job

    def _made(self, settings: EngineSettings) -> Replicas:
        slots = None if self._adapters is None else self._adapters.slots
        engine = Replicas(self._models, settings, slots, drafts=self._drafts, peak=self._peak)
        publish(engine)
        return engine

    def _renew(self) -> None:
        """Replaces an engine with an interrupted step: its scheduler counts on what the step may not have computed, and
        the step's arguments are lost."""
        old = self._engine
        for core in old.cores:
            core.discard()
        self._engine = self._made(old.settings)
        if old.snapshot().ready_s is not None:
            for _ in self._engine.compile_all():  # all of them are compiled
                pass
        self._sound = True

    def _make_room(self, length: int) -> None:
        """Replaces an engine without room for a sequence of that length by a larger one, if sizes allow.

        Raises:
          DoesNotFit: there is no memory for it. All unfinished requests have been ended by then.
          LateCompilation: the engine is strict, and a larger one would have to be compiled.
        """
        settings = self._engine.settings
        if length <= settings.context or self._sizes.longest <= settings.context:
            return
        if settings.strict:
            raise LateCompilation(
                f"a sequence of {length} tokens needs a larger engine, which would have to be compiled",
                hint=f"give the engine a context; it has {settings.context} tokens",
            )
        jobs, self._of = list(self._of.values()), {}
        del self._engine  # frees the old one's arrays
        gc.collect()
        try:
            self._engine = self._made(self._sizes(min(length, self._sizes.longest)))
        except BaseException:
            self._engine = self._made(settings)
            raise
        for _, each in itertools.groupby(jobs, key=lambda job: job.answer):
            self._begin(list(each))
