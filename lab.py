"""Opens the course in JupyterLab: `make lab`, or `python lab.py` in any environment
that has it. Arguments go to JupyterLab.

The notebooks opened are a copy of chapters/ in work/, which git ignores, so that `git
pull` never meets a learner's work. Each start brings new and changed chapters into the
copy. A notebook that the learner has changed is left as it is.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CHAPTERS, WORK = ROOT / "chapters", ROOT / "work"
RECORD = ".copied.json"  # in work/: {file: fingerprint of the version copied}


def fingerprint(path):
    """The SHA-256 of what a person writes in a file. In a notebook these are the cells;
    outputs and metadata change when it is opened and run."""
    content = path.read_bytes()
    if path.suffix == ".ipynb":
        try:
            cells = json.loads(content)["cells"]
            written = [
                [cell["cell_type"], "".join(cell["source"]), cell.get("attachments")]
                for cell in cells
            ]
            content = json.dumps(written, sort_keys=True).encode()
        except (ValueError, KeyError, TypeError):
            pass  # not a notebook, or not any more: its bytes count
    return hashlib.sha256(content).hexdigest()


def read_record(work):
    try:
        record = json.loads((work / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def replace(path, write):
    """write(beside), then rename: an interrupted copy leaves the old file whole."""
    beside = path.with_name(path.name + ".partial")
    write(beside)
    os.replace(beside, path)


def copy_chapters(chapters=CHAPTERS, work=WORK):
    """Bring work/ up to date with chapters/.

    A file that is absent is copied. One that the learner has not changed since it was
    copied follows chapters/. Returns the names of the files that the learner has
    changed and that have changed in chapters/ too: these are left alone.
    """
    record, left = read_record(work), []
    for source in sorted(chapters.rglob("*")):
        inside = source.relative_to(chapters)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not source.is_file() or source.suffix == ".partial":
            continue
        name, target = inside.as_posix(), work / inside
        new = fingerprint(source)
        if target.exists():
            mine = fingerprint(target)
            if record.get(name) == new or mine == new:
                record[name] = new
                continue
            if mine != record.get(name):
                left.append(name)
                continue
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(target, lambda beside, source=source: shutil.copyfile(source, beside))
        record[name] = new
    text = json.dumps(record, indent=1, sort_keys=True)
    replace(work / RECORD, lambda beside: beside.write_text(text, encoding="utf-8"))
    return left


def as_root(arguments):
    """Arguments of JupyterLab, which root, the user of containers and of rented
    machines, starts with --allow-root only."""
    said = any("allow-root" in text or "allow_root" in text for text in arguments)
    if said or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return arguments
    print(
        "You are root, so JupyterLab is started with --allow-root: whoever opens it may"
        " do anything on this machine.",
        flush=True,
    )
    return ["--allow-root", *arguments]


def main(arguments):
    for name in copy_chapters():
        print(
            f"work/{name}: there is a new version in chapters/, and you have changed"
            " yours, so yours stays. For the new one rename yours and start again.",
            flush=True,
        )
    arguments = as_root(arguments)
    print(
        "JupyterLab keeps this terminal until you press Ctrl-C in it, twice.",
        flush=True,
    )
    lab = [sys.executable, "-m", "jupyterlab", "--notebook-dir", str(ROOT)]
    # else ipykernel warns, for each chapter, that others on this machine could listen
    lab.append("--MappingKernelManager.transport_encryption=auto")
    start = "--LabApp.default_url=/lab/tree/work/README.md"
    if os.name == "nt":  # there exec leaves the terminal at once
        import subprocess

        sys.exit(subprocess.run([*lab, start, *arguments]).returncode)
    os.execv(sys.executable, [*lab, start, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
