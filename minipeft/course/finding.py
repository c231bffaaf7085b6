"""What an experiment shows on the shipped base, and may not show on another."""

from ..lm.pretrained import base_name


def finding(holds: bool, words: str):
    """A result of the shipped base, in words. Raises AssertionError where it does not
    hold there; prints a line where it does not hold on another base (MINIPEFT_BASE)."""
    if holds:
        return
    if base_name() == "lanternwick":
        raise AssertionError(f"expected: {words}")
    print(f"Not on this base: {words}")
