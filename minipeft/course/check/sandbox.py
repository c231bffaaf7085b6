"""Running a learner's code: what it does to the process ends with the check.

A check runs under `guarded(name, limit)`: its draws are seeded by its name, settings
and random states of the process are put back, and it ends after `limit` seconds.
`watched` wraps a learner's function, so that a check knows what it returned last, and
that it left its arguments as they were.
"""

import contextlib
import functools
import inspect
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

LIMIT = 60  # seconds of processor time for one check
PATIENCE = 4  # so many times as long by the clock, for code that sleeps
NOTHING = object()  # no learner's function has returned yet
variant = 0  # another one gives other draws: tests try several

SETTINGS = {  # what a learner's code may leave changed: how to read it, how to write it
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, torch.set_default_device),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
}
# what every check starts from, even where the notebook has other settings
START = {"torch.set_grad_enabled": True, "torch.set_default_dtype": torch.float32}


class TooLong(BaseException):
    """The time is over; no Exception, so that `except Exception` does not catch it."""


class Wrong(Exception):
    """Raised inside a check; its text is the message."""


class Guard:
    """What `guarded` knows while a check runs and after it."""

    def __init__(self):
        self.interrupted = False  # by the user, not by the learner's code
        self.changed = []  # settings that the code has changed


@contextlib.contextmanager
def guarded(name: str, limit: float, turn: int = 0):
    """Seed by `name` and the variant, limit the time, restore the settings. Another
    turn has the same shapes, drawn by `random`, and other tensors."""
    guard = Guard()
    drawn = random_states(f"{name} {variant}", turn)
    with drawn, settings(guard), interrupts(guard):
        with time_limit(limit):
            yield guard


@contextlib.contextmanager
def random_states(seed: str, turn: int = 0):
    """Seed all generators, and put them back afterwards. turn: changes the numbers of
    torch and numpy alone."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    number = (random.getrandbits(32) + turn) % 2**32
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


@contextlib.contextmanager
def settings(guard: Guard):
    """Put the settings back; guard.changed names those that differ from the start."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    start = before | START
    write_settings(start)
    output = sys.stdout, sys.stderr
    try:
        yield
    finally:
        found = {name: read() for name, (read, _) in SETTINGS.items()}
        guard.changed += [name for name in start if found[name] != start[name]]
        write_settings(before)
        sys.stdout, sys.stderr = output


def write_settings(wanted: dict) -> None:
    for name, value in wanted.items():
        read, write = SETTINGS[name]
        if read() != value:
            write(value)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def interrupts(guard: Guard):
    """Note in guard.interrupted that the user stops the cell (the stop button)."""
    if not in_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        guard.interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def deadline(seconds: float):
    """A function that tells whether the time is over: by the processor's time, so that
    a busy machine stops nobody's code, or PATIENCE times as long by the clock."""
    used, began = time.process_time(), time.monotonic()

    def over():
        waited = time.monotonic() - began
        return time.process_time() - used >= seconds or waited >= PATIENCE * seconds

    return over


def time_limit(seconds: float):
    """Raise TooLong in this thread when the time is over, and again each second."""
    if in_main_thread() and hasattr(signal, "setitimer"):
        return alarm(seconds)
    return timer(seconds)


@contextlib.contextmanager
def alarm(seconds: float):
    """By a signal, which ends a sleep as well."""
    over = deadline(seconds)

    def ring(number, frame):
        if over():
            raise TooLong

    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def timer(seconds: float):
    """By an exception from another thread, where there is no alarm (on Windows, or
    outside the main thread): it arrives before the next line of Python."""
    import ctypes

    done, here = threading.Event(), ctypes.c_ulong(threading.get_ident())
    over = deadline(seconds)
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def wait():
        pause = seconds
        while not done.wait(pause):
            if over():
                throw(here, ctypes.py_object(TooLong))
            pause = 1

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        done.set()
        waiting.join()


class Watch:
    """What a learner's functions returned last, and the names of their arguments."""

    def __init__(self):
        self.returned = NOTHING
        self.names = {}  # id of a tensor: the parameter's name
        self.given = {}  # a parameter's name: what it was in the last call

    def wrap(self, answer, in_place: bool):
        """A function that notes what `answer` returns, where that can be called (a
        function, a method, an object); a class, or another answer, as it is."""
        if isinstance(answer, type) or not callable(answer):
            return plain(answer)

        @functools.wraps(answer)
        def watched(*args, **kwargs):
            named = names_of(answer, args)
            self.names |= {id(arg): name for name, arg in named.items()}
            self.given = named
            before = {name: copied(arg) for name, arg in named.items()}
            self.returned = plain(answer(*args, **kwargs))
            changed = [
                name for name, arg in named.items() if differs(arg, before[name])
            ]
            if changed and not in_place:
                raise Wrong(
                    f"You changed {' and '.join(f'`{name}`' for name in changed)} in"
                    " place: leave the arguments as they are, and work on a copy."
                )
            return self.returned

        return watched


def unwatched(function):
    """The learner's function itself, for a count of what it does."""
    return inspect.unwrap(function)


def package_calls(function, *args) -> list:
    """Names of the course's functions that a call uses, those of checks excepted."""
    found, here = [], Path(__file__).parent

    def note(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and here.parents[1] in file.parents:
            if file.parent != here:
                found.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        unwatched(function)(*args)
    finally:
        sys.setprofile(before)
    return found


def names_of(function, args) -> dict:
    """{the function's own name of each positional argument: the argument}. What it
    takes as *args is named by its place."""
    try:
        parameters = inspect.signature(function).parameters.values()
        inspect.signature(function).bind(*args)
    except (TypeError, ValueError):
        return {}  # it takes other arguments, and its call says so
    own = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    places = [f"argument {place + 1}" for place in range(len(own), len(args))]
    return dict(zip([*own, *places], args))


def copied(value):
    """A copy of a tensor or of a list of them; None for what need not be compared."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [copied(part) for part in value]
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return value if isinstance(value, int | float | str | tuple) else None


def differs(now, before) -> bool:
    if isinstance(now, torch.Tensor):
        return now.shape != before.shape or not torch.equal(
            now.detach().nan_to_num(), before.nan_to_num()
        )
    if isinstance(now, list | dict):
        if len(now) != len(before):
            return True
        if isinstance(now, dict):
            return list(now) != list(before) or differs(
                list(now.values()), list(before.values())
            )
        return any(differs(a, b) for a, b in zip(now, before))
    return before is not None and now is not before and now != before


def plain(value):
    """numpy's arrays as tensors; numpy's and torch's single numbers as Python's."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.requires_grad:
        return value.item() if not value.is_floating_point() else value
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    if type(value) is dict:
        return {plain(key): plain(part) for key, part in value.items()}
    return value
