"""A draft model: the same tokens as without it, whatever it takes for likely, and nothing tried where that gains
nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from engines import alone, assert_as_alone, run, small_settings, some_requests, tiny_model, tokens
from helpers import random_params, tiny_config
from spelling import spelling_model, spelling_tokenizer
from test_engine_lookahead import GRAMMARS, KINDS, by_grammar

from llama_jax.cache import PagedCache
from llama_jax.cli import cli
from llama_jax.config.presets import preset
from llama_jax.engine import core as engine_core
from llama_jax.engine import draft_programs
from llama_jax.engine.core import Core
from llama_jax.engine.draft_model import PADDING, DraftModel, check_draft, cost_of
from llama_jax.engine.draft_programs import DRAFT, FOLLOW, draft_control, follow_control
from llama_jax.engine.drafting import Cost, Pace, Wanted, worthwhile
from llama_jax.engine.program_set import program_set
from llama_jax.engine.sequence import Sequence
from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.sizing import default_settings, settings_for
from llama_jax.errors import RequestError
from llama_jax.generation.draft import check_vocabularies
from llama_jax.generation.llm import LLM
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.plan.memory import cache_bytes
from llama_jax.plan.step_costs import Peak
from llama_jax.sampling import SamplingParams


def with_draft(**changes: Any) -> EngineSettings:
    """Two rows, whose texts a draft model reads in pieces of 24 tokens; too few pages for two long texts."""
    fields: dict[str, Any] = {"drafts": 3, "draft_rows": 2, "draft_context": 80, "rows": 2, "decode_rows": (2,)}
    return small_settings(**fields | {"mixed_tokens": (24,), "pages": 8} | changes)


# --- What a draft costs


def test_a_draft_has_to_gain_what_it_costs() -> None:
    """Of four tokens one comes: enough for drafts that cost nothing, too little for a model of a third of the size."""
    going = []
    for cost in (0.0, 0.3):
        pace, count = Pace(4, Cost(cost)), 10
        while pace.active(count) and count < 60:
            count += 2
            pace.length = 4
            pace.drawn(4, 2, count)
        going.append(pace.active(count))
    assert going == [True, False]


def test_drafts_are_as_long_as_they_are_right() -> None:
    lengths = []
    for right in (0, 1, 4):
        pace = Pace(4, Cost(0.16))
        for _ in range(10):
            pace.drawn(4, 1 + right, 0)
        lengths.append(pace.length)
    assert lengths == [1, 2, 4]  # 0.5 ** 2 is above 0.16, 0.5 ** 3 is not


def test_rows_without_drafts_pay_for_those_of_others() -> None:
    pace = Pace(4, Cost(0.15, 0.6))
    for _ in range(60):
        pace.drawn(4, 3, 0)
    assert pace.gain == pytest.approx(2 - 1.2, abs=0.01)
    assert worthwhile([pace], 0)
    assert not worthwhile([pace], 1)
    assert worthwhile([pace, pace], 1)
    assert not worthwhile([], 1)


def test_the_cost_is_that_of_the_weights() -> None:
    small, large = (Model({}, preset(name)) for name in ("llama-3.2-1b", "llama-3.1-8b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "dtype", property(lambda model: jnp.dtype("bfloat16")))
        # Embeddings are looked up; the head of the small one is its embedding.
        assert cost_of(small, large).token == pytest.approx(1.236e9 / 7.505e9, rel=0.01)
        assert cost_of(large, large) == Cost(1, 0)
        # At 5 TB/s a step takes 3 ms, half of what the device waits.
        assert cost_of(small, large, Peak(5.003e12, None)).step == pytest.approx(2, rel=0.01)


# --- Whose text is in which row: against a device that keeps tokens in place of keys and values


def likely(text: tuple[int, ...]) -> int:
    """A token that depends on all of a text."""
    return hash(text) % 5


class Device:
    """Programs that keep the text of each row, and check what they are told of it."""

    def __init__(self, settings: EngineSettings):
        self.settings, self.calls = settings, dict.fromkeys((DRAFT, FOLLOW), 0)

    def run(self, name: str, cache: list[list[int]], array: np.ndarray) -> Any:
        self.calls[name] += 1
        control = {DRAFT: draft_control, FOLLOW: follow_control}[name](self.settings)
        given = control.parts(array)
        cache = [row[:stored] for row, stored in zip(cache, given["stored"], strict=True)]
        if name == FOLLOW:
            for token, position, row in zip(given["ids"], given["positions"], given["rows"], strict=True):
                if position >= 0:
                    assert len(cache[row]) == position
                    cache[row].append(int(token))
            return cache
        drafted = np.full((len(cache), self.settings.drafts), -7)
        for row, ids in enumerate(given["ids"]):
            new = [int(token) for token in ids if token >= 0]
            if new:
                assert len(cache[row]) == given["stored"][row]  # nothing is missing before them
                cache[row] += new
                for i in range(int(given["count"][0])):
                    drafted[row, i] = likely(tuple(cache[row]))
                    if i + 1 < given["count"][0]:
                        cache[row].append(int(drafted[row, i]))
                assert len(cache[row]) <= self.settings.draft_context
        return cache, drafted


def on(device: Device) -> DraftModel:
    parts: Any = SimpleNamespace(begin=lambda: [[] for _ in range(device.settings.draft_rows)])
    return DraftModel(parts, device.settings, device.run, Cost())


def wanted(number: int, text: list[int], most: int = 3, domain: Any = ()) -> Wanted:
    return Wanted(Sequence(number, text, len(text), 100, domain=domain), Pace(3), most)


def test_a_text_that_is_behind_is_read_in_pieces() -> None:
    """Of 24 tokens, of all rows together; others draft meanwhile."""
    device = Device(with_draft())
    model, long, short = on(device), wanted(0, list(range(60))), wanted(1, [1, 2, 3])
    drafts = [model.propose([long, short]) for _ in range(3)]
    expected = [tuple(alone_drafted(each.sequence.tokens, 3)) for each in (long, short)]
    assert drafts == [[(), expected[1]], [(), expected[1]], expected]
    assert device.calls == {FOLLOW: 3, DRAFT: 2}  # the same text is not drafted for again
    before = dict(device.calls)
    short.sequence.tokens += [*expected[1], 4]
    assert model.propose([short]) == [tuple(alone_drafted(short.sequence.tokens, 3))]
    assert device.calls == {FOLLOW: before[FOLLOW], DRAFT: before[DRAFT] + 1}


def alone_drafted(text: list[int], count: int) -> list[int]:
    found = list(text)
    for _ in range(count):
        found.append(likely(tuple(found)))
    return found[len(text) :]


def test_the_next_turn_begins_where_the_last_one_ended() -> None:
    """Only of the same tenant, and without taking a row from a text that goes on."""
    device = Device(with_draft())
    model, first = on(device), wanted(0, list(range(50)))
    while model.propose([first]) == [()]:
        pass
    model.ended(0)
    turn = [*range(50), 3, 1, 4]
    calls = device.calls[FOLLOW]
    assert model.propose([wanted(1, list(turn), domain=(("tenant", "other"),))]) == [()]
    assert device.calls[FOLLOW] == calls + 1
    assert model.propose([wanted(2, list(turn))]) == [tuple(alone_drafted(turn, 3))]
    assert device.calls[FOLLOW] == calls + 1


def test_a_text_longer_than_the_draft_models_context_is_left_alone() -> None:
    device = Device(with_draft())
    model, long = on(device), wanted(0, [5] * 78)
    for _ in range(20):
        assert model.propose([long]) == [()]
    assert device.calls == {FOLLOW: 0, DRAFT: 0}
    assert not long.pace.active(78)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.data())
def test_what_is_proposed_follows_the_text(data: st.DataObject) -> None:
    """Texts begin, grow, end and share beginnings, more of them than there are rows; what is proposed is always what
    the draft model would say to the whole text."""
    device = Device(with_draft(draft_context=64))
    model = on(device)
    alive: list[Wanted] = []
    for number in range(data.draw(st.integers(2, 12))):
        what = data.draw(st.sampled_from(("begin", "grow", "end", "grow", "begin")))
        if what == "begin" or not alive:
            text = [likely((i,)) for i in range(data.draw(st.integers(1, 40)))]
            alive.append(wanted(number, text + data.draw(st.lists(st.integers(0, 4), max_size=9))))
        if what == "end":
            model.ended(alive.pop(data.draw(st.integers(0, len(alive) - 1))).sequence.id)
        some = [each for each in alive if data.draw(st.booleans())][:2]
        for each in some:
            each.pace.length = data.draw(st.integers(1, 3))
        short = all(len(each.sequence.tokens) <= 12 for each in some)  # together less than a piece
        for each, draft in zip(some, model.propose(some), strict=True):
            text = each.sequence.tokens
            assert draft in ((), tuple(alone_drafted(text, len(draft))))
            assert draft or not short
            kept = data.draw(st.integers(0, len(draft)))
            text += [*draft[:kept], *data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=2))]


# --- Sizes, and what is refused


def test_the_programs_are_part_of_the_set() -> None:
    names = [str(key) for key in program_set(with_draft(), on_cpu=True)]
    assert {"draft of 2 rows", "follow of 24 tokens"} <= set(names)
    assert not any("follow" in str(key) for key in program_set(with_draft(draft_context=0), on_cpu=True))


def test_the_cache_of_a_draft_model_leaves_the_pages_most_of_the_memory() -> None:
    large, small = preset("llama-3.1-8b"), preset("llama-3.2-1b")
    sizes: dict[str, Any] = {"on_cpu": False, "free": 40 << 30, "drafts": 4, "page_size": 64}
    without = settings_for(large, "bfloat16", None, **sizes)
    made = settings_for(large, "bfloat16", None, draft=(small, "bfloat16", None), **sizes)
    assert (without.draft_context, made.draft_rows) == (0, 8)
    assert 8192 < made.draft_context < made.context
    taken = (without.pages - made.pages) * cache_bytes(large, None, 2, 64)
    cache = cache_bytes(small, None, 2, 8 * made.draft_context)
    assert taken == pytest.approx(cache, rel=0.01)
    assert (40 << 30) / 8 > cache > 0.8 * (40 << 30) / 8
    short = settings_for(large, "bfloat16", None, draft=(small, "bfloat16", None), context=2048, **sizes)
    assert short.draft_context == 2048
    assert default_settings(tiny_model(), draft=tiny_model(), drafts=2, rows=2).draft_context == 128


def test_a_draft_model_needs_the_models_vocabulary() -> None:
    model = tiny_model()
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + PADDING + 1)
    with pytest.raises(RequestError, match="the draft model has 169 tokens, the model 40") as e:
        LLM(model, draft=Model(random_params(config), config), drafts=2)
    assert "same family" in e.value.hint
    padded = dataclasses.replace(config, vocab_size=model.config.vocab_size + 8)
    check_draft(model, Model(random_params(padded), padded))
    spelling = spelling_tokenizer()
    check_vocabularies(spelling, spelling)
    other: Any = SimpleNamespace(vocab_size=300, token=lambda i: f"{i}")
    with pytest.raises(RequestError, match=r"299 tokens mean .*: 1 is '1\?' there and '1' here"):
        check_vocabularies(other, SimpleNamespace(vocab_size=400, token=lambda i: f"{i}{'?' * (i > 0)}"))  # type: ignore[arg-type]


def test_options_that_contradict_each_other() -> None:
    model = tiny_model()
    with pytest.raises(RequestError, match="no drafts to ask it for") as e:
        LLM(model, draft=model)
    assert e.value.param == "drafts"
    with pytest.raises(RequestError, match="batch_invariant with 2 drafts"):
        LLM(model, draft=model, drafts=2, batch_invariant=True)
    with pytest.raises(RequestError, match="no room for it"):
        Core(model, small_settings(drafts=2), draft=model)
    with pytest.raises(RequestError, match="no draft model"):
        Core(model, with_draft())
    with pytest.raises(RequestError, match="its context is 64"):
        Core(model, with_draft(), draft=replace(model, config=tiny_config()))


@pytest.mark.parametrize(
    "args",
    [
        ["chat", "--draft-model", "x"],
        ["batch", "in", "out", "--draft-model", "x"],
        ["bench", "latency", "--draft-model", "x"],
        ["compile", "llama-3.1-8b", "--engine", "--draft-model", "x"],
    ],
    ids=lambda args: args[0],
)
def test_commands_refuse_a_draft_model_without_drafts_before_they_load_anything(args: list[str]) -> None:
    done = CliRunner().invoke(cli, args)
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 2
    assert "--draft-model needs --drafts" in done.output


# --- On the device


@pytest.mark.slow
def test_the_programs_are_the_models_most_likely_tokens() -> None:
    """Against the whole text without a cache; a row beside them keeps what it has."""
    settings, model = with_draft(), tiny_model()
    config = model.config
    cache = draft_programs.new_cache(config, settings, jnp.dtype("float32"))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, n).tolist() for n in (22, 9)]
    static, whole = {"config": config, "settings": settings}, jax.jit(forward, static_argnums=1)
    follow = jax.jit(lambda cache, given: draft_programs.follow(model.params, cache, given, **static))
    draft = jax.jit(lambda cache, given: draft_programs.draft(model.params, cache, given, **static, vocab=30))

    def likeliest(text: list[int], count: int) -> list[int]:
        found = list(text)
        for _ in range(count):
            padded = jnp.asarray([found + [0] * (32 - len(found))])
            found.append(int(whole(model.params, config, padded)[0][0, len(found) - 1, :30].argmax()))
        return found[len(text) :]

    def read(cache: PagedCache, row: int, start: int, end: int) -> PagedCache:
        array, parts = follow_control(settings).new(positions=-1, rows=1 << 20, stored=1 << 20)
        n = end - start
        parts["ids"][:n], parts["rows"][:n], parts["positions"][:n] = texts[row][start:end], row, range(start, end)
        parts["stored"][row] = start
        return follow(cache, array)

    def drafted(cache: PagedCache, stored: dict[int, int], count: int) -> tuple[PagedCache, np.ndarray]:
        array, parts = draft_control(settings).new(ids=-1, stored=1 << 20, count=count)
        for row, start in stored.items():
            parts["ids"][row, : len(texts[row]) - start], parts["stored"][row] = texts[row][start:], start
        cache, found = draft(cache, array)
        return cache, np.asarray(found)

    cache = read(read(cache, 0, 0, 10), 0, 10, 20)
    cache = read(cache, 1, 0, 8)
    cache, found = drafted(cache, {0: 20, 1: 8}, 3)
    assert found.tolist() == [likeliest(text, 3) for text in texts]
    cache, found = drafted(cache, {1: 6}, 2)  # what is known is computed again
    assert found[1, :2].tolist() == likeliest(texts[1], 2)
    texts[0] += [*likeliest(texts[0], 1), 7]
    cache, found = drafted(cache, {0: len(texts[0]) - 1}, 3)  # one was drawn, the others not
    assert found[0].tolist() == likeliest(texts[0], 3)


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are tried as if they cost nothing: these draft models are as large as the model."""
    monkeypatch.setattr(engine_core, "cost_of", lambda draft, model, peak: Cost(0.0))


