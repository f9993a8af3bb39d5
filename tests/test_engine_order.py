"""Who goes first, who waits and for how long, and what is computed once."""

from __future__ import annotations

from scheduler_cases import host, ids, sequence, step_now

from llama_jax.engine.planner import PASSES
from llama_jax.engine.sequence import GROUP, Phase

# --- Order and fairness


def test_decoding_rows_first_then_prompts_under_way_then_new_ones() -> None:
    h = host(budget=8)
    h.add(sequence(0, 4, 8))
    step_now(h)
    h.add(sequence(1, 30, 1))
    h.add(sequence(2, 2, 1))
    step = step_now(h)
    assert ids(step) == ([1, 2], [0])
    assert [chunk.count for chunk in step.chunks] == [5, 2]  # half of 7, then what is left over
    step = step_now(h)
    assert [(chunk.sequence.id, chunk.count) for chunk in step.chunks] == [(1, 7)]


def test_short_prompts_do_not_wait_for_a_giant_and_it_ends_beside_endless_short_ones() -> None:
    h = host(budget=16, rows=4, pages=300, pages_per_row=300, prefix_cache=False)
    giant = h.add(sequence(0, 400, 1))
    arrived: dict[int, int] = {}
    id = 0
    while 0 in h.live:
        while len(h.live) < 8:
            id += 1
            h.add(sequence(id, 6, 2))
            arrived[id] = h.planned
        step_now(h)
        for done in h.done.keys() & arrived.keys():
            assert h.planned - arrived.pop(done) <= 12
        assert h.planned < 400 / 4
    assert giant.computed == 0
    assert giant.preemptions == 0
    assert id > 40
    h.drain(60)


def test_a_prompt_that_does_not_fit_is_passed_a_bounded_number_of_times() -> None:
    h = host(rows=4, pages=16, prefix_cache=False)
    h.add(sequence(0, 20, 40))
    step_now(h)
    step_now(h)
    big = h.add(sequence(1, 40, 1))  # 10 pages, which are not there before the first ends
    id, before = 1, 0
    while big.phase is Phase.WAITING:
        while len(h.live) < 6:
            id += 1
            h.add(sequence(id, 4, 1))
        joining = [j.sequence for j in step_now(h).joining]
        before += joining.index(big) if big in joining else len(joining)
        assert h.planned < 100
    assert before == PASSES
    h.drain(100)


def test_a_lower_priority_passes_nobody() -> None:
    """It would take pages that the other waits for, and have to give them back."""
    h = host(pages=16, prefix_cache=False)
    h.add(sequence(0, 20, 20))
    step_now(h)
    step_now(h)
    h.add(sequence(1, 40, 1))
    h.add(sequence(2, 4, 1, priority=1))
    assert ids(step_now(h)) == ([], [0])
    h.add(sequence(3, 4, 1))
    assert ids(step_now(h)) == ([3], [0])
    h.drain(80)


def test_at_most_half_for_a_prompt_that_does_not_end_while_others_wait() -> None:
    h = host(budget=20, rows=1)
    h.add(sequence(0, 64, 1))
    assert [chunk.count for chunk in step_now(h).chunks] == [20]  # alone
    h = host(budget=20, rows=4)
    for id in range(3):
        h.add(sequence(id, 64, 1))
    assert [chunk.count for chunk in step_now(h).chunks] == [10 + 3, 5, 2]  # what is left over goes to nobody else


def test_one_place_is_left_for_prompts_that_end_at_once() -> None:
    h = host(budget=32, rows=8, chunk_rows=3)
    for id in range(4):
        h.add(sequence(id, 90, 1))
    h.add(sequence(9, 2, 1))
    assert ids(step_now(h))[0] == [0, 1, 9]
    h.drain(80)


def test_copies_and_equal_prefixes_are_computed_once() -> None:
    h = host(rows=256, pages=2048, page_size=16, pages_per_row=64, budget=1024, chunk_rows=64)
    prompt = [3] * 128
    for id in range(256):
        h.add(sequence(id, [*prompt, id], 2))
    h.drain(60)
    counts = h.scheduler.counts
    assert counts.prefix_hit_tokens == 255 * 128
    assert counts.planned_tokens == 128 + 256 + 256


def test_they_wait_no_longer_for_one_that_leaves() -> None:
    h = host(budget=8)
    h.add(sequence(0, [1] * 40, 1))
    second = h.add(sequence(1, [1] * 40, 1))
    step_now(h)
    step_now(h)
    assert second.row < 0
    h.cancel(0)
    (joining,) = step_now(h).joining
    assert joining.sequence is second
    assert joining.shared == 16
    h.drain(20)


def test_nobody_waits_for_one_that_is_less_urgent() -> None:
    h = host(budget=8)
    h.add(sequence(0, [1] * 40, 1, priority=1))
    step_now(h)
    h.add(sequence(1, [1] * 40, 1))
    assert 1 in ids(step_now(h))[0]
    h.drain(20)


# --- The prefix cache


