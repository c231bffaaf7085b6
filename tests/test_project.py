"""The project around the package: its two lists of requirements agree, its commands
exist, importing it stays light."""

import ast
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def requirements(*extras) -> dict:
    """name -> specifier of the library and of these extras of pyproject.toml, with
    what they name in turn (`minipeft[course]`)."""
    found, lines = {}, [*PROJECT["dependencies"]]
    lines += [line for extra in extras for line in EXTRAS[extra]]
    for requirement in map(Requirement, lines):
        if requirement.name == "minipeft":
            found |= requirements(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement.specifier
    return found


def constraints() -> dict:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({pin.name for pin in pinned}) == len(pinned), "one version of each"
    return {pin.name: pin.specifier for pin in pinned}


def only_version(specifier) -> str:
    """ "==1.2" -> "1.2"."""
    (single,) = specifier
    assert single.operator == "==", single
    return single.version


def test_all_is_all_extras():
    assert requirements("all") == requirements(*EXTRAS)


def test_lock_holds_all_requirements_in_their_ranges():
    locked = constraints()
    for name, allowed in requirements("all").items():
        assert name in locked, f"{name} is not locked: make lock"
        assert only_version(locked[name]) in allowed, f"{name}: make lock"


def test_lock_holds_what_the_book_needs():
    """Besides [all], which neither learners nor the package's tests need to install."""
    lines = (ROOT / "book" / "requirements.txt").read_text().splitlines()
    asked = [Requirement(line) for line in lines if not line.startswith("#")]
    locked = constraints()
    for one in asked:
        name = canonicalize_name(one.name)
        assert name not in requirements("all")
        assert only_version(locked[name]) in one.specifier, f"{name}: make lock"


def test_lock_serves_the_cpu_and_the_cuda_build():
    """A version without a local part (+cpu, +cu130) admits every build of it."""
    for name, specifier in constraints().items():
        assert Version(only_version(specifier)).local is None, name
    assert Version("2.13.0+cpu") in constraints()["torch"]
    assert Version("2.13.0+cu130") in constraints()["torch"]


def test_this_environment_follows_the_lock():
    """Numbers in chapters belong to the lock. `make test-latest` has others."""
    if Path(sys.prefix).name != ".venv":
        pytest.skip("not the environment that make lab sets up")
    for name, specifier in constraints().items():
        if name in requirements("all"):
            assert importlib.metadata.version(name) in specifier, name


def test_conda_and_pip_install_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (lines,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert "--constraint constraints.txt" in lines and "--editable ." in lines
    named = [Requirement(line) for line in lines if not line.startswith("-")]
    named = {canonicalize_name(one.name): one.specifier for one in named}
    locked = constraints()
    assert named == {name: locked[name] for name in requirements("all")}
    assert any(line.startswith(f"python{PROJECT['requires-python']}") for line in conda)


def test_doctor_asks_for_what_is_declared():
    asked = doctor.requirements()
    assert [str(r) for r in asked.pop("")] == PROJECT["dependencies"]
    assert {extra: [str(r) for r in rs] for extra, rs in asked.items()} == {
        extra: [str(Requirement(line)) for line in lines]
        for extra, lines in EXTRAS.items()
    }


def imported(tree):
    """(name of the package, is it imported when the module is?) for each import."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            yield name.split(".")[0].lower(), node.col_offset == 0


def test_every_import_is_a_declared_dependency():
    """Outside functions the library imports what it needs, and `minipeft.course` what
    the extra [course] brings; inside functions anything of [all]."""
    brought = {"jinja2", "packaging"}  # by torch, by pooch
    brought_to_course = {"ipython", "nbconvert", "traitlets"}  # by jupyterlab

    def modules(*extras):
        return {name.replace("-", "_") for name in requirements(*extras)}

    for file in (ROOT / "minipeft").rglob("*.py"):
        course = "course" in file.relative_to(ROOT).parts
        eager = modules("course") | brought_to_course if course else modules()
        lazy = modules("all") | brought_to_course | {"psutil"}
        for name, at_import in imported(ast.parse(file.read_text(encoding="utf-8"))):
            if name in sys.stdlib_module_names or name == "minipeft":
                continue
            assert name in brought | (eager if at_import else lazy), (
                f"{file.relative_to(ROOT)} imports {name}"
            )


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert set(targets) == {
        "help",
        "lab",
        "test",
        "lint",
        "test-latest",
        "fuzz",
        "lock",
        "demo",
        "pretrain",
        "results",
        "chapters",
        "book",
        "book-test",
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


def test_style_is_checked_first():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test: lint$", makefile, re.M)
    for command in ("format --check", "check"):
        assert f"$(BIN)/ruff {command} --quiet .\n" in makefile


def test_ci_runs_what_a_learner_runs():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert re.search(r"^make book-test$", (ROOT / ".ci" / "run").read_text(), re.M)
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


def test_a_kernel_whose_port_is_taken_is_started_again(monkeypatch, pytestconfig):
    """Two workers start kernels at once: each looks for free ports, and the kernel
    binds them a moment later."""
    from jupyter_client.provisioning import local_provisioner
    from nbval.kernel import RunningKernel

    root = pytestconfig.pluginmanager.getplugin(str(ROOT / "conftest.py"))
    taken = socket.create_server(("127.0.0.1", 0))
    ports = local_provisioner.LocalPortCache
    free, asked = ports.find_available_port, []

    def first_one_taken(self, ip):
        asked.append(free(self, ip))
        return taken.getsockname()[1] if len(asked) == 1 else asked[-1]

    monkeypatch.setattr(ports, "find_available_port", first_one_taken)
    with taken:
        with pytest.raises(RuntimeError, match="died"):
            RunningKernel("python3")
        asked.clear()
        kernel = root.started_again(RunningKernel)("python3")
    kernel.stop()
    assert len(asked) == 10  # five ports a kernel


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
