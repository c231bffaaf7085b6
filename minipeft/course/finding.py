"""What an experiment shows on the shipped base, and may not show on another."""

import os

from ..lm.pretrained import base_name, load_pretrained


def finding(holds: bool, words: str):
    """A result of the shipped base, in words. Raises AssertionError where it does not
    hold there; prints a line where it does not hold on another base (MINIPEFT_BASE)."""
    if holds:
        return
    if base_name() == "lanternwick":
        raise AssertionError(f"expected: {words}")
    print(f"Not on this base: {words}")


def needs_llama():
    """For a chapter that calls a Llama's parts by name. On a base of another
    architecture (MINIPEFT_BASE), say so, and go on with the shipped one."""
    if load_pretrained().config.model_type == "gpt2":
        print(f"Not on this base: {base_name()} is no Llama. Here is the shipped one.")
        del os.environ["MINIPEFT_BASE"]
