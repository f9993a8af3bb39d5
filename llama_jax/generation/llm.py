"""`LLM`: many prompts through one engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.adapters.models import AdapterLike, open_adapter
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.generation.answer import Answer
from llama_jax.generation.draft import opened_draft
from llama_jax.generation.jobs import Jobs, Progress, opened, opened_pool
from llama_jax.generation.outputs import RequestOutput, StreamOutput
from llama_jax.generation.request import Prompt, Requests, check_prompts, check_stream, prepare, sampling
from llama_jax.model.loaded import Model
from llama_jax.plan.step_costs import Peak
from llama_jax.sampling import SamplingParams
from llama_jax.text.chat import Message, encode_chat
from llama_jax.text.tokenizer import Tokenizer


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turns the device's out-of-memory errors into DoesNotFit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(
            "the engine does not fit into the device's memory",
            hint="fewer rows (--batch-size), a shorter context or fewer pages",
        ) from error


class LLM:
    """A model behind an engine: prompts of any length are batched continuously, and shared prefixes are computed once.

        llm = lj.LLM("org/model")
        for output in llm.generate(["The capital of France is", "2 + 2 ="], max_tokens=8):
            print(output.text)

    Not thread-safe.

    Attributes:
      model, tokenizer: the tokenizer is None for token ids in, token ids out.
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
        ahead: bool = False,
        kv_dtype: str | None = None,
        room: int = 0,
        peak: Peak | None = None,
        compiling: Progress | None = None,
        **options: Any,
    ):
        """Makes the engine, after loading the model if it is given by name.

        Args:
          model: a loaded model, or a name or folder as `load` takes it; None for the default model.
          settings: sizes of the engine, or of each replica on a mesh that splits the batch.
          adapters: by name, of which each request chooses one or none; by default those of the model.
          max_adapters: the most at once, for some that are loaded later (`load_adapter`); by default only those given.
          max_adapter_rank: the largest rank; by default that of the given ones, and at least 16 with `max_adapters`.
          draft: a smaller model with the same vocabulary, on the same devices, for speculative decoding (`drafts=` is
            the number of tokens per draft); or its name.
          kv_dtype: "int8", "k8v4", "int4" or "fp8" for a quantised cache (`load`); by default the model's own.
          ahead: compile every program now; otherwise each is compiled at its first use.
          room: initial capacity of a sequence in tokens (possibly rounded up) if no context is given.
          peak: the device's peak rates, for `mbu` and `mfu` of `snapshot`; by default those of its data sheet.
          compiling: called for each program that is compiled now.
          options: without `settings`, those of `default_settings` (rows, context, pages, steps, strict, ...).
            Without a context the engine starts with a short one, and is rebuilt with a longer one when a request
            needs it.

        Raises:
          DoesNotFit: one sequence of the context's length does not fit into memory.
          RequestError: options contradict each other, or the draft model does not match this model.
        """
        self.model, self.tokenizer = opened(model, tokenizer, kv_dtype)
        small = opened_draft(draft, self.model, self.tokenizer)
        with memory_errors():
            self._adapters = opened_pool(self.model, adapters, max_adapters, max_adapter_rank)
            self._jobs = Jobs(
                self.model, self.tokenizer, settings, self._adapters, room=room, draft=small, peak=peak, **options
            )
            self._jobs.make_ready(compiling, ahead=ahead)
        self._busy = False

    @property
    def settings(self) -> EngineSettings:
        """The engine's current sizes."""
        return self._jobs.engine.settings

    def snapshot(self) -> Snapshot:
        """The engine's current state and counters."""
        return self._jobs.engine.snapshot()

    def load_adapter(self, name: str, adapter: AdapterLike) -> None:
        """Loads an adapter for later requests to name; nothing is compiled.

        Raises:
          RequestError: the engine has no slots of adapters, or the adapter does not fit them.
          Overloaded: no slot is free.
          LlamaJaxError: as for `adapters.load_adapter`.
        """
        self._jobs.put_adapter(name, self._jobs.pool.prepare(name, open_adapter(self.model, adapter)))

    def unload_adapter(self, name: str) -> None:
        """Frees the slot of an adapter. Errors as for `load_adapter`."""
        self._jobs.pool.drop(name)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str] = "",
        priority: int = 0,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Continues prompts and returns one output for each, in order.

        Arguments and errors as for `batch_generate`; prompts with a lower `priority` run first.

        Args:
          adapter: name of one of the engine's adapters for all prompts, or of one for each; "" is none.
        """
        done = dict(self.each(prompts, params, adapter=adapter, priority=priority, **fields))
        return [done[i] for i in range(len(prompts))]

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several.

        Raises:
          TemplateError: the model has no chat template, or it refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError("a conversation needs a tokenizer", param="messages", hint="pass one to LLM(...)")
        several: Any = conversations if conversations and not isinstance(conversations[0], dict) else [conversations]
        return self.generate([encode_chat(self.tokenizer, messages) for messages in several], params, **fields)

    def each(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str] = "",
        priority: int = 0,
        progress: Callable[[int, int, str], None] | None = None,
        **fields: Any,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`, but yields (index of the prompt, output) as each finishes. Closing the iterator, or an
        exception in it, cancels the rest.

        Args:
          progress: called with the indices of prompt and continuation and the new text, after one or more tokens.
        """
        check_prompts(prompts)
        requests = prepare(self.model, self.tokenizer, prompts, sampling(params, fields), adapter)
        return self.each_of(requests, priority=priority, progress=progress)

    def each_of(
        self, requests: Requests, *, priority: int = 0, progress: Callable[[int, int, str], None] | None = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """`each` for prepared requests."""
        limits = [rows[0].limit for rows in requests.continuations]
        # Longest first, so that only short ones remain at the end of a batch.
        order = sorted(range(len(limits)), key=lambda i: limits[i], reverse=True)
        with self._alone():
            for i, news in self._jobs.run(((i, requests, i) for i in order), priority=priority):
                if progress is not None:
                    progress(i, news.copy, news.text)
                if news.last:
                    yield i, news.answer.output()

    def serve[K](
        self, asked: Iterable[tuple[K, Requests]], *, ahead: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[K, int, RequestOutput]]:
        """Like `each`, for requests that arrive while others run.

        Args:
          asked: (key, requests), taken as room allows.
          ahead: the most prompts running or waiting at once; None for no limit.
          stop: called at every step. Once it returns True, started answers are finished and the others are skipped.

        Yields:
          (key, index of the prompt in its requests, output), as each finishes.
        """
        each = (((key, i), requests, i) for key, requests in asked for i in range(len(requests.prompts)))
        with self._alone():
            for (key, i), news in self._jobs.run(each, ahead=ahead, before=lambda _: stop()):
                if news.last:
                    yield key, i, news.answer.output()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str = "",
        progress: Callable[[int, int], None] | None = None,
        **fields: Any,
    ) -> Iterator[StreamOutput]:
        """Continues one prompt token by token. Closing the iterator, or an exception in `progress`, stops it.

        Arguments and errors as for `stream_generate`.

        Args:
          progress: called before each step that computes a part of the prompt, with the numbers of its tokens computed
            so far and in total.
        """
        requests = prepare(self.model, self.tokenizer, [prompt], sampling(params, fields), adapter)
        check_stream(requests)
        return self.stream_of(requests, progress)

    def stream_of(
        self, requests: Requests, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[StreamOutput]:
        """`stream` for a prepared request."""

        def show(answers: Iterable[Answer]) -> bool:
            for answer in answers:
                if progress is not None and not answer.rows[0].token_ids:
                    progress(self._jobs.computed(answer), len(answer.prompt))
            return False

        with self._alone():
            for _, news in self._jobs.run([(None, requests, 0)], before=show, streamed=True):
                if news.tokens or news.last:
                    yield news.answer.stream_output(news.text, len(news.tokens))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuses other calls meanwhile."""
        if self._busy:
            raise RequestError(
                "this LLM is answering another call, whose results have not all been read",
                param="prompts",
                hint="read them or close the iterator; Engine answers many callers at once",
            )
        self._busy = True
        try:
            with memory_errors():
                yield
        finally:
            self._busy = False
