"""Reading and writing files, and checking what people give: each in one place.

JSON, safetensors and users' text are read here. Each error names the file, what was
found and what was expected; readers raise the class of error that the caller passes.
What is written is written beside its place and renamed, so a reader never sees half a
file.
"""

import contextlib
import difflib
import errno
import json
import math
import operator
import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path

from .errors import FileError

PART = ".part"  # the suffix of a file that is being written


# ---- what people give ----------------------------------------------------------------


def brief(value, length=80):
    """repr(value), cut in the middle to `length` characters."""
    if isinstance(value, (str, bytes, list, tuple)):
        value = value[: length + 1]  # no need to format a megabyte
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 10]} ... {text[-5:]}"


def is_finite(number):
    """False for infinity, NaN, and a whole number that no float holds."""
    return abs(number) <= sys.float_info.max


def did_you_mean(value, valid):
    """ " (did you mean 'lora'?)", or "" where no valid choice is near. Ignores case,
    and the dashes of options: they make no two of them near."""
    known = {str(choice).lower().lstrip("-"): choice for choice in valid}
    wanted = str(value)[:200].lower().lstrip("-")
    close = difflib.get_close_matches(wanted, known, n=1)
    return f" (did you mean {known[close[0]]!r}?)" if close else ""


def check_choice(name, value, valid, error=ValueError):
    """Raise `error`, which names the nearest valid choice, unless `value` is one."""
    if not any(value == choice for choice in valid):
        choices = ", ".join(str(choice) for choice in valid)
        raise error(
            f"unknown {name} {brief(value)}{did_you_mean(value, valid)};"
            f" expected one of {choices}"
        )


def check_number(
    name,
    value,
    *,
    whole=False,
    least=None,
    above=None,
    most=None,
    below=None,
    also=(),
    error=ValueError,
):
    """Raise `error` unless `value` is a finite number (whole: an int) within the
    bounds: least and most may be reached, above and below may not. True is not a
    number. also: what is valid besides, such as (None,)."""
    if any(value is other or value == other for other in also):
        return
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    is_number = isinstance(value, int if whole else (int, float))
    is_number = is_number and not isinstance(value, bool) and abs(value) < math.inf
    if is_number and all(WITHIN[word](value, bounds[word]) for word in bounds):
        return
    text = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
    if least is not None and most is not None:
        text = f"from {least} to {most}"
    expected = f"{'a whole number' if whole else 'a number'} {text}".rstrip()
    choices = " or ".join([expected, *map(repr, also)])
    raise error(f"{name} = {brief(value)}: expected {choices}")


WITHIN = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


def progress(items, what, shown=True):
    """`items`, with a progress bar once they take longer than three seconds."""
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=3, leave=False, disable=not shown)


# ---- reading -------------------------------------------------------------------------

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_file(path, error=FileError):
    """Raise `error` unless `path` is a regular file: a pipe or device may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        reason = getattr(problem, "strerror", problem)
        # repr shows a zero byte; the path is named whole
        raise error(f"cannot read {repr(str(path))[1:-1]}: {reason}") from None
    for is_kind, kind in KINDS:
        if is_kind(mode):
            raise error(f"{path} is {kind}; expected a file")


def read_bytes(path, error=FileError):
    """A regular file's content."""
    check_file(path, error)
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from None