@pytest.mark.slow
@pytest.mark.usefixtures("free_drafts")
def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    core = Core(spelling_model(), with_draft(stop_ids=66), draft=spelling_model())  # sizes that no other test has
    assert {DRAFT, FOLLOW} <= {news.key.name for news in core.compile_all()}
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    asked = [(prompt, params) for prompt, _ in some_requests(spelling_model(), 2)]
    for request, news in zip(asked, run(core, asked), strict=True):
        assert_as_alone(news, alone(core.model, request))
    snapshot = core.snapshot()
    assert snapshot.accepted_tokens == snapshot.drafted_tokens > 35
    assert snapshot.steps < 20  # of 60 tokens
    assert snapshot.late_compilations == 0


@pytest.mark.slow
@pytest.mark.usefixtures("free_drafts")
def test_any_request_gets_its_tokens() -> None:
    """Greedy and sampled, with penalties, biases and log-probabilities; with too few pages, and one that is ended."""
    core = Core(spelling_model(), with_draft(), draft=spelling_model())
    asked = [
        (prompt, replace(params, max_tokens=30, ignore_eos=True, stop_token_ids=()))
        for prompt, params in some_requests(core.model, 6)
    ]
    for i in range(0, 6, 2):
        ended = core.add([7, 8, 9] * 8, SamplingParams(seed=1, temperature=2.0), 40)
        while not core._asked[ended].sequence.draft:
            core.step()
        core.cancel(ended)
        for request, news in zip(asked[i : i + 2], run(core, asked[i : i + 2]), strict=True):
            assert_as_alone(news, alone(core.model, request))
    # Two of 60 to 70 tokens have no room beside each other.
    long = [([*prompt, *range(3, 40)][:40], replace(params, max_tokens=30)) for prompt, params in asked[:2]]
    for request, news in zip(long, run(core, long), strict=True):
        assert_as_alone(news, alone(core.model, request))
    snapshot = core.snapshot()
    assert snapshot.counts.preemptions > 0
    assert 40 < snapshot.accepted_tokens < snapshot.drafted_tokens
    assert (snapshot.counts.pages_used, snapshot.late_compilations) == (0, 0)