def test_a_hit_leaves_a_token_to_compute() -> None:
    h = host()
    for id in range(2):
        h.add(sequence(id, [1] * 8, 1))
        h.drain(9)
    assert h.scheduler.counts.prefix_hit_tokens == 4


def test_the_end_of_a_prefix_is_given_up_before_its_beginning() -> None:
    h = host(pages=8, pages_per_row=8)
    h.add(sequence(0, [1] * 25, 1))
    h.drain(9)
    h.add(sequence(1, 20, 1))  # takes the 2 free pages, and 3 cached ones
    h.drain(9)
    h.add(sequence(2, [1] * 25, 1))
    assert [joining.shared for joining in step_now(h).joining] == [12]


def test_pages_that_are_found_are_not_counted_as_free() -> None:
    h = host(pages=8, pages_per_row=8)
    h.add(sequence(0, [1] * 13, 1))
    h.drain(9)
    running = h.add(sequence(1, 10, 3))  # 3 pages; of the other 5, 3 are found
    step_now(h)
    waits = h.add(sequence(2, [1] * 24, 1))  # and 3 are needed besides
    assert ids(step_now(h)) == ([], [1])
    while waits.phase is Phase.WAITING:
        step = step_now(h)
    assert running.id in h.done
    assert [joining.shared for joining in step.joining] == [12]
    h.drain(9)


def test_drawn_tokens_are_found() -> None:
    h = host()
    first = h.add(sequence(0, [1] * 5, 10))
    h.drain(20)
    h.add(sequence(1, [*first.tokens, 9], 1))
    assert [joining.shared for joining in step_now(h).joining] == [12]  # 14 are stored: not the token drawn last
    h.audit_contents()


def test_the_token_drawn_last_is_not_stored() -> None:
    """A row that the device has ended stores nothing for the step that was planned in the meantime."""
    h = host(ahead=1)
    first = h.add(sequence(0, [1] * 6, 10), stop=2)  # 8 tokens: the last one would fill a page
    h.schedule()
    h.schedule()
    h.schedule() if len(h.flights) < 2 else None
    h.drain(9)
    assert len(first.tokens) == 8
    h.add(sequence(1, [*first.tokens, 9], 1))
    assert [joining.shared for joining in step_now(h).joining] == [4]


def test_without_reuse_the_whole_prompt_is_computed_and_still_serves_others() -> None:
    h = host()
    h.add(sequence(0, [1] * 9, 1))
    h.drain(9)
    h.add(sequence(1, [1] * 17, 1, reuse=False))
    (chunk,) = step_now(h).chunks
    assert (chunk.start, chunk.count) == (0, 16)
    h.drain(9)
    h.add(sequence(2, [1] * 17, 1))
    assert [joining.shared for joining in step_now(h).joining] == [16]


def test_without_a_cache_only_copies_share() -> None:
    h = host(prefix_cache=False)
    for id in range(4):
        h.add(sequence(id, [1] * 9, 1, domain=((GROUP, id // 2),)))
    h.add(sequence(4, [1] * 9, 1))
    h.drain(20)
    assert h.scheduler.counts.prefix_hit_tokens == 2 * 8
    h.add(sequence(5, [1] * 9, 1))
    assert [joining.shared for joining in step_now(h).joining] == [0]


def test_what_failed_is_not_found() -> None:
    h = host()
    h.add(sequence(0, [1] * 8 + [2], 1))
    h.drain(9)
    h.add(sequence(1, [1] * 8 + [3] * 8, 4))
    step_now(h)
    h.end(1, keep=False)
    h.audit()
    h.add(sequence(2, [1] * 8 + [3] * 9, 1))
    assert [joining.shared for joining in step_now(h).joining] == [8]  # the first one's


def test_nor_is_what_others_computed_behind_it() -> None:
    h = host()
    first = h.add(sequence(0, [1] * 8 + [2], 4))
    step_now(h)
    h.add(sequence(1, [1] * 8 + [3] * 5, 1))
    running = h.add(sequence(2, [1] * 8 + [4] * 5, 8))
    assert [joining.shared for joining in step_now(h).joining] == [8, 8]
    assert 1 not in h.live
    pages = [set(first.pages), set(running.pages)]
    bad = set(h.end(0, keep=False))
    assert bad & pages[0] == pages[0] - pages[1]
    h.audit()
    for _ in range(4):
        step_now(h)
    h.audit()  # what still runs behind it is found by nobody
    assert not list(h.blocks())
    assert set(h.end(2)) >= pages[0] & pages[1]
    h.add(sequence(3, [1] * 8 + [3] * 6, 1))
    assert [joining.shared for joining in step_now(h).joining] == [0]


def test_boundaries() -> None:
    h = host(rows=2, budget=33, boundary=16, pages_per_row=32)
    h.add(sequence(0, [1] * 60, 1))
    starts = []
    while h.live:
        starts += [(chunk.start, chunk.count) for chunk in step_now(h).chunks]
    assert starts == [(0, 32), (32, 28)]
    h.add(sequence(1, [1] * 60, 1))
    assert [joining.shared for joining in step_now(h).joining] == [48]
