"""Servers from the client's side: what they answer, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from llama_jax.cli import cli
from llama_jax.cli.chat_conversation import Conversation
from llama_jax.cli.chat_partner import Prompt, There, _fields
from llama_jax.cli.chat_screen import Screen
from llama_jax.cli.chat_session import Session
from llama_jax.errors import EngineFailed, LlamaJaxError, NetworkError, Overloaded, RequestError
from llama_jax.measure.caller import Caller
from llama_jax.remote import Remote
from llama_jax.sampling import Grammar, SamplingParams

BODY = {"model": "m", "prompt": [1, 2]}


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The URL of a server that gives each connection the next of these answers, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(5)


def answer(body: str, status: str = "200 OK", kind: str = "application/json", length: int | None = None) -> bytes:
    size = len(body.encode()) if length is None else length
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {size}\r\nconnection: close\r\n\r\n"
    return f"{head}{body}".encode()


def events(*found: Any, end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(each)}\n\n" for each in found) + end


CLIENTS = pytest.mark.parametrize("client", [Remote, lambda url: Caller(Remote(url))], ids=["remote", "caller"])


def asked(client: Any, url: str) -> list[dict[str, Any]]:
    async def ask() -> list[dict[str, Any]]:
        async with client(url) as remote:
            return [event async for event in remote.events("/v1/completions", BODY)]

    return asyncio.run(ask())


@CLIENTS
def test_events_in_order_with_comments_between(client: Any) -> None:
    text = ": still there\n\n" + events({"choices": [{"text": "a"}]}, {"usage": {"completion_tokens": 1}})
    with answering(answer(text, kind="text/event-stream")) as url:
        assert asked(client, f"{url}/v1/") == [{"choices": [{"text": "a"}]}, {"usage": {"completion_tokens": 1}}]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (answer('{"error": {"message": "no key"}}', "401 Unauthorized"), RequestError, "no key"),
        (answer('{"error": {"message": "later"}}', "429 Too Many Requests"), Overloaded, "429: later"),
        (answer('{"message": "no such field"}', "400 Bad Request"), RequestError, "no such field"),
        (answer("<html>a proxy</html>", "502 Bad Gateway"), EngineFailed, "a proxy"),
        (answer(events({"error": {"message": "NaN"}}), kind="text/event-stream"), EngineFailed, "NaN"),
        (answer("data: {\n\n", kind="text/event-stream"), NetworkError, "not JSON"),
        (answer("{}", kind="application/json"), NetworkError, "does not answer|before its end"),
        (answer(events(BODY, end=""), kind="text/event-stream"), NetworkError, "before its end"),
        (answer(events(BODY, end=""), kind="text/event-stream", length=999), NetworkError, "does not answer"),
        (b"", NetworkError, "does not answer"),
    ],
)
@CLIENTS
def test_what_goes_wrong(client: Any, given: bytes, error: type[LlamaJaxError], said: str) -> None:
    with answering(given) as url, pytest.raises(error, match=said) as caught:
        asked(client, url)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("url", "key", "param"),
    [
        *((url, None, "url") for url in ("localhost:8000", "http://", "http://[::1", "http://a:99999", "http://a:b")),
        *((url, None, "url") for url in ("http://a b", "http://" + "a" * 70 + ".org", "ftp://a")),
        *(("http://a", key, "api_key") for key in ("one two", "ü", "a\nb")),
    ],
)
def test_what_is_no_server(url: str, key: str | None, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        Remote(url, key)
    assert caught.value.param == param
    assert key is None or key not in str(caught.value)


@CLIENTS
@pytest.mark.parametrize("url", ["http://[::1]:9", "https://a.invalid/v1", "http://127.0.0.1:9/some/path"])
def test_what_is_a_server(client: Any, url: str) -> None:
    client(url)


def test_a_caller_uses_a_connection_again_unless_it_has_ended() -> None:
    """In chunks, and up to the connection's end."""
    head, text = b"HTTP/1.1 200 OK\r\n", events(BODY).encode()
    chunked = (
        head
        + b"transfer-encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (text[:9], text[9:]))
    )

    async def run() -> None:
        seen: list[int] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            number = max(seen, default=0) + 1
            with contextlib.suppress(asyncio.IncompleteReadError):
                while await reader.readuntil(b"}"):
                    seen.append(number)
                    if len(seen) == 3:
                        writer.write(head + b"\r\n" + text)
                        break
                    writer.write(chunked + b"0\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Caller(Remote(f"http://127.0.0.1:{port}")) as caller:
                for _ in range(4):
                    assert [event async for event in caller.events("/v1/completions", BODY)] == [BODY]
        assert seen == [1, 1, 1, 2]

    asyncio.run(run())


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    done = CliRunner().invoke(cli, ["bench", "serve", "--url", f"http://127.0.0.1:{port}", "--requests", "1"])
    assert done.exit_code == NetworkError.exit_code
    assert "does not answer" in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "localhost:8000"], "not a URL"),
        (["--url", "http://localhost:1", "--rows", "3"], "--rows is of a model in this process"),
        (["--url", "http://localhost:1", "--preset", "llama-3.2-1b"], "--preset is of a model in this process"),
        (["--vocab", "100"], "--vocab is of a server"),
    ],
)
def test_options_that_contradict_each_other(options: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "serve", *options])
    assert done.exit_code == 2
    assert said in done.output


