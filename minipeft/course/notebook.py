"""Run chapters and save what they print, in the form that the tests expect.

python -m minipeft.course.notebook chapters/04_lora.ipynb
"""

import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

from .layout import lay_out

PROGRESS = re.compile(r"\[\d+:\d\d(:\d\d)?[<,]")  # of a tqdm bar
# Else ipykernel warns, at each start, that others on this machine could listen
ENCRYPTED = {"KernelManager": {"transport_encryption": "auto"}}
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def clean(notebook) -> None:
    """Drop what differs between runs or machines: timings, progress bars, the kernel's
    version."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output.get("name") != "stderr"
            ]
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = alternative_text(output)


def joined(outputs) -> list:
    """What was printed in pieces as one output, where nothing was shown in between.
    (nbclient's coalesce_streams moves a line in front of a table that it follows.)"""
    kept = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def print_noise(notebook) -> None:
    """What a reader would see in red, each line once: warnings, other libraries'.
    A progress bar is none: for a reader it is drawn on stdout."""
    noise = [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
        for line in output.text.splitlines()
        if line.strip() and not PROGRESS.search(line)
    ]
    for line in dict.fromkeys(noise):
        print("\n    stderr:", line[:200], end="", flush=True)


def alternative_text(output) -> dict:
    """An output's metadata with nothing in it but its figure's alternative text."""
    alt = output.metadata.get("image/png", {}).get("alt")
    return {"image/png": {"alt": alt}} if alt else {}


def run(path) -> float:
    """Execute a notebook from top to bottom in its own folder and save it; returns
    seconds."""
    # as under the tests
    os.environ.update(TQDM_DISABLE="1", OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    path, start = Path(path), time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    lay_out(notebook, path)
    NotebookClient(
        notebook,
        kernel_name="python3",
        config=Config(ENCRYPTED),
        timeout=900,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    print_noise(notebook)
    clean(notebook)
    lay_out(notebook, path)  # once more: whether a cell draws is seen in its outputs
    nbformat.validate(notebook)
    beside = path.with_suffix(".partial")
    nbformat.write(notebook, beside)
    beside.replace(path)  # an interrupted run leaves the old chapter whole
    return time.perf_counter() - start


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name} ...", end=" ", flush=True)
        print(f"{run(name):.0f} s")
