"""Fine-tuning: losses, gradients and steps as pure functions, and runs that are resumed with the same numbers.

    combine, frozen = low_rank(model.config), model.params
    state = initial_state(new_adapter(frozen, model.config, LoraConfig(), jax.random.key(0)), transformation)
    step = make_step(combine, transformation, state)
    state, metrics = step(state, frozen, batch)

`batch` has the batches and `loss` their loss, `step` gradients and steps, `placement` devices, `optimizers` optax's
optimisers by name. `data`, `packing`, `settings`, `checkpoints`, `metrics` and `run` make a run of them: `train`.
"""

from __future__ import annotations

from llama_jax.training.batch import IGNORED, Batch, targets
from llama_jax.training.costs import Memory, step_flops, step_memory
from llama_jax.training.data import Texts, chat_tokens, read_texts
from llama_jax.training.loss import loss
from llama_jax.training.optimizers import Optimizer
from llama_jax.training.packing import Packing, Rows, Text
from llama_jax.training.placement import place_batch, training_mesh
from llama_jax.training.run import Trained, train
from llama_jax.training.settings import Settings, read_settings, settings_from
from llama_jax.training.step import State, full, gradients, initial_state, low_rank, make_step

__all__ = [
    "IGNORED",
    "Batch",
    "Memory",
    "Optimizer",
    "Packing",
    "Rows",
    "Settings",
    "State",
    "Text",
    "Texts",
    "Trained",
    "chat_tokens",
    "full",
    "gradients",
    "initial_state",
    "loss",
    "low_rank",
    "make_step",
    "place_batch",
    "read_settings",
    "read_texts",
    "settings_from",
    "step_flops",
    "step_memory",
    "targets",
    "train",
    "training_mesh",
]
