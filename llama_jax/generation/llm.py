"""`LLM`: many prompts through one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import default_settings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import RequestError
from llama_jax.generation.jobs import Jobs, Progress, opened
from llama_jax.generation.outputs import RequestOutput
from llama_jax.generation.request import Prompt, check_prompts, prepare, sampling
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.plan.step_costs import Peak
from llama_jax.sampling import SamplingParams
from llama_jax.text.chat import Message, encode_chat
from llama_jax.text.tokenizer import Tokenizer


class LLM:
    """A model behind an engine: prompts are batched continuously, whatever their lengths, and prefixes that several
    have in common are computed once.

        llm = lj.LLM("org/model")
        for output in llm.generate(["The capital of France is", "2 + 2 ="], max_tokens=8):
            print(output.text)

    Not safe for threads.

    Attributes:
      model, tokenizer: the tokenizer is None for token ids in, token ids out.
    """

    def __init__(
        self,
        model: Model | str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        settings: EngineSettings | None = None,
        adapters: Params | None = None,
        ahead: bool = False,
        peak: Peak | None = None,
        compiling: Progress | None = None,
        **options: Any,
    ):
        """Makes the engine; a name is loaded first.

        Args:
          model: a loaded model, or a name or folder as `load` takes it; None for the default model.
          settings: sizes of the engine.
          adapters: slots of low-rank adapters (`llama_jax.model.adapters`).
          ahead: compile every program now. Otherwise each is compiled when it is first used.
          peak: what the device can do, for `mbu` and `mfu` of `snapshot`; by default what its data sheet says.
          compiling: told of each program that is compiled now.
          options: without `settings`: of `default_settings` (rows, context, pages, steps, strict, ...).

        Raises:
          DoesNotFit: there is no memory for one sequence of the context's length.
        """
        self.model, self.tokenizer = opened(model, tokenizer)
        self._adapters = adapters
        settings = settings or default_settings(self.model, **options)
        self._jobs = Jobs.start(
            self.model, self.tokenizer, settings, adapters, ahead=ahead, peak=peak, progress=compiling
        )
        self._busy = False

    @property
    def settings(self) -> EngineSettings:
        """Sizes of the engine."""
        return self._jobs.core.settings

    def snapshot(self) -> Snapshot:
        """The engine in numbers, at this moment."""
        return self._jobs.core.snapshot()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter_ids: int | Sequence[int] = 0,
        priority: int = 0,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Continues prompts, and returns one output for each, in order.

        Arguments and errors as for `batch_generate`; prompts with a lower `priority` are first.
        """
        done = dict(self.each(prompts, params, adapter_ids=adapter_ids, priority=priority, **fields))
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
        adapter_ids: int | Sequence[int] = 0,
        priority: int = 0,
        progress: Callable[[int, int, str], None] | None = None,
        **fields: Any,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`, but yields (number of the prompt, output) as they end. Closing the iterator, or an
        exception in it, ends what is left.

        Args:
          progress: called with a prompt's number, the continuation's and its new text, for each token or several.
        """
        check_prompts(prompts)
        requests = prepare(
            self.model, self.tokenizer, prompts, sampling(params, fields), None, self._adapters, adapter_ids
        )
        if self._busy:
            raise RequestError(
                "this LLM is answering another call, whose results have not all been read",
                param="prompts",
                hint="read them or close the iterator; Engine answers many callers at once",
            )
        self._busy = True
        limits = [rows[0].limit for rows in requests.continuations]
        order = sorted(range(len(limits)), key=lambda i: limits[i], reverse=True)
        numbers = {}
        try:
            # The longest first: what is left at the end of a batch is short.
            for i in order:
                numbers[self._jobs.add(requests, i, priority=priority)] = i
            while numbers:
                for news in self._jobs.step():
                    if progress is not None:
                        progress(numbers[news.answer], news.copy, news.text)
                    if news.last:
                        yield numbers.pop(news.answer), news.answer.output()
        finally:
            self._busy = False
            for answer in numbers:
                self._jobs.cancel(answer)
