"""The engine draws what every request would draw alone, whatever else runs, arrives or is cancelled beside it."""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import threading
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import (
    Guesses,
    alone,
    golden_model,
    logprobs,
    run,
    small_settings,
    some_requests,
    tiny_model,
    tokens,
)
from helpers import GOLDEN_CASES, on_eight_devices

from llama_jax.config import preset
from llama_jax.engine import compiled, programs
from llama_jax.engine.core import Core
from llama_jax.engine.program_set import program_set
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import settings_for
from llama_jax.engine.state import paged
from llama_jax.errors import DoesNotFit, Overloaded, RequestError
from llama_jax.model.adapters import NO_ADAPTERS
from llama_jax.model.head import unembed
from llama_jax.model.loaded import Model
from llama_jax.sampling import MAX_LOGPROBS, SamplingParams, token_logprobs


def check(model: Model, core: Core, count: int, arrivals: list[int] | None = None, seed: int = 0) -> None:
    """Runs requests through the engine, each of which must get what it gets alone."""
    asked = some_requests(model, count, seed)
    answers = [alone(model, request) for request in asked]
    Guesses.known = [(prompt, answer.tokens) for (prompt, _), answer in zip(asked, answers, strict=True)]
    for request, expected, news in zip(asked, answers, run(core, asked, arrivals=arrivals), strict=True):
        assert tokens(news) == expected.tokens
        assert news[-1].ending == expected.ending
        if request[1].logprobs is None:
            continue
        np.testing.assert_allclose(logprobs(news), expected.logprobs, atol=2e-4)


def nothing_is_held(core: Core) -> None:
    counts = core.snapshot().counts
    assert (counts.running, counts.waiting, counts.pages_used, counts.pages_fenced) == (0, 0, 0, 0)
    assert counts.pages_free + counts.pages_cached == core.settings.pages


