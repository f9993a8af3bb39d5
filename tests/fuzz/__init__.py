"""Fuzzing of everything that reads files from elsewhere; see README.md in this folder."""
