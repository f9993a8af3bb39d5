"""Shapes: prompts, caches and batches come in few sizes, so that few programs are compiled."""

from __future__ import annotations

from llama_jax.sharding import ways

MIN_PROMPT = 16
MAX_CHUNK = 2048
# Room for new tokens that a request without a small limit starts with; the cache grows when it is used up.
FIRST_ROOM = 1024
# Prompt tokens of a device in each of two pieces that run side by side: products of so many still run at full speed.
PIECE_TOKENS = 4096


def bucket(n: int, minimum: int, per_octave: int) -> int:
    """The smallest bucket that holds n: `per_octave` sizes, evenly spaced, between one power of two and the next."""
    if n <= minimum:
        return minimum
    octave = 1 << (n - 1).bit_length() - 1
    step = max(octave // per_octave, 1)
    return -(-n // step) * step


def prompt_bucket(length: int) -> int:
    """Padded length of a prompt: 16, 24, 32, 48, 64, ... 2048, then multiples of 2048."""
    if length > MAX_CHUNK:
        return -(-length // MAX_CHUNK) * MAX_CHUNK
    return bucket(length, MIN_PROMPT, 2)


def cache_bucket(slots: int) -> int:
    """Capacity of a cache: four sizes per octave, at least 64."""
    return bucket(slots, 64, 4)


def capacities(padded: int, new: int) -> tuple[int, ...]:
    """Capacities that a cache has one after the other while `new` tokens follow a padded prompt: it starts with room
    for FIRST_ROOM of them, and is grown when they are used up."""
    sizes = [cache_bucket(padded + min(new, FIRST_ROOM))]
    while sizes[-1] < padded + new:
        sizes.append(cache_bucket(2 * sizes[-1]))
    return tuple(sizes)


def batch_bucket(rows: int) -> int:
    """Padded batch size: powers of two, and the same number on every device of the mesh in use."""
    return -(-(1 << (rows - 1).bit_length()) // ways("batch")) * ways("batch")


def pieces(rows: int, length: int, devices: int) -> int:
    """Into how many pieces a device's `rows` rows of `length` prompt tokens are cut in one prefill call.

    Two where several `devices` add up what they computed: XLA's scheduler then lets one piece compute while the sums of
    the other are under way. Each piece needs the keys and values of the one before, layer by layer, and no more.
    """
    return 2 if devices > 1 and length % 2 == 0 and rows * length >= 2 * PIECE_TOKENS else 1
