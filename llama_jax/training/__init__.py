"""Fine-tuning: losses, gradients and steps as pure functions, and runs that are resumed with the same numbers.

    combine, frozen = low_rank(model.config), model.params
    state = initial_state(new_adapter(frozen, model.config, LoraConfig(), jax.random.key(0)), transformation)
    step = make_step(combine, transformation, state)
    state, metrics = step(state, frozen, batch)

`batch` has the batches, `loss` their cross entropy and `preference` the loss of pairs, `step` gradients and steps,
`placement` devices, `optimizers` optax's optimisers by name and `objectives` losses. `data`, `packing`, `reference`,
`settings`, `checkpoints`, `metrics` and `run` make a run of them: `train`.
"""

from __future__ import annotations

from llama_jax.training.batch import IGNORED, Batch, targets
from llama_jax.training.costs import Memory, step_flops, step_memory
from llama_jax.training.data import Texts, chat_tokens, read_pairs, read_texts
from llama_jax.training.loss import CrossEntropy, Objective, entropies, loss, loss_of_entropies
from llama_jax.training.optimizers import Optimizer
from llama_jax.training.packing import Packing, Pair, Rows, Text
from llama_jax.training.placement import place_batch, training_mesh
from llama_jax.training.preference import Dpo
from llama_jax.training.reference import with_reference
from llama_jax.training.run import Trained, train
from llama_jax.training.settings import Settings, read_settings, settings_from
from llama_jax.training.step import State, full, gradients, initial_state, low_rank, make_step

__all__ = [
    "IGNORED",
    "Batch",
    "CrossEntropy",
    "Dpo",
    "Memory",
    "Objective",
    "Optimizer",
    "Packing",
    "Pair",
    "Rows",
    "Settings",
    "State",
    "Text",
    "Texts",
    "Trained",
    "chat_tokens",
    "entropies",
    "full",
    "gradients",
    "initial_state",
    "loss",
    "loss_of_entropies",
    "low_rank",
    "make_step",
    "place_batch",
    "read_pairs",
    "read_settings",
    "read_texts",
    "settings_from",
    "step_flops",
    "step_memory",
    "targets",
    "train",
    "training_mesh",
    "with_reference",
]
