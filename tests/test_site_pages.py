"""The hook of the site: pages keep what readers see, and a heavy one is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from site_pages import PLAIN, on_post_build, on_post_page, weights

PAGE = """<html>
    <link rel="stylesheet" href="site.css">

    <script src="assets/javascripts/bundle.js"></script>
    <img alt="a" src="a.svg#only-light"><img alt="a" src="b.svg#only-dark">
    <td><code>Sentinel.UNSET</code></td>
<pre><span></span><code><span class="n">f</span><span class="p">(</span>

    <span class="n">x</span></code></pre>
</html>
"""


def site(folder: Path, style: int) -> Path:
    (folder / "assets/javascripts").mkdir(parents=True)
    (folder / "assets/javascripts/bundle.js").write_text("s" * 500_000)
    (folder / "site.css").write_text("c" * style)
    (folder / "a.svg").write_text("p" * 1000)
    (folder / "index.html").write_text(PAGE)
    return folder


def test_code_keeps_its_lines() -> None:
    slim = on_post_page(PAGE)
    assert '<pre><code>f<span class="p">(</span>\n\n    x</code></pre>' in slim
    assert "Sentinel" not in slim
    assert slim.count('<img loading="lazy"') == 2
    assert "\n " not in slim.split("<pre>")[0]
    assert "\n\n" not in slim.split("<pre>")[0]


def test_a_page_weighs_what_it_loads(tmp_path: Path) -> None:
    plain, sent = weights(site(tmp_path, 2000))["index.html"]
    assert plain == len(PAGE) + 2000 + 1000  # neither the script nor the dark picture
    assert sent < plain


def test_heavy_pages_are_refused(tmp_path: Path) -> None:
    on_post_build({"site_dir": site(tmp_path / "light", PLAIN - 2000)})
    with pytest.raises(ValueError, match=r"index\.html: 30\d{4} bytes"):
        on_post_build({"site_dir": site(tmp_path / "heavy", PLAIN)})
