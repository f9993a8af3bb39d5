"""Calls of tools in the text of models: read the same however the text is cut, and written as grammars say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_chat_model import write_chat_model

from llama_jax.errors import RequestError
from llama_jax.sampling import Grammar
from llama_jax.text.grammar import GrammarMatcher
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.text.tools import (
    FORMATS,
    Arguments,
    Call,
    Delta,
    Reasoning,
    ReasoningParser,
    Text,
    Tool,
    format_named,
    format_of,
    place_of,
    reasoning_of,
    tools_of,
)
from llama_jax.text.tools.grammars import OPENING, amid, answered
from llama_jax.text.tools.json_object import JsonObject
from llama_jax.text.tools.parser import joined
from llama_jax.text.tools.python_literal import keywords

NAMES = ("get_weather", "add", "brave_search")
TEMPLATES = Path(__file__).parent / "data" / "tokenizer" / "templates"


def read(name: str, pieces: Sequence[str], names: Sequence[str] = NAMES) -> list[Delta]:
    parser = FORMATS[name].parser(names)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    return joined([*deltas, *parser.finish()])


def said(name: str, text: str, names: Sequence[str] = NAMES) -> tuple[str, list[tuple[str, Any]]]:
    """The answer's own text, and its calls."""
    words, calls = "", list[tuple[str, str]]()
    for delta in read(name, [text], names):
        match delta:
            case Text(text):
                words += text
            case Call(called):
                calls.append((called, ""))
            case Arguments(part):
                calls[-1] = (calls[-1][0], calls[-1][1] + part)
    return words, [(called, json.loads(arguments)) for called, arguments in calls]


WEATHER = ("get_weather", {"city": 'Zürich {"}\\ ]', "days": [1, {"n": None}]})
SPELLED = json.dumps(WEATHER[1], ensure_ascii=False)
CASES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {SPELLED}}}\n</tool_call>', "", [WEATHER]),
    (
        "hermes",
        f'Let me see. \n<tool_call>{{"arguments": {SPELLED}, "name": "get_weather"}}</tool_call>\n<tool_call>\n'
        '{"name": "add"}\n</tool_call>\n',
        "Let me see.",
        [WEATHER, ("add", {})],
    ),
    ("hermes", f'<tool_call>{{"name": "add", "arguments": {json.dumps(SPELLED)}}}', "", [("add", WEATHER[1])]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null} and more', "and more", [("add", {})]),
    ("tool_calls", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {SPELLED}}}]', "", [WEATHER]),
    (
        "tool_calls",
        f'[TOOL_CALLS][{{"name": "add", "arguments": {{}}}}, {{"name": "get_weather", "arguments": {SPELLED}}}]',
        "",
        [("add", {}), WEATHER],
    ),
    ("tool_calls_args", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{SPELLED}", "", [WEATHER]),
    (
        "tool_calls_args",
        f"Well[TOOL_CALLS]add[ARGS]{{}}[TOOL_CALLS]get_weather{SPELLED}",
        "Well",
        [("add", {}), WEATHER],
    ),
    ("llama_json", f'{{"name": "get_weather", "parameters": {SPELLED}}}', "", [WEATHER]),
    (
        "llama_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {SPELLED}}}',
        "",
        [WEATHER],
    ),
    (
        "llama_json",
        f'I call {{"name": "add", "parameters": {{}}}}; {{"name": "get_weather", "parameters": {SPELLED}}} now',
        "I callnow",
        [("add", {}), WEATHER],
    ),
    (
        "llama_json",
        '<|python_tag|>brave_search.call(query="a, \\"b\\" (c)")',
        "",
        [("brave_search", {"query": 'a, "b" (c)'})],
    ),
    ("llama_pythonic", "[get_weather(city='Zürich {\"}\\\\ ]', days=[1, {'n': None}])]", "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}, "why": [1]}</tool_call>.\n', ".\n", [("add", {})]),
    ("llama_pythonic", '[add(a="x\\") ]")]', "", [("add", {"a": 'x") ]'})]),
    (
        "llama_pythonic",
        '<|python_start|>[add(), add(a=-1.5, b=true, c=("x", False))]<|python_end|>',
        "",
        [("add", {}), ("add", {"a": -1.5, "b": True, "c": ["x", False]})],
    ),
]
TEXTS = [
    "plain [text](link) {with} <marks> \n",
    '{"name": "unknown", "parameters": {}}',
    '{"answer": {"name": "x"}}',
    "<tool_call>\nnot JSON</tool_call>",
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "no object"}</tool_call>',
    r'<tool_call>{"name": "add", "arguments": "{\"a\": \"\ud83d\"}"}</tool_call>',
    '<tool_call>{"name": "add", "name": "add", "arguments": {}}</tool_call>',
    '{"name": "add", "par',
    "[TOOL_CALLS] sorry",
    "[TOOL_CALLS]unknown[ARGS]{}",
    "[add(a=__import__('os')), add(",
    "[add(a=1, a=2)]",
    "[unknown(a=1)]",
    "<tool_",
    " \n",
]


