"""Readers without a mouse, with a small screen, or who do not see it."""

from __future__ import annotations

from typing import Any

import pytest

from browser.reader import AXE, MARKDOWN, PHONE, exactly, expect

pytestmark = pytest.mark.browser


def test_keyboard_only(visit: Any) -> None:
    reader = visit(max_tokens=4)
    page, keyboard = reader.page, reader.page.keyboard

    def tab_to(label: str) -> None:
        for _ in range(40):
            if page.evaluate("document.activeElement.getAttribute('aria-label')") == label:
                return
            keyboard.press("Tab")
        raise AssertionError(f"Tab never comes to {label}")

    keyboard.type("Hello")  # the field has the focus
    keyboard.press("Enter")
    reader.answered()
    keyboard.press("ArrowUp")
    keyboard.type(" again")
    keyboard.press("Control+Enter")
    expect(reader.questions.locator(".said")).to_have_text("Hello again")
    reader.answered()
    tab_to("Regenerate")
    keyboard.press("Enter")
    expect(reader.answers.locator(".branches")).to_contain_text("2/2")
    reader.answered()
    tab_to("Previous branch")
    keyboard.press("Enter")
    keyboard.press("?")
    shortcuts = page.get_by_role("dialog", name="Keyboard shortcuts")
    shortcuts.wait_for()
    keyboard.press("Escape")
    shortcuts.wait_for(state="detached")  # until then keys are the dialog's
    keyboard.press("Control+Shift+O")
    page.get_by_role("heading", name="What is on your mind?").wait_for()
    tab_to("Delete Hello")
    keyboard.press("Enter")
    keyboard.press("Enter")
    expect(page.locator(".entry")).to_have_count(0)


def test_phone(visit: Any) -> None:
    reader = visit(**exactly(MARKDOWN + "w" * 200), max_tokens=800, browser=PHONE)
    reader.ask("Hello")
    page = reader.page
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".column").first.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
    sidebar = page.get_by_role("navigation", name="Conversations")
    expect(sidebar).to_be_hidden()
    reader.button("Conversations").tap()
    expect(sidebar).to_be_visible()
    reader.button("New conversation").tap()
    expect(sidebar).to_be_hidden()
    small = page.locator("button:visible").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).filter(r => Math.min(r.width, r.height) < 24).length"
    )
    assert small == 0


@pytest.mark.parametrize("browser", [{}, {"color_scheme": "dark", "reduced_motion": "reduce"}, PHONE])
def test_accessibility(visit: Any, browser: dict[str, Any]) -> None:
    """axe-core finds nothing serious in any state of the page."""
    reader = visit(**exactly(MARKDOWN), max_tokens=500, probabilities=True, browser=browser)
    page, phone = reader.page, browser is PHONE

    def check(state: str) -> None:
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        grave = [v for v in found if v["impact"] in ("serious", "critical")]
        assert not grave, (state, [(v["id"], [node["html"] for node in v["nodes"]]) for v in grave])

    check("empty")
    reader.ask("Format")
    expect(page.locator("math").first).to_be_visible()
    check("conversation")
    reader.answers.get_by_role("button", name="Token probabilities").click()
    page.locator(".token").nth(2).click()
    check("probabilities")
    if phone:
        reader.button("Conversations").tap()
        page.wait_for_timeout(250)  # it slides in
        check("list")
        return
    page.keyboard.press("Control+,")
    page.get_by_label("Form of answers").select_option("JSON of a schema")
    check("settings")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    check("shortcuts")
    page.keyboard.press("Escape")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    reader.field.fill("Fail")
    reader.field.press("Enter")
    page.get_by_role("alert").wait_for()
    check("error")
