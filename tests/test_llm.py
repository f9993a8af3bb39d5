"""`LLM` and `Engine`: texts, many callers, and what happens when one of them goes away or the device fails."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import alone, small_settings, some_requests, tiny_model
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.engine import compiled
from llama_jax.engine.compiled import Programs
from llama_jax.errors import EngineFailed, Overloaded, RequestError
from llama_jax.generation.engine import Engine
from llama_jax.generation.llm import LLM
from llama_jax.generation.request import prepare
from llama_jax.generation.restarts import Restarts
from llama_jax.generation.streams import Piece, Request
from llama_jax.sampling import SamplingParams


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny_model(), settings=small_settings())


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = write_chat_model(tmp_path_factory.mktemp("llm") / "tiny")
    return LLM(folder, rows=2, context=128)


def test_outputs_in_the_order_of_the_prompts(llm: LLM) -> None:
    asked = some_requests(llm.model, 7)
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for request, output in zip(asked, outputs, strict=True):
        expected = alone(llm.model, request)
        assert output.prompt_token_ids == tuple(request[0])
        assert output.outputs[0].token_ids == expected.tokens
        assert output.outputs[0].finish_reason == expected.ending
        assert (output.outputs[0].logprobs is None) == (request[1].logprobs is None)


def test_continuations_of_one_prompt_take_seeds_one_after_the_other(llm: LLM) -> None:
    prompt, params = [5, 6, 7] * 8, SamplingParams(seed=3, max_tokens=6, n=3)
    (output,) = llm.generate([prompt], params)
    for i, completion in enumerate(output.outputs):
        one = SamplingParams(seed=3 + i, max_tokens=6)
        assert completion.token_ids == alone(llm.model, (prompt, one)).tokens


@pytest.mark.parametrize(
    "begun", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["planned", "begun by a ready engine"]
)
def test_what_an_interrupted_step_should_have_computed_is_not_found(
    begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while its program is compiled, or once the program has taken the state; the same again is answered."""
    llm = LLM(tiny_model(), settings=small_settings(), ahead=begun)
    prompt, params = [5 + i % 30 for i in range(60)], SamplingParams(temperature=0.0, max_tokens=4)
    step = Programs.step

    def interrupted(*args: Any) -> Any:
        if begun:
            step(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([prompt], params)
    (output,) = llm.generate([prompt], params)
    assert output.outputs[0].token_ids == alone(llm.model, (prompt, params)).tokens
    snapshot = llm.snapshot()
    assert (snapshot.counts.pages_used, snapshot.counts.pages_fenced, snapshot.late_compilations) == (0, 0, 0)
    assert (snapshot.ready_s is not None) == begun


def test_tokens_that_were_found_are_told(llm: LLM) -> None:
    """Whole pages of 16 tokens; of several continuations what the first one found."""
    prompt, fields = [9, 8] * 20, {"max_tokens": 2, "ignore_eos": True}
    found = [llm.generate([prompt], n=n, seed=1, **fields)[0].cached_tokens for n in (2, 1, 2)]
    assert found == [0, 32, 32]


def test_as_they_end(llm: LLM) -> None:
    prompts = [[5, 6], [7, 8]]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (12, 2)]
    seen: list[int] = []
    done = [i for i, _ in llm.each(prompts, params, progress=lambda i, copy, text: seen.append(i))]
    assert done == [1, 0]
    assert (seen.count(0), seen.count(1)) == (12, 2)


