"""Texts of a given form: what comes out is held to `jsonschema` and `re`, which know nothing of llguidance."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from engines import alone
from spelling import END, EOS, spelling_llm, spelling_model, spelling_tokenizer
from test_smollm2 import SIZES

import llama_jax as lj
from llama_jax.engine import sizing
from llama_jax.errors import RequestError
from llama_jax.generation import jobs
from llama_jax.generation.engine import Engine
from llama_jax.generation.llm import LLM
from llama_jax.generation.outputs import CompletionOutput
from llama_jax.generation.streams import Request
from llama_jax.sampling import Grammar, SamplingParams
from llama_jax.text.grammar import GrammarMatcher

SHORT = {"type": "string", "maxLength": 6}
SMALL = {"type": "integer", "minimum": -20, "maximum": 300}

SCHEMAS: dict[str, dict[str, Any]] = {
    "string": SHORT,
    "string of a length": {"type": "string", "minLength": 3, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]{1,3}$"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "integer": SMALL,
    "bounds": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 12},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "nullable": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1, "é"]}]},
    "const": {"const": {"a": [1, 2.5, "x"]}},
    "array": {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [SHORT, {"type": "boolean"}], "items": False, "minItems": 2},
    "object": {
        "type": "object",
        "properties": {"name": SHORT, "age": SMALL},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"a": SMALL, "b": SHORT, "c": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "point": {
                "type": "object",
                "properties": {"x": SMALL, "y": SMALL},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        },
        "required": ["point", "tags"],
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [SHORT, SMALL, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 8}]},
    "reference": {
        "$defs": {"colour": {"enum": ["red", "blue"]}},
        "type": "array",
        "items": {"$ref": "#/$defs/colour"},
        "minItems": 1,
        "maxItems": 3,
    },
    "recursion": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "values": {"type": "object", "additionalProperties": SMALL, "maxProperties": 0},
    "escapes": {"type": "string", "pattern": '^["\\\\]{2,3}$'},
    "empty": {"type": "object", "properties": {}, "additionalProperties": False},
}

EXPRESSIONS = [
    r"[a-c]{2,4}x",
    r"(yes|no|maybe)",
    r"\d{3}-\d{4}",
    r"é{1,3}\n?",
    r"[^a]b?",
    r"(ab|abab)c",
    r"<[a-z]{1,5}>[0-9]{0,3}</>",
]

LARK = 'start: expr\nexpr: NUMBER | "(" expr ("+" | "*") NUMBER ")"\nNUMBER: /[1-9][0-9]?/'


@pytest.fixture(scope="module")
def llm() -> LLM:
    return spelling_llm()


def params(grammar: Any, i: int = 0, **fields: Any) -> SamplingParams:
    """Greedy for even numbers, else drawn by that seed; alike in no two."""
    kind: dict[str, Any] = {"temperature": 0.0} if i % 2 == 0 else {"temperature": 1.2, "seed": i}
    return SamplingParams(**{"max_tokens": 120, "response_format": grammar, **kind, **fields})


def prompt(i: int) -> list[int]:
    return [3 + i % 90, 7, 3 + i * i % 90]


def completions(llm: LLM, asked: list[SamplingParams]) -> list[CompletionOutput]:
    return [output.outputs[0] for output in llm.generate([prompt(i) for i in range(len(asked))], asked)]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_json_of_many_schemas_in_one_batch_with_free_texts(llm: LLM, rounds: int) -> None:
    """Free texts beside them are what they are alone."""
    asked: list[SamplingParams] = []
    for i, schema in enumerate([*SCHEMAS.values()] * rounds):
        response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        asked.append(params(response_format, i + i // len(SCHEMAS)))
        if i % 4 == 0:
            asked.append(SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=20))
    outputs = completions(llm, asked)
    checked = iter([*SCHEMAS.values()] * rounds)
    for i, (p, output) in enumerate(zip(asked, outputs, strict=True)):
        if p.response_format is None:
            assert output.token_ids == alone(llm.model, (prompt(i), p)).tokens
            continue
        schema = next(checked)
        if "next" in output.text and output.finish_reason == "length":
            continue  # a list without end is in its schema too
        assert output.finish_reason == "stop", (schema, output)
        value = json.loads(output.text)
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        validator.validate(value)
        compact = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        if not isinstance(value, float | str | dict):  # numbers, escapes and keys have other spellings
            assert len(output.text) <= len(compact) + 2
    assert llm.snapshot().counts.pages_used == 0


@pytest.mark.slow
def test_any_json_object(llm: LLM) -> None:
    """Cut off at the limit as often as not, since this model knows no measure: what has ended is an object."""
    ended = 0
    for output in completions(llm, [params({"type": "json_object"}, 2 * i + 1) for i in range(16)]):
        assert output.text.startswith("{")
        if output.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(output.text), dict)
    assert ended


@pytest.mark.slow
def test_regular_expressions(llm: LLM) -> None:
    expressions = EXPRESSIONS * 4
    for expression, output in zip(
        expressions, completions(llm, [params(Grammar.regex(e), i) for i, e in enumerate(expressions)]), strict=True
    ):
        assert output.finish_reason == "stop"
        assert re.fullmatch(expression, output.text), (expression, output)


def test_a_lark_grammar(llm: LLM) -> None:
    texts = {output.text for output in completions(llm, [params(Grammar.lark(LARK), 2 * i + 1) for i in range(12)])}
    whole = r"[1-9][0-9]?"
    while len(whole) < 400:
        whole = rf"([1-9][0-9]?|\({whole}[+*][1-9][0-9]?\))"
    assert all(re.fullmatch(whole, text) for text in texts)
    assert len(texts) > 3


def test_tokens_are_those_of_a_loop_that_tries_every_token(llm: LLM) -> None:
    """Without engine and masks: each token of the vocabulary is offered to a matcher of its own. A text may end, or has
    to, only where the expression matches, which `re` says.

    Where a text is forced, masks allow only the tokens that the tokenizer cuts it into; these expressions force none of
    several tokens that could be one.
    """
    tokenizer, model = spelling_tokenizer(), spelling_model()
    vocab = model.config.vocab_size
    for i, expression in enumerate(e for e in EXPRESSIONS if e.isascii() and "(ab" not in e):
        grammar = Grammar.regex(expression)

        def allowed(drawn: list[int], grammar: Grammar = grammar, expression: str = expression) -> np.ndarray:
            matcher = GrammarMatcher.of(grammar, tokenizer, vocab, model.eos_token_ids)
            for token in drawn:
                matcher.accept(token)
            found = np.asarray([matcher._matcher.validate_tokens([token]) == 1 for token in range(vocab)])
            whole = b"".join(map(tokenizer.bytes_of, drawn)).decode(errors="replace")
            if re.fullmatch(expression, whole):
                assert found[EOS] == found[END] == found.any()
            else:
                assert not found[EOS] | found[END]
            return found

        asked = params(grammar, i, max_tokens=12)
        expected = alone(model, (prompt(0), asked), allowed)
        output = llm.generate([prompt(0)], asked)[0].outputs[0]
        assert (output.token_ids, output.finish_reason) == (expected.tokens, expected.ending)


def test_continuations_have_matchers_of_their_own(llm: LLM) -> None:
    asked = params(Grammar.regex("[a-z]{1,9}[0-9]"), 1)
    (many,) = llm.generate([prompt(0)], lj.SamplingParams(**{**vars(asked), "n": 5}))
    for copy, output in enumerate(many.outputs):
        (one,) = llm.generate([prompt(0)], lj.SamplingParams(**{**vars(asked), "seed": 1 + copy}))
        assert output.token_ids == one.outputs[0].token_ids
    assert len({output.text for output in many.outputs}) > 2


def test_the_grammar_has_the_last_word(llm: LLM) -> None:
    """No end where it has none, an end where it has nothing else, whatever min_tokens and ignore_eos say."""
    for fields in ({"min_tokens": 9}, {"ignore_eos": True}, {"min_tokens": 9, "ignore_eos": True}, {"max_tokens": 3}):
        (output,) = completions(llm, [params(Grammar.regex("a{3}"), **fields)])
        assert (output.text, output.finish_reason) == ("aaa", "stop")
    (output,) = completions(llm, [params(Grammar.regex("a*"), logit_bias={EOS: 100.0})])
    assert (output.text, output.token_ids, output.finish_reason) == ("", (EOS,), "stop")
    (output,) = completions(llm, [params(Grammar.regex("a+"), logit_bias={END: 100.0})])
    assert (output.text, output.token_ids[1:], output.finish_reason) == ("a", (END,), "stop")
    (output,) = completions(llm, [params(Grammar.regex("(ab){9}"), stop="bab")])
    assert (output.text, output.finish_reason) == ("a", "stop")
    (output,) = completions(llm, [params(Grammar.regex("(ab){9}x"), stop="xy")])  # held back, and given at the end
    assert (output.text, output.finish_reason) == ("ab" * 9 + "x", "stop")


def test_a_dead_end_ends_its_request_alone(llm: LLM) -> None:
    a = spelling_tokenizer().token_id("a")
    free = SamplingParams(temperature=0.0, max_tokens=10)
    asked = [free, params(Grammar.regex("[ac]{2}b"), allowed_token_ids=[a]), free]
    outputs = completions(llm, asked)
    assert outputs[1].finish_reason == "error"
    assert outputs[1].text == "aa"
    assert outputs[1].error == "the constraints allow no token"
    for i in (0, 2):
        assert outputs[i].token_ids == alone(llm.model, (prompt(i), free)).tokens
        assert outputs[i].error is None
    counts = llm.snapshot().counts
    assert (counts.running, counts.pages_used) == (0, 0)


BAD_GRAMMARS = {
    "schema": (Grammar.json_schema({"type": "foo"}), "Invalid type: foo"),
    "keyword": (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "unsatisfiable": (Grammar.json_schema({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
    "remote": (Grammar.json_schema({"$ref": "http://localhost/x"}), "retriev"),
    "no JSON": (Grammar.json_schema("{"), "EOF"),
    "no object": (Grammar.json_schema("[1]"), "object"),
    "expression": (Grammar.regex("(a"), "unclosed group"),
    "look-ahead": (Grammar.regex("(?=a)b"), "look-around"),
    "rule": (Grammar.lark("start: foo"), "unknown name"),
    "nothing": (Grammar.lark(""), "Empty grammar"),
}


@pytest.mark.parametrize("case", BAD_GRAMMARS)
def test_what_llguidance_refuses_is_a_request_error(llm: LLM, case: str) -> None:
    grammar, says = BAD_GRAMMARS[case]
    steps = llm.snapshot().steps
    with pytest.raises(RequestError, match=says) as caught:
        llm.generate([prompt(0)], params(grammar))
    assert caught.value.param == "response_format"
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert llm.snapshot().steps == steps


def test_without_a_tokenizer() -> None:
    llm = LLM(spelling_model(), settings=spelling_llm().settings)
    for fields in ({"response_format": Grammar.regex("a")}, {"bad_words": ["a"]}):
        with pytest.raises(RequestError, match="tokenizer") as caught:
            llm.generate([prompt(0)], **fields)
        assert caught.value.param in fields


def test_functions_take_them_too() -> None:
    model, tokenizer = spelling_model(), spelling_tokenizer()
    fields: dict[str, Any] = {"response_format": Grammar.regex("[a-c]{9}"), "temperature": 0.9, "seed": 3}
    text = lj.generate(model, tokenizer, prompt(0), **fields)
    assert re.fullmatch("[a-c]{9}", text)
    assert "".join(new.text for new in lj.stream_generate(model, tokenizer, prompt(0), **fields)) == text


@pytest.mark.slow
def test_texts_survive_an_engine_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens drawn in the smaller one count, and no mask is computed by two at once."""
    monkeypatch.setattr(sizing, "CPU_START", 32)
    monkeypatch.setattr(jobs, "FORESEEN", 4)
    llm = LLM(spelling_model(), spelling_tokenizer(), rows=3)
    assert llm.settings.context == 32
    expression = r"([a-z]{5} ){9}[0-9]{10}"
    outputs = completions(llm, [params(Grammar.regex(expression), i, bad_words=["00", "b"]) for i in range(5)])
    assert llm.settings.context > 32
    for output in outputs:
        assert output.finish_reason == "stop"
        assert re.fullmatch(expression, output.text)
        assert not {"b", "00"} & {spelling_tokenizer().decode([token]) for token in output.token_ids}