@pytest.mark.parametrize(("name", "text", "words", "calls"), CASES)
def test_calls(name: str, text: str, words: str, calls: list[tuple[str, Any]]) -> None:
    assert said(name, text) == (words, calls)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_stays_as_it_is(name: str, text: str) -> None:
    assert said(name, text) == (text, [])


def test_a_program_is_a_call_where_there_is_an_interpreter() -> None:
    names = ("code_interpreter", "brave_search")
    for program in ('print("a\\n")\n', "{1: 2}", "b = 1", "brave_search.call(x)", "a"):
        assert said("llama_json", f"<|python_tag|>{program}", names) == ("", [("code_interpreter", {"code": program})])
    assert said("llama_json", "<|python_tag|>print(1)") == ("<|python_tag|>print(1)", [])


def test_a_call_comes_before_its_arguments_are_complete() -> None:
    parser = FORMATS["hermes"].parser(NAMES)
    assert parser.feed('Yes.<tool_call>\n{"name": "add", "arguments": {"a') == [
        Text("Yes."),
        Call("add"),
        Arguments('{"a'),
    ]
    assert parser.feed('": 1') == [Arguments('": 1')]
    assert parser.feed("}") == [Arguments("}")]
    assert parser.feed("}\n</tool") == parser.feed("_call>\n") == parser.finish() == []


def test_a_call_that_breaks_off_stays_incomplete() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": 1'
    assert read("hermes", [text]) == [Call("add"), Arguments('{"a": 1')]
    assert read("hermes", [text + " oops"]) == [Call("add"), Arguments('{"a": 1 '), Text("oops")]


@pytest.mark.parametrize("name", ["hermes", "tool_calls", "llama_pythonic"])
def test_a_mark_behind_a_call_that_the_token_limit_cuts(name: str) -> None:
    """It is no text, wherever it is cut; other text that begins like it is."""
    call, end = {
        "hermes": ('<tool_call>{"name": "add", "arguments": {}}', "\n</tool_call>"),
        "tool_calls": ('[TOOL_CALLS] [{"name": "add", "arguments": {}}', "]"),
        "llama_pythonic": ("<|python_start|>[add()]", "<|python_end|>"),
    }[name]
    for cut in range(len(end) + 1):
        assert said(name, call + end[:cut]) == ("", [("add", {})]), end[:cut]
    if name == "hermes":
        assert said(name, call + "</tool!") == ("</tool!", [("add", {})])