# The sample has dynamic rope, experts beside layers without rope, and biases with windows.
@pytest.mark.sampled(8)
@pytest.mark.slow
@pytest.mark.parametrize("case", [*GOLDEN_CASES[7:], *GOLDEN_CASES[:7]])
def test_every_family_draws_what_it_draws_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prefixes in common, prompts in pieces, too few pages for all, arrivals at any time, and drafts."""
    Guesses.instead(monkeypatch)
    model = golden_model(case)
    core = Core(model, small_settings(pages=12, drafts=3, draft_rows=2))
    check(model, core, 9, arrivals=[0, 0, 0, 2, 5, 5, 9, 30, 31])
    check(model, core, 2, seed=1)  # calm enough for drafts
    nothing_is_held(core)
    snapshot = core.snapshot()
    assert 0 < snapshot.accepted_tokens < snapshot.drafted_tokens


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"prefix_cache": False}, marks=pytest.mark.slow),
        pytest.param({"few_tokens": (8, 24), "few_rows": 2, "greedy": True}, marks=pytest.mark.slow),
        pytest.param({"steps": 4}, marks=pytest.mark.slow),
        pytest.param({"chunk_rows": 1, "mixed_tokens": (64,)}, marks=pytest.mark.slow),
        pytest.param({"rows": 1, "decode_rows": (1,), "chunk_rows": 1}, marks=pytest.mark.slow),
        pytest.param({"page_size": 64, "pages": 6}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sizes_change_nothing(changes: dict[str, Any]) -> None:
    model = tiny_model()
    core = Core(model, small_settings(**changes))
    check(model, core, 14)
    counts = core.snapshot().counts
    assert (counts.prefix_hit_tokens > 0) == (changes.get("prefix_cache", True) and changes.get("page_size", 16) == 16)
    nothing_is_held(core)
    check(model, core, 14)  # with the cache warm
    nothing_is_held(core)


@pytest.mark.slow
def test_preempted_rows_go_on_as_if_nothing_had_been() -> None:
    """Three rows that need nine pages, of which there are six; penalties know of tokens drawn before, and a mask ends
    with its request."""
    model = tiny_model()
    core = Core(model, small_settings(pages=6))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "presence_penalty": 0.7, "repetition_penalty": 1.2},
        {"temperature": 0.8, "logprobs": 2},
        {"temperature": 1.0, "allowed_token_ids": [3, 9, 11, 30]},
    ]
    asked = [
        ([3 + i, 4, 5 + i], SamplingParams(seed=i, max_tokens=40, ignore_eos=True, **kinds[i % 4])) for i in range(8)
    ]
    for request, news in zip(asked, run(core, asked), strict=True):
        assert tokens(news) == alone(model, request).tokens
    assert core.snapshot().counts.preemptions > 0
    nothing_is_held(core)


def test_nothing_is_compiled_after_ready() -> None:
    """Pages come last: compilers want memory, too. Of several sizes of a program any draws what each gets alone."""
    model = tiny_model()
    core = Core(model, small_settings(decode_rows=(1, 3), mixed_tokens=(8, 24)))  # sizes that no other test has
    news = core.compile_all()
    for _ in core.programs.keys:
        next(news)
        assert core._begun is None
    assert not list(news)
    assert core._begun is not None
    heard: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        heard.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        asked = some_requests(model, 12)
        asked.append((asked[0][0], SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2)))
        found = run(core, asked, arrivals=list(range(13)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [tokens(news) for news in found] == [alone(model, request).tokens for request in asked]
    assert not [name for name in heard if "backend_compile" in name]
    assert core.snapshot().late_compilations == 0


def test_an_engine_that_is_ready_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered by the largest programs until the others are there, and who needs one of those waits."""
    later: list[Future[Any]] = []

    class Behind:
        """A thread that has other things to do."""

        def submit(self, function: Any, *args: Any) -> Future[Any]:
            later.append(Future())
            later[-1].add_done_callback(lambda future: future.cancelled() or function(*args))
            return later[-1]

    monkeypatch.setattr(compiled, "_in_background", Behind)
    model = tiny_model()
    core = Core(model, small_settings(decode_rows=(1, 3), mixed_tokens=(7, 24)))  # sizes that no other test has
    told = [str(news.key) for news in core.compile_all(early=True)]
    assert sorted(told) == ["decode of 3 rows", "mark", "mixed of 24 tokens"]
    assert core.snapshot().ready_s is not None

    asked = some_requests(model, 6)
    expected = [alone(model, request).tokens for request in asked]
    assert [tokens(news) for news in run(core, asked, arrivals=list(range(6)))] == expected
    snapshot = core.snapshot()
    assert (snapshot.programs, snapshot.programs_behind, snapshot.late_compilations) == (3, 3, 0)

    scored = asked[0][0], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    (news,) = run(core, [scored])
    assert news[-1].prompt_logprobs is not None
    np.testing.assert_allclose(news[-1].prompt_logprobs.token, alone(model, scored).prompt_logprobs, atol=2e-4)
    assert core.snapshot().programs_behind == 2

    for future in later:
        if not future.cancelled():
            future.set_result(None)
    assert [core.programs.choose(name, 1, greedy=False).size for name in ("decode", "mixed")] == [1, 7]
    assert [tokens(news) for news in run(core, asked, arrivals=list(range(6)))] == expected
    snapshot = core.snapshot()
    assert (snapshot.programs, snapshot.programs_behind, snapshot.late_compilations) == (6, 0, 0)