@pytest.mark.slow
def test_a_draft_model_that_knows_nothing_is_left_alone() -> None:
    core = Core(spelling_model(), with_draft(), draft=spelling_model(1))
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (news,) = run(core, [([5, 6, 7], params)])
    assert tokens(news) == alone(core.model, ([5, 6, 7], params)).tokens
    snapshot = core.snapshot()
    assert snapshot.accepted_tokens <= 2
    assert 0 < snapshot.drafted_tokens <= 12
    assert snapshot.steps >= 38


@pytest.mark.slow
@pytest.mark.usefixtures("free_drafts")
@pytest.mark.parametrize("seed", [0, 1], ids=["right", "wrong"])
def test_texts_of_a_grammar_with_a_draft_model(seed: int) -> None:
    """The guess is tried as far as the grammar allows it, behind what it forces."""
    llm = LLM(spelling_model(), spelling_tokenizer(), settings=with_draft(), draft=spelling_model(seed))
    each = [SamplingParams(max_tokens=50, logprobs=1, response_format=GRAMMARS["schema"], **kind) for kind in KINDS[:3]]
    for params, output in zip(each, llm.generate([[40, 41, 42]] * len(each), each), strict=True):
        expected = alone(llm.model, ([40, 41, 42], params), by_grammar(GRAMMARS["schema"]))
        (found,) = output.outputs
        assert (tuple(found.token_ids), found.finish_reason) == (expected.tokens, expected.ending)
        assert found.logprobs is not None
        assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected.logprobs, abs=2e-4)
    assert llm.snapshot().accepted_tokens > 12
