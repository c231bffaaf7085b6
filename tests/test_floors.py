"""Imports only ever point downwards, and the towers stand apart."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minipeft"
# The adapters' floors: a file may import from lower floors only.
FLOORS = [
    ["interrupts"],
    ["errors", "peft_tables", "recognized"],
    ["io"],
    ["weights"],
    ["targets"],
    ["kernels"],
    ["slot"],
    ["status"],
    ["config", "quant", "model_card"],
    ["methods", "optim"],
    ["saving"],
    ["weighted", "merging"],
    ["adding", "hf_methods"],
    ["model"],
    ["compat"],
]
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
# all that `import minipeft` may need
LIGHT = set(sys.stdlib_module_names) | {"torch", "minipeft"}


def imports(path, everywhere=True):
    """The modules that a file imports, with full names. everywhere: within functions
    too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["minipeft", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def part(path):
    """ "minipeft/methods/lora.py" -> "methods\""""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts_imported(path):
    return {
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("minipeft.") and len(name.split(".")) > 1
    }


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if part(p) in HEIGHT],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_adapters_import_downwards_only(path):
    here, known = part(path), parts_imported(path) & {part(p) for p in FILES}
    for other in known - {here}:
        assert other in HEIGHT and HEIGHT[other] < HEIGHT[here], (
            f"{here} imports {other}"
        )


@pytest.mark.parametrize(
    "tower, allowed",
    [
        ("lm", {"lm", "lanternwick", "quant", "io", "errors"}),
        ("lanternwick", {"lanternwick", "io", "errors"}),
    ],
)
def test_the_other_towers_import_no_adapters(tower, allowed):
    everything = {part(p) for p in FILES}
    for path in (p for p in FILES if part(p) == tower):
        assert parts_imported(path) & everything <= allowed, path


@pytest.mark.parametrize(
    "path",
    [PACKAGE / "__init__.py", *(p for p in FILES if part(p) in HEIGHT)],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_import_minipeft_is_light(path):
    outside = {name.partition(".")[0] for name in imports(path, everywhere=False)}
    assert outside <= LIGHT, f"{outside - LIGHT} on importing minipeft"


def test_import_minipeft_loads_nothing_heavy():
    import subprocess

    heavy = ["transformers", "peft", "bitsandbytes", "safetensors", "minipeft.lm"]
    code = f"import sys, minipeft; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_drawing_is_true():
    """ARCHITECTURE.md draws the floors, the highest first: names in 34 columns, then
    what they are."""
    text = (PACKAGE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawn = re.search(r"```floors\n(.*?)```", text, re.S)[1].splitlines()
    floors = [sorted(line[:34].split()) for line in reversed(drawn)]
    assert floors == list(map(sorted, FLOORS)), "draw FLOORS in ARCHITECTURE.md"
