"""What the code is like to read: measured here and beside code that engineers hold up.

    python tests/measure.py              minipeft's parts, as in ARCHITECTURE.md
    python tests/measure.py --anchors    others', from PyPI in the versions below
    python tests/measure.py --shown      each method as chapters show it, and its calls

A code line is a line that holds code: no blank line, no comment, no docstring. Strings
over several lines count, signatures count, and so does a closing bracket. How many
lines a statement takes is up to the formatter; statements are counted beside them: what
Python runs, a signature or an `if` being one."""

import argparse
import ast
import importlib
import inspect
import io
import math
import statistics
import subprocess
import sys
import tempfile
import textwrap
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minipeft"
# name and version on PyPI -> what is measured
ANCHORS = {
    "mlx-lm==0.32.2": "mlx_lm/tuner",
    "torchtune==0.6.1": "torchtune/modules/peft",
    "equinox==0.13.8": "equinox/nn",
    "peft==0.21.2": "peft/tuners/lora",
    "llms-from-scratch==1.0.19": "llms_from_scratch",
}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(tree) -> set:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(text) -> set:
    """The numbers of the lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(text))


def is_docstring(node) -> bool:
    """Any string that stands alone."""
    value = getattr(node, "value", None)
    return isinstance(node, ast.Expr) and isinstance(getattr(value, "value", None), str)


def is_tuple_assignment(node) -> bool:
    """a, b = c, d: several statements on one line."""
    return isinstance(node, ast.Assign) and all(
        isinstance(side, ast.Tuple) for side in (node.targets[0], node.value)
    )


@dataclass
class Measures:
    """Of some files together: each code line's width, each function's code lines."""

    widths: list
    functions: dict
    statements: int
    tuple_assignments: int
    raises: int

    @property
    def lines(self):
        return len(self.widths)

    @property
    def p90(self):
        return sorted(self.widths)[math.ceil(0.9 * self.lines) - 1]

    @property
    def over_100(self):
        return sum(width > 100 for width in self.widths)

    def per_100(self, count):
        return 100 * count / self.lines

    def row(self, name) -> str:
        functions = self.functions.values()
        return (
            f"| {name} | {self.statements:,} | {self.lines:,} | {self.p90}"
            f" | {self.per_100(self.over_100):.0f} %"
            f" | {statistics.median(functions):.0f} / {max(functions)}"
            f" | {self.per_100(self.tuple_assignments):.1f}"
            f" | {self.per_100(self.raises):.1f} |"
        )


HEAD = (
    "| | statements | code lines | line p90 | lines > 100 | function median / max"
    " | tuple assignments per 100 | raises per 100 |\n|---|---|---|---|---|---|---|---|"
)


def measure(paths) -> Measures:
    found = Measures([], {}, 0, 0, 0)
    for path in paths:
        text = path.read_text(encoding="utf-8")
        rows = text.splitlines()
        code = code_lines(text)
        found.widths += [len(rows[number - 1]) for number in code]
        for node in ast.walk(ast.parse(text)):
            found.statements += isinstance(node, ast.stmt) and not is_docstring(node)
            found.tuple_assignments += is_tuple_assignment(node)
            found.raises += isinstance(node, ast.Raise)
            if isinstance(node, FUNCTIONS):
                inside = set(range(node.lineno, node.end_lineno + 1))
                found.functions[f"{path}:{node.name}:{node.lineno}"] = len(
                    code & inside
                )
    return found


APART = {
    "cli",
    "cli_methods",
    "cli_options",
    "doctor",
    "interrupts",
    "__main__",
}  # the command line, counted apart


def parts() -> dict:
    """Part of the package -> its files."""
    found = {"adapters": [], "methods": [], "quant": [], "lm": [], "command line": []}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        if first.endswith(".py"):
            name = "command line" if path.stem in APART else "adapters"
        else:
            name = "checks" if path.parent.name == "check" else first
        found.setdefault(name, []).append(path)
    return found


def named_in(thing):
    """What the names in its source stand for: name, module.name, self.name."""
    module = inspect.getmodule(thing)
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(thing)))):
        if isinstance(node, ast.Name):
            yield getattr(module, node.id, None)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            owner = thing if owner == "self" else getattr(module, owner, None)
            yield getattr(owner, node.attr, None)


def is_ours(thing) -> bool:
    kinds = inspect.isfunction(thing) or inspect.isclass(thing)
    return kinds and thing.__module__.startswith("minipeft")


def all_it_calls(thing) -> set:
    """Itself, and everything in minipeft that it calls, directly or not."""
    found, queue = set(), [thing]
    while queue:
        one = queue.pop()
        if one not in found:
            found.add(one)
            queue += filter(is_ours, named_in(one))
    return found


def code_size(thing) -> int:
    return len(code_lines(textwrap.dedent(inspect.getsource(thing))))


def methods_shown():
    """The class of each method: what minipeft.methods' configurations create."""
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        module = importlib.import_module(f"minipeft.methods.{path.stem}")
        for name, thing in vars(module).items():
            own = inspect.isclass(thing) and thing.__module__ == module.__name__
            if own and any(base.__name__ in BASES for base in thing.__mro__[1:]):
                yield name, thing


BASES = {"Adapter", "VirtualTokens"}


def print_shown():
    print("| shown | code lines | with all that it calls |\n|---|---|---|")
    for name, thing in methods_shown():
        # a method's lines stand in its class already
        inside = {f"{name}.{part}" for part in vars(thing)}
        calls = [o for o in all_it_calls(thing) if o.__qualname__ not in inside]
        print(f"| {name} | {code_size(thing)} | {sum(map(code_size, calls))} |")


def print_anchors():
    for requirement, folder in ANCHORS.items():
        with tempfile.TemporaryDirectory() as place:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", place, requirement], check=True)
            files = sorted((Path(place) / folder).rglob("*.py"))
            files = [path for path in files if "tests" not in path.parts]
            print(measure(files).row(requirement.replace("==", " ")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--anchors", action="store_true", help="others' code as well")
    parser.add_argument(
        "--shown", action="store_true", help="methods, with what they call"
    )
    asked = parser.parse_args()
    if asked.shown:
        print_shown()
        return
    print(HEAD)
    for name, files in parts().items():
        print(measure(files).row(name))
    print(measure(sum(parts().values(), [])).row("all"))
    if asked.anchors:
        print_anchors()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
