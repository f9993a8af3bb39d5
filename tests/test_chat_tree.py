"""Conversations with branches, and their files, which the server's page reads and writes too."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.cli.chat_conversation import Conversation
from llama_jax.cli.chat_files import load_conversation, save_conversation
from llama_jax.cli.chat_views import branch_lines, logprob_lines, token_lines
from llama_jax.cli.inputs import read_messages
from llama_jax.errors import RequestError, StorageError

STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "edit", "retry", "undo", "go", "trim"]), st.integers(0, 3)), max_size=14
)


def stepped(steps: list[tuple[str, int]]) -> Conversation:
    """A conversation after some steps; equal numbers say the same."""
    c = Conversation(system="s")
    for step, n in steps:
        if step == "ask":
            c = c.asked(f"q{n}").answered(f"a{n}")
        elif step == "go":
            c = c.at(c.branches[n % len(c.branches)])
        elif c.turns and step == "edit":
            c = c.before_last_turn().asked(f"q{n}").answered(f"a{n}")
        elif c.turns and step == "retry":
            c = c.without_last_answer().answered(f"a{n}")
        elif c.turns and step == "undo":
            c = c.without_last_turn()
        elif c.turns:
            c = c.without_first_turns(1)
    return c


def said(c: Conversation) -> list[str]:
    return [m["content"] for m in c.messages]


def test_a_conversation_changes() -> None:
    c = Conversation().asked("a").answered("1").asked("b").answered("2").with_system("s")
    assert [m["content"] for m in c.all_messages] == ["s", "a", "1", "b", "2"]
    assert said(c.without_last_turn()) == said(c.before_last_turn()) == ["a", "1"]
    assert said(c.without_last_answer()) == ["a", "1", "b"]
    assert said(c.without_first_turns(1)) == ["b", "2"]
    assert c.cleared() == Conversation(system="s")
    assert c.with_system(None).all_messages == list(c.messages)
    with pytest.raises(RequestError, match="again"):
        Conversation().without_last_answer()


def test_what_was_said_before_stays_in_branches() -> None:
    c = Conversation().asked("a").answered("1").asked("b").answered("2")
    retried = c.without_last_answer().answered("3")
    edited = retried.before_last_turn().asked("c").answered("4")
    assert [[m["content"] for m in path] for path in edited.branches] == [
        ["a", "1", "b", "2"],
        ["a", "1", "b", "3"],
        ["a", "1", "c", "4"],
    ]
    assert edited.branch == 2
    assert said(edited.at(edited.branches[0]).asked("d")) == ["a", "1", "b", "2", "d"]
    assert len(edited.at(edited.branches[0]).asked("d").branches) == 3
    # What is undone is gone, with its other answers; what was said in its place is not.
    undone = edited.at(retried.messages).without_last_turn()
    assert (said(undone), undone.branch, undone.branches) == (["a", "1"], None, (edited.messages,))
    # The oldest turn is dropped wherever it was.
    assert [[m["content"] for m in path] for path in edited.without_first_turns(1).branches] == [
        ["b", "2"],
        ["b", "3"],
        ["c", "4"],
    ]


@given(STEPS)
def test_branches_are_the_ends_of_a_tree(steps: list[tuple[str, int]]) -> None:
    c = stepped(steps)
    assert any(path[: len(c.messages)] == c.messages for path in c.branches)
    for i, path in enumerate(c.branches):
        assert not any(other[: len(path)] == path for j, other in enumerate(c.branches) if i != j)
    assert c.at(c.branches[0]).at(c.messages) == c


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=9))
def test_turns_hold_every_message_once(roles: list[str]) -> None:
    c = Conversation(tuple({"role": r, "content": str(i)} for i, r in enumerate(roles)))
    assert [m for turn in c.turns for m in turn] == list(c.messages)
    for n in range(len(c.turns) + 1):
        kept = c.without_first_turns(n).messages
        assert kept == c.messages[len(c.messages) - len(kept) :]
        assert not n or not kept or kept[0]["role"] == "user"


@given(STEPS)
def test_a_file_holds_it_all(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:
    path = tmp_path_factory.mktemp("talk") / "talk.json"
    c = stepped(steps)
    save_conversation(c, path)
    assert load_conversation(path) == c
    assert read_messages(str(path)) == c.all_messages
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert isinstance(json.loads(path.read_text()), list) == (c.branches == (c.messages,))


def test_what_other_programs_know_of_messages_stays(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
    }
    c = Conversation(({"role": "user", "content": "x"}, call, {"role": "tool", "content": "y", "tool_call_id": "1"}))
    for each in (c, c.before_last_turn().asked("z")):
        save_conversation(each, path)
        assert load_conversation(path) == each


def page(*messages: Any, **more: Any) -> dict[str, Any]:
    one = {"title": "t", "settings": {"system": "Be brief."}, "messages": messages} | more
    return {"format": "llama_jax conversations", "version": 1, "conversations": [one]}


def test_the_page_exports(tmp_path: Path) -> None:
    """As in transfer.ts; the newest of several siblings is shown unless another is named."""
    path = tmp_path / "page.json"
    stats = {"firstMs": 3, "used": 9}
    call = {"id": "c1", "name": "f", "arguments": '{"a": 1}'}
    messages = [
        {"id": "u", "parent": None, "role": "user", "text": "q", "created": 1},
        {"id": "a", "parent": "u", "role": "assistant", "text": "old", "finish": "stop", "stats": stats, "model": "m"},
        {"id": "b", "parent": "u", "role": "assistant", "text": "new", "calls": [call]},
        {"id": "t", "parent": "b", "role": "tool", "text": "result", "call": "c1"},
    ]
    path.write_text(json.dumps(page(*messages, shown={"": "u", "u": "a"})))
    c = load_conversation(path)
    assert said(c) == ["q", "old"]
    assert c.system == "Be brief."
    assert c.branches[1][1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]
    assert c.branches[1][2] == {"role": "tool", "content": "result", "tool_call_id": "c1"}
    path.write_text(json.dumps(page(*messages)))
    assert said(load_conversation(path)) == ["q", "new", "result"]
    assert [m["content"] for m in read_messages(str(path))] == ["Be brief.", "q", "new", "result"]


U = {"id": "u", "parent": None, "role": "user", "text": "q"}


@pytest.mark.parametrize(
    "bad",
    [
        page(U) | {"version": 2},
        page(U) | {"conversations": []},
        page(U) | {"conversations": page(U)["conversations"] * 2},
        page(U, U),
        page(U | {"parent": "x"}),
        page(U | {"text": 3}),
        page(U | {"role": "usr"}),
        page(U | {"calls": [{}]}),
        page("x"),
        page(U, shown=3),
        page(U, settings=[]),
    ],
)
def test_wrong_files_of_the_page(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "page.json"
    path.write_text(json.dumps(bad))
    with pytest.raises(RequestError) as caught:
        load_conversation(path)
    assert caught.value.hint
    with pytest.raises(StorageError, match="not replaced"):
        save_conversation(Conversation().asked("x"), path)


def test_lists() -> None:
    c = Conversation().asked("a " * 40).answered("1").asked("b").answered("2")
    c = c.without_last_answer().answered("3")
    assert [line.split() for line in branch_lines(c)] == [
        ["1", "4", "messages", "from", "message", "4", "assistant:", "2"],
        ["*", "2", "4", "messages", "shown", "assistant:", "3"],
    ]
    undone = c.at(c.messages[:2])
    assert all("from message 3" in line and "user: b" in line for line in branch_lines(undone))
    lines = token_lines(c.all_messages, [30, None, 41, 50], 200)
    assert [line.split()[2] for line in lines[:4]] == ["30", "?", "11", "9"]
    assert max(map(len, lines)) < 80
    assert lines[4] == "context: 50 of 200 tokens (25 %)"
    assert token_lines([], [], None) == ["context: 0 tokens"]
    top = [{"token": "a", "logprob": -0.6931472}, {"token": "\n", "logprob": -1.3862944}]
    tokens = [{**top[0], "top_logprobs": top}, {"token": "é", "logprob": -9999.0, "top_logprobs": []}]
    assert [line.rstrip() for line in logprob_lines(tokens, 99)] == [
        ' 50.0 %  ##...  "a"  "\\n" 25.0 %',
        '  0.0 %  .....  "é"',
    ]
