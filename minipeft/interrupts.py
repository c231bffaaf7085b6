"""Ctrl-C while the command `minipeft` is being imported: torch takes seconds."""

import os
import signal
import sys
from pathlib import Path


def is_command():
    """Is this `minipeft ...`, or `python -m minipeft ...`? Python imports a package
    that -m names before it knows the path of its file."""
    started = getattr(sys, "argv", [""])[0]
    return started == "-m" or Path(started).stem == "minipeft"


def stop(*_):
    """What main does on Ctrl-C. Nothing has begun, and half an import cannot clean
    up."""
    print("\nminipeft: stopped", file=sys.stderr, flush=True)
    os._exit(130)


def until_main():
    """Ctrl-C ends a command quietly, until `restore`. Other programs keep theirs, and
    so does a command that ignores it."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def restore():
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