PARTS = st.sampled_from(
    [part for _, text, _, _ in CASES for part in (text, text[: len(text) // 2], text[len(text) // 3 :])]
    + [*TEXTS, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "[", '"', " ", "\n", ";", "a"]
)


@given(st.sampled_from(sorted(FORMATS)), st.lists(PARTS, max_size=4).map("".join), st.data())
def test_any_cut_of_a_text_gives_the_same(name: str, text: str, data: Any) -> None:
    names = (*NAMES, *(["code_interpreter"] if data.draw(st.booleans()) else []))
    whole = read(name, [text], names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(name, pieces, names) == whole
    assert read(name, list(text), names) == whole


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def scanned(text: str) -> JsonObject:
    made, at = JsonObject(), 0
    while at < len(text) and made.state == "open":
        at += made.feed(text[at:])
    return made


@given(st.dictionaries(st.text(), JSON, max_size=4), st.sampled_from([None, 2]), st.booleans(), st.text(max_size=3))
def test_objects_of_json(value: dict[str, Any], indent: int | None, ascii: bool, behind: str) -> None:
    """An object that Python's own parser reads is one, ends where it ends, and has its members."""
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    made = scanned(text + behind)
    assert (made.state, made.text) == ("done", text)
    assert {key: json.loads(made.value(key) or "") for key in made.members} == value


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ('{"a": "b\n"}', "broken"),
        ('{"a": ' + "[" * 63 + "]" * 63 + "}", "done"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "broken"),
        ('{"a": ' + "1" * 400 + "}", "done"),
        ('{"a": ' + "1" * 401 + "}", "broken"),
    ],
)
def test_bounds_of_objects(text: str, state: str) -> None:
    assert scanned(text).state == state


@given(st.dictionaries(st.text(), JSON, max_size=3), st.data())
def test_what_is_no_json_breaks(value: dict[str, Any], data: Any) -> None:
    """With one character changed, it is an object exactly if it is one for Python's own parser."""
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from('"{}[]:,\\0-.eu\n atfn')) + text[at + 1 :]
    try:
        pairs = json.JSONDecoder(object_pairs_hook=list, parse_constant=lambda _: 1 / 0).raw_decode(changed)
    except (ValueError, ZeroDivisionError):
        pairs = None
    made = scanned(changed)
    if pairs is None or (changed[:1] == "{" and len({key for key, _ in pairs[0]}) < len(pairs[0])):
        assert made.state != "done"
    elif changed[:1] == "{":
        assert (made.state, len(made.text)) == ("done", pairs[1])


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,5}", fullmatch=True), JSON, max_size=3))
def test_literals(value: dict[str, Any]) -> None:
    """Both spellings of the same values: Python's own and JSON's."""
    assert keywords(", ".join(f"{key}={json.dumps(item)}" for key, item in value.items())) == value
    assert keywords(", ".join(f"{key}={item!r}" for key, item in value.items())) == value


@pytest.mark.parametrize(
    "text", ["a=b", "a=[1", "a", "a=1 2", "a={1: 2}", "a=f(1)", "a=1e999", "=1", "a='\\ud800'", "a='"]
)
def test_other_expressions_are_no_literals(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        keywords(text)
    with pytest.raises(ValueError, match="nested"):
        keywords("a=" + "[" * 100 + "]" * 100)


# --- What a model with this template writes

REAL = {
    "hermes": ('<tools>{{ tool | tojson }}</tools> ... <tool_call>\n{"name": <function-name>', "qwen3_style"),
    "tool_calls": ("[AVAILABLE_TOOLS] ... [TOOL_CALLS] [", "mistral_style"),
    "tool_calls_args": ("'[TOOL_CALLS]' + name + '[ARGS]'", None),
    "llama_json": ('<|eom_id|> ipython {"name": "f", "parameters": {}}', "llama31_style"),
    "llama_pythonic": ("ipython [func_name1(params_name1=params_value1)] <|python_start|>", None),
}


def test_templates_say_the_format() -> None:
    for name, (text, file) in REAL.items():
        assert format_of(text) is FORMATS[name]
        if file:
            assert format_of((TEMPLATES / f"{file}.jinja").read_text()) is FORMATS[name]
    assert format_of((TEMPLATES / "llama2_style.jinja").read_text()) is None
    assert format_of("<tool_call><function=f>") is None
    with pytest.raises(RequestError, match="no tool parser 'hermez'") as wrong:
        format_named("hermez")
    assert "did you mean hermes" in wrong.value.hint


# --- Grammars


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_chat_model(tmp_path_factory.mktemp("tools") / "tiny"))


POINT = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", 'R"o\\me']},
            "at": {"$ref": "#/$defs/point"},
            "now": {"type": "boolean"},
        },
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"point": POINT | {"additionalProperties": False}},
    },
    "add": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "string", "maxLength": 3}},
        "additionalProperties": False,
    },
}
TOOLS = [Tool(name, schema) for name, schema in SCHEMAS.items()]


