"""Comparison of backends with their references: `compare` says what, `startup` when, `child` in a separate process."""