@pytest.mark.slow
def test_token_by_token(llm: LLM) -> None:
    """The last token of a text that ends of itself is the last of the stream, and says so."""
    steps = list(llm.stream("a", params(Grammar.regex("[a-c]{4}[0-9]"))))
    assert re.fullmatch("[a-c]{4}[0-9]", "".join(step.text for step in steps))
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]


@pytest.mark.slow
def test_streams() -> None:
    """Pieces make up the text; one that is left in the middle of a grammar holds nothing any more."""
    sizes = spelling_llm().settings

    async def run() -> Any:
        async with Engine(spelling_model(), spelling_tokenizer(), settings=sizes, ahead=False) as engine:

            async def leave() -> int:
                async for piece in engine.stream(Request("a", params(Grammar.regex("[a-z]{200}"), max_tokens=200))):
                    if piece.token_ids:
                        return len(piece.token_ids)
                return 0

            requests = [Request("a", params(Grammar.json_schema(SCHEMAS["object"]), i)) for i in range(6)]
            streams = [[piece async for piece in engine.stream(requests[0])]]
            results = await asyncio.gather(leave(), *map(engine.generate, requests))
            for _ in range(400):
                if engine.snapshot().counts.pages_used == 0:
                    break
                await asyncio.sleep(0.01)
            return streams[0], results, engine.snapshot()

    pieces, (left, *outputs), snapshot = asyncio.run(run())
    assert left == 1
    assert pieces[-1].finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == pieces[-1].output.text == outputs[0].text
    for output in outputs:
        jsonschema.validate(json.loads(output.text), SCHEMAS["object"])
    assert (snapshot.counts.pages_used, snapshot.counts.running) == (0, 0)


@pytest.mark.slow
def test_a_model_that_was_trained(smollm2: tuple[Any, Any]) -> None:
    """The real vocabulary, of 49,152 tokens: greedy, drawn, and beside free texts, which stay as they are."""
    model, tokenizer = smollm2
    llm = LLM(model, tokenizer, **SIZES)
    names = ["object", "enum", "tuple", "uuid", "nested", "escapes", "optional"]
    asked = [params(Grammar.json_schema(SCHEMAS[name]), i, max_tokens=100) for i, name in enumerate(names)]
    free = SamplingParams(temperature=0.0, max_tokens=12)
    prompts = [f"Some JSON, number {i}:" for i in range(len(asked))]
    (alone_first,) = llm.generate(["The capital of France is"], free)
    *outputs, beside = llm.generate([*prompts, "The capital of France is"], [*asked, free])
    assert beside.text == alone_first.text
    for name, output in zip(names, outputs, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    (chatted,) = llm.chat([{"role": "user", "content": "Yes or no?"}], response_format=Grammar.regex("(yes|no)"))
    assert chatted.text in ("yes", "no")
