"""Show the source of the code that runs, so that a chapter cannot drift from the
package."""

import ast
import inspect
import textwrap

from IPython.display import Markdown


def source(thing, docstrings: bool = False) -> str:
    """The source text of a class or function as Python loaded it; without docstrings,
    unless asked for."""
    text = textwrap.dedent(inspect.getsource(thing))
    if docstrings:
        return text.rstrip()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        has_docstring = (
            isinstance(node, (ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        )
        # a body that is nothing but its docstring stays
        if has_docstring and len(body) > 1:
            for number in range(body[0].lineno - 1, body[0].end_lineno):
                lines[number] = None
            if lines[body[0].end_lineno :] and lines[body[0].end_lineno] == "":
                lines[body[0].end_lineno] = None  # the blank line that followed it
    return "\n".join(line for line in lines if line is not None).rstrip()


def show(*things, docstrings: bool = False) -> Markdown:
    """Show classes, functions or methods in a notebook, highlighted."""
    return Markdown(
        "```python\n"
        + "\n\n".join(source(thing, docstrings) for thing in things)
        + "\n```"
    )
