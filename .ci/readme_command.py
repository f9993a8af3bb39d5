"""Prints the commands that README.md gives under a marker: the fenced block after the line `<!-- NAME -->`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def command_after(marker: str, text: str) -> str:
    """The lines of the fenced block that directly follows `<!-- marker -->`, without prompts (`$ `).

    Raises:
      ValueError: no marker, more than one, no fenced block after it, or an empty one.
    """
    found = re.findall(rf"^<!-- {re.escape(marker)} -->\n+```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"expected one fenced block after `<!-- {marker} -->`, found {len(found)}")
    command = "\n".join(line.removeprefix("$ ") for line in found[0].splitlines() if line.strip())
    if not command:
        raise ValueError(f"the fenced block after `<!-- {marker} -->` is empty")
    return command


if __name__ == "__main__":
    try:
        print(command_after(sys.argv[1], Path("README.md").read_text(encoding="utf-8")))
    except ValueError as error:
        raise SystemExit(f"README.md: {error}") from error
