"""Streams of an engine's callers: pieces not yet taken are merged; nothing is lost or reordered."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import EngineFailed
from llama_jax.generation.outputs import RequestOutput, Timing, TokenLogprob
from llama_jax.generation.streams import Piece, Request, Stream, deliver

OUTPUT = RequestOutput((1,), (), Timing(0.0, 0.0, 0.0))


def stream(loop: Any = None) -> Stream:
    return Stream(cast(Any, None), Request("Hi"), True, loop or asyncio.get_running_loop())


def piece(index: int, number: int, **more: Any) -> Piece:
    return Piece(index, f"<{number}>", (number,), (TokenLogprob(number, -1.0, {}),), **more)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).flatmap(
        lambda indices: st.tuples(st.just(indices), st.lists(st.booleans(), min_size=12, max_size=12))
    )
)
def test_pieces_become_larger_and_no_other(case: tuple[list[int], list[bool]]) -> None:
    """However late they are taken: the text, tokens and log-probabilities of each continuation are the same, its reason
    comes with its last, and the output of the request behind all others."""
    indices, takes = case

    async def run() -> list[Piece]:
        made, taken = stream(), []
        for number, (index, take) in enumerate(zip(indices, takes, strict=False)):
            last = index not in indices[number + 1 :]
            output = OUTPUT if number == len(indices) - 1 else None
            made.put(piece(index, number, finish_reason="stop" if last else None, output=output))
            if take:
                taken.append(await made.take())
        while not (taken and taken[-1].output):
            taken.append(await asyncio.wait_for(made.take(), 5))
        return taken

    taken = asyncio.run(run())
    for index in set(indices):
        numbers = [number for number, of in enumerate(indices) if of == index]
        mine = [one for one in taken if one.index == index]
        assert "".join(one.text for one in mine) == "".join(f"<{number}>" for number in numbers)
        assert [token for one in mine for token in one.token_ids] == numbers
        assert [of.token_id for one in mine for of in one.logprobs or ()] == numbers
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert [one.output for one in taken] == [None] * (len(taken) - 1) + [OUTPUT]


def test_an_error_comes_behind_what_was_there() -> None:
    async def run() -> None:
        made = stream()
        made.put(piece(0, 1))
        made.put(EngineFailed("it is gone", hint=""))
        assert (await made.take()).text == "<1>"
        with pytest.raises(EngineFailed, match="gone"):
            await made.take()

    asyncio.run(run())


def test_a_loop_is_woken_once_for_all_of_its_pieces() -> None:
    class Loop:
        def __init__(self, *, closed: bool = False) -> None:
            self.calls, self.closed = list[Any](), closed

        def call_soon_threadsafe(self, do: Any, *args: Any) -> None:
            if self.closed:
                raise RuntimeError("Event loop is closed")
            self.calls.append((do, args))

    async def run() -> None:
        loops = [Loop(), Loop(), Loop(closed=True)]
        streams = [stream(loop) for loop in loops for _ in range(3)]
        deliver((one, piece(0, i)) for i, one in enumerate(streams))
        assert [len(loop.calls) for loop in loops] == [1, 1, 0]
        for loop in loops:
            for do, args in loop.calls:
                do(*args)
        assert [(await one.take()).token_ids for one in streams[:6]] == [(i,) for i in range(6)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(streams[6].take(), 0.01)
            raise AssertionError("a closed loop has got a piece")

    asyncio.run(run())
