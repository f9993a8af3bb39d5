"""Hook of mkdocs.yml: drops from each page what no reader sees, and refuses a site with a page that is too heavy.

A page's weight is what a browser reads to show it: HTML, styles, scripts and pictures (light ones). `PLAIN`
leaves out the theme's script, which is the search for the most part; the index of the search is in neither.
"""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from typing import Any

PLAIN, SENT = 300_000, 110_000
"""Limits of a page in bytes: uncompressed without the search, and gzipped with it."""

_PRE = re.compile(r"(<pre\b.*?</pre>)", re.DOTALL)
_FILES = re.compile(r'<(?:script|img|link rel="(?:stylesheet|icon)")[^>]*? (?:src|href)="([^"#?:]+)(?:#only-light)?"')

_NO_DEFAULT = "<code>Sentinel.UNSET</code>"
"""The text of mkdocs-click for an option without a default."""


def on_post_page(output: str, **_: Any) -> str:
    """The page without indentation, and without marks of code that have no colour; pictures load once they are seen."""
    parts = _PRE.split(output)
    parts[::2] = (re.sub(r"\s*\n\s*", "\n", part) for part in parts[::2])
    parts[1::2] = (re.sub(r"<span></span>|<span class=\"n\">([^<]*)</span>", r"\1", part) for part in parts[1::2])
    return "".join(parts).replace("<img ", '<img loading="lazy" ').replace(_NO_DEFAULT, "")


def on_post_build(config: Any, **_: Any) -> None:
    """Weighs all pages.

    Raises:
      ValueError: a page is heavier than a limit.
    """
    heavy = [
        f"{page}: {plain} bytes, {sent} compressed"
        for page, (plain, sent) in weights(Path(config["site_dir"])).items()
        if plain > PLAIN or sent > SENT
    ]
    if heavy:
        raise ValueError(f"pages above {PLAIN} bytes, or {SENT} compressed: {'; '.join(heavy)}")


def weights(site: Path) -> dict[str, tuple[int, int]]:
    """Bytes of each page, uncompressed without the search, and compressed with it.

    Raises:
      FileNotFoundError: a page names a file that the site lacks.
    """
    found = {}
    for page in sorted(site.rglob("*.html")):
        names = dict.fromkeys(_FILES.findall(page.read_text(encoding="utf-8")))
        base = site if page.name == "404.html" else page.parent  # any address may show 404.html: its own are absolute
        parts = {name: (base / name.lstrip("/")).read_bytes() for name in names} | {page.name: page.read_bytes()}
        plain = sum(len(data) for name, data in parts.items() if "/javascripts/" not in name)
        found[str(page.relative_to(site))] = plain, sum(len(zlib.compress(data, 6)) for data in parts.values())
    return found


if __name__ == "__main__":
    for page, (plain, sent) in sorted(weights(Path(sys.argv[1])).items(), key=lambda entry: -entry[1][0]):
        print(f"{plain / 1000:6.0f} kB {sent / 1000:6.0f} kB  {page}")