MODELS = answer(json.dumps({"data": [{"id": "tiny", "max_model_len": 64}]}))
SAID = events(
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "Hel"}}]},
    {"choices": [{"delta": {"content": "lo"}, "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
)


def test_a_chat(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a server that counts tokens, and then of one that does not."""
    other = answer(json.dumps({"data": [{"id": "tiny"}, {"id": "other"}]}))
    answers = MODELS, answer('{"count": 7}'), answer(SAID, kind="text/event-stream"), answer("", "404 Not Found")
    answers = *answers, answer(SAID, kind="text/event-stream"), other
    with answering(*answers) as url, closing(There(Remote(url), None)) as there:
        sampling = SamplingParams(max_tokens=None, temperature=0.5, seed=4)
        session = Session(there, Screen(), conversation=Conversation(), sampling=sampling, origin="test")
        for text in ("Hi", "Again"):
            session.handle(text)
        session.handle("/model other")
    assert (there.name, there.context) == ("other", None)
    assert [m["content"] for m in session.conversation.all_messages] == ["Hi", "Hello", "Again", "Hello"]
    out, err = capsys.readouterr()
    assert out == "Hello\nHello\n"
    assert "3 tokens" in err
    assert "context 10 of 64" in err


def test_probabilities_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    """With the counts of its usage, and a token without text of its own."""
    top = [{"token": "Hel", "logprob": -0.5}, {"token": "By", "logprob": -1.0}]
    first, second = {"token": "Hel", "logprob": -0.5, "top_logprobs": top}, {"token": "lo", "logprob": -0.1}
    usage = {"prompt_tokens": 70, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}
    said = events(
        {"choices": [{"delta": {"content": ""}, "logprobs": {"content": [first]}}]},
        {"choices": [{"delta": {"content": "Hello"}, "logprobs": {"content": [second]}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    )
    with (
        answering(MODELS, answer("", "404 Not Found"), answer(said, kind="text/event-stream")) as url,
        closing(There(Remote(url), None)) as there,
    ):
        sampling = SamplingParams(max_tokens=None, logprobs=1)
        session = Session(there, Screen(), conversation=Conversation(), sampling=sampling, origin="test")
        session.handle("Hi")
        session.handle("/logprobs")
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["Hello"],
        ["60.7", "%", "###..", '"Hel"', '"By"', "36.8", "%"],
        ["90.5", "%", "#####", '"lo"'],
    ]
    assert "2 tokens" in err
    assert "prompt 70 tokens, 64 cached" in err


def test_thoughts_of_a_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A person sees them, under either name, and they are no part of the answer."""
    deltas = {"reasoning_content": "Hm"}, {"reasoning": "\x1bm"}, {"content": "Yes"}
    said = answer(events(*({"choices": [{"delta": delta}]} for delta in deltas)), kind="text/event-stream")
    with (
        answering(MODELS, answer("", "404 Not Found"), said, answer("", "404 Not Found"), said) as url,
        closing(There(Remote(url), None)) as there,
    ):
        sampling, screen = SamplingParams(max_tokens=None), Screen()
        session = Session(there, screen, conversation=Conversation(), sampling=sampling, origin="test")
        session.handle("Hi")
        assert capsys.readouterr().out == "Yes\n"
        assert session.conversation.messages[-1]["content"] == "Yes"
        monkeypatch.setattr(screen, "thought", lambda text: print(text, end=""))
        session.handle("Hi")
        assert capsys.readouterr().out == "Hm\x1bm\n\nYes\n"
    screen = Screen()
    screen.thought("Hm")
    screen.interactive = True
    screen.thought("\x1bm")
    assert capsys.readouterr().out.strip("\x1b[02m") == "␛"


def test_what_a_server_is_told() -> None:
    """No more than what differs from its defaults: it need not know the rest."""
    assert _fields(SamplingParams(max_tokens=None)) == {}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    found = _fields(SamplingParams(max_tokens=5, top_k=3, stop="x", response_format=wanted))
    assert found == {"max_tokens": 5, "top_k": 3, "stop": ("x",), "response_format": wanted}
    assert _fields(SamplingParams(max_tokens=None, logprobs=2)) == {"logprobs": True, "top_logprobs": 2}
    regex = Grammar.regex("a+")
    assert Grammar.of(regex.request) == regex


def test_ctrl_c_while_a_server_thinks() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with answering(MODELS, b"") as url, closing(There(Remote(url), None)) as there:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(KeyboardInterrupt):  # which is served first
            list(there.answer(Prompt([{"role": "user", "content": "Hi"}], None), SamplingParams(), stop))


def test_the_model_that_is_asked_for() -> None:
    models = answer(json.dumps({"data": [{"id": "tiny-chat"}, {"id": "other"}]}))
    with answering(models) as url:
        args = ["bench", "serve", "--url", url, "--served-model-name", "tiny-chet", "--requests", "1"]
        done = CliRunner().invoke(cli, args)
    assert done.exit_code == 3
    assert "did you mean tiny-chat" in done.output
