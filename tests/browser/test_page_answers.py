"""Answers: markdown, nothing of which is HTML of the model; probabilities, forms and presets; errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from browser.reader import KEY, MARKDOWN, asked, exactly, expect

pytestmark = pytest.mark.browser

PAYLOADS = """<script>window.hit=1</script>
<img src=x onerror="window.hit=1">

<svg><script>window.hit=1</script></svg>

<iframe srcdoc="<script>parent.hit=1</script>"></iframe>

[a](javascript:window.hit=1) [b](data:text/html,x) ![c](https://evil.example/?q=1)

<a href="javascript:window.hit=1" onclick="window.hit=1">d</a>

<math><mtext><table><mglyph><style><img src=x onerror="window.hit=1">

$\\href{javascript:window.hit=1}{x}$ $\\htmlClass{y}{x}$

```html" onmouseover="window.hit=1
<img src=x onerror="window.hit=1">
```
"""


def test_markdown(visit: Any) -> None:
    reader = visit(**exactly(MARKDOWN), max_tokens=500, browser={"permissions": ["clipboard-read", "clipboard-write"]})
    reader.ask("Format")
    answer = reader.answers.locator(".markdown")
    assert answer.locator("h1").inner_text() == "Title"
    assert answer.locator("strong").inner_text() == "bold"
    link = answer.locator("a")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == (
        "https://example.org/",
        "noopener noreferrer nofollow",
    )
    expect(answer.locator(".hljs-keyword").first).to_have_text("def")
    expect(answer.locator("math msup")).to_have_count(1)
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    reader.button("Copy code").click()
    expect(reader.page.locator("[data-copy]")).to_have_text("Copied")
    assert reader.page.evaluate("navigator.clipboard.readText()") == "def f(x):\n    return x + 1"
    reader.answers.get_by_role("button", name="Copy", exact=True).click()
    expect(reader.page.get_by_role("status").last).to_have_text("Copied")
    assert reader.page.evaluate("navigator.clipboard.readText()") == MARKDOWN


@pytest.mark.parametrize("way", ["streamed", "imported"])
def test_nothing_that_a_model_says_is_html(visit: Any, tmp_path: Path, way: str) -> None:
    reader = visit(**exactly(PAYLOADS), max_tokens=1500)
    dialogs: list[Any] = []
    reader.page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    if way == "streamed":
        reader.ask(PAYLOADS)
        assert reader.kept()[0]["messages"][1]["text"] == PAYLOADS
    else:
        said = {"id": "a", "parent": None, "role": "assistant", "text": PAYLOADS, "reasoning": PAYLOADS}
        chat = {"title": PAYLOADS, "messages": [said], "settings": {"system": PAYLOADS}}
        file = tmp_path / "payloads.json"
        file.write_text(json.dumps({"format": "llama_jax conversations", "version": 1, "conversations": [chat]}))
        reader.page.get_by_label("File of conversations").set_input_files(file)
        reader.page.locator("summary", has_text="Reasoning").click()
    expect(reader.answers.locator(".markdown").last).to_contain_text("<script>window.hit=1</script>")
    expect(reader.page.locator(".code").last).to_be_visible()
    reader.page.wait_for_timeout(300)  # for what would load
    article = reader.answers.last
    harmful = "script, iframe, img, object, embed, form, style, link, base, mglyph, [style*=url], [id], [name]"
    assert article.locator(harmful).count() == 0
    attributes = article.evaluate("e => [...e.querySelectorAll('*')].flatMap(x => x.getAttributeNames())")
    assert [name for name in attributes if name.startswith("on")] == []
    hrefs = article.evaluate("e => [...e.querySelectorAll('[href]')].map(x => x.getAttribute('href'))")
    assert set(hrefs) == {"https://evil.example/?q=1"}  # a picture is a link, which nobody has followed
    assert reader.page.evaluate("window.hit") is None
    assert dialogs == []


def test_probabilities(visit: Any, url: str) -> None:
    reader = visit(temperature=0, probabilities=True, max_tokens=6)
    reader.ask("Likely")
    body = {"messages": [{"role": "user", "content": "Likely"}], "temperature": 0, "max_tokens": 6}
    direct = json.loads(asked(url, "/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 5}))
    content = direct["choices"][0]["logprobs"]["content"]
    reader.answers.get_by_role("button", name="Token probabilities").click()
    tokens = reader.page.locator(".token")
    assert tokens.all_text_contents() == [token["token"] for token in content]
    facts = reader.page.locator(".token-facts")

    def shares(i: int) -> list[float]:
        wanted = [content[i], *(t for t in content[i]["top_logprobs"] if t["token"] != content[i]["token"])]
        expect(facts.locator("dd")).to_have_count(len(wanted))
        assert [100 * math.exp(t["logprob"]) for t in wanted] == pytest.approx(
            [float(text.strip("<% ")) for text in facts.locator("dd").all_inner_texts()], abs=0.5
        )

    tokens.nth(3).hover()
    shares(3)
    reader.page.mouse.move(0, 0)
    reader.page.get_by_role("group", name="Tokens").focus()
    for i in range(2):
        reader.page.keyboard.press("ArrowRight")
        shares(i)


def test_json_of_a_schema(visit: Any) -> None:
    reader = visit(max_tokens=200)
    reader.page.keyboard.press("Control+,")
    reader.page.get_by_label("Form of answers").select_option("JSON of a schema")
    schema = reader.page.get_by_label("JSON schema")
    schema.fill('{"type": ')
    assert schema.get_attribute("aria-invalid") == "true"
    number = {"type": "integer", "minimum": 0, "maximum": 9}
    form = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    schema.fill(json.dumps(form))
    assert schema.get_attribute("aria-invalid") == "false"
    reader.page.keyboard.press("Escape")
    reader.ask("A number")
    assert json.loads(reader.kept()[0]["messages"][1]["text"])["n"] in range(10)


def test_presets(visit: Any) -> None:
    reader = visit()
    page = reader.page
    page.keyboard.press("Control+,")
    page.get_by_label("Preset").select_option("Precise")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Keep these settings as").fill("Short")
    reader.button("Keep").click()
    page.get_by_label("Preset").select_option("Creative")
    assert page.get_by_label("Temperature").input_value() == "1.1"
    page.get_by_label("Preset").select_option("Short")
    page.keyboard.press("Escape")
    with page.expect_request("**/v1/chat/completions") as sent:
        reader.ask("Go")
    assert {name: sent.value.post_data_json[name] for name in ("temperature", "max_tokens")} == {
        "temperature": 0,
        "max_tokens": 5,
    }
    assert "top_p" not in sent.value.post_data_json


def test_the_key_is_asked_for(visit: Any) -> None:
    reader = visit(key="")
    page = reader.page
    dialog = page.get_by_role("dialog", name="Settings")
    for key in ("wrong", KEY):
        dialog.wait_for()
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
    expect(page.get_by_role("combobox", name="Model")).to_have_value("tiny")
    expect(dialog).to_have_count(0)
    assert page.get_by_role("alert").count() == 0
    reader.ask("Hello")
    page.evaluate("sessionStorage.clear()")  # as if the server's key had changed
    reader.field.fill("Hello?")
    reader.field.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Enter the server's key in the settings.")
    reader.button("Enter the key").click()
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    reader.button("Answer").click()
    reader.answered(2)
    assert KEY not in page.url
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")  # unless its owner wants that


def test_errors_say_what_to_do(visit: Any) -> None:
    reader = visit()
    page, problem = reader.page, reader.page.get_by_role("alert")
    error = {"error": {"message": "too many requests wait", "type": "rate_limit_error", "param": None, "code": "x"}}
    path = "**/v1/chat/completions"
    page.route(path, lambda route: route.fulfill(status=429, json=error, headers={"retry-after": "1"}))
    reader.field.fill("Hello")
    reader.field.press("Enter")
    expect(problem).to_contain_text("too many requests wait")
    expect(reader.button("Try again in 1 s")).to_be_disabled()
    expect(reader.answers).to_have_count(0)
    page.unroute(path)
    reader.button("Try again").click()
    reader.answered()
    expect(problem).to_have_count(0)
    # An answer that breaks off keeps what has come.
    part = {"choices": [{"index": 0, "delta": {"content": "Some of it"}, "finish_reason": None}]}
    events = "".join(f"data: {json.dumps(data)}\n\n" for data in (part, {"error": {"message": "broke", "code": "y"}}))
    page.route(path, lambda route: route.fulfill(content_type="text/event-stream", body=f"{events}data: [DONE]\n\n"))
    reader.field.fill("And now")
    reader.field.press("Enter")
    expect(problem).to_contain_text("broke")
    assert reader.text() == "Some of it"
    page.unroute(path)
    page.route(path, lambda route: route.abort())
    reader.answers.last.get_by_role("button", name="Regenerate").click()
    expect(problem).to_contain_text("cannot be reached")
    page.unroute(path)
    # The server's own words for a value that is out of range.
    page.keyboard.press("Control+,")
    page.get_by_label("Temperature").fill("-1")
    page.keyboard.press("Escape")
    reader.button("Try again").click()
    expect(problem).to_contain_text("temperature")


def test_tools(visit: Any) -> None:
    """Calls come in pieces, as OpenAI's clients get them; the results go back with the calls that they answer."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    reader = visit(tools=json.dumps(tools))
    page, path = reader.page, "**/v1/chat/completions"
    pieces: list[dict[str, Any]] = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city": "<b>Par'}},
        {"index": 0, "function": {"arguments": 'is"}'}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ]
    choices = [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None} for piece in pieces]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls"})
    events = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices) + "data: [DONE]\n\n"
    page.route(path, lambda route: route.fulfill(content_type="text/event-stream", body=events))
    with page.expect_request(path) as first:
        reader.field.fill("How is the weather?")
        reader.field.press("Enter")
    assert first.value.post_data_json["tools"] == tools
    expect(page.locator(".call pre").first).to_have_text('{\n  "city": "<b>Paris"\n}')
    page.get_by_label("Result of weather").first.fill("rain")
    page.get_by_label("Result of weather").last.fill("sun")
    page.unroute(path)
    answer = {"index": 0, "delta": {"content": "Go to Rome."}, "finish_reason": "stop"}
    events = f"data: {json.dumps({'choices': [answer]})}\n\ndata: [DONE]\n\n"
    page.route(path, lambda route: route.fulfill(content_type="text/event-stream", body=events))
    with page.expect_request(path) as second:
        reader.button("Send results").click()
    assert reader.answered(2) == "Go to Rome."
    called = [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "<b>Paris"}'}},
        {"id": "b", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    ]
    assert second.value.post_data_json["messages"] == [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": called},
        {"role": "tool", "content": "rain", "tool_call_id": "a"},
        {"role": "tool", "content": "sun", "tool_call_id": "b"},
    ]
    page.reload()
    expect(page.get_by_role("article", name="Tool")).to_have_count(2)


def test_the_policy_is_in_force(visit: Any) -> None:
    """The page's content security policy alone blocks what the sanitiser removes."""
    reader = visit()
    reader.expected = ("",)
    acts = [
        'document.body.innerHTML = "<b>"',
        'document.createElement("script").text = "1"',
        'document.createElement("a").setAttribute("onclick", "1")',
        'document.createElement("iframe").srcdoc = "<b>"',
        'trustedTypes.createPolicy("own", {})',
    ]
    for act in acts:
        script = f"() => {{ try {{ {act} }} catch (error) {{ return error.name }} }}"
        assert reader.page.evaluate(script) == "TypeError", act
    reader.page.evaluate("fetch('https://evil.example/').catch(() => 0)")
    reader.page.wait_for_function("window.violated === 'connect-src'")
    reader.requested.clear()  # of which the browser has sent none