def test_a_program_that_cannot_be_compiled_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are answered by larger ones."""

    class AtOnce:
        def submit(self, function: Any, *args: Any) -> Future[Any]:
            made: Future[Any] = Future()
            try:
                made.set_result(function(*args))
            except RuntimeError as error:
                made.set_exception(error)
            return made

    monkeypatch.setattr(compiled, "_in_background", AtOnce)
    model = tiny_model()
    core = Core(model, small_settings(decode_rows=(1, 3), mixed_tokens=(11, 24)))  # sizes that no other test has
    real = core.programs._compile

    def failing(key: Any) -> bool:
        if key.size == 11:
            raise RuntimeError("out of memory")
        return real(key)

    monkeypatch.setattr(core.programs, "_compile", failing)
    with pytest.warns(RuntimeWarning, match="'mixed of 11 tokens' cannot be compiled.*out of memory"):
        list(core.compile_all(early=True))
    assert core.programs.choose("mixed", 1, greedy=False).size == 24
    check(model, core, 4)


def test_programs_are_counted_while_the_engine_takes_them() -> None:
    """By other threads: metrics, and a server that ends."""
    programs = Core(tiny_model(), small_settings()).programs

    class Taken(Future[bool]):
        def done(self) -> bool:
            programs._coming.pop(key, None)
            return super().done()

    for key in programs.keys[:3]:
        programs._coming[key] = Taken()
    programs._ready = True
    assert programs.behind == 3


def test_a_block_of_scored_tokens_is_as_large_as_can_be() -> None:
    """Each block reads the whole head: 257 tokens are three blocks, and not one for each token."""
    model = tiny_model()
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((257, model.config.hidden_size)), jnp.float32)
    behind = jnp.arange(257) % model.config.vocab_size

    def scores(hidden: jax.Array) -> Any:
        return programs._scores(model.params, model.config, hidden, behind, NO_ADAPTERS)

    loops = [e.params["length"] for e in jax.make_jaxpr(scores)(hidden).jaxpr.eqns if e.primitive.name == "scan"]
    assert loops == [3]
    whole = token_logprobs(unembed(model.params, model.config, hidden[None])[0], behind, MAX_LOGPROBS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scores(hidden), whole)


def test_a_decode_program_is_expected_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    core, expected = Core(tiny_model(), small_settings()), []
    monkeypatch.setattr(core.programs, "expect", lambda name, least, *, greedy: expected.append((name, least)))
    for new, wanted in ((1, []), (2, [("decode", 1)])):
        run(core, [([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))])
        assert expected == wanted


def test_a_long_prompt_is_marked_once_for_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats its tokens, of which each counts once."""
    for module in ("compiled", "program_set"):
        monkeypatch.setattr(f"llama_jax.engine.{module}.MARKED", 40)
    model = tiny_model()
    core = Core(model, small_settings(pages=17))  # sizes that no other test has
    prompt = np.random.default_rng(0).integers(3, 40, 80).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=4, repetition_penalty=1.5)
    get, marks = core.programs._get, []

    def counted(key: Any) -> Any:
        marks.extend([key] * (key.name == "mark"))
        return get(key)

    monkeypatch.setattr(core.programs, "_get", counted)
    (news,) = run(core, [(prompt, params)])
    assert tokens(news) == alone(model, (prompt, params)).tokens
    assert len(marks) == 1


@pytest.mark.parametrize(
    ("on_cpu", "steps", "greedy", "count"),
    [(True, 8, None, 6), (True, 8, True, 10), (False, 8, None, 26), (False, 1, None, 33), (False, 8, True, 33)],
)
def test_the_set_of_programs_is_small(on_cpu: bool, steps: int, greedy: bool | None, count: int) -> None:
    """Greedy requests have decode programs of their own where a step would wait for the host to test what it needs."""
    sizes: dict[str, Any] = {"steps": steps, "greedy": greedy, "pages": 9728}
    settings = settings_for(preset("llama-3.1-8b"), "bfloat16", None, on_cpu=on_cpu, free=None, **sizes)
    keys = program_set(settings, on_cpu=on_cpu)
    assert len(set(keys)) == len(keys) == count
    needed = [("decode", rows) for rows in settings.decode_rows] + [("mixed", size) for size in settings.mixed_tokens]
    assert set(needed) <= {(key.name, key.size) for key in keys if not key.greedy}


@pytest.mark.parametrize(
    ("options", "mixed", "few"),
    [
        ({}, (256, 512, 1024, 2048), (128, 256, 512, 2048)),
        ({"step_tokens": 8192}, (256, 512, 1024, 2048, 8192), (128, 256, 512, 2048, 8192)),
        ({"step_tokens": 600}, (256, 512, 600), (128, 256, 512, 600)),
        ({"step_tokens": 4096, "rows": 32}, (128, 256, 512, 1024, 2048, 4096), ()),
        ({"step_tokens": 4096, "batch_invariant": True}, (4096,), ()),
        ({"step_tokens": 300, "batch_invariant": True}, (300,), ()),
        ({"step_tokens": 300, "on_cpu": True}, (32, 128, 300), ()),
    ],
)
def test_the_most_tokens_of_a_step(options: dict[str, Any], mixed: tuple[int, ...], few: tuple[int, ...]) -> None:
    sizes: dict[str, Any] = {"on_cpu": False, "free": None, "context": 8192} | options
    settings = settings_for(preset("llama-3.1-8b"), "bfloat16", None, **sizes)
    assert (settings.mixed_tokens, settings.few_tokens) == (mixed, few)
    with pytest.raises(RequestError, match="steps of 256 tokens for 256 rows") as caught:
        settings_for(preset("llama-3.1-8b"), "bfloat16", None, **sizes | {"step_tokens": 256, "rows": 256})
    assert caught.value.param == "step_tokens"