def drawn(tokenizer: Tokenizer, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """A text that a grammar allows, of tokens drawn at random; None if it did not end."""
    random, size, end = np.random.default_rng(seed), tokenizer.vocab_size, 2
    matcher, ids = GrammarMatcher.of(grammar, tokenizer, size, (end,)), list[int]()
    for _ in range(most):
        mask = np.full((size + 31) // 32, 0xFFFFFFFF, np.uint32)
        matcher.mask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size])
        token = int(end if end in allowed and random.random() < 0.6 else random.choice(allowed))
        if token == end:
            break
        ids.append(token)
        matcher.accept(token)
        if matcher.ended:
            break
    else:
        return None
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_grammars_allow_calls_and_nothing_else(tokenizer: Tokenizer, name: str, several: bool) -> None:
    """Every text of a grammar is calls of tools that the request has, with arguments of their schemas."""
    called = list[int]()
    text = FORMATS[name].grammar(TOOLS, several, json.dumps)
    for seed in range(12):
        written = drawn(tokenizer, Grammar.lark(text), seed)
        if written is None:
            continue
        words, calls = said(name, written, [*SCHEMAS])
        assert (words, bool(calls)) == ("", True), written
        called.append(len(calls))
        for tool, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[tool])
    assert len(called) >= 6
    assert max(called) == 1 or several


@pytest.mark.parametrize("name", FORMATS)
def test_arguments_are_an_object_whatever_the_schema_says(tokenizer: Tokenizer, name: str) -> None:
    """A schema need not say its type, and allows any value then."""
    text = FORMATS[name].grammar([Tool("add", {"additionalProperties": False})], False, json.dumps)
    for seed in range(4):
        assert said(name, drawn(tokenizer, Grammar.lark(text), seed) or "") == ("", [("add", {})])


