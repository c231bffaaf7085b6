"""Sets up .venv, the environment of `make lab` and `make test`, with the versions in
constraints.txt. Needs nothing but Python 3.11 or newer, on any system.

On Linux, PyPI's torch brings NVIDIA's CUDA libraries along. A machine without an NVIDIA
GPU has no use for them: there torch comes from PyTorch's own index of CPU builds, or
from PyPI after all where that index does not answer."""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DOWNLOAD = {"cpu": 0.5, "cuda": 3.0}  # GB, all packages together
ON_DISK = {"cpu": 1.8, "cuda": 5.7}
TICK = 2 if sys.stdout.isatty() else 30  # seconds between two lines of progress


def locked(package):
    """The version of a package in constraints.txt, or None."""
    name = re.sub(r"[-_.]+", "-", package)
    found = re.search(rf"^{name}==(\S+)", LOCK.read_text(), re.M | re.I)
    return found and found[1]


def has_nvidia_gpu():
    drivers = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/nvidia-smi")
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, drivers))


def offers(index, version, timeout=10):
    """True if the package index answers and lists a CPU build of this torch.

    version: exact, or "" for any."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=timeout) as page:
            listed = page.read().decode(errors="replace")
    except (OSError, ValueError):  # no network, no such page, no such protocol
        return False
    build = re.escape(version) if version else r"[\d.]+"
    return re.search(rf"torch-{build}(\+|%2B)cpu-", listed) is not None


def choose_torch(system, gpu, version, index=CPU_INDEX):
    """The build of torch for this machine: ("cpu" or "cuda", index or None for PyPI,
    the reason)."""
    if system != "Linux":
        return "cpu", None, f"the usual build for {system}"
    if gpu:
        return "cuda", None, "this machine has an NVIDIA GPU"
    if offers(index, version):
        return "cpu", index, "this machine has no NVIDIA GPU"
    return "cuda", None, f"{index} does not answer, so torch comes from PyPI"


def python_in(folder):
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def create(folder):
    """A virtual environment; by virtualenv where Python comes without venv."""
    if python_in(folder).exists():
        return
    if subprocess.run([sys.executable, "-m", "venv", folder]).returncode:
        pip = [sys.executable, "-m", "pip", "install", "--user", "virtualenv"]
        subprocess.run(pip, check=True)
        subprocess.run([sys.executable, "-m", "virtualenv", folder], check=True)


def install(folder, *arguments):
    """pip's exit status. What one sees are its warnings and errors, and how much it has
    downloaded; all else is in its log. Build tools follow the lock too, from pip 25.3
    on."""
    folder = folder.resolve()  # pip runs in another one
    log = folder / "pip.log"
    options = ["--quiet", "--log", log]
    command = [python_in(folder), "-m", "pip", "install", *options, *arguments]
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        env = os.environ | {"PIP_BUILD_CONSTRAINT": str(LOCK)}
        env |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), downloads)
        env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with subprocess.Popen(list(map(str, command)), env=env, cwd=ROOT) as pip:
            status = wait(pip, Path(downloads))
    if status:
        print(f"pip failed; all that it did is in {log}", flush=True)
    return status


def wait(process, downloads):
    """The exit status of a process that fills a folder; prints how far it is."""
    started = time.monotonic()
    back, end = ("\r", "") if sys.stdout.isatty() else ("", "\n")
    ticked, before = False, None
    while True:
        try:
            status = process.wait(TICK)
            break
        except subprocess.TimeoutExpired:
            ticked = True
            size, seconds = size_of(downloads), time.monotonic() - started
            still = ": unpacking, or waiting for the network" if size == before else ""
            line = f"  {size / 1e6:,.0f} MB downloaded, {seconds:.0f} s{still}"
            before = size
            # a shorter line covers a longer one
            print(f"{back}{line:<72}" if back else line, end=end, flush=True)
    if ticked and back:
        print(flush=True)
    return status


def size_of(folder):
    """Bytes of the files in a folder, some of which may go away meanwhile."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.path.getsize(os.path.join(place, name))
            except OSError:
                pass
    return found


def install_all(folder, index, latest):
    """torch from its index, if one is given; then everything else. pip's status."""
    versions = ["--upgrade", "--upgrade-strategy", "eager"] if latest else ["-c", LOCK]
    if index is not None:
        torch = "torch" if latest else f"torch=={locked('torch')}"
        # --no-deps: what torch needs comes from PyPI, with the rest
        if install(folder, "--no-deps", "--index-url", index, torch):
            print(f"{index} failed: torch comes from PyPI", flush=True)
    return install(folder, *versions, "--editable", ".[all]")


def print_newer(folder):
    """What differs from the lock: where to look when `make test-latest` turns red."""
    freeze = [python_in(folder), "-m", "pip", "freeze", "--exclude-editable"]
    listed = subprocess.run(freeze, capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        package, _, found = line.partition("==")
        if found and found != locked(package):
            print(f"{package} {found}, locked: {locked(package)}")


def copy_lab_settings(folder):
    settings = folder / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "chapters" / ".jupyterlab.json", settings / "overrides.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv")
    parser.add_argument("--latest", action="store_true", help="newest, not locked")
    parser.add_argument("--torch-index", default=CPU_INDEX, help="of CPU builds")
    asked = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036, any Python may start this
        sys.exit(
            f"minipeft needs Python 3.11 or newer; this is {platform.python_version()}."
            " Name another: make lab PYTHON=python3.12"
        )
    version = "" if asked.latest else locked("torch")
    build, index, reason = choose_torch(
        platform.system(), has_nvidia_gpu(), version, asked.torch_index
    )
    free = shutil.disk_usage(asked.folder.resolve().parent).free / 1e9
    print(
        f"Setting up {asked.folder.name}: {'up to' if build == 'cuda' else 'about'}"
        f" {DOWNLOAD[build]} GB to download and {ON_DISK[build]} GB on disk"
        f" ({free:.1f} GB are free).\n"
        f"torch {version or 'newest'}, {build.upper()} build: {reason}.",
        flush=True,
    )
    if free < ON_DISK[build] and not asked.folder.exists():
        sys.exit("Too little room: free some, or put the folder on another disk.")
    create(asked.folder)
    if status := install_all(asked.folder, index, asked.latest):
        sys.exit(status)
    copy_lab_settings(asked.folder)
    if asked.latest:
        print_newer(asked.folder)


if __name__ == "__main__":
    main()
