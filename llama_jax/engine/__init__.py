"""The engine: continuous batching of token ids on the paged cache."""
