"""`Engine`: one model serving many concurrent callers, each reading its own stream."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from llama_jax.adapters.models import AdapterLike, open_adapter
from llama_jax.engine.publishing import Published, report
from llama_jax.engine.replicas import Replicas, replicas
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import default_settings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed, LlamaJaxError
from llama_jax.generation.answer import Answer
from llama_jax.generation.changes import Change
from llama_jax.generation.constraints import has_constraints
from llama_jax.generation.draft import opened_draft
from llama_jax.generation.jobs import Jobs, News, Progress, no_slots, opened, opened_pool
from llama_jax.generation.outputs import RequestOutput
from llama_jax.generation.request import prepare
from llama_jax.generation.restarts import Restarts
from llama_jax.generation.streams import Piece, Request, Stream, deliver
from llama_jax.generation.threads import BRIEF, run_away
from llama_jax.model.loaded import Model
from llama_jax.plan.step_costs import Peak
from llama_jax.text.tokenizer import Tokenizer


class Engine:
    """A model behind an engine that runs in its own thread.

        async with lj.Engine("org/model") as engine:
            async for piece in engine.stream(lj.Request("The capital of France is")):
                print(piece.text, end="")

    Leaving the `async for`, or cancelling its task, ends the request and frees its pages.
    """

    def __init__(
        self,
        model: Model | str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        settings: EngineSettings | None = None,
        adapters: Mapping[str, AdapterLike] | None = None,
        max_adapters: int | None = None,
        max_adapter_rank: int | None = None,
        draft: Model | str | Path | None = None,
        kv_dtype: str | None = None,
        ahead: bool = True,
        early: bool = False,
        peak: Peak | None = None,
        compiling: Progress | None = None,
        restarts: Restarts | None = None,
        **options: Any,
    ):
        """Loads the model if given by name, and makes the engine; arguments and errors as for `LLM`.

        Args:
          early: whether to start once a few programs can answer any request, and to compile the others meanwhile.
            Ignored if strict.
          compiling: called in another thread.
          restarts: when to rebuild the engine after a device failure; each time it is compiled again.
        """
        self.model, self.tokenizer = opened(model, tokenizer, kv_dtype)
        self._draft = opened_draft(draft, self.model, self.tokenizer)
        if self._draft is not None:
            options["draft"] = replicas(self._draft)[0]
        self._pool = opened_pool(self.model, adapters, max_adapters, max_adapter_rank)
        self._settings = settings or default_settings(replicas(self.model)[0], **options)
        self._peak, self._compiling = peak, compiling
        self._ahead, self._early = ahead, early
        self._jobs: Jobs | None = None
        self.restarts = replace(restarts or Restarts())  # its own counts: models are loaded again with one policy
        self._failed: EngineFailed | None = None
        self._rests_until: float | None = None
        self._why_restarts = ""
        self._streams: dict[Answer, Stream] = {}
        self._inbox: deque[tuple[Callable[[Any], None], Stream | Change]] = deque()
        self._wake = threading.Event()
        self._posting = threading.Lock()
        self._closing = self._ended = False
        self._thread: threading.Thread | None = None
        self._stepping: float | None = None

    async def __aenter__(self) -> Self:
        """Compiles and starts."""
        self._jobs = await asyncio.to_thread(self._made)
        self._thread = threading.Thread(target=self._run, name="llama_jax engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancels every request and ends the thread."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._leave_behind()

    @property
    def settings(self) -> EngineSettings:
        """Sizes of the engine."""
        return self._settings

    def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Yields the pieces of a request's answer as they arrive.

        Raises:
          RequestError: the request is invalid, or exceeds the model's context.
          DoesNotFit: it exceeds the engine's context.
          Overloaded: the queue is full.
          EngineFailed: the device has failed, or the engine is closed.
        """
        return self._pieces(request, streamed=True)

    async def generate(self, request: Request) -> RequestOutput:
        """The whole answer; errors as for `stream`."""
        async for piece in self._pieces(request, streamed=False):
            if piece.output is not None:
                return piece.output
        raise EngineFailed("the engine has ended", hint="make a new one")

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests can choose, in the order they were loaded."""
        return () if self._pool is None else self._pool.names

    async def load_adapter(self, name: str, adapter: AdapterLike) -> None:
        """Loads an adapter for later requests to name, between two steps; nothing is compiled.

        Raises:
          RequestError: the engine has no slots of adapters, or the adapter does not fit them.
          Overloaded: no slot is free.
          EngineFailed: the engine is not running.
          LlamaJaxError: as for `adapters.load_adapter`.
        """
        self._check_open()
        if (pool := self._pool) is None:
            raise no_slots()
        prepared = await asyncio.to_thread(lambda: pool.prepare(name, open_adapter(self.model, adapter)))
        await self._changed(lambda jobs: jobs.put_adapter(name, prepared))

    async def unload_adapter(self, name: str) -> None:
        """Forgets an adapter: requests that have begun with it end with it, then its slot is free. Errors as for
        `load_adapter`."""
        self._check_open()
        await self._changed(lambda jobs: jobs.pool.drop(name))

    async def _changed(self, run: Callable[[Jobs], None]) -> None:
        """Runs something between two steps."""
        change = Change(run, asyncio.get_running_loop())
        self._post(self._apply, change)
        await change.done

    async def _pieces(self, request: Request, *, streamed: bool) -> AsyncIterator[Piece]:
        self._check_open()
        asked = [request.prompt], [request.params]
        requests = await run_away(
            lambda: prepare(self.model, self.tokenizer, *asked, adapter=request.adapter),
            brief=isinstance(request.prompt, Sized)
            and len(request.prompt) <= BRIEF
            and not has_constraints(request.params),
        )
        stream = Stream(requests, request, streamed, asyncio.get_running_loop())
        self._post(self._begin, stream)
        try:
            while True:
                piece = await stream.take()
                yield piece
                if piece.output is not None:
                    return
        finally:
            self._post(self._end, stream)

    def snapshot(self) -> Snapshot:
        """The engine's current state and counters.

        Raises:
          EngineFailed: it has failed, or restarts after a fault, or is not running.
        """
        return self._present().snapshot()

    def published(self) -> Published:
        """The report that `llama-jax top` shows; errors as for `snapshot`."""
        return report(self._present())

    def _present(self) -> Replicas:
        self._check_open()
        if (jobs := self._jobs) is None:
            raise EngineFailed(
                f"the engine restarts after a fault: {self._why_restarts}", hint="wait until its programs are compiled"
            )
        return jobs.engine

    def progress(self, request: Request) -> tuple[int, int] | None:
        """Prompt tokens of a request computed so far, and in total; None before the engine has taken it and after its
        end."""
        jobs, streams = self._jobs, list(self._streams.items())  # the engine's thread changes both
        answer = next((answer for answer, stream in streams if stream.request is request), None)
        if jobs is None or answer is None:
            return None
        with contextlib.suppress(KeyError):  # it is just ending
            return jobs.computed(answer), len(answer.prompt)
        return None

    @property
    def restarting(self) -> bool:
        """Whether it has failed and will be rebuilt."""
        return self._failed is None and not self._closing and self._thread is not None and self._jobs is None

    @property
    def compiling(self) -> bool:
        """Whether programs are still compiled in the background (`early`), which cannot be stopped."""
        jobs = self._jobs
        return jobs is not None and any(core.programs.behind for core in jobs.engine.cores)

    @property
    def step_age_s(self) -> float:
        """Seconds since the current step began; 0 between steps. On a hung device a step never ends."""
        began = self._stepping
        return 0.0 if began is None else time.monotonic() - began

    def give_up(self, error: EngineFailed) -> None:
        """Raises an error in all current and future callers when the engine's thread hangs in a step and cannot."""
        self._failed, self._closing = error, True
        self._drop(error)

    def _leave_behind(self) -> None:
        """Gives up programs that the background has not begun; what it holds of the engine goes with them."""
        if self._jobs is not None:
            for core in self._jobs.engine.cores:
                core.programs.leave_behind()

    # --- The engine's thread

    def _made(self) -> Jobs:
        jobs = Jobs(self.model, self.tokenizer, self._settings, self._pool, draft=self._draft, peak=self._peak)
        jobs.make_ready(self._compiling, ahead=self._ahead, early=self._early)
        return jobs

    def _run(self) -> None:
        while True:
            self._wake.clear()
            if self._closing:
                break
            try:
                while self._inbox:
                    posted = self._inbox.popleft()
                    try:
                        posted[0](posted[1])
                    except BaseException:
                        self._inbox.appendleft(posted)  # its caller is told with the others
                        raise
                assert self._jobs is not None
                if self._jobs.idle:
                    self._wake.wait()
                    continue
                self._stepping = time.monotonic()
                deliver(filter(None, map(self._told, self._jobs.step())))
                self._stepping = None
            except BaseException as error:  # a device failure or a bug of ours: callers must be told
                self._fail(error)
        self._drop(self._why_ended)

    def _apply(self, change: Change) -> None:
        assert self._jobs is not None
        try:
            change.run(self._jobs)
        except LlamaJaxError as error:
            change.end(error)
        else:
            change.end(None)

    def _begin(self, stream: Stream) -> None:
        assert self._jobs is not None
        try:
            domain = (("tenant", stream.request.tenant),) if stream.request.tenant else ()
            stream.answer = self._jobs.add(
                stream.requests, 0, priority=stream.request.priority, domain=domain, streamed=stream.streamed
            )
        except LlamaJaxError as error:
            deliver([(stream, error)])
        else:
            self._streams[stream.answer] = stream

    def _end(self, stream: Stream) -> None:
        answer = stream.answer
        if answer is not None and self._jobs is not None and answer in self._streams:
            del self._streams[answer]
            self._jobs.cancel(answer)

    def _told(self, news: News) -> tuple[Stream, Piece] | None:
        """The piece that carries news to a caller; None if nobody waits for it."""
        stream, answer = self._streams.get(news.answer), news.answer
        if stream is None:
            return None
        row, new = answer.rows[news.copy], len(news.tokens)
        output = answer.output() if news.last else None
        if output is None and not stream.streamed:
            return None
        logprobs = tuple(answer.logprobs[news.copy][-new:]) if answer.params.logprobs is not None and new else None
        if output is not None:
            del self._streams[answer]
        return stream, Piece(news.copy, news.text, news.tokens, logprobs, row.finish_reason, output, row.stop_reason)

    def _fail(self, error: BaseException) -> None:
        """Ends every request with a typed error, and restarts as often as `restarts` allows."""
        self._stepping = None
        # The frames hold the old engine. Cleared before a caller re-raises the error, which adds more frames.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, EngineFailed):
            failed = error
        else:
            failed = EngineFailed(f"the engine's device failed: {error}", hint="send the request again")
            failed.__cause__ = error
        self._leave_behind()
        self._jobs = None  # frees the old one's arrays; and no caller that is told finds it ready
        self._drop(failed)
        self._why_restarts = str(error)
        while self._jobs is None and not self._closing:
            pause = self.restarts.failed(time.monotonic())
            if pause is None:
                self._failed = EngineFailed(
                    f"the engine cannot restart, after {self.restarts.row} attempts: {self._why_restarts}",
                    hint="restart the process",
                )
                self._closing = True
            elif not pause or self._rested(pause):
                self._restart()

    def _rested(self, seconds: float) -> bool:
        """Waits while requests are refused; returns whether the engine is still wanted."""
        self._rests_until = until = time.monotonic() + seconds
        self._drop(self._resting(until))
        while not self._closing and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()
        self._rests_until = None
        return not self._closing

    def _resting(self, until: float) -> EngineFailed:
        """The error for requests until the next attempt to restart."""
        left = max(0.0, until - time.monotonic())
        return EngineFailed(
            f"the engine restarts in {left:.3g} s (attempt {self.restarts.row} of {self.restarts.attempts}): "
            f"{self._why_restarts}",
            hint="send the request again later",
            retry_s=left,
        )

    def _restart(self) -> None:
        try:
            self._jobs = self._made()
        except Exception as error:  # a device failure; the next attempt may succeed
            traceback.clear_frames(error.__traceback__)
            self._why_restarts = str(error)
        else:
            self.restarts.made(time.monotonic())

    def _drop(self, error: EngineFailed) -> None:
        """Raises the error in every waiting caller."""
        with self._posting:
            posted = list(self._inbox)
            self._inbox.clear()
            self._ended = self._closing
        for _, change in posted:
            if isinstance(change, Change):
                change.end(error)
        begun = [stream for do, stream in posted if do == self._begin and isinstance(stream, Stream)]
        streams = [*self._streams.values(), *begun]
        self._streams.clear()
        deliver((stream, error) for stream in streams)

    def _post(self, do: Callable[[Any], None], stream: Stream | Change) -> None:
        with self._posting:
            if not self._ended:
                self._inbox.append((do, stream))
                self._wake.set()
            elif isinstance(stream, Change):
                stream.end(self._why_ended)
            elif do == self._begin:
                deliver([(stream, self._why_ended)])

    @property
    def _why_ended(self) -> EngineFailed:
        return self._failed or EngineFailed("the engine was closed", hint="make a new one")

    def _check_open(self) -> None:
        if self._failed is not None:
            raise self._failed
        if (until := self._rests_until) is not None:
            raise self._resting(until)
        if self._closing or self._thread is None:
            raise EngineFailed("the engine is not running", hint="use it inside of `async with Engine(...)`")
