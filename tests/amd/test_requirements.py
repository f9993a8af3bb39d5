"""The tests of this folder run, or it is said why not."""

from __future__ import annotations

import pytest

from amd.requirements import missing, required


def test_packages_are_installed() -> None:
    packages = ", ".join(missing())
    if packages and not required():
        pytest.skip(f"tests of AMD programs left out: {packages} missing (`uv sync --group amd`)")
    assert not packages
