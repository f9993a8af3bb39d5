"""The policy of restarts, which knows of no engine."""

from __future__ import annotations

from llama_jax.generation.restarts import Restarts


def test_pauses_double_until_there_is_no_attempt_left() -> None:
    policy = Restarts(attempts=5, pause_s=1.0, longest_s=3.0)
    assert [policy.failed(float(now)) for now in range(6)] == [0.0, 1.0, 2.0, 3.0, 3.0, None]
    assert policy.failed(1000.0) is None
    assert policy.total == 5
    assert Restarts(attempts=0).failed(0.0) is None


def test_an_engine_that_has_worked_for_long_begins_anew() -> None:
    """And one that fails soon after each restart does not, however long the restarts take."""
    policy = Restarts(attempts=2, pause_s=1.0, sound_s=60.0)
    assert policy.failed(0.0) == 0.0
    policy.made(500.0)
    assert policy.failed(559.0) == 1.0
    policy.made(900.0)
    assert policy.failed(960.0) == 0.0
    policy.made(2000.0)
    assert policy.failed(2001.0) == 1.0
    policy.made(3000.0)
    assert policy.failed(3001.0) is None