def test_a_call_that_is_not_read_to_its_end(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    calls = llm.each([[5, 6], [7, 8]], params)
    next(calls)
    with pytest.raises(RequestError, match="another call"):
        llm.generate([[3]], params)
    calls.close()
    assert llm.generate([[5, 6]], params)[0].outputs[0].token_ids == alone(llm.model, ([5, 6], params)).tokens
    assert llm.snapshot().counts.pages_used == 0


@pytest.mark.slow
def test_texts_are_those_of_generate(chat: LLM) -> None:
    for prompt in ("Hello there", "x"):
        (output,) = chat.generate([prompt], temperature=0.8, seed=4, max_tokens=12)
        assert output.text == lj.generate(chat.model, chat.tokenizer, prompt, temperature=0.8, seed=4, max_tokens=12)
    (whole,) = chat.generate(["Hello there"], temperature=0.8, seed=4, max_tokens=24, ignore_eos=True)
    stop = whole.text[len(whole.text) // 2 :][:2]
    (output,) = chat.generate(["Hello there"], temperature=0.8, seed=4, max_tokens=24, ignore_eos=True, stop=stop)
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"
    assert chat.snapshot().counts.pages_used == 0


@pytest.mark.slow
def test_conversations(chat: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (one,) = chat.chat(messages, temperature=0.0, max_tokens=5)
    several = chat.chat([messages, [*messages, {"role": "assistant", "content": "ho"}, *messages]], max_tokens=5)
    assert several[0].text == one.text
    assert len(several) == 2
    with pytest.raises(RequestError, match="tokenizer"):
        LLM(tiny_model(), settings=small_settings()).chat(messages)


@pytest.mark.slow
def test_many_callers() -> None:
    """Each gets its own; those that leave hold nothing any more."""
    model = tiny_model()
    asked = some_requests(model, 8)

    async def left_early(engine: Engine) -> int:
        count = 0
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        async for piece in engine.stream(Request([5, 6, 7], params)):
            count += len(piece.token_ids)
            if count >= 3:
                break
        return count

    async def run() -> Any:
        async with Engine(model, settings=small_settings(), ahead=False) as engine:
            answers = [engine.generate(Request(prompt, params, tenant="a")) for prompt, params in asked]
            cancelled = asyncio.ensure_future(engine.generate(Request([9] * 20, SamplingParams(max_tokens=50))))
            results = asyncio.gather(*answers, left_early(engine))
            await asyncio.sleep(0.01)
            cancelled.cancel()
            found = await results
            for _ in range(200):
                if (counts := engine.snapshot().counts).running + counts.waiting == 0:
                    break
                await asyncio.sleep(0.01)
            return found, engine.snapshot()

    (*outputs, early), snapshot = asyncio.run(run())
    for request, output in zip(asked, outputs, strict=True):
        assert output.outputs[0].token_ids == alone(model, request).tokens
    assert early >= 3
    assert (snapshot.counts.pages_used, snapshot.counts.running) == (0, 0)


def test_pieces_end_where_a_stop_string_does(chat: LLM) -> None:
    """Whatever the same dispatch has drawn behind it. The pieces of a stream together are the output; a whole answer is
    one piece."""
    prompt, params = "Hello there", SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
    text = chat.generate([prompt], params)[0].outputs[0].text
    params = replace(params, stop=(text[4:6],))

    async def run() -> list[list[Piece]]:
        async with Engine(chat.model, chat.tokenizer, rows=2, context=128, ahead=False) as engine:
            assert engine.settings.steps > 4
            request = Request(prompt, params)
            ways = [engine._pieces(request, streamed=streamed) for streamed in (False, True)]
            return [[piece async for piece in pieces] for pieces in ways]

    whole, pieces = asyncio.run(run())
    assert len(whole) == 1
    for last in (whole[-1], pieces[-1]):
        assert last.output is not None
        (completion,) = last.output.outputs
        assert completion.text == text[: text.index(text[4:6])]
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(i for piece in pieces for i in piece.token_ids) == completion.token_ids
    assert tuple(entry for piece in pieces for entry in piece.logprobs or ()) == completion.logprobs


@pytest.mark.slow
def test_tenants_share_nothing() -> None:
    async def hits(*tenants: str) -> int:
        async with Engine(tiny_model(), settings=small_settings(), ahead=False) as engine:
            for tenant in tenants:
                await engine.generate(Request(list(range(3, 39)), SamplingParams(max_tokens=2), tenant=tenant))
            return engine.snapshot().counts.prefix_hit_tokens

    assert asyncio.run(hits("a", "a")) == 32
    assert asyncio.run(hits("a", "b")) == 0


def test_bad_requests_harm_nobody() -> None:
    async def run() -> None:
        async with Engine(tiny_model(), settings=small_settings(waiting=1), ahead=False) as engine:
            with pytest.raises(RequestError, match="token id 99"):
                await engine.generate(Request([99]))
            with pytest.raises(RequestError, match="context"):
                await engine.generate(Request([5] * 120, SamplingParams(max_tokens=50)))
            with pytest.raises(RequestError, match="priority must be an integer"):
                await engine.generate(Request([5], priority=float("nan")))  # type: ignore[arg-type]
            with pytest.raises(RequestError, match="tenant"):
                Request([5], tenant=["a"])  # type: ignore[arg-type]
            many = [engine.generate(Request([5, i], SamplingParams(max_tokens=40, ignore_eos=True))) for i in range(30)]
            results = await asyncio.gather(*many, return_exceptions=True)
            assert any(isinstance(result, Overloaded) for result in results)
            assert not any(isinstance(r, BaseException) and not isinstance(r, Overloaded) for r in results)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning", "ignore:This process:DeprecationWarning")
def test_a_forked_process_is_refused_where_it_would_wait_for_ever(llm: LLM) -> None:
    child = os.fork()
    if not child:
        try:
            llm.generate([[5, 6]], max_tokens=1)
        except EngineFailed as error:
            os._exit("spawn" in error.hint)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_device_that_fails_ends_all_and_the_engine_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    async def first_piece(engine: Engine) -> tuple[Piece, Any]:
        stream = engine.stream(Request([5, 6], params))
        return await anext(stream), stream

    async def run() -> None:
        async with Engine(model, settings=small_settings(), ahead=False, restarts=Restarts(1)) as engine:
            _, stream = await first_piece(engine)
            assert engine._jobs is not None
            broken = engine._jobs.engine.cores[0].programs

            def fail(*_: Any) -> Any:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

            monkeypatch.setattr(broken, "step", fail)
            with pytest.raises(EngineFailed, match="RESOURCE_EXHAUSTED"):
                async for _ in stream:
                    pass
            output = await engine.generate(Request([5, 6], params))
            assert output.outputs[0].token_ids == alone(model, ([5, 6], params)).tokens

            monkeypatch.setattr(engine, "_made", fail)
            monkeypatch.setattr(engine._jobs.engine.cores[0].programs, "step", fail)
            with pytest.raises(EngineFailed):
                await engine.generate(Request([5, 6], params))
            for _ in range(100):
                if engine._failed:
                    break
                await asyncio.sleep(0.01)
            with pytest.raises(EngineFailed, match="cannot restart"):
                await engine.generate(Request([5, 6], params))

    asyncio.run(run())
    with pytest.raises(EngineFailed, match="not running"):
        asyncio.run(Engine(model, settings=small_settings(), ahead=False).generate(Request([5], params)))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_whoever_waits_is_told_of_a_fault_between_steps(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is being taken, and a change that is being made: neither has a row or a stream yet. A panic of
    Rust code is no `Exception` either."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error("the device is lost")

    async def run() -> None:
        async with Engine(tiny_model(), settings=small_settings(), ahead=False, max_adapters=1) as engine:
            for name, call in (
                ("add", lambda: engine.generate(Request([5, 6], SamplingParams(max_tokens=2)))),
                ("put_adapter", lambda: engine._changed(lambda jobs: jobs.put_adapter("a", []))),
            ):
                await engine.generate(Request([5, 6], SamplingParams(max_tokens=1)))
                monkeypatch.setattr(engine._jobs, name, fail)
                with pytest.raises(EngineFailed, match="the device is lost"):
                    await asyncio.wait_for(call(), 30)

    asyncio.run(run())


def test_how_far_a_request_is_that_has_just_ended(llm: LLM) -> None:
    """Another thread may ask between the end of its last row and the news of it."""
    jobs = llm._jobs
    answer = jobs.add(prepare(llm.model, None, [[5, 6, 7]], SamplingParams(max_tokens=1)), 0)
    while not jobs.idle:
        jobs.step()
    assert jobs.computed(answer) == 3


def test_each_engine_counts_its_own_restarts() -> None:
    """A model that is loaded again is a new engine with the same policy."""
    policy = Restarts(1)
    first, second = (Engine(tiny_model(), settings=small_settings(), restarts=policy) for _ in range(2))
    assert [first.restarts.failed(0.0), first.restarts.failed(1.0)] == [0.0, None]
    assert (second.restarts.failed(2.0), second.restarts.total) == (0.0, 1)


def test_an_engine_that_fails_gives_up_what_it_was_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next engine compiles that, and not both of them."""
    later: list[Future[bool]] = []

    class Behind:
        def submit(self, *_: Any) -> Future[bool]:
            later.append(Future())
            return later[-1]

    monkeypatch.setattr(compiled, "_in_background", Behind)
    settings = small_settings(decode_rows=(2, 3), mixed_tokens=(9, 24))  # sizes that no other test has

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is lost")

    async def run() -> None:
        async with Engine(tiny_model(), settings=settings, early=True) as engine:
            assert len(later) == 3
            monkeypatch.setattr(engine._jobs, "step", fail)
            request = Request([5, 6], SamplingParams(max_tokens=2))
            with pytest.raises(EngineFailed, match="the device is lost"):
                await engine.generate(request)
            await engine.generate(request)
            assert [future.cancelled() for future in later] == [True] * 3 + [False] * 3

    asyncio.run(run())
