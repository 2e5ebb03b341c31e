"""Markdown on the server: what CommonMark says, and nothing of a text becomes markup of its own."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest

from rvllm.web.markdown import MAX_CHARS, code_css, render
from support.doubles.server import LiveServer

REL = 'target="_blank" rel="noopener noreferrer nofollow"'
RENDERED = [
    (
        "**bold** and *it* and `x < y`",
        "<p><strong>bold</strong> and <em>it</em> and <code>x &lt; y</code></p>",
    ),
    ("a snake_case_name", "<p>a snake_case_name</p>"),
    ("# One\n\ntext\nmore", "<h1>One</h1>\n<p>text<br>\nmore</p>"),
    ("3. x\n4. y", '<ol start="3">\n<li>x</li>\n<li>y</li>\n</ol>'),
    ("> q\n\n---", "<blockquote>\n<p>q</p>\n</blockquote>\n<hr>"),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
    ("![i](https://e.org/i.png)", f'<p><a href="https://e.org/i.png" {REL}>i</a></p>'),
    ("![i](javascript:alert)", "<p>![i](javascript:alert)</p>"),
    ("see https://e.org/a_b.", f'<p>see <a href="https://e.org/a_b" {REL}>https://e.org/a_b</a>.</p>'),
    ("~~gone~~", "<p><s>gone</s></p>"),
    ("```nonsense\n<b>\n```", '<pre data-language="nonsense"><code>&lt;b&gt;\n</code></pre>'),
    ("It costs $5 and $6.", "<p>It costs $5 and $6.</p>"),
    ("$\\frac{$", "<p><code>\\frac{</code></p>"),
]


@pytest.mark.parametrize(("text", "wanted"), RENDERED)
def test_blocks(text: str, wanted: str) -> None:
    assert render(None, text).strip() == wanted


@pytest.mark.parametrize("text", ["$x^2$", "\\(x^2\\)", "so $$x^2$$ is", "$$\nx^2\n$$", "\\[\nx^2\n\\]"])
def test_maths_becomes_mathml(text: str) -> None:
    html = render(None, text)
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in html and html.count("<math") == 1
    assert ('display="block"' in html) == ("$$" in text or "\\[" in text)


def test_a_formula_may_have_4000_characters() -> None:
    assert "<math" in render(None, f"${'x' * 4000}$") and "<math" not in render(None, f"${'x' * 4001}$")


def test_code_has_the_colours_of_both_schemes() -> None:
    html = render(None, "```python\ndef f():\n    return 1\n```")
    assert re.sub("<[^>]*>", "", html).strip() == "def f():\n    return 1"
    assert '<span class="k">def</span>' in html
    css = code_css().decode()
    assert css.count(".text pre .k {") == 2 and "prefers-color-scheme: dark" in css


def test_tables_keep_their_alignment() -> None:
    html = render(None, "|a|b|\n|-|-:|\n|1|2|")
    assert "<th>a</th>" in html and '<td data-align="right">2</td>' in html and "style" not in html


ATTACKS = (
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    '[a](https://e.org "><script>")',
    "<math><mi//xlink:href=x>",
    '```"><script>\nx\n```',
    "$\\text{<script>alert(1)</script>}$",
    "[x](data:text/html;base64,PHN2Zz4=)",
    "$\\href{javascript:alert(1)}{x}$",
    '<https://e.org/"onclick=alert(1)>',
    "|<img src=x>|\n|-|\n|<a onclick=x>|",
)
MAY_BE = {"href", "rel", "target", "class", "data-language", "data-align", "start", "display", "stretchy"}


class Tags(HTMLParser):
    """Names of the elements and attributes of a page, and where its links go."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [str(value) for name, value in attrs if name == "href"]


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_of_a_text_is_markup(text: str) -> None:
    seen = Tags()
    seen.feed(render(None, text))
    assert not seen.names & {"script", "svg", "img", "iframe", "style", "object", "form", "input"}
    assert seen.attributes <= MAY_BE
    assert all(link.startswith("https://e.org") for link in seen.links)


@pytest.mark.parametrize(
    "part", ["*", "[", "`", "**a", "- ", "> ", "|", "\n- a\n  ", "![](", "~~", "$a", "$$", "{"]
)
def test_hostile_texts_take_no_time(part: str) -> None:
    began = time.process_time()
    render(None, part * 2000)
    render(None, f"${part * 1000}$")
    assert time.process_time() - began < 4, "a worker has 5 s"


def test_the_endpoint() -> None:
    with LiveServer(api_key="secret", drain_timeout=0.2) as live:
        key = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        assert live.raw("POST", "/rvllm/markdown", b'{"text": "*a*"}')[0] == 401
        status, _, body = live.raw("POST", "/rvllm/markdown", b'{"text": "*a*"}', key)
        assert (status, body) == (200, b'{"html":"<p><em>a</em></p>\\n"}')
        large = b'{"text": "%s"}' % (b"a" * (MAX_CHARS + 1))
        assert live.raw("POST", "/rvllm/markdown", large, key)[0] == 413
