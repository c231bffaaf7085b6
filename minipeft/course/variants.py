"""Variants of exercises, so that two classes do not share their answers: other numbers,
other shapes, another planted fault. `minipeft student --variant 7` chooses.

A question's metadata holds them, {"minipeft": {..., "variants": [{old: new, ...}]}}:
texts to replace in all cells of the exercise. Its check judges every variant.
"""

import copy
import re


class VariantError(ValueError):
    """A variant that would change nothing, or is not made of replacements."""


def of_class(notebook, number: int):
    """A copy of a chapter as the class with this number gets it. Class 0 gets the
    exercises as they stand in the chapter; one with n variants has n + 1 forms, which
    classes take in turn. VariantError: what the metadata asks for cannot be done."""
    notebook = copy.deepcopy(notebook)
    for name, cells in exercise_cells(notebook).items():
        forms = [{}, *declared(name, cells)]
        replace(cells, forms[number % len(forms)], name)
    return notebook


def how_many(notebook) -> int:
    """The largest number of forms that an exercise of this chapter has."""
    found = exercise_cells(notebook).items()
    return max((1 + len(declared(name, cells)) for name, cells in found), default=1)


def exercise_cells(notebook) -> dict:
    """{exercise: its cells}"""
    found = {}
    for cell in notebook.cells:
        marks = cell.metadata.get("minipeft")
        name = marks.get("exercise") if isinstance(marks, dict) else None
        if isinstance(name, str):
            found.setdefault(name, []).append(cell)
    return found


def declared(name: str, cells) -> list:
    """The variants of an exercise, each {old text: new text}."""
    found = []
    for cell in cells:
        listed = cell.metadata["minipeft"].get("variants", [])
        good = isinstance(listed, list) and all(map(is_replacements, listed))
        if not good:
            raise VariantError(
                f'the variants of exercise {name!r} must be a list of {{"old text":'
                ' "new text"}'
            )
        found += listed
    return found


def is_replacements(variant) -> bool:
    texts = [*variant, *variant.values()] if isinstance(variant, dict) else []
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def replace(cells, variant: dict, name: str) -> None:
    """Put the new texts in the place of the old ones, all at once."""
    if not variant:
        return
    for old in variant:
        if not any(old in cell.source for cell in cells):
            raise VariantError(
                f"a variant of exercise {name!r} replaces {old!r}, which stands in none"
                " of its cells"
            )
    longest_first = sorted(variant, key=len, reverse=True)
    olds = re.compile("|".join(map(re.escape, longest_first)))
    for cell in cells:
        cell.source = olds.sub(lambda match: variant[match[0]], cell.source)
