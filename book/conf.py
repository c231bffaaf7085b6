"""Sphinx's settings for the book (`make book`)."""

import dataclasses
import enum
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from myst_nb.core.render import NbElementRenderer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

project = "minipeft"
author = "the authors of minipeft"
copyright = "the authors of minipeft. MIT licence"
root_doc = "index"
language = "en"
smartquotes = False  # quotation marks in queries and code stay as they are
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]

# ---- text and notebooks --------------------------------------------------------------

nb_execution_mode = "off"  # the committed outputs
nb_render_markdown_format = "myst"  # tables and formulas in outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "misc.highlighting_failure"]

# ---- the look ------------------------------------------------------------------------

html_theme = "furo"
html_title = "minipeft"
templates_path = [str(HERE / "templates")]
html_static_path = [str(HERE / "static")]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_copy_source = False
html_show_sphinx = False
html_domain_indices = False  # the list of modules has images without words
html_last_updated_fmt = None
highlight_language = "none"  # of blocks that name none: what a command prints
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

# ---- formulas, without the network ---------------------------------------------------

mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}, "chtml": {"scale": 0.95}}


def copy_mathjax(app, error):
    """MathJax and its fonts, from the package that carries them."""
    if error or app.builder.format != "html":
        return
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    source = Path(package.origin).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    fonts = "output/chtml/fonts/woff-v2"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "tex-chtml.js", target)
    shutil.copytree(source / fonts, target / fonts, dirs_exist_ok=True)


# ---- figures -------------------------------------------------------------------------

render_image = NbElementRenderer.render_image


def with_alternative_text(self, data):
    """A figure's alternative text stands in its output's metadata."""
    found = render_image(self, data)
    alt = data.output_metadata.get(data.mime_type, {}).get("alt")
    for image in found:
        image["alt"] = alt or "A figure."
    return found


NbElementRenderer.render_image = with_alternative_text

# ---- the API reference, from docstrings ----------------------------------------------

autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "member-order": "groupwise",
}
autodoc_inherit_docstrings = False  # torch's, of what is written anew here
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_display_short_literal_types = True
add_module_names = False
default_role = "literal"


CATCH_ALL = r"\(\*args: (~typing\.)?Any, \*\*kwargs: (~typing\.)?Any\)"


def without_catch_all(app, what, name, obj, options, signature, annotation):
    """(*args, **kwargs) says nothing: a configuration's fields stand below."""
    if what == "class" and (dataclasses.is_dataclass(obj) or is_enum(obj)):
        return "", annotation
    if signature and re.match(CATCH_ALL, signature):
        return "", annotation


def is_enum(thing):
    return isinstance(thing, type) and issubclass(thing, enum.Enum)


def fields_of(config):
    """A line for each field that the dataclass adds to those it inherits; for each
    member of an enumeration."""
    if is_enum(config):
        return [f"{member.name} = {member.value!r}" for member in config]
    lines = []
    for field in dataclasses.fields(config):
        if field.name not in vars(config).get("__annotations__", {}):
            continue
        kind = getattr(field.type, "__name__", None) or str(field.type)
        line = f"{field.name}: {kind if kind != 'UnionType' else field.type}"
        if field.default is not dataclasses.MISSING:
            line += f" = {field.default!r}"
        elif field.default_factory is not dataclasses.MISSING:
            line += f" = {field.default_factory()!r}"
        lines.append(line)
    return lines


def as_text(line):
    """A line of plain text with `code` as reStructuredText."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"`{part}`" for part in parts[1::2]]
    return "".join(parts)


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: paragraphs, and blocks whose lines are laid out
    (formulas, columns), which are shown as they stand."""
    if lines and lines[0].startswith("Define the computation performed at every call"):
        lines[:] = []  # torch's words, of a method that has none
    blocks = "\n".join(lines).split("\n\n")
    if what == "class" and (dataclasses.is_dataclass(obj) or is_enum(obj)):
        blocks.append("\n".join(f"  {line}" for line in fields_of(obj)))
    lines[:] = []
    for block in filter(str.strip, blocks):
        rows = block.strip("\n").split("\n")
        if any(re.search(r"^\s|\S   +\S|^- |^\d\. ", row) for row in rows):
            lines += ["::", "", *("   " + row for row in rows), ""]
        else:
            lines += [*map(as_text, rows), ""]


