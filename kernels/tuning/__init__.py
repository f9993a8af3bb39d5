"""The fastest backend and tiles on a device: `tune` measures candidates and writes the user's table, `timing` times."""
