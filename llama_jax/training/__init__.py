"""Training."""

from llama_jax.training.batch import Batch, targets
from llama_jax.training.costs import step_flops, step_memory
from llama_jax.training.loss import loss
from llama_jax.training.optimizers import Optimizer
from llama_jax.training.placement import training_mesh
from llama_jax.training.step import State, full, low_rank, initial_state, make_step, gradients