FORMULA = r'<span class="math notranslate nohighlight">\\\((?:(?!</span>).)*\\\)</span>'
TOGETHER = re.compile(rf"(?P<before>[(\[“‘]*){FORMULA}(?P<after>[.,;:?!)\]’”']*)", re.S)


def hold(match):
    return f'<span class="together">{match[0]}</span>'


def together(match):
    """A formula with the comma behind it, the bracket before it."""
    return hold(match) if match["before"] or match["after"] else match[0]


# What a line must not part: 1e-4, an arrow, Llama-3-8B; in printed lines also a
# number's sign and unit (elsewhere the spaces between them are of the kind that holds).
HYPHENS = re.compile(r"\d[\d.]*e-\d+|-&gt;|\b[A-Z]\w+(?:-\d[\w.]*)+")
NUMBER = r"[-+−]?\d[\d.,]*\d|[-+−]?\d"
PRINTED = re.compile(
    rf"{HYPHENS.pattern}|≈ (?:{NUMBER})(?: %)?"
    rf"|(?:{NUMBER}) (?:%|± [\d.]*\d(?: points)?)"
)
PARTS = re.compile(rf"({FORMULA}|<pre.*?</pre>|<[^>]*>)", re.S)
STREAM = re.compile(
    r'(?<=<div class="output stream highlight-myst-ansi notranslate">)'
    r'(<div class="highlight"><pre>)(.*?)(?=</pre>)',
    re.S,
)


LONG_NAME = re.compile(r"[A-Za-z_][\w.]{19,}")


def seams(name):
    """A long name that may be parted between its words, rather than within one."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[._])(?=\w)", "<wbr>", name[0])


def held_together(body):
    """The page with what its lines must not part, and long names with places where they
    may: not in code, whose lines are kept."""
    parts = PARTS.split(body)
    parts[::2] = [HYPHENS.sub(hold, LONG_NAME.sub(seams, t)) for t in parts[::2]]
    return STREAM.sub(lambda m: m[1] + PRINTED.sub(hold, m[2]), "".join(parts))


def breakable(title):
    """A title, or a table's cell, whose names in code may be parted behind a full stop
    and, if they are long, behind an underscore: not within a word."""
    return re.sub(
        r'(?<=<span class="pre">)[\w.]+',
        lambda name: re.sub(
            r"[._](?=\w)" if len(name[0]) > 16 else r"\.(?=\w)", r"\g<0><wbr>", name[0]
        ),
        title,
    )


def finished(app, page, template, context, doctree):
    """The page's last touches. For those who listen: the level of the sidebar's
    headings, which Sphinx leaves out; and a folded part is called as its words say, not
    "Toggle hidden content". For all: that a class has the base `object` is not said;
    formulas are not parted from their commas, but long names of modules are parted."""
    tree = context.get("furo_navigation_tree")
    if tree:
        level = 'role="heading" aria-level="2"'
        context["furo_navigation_tree"] = tree.replace('role="heading"', level)
    body = context.get("body", "").replace(' aria-label="Toggle hidden content"', "")
    body = re.sub(r"<p>Bases: (?:(?!</p>).)*>object<.*?</p>\s*", "", body)
    body = held_together(TOGETHER.sub(together, body))
    context["body"] = re.sub(
        "<h1>.*?</h1>|<td.*?</td>", lambda part: breakable(part[0]), body, flags=re.S
    )
    for way in ("prev", "next"):
        if context.get(way):
            context[way]["title"] = breakable(context[way]["title"])


def setup(app):
    app.connect("build-finished", copy_mathjax)
    app.connect("html-page-context", finished, priority=900)  # after the theme
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-process-signature", without_catch_all)
