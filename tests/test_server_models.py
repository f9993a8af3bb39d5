"""Several models behind one server: who answers, what is loaded when, and what makes room for what."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jax
import pytest
from asgi_client import Answer, call, opened
from hypothesis import given
from hypothesis import strategies as st
from served_model import SETTINGS, tiny_model
from tiny_chat_model import write_chat_model

from llama_jax.cli.options import LoadOptions
from llama_jax.cli.progress import Reporter
from llama_jax.cli.serve_models import FromName, named_models
from llama_jax.errors import CheckpointError, DoesNotFit, ModelNotFound, RequestError
from llama_jax.generation.engine import Engine
from llama_jax.generation.restarts import Restarts
from llama_jax.server.app import application
from llama_jax.server.budget import Footprint, reserve
from llama_jax.server.metrics import Metrics
from llama_jax.server.models import Models
from llama_jax.server.settings import Limits, ServerSettings
from llama_jax.server.slots import Slot
from llama_jax.server.state import ServerState
from llama_jax.server.status import readiness

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
LONG: dict[str, Any] = HI | {"max_tokens": 100, "ignore_eos": True}
CHAT = "/v1/chat/completions"


class Tiny:
    """A source of a tiny model that takes `need` bytes of a device that is only thought of."""

    def __init__(self, model: Any, need: int):
        self.model, self.need, self.step = model, need, 0
        self.fetching: Exception | None = None
        self.opening: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.opened: list[int] = []
        self.engine: weakref.ref[Engine] | None = None

    def outline(self) -> Footprint:
        return Footprint(self.need + self.step, 77, self.step)

    def fetch(self) -> None:
        if self.fetching:
            raise self.fetching

    def open(self, kept: int, progress: Callable[[str], None]) -> Any:
        progress("loading, 50% of the weights are there")
        assert self.go.wait(60)
        if self.opening:
            raise self.opening
        self.opened.append(kept)
        engine = Engine(*self.model, settings=SETTINGS, ahead=False)
        self.engine = weakref.ref(engine)
        return engine, self.model[1]

    @property
    def there(self) -> bool:
        """Whether anything is left of its engine."""
        return self.engine is not None and self.engine() is not None


class Several:
    """A server of the models a, b, ... on a device of `total` bytes, of which each takes its need."""

    def __init__(self, runner: asyncio.Runner, model: Any, total: int, *needs: int, **limits: Any):
        self._runner = runner
        self.sources = {chr(ord("a") + i): Tiny(model, need) for i, need in enumerate(needs)}
        self.slots = [Slot((name, f"{name}-too"), source) for name, source in self.sources.items()]

        def free() -> int:
            return total - sum(source.need for source in self.sources.values() if source.there)

        settings, metrics = ServerSettings(limits=Limits(**limits)), Metrics()
        self.models = Models(self.slots, settings, metrics, free=free, settle=lambda: self.settled.append(self.loaded))
        self.settled: list[str] = []
        self.state = ServerState(settings, self.models, metrics)
        self.app = application(self.state)

    def __enter__(self) -> Several:
        self.run(self.models.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        for source in self.sources.values():
            source.go.set()
        self.run(self.models.__aexit__())

    def run(self, coroutine: Any) -> Any:
        return self._runner.run(coroutine)

    async def ask(self, name: str, **body: Any) -> Answer:
        return await call(self.app, "POST", CHAT, HI | body | {"model": name})

    def chat(self, name: str, **body: Any) -> Answer:
        return self.run(self.ask(name, **body))

    def get(self, path: str) -> Any:
        return self.run(call(self.app, "GET", path)).json

    @property
    def loaded(self) -> str:
        return "".join(slot.names[0] for slot in self.slots if slot.status == "loaded")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


def test_each_request_goes_to_its_model(runner: asyncio.Runner, model: Any) -> None:
    """The first is loaded from the start, and answers who names none; others come when they are asked for, once."""
    with Several(runner, model, 100, 10, 20, 30) as server:
        assert server.loaded == "a"
        listed = {one["id"]: one for one in server.get("/v1/models")["data"]}
        assert list(listed) == ["a", "a-too", "b", "b-too", "c", "c-too"]
        assert [listed[name]["status"] for name in ("a", "b")] == [{"value": "loaded"}, {"value": "unloaded"}]
        assert [listed[name]["max_model_len"] for name in ("a", "b")] == [128, 77]
        answers = server.run(_together(server.ask("b"), server.ask("b-too", stream=True), server.ask("a")))
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert answers[0].json["model"] == answers[1].events[0]["model"] == "b"
        assert len(server.sources["b"].opened) == 1
        assert server.loaded == "ab"
        unnamed = server.run(call(server.app, "POST", CHAT, HI))
        assert (unnamed.status, unnamed.json["model"]) == (200, "a")
        for path, body in (("/v1/messages", {}), ("/v1/responses", {"input": "Hi"}), ("/tokenize", {"prompt": "Hi"})):
            whole = ({k: v for k, v in HI.items() if path == "/v1/messages"} | body) | {"model": "c"}
            assert server.run(call(server.app, "POST", path, whole)).status == 200, path
        assert server.get("/tokenizer_info?model=c")["model_max_length"] == 128
        assert server.get("/tokenizer_info?model=d")["error"]["code"] == "model_not_found"
        metrics = server.run(call(server.app, "GET", "/metrics")).data.decode()
        assert 'llama_jax_request_success_total{finished_reason="length",model_name="b"} 2.0' in metrics
        assert 'llama_jax_http_requests_total{model_name="b",route="/v1/chat/completions",status="200"} 2.0' in metrics
        assert metrics.count("# TYPE llama_jax_requests_running gauge") == 1
        assert 'llama_jax_model_loads_total{model_name="c",outcome="loaded"} 1.0' in metrics
        engines = server.get("/engines")["engines"]
        assert [engine["model"] for engine in engines] == ["a", "b", "c"]
        assert engines[1]["snapshot"]["tokens_out"] == 4


async def _together(*coroutines: Any) -> list[Any]:
    return await asyncio.gather(*coroutines)


def test_unknown_names(runner: asyncio.Runner, model: Any) -> None:
    with Several(runner, model, 100, 10, 10) as server:
        for stream in (False, True):
            answer = server.chat("a-to", stream=stream)
            assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
            assert "did you mean a-too" in answer.json["error"]["message"]
        assert "'a', 'a-too', 'b', 'b-too'" in server.chat("x" * 900).json["error"]["message"]
        assert server.run(call(server.app, "GET", "/v1/models/none")).status == 404
        assert server.get("/v1/models/b")["status"]["value"] == "unloaded"


def test_the_idle_one_that_was_used_longest_ago_makes_room(runner: asyncio.Runner, model: Any) -> None:
    """Nothing of it is left, and it comes back when it is asked for."""
    with Several(runner, model, 50, 20, 20, 20) as server:
        assert server.chat("b").status == 200
        assert server.chat("a").status == 200
        assert server.chat("c").status == 200  # b was used before a
        assert server.loaded == "ac"
        assert server.settled == ["a", "ab", "a", "ac"]
        assert not server.sources["b"].there
        metrics = server.run(call(server.app, "GET", "/metrics")).data.decode()
        assert 'llama_jax_engine_up{model_name="c"} 1.0' in metrics
        assert 'llama_jax_engine_up{model_name="b"}' not in metrics
        assert server.chat("b").status == 200
        assert server.loaded == "bc"
        assert readiness(server.state).status == "ready"


def test_steps_of_loaded_models_keep_their_room(runner: asyncio.Runner, model: Any) -> None:
    """Between them it is free; who is loaded then must not take it, nor what a third needs."""
    server = Several(runner, model, 100, 10, 10, 40)
    for source in server.sources.values():
        source.step = 15
    with server:
        assert server.chat("b").status == 200
        assert server.sources["b"].opened == [15 + reserve(100 - 10 - 15, 25, [55])]
        assert server.loaded == "ab"
        assert server.chat("c").status == 200  # 80 are free, 30 of them only between steps
        assert server.loaded == "bc"


def test_a_model_in_use_is_not_unloaded(runner: asyncio.Runner, model: Any) -> None:
    """Who finds no room is told to come back; what is under way goes on, and what is idle stays if it would not do."""
    with Several(runner, model, 50, 20, 10, 40) as server:
        assert server.chat("b").status == 200

        async def run() -> tuple[Answer, Answer]:
            body = LONG | {"model": "a", "stream": True}
            async with opened(server.app, "POST", CHAT, body) as streamed:
                await asyncio.wait_for(streamed.begun.wait(), 30)
                refused = await server.ask("c")
                await asyncio.wait_for(streamed.task, 60)
            return streamed.answer, refused

        streamed, refused = server.run(run())
        assert streamed.events[-1]["choices"][0]["finish_reason"] == "length"
        assert (refused.status, refused.json["error"]["code"]) == (503, "no_room")
        assert refused.headers["retry-after"] == "1"
        assert server.loaded == "ab"
        assert server.chat("c").status == 200
        assert server.loaded == "c"


def test_a_model_that_never_fits_unloads_nothing(runner: asyncio.Runner, model: Any) -> None:
    with Several(runner, model, 50, 20, 20, 60) as server:
        assert server.chat("b").status == 200
        answer = server.chat("c")
        assert (answer.status, answer.json["error"]["code"]) == (503, "DoesNotFit")
        assert server.loaded == "ab"


@pytest.mark.parametrize("stage", ["fetching", "opening"])
def test_a_model_that_cannot_be_loaded(
    runner: asyncio.Runner, model: Any, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests fail, with no word of this machine's files; others do not, and it is not tried at every request."""
    with Several(runner, model, 50, 20, 20) as server:
        bad = server.sources["b"]
        setattr(bad, stage, CheckpointError("/secret/model.safetensors is damaged"))
        server.slots[1].attempts = Restarts(2, pause_s=60)
        answers = server.run(_together(server.ask("b"), server.ask("b", stream=True), server.ask("a")))
        assert [answer.status for answer in answers] == [503, 503, 200]
        error = answers[0].json["error"]
        assert (error["code"], error["type"]) == ("CheckpointError", "overloaded_error")
        assert "secret" not in error["message"]
        assert "/secret/model.safetensors is damaged" in caplog.text
        assert server.chat("b").status == 503  # the second attempt, at once
        setattr(bad, stage, None)
        later = server.chat("b")  # no third one
        assert (later.status, int(later.headers["retry-after"]) > 50) == (503, True)
        assert server.get("/v1/models/b")["status"] == {"value": "failed", "reason": "CheckpointError"}
        assert readiness(server.state).status == "ready"
        server.slots[1].retry = 0.0
        assert server.chat("b").status == 200


