"""Somebody at the page, and what they may want from a model whose own words are random."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

from test_server_process import KEY

AXE = Path(__file__).parent / "axe.min.js"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
MARKDOWN = """# Title

Some **bold** text, `code`, [a link](https://example.org/), and $x^2$.

```python
def f(x):
    return x + 1
```

| a | b |
| - | - |
| 1 | 2 |
"""


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait; imported late, since it may be missing."""
    from playwright.sync_api import expect

    return expect(locator)


def exactly(text: str) -> dict[str, Any]:
    """Settings under which the model can say nothing but a text."""
    return {"format": "regex", "regex": re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", text)}


def asked(url: str, path: str, body: Any = None) -> Any:
    """The server's own answer."""
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=60) as answer:
        return answer.read().decode()


class Reader:
    """Somebody at the page, of whom it is known what they want from the model.

    Attributes:
      expected: errors that the browser may report.
    """

    def __init__(self, context: Any, url: str, settings: dict[str, Any], key: str = KEY):
        self.url, self.expected = url, ("Failed to load resource",)
        self.errors: list[str] = []
        self.requested: list[str] = []
        context.add_init_script(
            f"""if (!localStorage.getItem("llama_jax.settings")) {{
                localStorage.setItem("llama_jax.settings", {json.dumps(json.dumps(settings))});
                if ({json.dumps(key)}) sessionStorage.setItem("llama_jax.key", {json.dumps(key)});
            }}
            addEventListener("securitypolicyviolation", ({{ effectiveDirective }}) => {{
                window.violated = effectiveDirective;
                console.error("policy", effectiveDirective);
            }});"""
        )
        self.page = page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requested.append(request.url))
        page.goto(url)
        self.field.wait_for()

    @property
    def field(self) -> Any:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def answers(self) -> Any:
        return self.page.get_by_role("article", name="Assistant")

    @property
    def questions(self) -> Any:
        return self.page.get_by_role("article", name="You")

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, text: str, answers: int = 1) -> str:
        """Sends a text and returns the answer, once it is complete and that many are shown."""
        self.field.fill(text)
        self.field.press("Enter")
        return self.answered(answers)

    def answered(self, answers: int = 1) -> str:
        expect(self.answers).to_have_count(answers)
        self.button("Send").wait_for()
        return self.text()

    def text(self, i: int = -1) -> str:
        return self.answers.nth(i).locator(".markdown").inner_text()

    def kept(self) -> list[dict[str, Any]]:
        """The conversations that the browser has kept."""
        return self.page.evaluate(
            """() => new Promise((resolve) => {
                const opening = indexedDB.open("llama_jax", 1);
                opening.onsuccess = () => {
                    const asked = opening.result.transaction("conversations").objectStore("conversations").getAll();
                    asked.onsuccess = () => (opening.result.close(), resolve(asked.result));
                };
            })"""
        )

    def check(self) -> None:
        """Nothing was asked of anybody but the server, and nothing went wrong that a test has not provoked."""
        assert [url for url in self.requested if not url.startswith((f"{self.url}/", "blob:", "data:"))] == []
        assert [error for error in self.errors if not error.startswith(self.expected)] == []