@pytest.mark.parametrize("schema", [{"properties": ["a"]}, {"properties": {"a": {}}, "required": 1}])
def test_parameters_that_are_no_schema(schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="the parameters of 'add' are no JSON schema") as wrong:
        FORMATS["llama_pythonic"].grammar([Tool("add", schema)], False, json.dumps)
    assert wrong.value.param == "tools"


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", ["hermes", "tool_calls", "tool_calls_args"])
def test_grammars_of_texts_with_calls(tokenizer: Tokenizer, name: str, control: bool) -> None:
    """Anything may be written, but for what is no call behind the mark of one, be it a control token or not."""
    format = FORMATS[name]
    opening = "<file_sep>" if control else format.opening

    def spelled(mark: str) -> str:
        return OPENING if mark == format.opening else json.dumps(mark)

    number = tokenizer.special_tokens["<file_sep>"]
    made = amid(
        format.grammar(TOOLS[1:], True, spelled), f"<[{number}]>" if control else json.dumps(opening), several=True
    )

    def allowed(text: str) -> bool:
        matcher = GrammarMatcher.of(Grammar.lark(made), tokenizer, tokenizer.vocab_size, (2,))
        mask = np.zeros((tokenizer.vocab_size + 31) // 32, np.uint32)
        for token in [*tokenizer.encode(text, add_special_tokens=False), 2]:
            mask[:] = 0xFFFFFFFF
            matcher.mask(mask)
            if not mask[token // 32] >> (token % 32) & 1:
                return False
            matcher.accept(token)
        return True

    call = {
        "hermes": f'{opening}\n{{"name": "add", "arguments": {{}}}}\n</tool_call>',
        "tool_calls": f'{opening}[{{"name": "add", "arguments": {{}}}}]',
        "tool_calls_args": f"{opening}add[ARGS]{{}}",
    }[name]
    for text in ("", "Well.", call, f"Well.\n{call}", f"{call} and\n{call} more", "a < b <tool [TOOL {"):
        assert allowed(text), text
    for text in (f"{opening} oops", f"Well. {call} {opening}x", f"{call[:-3]}x"):
        assert not allowed(text), text


@pytest.mark.parametrize("mark", ["</think>", "<file_sep>"])
@pytest.mark.parametrize("inside", [False, True])
def test_grammars_of_calls_beside_others(tokenizer: Tokenizer, inside: bool, mark: str) -> None:
    """A schema may be met instead of a call, and reasoning may come first; its marks may be control tokens."""

    def spelled(text: str) -> str:
        number = tokenizer.special_tokens.get(text)
        return json.dumps(text) if number is None else f"<[{number}]>"

    begin = "<think>" if mark == "</think>" else "<filename>"
    calls = FORMATS["hermes"].grammar(TOOLS[1:], False, json.dumps)
    options: dict[str, Any] = {"reasoning": (begin, mark), "inside": inside, "spelled": spelled}
    grammar = Grammar.lark(answered(calls=calls, answer=json.dumps(SCHEMAS["get_weather"]), **options))

    def allowed(text: str) -> bool:
        matcher = GrammarMatcher.of(grammar, tokenizer, tokenizer.vocab_size, (2,))
        for token in tokenizer.encode(text, add_special_tokens=False):
            matcher.accept(token)
        return matcher.ended

    call, answer = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', '{"at":{"x":1}}'
    before = "" if inside else begin
    assert allowed(f"{before}so {{}}\n{mark}\n\n{call}")
    assert allowed(f"{before}so{mark}{answer}")
    assert not allowed(f"{before}so{mark}{answer}{call}")
    assert allowed(call) is allowed(answer) is not inside


def test_a_control_token_is_spelled_as_one(tokenizer: Tokenizer) -> None:
    control = tokenizer.special_tokens["<file_sep>"]
    grammar = FORMATS["tool_calls"].grammar(TOOLS[1:], False, lambda _: f"<[{control}]>")
    written = drawn(tokenizer, Grammar.lark(grammar), 0)
    assert written is not None
    assert written.replace(" ", "").startswith('<file_sep>[{"name":"add","arguments":{')


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ([{"type": "custom"}], "tool 0 is not a function"),
        ([{"type": "function", "function": {"name": 'a"\n'}}], "tool 0 has the name"),
        ([{"type": "function", "function": {"name": "a"}}] * 2, "two tools are called 'a'"),
        (
            [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}],
            "not a schema of an object",
        ),
        ([{"type": "function", "function": {"name": "a", "parameters": [1]}}], "not a schema of an object"),
    ],
)
def test_tools_that_are_none(tools: list[Any], match: str) -> None:
    with pytest.raises(RequestError, match=match) as wrong:
        tools_of(tools)
    assert wrong.value.param == "tools"


# --- Reasoning


MARKS = ("<think>", "</think>")


def thought(pieces: Sequence[str], prompt: str = "") -> list[Delta]:
    place = place_of(MARKS, prompt)
    if place == "behind":
        return [Text("".join(pieces))]
    parser = ReasoningParser(MARKS, inside=place == "inside")
    return joined([*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()])


def test_reasoning() -> None:
    whole = [Reasoning("so\n so"), Text("yes <think>x</think>")]
    assert thought(["<think>\nso\n so\n</think>\n\nyes <think>x</think>"]) == whole
    assert thought(["so\n so\n</think>\n\nyes <think>x</think>"], prompt="<think>\n") == whole
    assert thought(["so</think>"], prompt="<think>\n\n</think>\n\n") == [Text("so</think>")]
    assert thought(["<think></think>ok"]) == [Text("ok")]
    assert thought(["<think>cut </thi"]) == [Reasoning("cut </thi")]
    assert thought([" plain"]) == [Text(" plain")]
    assert (place_of(MARKS, "<think>x"), place_of(None, "<think>")) == ("before", "behind")
    assert reasoning_of((TEMPLATES / "qwen3_style.jinja").read_text()) == ("<think>", "</think>")
    assert reasoning_of((TEMPLATES / "llama31_style.jinja").read_text()) is None


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", " ", "\n", "ab"]), max_size=8), st.booleans())
def test_reasoning_however_it_is_cut(parts: list[str], inside: bool) -> None:
    prompt = "<think>" if inside else ""
    whole = thought(["".join(parts)], prompt)
    assert thought(parts, prompt) == thought(list("".join(parts)), prompt) == whole
