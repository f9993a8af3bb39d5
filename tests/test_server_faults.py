"""Clients that leave, engines that fail, servers that end: nobody waits for ever, and nothing is left over."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest
from asgi_client import call, opened
from served_model import Server, tiny_model

from llama_jax.generation.restarts import Restarts
from llama_jax.server.answers import StatusAnswer
from llama_jax.server.settings import Limits
from llama_jax.server.status import readiness

LONG = {"ignore_eos": True, "max_tokens": 100}
CHAT = "/v1/chat/completions"
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("faults") / "tiny")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def server(model: Any, runner: asyncio.Runner) -> Iterator[Server]:
    with Server(*model, runner, keys=("one", "two")) as made:
        yield made


ONE, TWO = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))


def cancelled(server: Server) -> float:
    return server.served.metrics._cancelled._value.get()


def slow_steps(server: Server, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = server.engine._jobs.step  # type: ignore[union-attr]

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(server.engine._jobs, "step", slow)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_client_that_leaves_ends_its_request(
    server: Server, path: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits for a row, and while its tokens are drawn; the pages are free soon after."""
    body: dict[str, Any] = (MESSAGES if path == CHAT else {"prompt": ["Hi", "You"]}) | LONG | {"stream": streamed}
    server.call("POST", path, body | {"max_tokens": 2}, headers=ONE)  # what is imported by the first request
    before = cancelled(server)
    slow_steps(server, monkeypatch, 0.05)  # so that none ends by itself

    async def run() -> None:
        calls = [opened(server.app, "POST", path, body, headers=ONE) for _ in range(6)]
        under_way = [await one.__aenter__() for one in calls]
        await server.until(lambda: server.engine.snapshot().counts.waiting > 0)
        if streamed:
            await server.until(lambda: any(one.begun.is_set() for one in under_way))
        drawn = server.engine.snapshot().tokens_out
        for one in under_way:
            one.leave()
        for opening in calls:
            await opening.__aexit__(None, None, None)
        await server.until(lambda: server.unused)
        assert server.engine.snapshot().tokens_out < drawn + 120
        assert not any(one.answer.data.endswith(b"[DONE]\n\n") for one in under_way)
        assert server.state.life.active == 0

    server.run(run())
    assert cancelled(server) == before + 6 * (1 if path == CHAT else 2)
    ended = server.call("POST", path, body | {"max_tokens": 2}, headers=ONE)
    assert ended.status == 200
    assert cancelled(server) == before + 6 * (1 if path == CHAT else 2)