def test_prompts_are_scored_the_same_with_a_warm_cache() -> None:
    model = tiny_model()
    core = Core(model, small_settings())
    prompt = np.random.default_rng(1).integers(3, 40, 60).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=4)
    expected = alone(model, (prompt, params)).prompt_logprobs
    for _ in range(2):
        (news,) = run(core, [(prompt, params)])
        scores = news[0].prompt_logprobs
        assert scores is not None
        np.testing.assert_allclose(scores.token, expected, atol=1e-5)
        assert (scores.top[:, 0] >= scores.token - 1e-6).all()
    scored_only = dataclasses.replace(params, max_tokens=0)
    (news,) = run(core, [(prompt, scored_only)])
    assert tokens(news) == ()
    assert news[-1].ending == "length"
    np.testing.assert_allclose(news[-1].prompt_logprobs.token, expected, atol=1e-5)
    nothing_is_held(core)


def test_scores_that_are_no_numbers_are_a_failure() -> None:
    model = tiny_model()
    params = jax.tree.map(lambda x: x, model.params)
    params["embed"] = {"weight": params["embed"]["weight"].at[39].set(jnp.nan)}
    core = Core(dataclasses.replace(model, params=params), small_settings())
    scored = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
    news = run(core, [([5, 39, 6, 7], scored), ([5, 6, 7], scored)])
    assert [each[-1].ending for each in news] == ["failed", "length"]
    assert core.snapshot().failed == 1
    nothing_is_held(core)


