"""The library runs with its own requirements alone; what needs an extra says which."""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minipeft import doctor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distributions_needed_by(names) -> set:
    """These distributions and all that they require on this machine."""
    found, queue = set(), [(canonicalize_name(name), "") for name in names]
    while queue:
        name, extra = asked = queue.pop()
        if asked in found:
            continue
        found.add(asked)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for r in map(Requirement, importlib.metadata.requires(name) or []):
                if not r.marker or r.marker.evaluate({"extra": extra}):
                    queue += [(canonicalize_name(r.name), e) for e in ("", *r.extras)]
    return {name for name, _ in found}


def test_what_an_extra_of_a_requirement_needs_is_counted():
    """jupyter-events asks for jsonschema[format-nongpl], and that for fqdn."""
    assert "fqdn" in distributions_needed_by(["jupyter-events"])


def test_the_packages_are_as_large_as_doctor_says():
    """Without what else lies in this environment, pip and the book's tools say. The
    sizes are those of the locked versions: a newer torch may be larger."""
    locked = (ROOT / "constraints.txt").read_text().split()
    version = importlib.metadata.version("torch").partition("+")[0]
    if f"torch=={version}" not in locked:
        pytest.skip(f"torch {version} is not the locked one")
    asked = [
        Requirement(line).name
        for lines in PROJECT["optional-dependencies"].values()
        for line in (*lines, *PROJECT["dependencies"])
    ]
    files = [
        file.locate()
        for name in distributions_needed_by(asked)
        for file in installed_files(name)
    ]
    measured = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    said = doctor.SIZES["CUDA" if torch.version.cuda else "CPU"]
    assert 0.85 * said < measured / 1e9 < 1.1 * said


def installed_files(name) -> list:
    """What pip has written of a distribution; [] if it is absent."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.files(name) or []
    return []


@pytest.fixture(scope="module")
def library_alone(tmp_path_factory):
    """Runs code where nothing can be imported but the library's own requirements, and
    what these require, as after `pip install minipeft`."""
    needed = distributions_needed_by(
        Requirement(line).name for line in PROJECT["dependencies"]
    )
    absent = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not needed & set(map(canonicalize_name, owners))
    }
    assert {"matplotlib", "IPython", "transformers", "bitsandbytes"} <= absent
    hook = tmp_path_factory.mktemp("hook") / "sitecustomize.py"
    hook.write_text(f"""
from importlib.machinery import PathFinder

absent, find = {sorted(absent - {"minipeft"})}, PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else find(name, path, target)

PathFinder.find_spec = find_spec
""")
    path = os.pathsep.join([str(hook.parent), str(ROOT)])

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=hook.parent,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    assert "No module named 'IPython'" in run("-c", "import IPython").stderr
    return run


def test_library_trains_a_lora_with_its_own_requirements_alone(library_alone):
    code = """
import torch
from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.lm import evaluate, generate, load_data, load_pretrained, load_tokenizer
from minipeft.lm import train

torch.manual_seed(0)
data, tokenizer = load_data("mood"), load_tokenizer("lanternwick")
config = LoraConfig(r=4, target_modules="all-linear")
model = get_peft_model(load_pretrained("lanternwick"), config)
train(model, data, tokenizer=tokenizer, steps=3, lr=1e-3, batch_size=2, progress=False)
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(load_pretrained("lanternwick"), "adapter").eval()
x = torch.arange(12)[None]
assert torch.equal(again(x).logits, model.eval()(x).logits)
generate(again, tokenizer, "Once", max_new_tokens=3)
print(evaluate(again, tokenizer, data, limit=2, progress=False))
"""
    done = library_alone("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["--help", "finetune --help", "doctor --json"])
def test_command_line_runs_with_the_library_alone(library_alone, command):
    done = library_alone("-m", "minipeft", *command.split())
    assert "Traceback" not in done.stderr and done.stdout, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from minipeft.lanternwick.scoring import bleu; bleu(['a'], ['a'])",
        "import minipeft; minipeft.course.table",
        "from minipeft.course.student import write",
    ],
)
def test_what_is_absent_names_its_extra(library_alone, code):
    done = library_alone("-c", code)
    assert "pip install 'minipeft[course]'" in done.stderr, done.stderr


@pytest.mark.parametrize("grader", [[], ["--nbgrader"], ["--otter"]])
def test_students_editions_name_the_extra_that_suffices(library_alone, grader):
    """[teach], which has [course] in it; but first what is wrong with the request."""
    student = ["-m", "minipeft", "student", "--out", "x", *grader]
    done = library_alone(*student, ROOT / "chapters" / "04_lora.ipynb")
    assert done.returncode == 1 and done.stderr.count("pip install") == 1, done.stderr
    assert "pip install 'minipeft[teach]'" in done.stderr
    done = library_alone(*student, "nope.ipynb")
    assert done.stderr.startswith("minipeft: nope.ipynb: no such notebook")
    assert "name a chapter, or say --all" in library_alone(*student).stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs code where minipeft comes from its wheel, far from the repository."""
    wheels = tmp_path_factory.mktemp("wheels")
    site = tmp_path_factory.mktemp("site")
    build = "pip wheel --quiet --no-deps --no-build-isolation --wheel-dir".split()
    subprocess.run([sys.executable, "-m", *build, wheels, ROOT], check=True)
    (wheel,) = wheels.glob("minipeft-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            cwd=wheels,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )

    where = run("-c", "import minipeft; print(minipeft.__file__)").stdout
    assert where.startswith(str(site)), where
    return run


def test_the_wheel_has_all_that_it_needs(installed):
    """The base model, the register and the check functions travel in it."""
    code = """
import minipeft.course
from minipeft.lm import generate, load_data, load_pretrained, load_tokenizer

model, tokenizer = load_pretrained("lanternwick"), load_tokenizer("lanternwick")
print(len(generate(model, tokenizer, "Once", max_new_tokens=3)))
print(len(load_data("sql").test), minipeft.course.check)
"""
    done = installed("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_wheels_commands_run(installed):
    done = installed("-m", "minipeft", "doctor", "--json")
    assert "Traceback" not in done.stderr and '"base' in done.stdout, done.stderr
    assert installed("-m", "minipeft", "finetune", "--help").returncode == 0


def test_the_wheel_is_used_as_readme_says(installed, tmp_path):
    """From a person's own file to a text, with words that are true there."""
    mine, out = tmp_path / "mine.jsonl", tmp_path / "out"
    rows = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(30)]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    version = installed("-m", "minipeft", "--version")
    assert version.stdout == f"minipeft {PROJECT['version']}\n", version.stderr
    listed = installed("-m", "minipeft", "methods").stdout.splitlines()
    assert any(line.startswith("lora ") for line in listed)
    finetune = "-m minipeft finetune --steps 4 --limit 2 --data".split()
    done = installed(*finetune, mine, "--out", out)
    assert done.returncode == 0 and f"saved in {out}" in done.stdout, done.stderr
    done = installed("-m", "minipeft", "generate", "say 3", "--adapter", out)
    assert done.returncode == 0 and done.stdout.startswith("say 3"), done.stderr
    done = installed("-m", "minipeft", "student", "--all", "--out", tmp_path / "s")
    assert done.returncode == 1 and "not in the installed package" in done.stderr
    words = installed("-m", "minipeft", "doctor").stdout
    assert "make " not in words and "constraints.txt" not in words, words