def test_keys_share_no_prefixes(server: Server) -> None:
    body = {"prompt": list(range(100, 150)), "max_tokens": 1}

    def found(headers: dict[str, str]) -> int:
        usage = server.call("POST", "/v1/completions", body, headers=headers).json["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [found(ONE), found(ONE), found(TWO), found(TWO)] == [0, 48, 0, 48]


def test_silent_streams_are_kept_alive(model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment, which clients pass over, as long as there is no event."""
    with Server(*model, runner, limits=Limits(keep_alive_s=0.02)) as server:
        slow_steps(server, monkeypatch, 0.1)
        answer = server.chat(stream=True, max_tokens=3)
        assert answer.data.count(b": keep-alive\n\n") >= 3
        assert answer.data.startswith(b": ")
        assert len(answer.events) >= 3


def test_streams_tell_how_far_their_prompts_are(
    model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt that takes several steps, by comments, until there is something to say."""
    with Server(*model, runner, limits=Limits(keep_alive_s=0.02)) as server:
        server.chat(max_tokens=1)
        slow_steps(server, monkeypatch, 0.1)
        body = {"prompt": [[5] * 90, list(range(100, 190))], "max_tokens": 1, "stream": True}
        data = server.post("/v1/completions", **body).data.decode()
        told = [line for line in data.split("\n\n") if line.endswith(" of 180 tokens of the prompt")]
        numbers = [int(line.split()[1]) for line in told]
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > 2
        assert all(0 <= number < 180 for number in numbers)


def test_a_device_that_hangs(model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readiness says so as long as it lasts."""
    with Server(*model, runner, limits=Limits(step_s=0.05)) as server:
        step, go = server.engine._jobs.step, threading.Event()  # type: ignore[union-attr]

        def hanging() -> Any:
            go.wait(60)
            return step()

        monkeypatch.setattr(server.engine._jobs, "step", hanging)

        async def run() -> None:
            async with opened(server.app, "POST", CHAT, MESSAGES | {"max_tokens": 2}) as asked:
                await server.until(lambda: readiness(server.state).status == "stalled")
                assert (await call(server.app, "GET", "/health/ready")).status == 503
                go.set()
                await asyncio.wait_for(asyncio.shield(asked.task), 60)
                assert asked.answer.status == 200

        server.run(run())
        assert readiness(server.state) == StatusAnswer("ready")


def test_overload(model: Any, runner: asyncio.Runner) -> None:
    """Who finds no room is told at once, streaming or not; the others get their answers."""
    with Server(*model, runner, waiting=2) as server:

        async def run() -> list[Any]:
            bodies = [MESSAGES | LONG | {"max_tokens": 20, "stream": i % 2 == 0} for i in range(30)]
            return await asyncio.gather(*(call(server.app, "POST", CHAT, body) for body in bodies))

        answers = server.run(run())
        turned_away = [answer for answer in answers if answer.status == 429]
        assert {answer.status for answer in answers} == {200, 429}
        assert 2 <= len(answers) - len(turned_away) < 30
        assert {answer.json["error"]["type"] for answer in turned_away} == {"rate_limit_error"}
        assert {answer.headers["retry-after"] for answer in turned_away} == {"1"}
        server.run(server.until(lambda: server.unused))


def test_an_engine_that_fails(model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that have begun end in an event, others get 503; the server says so until the engine is back, or why it
    never will be."""
    with Server(*model, runner, restarts=Restarts(1)) as server:
        engine = server.engine

        async def run(last: bool) -> Any:
            body = MESSAGES | LONG
            async with (
                opened(server.app, "POST", CHAT, body | {"stream": True}) as streamed,
                opened(server.app, "POST", CHAT, body) as whole,
            ):
                await asyncio.wait_for(streamed.begun.wait(), 30)

                def fail(*_: Any) -> Any:
                    raise RuntimeError("the device is lost")

                monkeypatch.setattr(engine._jobs, "step", fail)
                if last:
                    monkeypatch.setattr(engine, "_made", fail)
                await asyncio.wait_for(asyncio.gather(streamed.task, whole.task), 60)
            return streamed.answer, whole.answer

        for last in (False, True):
            streamed, whole = server.run(run(last))
            *chunks, error = streamed.events
            assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
            assert error["error"]["type"] == "overloaded_error"
            assert (streamed.status, whole.status) == (200, 503)
            assert "the device is lost" in whole.json["error"]["message"]
            if not last:
                server.run(server.until(lambda: readiness(server.state) == StatusAnswer("ready")))
                assert server.chat(max_tokens=2).status == 200
        server.run(server.until(lambda: readiness(server.state).status == "failed"))
        assert "the device is lost" in str(readiness(server.state).reason)
        assert server.call("GET", "/health/ready").status == 503
        assert server.chat().status == 503
        assert server.call("GET", "/health/live").status == 200


def test_an_engine_is_made_anew_with_pauses(
    model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts that fail are repeated; meanwhile readiness has the reason, and who asks is told at once."""
    with Server(*model, runner, restarts=Restarts(3, pause_s=0.5)) as server:
        engine = server.engine
        made, begun = engine._made, list[float]()

        def fail(*_: Any) -> Any:
            raise RuntimeError("the device is lost")

        def attempt() -> Any:
            begun.append(time.monotonic())
            return fail() if len(begun) < 3 else made()

        monkeypatch.setattr(engine._jobs, "step", fail)
        monkeypatch.setattr(engine, "_made", attempt)
        assert server.chat(max_tokens=2).status == 503
        server.run(server.until(lambda: len(begun) == 2))
        server.run(server.until(lambda: "attempt 3 of 3" in str(readiness(server.state).reason)))
        answer = server.call("GET", "/health/ready")
        assert (answer.status, answer.json["status"]) == (503, "restarting")
        assert "the device is lost" in answer.json["reason"]
        turned_away = server.chat(max_tokens=2)
        assert (turned_away.status, turned_away.headers["retry-after"]) == (503, "1")
        assert len(begun) == 2
        metrics = server.call("GET", "/metrics").data.decode()
        assert 'llama_jax_engine_up{model_name="tiny"} 0.0' in metrics
        server.run(server.until(lambda: readiness(server.state) == StatusAnswer("ready")))
        assert server.chat(max_tokens=2).status == 200
        pauses = [after - before for before, after in itertools.pairwise(begun)]
        assert (pauses[0] >= 0.5, pauses[1] >= 1.0) == (True, True)
        assert 'llama_jax_engine_restarts_total{model_name="tiny"} 3.0' in server.call("GET", "/metrics").data.decode()


def test_a_server_that_restarts_ends_at_once(
    model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is lost")

    with Server(*model, runner, restarts=Restarts(3, pause_s=60.0)) as server:
        monkeypatch.setattr(server.engine._jobs, "step", fail)
        monkeypatch.setattr(server.engine, "_made", fail)
        assert server.chat(max_tokens=2).status == 503
        server.run(server.until(lambda: "attempt 2 of 3" in str(readiness(server.state).reason)))
        turned_away = server.chat(max_tokens=2)
        assert turned_away.status == 503
        assert 50 < int(turned_away.headers["retry-after"]) <= 60
        began = time.monotonic()
    assert time.monotonic() - began < 5


def test_no_next_token(model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are no numbers end their own request: an error, and never an answer that looks whole."""
    loaded, tokenizer = model
    embed = loaded.params["embed"]["weight"].at[39].set(jnp.nan)
    broken = dataclasses.replace(loaded, params={**loaded.params, "embed": {"weight": embed}})
    with Server(broken, tokenizer, runner) as server:
        slow_steps(server, monkeypatch, 0.05)  # so that the first token is read before the second fails
        bad, biased = {"prompt": [5, 39]}, {"prompt": [5, 6], "logit_bias": {"39": 100}, "stream": True}
        whole = server.post("/v1/completions", **bad)
        assert (whole.status, whole.json["error"]["type"]) == (500, "server_error")
        assert "no next token" in whole.json["error"]["message"]
        assert server.post("/v1/completions", **bad, stream=True).json == whole.json
        first, *_, error = server.post("/v1/completions", **biased).events
        assert first["choices"][0]["finish_reason"] is None
        assert error == whole.json
        assert server.post("/v1/completions", prompt=[5, 6], max_tokens=1).status == 200  # it may draw token 39
        assert cancelled(server) == 0  # no client has left


def test_clients_that_leave_while_they_send(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> int:
        async with opened(server.app, "POST", CHAT, chunks=[b"{"], headers=ONE) as left:
            await asyncio.sleep(0)
        return left.answer.status

    assert server.run(run()) == 499
    assert caplog.text == ""


def test_a_fault_of_the_server_tells_nothing(server: Server, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fault(*_: Any, **__: Any) -> Any:
        raise ValueError("a secret prompt")

    monkeypatch.setattr(server.engine, "generate", fault)
    answer = server.call("POST", CHAT, MESSAGES, headers=ONE | {"x-request-id": "the-one"})
    assert answer.status == 500
    assert answer.json["error"]["type"] == "server_error"
    assert "secret" not in answer.data.decode() + caplog.text
    assert "the-one" in caplog.text
    assert "ValueError at test_server_faults" in caplog.text


def test_draining(model: Any, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests under way continue, new ones are refused, and readiness says so."""
    with Server(*model, runner) as server:
        slow_steps(server, monkeypatch, 0.01)

        async def run() -> Any:
            async with opened(server.app, "POST", CHAT, MESSAGES | LONG | {"stream": True}) as streamed:
                await asyncio.wait_for(streamed.begun.wait(), 30)
                server.state.life.draining = True
                new = await call(server.app, "POST", CHAT, MESSAGES)
                ready = await call(server.app, "GET", "/health/ready")
                assert server.state.life.active == 1
                await asyncio.wait_for(streamed.task, 60)
            return streamed.answer, new, ready

        streamed, new, ready = server.run(run())
        assert streamed.events[-1]["choices"][0]["finish_reason"] == "length"
        assert (new.status, new.json["error"]["code"], new.headers["retry-after"]) == (503, "draining", "1")
        assert (ready.status, ready.json["status"]) == (503, "draining")
        assert server.state.life.active == 0
