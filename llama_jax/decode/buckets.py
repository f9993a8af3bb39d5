"""Shapes: prompts, caches and batches are padded to a few sizes, so that few programs are compiled."""

from __future__ import annotations

from llama_jax.sharding import ways

MIN_PROMPT = 16
MAX_CHUNK = 2048
# Initial room for new tokens of a request without a small limit; the cache grows when it is used up.
FIRST_ROOM = 1024
# Prompt tokens of a device in each of two overlapped pieces: products of this many rows still run at full speed.
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
    """Successive capacities of a cache while `new` tokens follow a padded prompt: it starts with room for FIRST_ROOM of
    them, and grows when that is used up."""
    sizes = [cache_bucket(padded + min(new, FIRST_ROOM))]
    while sizes[-1] < padded + new:
        sizes.append(cache_bucket(2 * sizes[-1]))
    return tuple(sizes)


def batch_bucket(rows: int) -> int:
    """Padded batch size: a power of two, with the same number of rows on every device of the mesh in use."""
    return -(-(1 << (rows - 1).bit_length()) // ways("batch")) * ways("batch")


def pieces(rows: int, length: int, devices: int) -> int:
    """Number of pieces into which one prefill call cuts a device's `rows` rows of `length` prompt tokens.

    Two if several `devices` all-reduce: XLA's scheduler then overlaps one piece's computation with the other's
    all-reduces. Each piece needs only the keys and values of the one before, layer by layer.
    """
    return 2 if devices > 1 and length % 2 == 0 and rows * length >= 2 * PIECE_TOKENS else 1
