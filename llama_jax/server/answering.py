"""Answers made from the engine's output: one object, or a stream of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from llama_jax.errors import LlamaJaxError
from llama_jax.generation.outputs import CompletionOutput, RequestOutput
from llama_jax.generation.streams import Piece, Request
from llama_jax.generation.threads import BRIEF, run_away
from llama_jax.server.asking import Asked
from llama_jax.server.chunks import chunks_of
from llama_jax.server.reading import message_of
from llama_jax.server.served import Served


def requests_of(served: Served, asked: Asked, tenant: str) -> list[Request]:
    """Return one engine request per prompt; `tenant`: whose prefixes they may share."""
    return [Request(prompt, asked.params, tenant=tenant, adapter=served.adapter) for prompt in asked.prompts]


async def answer(served: Served, asked: Asked, name: str, requests: Sequence[Request]) -> dict[str, Any]:
    """Return the whole answer.

    Args:
      name: of the answer, its "id"; requests: of `requests_of`.

    Raises:
      LlamaJaxError: as `Engine.generate`, and if a continuation has ended in an error.
    """
    made = [_generated(served, request) for request in requests]
    outputs = [await made[0]] if len(made) == 1 else await _gathered(made)
    done = [(output, completion) for output in outputs for completion in output.outputs]
    for output, completion in done:
        if completion.finish_reason == "error":
            raise _failed(output, completion.index)

    def read() -> dict[str, Any]:
        choices = [{"index": i, **_choice(served, asked, *each)} for i, each in enumerate(done)]
        return {"choices": choices, "usage": usage(served, asked, outputs)}

    return {**_head(served, asked, name), **await run_away(read, brief=_brief(outputs)), **timings(outputs)}


async def chunks(
    served: Served, asked: Asked, name: str, requests: Sequence[Request]
) -> AsyncGenerator[list[dict[str, Any]]]:
    """Yields the answer as stream chunks, those that are made at once together; errors as for `answer`."""
    head = _head(served, asked, name, suffix=".chunk" * (asked.endpoint.prefix == "chatcmpl"))
    if asked.usage:
        head["usage"] = None
    choices, outputs = chunks_of(served.tokenizer, asked), dict[int, RequestOutput]()
    read, written = sum(map(len, asked.prompts)), 0
    streams = [_pieces(served, number, request) for number, request in enumerate(requests)]
    async with aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as merged:
        async for prompt, piece in merged:
            if asked.continuous:
                written += len(piece.token_ids)
                head["usage"] = _counts(read, written)
            made = [{**head, "choices": [choice]} for choice in choices(prompt, piece)]
            if piece.output is not None:
                outputs[prompt] = piece.output
                if len(streams) == 1:
                    made[-1] |= timings([piece.output])
            if made:
                yield made
    if asked.usage:
        ordered = [outputs[prompt] for prompt in sorted(outputs)]
        counts = await run_away(lambda: usage(served, asked, ordered), brief=_brief(ordered))
        yield [{**head, "choices": [], "usage": counts}]


def usage(served: Served, asked: Asked, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return the token counts; cached tokens are also counted as prompt tokens."""
    thought = sum(_reasoning(served, asked, completion) for output in outputs for completion in output.outputs)
    read = sum(len(output.prompt_token_ids) for output in outputs)
    written = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return {
        **_counts(read, written),
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


def _counts(read: int, written: int) -> dict[str, Any]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def timings(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return the timings of a single prompt, with llama.cpp's names: milliseconds and tokens per second. There are none
    for several prompts, since they run at the same time."""
    if len(outputs) != 1:
        return {}
    (output,) = outputs
    written = sum(len(completion.token_ids) for completion in output.outputs)
    read, timing = len(output.prompt_token_ids) - output.cached_tokens, output.timing
    later = max(written - len(output.outputs), 0)
    return {
        "timings": {
            "cache_n": output.cached_tokens,
            "prompt_n": read,
            "prompt_ms": 1e3 * timing.ttft_s,
            "prompt_per_second": read / timing.ttft_s if timing.ttft_s else 0.0,
            "predicted_n": written,
            "predicted_ms": 1e3 * later / timing.generation_tps if timing.generation_tps else 0.0,
            "predicted_per_second": timing.generation_tps,
        }
    }


def _choice(served: Served, asked: Asked, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    choice = asked.endpoint.choice(output, completion, asked.params, served.tokenizer)
    if "message" in choice:
        reader = asked.reader()
        message = message_of([*reader.feed(completion.text), *reader.finish()])
        choice |= {"message": message, "finish_reason": reader.reason(completion.finish_reason)}
    return {**choice, "stop_reason": completion.stop_reason}


def _brief(outputs: Sequence[RequestOutput]) -> bool:
    """Whether answers are read again in no time."""
    return sum(len(completion.token_ids) for output in outputs for completion in output.outputs) <= BRIEF


def _reasoning(served: Served, asked: Asked, completion: CompletionOutput) -> int:
    stream = served.tokenizer.detokenizer(skip_special_tokens=asked.params.skip_special_tokens)
    known = (token for token in completion.token_ids if token < served.tokenizer.vocab_size)
    return asked.reader().reasoning_tokens(stream.add(token) for token in known)


def _head(served: Served, asked: Asked, name: str, suffix: str = "") -> dict[str, Any]:
    return {
        "id": f"{asked.endpoint.prefix}-{name}",
        "object": asked.endpoint.object + suffix,
        "created": int(time.time()),
        "model": served.names[0],
    }


def _failed(output: RequestOutput | None, index: int) -> LlamaJaxError:
    reason = output and output.outputs[index].error
    return LlamaJaxError(
        f"there is no next token: {reason}" if reason else "there is no next token",
        hint="the model's numbers or a grammar have failed; other requests are not affected",
    )


async def _generated(served: Served, request: Request) -> RequestOutput:
    with served.metrics.request() as times:
        output = await served.engine.generate(request)
        times.output(output)
    return output


async def _gathered[T](made: Sequence[Any]) -> list[T]:
    """The results of several calls; if one fails, the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in made]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _pieces(served: Served, number: int, request: Request) -> AsyncGenerator[tuple[int, Piece]]:
    """Yields the engine's pieces with the request's number, and records their times. Raises LlamaJaxError if a
    continuation has ended in an error."""
    with served.metrics.request() as times:
        stream: Any = served.engine.stream(request)
        async with aclosing(stream):
            async for piece in stream:
                times.piece(piece)
                if piece.finish_reason == "error":
                    raise _failed(piece.output, piece.index)
                yield number, piece


async def _merged(streams: Sequence[AsyncGenerator[tuple[int, Piece]]]) -> AsyncGenerator[tuple[int, Piece]]:
    """Yields pieces of several streams as they arrive."""
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(stream: AsyncGenerator[tuple[int, Piece]]) -> None:
        try:
            async with aclosing(stream):
                async for news in stream:
                    await queue.put(news)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        left = len(streams)
        while left:
            news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                left -= 1
            else:
                yield news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
