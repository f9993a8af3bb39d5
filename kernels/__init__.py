"""Operations with more than one implementation: one folder an operation, the pure jnp reference is the contract.

`llama_jax.kernels` knows nothing of the model: it sees arrays and the numbers that describe them.
"""
