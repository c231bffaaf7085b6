"""Ctrl-C while the command `minipeft` is being imported: torch takes seconds."""

import os
import signal
import sys
from pathlib import Path


def is_command():
    """Is this `minipeft ...`, or `python -m minipeft ...`? Python imports the package
    that -m names before it knows the path of a file."""
    started = getattr(sys, "argv", [""])[0]
    if started == "-m":  # and not a module of the package, which has no main
        words = sys.orig_argv
        return words[words.index("-m") + 1] == "minipeft" if "-m" in words else False
    return Path(started).stem == "minipeft"


def stop(*_):
    """What main does on Ctrl-C. Nothing has begun, and half an import cannot clean
    up."""
    os.write(2, b"\nminipeft: stopped\n")  # print may be interrupted in itself
    os._exit(130)


def until_main():
    """Ctrl-C ends a command quietly, until `restore`. Other programs keep theirs, and
    so does a command that ignores it."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def restore():
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
