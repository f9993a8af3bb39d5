"""Backends compared with their references: `compare` what, `startup` when, `child` in a process of its own."""
