"""What `minipeft doctor` looks at. Each check is (good, what was found, what to do if
it is not good)."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# GB on disk of everything that the course installs, by the build of torch
SIZES = {"CUDA": 5.7, "CPU": 1.8}


def in_repository():
    """Does this package run from its repository, and not as an installed wheel?"""
    return (REPOSITORY / "pyproject.toml").is_file()


def requirements():
    """{extra, or "" for what the library itself needs: list of packaging Requirements},
    from pyproject.toml or, outside the repository, from what pip installed."""
    from packaging.requirements import Requirement

    if in_repository():
        text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return {
            extra: [r for r in map(Requirement, lines) if applies(r)]
            for extra, lines in groups.items()
        }
    lines = importlib.metadata.requires("minipeft") or []
    extras = importlib.metadata.metadata("minipeft").get_all("Provides-Extra") or []
    found = {extra: [] for extra in ("", *extras)}
    for requirement in map(Requirement, lines):
        if applies(requirement):
            found[""].append(requirement)
        else:
            for extra in extras:
                if applies(requirement, extra):
                    found[extra].append(requirement)
    return found


def applies(requirement, extra=""):
    """Is it a requirement on this system, with this extra?"""
    marker = requirement.marker
    return marker is None or marker.evaluate({"extra": extra})


def version(name):
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfied(requirement):
    """Is a version installed that this requirement admits?"""
    found = version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def packages():
    yield (
        sys.version_info >= (3, 11),
        f"Python {platform.python_version()}",
        "Python 3.11 or newer is needed",
    )
    groups = requirements()
    for requirement in groups.pop(""):
        plain = f"{requirement.name}{requirement.specifier}"
        yield (
            satisfied(requirement),
            f"{requirement.name} {version(requirement.name) or 'is not installed'}",
            f"expected {plain}: pip install '{plain}'",
        )
    for extra, wanted in groups.items():
        wanted = [r for r in wanted if r.name != "minipeft"]
        missing = ", ".join(r.name for r in wanted if not satisfied(r))
        place = "-e '.[all]'" if in_repository() else f"'minipeft[{extra}]'"
        install = f"pip install {place}"
        if missing and not in_repository():
            # the library is whole without it
            yield True, f"[{extra}] is not installed ({install})", ""
        elif wanted:
            what = f"missing {missing}" if missing else "complete"
            yield not missing, f"[{extra}]: {what}", install


def base():
    """Every file of the base against its line in SHA256SUMS."""
    from .lanternwick import DATA

    sums = DATA / "base" / "SHA256SUMS"
    again = "pip install --force-reinstall minipeft"
    if not sums.is_file():
        make = "`make pretrain` makes it; or get the whole repository again"
        advice = make if in_repository() else again
        yield False, "the base model is not here", advice
        return
    for line in sums.read_text(encoding="utf-8").splitlines():
        expected, name = line.split()
        path = sums.parent / name.lstrip("*")
        if not path.is_file():
            state = "is missing"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            state = "was changed"
        else:
            state = "is as shipped"
        git = "`git checkout data/base` brings it back"
        yield (
            state == "is as shipped",
            f"base model: {path.name} {state}",
            git if in_repository() else again,
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


def free_space(folder):
    """Bytes free for `folder`, which need not exist yet."""
    folder = Path(folder)
    place = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(place).free


def disk():
    import torch

    from .lm.pretrained import cache_folder

    build = "CUDA" if torch.version.cuda else "CPU"
    other = "CPU" if build == "CUDA" else "CUDA"
    sizes = f"about {SIZES[build]} GB"
    if platform.system() == "Linux":
        sizes += f" with this {build} build of torch ({SIZES[other]} GB with {other})"
    free = free_space(sysconfig.get_path("purelib"))
    yield (
        free > 0.5e9,
        f"disk: {free / 1e9:.1f} GB free beside the packages, which take {sizes}",
        "pip needs room to update them: free half a GB",
    )
    folder = cache_folder()
    free = free_space(folder)
    yield (
        free > 1e9,
        f"disk: {free / 1e9:.1f} GB free for {folder}",
        "real data and models need up to 1 GB: make room, or set MINIPEFT_CACHE to"
        " another folder",
    )


def slow_in_bf16() -> bool:
    """Has this processor no instructions for bfloat16? PyTorch emulates them then, at a
    fraction of the speed of 32 bits."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not capability.startswith("AVX512")


def machine():
    import torch

    threads = torch.get_num_threads()
    cores = os.cpu_count() or 1
    yield (
        threads <= cores,
        f"threads: {threads}, processors: {cores}",
        f"more threads than processors slow each other down: set"
        f" OMP_NUM_THREADS={cores}",
    )
    if (found := memory()) is not None:
        yield (
            found[0] > 2e9,
            f"memory: {found[0] / 1e9:.1f} GB free of {found[1] / 1e9:.1f} GB",
            "a chapter needs up to 2 GB: close something",
        )
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        what = f"GPU: {torch.cuda.get_device_name(0)}, {total / 1e9:.0f} GB"
    elif torch.backends.mps.is_available():
        what = "GPU: Apple's, with --device mps"
    else:
        what = "no GPU: fine, every chapter runs on the processor"
    yield True, what, ""
    if slow_in_bf16():
        yield True, "bfloat16 is many times slower than 32 bits on this processor", ""


def checks():
    for part in (packages, base, disk, machine):
        try:
            yield from part()
        except ImportError as error:
            install = "-e ." if in_repository() else "--force-reinstall minipeft"
            yield False, f"cannot import {error.name}", f"pip install {install}"
        except OSError as error:
            yield False, f"cannot look at {part.__name__}: {error}", "try again"
