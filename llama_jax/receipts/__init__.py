"""Receipts: what a run was made of, well enough to run it again and compare."""

from llama_jax.receipts.making import params_digest, receipt
from llama_jax.receipts.record import Receipt, read_receipt
from llama_jax.receipts.replaying import Difference, Replay, replay

__all__ = ["Difference", "Receipt", "Replay", "params_digest", "read_receipt", "receipt", "replay"]
