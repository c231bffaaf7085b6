"""What `minipeft doctor` looks at. Each check is (good, what was found, what to do if
it is not good)."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys

NEEDED = {
    "torch": "2.5",
    "numpy": "1.26",
    "safetensors": "0.4.3",
    "tokenizers": "0.20",
    "huggingface_hub": "0.25",
    "tqdm": "4.66",
    "pooch": "1.8",
}
FOR_TESTS = (
    "jupyterlab",
    "matplotlib",
    "sacrebleu",
    "transformers",
    "peft",
    "bitsandbytes",
    "nbgrader",
    "pytest",
    "pytest-xdist",
    "nbval",
    "hypothesis",
)


def numbers(version):
    return [
        int("".join(c for c in part if c.isdigit()) or 0)
        for part in version.split("+")[0].split(".")[:3]
    ]


def packages():
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    yield (
        sys.version_info >= (3, 11),
        f"Python {platform.python_version()}",
        "Python 3.11 or newer is needed",
    )
    for name, least in NEEDED.items():
        found = version(name)
        good = found is not None and numbers(found) >= numbers(least)
        yield (
            good,
            f"{name} {found or 'is not installed'}",
            f"{least} or newer is needed: pip install '{name}>={least}'",
        )
    absent = ", ".join(name for name in FOR_TESTS if version(name) is None)
    yield (
        not absent,
        (
            f"for the chapters and tests: {absent or 'all'}"
            f" {'missing' if absent else 'there'}"
        ),
        "pip install -e '.[all]'",
    )


def base():
    """Every file of the base against its line in SHA256SUMS."""
    from .lanternwick import DATA

    sums = DATA / "base" / "SHA256SUMS"
    if not sums.is_file():
        yield (
            False,
            "the base model is not here",
            "`make pretrain` makes it; or get the whole repository again",
        )
        return
    for wanted, name in (line.split() for line in sums.read_text().splitlines()):
        path = sums.parent / name.lstrip("*")
        found = (
            hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "absent"
        )
        state = {wanted: "is as shipped", "absent": "is missing"}.get(
            found, "was changed"
        )
        yield (
            found == wanted,
            f"base model: {path.name} {state}",
            "`git checkout data/base` brings it back",
        )


def memory():
    """(bytes free, bytes in all), or None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return tuple(
            int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal")
        )
    except (OSError, KeyError, ValueError):
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return total, total
        except (AttributeError, OSError, ValueError):
            return None


def machine():
    import torch

    from .lm.hub import cache_folder

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    yield (
        threads <= cores,
        f"{threads} threads on {cores} processors",
        (
            "threads beyond the processors are in each other's way: set"
            f" OMP_NUM_THREADS={cores}"
        ),
    )
    if (found := memory()) is not None:
        yield (
            found[0] > 2e9,
            f"memory: {found[0] / 1e9:.1f} GB free of {found[1] / 1e9:.1f} GB",
            "a chapter needs up to 2 GB: close something",
        )
    folder = cache_folder()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(place).free
    yield (
        free > 1e9,
        f"disk: {free / 1e9:.1f} GB free for {folder}",
        (
            "real data and models want 1 GB: make room, or set MINIPEFT_CACHE to"
            " another place"
        ),
    )
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        yield True, f"GPU: {torch.cuda.get_device_name(0)}, {total / 1e9:.0f} GB", ""
    else:
        apple = torch.backends.mps.is_available()
        yield (
            True,
            (
                "GPU: Apple's, with --device mps"
                if apple
                else "no GPU: fine, every chapter runs on the processor"
            ),
            "",
        )


def checks():
    for part in (packages, base, machine):
        try:
            yield from part()
        except ImportError as error:
            yield False, f"cannot import {error.name}", "pip install -e ."