def test_a_client_is_not_told_to_come_too_early() -> None:
    slot = Slot(("a",), None, failure="StorageError")
    assert [slot.refused(pause).headers["retry-after"] for pause in (0.1, 2.0, 2.3)] == ["1", "2", "3"]


def test_a_plan_that_was_too_small(runner: asyncio.Runner, model: Any) -> None:
    """Idle models are also unloaded for a model that turns out not to fit while it loads."""
    with Several(runner, model, 50, 20, 20) as server:
        opening = server.sources["b"].open

        def tight(kept: int, progress: Any) -> Any:
            if server.sources["a"].there:
                raise DoesNotFit("a sequence takes 9 pages; there is memory for 3")
            return opening(kept, progress)

        server.sources["b"].open = tight  # type: ignore[method-assign]
        assert server.chat("b").status == 200
        assert server.loaded == "b"


@pytest.mark.parametrize("stage", ["opening", "starting"])
def test_nothing_is_left_of_an_engine_that_did_not_fit(runner: asyncio.Runner, model: Any, stage: str) -> None:
    """When the room for the next attempt is measured, and when that begins."""
    with Several(runner, model, 70, 20, 20, 20) as server:
        source = server.sources["b"]
        opening, left = source.open, list[bool]()

        async def fails() -> Any:
            raise DoesNotFit("a step takes more than is there")

        def tight(kept: int, progress: Any) -> Any:
            left.append(source.there)
            engine, tokenizer = opening(kept, progress)
            if len(left) == 1 and stage == "opening":
                raise DoesNotFit("a sequence takes 9 pages; there is memory for 3")
            if len(left) == 1:
                engine.__aenter__ = fails
            return engine, tokenizer

        source.open = tight  # type: ignore[method-assign]
        assert server.chat("b").status == 200
        assert (server.loaded, left) == ("b", [False, False])
        assert source.opened[-1] == reserve(70, 20, [20, 20])


