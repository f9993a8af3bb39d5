"""The models of a server: those loaded, and those loaded on demand."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Self

from llama_jax.disk import size_text
from llama_jax.errors import DoesNotFit, EngineFailed, RequestError, did_you_mean
from llama_jax.generation.engine import Engine
from llama_jax.server.budget import Free, free_here, reserve
from llama_jax.server.errors import RETRY_S, Refused
from llama_jax.server.metrics import Metrics
from llama_jax.server.served import Served
from llama_jax.server.settings import ServerSettings
from llama_jax.server.slots import Slot, Source
from llama_jax.text.tokenizer import Tokenizer

log = logging.getLogger("llama_jax.server")


class Models:
    """The models of a server; a context manager within which the first is loaded.

    Another is loaded when a request names it. If there is no room for it, unused models are unloaded, least recently
    used first.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        settings: ServerSettings,
        metrics: Metrics,
        *,
        free: Free = free_here,
        settle: Callable[[], object] = gc.collect,
    ):
        """Take the models; there must be at least one.

        Args:
          free: returns the free bytes of each device.
          settle: called when a model was loaded or unloaded; collects garbage of the latter.

        Raises:
          RequestError: two models have the same name.
        """
        self.slots = tuple(slots)
        self._by_name: dict[str, Slot] = {}
        for slot in self.slots:
            for name in slot.names:
                if name in self._by_name:
                    hint = "give each a name of its own: --model NAME=MODEL"
                    raise RequestError(f"two models are called {name!r}", param="model", hint=hint)
                self._by_name[name] = slot
        self._settings, self._metrics, self._free, self._settle = settings, metrics, free, settle
        self._budget: int | None = None
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> list[str]:
        """All names of all models, and of the adapters of those loaded."""
        return [*self._by_name, *(name for slot in self.slots for name in slot.adapters)]

    @property
    def loaded(self) -> list[Served]:
        """The loaded models."""
        return [slot.served for slot in self.slots if slot.served is not None]

    @property
    def busy(self) -> bool:
        """Whether a model is being loaded or compiled, which cannot be stopped."""
        return bool(self._tasks) or any(served.engine.compiling for served in self.loaded)

    def find(self, name: str | None) -> Slot:
        """Return a model by a name, its own or an adapter's; without one, the first.

        Raises:
          Refused: there is none of that name.
        """
        if name is None:
            return self.slots[0]
        adapted = (slot for slot in self.slots if name in slot.adapters)
        if (found := self._by_name.get(name) or next(adapted, None)) is None:
            known = self.names
            near = did_you_mean(name[:100], known)
            hint = near or f"there {'is' if len(known) == 1 else 'are'} {', '.join(map(repr, known))}"
            message = f"there is no model {name!r:.100} here"
            raise Refused(404, message, code="model_not_found", param="model", hint=hint)
        return found

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """Keep a model loaded within the context; loads it first if necessary. By the name of an adapter, it is the
        model with that.

        Raises:
          Refused: there is none of that name, no room for it, or it cannot be loaded.
          EngineFailed: the server ends before it is loaded.
        """
        slot = self.find(name)
        slot.users += 1
        try:
            while slot.served is None:
                await self._load(slot)
            yield slot.served.by(name)
        finally:
            slot.users -= 1
            slot.used = time.monotonic()

    async def __aenter__(self) -> Self:
        """Load the first model, or start it. Errors are those of `llama_jax.load` and `Engine`."""
        first, *others = self.slots
        self._budget = self._free() if others else None
        for slot in others:
            slot.outline = await asyncio.to_thread(slot.source.outline) if slot.source else None
        if first.served is not None:
            await first.served.engine.__aenter__()
        else:
            async with self._changing:
                await self._fill(first)
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every engine, and notify requests that wait for a model."""
        for slot in self.slots:
            if slot.loading is not None and not slot.loading.done():
                slot.loading.set_exception(EngineFailed("the server has ended", hint="send the request again later"))
        async with asyncio.TaskGroup() as group:
            for served in self.loaded:
                group.create_task(served.engine.__aexit__())

    # --- Loading

    async def _load(self, slot: Slot) -> None:
        """Waits until a model is loaded; the first waiter starts loading, which continues even if all leave."""
        if slot.failure and (left := slot.retry - time.monotonic()) > 0:
            raise slot.refused(left)
        if slot.loading is None:
            slot.loading = asyncio.get_running_loop().create_future()
            slot.loading.add_done_callback(asyncio.Future.exception)  # marks the exception as retrieved
            task = asyncio.create_task(self._loaded(slot, slot.loading))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.shield(slot.loading)

    async def _loaded(self, slot: Slot, done: asyncio.Future[None]) -> None:
        name, error = slot.names[0], None
        try:
            slot.told("waiting for another model" if self._changing.locked() else "opening")
            async with self._changing:
                began = time.monotonic()
                await self._fill(slot)
            log.info("loaded %s in %.1f s", name, time.monotonic() - began)
        except Refused as refused:
            self._metrics.loaded(name, refused.code)
            error = refused
        except Exception as fault:  # a device or file error: it concerns only requests for this model
            error = self._failed(slot, fault)
            await asyncio.to_thread(self._settle)
        slot.loading, slot.progress = None, ""
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def _failed(self, slot: Slot, error: Exception) -> Refused:
        """Records a failure; the next attempt is made after a pause."""
        slot.failure, now = type(error).__name__, time.monotonic()
        pause = slot.attempts.failed(now)
        slot.retry = now + (slot.attempts.longest_s if pause is None else pause)
        log.error("%s cannot be loaded: %s: %s", slot.names[0], slot.failure, error)
        self._metrics.loaded(slot.names[0], slot.failure)
        traceback.clear_frames(error.__traceback__)  # its frames hold what was loaded
        return slot.refused(slot.retry - now)

    async def _fill(self, slot: Slot) -> None:
        """Loads a model after making room for it."""
        assert slot.source is not None
        need, before = await self._room(slot, slot.source) if len(self.slots) > 1 else (0, None)
        while True:
            unloaded = [one.outline.nbytes for one in self.slots if one.outline and one is not slot and not one.served]
            kept = 0 if before is None else reserve(before, need, unloaded) + self._steps(slot)
            try:
                engine, tokenizer = await _started(slot.source, kept, slot.told)
                break
            except DoesNotFit as error:  # the estimate was too low
                traceback.clear_frames(error.__traceback__)  # which hold what was loaded
                if not await self._unload_one(slot):
                    raise
                before = None if before is None else self._left(slot)
        after = None if before is None else self._left(slot)
        metrics = self._metrics.of(slot.names[0], engine.snapshot, lambda: engine.restarts.total)
        slot.served = Served(engine, tokenizer, slot.names, self._settings, metrics, slot.tool_parser)
        slot.held = need if before is None or after is None else max(need, before - after)
        slot.failure, slot.used = "", time.monotonic()
        slot.attempts.made(slot.used)
        self._metrics.loaded(slot.names[0], "loaded")
        await asyncio.to_thread(self._settle)

    async def _room(self, slot: Slot, source: Source) -> tuple[int, int | None]:
        """Makes room for a model; returns the bytes of each device that it needs, and that are left; None if unknown.

        Raises:
          DoesNotFit: it would not fit even without other models.
          Refused: it does not fit beside the models in use.
        """
        await asyncio.to_thread(source.fetch)  # before anything is unloaded for a missing model
        slot.outline = await asyncio.to_thread(source.outline)
        need = 0 if slot.outline is None else slot.outline.nbytes
        if self._budget is not None and need > self._budget:
            raise DoesNotFit(
                f"{slot.names[0]} takes {size_text(need)} of each device; there are {size_text(self._budget)}",
                hint="a smaller context (--context), weights in fewer bits (--weights), or more devices (--tp)",
            )
        while (left := self._left(slot)) is not None and need > left:
            room = left + sum(one.held + one.step for one in self._idle(slot))
            if need > room or not await self._unload_one(slot):
                raise Refused(
                    503,
                    f"{slot.names[0]!r} takes {size_text(need)}, and {size_text(left)} are free beside models in use",
                    code="no_room",
                    hint="send the request again later",
                    headers={"retry-after": str(RETRY_S)},
                )
        return need, left

    def _steps(self, wanting: Slot) -> int:
        """Bytes of each device that steps of the other loaded models take while they last."""
        return sum(slot.step for slot in self.slots if slot.served and slot is not wanting)

    def _left(self, wanting: Slot) -> int | None:
        """Bytes of each device for a model, whatever the others do; None if unknown."""
        free = self._free()
        return None if free is None else max(free - self._steps(wanting), 0)

    def _idle(self, wanting: Slot) -> list[Slot]:
        """Models that may be unloaded for another."""
        return [slot for slot in self.slots if slot.served and not slot.users and slot.source and slot is not wanting]

    async def _unload_one(self, wanting: Slot) -> bool:
        """Unloads the least recently used idle model; returns whether there was one."""
        if not (idle := self._idle(wanting)):
            return False
        slot = min(idle, key=lambda slot: slot.used)
        wanting.told(f"unloading {slot.names[0]}")
        served, slot.served = slot.served, None
        assert served is not None
        self._metrics.forget(slot.names[0])
        await served.engine.__aexit__()
        del served
        await asyncio.to_thread(self._settle)
        log.info("unloaded %s", slot.names[0])
        return True


async def _started(source: Source, kept: int, told: Callable[[str], None]) -> tuple[Engine, Tokenizer]:
    """A model's engine once it runs, and its tokenizer. Errors are those of `Source.open` and `Engine`."""
    engine, tokenizer = await asyncio.to_thread(source.open, kept, told)
    await engine.__aenter__()
    return engine, tokenizer
