"""The command line: what it makes, what it says when something is wrong, and its exit
codes."""

import email
import hashlib
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from minipeft import PeftModel, doctor
from minipeft.cli import main
from minipeft.lm import data, load_pretrained
from minipeft.lm.gpt import GPT, GPTConfig
from minipeft.lm.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base in a folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(
        ["the cat sat on the mat", "what is it? it is a cat", "say 0 1 2 3 4 5 6 7 8 9"]
        * 20,
        420,
    )
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}{j}", "completion": f"{i}"}) + "\n"
            for i in range(10)
            for j in range(4)
        )
    )
    return str(path)


def run(capsys, *argv):
    """(exit code, stdout, stderr)"""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def tune(base, mine, out, *more):
    return [
        "finetune",
        "--base",
        base,
        "--data",
        mine,
        "--out",
        out,
        "--steps",
        12,
        "--batch-size",
        4,
        "--lr",
        1e-2,
        "--limit",
        4,
        *more,
    ]


def test_finetune_generate_evaluate_merge(base, mine, tmp_path, capsys):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    code, out, err = run(
        capsys, *tune(base, mine, adapter, "--r", 2, "--targets", "q_proj,v_proj")
    )
    assert code == 0 and "are trained" in out and "said" in out and "exact" in out
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    assert (
        sorted(config["target_modules"]) == ["q_proj", "v_proj"]
        and config["base_model_name_or_path"] == base
    )

    # the base is the adapter's
    code, out, err = run(
        capsys, "generate", "say 12", "--adapter", adapter, "--max-new-tokens", 5
    )
    assert code == 0 and out.startswith("say 12")
    code, out, err = run(
        capsys, "evaluate", "--adapter", adapter, "--data", mine, "--limit", 3, "--json"
    )
    scores = json.loads(out)
    assert (
        code == 0
        and scores["examples"] == 3
        and {"loss", "perplexity", "exact"} < set(scores)
        and scores["base"] == base
    )

    code, out, err = run(capsys, "merge", "--adapter", adapter, "--out", merged)
    assert code == 0
    ids = torch.arange(3, 20)[None]
    adapted = PeftModel.from_pretrained(load_pretrained(base), adapter)
    torch.testing.assert_close(
        load_pretrained(merged)(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0
    )
    code, out, err = run(
        capsys, "evaluate", "--base", merged, "--data", mine, "--limit", 3, "--json"
    )
    assert json.loads(out)["loss"] == pytest.approx(scores["loss"], abs=1e-5)


def test_full_fine_tuning_saves_a_plain_model(base, mine, tmp_path, capsys):
    code, out, err = run(
        capsys, *tune(base, mine, tmp_path / "full", "--method", "full", "--json")
    )
    result = json.loads(out)
    assert (
        code == 0
        and result["trained"] == result["parameters"]
        and result["test"]["examples"] == 4
    )
    assert "are trained" in err  # --json leaves stdout to the result
    assert (
        run(
            capsys,
            "generate",
            "say 12",
            "--base",
            tmp_path / "full",
            "--max-new-tokens",
            3,
        )[0]
        == 0
    )


def test_ctrl_c_saves_and_the_same_command_goes_on(
    base, mine, tmp_path, capsys, monkeypatch
):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(capsys, *tune(base, mine, straight))[0] == 0
    batch = data.Batches.batch

    def interrupted(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step)

    monkeypatch.setattr(data.Batches, "batch", interrupted)
    code, out, err = run(capsys, *tune(base, mine, stopped, "--json"))
    assert (
        code == 130
        and json.loads(out)["stopped"] == "interrupted"
        and json.loads(out)["steps"] == 6
    )
    assert (
        "the same command goes on" in err
        and (stopped / "adapter_model.safetensors").exists()
    )
    monkeypatch.undo()
    assert run(capsys, *tune(base, mine, stopped))[0] == 0
    assert (straight / "adapter_model.safetensors").read_bytes() == (
        stopped / "adapter_model.safetensors"
    ).read_bytes()
    code, out, err = run(capsys, *tune(base, mine, stopped, "--lr", 1e-3))
    assert code == 1 and "other settings" in err
    assert run(capsys, *tune(base, mine, stopped, "--lr", 1e-3, "--restart"))[0] == 0


def test_plain_text(base, tmp_path, capsys):
    text = tmp_path / "my.txt"
    text.write_text(
        "\n".join("the cat sat on the mat" for _ in range(3))
        + "\n"
        + "\n".join(f"it is {i}" for i in range(9))
    )
    code, out, err = run(capsys, *tune(base, str(text), tmp_path / "out", "--json"))
    assert code == 0 and set(json.loads(out)["test"]) == {
        "examples",
        "loss",
        "perplexity",
    }


def test_prompt_from_stdin(base, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    code, out, err = run(
        capsys, "generate", "--base", base, "--max-new-tokens", 3, "--json"
    )
    assert code == 0 and json.loads(out)["prompt"] == "the cat"


@pytest.mark.parametrize(
    "change, message",
    [
        (("--data", "sqll"), "did you mean 'sql'"),
        (("--data", "none.txt"), "cannot read none.txt"),
        (("--base", "./nowhere"), "nowhere"),
        (("--method", "lroa"), "did you mean lora"),
        (("--targets", "q_prj"), "q_proj"),
        (("--r", "0"), "positive integer"),
        (("--set", "lora_dropoot=0.1"), "did you mean lora_dropout"),
        (("--set", "lora_dropout"), "FIELD=VALUE"),
        (("--set", "r=null"), "r = None: expected int"),
        (("--set", "lora_dropout=often"), "lora_dropout = 'often': expected float"),
        (
            ("--set", "target_modules=5"),
            "target_modules = 5: expected list[str] | str | None",
        ),
        (("--set", "target_modules=(("), "'((' is not a regular expression"),
        (("--set", "rank_pattern=[8]"), "rank_pattern = [8]: expected dict"),
        (("--set", "peft_type=IA3"), "lora has no field 'peft_type'"),
        (("--method", "fusion"), "fusion needs --set adapters=VALUE"),
        (("--method", "adalora"), "total_step = None"),
        (
            ("--method", "full", "--r", "4"),
            "--r, --alpha, --targets and --set are for adapters",
        ),
        (("--device", "abacus"), "--device abacus: "),
        (("--device", "meta"), "--device meta: "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(
    base, mine, tmp_path, capsys, change, message
):
    code, out, err = run(capsys, *tune(base, mine, tmp_path / "out", *change))
    assert (
        code == 1
        and message in err
        and len(err.strip().splitlines()) == 1
        and err.startswith("minipeft: ")
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises((ValueError, OSError)):
        main(
            [str(a) for a in tune(base, mine, tmp_path / "out", *change, "--traceback")]
        )


def test_a_line_of_the_users_file_is_named(base, mine, tmp_path, capsys):
    with open(mine, "a") as file:
        file.write('{"prompt": 1}\n')
    code, out, err = run(capsys, *tune(base, mine, tmp_path / "out"))
    assert code == 1 and "mine.jsonl, line 41: expected" in err


def test_no_adapter(tmp_path, capsys):
    code, out, err = run(
        capsys, "merge", "--adapter", tmp_path, "--out", tmp_path / "m"
    )
    assert code == 1 and "no adapter_config.json" in err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["finetun"],
        ["finetune"],
        ["finetune", "--data", "sql", "--out", "x", "--r", "many"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "command, option, value, message",
    [
        ("finetune", "--steps", "0", "a whole number at least 1"),
        ("finetune", "--batch-size", "-2", "at least 1"),
        ("finetune", "--accumulate", "0", "at least 1"),
        ("finetune", "--lr", "0", "a number above 0"),
        ("finetune", "--lr", "inf", "above 0"),
        ("finetune", "--lr", "nan", "above 0"),
        ("finetune", "--alpha", "nan", "a number"),
        ("finetune", "--limit", "-1", "at least 0"),
        ("finetune", "--seed", "-1", "at least 0"),
        ("finetune", "--seed", str(2**70), "at most"),
        ("finetune", "--steps", "1.5", "a whole number"),
        ("generate", "--max-new-tokens", "-1", "at least 1"),
        ("generate", "--temperature", "-1", "at least 0"),
        ("generate", "--temperature", "nan", "at least 0"),
        ("generate", "--top-k", "0", "at least 1"),
        ("generate", "--top-p", "0", "above 0 and at most 1"),
        ("generate", "--top-p", "2", "above 0 and at most 1"),
        ("evaluate", "--limit", "-1", "at least 1"),
        ("evaluate", "--show", "-1", "at least 0"),
    ],
)
def test_numbers_out_of_bounds(command, option, value, message, capsys):
    needed = {
        "finetune": ["--data", "sql", "--out", "x"],
        "evaluate": ["--data", "sql"],
        "generate": ["x"],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main([command, *needed, f"{option}={value}"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"argument {option}: '{value}': expected is" in said and message in said


def test_nothing_that_is_read_is_overwritten(base, mine, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    assert run(capsys, *tune(base, mine, adapter))[0] == 0
    before = {
        path: path.read_bytes()
        for folder in (adapter, Path(base))
        for path in folder.iterdir()
        if path.is_file()
    }
    for out in (adapter, base):
        code, _, err = run(capsys, "merge", "--adapter", adapter, "--out", out)
        assert code == 1 and "holds what is read" in err
    code, _, err = run(capsys, *tune(base, mine, base, "--method", "full"))
    assert code == 1 and "holds what is read" in err
    for out in (mine, f"{mine}/below"):
        for command in (
            tune(base, mine, out),
            ["merge", "--adapter", adapter, "--out", out],
            ["student", "--all", "--out", out],
        ):
            code, _, err = run(capsys, *command)
            assert code == 1 and "mine.jsonl is a file; a folder is expected" in err
    for folder in (adapter, Path(base)):
        assert (
            before.items()
            >= {
                path: path.read_bytes() for path in folder.iterdir() if path.is_file()
            }.items()
        )


def test_a_run_that_diverged_saves_no_adapter(base, mine, tmp_path, capsys):
    code, _, err = run(capsys, *tune(base, mine, tmp_path / "out", "--lr", "1e30"))
    assert code == 1 and "the loss became infinite" in err and "--restart" in err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_top_k_without_a_temperature_would_do_nothing(base, capsys):
    for option in (["--top-k", "3"], ["--top-p", "0.9"]):
        code, _, err = run(capsys, "generate", "x", "--base", base, *option)
        assert code == 1 and "--temperature above 0" in err


@pytest.mark.parametrize(
    "text", ["{}", "x", "", "[]", '{"nbformat": 4, "nbformat_minor": 5, "metadata": 3}']
)
def test_what_is_no_notebook_has_no_students_edition(text, tmp_path, capsys):
    (tmp_path / "a.ipynb").write_text(text)
    code, _, err = run(
        capsys, "student", tmp_path / "a.ipynb", "--out", tmp_path / "out"
    )
    assert (
        code == 1
        and "a.ipynb is not a notebook" in err
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ("{}", "no peft_type"),
        ('{"peft_type": "LORA", "r": null}', "r = None"),
    ],
)
def test_a_damaged_adapter_names_its_file(content, message, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(content)
    code, _, err = run(capsys, "generate", "x", "--adapter", tmp_path)
    assert code == 1 and str(tmp_path / "adapter_config.json") in err and message in err


@pytest.mark.parametrize(
    "command", ["pretrain", "finetune", "generate", "evaluate", "merge", "doctor"]
)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and len(capsys.readouterr().out) > 300


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "minipeft", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "minipeft finetune --data sql" in result.stdout


def test_doctor_knows_a_changed_base(tmp_path, capsys, monkeypatch):
    import minipeft.lanternwick

    monkeypatch.setattr(minipeft.lanternwick, "DATA", tmp_path)
    assert [good for good, *_ in doctor.base()] == [False]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_text("x")
    good = hashlib.sha256(b"{}").hexdigest()
    (tmp_path / "base" / "SHA256SUMS").write_text(
        f"{good}  config.json\n{'0' * 64}  model.safetensors\n{'0' * 64} "
        " tokenizer.json\n"
    )
    found = list(doctor.base())
    assert (
        [f[0] for f in found] == [True, False, False]
        and "was changed" in found[1][1]
        and "is missing" in found[2][1]
    )
    code, out, err = run(capsys, "doctor", "--json")
    assert (
        code == 1
        and [c for c in json.loads(out)["checks"] if not c["ok"]]
        and "base model: config.json is as shipped" in err
    )


class TestDoctor:
    @pytest.mark.parametrize("bounds", ["torch>=99.1", "torch<1", "torch==2.0.0"])
    def test_a_version_out_of_range(self, monkeypatch, bounds):
        asked = {"": [Requirement(bounds)]}
        monkeypatch.setattr(doctor, "requirements", lambda: asked)
        checks = [*doctor.packages()]
        assert [good for good, *_ in checks] == [True, False]
        assert bounds in checks[1][2] and checks[1][1].startswith("torch 2")

    def test_a_missing_package(self, monkeypatch):
        asked = {
            "": [Requirement("no-such-package>=1")],
            "test": [Requirement("nbvaal")],
        }
        monkeypatch.setattr(doctor, "requirements", lambda: asked)
        _, needed, extra = doctor.packages()
        assert needed[:2] == (False, "no-such-package is not installed")
        assert extra == (False, "[test]: missing nbvaal", "pip install -e '.[all]'")

    def test_this_machine(self):
        assert all(good for good, *_ in [*doctor.machine(), *doctor.disk()])

    @pytest.mark.parametrize("build, size", [("13.0", "5.5 GB"), (None, "1.7 GB")])
    def test_true_sizes(self, monkeypatch, build, size):
        monkeypatch.setattr(torch.version, "cuda", build)
        assert f"take about {size}" in next(iter(doctor.disk()))[1]


class TestInstalledWheel:
    """Outside the repository, advice is true there."""

    @pytest.fixture(autouse=True)
    def wheel(self, monkeypatch, tmp_path):
        monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)

    def test_requirements_are_those_of_the_installed_package(self, monkeypatch):
        metadata = email.message_from_string(
            "Name: minipeft\nProvides-Extra: course\nProvides-Extra: test\n"
        )
        lines = [
            "torch>=2.5",
            'never>=1; platform_system == "Amiga"',
            'matplotlib>=3.8; extra == "course"',
            'nosuch; extra == "test"',
        ]
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
        found = doctor.requirements()
        names = {extra: [r.name for r in rs] for extra, rs in found.items()}
        assert names == {"": ["torch"], "course": ["matplotlib"], "test": ["nosuch"]}
        checks = [*doctor.packages()]
        assert all(good for good, *_ in checks)  # an extra is a choice
        assert "[test] is not installed (pip install 'minipeft[test]')" in checks[-1]

    def test_a_changed_base_is_not_for_git(self, monkeypatch, tmp_path):
        import minipeft.lanternwick

        monkeypatch.setattr(minipeft.lanternwick, "DATA", tmp_path)
        checks = [*doctor.base()]
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
        checks += doctor.base()
        again = "pip install --force-reinstall minipeft"
        assert [advice for _, _, advice in checks] == [again, again]