def test_streams_tell_how_far_loading_is(runner: asyncio.Runner, model: Any) -> None:
    """By comments, which clients pass over; a client that leaves does not stop it for the others."""
    with Several(runner, model, 50, 20, 20, keep_alive_s=0.02) as server:
        source = server.sources["b"]
        source.go.clear()

        async def run() -> Answer:
            body = HI | {"model": "b", "stream": True}
            async with opened(server.app, "POST", CHAT, body) as stays:
                async with opened(server.app, "POST", CHAT, body) as leaves:
                    await asyncio.wait_for(leaves.begun.wait(), 30)
                await asyncio.wait_for(stays.begun.wait(), 30)
                status = (await call(server.app, "GET", "/v1/models/b")).json["status"]
                assert status == {"value": "loading", "reason": "loading, 50% of the weights are there"}
                assert (await server.ask("a")).status == 200
                source.go.set()
                await asyncio.wait_for(stays.task, 60)
            return stays.answer

        answer = server.run(run())
        assert answer.data.startswith(b": loading, 50% of the weights are there\n\n")
        assert answer.events[-1]["choices"][0]["finish_reason"] == "length"
        assert len(source.opened) == 1


def test_an_end_while_a_model_is_loaded(runner: asyncio.Runner, model: Any) -> None:
    """Who waits for it is told; the thread that loads cannot be stopped, which the process has to know."""
    with Several(runner, model, 50, 20, 20) as server:
        source = server.sources["b"]
        source.go.clear()

        async def run() -> Answer:
            async with opened(server.app, "POST", CHAT, HI | {"model": "b"}) as waiting:
                while not server.models.busy:
                    await asyncio.sleep(0.01)
                await server.models.__aexit__()
                await asyncio.wait_for(waiting.task, 30)
                assert server.models.busy
                source.go.set()
            while server.models.busy:
                await asyncio.sleep(0.01)
            return waiting.answer

        answer = server.run(run())
        assert (answer.status, answer.json["error"]["code"]) == (503, "EngineFailed")


