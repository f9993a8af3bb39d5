"""The tests of this folder run, or it is said why not."""

from __future__ import annotations

import pytest

from amd.requirements import missing


@pytest.mark.amd  # which skips, or fails where that is asked for
def test_packages_are_installed() -> None:
    assert not missing()
