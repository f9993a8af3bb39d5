"""Conversations: sent, stopped, edited, branched, continued, kept, named, deleted, exported, imported."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from browser.reader import KEY, asked, expect
from llama_jax.cli.chat_conversation import Conversation
from llama_jax.cli.chat_files import load_conversation, save_conversation

pytestmark = pytest.mark.browser


def test_an_answer_is_shown_counted_and_kept(visit: Any, url: str) -> None:
    reader = visit(temperature=0, system="Be brief.", max_tokens=120)
    began = time.perf_counter()
    text = reader.ask("Hello")
    elapsed = time.perf_counter() - began
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 120}
    direct = json.loads(asked(url, "/v1/chat/completions", body))
    said = direct["choices"][0]["message"]["content"]
    (chat,) = reader.kept()
    assert [message["text"] for message in chat["messages"]] == ["Hello", said]
    assert text.split() == said.split()
    stats = chat["messages"][1]["stats"]
    assert (stats["written"], stats["used"]) == (120, direct["usage"]["total_tokens"])
    rate = stats.get("rate", math.inf)  # a busy machine may hand over all tokens at once, which have no speed then
    assert 0 < stats["firstMs"] / 1e3 + 119 / rate < elapsed
    facts = reader.answers.locator(".facts").inner_text()
    assert facts.startswith(f"{rate:.1f} tokens/s") == ("rate" in stats)
    assert re.fullmatch(r"([\d.]+ tokens/s · )?first after [\d.]+ m?s · 120 tokens · cut at the limit of tokens", facts)
    meter = reader.page.get_by_role("meter", name="Context")
    assert meter.get_attribute("aria-valuenow") == str(stats["used"])
    assert meter.get_attribute("aria-valuemax") == "2048"
    reader.page.reload()
    assert reader.text() == text
    # A second turn finds the first one's pages.
    reader.ask("word " * 40, 2)
    reader.ask("more", 3)
    assert reader.kept()[0]["messages"][-1]["stats"]["cached"] > 0
    assert "cached" in meter.get_attribute("aria-valuetext")


def test_stop(visit: Any, url: str) -> None:
    reader = visit(format="regex", regex="(word ){700}", max_tokens=1500)
    stops = (lambda: reader.page.keyboard.press("Escape"), lambda: reader.button("Stop").click())
    for i, stop in enumerate(stops):
        reader.field.fill("Go on for long")
        reader.field.press("Enter")
        expect(reader.answers).to_have_count(i + 1)
        reader.answers.last.locator(".markdown > div").first.wait_for()
        stop()
        reader.button("Send").wait_for()
        expect(reader.answers.last.locator(".facts")).to_contain_text("stopped")
    text = reader.text()
    expect(reader.page.get_by_role("meter")).to_be_visible()  # counted, although the server did not
    for _ in range(100):
        if 'requests_running{model_name="tiny"} 0.0' in asked(url, "/metrics"):
            break
        reader.page.wait_for_timeout(50)
    else:
        raise AssertionError("a stopped request runs on")
    reader.page.reload()
    assert reader.text() == text


def test_branches(visit: Any) -> None:
    reader = visit(format="regex", regex="[a-z]{30}", seed=None, max_tokens=40)
    first = reader.ask("One")
    reader.questions.get_by_role("button", name="Edit").click()
    reader.page.get_by_role("textbox", name="Text of the message").fill("Two")
    reader.page.keyboard.press("Control+Enter")
    expect(reader.questions).to_contain_text("Two")
    reader.answered()
    reader.answers.get_by_role("button", name="Regenerate").click()
    expect(reader.answers.locator(".branches")).to_contain_text("2/2")
    again = reader.answered()
    reader.page.reload()
    assert reader.text() == again
    reader.questions.get_by_role("button", name="Previous branch").click()
    assert (reader.questions.locator(".said").inner_text(), reader.text()) == ("One", first)
    reader.questions.get_by_role("button", name="Next branch").click()
    assert reader.text() == again
    reader.answers.get_by_role("button", name="Previous branch").click()
    assert reader.text() != again
    (chat,) = reader.kept()
    assert len(chat["messages"]) == 5
    # What is sent is the branch that is shown.
    with reader.page.expect_request("**/v1/chat/completions") as sent:
        reader.ask("Three", 2)
    assert [m["content"] for m in sent.value.post_data_json["messages"]][::2] == ["Two", "Three"]


def test_continue(visit: Any, url: str) -> None:
    reader = visit(max_tokens=8)
    reader.ask("Count")
    before = reader.kept()[0]["messages"][1]["text"]
    with reader.page.expect_request("**/v1/completions") as sent:
        reader.answers.get_by_role("button", name="Continue").click()
    reader.answered()
    answer = reader.kept()[0]["messages"][1]
    after = answer["text"]
    assert answer["stats"]["written"] == 16
    assert after.startswith(before)
    assert len(after) > len(before)
    prompt = json.loads(asked(url, "/detokenize", {"tokens": sent.value.post_data_json["prompt"]}))["prompt"]
    assert prompt == f"<|im_start|>user\nCount<|im_end|>\n<|im_start|>assistant\n{before}"


def test_edited_answer_goes_on(visit: Any) -> None:
    reader = visit()
    reader.ask("Say")
    reader.answers.get_by_role("button", name="Edit").click()
    reader.page.get_by_role("textbox", name="Text of the message").fill("My own words")
    reader.button("Save").click()
    reader.answers.get_by_role("button", name="Continue").click()
    assert reader.answered().startswith("My own words")


def test_conversations_are_found_named_and_deleted(visit: Any) -> None:
    reader = visit(max_tokens=2)
    page = reader.page
    for text in ("About apples", "About pears"):
        reader.button("New conversation").click()
        reader.ask(text)
    titles = page.locator(".entry .title")
    expect(titles).to_have_text(["About pears", "About apples"])
    page.keyboard.press("Control+k")
    page.keyboard.type("APPLE")
    expect(titles).to_have_text(["About apples"])
    titles.first.click()
    expect(reader.questions.locator(".said")).to_have_text("About apples")
    for name, ending in (("Not this", "Escape"), ("Fruit", "Enter")):
        reader.button("Rename About apples").click()
        page.get_by_role("textbox", name="Name of the conversation").fill(name)
        page.keyboard.press(ending)
    page.get_by_role("searchbox").fill("")
    expect(titles).to_have_count(2)
    page.go_back()
    expect(reader.questions.locator(".said")).to_have_text("About pears")
    page.locator(".entry", has_text="Fruit").hover()
    reader.button("Delete Fruit").click()
    reader.button("Delete").click()
    expect(titles).to_have_count(1)
    assert [chat["title"] for chat in reader.kept()] == ["About pears"]


def test_export_and_import(visit: Any, tmp_path: Path) -> None:
    reader = visit(probabilities=True, max_tokens=3)
    reader.ask("Keep this")
    reader.answers.get_by_role("button", name="Regenerate").click()
    reader.answered()
    with reader.page.expect_download() as download:
        reader.button("Export all conversations").click()
    file = tmp_path / "all.json"
    download.value.save_as(file)
    assert KEY not in file.read_text()
    other = visit()

    def upload(text: str) -> None:
        (tmp_path / "given.json").write_text(text)
        other.page.get_by_label("File of conversations").set_input_files(tmp_path / "given.json")

    for wrong, message in (
        ("{", "no JSON"),
        ('{"format": "other"}', "not exported by this page"),
        (file.read_text().replace('"role": "user"', '"role": "admin"'), "message 0 of conversation 0"),
        (file.read_text().replace('"parent": null', '"parent": "none"'), "no place in the tree"),
    ):
        upload(wrong)
        expect(other.page.get_by_role("alert")).to_contain_text(message)
    other.button("Dismiss").click()
    expect(other.page.get_by_role("alert")).to_have_count(0)
    assert other.kept() == []
    upload(file.read_text())
    expect(other.answers.locator(".branches")).to_contain_text("2/2")
    (ours,), (theirs,) = reader.kept(), other.kept()
    assert {**theirs, "id": 0} == {**ours, "id": 0}


def test_files_of_the_chat_in_the_terminal(visit: Any, tmp_path: Path) -> None:
    """The page reads what /save has written, and /load reads what the page exports: to the same conversation."""
    talk = Conversation(system="Be kind.").asked("Keep").answered("first").asked("this").answered("second")
    talk = talk.without_last_answer().answered("third").at(talk.messages)
    save_conversation(talk, tmp_path / "talk.json")
    reader = visit()
    reader.page.get_by_label("File of conversations").set_input_files(tmp_path / "talk.json")
    expect(reader.answers.locator(".branches")).to_contain_text("1/2")
    expect(reader.answers.last).to_contain_text("second")
    expect(reader.page.locator(".system")).to_contain_text("Be kind.")
    with reader.page.expect_download() as download:
        reader.button("Export all conversations").click()
    download.value.save_as(tmp_path / "page.json")
    assert load_conversation(tmp_path / "page.json") == talk
    save_conversation(Conversation(talk.messages, talk.system), tmp_path / "list.json")
    other = visit()
    other.page.get_by_label("File of conversations").set_input_files(tmp_path / "list.json")
    expect(other.answers).to_have_count(2)
    (chat,) = other.kept()
    assert [(m["role"], m["text"]) for m in chat["messages"]] == [(m["role"], m["content"]) for m in talk.messages]
    assert (chat["title"], chat["settings"]["system"]) == ("Keep", "Be kind.")
    (tmp_path / "list.json").write_text('[{"role": "user"}, 3]')
    other.page.get_by_label("File of conversations").set_input_files(tmp_path / "list.json")
    expect(other.page.get_by_role("alert")).to_contain_text("something wrong with message 1")
