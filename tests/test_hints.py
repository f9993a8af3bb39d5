"""Every hint that says "get it again", "damaged" or "upgrade" is true for an input that `hint_cases` shows."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hint_cases import CASES, Case
from hint_locations import ROOT, Location, hints
from hint_models import SOUND

from llama_jax.errors import LlamaJaxError

PROMISES = re.compile(r"\bget\b[^;]*\bagain\b|\bfetch\b[^;]*\bagain\b|\bdamaged\b|\bupgrade\b|\bnewer\b")


def test_every_such_hint_has_its_input() -> None:
    """A hint without a case is one that nobody has seen to be true; a case without its hint is out of date."""
    found = {(where, text) for where, text in hints() if PROMISES.search(text)}
    assert len(found) > 40

    def fits(case: Case, where: Location, text: str) -> bool:
        return case.location == where and case.says in text

    assert not [f"{where}: {text}" for where, text in found if not any(fits(case, where, text) for case in CASES)]
    assert not [case for case in CASES if not any(fits(case, where, text) for where, text in found)]


@pytest.fixture
def made_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[LlamaJaxError], set[Location]]:
    """Notes the functions in which each error is made, which may be above the one that raises it."""
    places: dict[int, set[Location]] = {}
    init = LlamaJaxError.__init__

    def noted(self: LlamaJaxError, message: str, *, hint: str = "") -> None:
        init(self, message, hint=hint)
        frame, found = sys._getframe(1), set()
        while frame is not None:
            file = Path(frame.f_code.co_filename).resolve()
            if file.is_relative_to(ROOT):
                name = frame.f_code.co_qualname.replace("<locals>.", "")
                found.add(Location(file.relative_to(ROOT).as_posix(), name))
            frame = frame.f_back  # type: ignore[assignment]
        places[id(self)] = found

    monkeypatch.setattr(LlamaJaxError, "__init__", noted)
    return lambda error: places[id(error)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.location.file.rpartition('/')[2]}-{case.location.function}-{case.says[:12]}"
)
def test_the_hint_is_true(
    tmp_path: Path, case: Case, made_at: Callable[[LlamaJaxError], set[Location]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged model is refused there, with that hint; when what it says is done, the model works."""
    write, use = SOUND[case.model]
    folder = tmp_path / "model"
    write(folder)
    shutil.copytree(folder, tmp_path / "sound")
    case.damage(folder)
    with pytest.MonkeyPatch.context() as patch:
        case.older(patch)
        with pytest.raises(LlamaJaxError) as e:
            use(folder)
    assert case.says in e.value.hint, e.value
    assert case.location in made_at(e.value)
    if case.newer is not None:
        case.newer(monkeypatch)
    else:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "sound", folder)
    use(folder)