def test_a_first_model_that_cannot_be_loaded_is_an_error_of_the_server(runner: asyncio.Runner, model: Any) -> None:
    server = Several(runner, model, 50, 60, 20)
    with pytest.raises(DoesNotFit, match="a takes 60 B"), server:
        pass


def test_one_engine_that_has_failed(runner: asyncio.Runner, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is ready as long as another model answers."""
    with Several(runner, model, 50, 20, 20) as server:
        assert server.chat("b").status == 200
        engine = server.models.loaded[0].engine
        engine.restarts.attempts = 0

        def fail() -> Any:
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(engine._jobs, "step", fail)
        assert server.chat("a").status == 503
        assert server.chat("b").status == 200
        assert readiness(server.state).status == "ready"
        assert server.get("/v1/models/a")["status"]["value"] == "failed"


def test_two_models_of_one_name(model: Any) -> None:
    slots = [Slot((name,), Tiny(model, 1)) for name in ("a", "b", "a")]
    with pytest.raises(RequestError, match="two models are called 'a'"):
        Models(slots, ServerSettings(), Metrics(), free=lambda: None)


@given(free=st.integers(0, 100), need=st.integers(0, 100), others=st.lists(st.integers(0, 60), max_size=4))
def test_what_is_kept_for_other_models(free: int, need: int, others: list[int]) -> None:
    """Loaded one after the other, those that fit beside the first all fit, and the rest is shared evenly."""
    fits, left = [], free - need
    for other in others:
        if other <= left:
            fits.append(other)
            left -= other
    kept = reserve(free, need, others)
    assert sum(fits) <= kept or left < 0
    taken = [free - kept - need]
    rest = kept
    for i, other in enumerate(fits):
        again = reserve(rest, other, fits[i + 1 :])
        taken.append(rest - again - other)
        rest = again
    if left >= 0:
        assert rest == 0
        assert max(taken) - min(taken) <= 1


# --- The command line


def test_models_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "x=y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    path = str(tmp_path / "one")

    def made(argument: str | None = None, *options: str, names: Any = (), parsers: Any = ()) -> Any:
        return [(m.model, m.names, m.tool_parser) for m in named_models(argument, options, names, parsers)]

    assert made() == [("smollm2-135m-instruct", ("smollm2-135m-instruct",), "")]
    assert made(path, names=("n", "m"), parsers=("hermes",)) == [(path, ("n", "m"), "hermes")]
    assert made(None, path) == [(path, ("one",), "")]
    assert made("org/name", f"b={path}", "x=y", parsers=("b=hermes", "llama_json")) == [
        ("org/name", ("org/name",), "llama_json"),
        (path, ("b",), "hermes"),
        ("x=y", ("x=y",), "llama_json"),
    ]
    for arguments, named in [
        ((None, "=x"), {}),
        (("a/b", "one"), {"names": ("n",)}),
        ((None, "one"), {"parsers": ("q=hermes",)}),
    ]:
        with pytest.raises(click.UsageError):
            made(*arguments, **named)
    with pytest.raises(ModelNotFound, match="no model 'twoo'"):
        made("one", "twoo")
    with pytest.raises(RequestError, match="no tool parser"):
        made("one", parsers=("hermess",))


def test_what_a_named_model_takes(tmp_path: Path) -> None:
    """At least its weights and cache, to the byte on a CPU; None for one that is not here."""
    folder = write_chat_model(tmp_path / "tiny", context=256)
    loading = LoadOptions("float32", None, None, None, False, None, None, {})
    sizes = {"rows": 2, "context": 128, "pages": None, "page_size": 64}
    source = FromName(str(folder), loading, Reporter(quiet=True), sizes, {})
    outline = source.outline()
    assert outline is not None
    engine, _ = source.open(0, lambda _: None)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.model.params))
    pages = engine.settings.pages
    config = engine.model.config
    cache = 2 * config.num_layers * pages * 64 * config.num_kv_heads * config.head_dim * 4
    assert outline.context == 128
    assert weights + cache <= outline.nbytes <= 2 * weights + cache
    elsewhere = FromName("org/name", loading, Reporter(quiet=True), sizes, {})
    assert elsewhere.outline() is None


@pytest.mark.parametrize(("asked", "early"), [(None, True), (True, True), (False, False)])
def test_a_model_answers_early_on_a_cpu_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool | None, early: bool
) -> None:
    made = list[dict[str, Any]]()
    monkeypatch.setattr("llama_jax.generation.engine.Engine", lambda *_, **options: made.append(options))
    loading = LoadOptions("float32", None, None, None, False, None, None, {})
    sizes = {"rows": 2, "context": 128, "pages": None, "page_size": 64}
    folder = str(write_chat_model(tmp_path / "tiny", context=256))
    FromName(folder, loading, Reporter(quiet=True), sizes, {}, asked).open(0, lambda _: None)
    assert [options["early"] for options in made] == [early]
