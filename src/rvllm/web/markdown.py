"""Markdown as HTML that is safe to show: CommonMark, tables, code in colours, maths as MathML.

What a model wrote is untrusted: it is rendered in a worker with limits (see `text.worker`), no HTML of its
own passes, and whatever the renderers make goes through a sanitiser with a list of what may stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

MAX_CHARS = 400_000  # of one text
MAX_CODE = 100_000  # characters of a block that gets colours; a longer one stays plain
MAX_MATHS = 4_000  # characters of a formula; a longer one stays as it was written
LIGHT, DARK = "xcode", "github-dark"  # Pygments' styles

_TEXT = (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead tr ul"
)
_MATHS = (
    "math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace "
    "msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover none"
)
_OPERATOR = "fence form lspace maxsize minsize movablelimits rspace separator stretchy"  # attributes
_TAGS = {*_TEXT.split(), *_MATHS.split()}
_ATTRIBUTES: dict[str, set[str]] = {
    "*": set(),
    "a": {"href"},
    "ol": {"start"},
    "pre": {"data-language"},
    "span": {"class"},
    "td": {"data-align"},
    "th": {"data-align"},
    "math": {"display"},
    "mfrac": {"linethickness"},
    "menclose": {"notation"},
    "mi": {"mathvariant"},
    "mo": {*_OPERATOR.split()},
    "mspace": {"depth", "height", "width"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mtable": {"columnalign", "columnlines", "rowlines"},
    "mtd": {"columnalign"},
}


def render(tokenizer: object, text: str) -> str:
    """HTML of a text in Markdown; a task of `text.worker`, which brings a tokenizer that is not needed."""
    import nh3

    return nh3.clean(
        _renderer().render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


@cache
def code_css() -> bytes:
    """The style sheet of code in colours, for both colour schemes."""
    from pygments.formatters import HtmlFormatter

    def rules(style: str) -> str:
        lines = HtmlFormatter(style=style).get_style_defs(".text pre").splitlines()
        return "\n".join(line for line in lines if line.startswith(".text pre ."))

    dark = f"@media (prefers-color-scheme: dark) {{\n{rules(DARK)}\n}}"
    return f"@media (prefers-color-scheme: light) {{\n{rules(LIGHT)}\n}}\n{dark}\n".encode()


@cache
def _renderer() -> MarkdownIt:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from mdit_py_plugins.texmath import texmath_plugin

    made = MarkdownIt("commonmark", {"html": False, "linkify": True, "breaks": True})
    made.enable(["table", "strikethrough", "linkify"])
    made.use(texmath_plugin, delimiters="brackets")
    made.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    made.add_render_rule("image", _image)
    made.add_render_rule("fence", _fence)
    made.add_render_rule("code_block", _fence)
    made.add_render_rule("th_open", _cell)
    made.add_render_rule("td_open", _cell)
    for name in ("math_inline", "math_single"):
        made.add_render_rule(name, _inline_maths)
    made.add_render_rule("math_inline_double", _displayed_maths)
    for name in ("math_block", "math_block_label", "math_block_eqno"):
        made.add_render_rule(name, _block_maths)
    return made


def _image(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A link in place of the picture: nothing is loaded from elsewhere."""
    source = str(tokens[at].attrs.get("src", ""))
    return f'<a href="{escape(source)}">{escape(tokens[at].content or source)}</a>'


def _fence(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    language = (tokens[at].info.split() or [""])[0]
    code = _coloured(tokens[at].content, language)
    return f'<pre data-language="{escape(language)}"><code>{code}</code></pre>\n'


def _cell(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    """A table's cell; its alignment as data, since styles in the text are not allowed."""
    align = str(tokens[at].attrs.get("style", "")).partition(":")[2]
    return f'<{tokens[at].tag} data-align="{escape(align)}">' if align else f"<{tokens[at].tag}>"


def _coloured(code: str, language: str) -> str:
    """Code with a span around each word of its language; escaped alone where the language is not known."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language or len(code) > MAX_CODE:
        return escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code)
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))


def _inline_maths(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return _maths(tokens[at].content, "inline")


def _displayed_maths(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return _maths(tokens[at].content, "block")


def _block_maths(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return f"<p>{_maths(tokens[at].content, 'block')}</p>\n"


def _maths(formula: str, display: str) -> str:
    """MathML of a formula in TeX; one that cannot be read stays as it was written."""
    from latex2mathml.converter import convert

    if len(formula) <= MAX_MATHS:
        try:
            return str(convert(formula.strip(), display=display))
        except Exception:  # the library raises many kinds, RecursionError among them
            pass
    return f"<code>{escape(formula)}</code>"
