"""The project around the package: its two lists of requirements agree, its commands
exist, importing it stays light."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from minipeft import doctor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def tracked() -> list:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of the project's files")
    return [
        ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()
    ]


def test_conda_and_pip_install_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {"pip": ["-e ."]} in conda
    conda = {line for line in conda if isinstance(line, str)} - {"pip"}
    pip = {
        "python" + PROJECT["requires-python"],
        *PROJECT["dependencies"],
        *EXTRAS["test"],
        *EXTRAS["teach"],
    }
    # conda-forge's name for it
    assert conda == {re.sub(r"^torch\b", "pytorch", line) for line in pip}


def test_doctor_asks_for_what_is_installed():
    assert [f"{name}>={least}" for name, least in doctor.NEEDED.items()] == PROJECT[
        "dependencies"
    ]
    assert set(doctor.FOR_TESTS) <= {line.partition(">=")[0] for line in EXTRAS["test"]}


def test_every_import_is_a_declared_dependency():
    declared = {
        re.split(r"[<>=]", line)[0].replace("-", "_").lower()
        for line in PROJECT["dependencies"]
    }
    # filelock with torch; the others with jupyterlab
    come_with = {"filelock", "ipython", "nbformat", "nbclient", "nbconvert"}
    # imported where asked for, inside functions
    optional = {"transformers", "peft", "nbgrader", "psutil"}
    for file in (ROOT / "minipeft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            names += (
                [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for name in (name.split(".")[0].lower() for name in names):
                known = (
                    name in sys.stdlib_module_names
                    or name in declared | come_with | {"minipeft"}
                )
                assert known or (name in optional and node.col_offset > 0), (
                    f"{file.relative_to(ROOT)} imports {name}"
                )


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert set(targets) == {
        "help",
        "lab",
        "test",
        "demo",
        "pretrain",
        "results",
        "chapters",
        "bench",
        "clean",
    }
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"no rule for {target}"
        assert target == "help" or f'"make {target} ' in makefile, (
            f"make help does not name {target}"
        )


def test_what_make_runs_exists():
    makefile = (ROOT / "Makefile").read_text()
    for module in re.findall(r"python -m (minipeft[\w.]*)", makefile):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for script in re.findall(r"python (\w+/\w+\.py)", makefile):
        assert (ROOT / script).exists(), script


def test_ci_runs_what_a_learner_runs():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


@pytest.mark.parametrize(
    "worker, inherited, threads",
    [("gw0", "2", "1"), ("gw0", None, "1"), (None, None, "2"), (None, "4", "4")],
)
def test_workers_do_not_share_cores(worker, inherited, threads):
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTEST_XDIST_WORKER", "OMP_NUM_THREADS")
    }
    env |= {"PYTEST_XDIST_WORKER": worker} if worker else {}
    env |= {"OMP_NUM_THREADS": inherited} if inherited else {}
    code = "import conftest, os; print(os.environ['OMP_NUM_THREADS'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == threads


def test_importing_is_light():
    """What `import minipeft` adds to `import torch`: nothing that draws, serves
    notebooks or talks to the network."""
    code = (
        "import sys, torch; before = set(sys.modules); import minipeft; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {
        "matplotlib",
        "IPython",
        "transformers",
        "peft",
        "bitsandbytes",
        "huggingface_hub",
        "sacrebleu",
        "tqdm",
    }
    assert not heavy & set(done.stdout.split())


def test_files_are_tidy():
    machine = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp/[a-z])\b/?")
    unfinished = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    for path in tracked():
        if (
            path.suffix not in {".py", ".md", ".toml", ".yml", ".cfg", ""}
            or not path.is_file()
        ):
            continue
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        assert not re.search(rf"\b({unfinished})\b", text), (
            f"{name} says that it is unfinished"
        )
        if path.suffix == ".py":
            assert not machine.search(text) or path == Path(__file__), (
                f"{name} holds a path of somebody's machine"
            )
            assert "\t" not in text, f"{name} holds tabs"


def test_data_and_licence_travel_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"][
        "build"
    ]["targets"]["wheel"]
    assert wheel["sources"] == {"data": "minipeft/data"} and "data" in wheel["include"]
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