def read_text(path, error=FileError):
    """A UTF-8 file's text, without a byte order mark."""
    content = read_bytes(path, error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{path}: not UTF-8 (0x{content[problem.start]:02x} at byte"
            f" {problem.start + 1}); expected text"
        ) from None


def parse_json(text, where, kind=dict, error=FileError):
    """`text` as JSON of that kind (dict, list, object for any). where: what the error
    calls it."""
    try:
        found = json.loads(text, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise error(f"{where}: JSON nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where} is not JSON ({problem})") from None
    if not isinstance(found, kind):
        names = {dict: "an object", list: "a list", str: "a string"}
        raise error(f"{where}: expected {names[kind]}, found {brief(found)}")
    return found


def without_duplicates(pairs):
    """A JSON object's {key: value}. ValueError for a key that stands twice: Python
    would take the last one without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {brief(twice)} stands twice in one object")
    return found


def read_json(path, kind=dict, error=FileError):
    """A JSON file, an object unless another kind is given."""
    return parse_json(read_text(path, error), path, kind, error)


@contextlib.contextmanager
def open_safetensors(path, error=FileError):
    """safetensors' safe_open: .keys(), .get_tensor(name), .get_slice(name),
    .metadata(). Whatever is wrong with the file, also within the block, is `error`."""
    from safetensors import SafetensorError, safe_open

    check_file(path, error)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as problem:
        size = os.stat(path).st_size
        raise error(
            f"{path} ({size:,} bytes) is cut short or damaged: {problem}"
        ) from None


def with_prefix(tensors, prefix):
    """{name without the prefix: tensor} of the names that begin with it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def read_safetensors(path, error=FileError):
    """({name: tensor}, {name: str} of the header's metadata)"""
    with open_safetensors(path, error) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, file.metadata() or {}


# ---- writing -------------------------------------------------------------------------


def is_first_process():
    """True in the only process, or in the first of torch.distributed's: the one that
    writes."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def whole(tensor):
    """A tensor, gathered from all processes where FSDP has sharded it; every process
    must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS


@contextlib.contextmanager
def named(place, hidden):
    """Errors of writing within the block name `place`, a path that the user knows,
    where the system names `hidden`, which goes away, or nothing."""
    try:
        yield
    except FileError as error:
        error.args = (str(error).replace(str(hidden), str(place)),)
        raise
    except OSError as error:
        # of two files the second is the one that is written; a failed write names none
        found = error.filename2 or error.filename
        unnamed = found is None and error.errno in DISK_ERRORS
        if unnamed or str(found).startswith(str(hidden)):
            found = str(found or hidden)
            error.filename = found.replace(str(hidden), str(place))
            del error.filename2
        raise


@contextlib.contextmanager
def replacing(path):
    """The path of a new file beside `path`; renamed to it when the block ends, removed
    when the block fails.

    The name is not shared with any other process. A rename is atomic: whoever reads
    `path` finds the old file or the new one, whole. Its permissions are those of any
    new file, where some writers (safetensors) make a private one."""
    path = Path(path)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    part = path.with_name(f".{path.name}.{unique}{PART}")
    try:
        with named(path, part):
            yield part
            os.chmod(part, 0o666 & ~umask())
            with open(part, "r+b") as file:
                os.fsync(file.fileno())  # else a power cut may leave an empty file
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def umask():
    """The permissions that new files of this process do not get."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def remove_parts(path):
    """Remove what killed writers of `path` left. Hold the folder's lock."""
    path = Path(path)
    for part in path.parent.glob(f".{path.name}.*{PART}"):
        part.unlink(missing_ok=True)


def write_text(path, text):
    """Write a UTF-8 file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(path, value, **options):
    """Write a JSON file, whole or not at all. options: json.dumps' own."""
    options = {"indent": 2, **options}
    write_text(path, json.dumps(value, **options) + "\n")


def write_safetensors(path, tensors, metadata=None):
    """Write contiguous tensors {name: tensor}, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata)
        except SafetensorError as problem:  # such as a full disk
            reason = str(problem).rpartition("I/O error: ")[2]
            raise FileError(f"cannot write {path}: {reason}") from None


def make_folder(path, error=FileError):
    """Create the folder `path` and check that files can be made in it. Returns its
    Path."""
    if not str(path):
        raise error("expected a folder, found an empty name")
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{secrets.token_hex(8)}{PART}"
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise error(f"{path} is a file; expected a folder") from None
    except OSError as problem:
        raise error(f"cannot write into {path}: {problem.strerror}") from None
    return path


@contextlib.contextmanager
def all_or_nothing(out, keep=lambda place: False):
    """The path of a hidden folder within `out`, which is made if absent. When the block
    ends, its files move to the same places in `out`, except where keep(place) is True;
    when the block fails, nothing is left."""
    out = Path(out)
    existed = out.exists()
    make_folder(out)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=out) as part, named(out, part):
            yield Path(part)
            files = [path for path in Path(part).rglob("*") if path.is_file()]
            for file in files:
                place = out / file.relative_to(part)
                place.parent.mkdir(parents=True, exist_ok=True)
                if not keep(place):
                    os.replace(file, place)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


@contextlib.contextmanager
def locked(folder, error=FileError):
    """Within the block, no other process or thread gets the lock of `folder`, which is
    made if absent. The lock goes with its holder, even a killed one."""
    import filelock

    lock = filelock.FileLock(make_folder(folder, error) / ".lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise error(
            f"{folder} is in use: another run writes there. Wait for it, or take"
            " another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
