"""What every benchmark writes down besides its numbers, and how: in one piece, or not at all."""
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def facts():
    """How to get these numbers again: command, processor, versions, date, commit."""
    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    ask = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(ask, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "date": datetime.datetime.now().isoformat(timespec="minutes"), "commit": commit.stdout.strip() or None,
            "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
            "versions": {"python": platform.python_version()}
                        | {name: installed(name) for name in ("torch", "peft", "transformers", "sacrebleu")}}


def save(path, record):
    """Write beside, then rename."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    beside = Path(path).with_suffix(".partial")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)
