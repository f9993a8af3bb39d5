"""The shipped tables of choices, one JSON file an architecture; `llama_jax.kernels.dispatch.tables` reads them."""