@pytest.mark.parametrize("clears", [True, False])
def test_logits_that_are_no_numbers_end_their_row_alone(clears: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages serve nobody else; the same prompt fails again, and is not answered out of the cache. On a GPU
    the pages are cleared; on a CPU attention sees nothing of what is left in them."""
    monkeypatch.setattr(compiled, "program_set", lambda settings, on_cpu: program_set(settings, on_cpu=not clears))
    model = tiny_model()
    params = jax.tree.map(lambda x: x, model.params)
    params["embed"] = {"weight": params["embed"]["weight"].at[39].set(jnp.nan)}
    broken = dataclasses.replace(model, params=params)
    settings = small_settings(batch_invariant=True, mixed_tokens=(64,))  # the others keep every bit
    core = Core(broken, settings)
    asked = [a for a in some_requests(model, 12, seed=3) if 39 not in a[0]]
    shared = asked[1][0]
    bad = ([*shared, 39, 4], SamplingParams(temperature=0.8, seed=1, max_tokens=5))
    without_a_token = 0
    clean = run(Core(model, settings), [*asked, bad])
    for _ in range(2):
        *news, failed = run(core, [*asked, bad])
        without_a_token += sum(each[-1].ending == "failed" for each in (*news, failed))
        assert core.snapshot().failed == without_a_token
        assert failed[-1].ending == "failed"
        assert tokens(failed) == ()
        for request, ours in zip(asked, news, strict=True):
            expected = alone(model, request).tokens
            cut = expected.index(39) + 1 if 39 in expected else len(expected)
            assert tokens(ours)[:cut] == expected[:cut]
        same = [(ours, theirs) for ours, theirs in zip(news, clean, strict=False) if 39 not in tokens(theirs)]
        assert any(logprobs(theirs) for _, theirs in same)
        assert all(logprobs(ours) == logprobs(theirs) for ours, theirs in same)
    assert any(jnp.isnan(x).any() for x in paged(core._state).v) != clears
    nothing_is_held(core)


def test_leftovers_of_pages_are_not_seen_on_a_cpu() -> None:
    """Not even if all of them are no numbers: so a CPU clears no page (`program_set`)."""
    model = tiny_model()
    core = Core(model, small_settings(drafts=3, draft_rows=2))
    cache = paged(core._state)
    left = {name: tuple(jnp.full_like(x, jnp.nan) for x in getattr(cache, name)) for name in ("k", "v")}
    core._state = dataclasses.replace(core._state, cache=dataclasses.replace(cache, **left))
    check(model, core, 9, arrivals=list(range(9)))


@pytest.mark.slow
def test_cancelled_at_any_moment() -> None:
    """Within a step nothing of them is left, and nobody else notices."""
    model = tiny_model()
    core = Core(model, small_settings())
    asked = some_requests(model, 8)
    rng = np.random.default_rng(0)
    for _ in range(12):
        kept = core.add(*asked[0], limit=asked[0][1].max_tokens or 0)
        others = [core.add(prompt, params, params.max_tokens or 0) for prompt, params in asked[1:]]
        drawn: list[int] = []
        when = dict(zip(others, rng.integers(0, 30, len(others)).tolist(), strict=True))
        for step in range(200):
            for number in [number for number, at in when.items() if at == step]:
                core.cancel(number)
                core.cancel(number)
            drawn += [token for news in core.step() if news.id == kept for token in news.tokens]
            if core.idle:
                break
        assert tuple(drawn) == alone(model, asked[0]).tokens
        nothing_is_held(core)


def test_what_never_fits_is_refused() -> None:
    core = Core(tiny_model(), small_settings(waiting=2))
    greedy = SamplingParams(temperature=0.0, max_tokens=90)
    with pytest.raises(DoesNotFit, match="96"):
        core.add([1] * 50, greedy, 90)
    numbers = [core.add([1] * 5, greedy, 4) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests wait"):
        core.add([1] * 5, greedy, 4)
    for number in numbers:
        core.cancel(number)
    assert core.step() == []
    nothing_is_held(core)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode_rows": (1, 2)}, "decode_rows"),
        ({"mixed_tokens": (2,)}, "mixed_tokens"),
        ({"few_tokens": (8, 24), "few_rows": 3}, "few_tokens"),
        ({"few_tokens": (24, 8), "few_rows": 2}, "few_tokens"),
        ({"few_tokens": (48,), "few_rows": 2}, "few_tokens"),
        ({"steps": 17}, "steps"),
        ({"page_size": 24}, "page"),
    ],
)
def test_settings_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        small_settings(**changes)


@pytest.mark.slow
def test_many_short_requests_leave_nothing_behind() -> None:
    """50,000, of which a third are cancelled: memory, pages, programs, threads and files stay as they are."""
    model = tiny_model()
    core = Core(
        model,
        EngineSettings(
            rows=32, context=64, pages=80, decode_rows=(32,), mixed_tokens=(128,), chunk_rows=16, page_size=16
        ),
    )
    for _ in core.programs.compile_all():
        pass
    rng, count = np.random.default_rng(0), 50_000
    lengths, limits = rng.integers(1, 20, count).tolist(), rng.integers(1, 6, count).tolist()
    cancelled = rng.random(count) < 1 / 3
    params = [SamplingParams(temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=8) for i in range(16)]
    running: dict[int, int] = {}
    seen: list[tuple[int, int, int]] = []
    added = 0
    while added < count or running:
        while len(running) < 64 and added < count:
            prompt = rng.integers(3, 40, lengths[added]).tolist()
            number = core.add(prompt, params[added % 16], limits[added])
            running[number] = int(rng.integers(0, 4)) if cancelled[added] else -1
            added += 1
            if added % 10_000 == 0:
                gc.collect()
                files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
                seen.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, threading.active_count(), files))
        for number, left in list(running.items()):
            if left == 0:
                core.cancel(number)
                del running[number]
            elif left > 0:
                running[number] -= 1
        for drawn in core.step():
            if drawn.ending:
                running.pop(drawn.id, None)
    while not core.idle:
        core.step()
    nothing_is_held(core)
    assert core.snapshot().late_compilations == 0
    (first, threads, files), (last, threads_then, files_then) = seen[0], seen[-1]
    assert (threads, files) == (threads_then, files_then)
    assert last - first < 30_000  # kilobytes


@pytest.mark.slow
def test_over_several_devices() -> None:
    on_eight_devices("eight_devices_engine.py")
