"""The command line: what it makes, what it says when something is wrong, and its exit
codes."""

import csv
import email
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save
from tolerance import assert_within, tolerance

from minipeft import PeftModel, cli, cli_options, doctor, interrupts
from minipeft import io as io_of_minipeft
from minipeft.cli import main
from minipeft.cli_methods import ALIASES, KNOWN, find_method, make_config, parse_fields
from minipeft.config import METHODS
from minipeft.course import figures
from minipeft.errors import FileError
from minipeft.lm import data, load_pretrained
from minipeft.lm.gpt import GPT, GPTConfig
from minipeft.lm.tokenizer import train_tokenizer
from minipeft.lm.training import History

# the base below: nine sums of up to 32 terms in its layer, and an adapter's beside them
SUMS = dict(terms=32, steps=2 * 9)
ROUNDING = tolerance(torch.float32, **SUMS)


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
def nan_base(base, tmp_path):
    """The base, a weight of which is NaN."""
    folder = shutil.copytree(base, tmp_path / "nan")
    model = load_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(folder)
    return str(folder)


PICTURES = []  # of this process: the first is drawn


@pytest.fixture(autouse=True)
def one_picture(monkeypatch):
    """Drawing loss.png takes as long as these short trainings: draw it once."""

    def curves(*given, save, **more):
        if not PICTURES:
            draw(*given, save=save, **more)
            PICTURES.append(save.read_bytes())
        save.write_bytes(PICTURES[0])

    draw = figures.curves
    monkeypatch.setattr(figures, "curves", curves)


HUGE = "9" * 400  # no float holds it


def write_examples(path):
    path.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}{j}", "completion": f"{i}"}) + "\n"
            for i in range(10)
            for j in range(4)
        )
    )
    return str(path)


@pytest.fixture
def mine(tmp_path):
    return write_examples(tmp_path / "mine.jsonl")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    examples = write_examples(folder / "mine.jsonl")
    assert main([str(a) for a in tune(base, examples, folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def adapter(trained, tmp_path):
    """A trained adapter's folder."""
    return shutil.copytree(trained, tmp_path / "trained")


@pytest.fixture
def hears_ctrl_c():
    """For children: a shell's background job is deaf to Ctrl-C, and so are they."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(monkeypatch, at):
    """Ctrl-C when training asks for the batch of that step."""
    batch = data.Batches.batch

    def interrupted(self, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step)

    monkeypatch.setattr(data.Batches, "batch", interrupted)


class TestFinetune:
    """Training, stopping, going on, and what is saved."""

    def test_finetune_generate_evaluate_merge(self, base, mine, tmp_path, capsys):
        adapter, merged = tmp_path / "adapter", tmp_path / "merged"
        code, out, err = run(
            capsys, *tune(base, mine, adapter, "--r", 2, "--targets", "q_proj,v_proj")
        )
        assert (
            code == 0 and "are trained" in out and "generated" in out and "exact" in out
        )
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == (
            "LORA",
            2,
            4,
        )
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
            capsys,
            "evaluate",
            "--adapter",
            adapter,
            "--data",
            mine,
            "--limit",
            3,
            "--json",
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
        merged_logits = load_pretrained(merged)(ids).logits
        assert_within(merged_logits, adapted(ids).logits, **SUMS)
        code, out, err = run(
            capsys, "evaluate", "--base", merged, "--data", mine, "--limit", 3, "--json"
        )
        assert json.loads(out)["loss"] == pytest.approx(scores["loss"], rel=ROUNDING)

    @pytest.mark.parametrize("what", ["merge", "full"])
    def test_a_whole_model_keeps_how_transformers_generates(
        self, what, base, adapter, mine, tmp_path, capsys
    ):
        own = shutil.copytree(base, tmp_path / "base")
        ends = '{"eos_token_id": [2, 5]}'
        (own / "generation_config.json").write_text(ends)
        argv = tune(own, mine, tmp_path / "out", "--method", "full")
        if what == "merge":
            argv = ["merge", "--base", own, "--adapter", adapter]
            argv += ["--out", tmp_path / "out"]
        assert run(capsys, *argv)[0] == 0
        assert (tmp_path / "out" / "generation_config.json").read_text() == ends

    def test_full_fine_tuning_saves_a_plain_model(self, base, mine, tmp_path, capsys):
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
        self, base, mine, tmp_path, capsys, monkeypatch
    ):
        straight, stopped = tmp_path / "straight", tmp_path / "stopped"
        assert run(capsys, *tune(base, mine, straight))[0] == 0
        interrupt(monkeypatch, at=5)
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
        code, out, err = run(capsys, *tune(base, mine, stopped, "--lr", 1e-3))
        assert code == 1 and "other settings" in err and "say --restart" in err
        assert "resume" not in err
        assert run(capsys, *tune(base, mine, stopped))[0] == 0
        assert (straight / "adapter_model.safetensors").read_bytes() == (
            stopped / "adapter_model.safetensors"
        ).read_bytes()
        for again in ([], ["--lr", 1e-3]):
            code, out, err = run(capsys, *tune(base, mine, stopped, *again))
            assert code == 1 and "holds a finished run" in err and "--restart" in err
        assert (
            run(capsys, *tune(base, mine, stopped, "--lr", 1e-3, "--restart"))[0] == 0
        )

    def test_plain_text(self, base, tmp_path, capsys):
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

    def test_a_run_that_diverged_saves_no_adapter(self, base, mine, tmp_path, capsys):
        code, _, err = run(capsys, *tune(base, mine, tmp_path / "out", "--lr", "1e30"))
        assert code == 1 and "the loss became infinite" in err and "--restart" in err
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()

    @pytest.mark.parametrize(
        "options",
        [
            ("--lr", "1e30"),  # before anything is saved
            ("--lr", "1e30", "--accumulate", "2"),
            ("--lr", "1e30", "--method", "full"),
        ],
    )
    def test_a_run_that_kept_nothing_leaves_nothing(
        self, base, mine, tmp_path, capsys, options
    ):
        out = tmp_path / "out"
        # diverges before a checkpoint is due
        argv = tune(base, mine, out, "--steps", 200, *options)
        assert run(capsys, *argv)[0] == 1
        assert not out.exists()
        # as the message advises
        code, _, err = run(capsys, *tune(base, mine, out, "--restart"))
        assert code == 0, err

    def test_an_error_in_training_leaves_nothing(
        self, base, mine, tmp_path, capsys, monkeypatch
    ):
        from minipeft.lm import training

        def fail(*args, **options):
            raise ValueError("a fault of the data")

        monkeypatch.setattr(training, "accumulate_grads", fail)
        code, _, err = run(capsys, *tune(base, mine, tmp_path / "out"))
        assert code == 1 and "a fault of the data" in err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("most, threads", [(10**7, 1), (1, 3)])
    @pytest.mark.parametrize("command", ["generate", "evaluate", "finetune"])
    def test_a_small_model_computes_in_one_thread(
        self, base, mine, tmp_path, capsys, monkeypatch, most, threads, command
    ):
        monkeypatch.setattr(cli, "SMALL", most)
        argv = {
            "generate": ["generate", "say", "--base", base],
            "evaluate": ["evaluate", "--data", mine, "--base", base, "--limit", 2],
            "finetune": tune(base, mine, tmp_path / "out", "--steps", 1),
        }[command]
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert run(capsys, *argv)[0] == 0
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)

    def test_what_is_left_beside_the_adapter(self, base, mine, tmp_path, capsys):
        out = tmp_path / "out"
        assert run(capsys, *tune(base, mine, out))[0] == 0
        files = {path.name for path in out.iterdir()} - {"README.md"}
        curves = {"loss.csv", "loss.png"}
        assert files == {"adapter_config.json", "adapter_model.safetensors"} | curves
        assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
        with open(out / "loss.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == [str(i) for i in range(1, 13)]
        assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
        assert all(row["valid_loss"] for row in rows)  # every step of so few

    @pytest.mark.parametrize("rate", [1e-2, 3.0])
    def test_the_weights_of_the_lowest_validation_loss_are_kept(
        self, base, mine, tmp_path, capsys, rate
    ):
        out = tmp_path / "out"
        argv = tune(base, mine, out, "--lr", rate, "--steps", 20, "--json")
        code, text, _ = run(capsys, *argv)
        result = json.loads(text)
        with open(out / "loss.csv", newline="") as file:
            rows = {int(r["step"]): r["valid_loss"] for r in csv.DictReader(file)}
        losses = {step: float(loss) for step, loss in rows.items() if loss}
        best = min(losses, key=losses.get)
        assert len(losses) == 10 and result["kept_step"] == best
        argv = ["evaluate", "--adapter", out, "--data", mine, "--split", "valid"]
        _, text, _ = run(capsys, *argv, "--json")
        assert json.loads(text)["loss"] == pytest.approx(losses[best], rel=ROUNDING)

    def test_without_validation_the_last_weights_are_kept(
        self, base, mine, tmp_path, capsys
    ):
        argv = tune(base, mine, tmp_path / "a", "--evaluate-every", 0, "--json")
        result = json.loads(run(capsys, *argv)[1])
        assert (result["kept_step"], result["valid_loss"]) == (12, None)

    def test_four_bits(self, base, mine, tmp_path, capsys):
        for i, option in enumerate((["--load-in-4bit"], ["--method", "qlora"])):
            out = tmp_path / str(i)
            assert run(capsys, *tune(base, mine, out, *option))[0] == 0
        one, other = (
            (tmp_path / name / "adapter_model.safetensors").read_bytes()
            for name in "01"
        )
        assert one == other
        losses = []
        for option in ([], ["--load-in-4bit"]):
            argv = ["evaluate", "--adapter", tmp_path / "0", "--data", mine, *option]
            losses.append(json.loads(run(capsys, *argv, "--json")[1])["loss"])
        assert losses[0] != losses[1]

    def test_tensorboards_log(self, base, mine, tmp_path, capsys, monkeypatch):
        seen = []

        class Writer:
            def __init__(self, folder):
                seen.append(folder)

            def add_scalar(self, name, value, step):
                seen.append((name, step))

        fake = types.SimpleNamespace(SummaryWriter=Writer)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
        log = str(tmp_path / "log")
        assert run(capsys, *tune(base, mine, tmp_path / "a", "--log", log))[0] == 0
        assert seen[0] == log
        for name in ("loss", "lr", "grad_norm", "valid_loss"):
            assert {step for n, step in seen[1:] if n == name} == {*range(1, 13)}
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        code, _, err = run(capsys, *tune(base, mine, tmp_path / "b", "--log", log))
        assert code == 1 and "pip install tensorboard" in err
        assert not (tmp_path / "b").exists()
        log = str(tmp_path / "another")
        run(capsys, *tune(base, mine, tmp_path / "b", "--log", log))
        assert not Path(log).exists()

    @pytest.mark.parametrize("kind", ["instruction", "messages", "csv"])
    def test_other_records(self, base, tmp_path, capsys, kind):
        asked = [(f"say {i}", f"it is {i}") for i in range(20)]
        path = tmp_path / ("a.csv" if kind == "csv" else "a.jsonl")
        if kind == "csv":
            lines = ["prompt,completion", *(f"{q},{a}" for q, a in asked)]
        elif kind == "instruction":
            lines = [json.dumps({"instruction": q, "output": a}) for q, a in asked]
        else:
            turns = [
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                for q, a in asked
            ]
            lines = [json.dumps({"messages": talk}) for talk in turns]
        path.write_text("\n".join(lines))
        assert run(capsys, *tune(base, path, tmp_path / "out"))[0] == 0
        argv = ["generate", "say 3", "--adapter", tmp_path / "out"]
        more = [] if kind == "csv" else ["--chat"]
        code, out, _ = run(capsys, *argv, *more, "--max-new-tokens", 4, "--json")
        prompt = "say 3" if kind == "csv" else "User: say 3\nAssistant:"
        assert json.loads(out)["prompt"] == prompt


class TestMethods:
    """By their usual names, with defaults that work."""

    @pytest.mark.parametrize(
        "name", [*KNOWN, "LORA", "DoRA", "prefix_tuning", "Prompt"]
    )
    def test_each_trains_with_its_defaults(self, base, mine, tmp_path, capsys, name):
        out = tmp_path / "out"
        argv = ["finetune", "--base", base, "--data", mine, "--out", out, "--steps", 4]
        if name == "bitfit":  # a Llama has no biases
            argv += ["--set", "add_bias=true"]
        code, text, err = run(capsys, *argv, "--method", name, "--limit", 2, "--json")
        assert code == 0, err
        result = json.loads(text)
        assert 0 < result["trained"] < result["parameters"]
        assert result["method"] == find_method(name)[0]
        argv = ["generate", "say", "--adapter", out, "--max-new-tokens", 2]
        assert run(capsys, *argv)[0] == 0

    @pytest.mark.parametrize(
        "name, field, value",
        [
            ("dora", "use_dora", True),
            ("rslora", "use_rslora", True),
            ("pissa", "init_lora_weights", "pissa"),
            ("olora", "init_lora_weights", "olora"),
            ("prompt", "num_virtual_tokens", 8),
            ("prefix", "num_virtual_tokens", 8),
            ("houlsby", "placement", "houlsby"),
            ("lora", "lora_alpha", 16),
        ],
    )
    def test_what_a_name_stands_for(self, name, field, value):
        usual, method = find_method(name)
        assert getattr(make_config(usual, method, 100, {}, {}), field) == value

    def test_set_and_options_come_before_a_names_defaults(self):
        usual, method = find_method("prefix")
        fields = parse_fields(["num_virtual_tokens=3"])
        config = make_config(usual, method, 100, {}, fields)
        assert config.num_virtual_tokens == 3
        usual, method = find_method("lora")
        for options, fields in [({"r": 4}, {}), ({}, parse_fields(["r=4"]))]:
            config = make_config(usual, method, 100, options, fields)
            assert (config.r, config.lora_alpha) == (4, 8)

    @pytest.mark.parametrize(
        "name, near",
        [("doar", "dora"), ("qloar", "qlora"), ("perfix", "prefix"), ("IA-3", "ia3")],
    )
    def test_the_nearest_name(self, name, near):
        with pytest.raises(ValueError, match=f"did you mean '{near}'"):
            find_method(name)

    def test_lora_plus_learns_b_faster(self, base, mine, tmp_path, capsys, monkeypatch):
        import minipeft.lm

        rates = []

        def watch(model, *args, optimizer, **options):
            rates.extend(group["lr"] for group in optimizer.param_groups)
            raise ValueError("seen")

        monkeypatch.setattr(minipeft.lm, "train", watch)
        argv = tune(base, mine, tmp_path / "a", "--method", "lora+", "--lr", 1e-3)
        assert "seen" in run(capsys, *argv)[2]
        assert {1e-3, 4e-3} <= set(rates)

    @pytest.mark.parametrize("name", ["pissa", "olora"])
    def test_a_start_that_changes_the_base_is_saved_for_the_base_as_it_was(
        self, base, mine, tmp_path, capsys, name
    ):
        out = tmp_path / "out"
        argv = tune(base, mine, out, "--method", name, "--r", 2, "--limit", 40)
        trained = json.loads(run(capsys, *argv, "--json")[1])["test"]
        config = json.loads((out / "adapter_config.json").read_text())
        assert config.get("init_lora_weights", True) is True
        argv = ["evaluate", "--adapter", out, "--data", mine, "--limit", 40, "--json"]
        loss = json.loads(run(capsys, *argv)[1])["loss"]
        assert loss == pytest.approx(trained["loss"], rel=ROUNDING)

    @pytest.mark.parametrize("more", [[], ["--accumulate", 3], ["--set", "target_r=2"]])
    def test_adalora_takes_ranks_away_also_when_stopped(
        self, base, mine, tmp_path, capsys, monkeypatch, more
    ):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        options = ["--method", "adalora", "--evaluate-every", 0, "--set", "init_r=10"]

        def argv(out):
            return tune(base, mine, out, *options, *more)

        assert run(capsys, *argv(whole))[0] == 0
        config = json.loads((whole / "adapter_config.json").read_text())
        ranks = [sum(kept) for kept in config["rank_pattern"].values()]
        assert sum(ranks) == config["target_r"] * len(ranks) < 10 * len(ranks)
        interrupt(monkeypatch, at=5)
        assert run(capsys, *argv(parts))[0] == 130
        monkeypatch.undo()
        assert run(capsys, *argv(parts))[0] == 0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (parts / name).read_bytes() == (whole / name).read_bytes()

    def test_the_list(self, capsys):
        code, out, _ = run(capsys, "methods")
        lines = out.splitlines()
        assert code == 0 and [line.split()[0] for line in lines] == [*KNOWN, "full"]
        assert all(len(line) <= 88 for line in lines)
        assert set(json.loads(run(capsys, "methods", "--json")[1])["methods"]) == {
            *KNOWN,
            "full",
        }

    def test_every_method_of_the_library_is_in_it(self):
        needs_experts = {"FUSION"}
        ours = {
            kind for kind, m in METHODS.items() if m.__module__.startswith("minipeft")
        }
        assert {method.kind for method in KNOWN.values()} == ours - needs_experts
        assert {ALIASES[name] for name in ALIASES} <= {*KNOWN, "full"}


class TestFolders:
    """What others put into a folder is never overwritten."""

    def test_nothing_that_is_read_is_overwritten(self, base, mine, tmp_path, capsys):
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
                assert code == 1 and "mine.jsonl is a file; expected a folder" in err
        for folder in (adapter, Path(base)):
            assert (
                before.items()
                >= {
                    path: path.read_bytes()
                    for path in folder.iterdir()
                    if path.is_file()
                }.items()
            )

    @pytest.mark.parametrize("name", ["config.json", "README.md", "notes", "loss.png"])
    @pytest.mark.parametrize("method", ["lora", "full", "merge", "pretrain"])
    def test_a_strangers_folder(
        self, base, mine, tmp_path, capsys, name, method, request
    ):
        out = tmp_path / "out"
        out.mkdir()
        (out / name).write_text("mine")
        if method == "merge":
            adapter = request.getfixturevalue("adapter")
            argv = ["merge", "--adapter", adapter, "--out", out]
        elif method == "pretrain":
            argv = ["pretrain", "--out", out]
        else:
            argv = tune(base, mine, out, "--method", method)
        for more in ([], ["--restart"]) if argv[0] == "finetune" else ([],):
            code, _, err = run(capsys, *argv, *more)
            assert code == 1 and f"is not empty, it holds {name}" in err
        assert [p.name for p in out.iterdir()] == [name]
        assert (out / name).read_text() == "mine"

    @pytest.mark.parametrize("out", ["", " ", "\t"])
    def test_no_name(self, base, mine, adapter, capsys, out):
        before = sorted(Path().iterdir())
        for argv in (
            tune(base, mine, out),
            tune(base, mine, out, "--method", "full"),
            ["merge", "--adapter", adapter, "--out", out],
            ["student", "--all", "--out", out],
            ["pretrain", "--out", out],
        ):
            code, _, err = run(capsys, *argv)
            assert code == 1 and "--out is empty: name a folder" in err
        assert sorted(Path().iterdir()) == before

    @pytest.mark.parametrize("first, then", [("lora", "full"), ("full", "ia3")])
    def test_no_adapter_beside_a_model(self, base, mine, tmp_path, capsys, first, then):
        out = tmp_path / "out"
        assert run(capsys, *tune(base, mine, out, "--method", first))[0] == 0
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        for more in ([], ["--restart"]):
            code, _, err = run(capsys, *tune(base, mine, out, "--method", then, *more))
            assert code == 1 and "would lie beside the result" in err
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    @pytest.mark.parametrize("text", [b"My own words.", b"caf\xe9", b""])
    def test_a_card_of_ones_own_in_a_runs_folder(
        self, base, mine, adapter, capsys, text
    ):
        """It stays, also where the run is made again."""
        assert "written by minipeft" in (adapter / "README.md").read_text()
        (adapter / "README.md").write_bytes(text)
        assert run(capsys, *tune(base, mine, adapter, "--restart"))[0] == 0
        assert (adapter / "README.md").read_bytes() == text

    @pytest.mark.parametrize("name", ["my.jsonl", "notes/a.txt", "best.pt"])
    @pytest.mark.parametrize("more", [[], ["--restart"]])
    def test_a_training_folder_of_ones_own(
        self, base, mine, adapter, capsys, name, more
    ):
        """The data may lie in the folder that the run takes for its checkpoints."""
        own = adapter / "training" / name
        own.parent.mkdir(parents=True)
        shutil.copy(mine, own)
        source = own if own.suffix == ".jsonl" else mine
        for rate in ("1e-2", "1e30"):  # it ends well, or keeps nothing
            argv = tune(base, source, adapter, "--lr", rate, "--steps", 40, *more)
            code = run(capsys, *argv)[0]
            assert code == (0 if more and rate == "1e-2" else 1)
            assert own.read_bytes() == Path(mine).read_bytes()
            assert [*adapter.glob("training/**/*.safetensors")] == []
            assert not (adapter / "training" / ".lock").exists()

    @pytest.mark.parametrize(
        "name, content",
        [
            ("history.json", b"mine"),
            ("history.json", b'{"loss": [3.1, 2.9]}'),
            ("history.json", b'["minipeft pretrain --steps 9"]'),
            ("run/notes", b"mine"),
            ("run/latest.safetensors", save({"w": torch.ones(1)})),
            ("loss.csv", b"epoch,loss\n1,2.5\n"),
            ("loss.csv", b""),
            ("training/latest.safetensors", save({"w": torch.ones(1)})),
            ("training/.lock", b""),
        ],
    )
    @pytest.mark.parametrize("method", ["lora", "full", "pretrain"])
    def test_a_strangers_model_beside_what_a_run_would_leave(
        self, base, mine, tmp_path, capsys, name, content, method
    ):
        out = tmp_path / "out"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_bytes(content)
        for file in ("adapter_config.json", "model.safetensors"):
            (out / file).write_text("mine")
        before = contents(out)
        argv = ["pretrain", "--out", out, "--steps", 1]
        if method != "pretrain":
            argv = tune(base, mine, out, "--method", method, "--restart")
        code, _, err = run(capsys, *argv)
        assert code == 1 and "is not empty, it holds adapter_config.json" in err
        assert contents(out) == before

    @pytest.mark.parametrize("left", [(), (".best.safetensors.1-ab.part",)])
    @pytest.mark.parametrize("more", [[], ["--restart"]])
    def test_a_run_killed_before_its_first_checkpoint_is_repeated(
        self, base, mine, trained, tmp_path, capsys, left, more
    ):
        training = tmp_path / "out" / "training"
        training.mkdir(parents=True)
        for name in (".lock", *left):
            (training / name).touch()
        assert run(capsys, *tune(base, mine, training.parent, *more))[0] == 0
        assert not training.exists()
        name = "adapter_model.safetensors"
        again = (training.parent / name).read_bytes()
        assert again == (trained / name).read_bytes()

    @pytest.mark.parametrize("left", ["run/.lock", "run/latest.safetensors", ".lock"])
    def test_a_killed_pretraining_is_repeated(
        self, tmp_path, capsys, monkeypatch, left
    ):
        out = tmp_path / "base"
        (out / left).parent.mkdir(parents=True)
        checkpoint = save({"w": torch.ones(1)}, {"minipeft": "{}"})
        (out / left).write_bytes(b"" if left.endswith(".lock") else checkpoint)
        begun = []

        def pretrained(folder, *arguments, **options):
            begun.append(folder)
            return None, None, History()

        monkeypatch.setattr("minipeft.lm.pretrain.pretrain", pretrained)
        code, _, err = run(capsys, "pretrain", "--out", out)
        assert code == 0 and begun == [out], err

    def test_a_hidden_file_is_nobodys(self, base, mine, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".DS_Store").touch()
        assert run(capsys, *tune(base, mine, tmp_path / "out"))[0] == 0


class TestTwoWriters:
    """Two commands on one --out: one result is whole, and the other command says so."""

    def argv(self, command, base, mine, adapter, out):
        if command == "merge":
            return ["merge", "--adapter", adapter, "--out", out]
        if command == "pretrain":
            return ["pretrain", "--out", out]
        return tune(base, mine, out, "--method", command)

    @pytest.mark.parametrize("command", ["lora", "full", "merge", "pretrain"])
    def test_the_folder_is_in_use(
        self, base, mine, adapter, tmp_path, capsys, monkeypatch, command
    ):
        out = tmp_path / "out"
        with io_of_minipeft.locked(out):
            argv = self.argv(command, base, mine, adapter, out)
            code, _, err = run(capsys, *argv)
            assert code == 1 and f"{out} is in use" in err
        assert [path.name for path in out.iterdir()] in ([], [".lock"])

    @pytest.mark.parametrize("command", ["lora", "ia3", "full", "merge"])
    def test_another_command_has_ended_in_between(
        self, base, mine, adapter, tmp_path, capsys, monkeypatch, command
    ):
        """While the second one loads its model."""
        out = tmp_path / "out"
        argv = self.argv(command, base, mine, adapter, out)
        open_model, before = cli.open_model, []

        def slow(*args):
            if not before:
                before.append({})
                assert main([str(word) for word in argv]) == 0
                before.append(contents(out))
            return open_model(*args)

        monkeypatch.setattr(cli, "open_model", slow)
        code, _, err = run(capsys, *argv)
        assert code == 1, err
        assert "is not empty" in err or "holds a finished run" in err
        assert contents(out) == before[1]


class TestWhatWouldFailLater:
    """It is found before the training."""

    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        import minipeft.lm

        def train(*args, **options):
            raise AssertionError("the training began")

        monkeypatch.setattr(minipeft.lm, "train", train)

    @pytest.mark.parametrize("place", ["/proc/out", "/dev/null/out", "/sys/out/deep"])
    def test_where_nothing_can_be_written(self, base, mine, capsys, place):
        code, _, err = run(capsys, *tune(base, mine, place))
        assert code == 1 and len(err.splitlines()) == 1

    @pytest.mark.parametrize(
        "method, name",
        [
            ("lora", "README.md"),
            ("lora", "adapter_config.json"),
            ("dora", "adapter_model.safetensors"),
            ("ia3", "loss.png"),
            ("full", "config.json"),
            ("full", "model.safetensors"),
            ("full", "tokenizer.json"),
            ("pretrain", "model.safetensors"),
            ("pretrain", "tokenizer_config.json"),
        ],
    )
    def test_a_folder_in_the_place_of_a_file(
        self, base, mine, tmp_path, capsys, method, name
    ):
        out = tmp_path / "out"
        (out / name).mkdir(parents=True)
        if name != "history.json":
            record = {"command": "minipeft pretrain --steps 9"}
            (out / "history.json").write_text(json.dumps(record))
        (out / "loss.csv").write_text(f"{','.join(cli.COLUMNS)}\n")
        argv = tune(base, mine, out, "--method", method, "--restart")
        if method == "pretrain":
            argv = ["pretrain", "--out", out]
        code, _, err = run(capsys, *argv)
        assert code == 1 and f"{out / name} is a folder; expected a file" in err

    @pytest.mark.parametrize("name", ["latest", "best"])
    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
    def test_a_checkpoint_that_cannot_be_replaced(
        self, tmp_path, monkeypatch, name, make
    ):
        monkeypatch.undo()
        from minipeft.lm import train

        make(tmp_path / f"{name}.safetensors")
        model = GPT(GPTConfig(vocab_size=9, num_hidden_layers=1, hidden_size=8))
        rows = types.SimpleNamespace(batch=lambda step: 1 / 0)  # no step is done
        for resume in (True, False):
            with pytest.raises(FileError, match=f"{name}.safetensors is a"):
                train(model, rows, steps=2, lr=1, folder=tmp_path, resume=resume)

    def test_no_permission(self, base, mine, tmp_path, capsys, monkeypatch):
        def refuse(self, *args, **options):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.setattr(Path, "touch", refuse)
        code, _, err = run(capsys, *tune(base, mine, out))
        assert code == 1 and f"cannot write into {out}: Permission denied" in err

    def test_too_little_disk(self, base, mine, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(doctor, "free_space", lambda folder: 1000)
        for method in ("lora", "full"):
            argv = tune(base, mine, tmp_path / "out", "--method", method)
            code, _, err = run(capsys, *argv)
            assert code == 1 and "MB of disk, and 0 MB are free" in err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "method, rank",
        [
            ("lora", 10**12),
            ("lora", 10**30),
            ("dora", 10**10),
            ("loha", 10**12),
            ("adalora", 10**9),
            ("vera", 10**20),
        ],
    )
    def test_a_rank_beyond_the_memory(self, base, mine, tmp_path, capsys, rank, method):
        option = ["--r", rank] if method != "adalora" else ["--set", f"init_r={rank}"]
        argv = tune(base, mine, tmp_path / "out", "--method", method, *option)
        code, _, err = run(capsys, *argv)
        assert code == 1 and f"{rank:,} needs" in err and "GB of memory" in err
        name = "init_r" if method == "adalora" else "--r"
        assert err.startswith(f"minipeft: {name} = ")

    @pytest.mark.parametrize("split", ["valid", "test", "train"])
    def test_an_example_that_is_too_long(
        self, base, tmp_path, capsys, monkeypatch, split
    ):
        monkeypatch.undo()
        rows = [{"prompt": f"say {i}", "completion": "it"} for i in range(30)]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        number = getattr(data.load_data(path), split)[0].meta["line"]
        rows[number - 1]["prompt"] += " cat" * 70
        # the split is drawn by the order of the rows, not by their text
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, _, err = run(capsys, *tune(base, path, tmp_path / "out", "--limit", 9))
        assert code == 1 and f"a.jsonl, line {number}: " in err
        assert "truncate" not in err and "but a row holds 64" in err
        assert not (tmp_path / "out").exists()


class TestDiskFull:
    """While something is written: one sentence, and nothing half-written is left."""

    def limited(self, capsys, kilobytes, *argv):
        """Run the command where no file may be larger: like a full disk. Returns what
        it says on stderr."""
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
        try:
            code, _, err = run(capsys, *argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert code == 1, err
        return err

    @pytest.mark.parametrize("free", [0, 1000, 1_000_000])
    def test_too_little_disk_for_a_merged_model(
        self, adapter, tmp_path, capsys, monkeypatch, free
    ):
        monkeypatch.setattr(doctor, "free_space", lambda folder: free)
        out = tmp_path / "merged"
        code, _, err = run(capsys, "merge", "--adapter", adapter, "--out", out)
        assert code == 1 and "the model needs 1 MB of disk, and" in err
        assert not out.exists()

    @pytest.mark.parametrize("kilobytes", [1, 20, 30])
    def test_merge(self, base, adapter, tmp_path, capsys, kilobytes):
        """The model has 35 kB, its tokenizer 31 kB."""
        out = tmp_path / "out"
        argv = ["merge", "--adapter", adapter, "--out", out]
        said = self.limited(capsys, kilobytes, *argv)
        assert said.startswith("minipeft: ") and len(said.splitlines()) == 1
        assert not out.exists()

    @pytest.mark.parametrize(
        "method, kilobytes",
        [("lora", 4), ("full", 4), ("ia3", 0), ("prompt", 0), ("full", 33)],
    )
    def test_finetune(self, base, mine, tmp_path, capsys, method, kilobytes):
        """The checkpoint, the first file, the model after its checkpoints."""
        argv = tune(base, mine, tmp_path / "out", "--method", method)
        said = self.limited(capsys, kilobytes, *argv)
        assert said.splitlines()[-1].startswith("minipeft: ")
        assert not [*tmp_path.rglob("*.safetensors")]
        assert not [*tmp_path.rglob("*.json")]

    def test_a_students_edition(self, tmp_path, capsys):
        said = self.limited(capsys, 9, "student", "--all", "--out", tmp_path / "out")
        assert len(said.splitlines()) == 1
        assert not [*tmp_path.rglob("*.ipynb")]


class TestMistakes:
    """One sentence and exit code 1."""

    @pytest.mark.parametrize(
        "change, message",
        [
            (("--data", "sqll"), "did you mean 'sql'"),
            (("--data", "none.txt"), "cannot read none.txt: No such file"),
            (("--data", "."), ". is a folder: expected a .txt, .jsonl or .csv file"),
            (("--base", "./nowhere"), "nowhere"),
            (("--method", "lroa"), "did you mean 'lora'?"),
            (("--targets", "q_prj"), "q_proj"),
            (("--targets", "q_prj"), "--targets finds no module for 'q_prj'"),
            (("--r", "0"), "--r = 0: expected a positive integer"),
            (("--alpha", "0"), "--alpha = 0.0: expected a number that is not 0"),
            (("--alpha", "1e300"), "--alpha = 1e+300: expected a number that is"),
            (("--set", "lora_alpha=0"), ": lora_alpha = 0: expected a number that"),
            (("--r", HUGE), "--r = 9999999999"),
            (("--r", HUGE), "9 ... 99999: expected int, finite and below 1e308"),
            (("--set", f"lora_alpha={HUGE}"), "expected float, finite and below 1e308"),
            (("--set", "lora_dropout=1e400"), "= inf: expected float, finite and"),
            (("--set", f"r={10**300}"), "r = 1,000,000,000,000,000,000,000"),
            (("--r", 10**307), "GB of memory"),
            (
                ("--method", "loha", "--set", "use_effective_conv2d=true"),
                "--set use_effective_conv2d=true is for convolutions",
            ),
            (("--set", "bias=all"), "--method bitfit trains biases"),
            (("--set", "lora_dropoot=0.1"), "did you mean 'lora_dropout'?"),
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
            (("--method", "ia3", "--r", "4"), "--r: ia3 has no field r; it has"),
            (("--set", "r=2", "--r", "4"), "--set: r has an option of its own"),
            (
                ("--targets", "q_proj", "--set", 'target_modules=["v_proj"]'),
                "--set: target_modules has an option of its own",
            ),
            (("--set", "r=2", "--set", "r=3"), "--set r=3: r is set twice"),
            (
                ("--set", "base_model_name_or_path=x"),
                "base_model_name_or_path is not a choice: it is the name of --base",
            ),
            (("--set", "inference_mode=true"), "inference_mode is not a choice"),
            (("--set", "revision=x"), "revision is not a choice"),
            (("--method", "fusion"), "fusion needs --set adapters=VALUE"),
            (("--method", "adalora", "--set", "total_step=null"), "total_step = None"),
            (
                ("--method", "full", "--r", "4"),
                "--r, --alpha, --targets, --set and --load-in-4bit are for adapters",
            ),
            (("--device", "abacus"), "--device abacus: no such device here; expected"),
            (("--device", "meta"), "--device meta: no such device here; expected cpu"),
            (("--device", "cpu:0:0"), "--device cpu:0:0: "),
        ],
    )
    def test_a_users_mistake_is_one_line_and_exit_code_1(
        self, base, mine, tmp_path, capsys, change, message
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
                [
                    str(a)
                    for a in tune(base, mine, tmp_path / "out", *change, "--traceback")
                ]
            )

    @pytest.mark.parametrize(
        "name, given, message",
        [
            ("list.json", "list.json", "is a .json file: expected a .txt, .jsonl or"),
            ("list.json", "list.json", ".jsonl is JSON with one record a line"),
            ("data.xlsx", "data.xlsx", "is a .xlsx file: expected a .txt, .jsonl or"),
            ("notes", "notes", "is a file without a suffix: expected a .txt, .jsonl"),
            ("town.jsonl", "town.json", "town.jsonl'?): expected one of mood"),
            ("town.jsonl", "twon.jsonl", "No such file or directory (did you mean"),
            ("a.csv", "a.csv", "line 1: found 'prompt;completion', whose fields are"),
        ],
    )
    def test_a_file_that_is_not_data(
        self, base, mine, tmp_path, capsys, name, given, message
    ):
        (tmp_path / name).write_text("prompt;completion\na;b\n")
        change = ("--data", tmp_path / given)
        code, _, err = run(capsys, *tune(base, mine, tmp_path / "out", *change))
        assert code == 1 and message in err and str(tmp_path / given) in err

    def test_the_usage_says_what_is_required(self, capsys):
        for wrong in (["--steps", "many"], ["--bogus"]):
            with pytest.raises(SystemExit):
                main(["finetune", "--data", "sql", "--out", "x", *wrong])
            err = " ".join(capsys.readouterr().err.split())
            assert "[--data" not in err and "--data DATA --out OUT" in err

    def test_a_line_of_the_users_file_is_named(self, base, mine, tmp_path, capsys):
        with open(mine, "a") as file:
            file.write('{"prompt": 1}\n')
        code, out, err = run(capsys, *tune(base, mine, tmp_path / "out"))
        assert code == 1 and "mine.jsonl, line 41: expected" in err

    def test_no_adapter(self, tmp_path, capsys):
        code, out, err = run(
            capsys, "merge", "--adapter", tmp_path, "--out", tmp_path / "m"
        )
        assert code == 1 and "no adapter_config.json" in err

    def test_a_folder_that_is_no_adapter_or_no_model(self, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "adapter_config.json").write_text("{}")
        code, _, err = run(capsys, "generate", "x", "--adapter", tmp_path / "mien")
        assert code == 1 and "there is no such folder (did you mean" in err
        for command in (["generate", "x"], ["evaluate", "--data", "sql"]):
            code, _, err = run(capsys, *command, "--base", tmp_path / "mine")
            assert code == 1 and "mine holds an adapter, and no model: say" in err
        argv = tune(tmp_path / "mine", "sql", tmp_path / "out")
        code, _, err = run(capsys, *argv)
        assert code == 1 and "mine holds an adapter, and no model: take" in err

    @pytest.mark.parametrize(
        "text",
        ["{}", "x", "", "[]", '{"nbformat": 4, "nbformat_minor": 5, "metadata": 3}'],
    )
    def test_what_is_no_notebook_has_no_students_edition(self, text, tmp_path, capsys):
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
    def test_a_damaged_adapter_names_its_file(self, content, message, tmp_path, capsys):
        (tmp_path / "adapter_config.json").write_text(content)
        code, _, err = run(capsys, "generate", "x", "--adapter", tmp_path)
        assert (
            code == 1
            and str(tmp_path / "adapter_config.json") in err
            and message in err
        )

    @pytest.mark.parametrize(
        "error, message",
        [
            (OSError(errno.ENOSPC, "No space left", "a/b"), "a/b: No space left"),
            (OSError(errno.ENOSPC, "No space", "src", None, "out/x"), "t: out/x: No s"),
            (
                OSError(errno.EIO, "Input/output", "src", None, "o"),
                "minipeft: o: Input",
            ),
            (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission"),
            (RuntimeError("[enforce fail] can't allocate memory: 4 TB"), "not enough"),
            (torch.OutOfMemoryError("CUDA out of memory. Tried"), "not enough memory"),
            (MemoryError(), "not enough memory"),
            (RecursionError("maximum recursion depth"), "nested too deeply"),
            (OverflowError("int too large"), "a number is too large: int too large"),
            (ImportError("x needs y: pip install y"), "x needs y: pip install y"),
            (RuntimeError("shapes do not fit"), None),
            (KeyError("bug"), None),
            (AttributeError("bug"), None),
        ],
        ids=repr,
    )
    def test_what_a_person_can_cause_is_a_sentence(
        self, capsys, monkeypatch, error, message
    ):
        def fail(args):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "doctor", fail)
        if message is None:  # a bug keeps its traceback
            with pytest.raises(type(error)):
                main(["doctor"])
            return
        code, _, err = run(capsys, "doctor")
        assert code == 1 and err.startswith("minipeft: ") and message in err

    def test_more_virtual_tokens_than_can_be_counted(
        self, base, mine, tmp_path, capsys
    ):
        more = ["--method", "prompt-tuning", "--set", f"num_virtual_tokens={10**18}"]
        code, _, err = run(capsys, *tune(base, mine, tmp_path / "out", *more))
        assert code == 1 and "not enough memory" in err

    def test_a_base_in_four_bits(self, base, adapter, mine, tmp_path, capsys):
        """What cannot be done with it is said in options."""
        stored = tmp_path / "stored"
        load_pretrained(base, quantization="nf4").save_pretrained(stored)
        for name in cli.TOKENIZER_FILES:
            shutil.copy(Path(base) / name, stored)
        argv = tune(stored, mine, tmp_path / "out", "--method", "qlora")
        code, _, err = run(capsys, *argv)
        assert code == 1 and "leave --load-in-4bit out, and say lora for qlora" in err
        out = tmp_path / "merged"
        argv = ["merge", "--base", stored, "--adapter", adapter, "--out", out]
        code, _, err = run(capsys, *argv)
        assert code == 1 and "=True" not in err
        assert "Name the model in 16 or 32 bits with --base" in err

    def test_other_settings_are_named_as_options(
        self, base, mine, tmp_path, capsys, monkeypatch
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, at=6)
            assert run(capsys, *tune(base, mine, tmp_path / "out"))[0] == 130
        argv = tune(base, mine, tmp_path / "out", "--batch-size", 2)
        code, _, err = run(capsys, *argv)
        assert code == 1 and "--batch-size 4 (now 2)" in err
        assert "Repeat them to go on, or say --restart, or another --out" in err

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
    def test_data_that_never_ends(self, base, tmp_path, capsys, suffix):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
        for name, what in (("pipe", "a pipe"), ("zero", "a device")):
            path = tmp_path / f"{name}{suffix}"
            for argv in (
                tune(base, path, tmp_path / "out"),
                ["evaluate", "--base", base, "--data", path],
            ):
                code, _, err = run(capsys, *argv)
                assert code == 1 and f"{path} is {what}; expected a file" in err

    @pytest.mark.parametrize("text", ["\\ud800", "ok\\udfff", "\\ud83d."])
    def test_lone_surrogates(self, base, mine, tmp_path, capsys, text):
        with open(mine, "a") as file:
            file.write(f'{{"prompt": "{text}", "completion": "x"}}\n')
        code, _, err = run(capsys, *tune(base, mine, tmp_path / "out"))
        assert code == 1 and "line 41: " in err and "lone surrogate" in err

    def test_pretrain(self, tmp_path, capsys):
        (tmp_path / "file").touch()
        for out in ("file", "file/deep"):
            code, _, err = run(capsys, "pretrain", "--out", tmp_path / out)
            assert code == 1 and "is a file; expected a folder" in err

    @pytest.mark.parametrize("slow", [True, False])
    def test_pretrain_in_bf16_where_it_is_fast(
        self, tmp_path, capsys, monkeypatch, slow
    ):
        asked = {}

        def pretrained(*arguments, **options):
            asked.update(options)
            return None, None, History()

        monkeypatch.setattr(doctor, "slow_in_bf16", lambda: slow)
        monkeypatch.setattr("minipeft.lm.pretrain.pretrain", pretrained)
        code, _, err = run(capsys, "pretrain", "--out", tmp_path / "base")
        assert code == 0, err
        assert asked == {"bf16": not slow}


def in_ascii(monkeypatch):
    """stdout as it is with PYTHONIOENCODING=ascii."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    return out


class TestUsage:
    """Exit code 2, help and versions."""

    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["finetun"],
            ["finetune"],
            ["finetune", "--data", "sql", "--out", "x", "--r", "many"],
        ],
    )
    def test_wrong_usage_is_exit_code_2(self, argv, capsys):
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
            ("finetune", "--lr", "inf", "a number above 0, and finite"),
            ("finetune", "--lr", "1e400", "a number above 0, and finite"),
            ("finetune", "--alpha", "1e400", "a number, and finite"),
            ("finetune", "--steps", "1e400", "a whole number"),
            ("pretrain", "--lr", "1e400", "a number above 0, and finite"),
            ("pretrain", "--seed", str(10**30), "at most"),
            ("generate", "--temperature", "1e400", "at least 0, and finite"),
            ("generate", "--seed", str(10**30), "at most"),
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
            # an empty shell variable is not the default
            ("generate", "--adapter", "", "expected some text"),
            ("merge", "--adapter", "", "expected some text"),
            ("evaluate", "--base", "", "expected some text"),
            ("finetune", "--device", "", "expected some text"),
        ],
    )
    def test_numbers_out_of_bounds(self, command, option, value, message, capsys):
        needed = {
            "finetune": ["--data", "sql", "--out", "x"],
            "evaluate": ["--data", "sql"],
            "generate": ["x"],
            "merge": ["--out", "x"],
            "pretrain": [],
        }[command]
        with pytest.raises(SystemExit) as stop:
            main([command, *needed, f"{option}={value}"])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert f"argument {option}: '{value}': expected " in said and message in said

    def test_a_number_of_many_digits_is_cut(self, capsys):
        with pytest.raises(SystemExit):
            main(["pretrain", "--steps", "9" * 5000])
        said = capsys.readouterr().err
        assert " ... 9999': expected a whole number at least 1" in said
        assert len(said) < 500

    @pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
    def test_help_in_a_terminal_that_has_only_ascii(self, monkeypatch, command):
        out = in_ascii(monkeypatch)
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0 and len(out.buffer.getvalue()) > 200

    @pytest.mark.parametrize(
        "command", ["pretrain", "finetune", "generate", "evaluate", "merge", "doctor"]
    )
    def test_help_teaches(self, command, capsys):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0 and len(capsys.readouterr().out) > 300

    def test_as_a_module(self):
        result = subprocess.run(
            [sys.executable, "-m", "minipeft", "--help"], capture_output=True, text=True
        )
        assert (
            result.returncode == 0 and "minipeft finetune --data sql" in result.stdout
        )

    @pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal of a process")
    @pytest.mark.parametrize("start", ["module", "script"])
    @pytest.mark.usefixtures("hears_ctrl_c")
    def test_ctrl_c_while_torch_is_imported(self, tmp_path, start):
        """It ends as Ctrl-C does later on."""
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(
            "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n1 / 0\n"
        )
        (tmp_path / "minipeft_").mkdir()
        script = tmp_path / "minipeft_" / "minipeft"  # as pip writes it
        script.write_text("import sys\nfrom minipeft.cli import main\nsys.exit(main())")
        home = Path(cli.__file__).parents[1]
        path = os.pathsep.join([str(tmp_path), str(home)])
        command = ["-m", "minipeft"] if start == "module" else [script]
        result = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 130
        assert result.stdout == "" and result.stderr == "\nminipeft: stopped\n"

    @pytest.mark.parametrize("start", [["-c", "import minipeft"], ["-m", "other"]])
    @pytest.mark.usefixtures("hears_ctrl_c")
    def test_an_import_leaves_ctrl_c_as_it_is(self, tmp_path, start):
        """That of other programs. They may be packages, too, that import this one."""
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "__init__.py").write_text("import minipeft")
        (tmp_path / "other" / "__main__.py").touch()
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(
            "import signal\n"
            "assert signal.getsignal(2) is signal.default_int_handler\n"
            "raise SystemExit(7)"
        )
        home = Path(cli.__file__).parents[1]
        path = os.pathsep.join([str(tmp_path), str(home)])
        done = subprocess.run(
            [sys.executable, *start],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
        )
        assert done.returncode == 7, done.stderr

    def test_main_takes_ctrl_c_over(self, monkeypatch, capsys):
        handlers = []
        before = signal.signal(signal.SIGINT, interrupts.stop)
        monkeypatch.setitem(
            cli.COMMANDS,
            "doctor",
            lambda args: handlers.append(signal.getsignal(signal.SIGINT)) or ({}, 0),
        )
        try:
            assert run(capsys, "doctor")[0] == 0
            assert handlers == [signal.default_int_handler]
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize(
        "command, option",
        [
            ("finetune", "--learning-rate"),
            ("generate", "--max-tokens"),
            ("evaluate", "--metric"),
            ("merge", "--force"),
            ("student", "--solutions"),
            ("doctor", "--fix"),
            ("pretrain", "--batch-size"),
            ("methods", "--long"),
        ],
    )
    def test_an_unknown_option_shows_its_commands_usage(self, capsys, command, option):
        needed = {
            "finetune": ["--data", "sql", "--out", "x"],
            "evaluate": ["--data", "sql"],
            "merge": ["--adapter", "a", "--out", "x"],
            "student": ["--out", "x"],
        }
        with pytest.raises(SystemExit) as stop:
            main([command, *needed.get(command, []), f"{option}=1"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and f"usage: minipeft {command} [-h]" in err
        assert f"unrecognized arguments: {option}=1" in err

    @pytest.mark.parametrize(
        "argv, near",
        [
            (["finetun", "--data", "sql"], "no command 'finetun' (did you mean"),
            (["Merge"], "(did you mean 'merge'?)"),
            (["method"], "(did you mean 'methods'?)"),
            (["help"], "(did you mean '--help'?)"),
            (["generate", "the", "cat"], "several words stands in quotes"),
            (["sing"], "expected one of pretrain, finetune, generate"),
            (["generate", "x", "--temprature", "1"], "(did you mean '--temperature'?)"),
            (["evaluate", "--data", "sql", "--spilt=test"], "mean '--split'?)"),
            (["student", "--out", "x", "--nb-grader"], "mean '--nbgrader'?)"),
            (
                ["finetune", "--dta", "my.txt", "--out", "x"],
                "--dta my.txt (did you mean",
            ),
            (["finetune", "--dta", "my.txt", "--out", "x"], "mean '--data'?)"),
            (
                ["finetune", "--dta", "a", "--ot", "b"],
                "'--data'?) (did you mean '--out'",
            ),
            (["merge", "--adaptor", "a"], "mean '--adapter'?)"),
            (["student", "--nbgradr", "04_lora.ipynb"], "mean '--nbgrader'?)"),
            (["evaluate", "--daat=sql"], "mean '--data'?)"),
            ([], "no command: expected one of pretrain, finetune, generate"),
            (["finetune"], "required: --data, --out"),
            (["--vresion"], "mean '--version'?)"),
        ],
    )
    def test_the_nearest_command_or_option(self, capsys, argv, near):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and near in capsys.readouterr().err

    @pytest.mark.parametrize(
        "option, ours",
        [
            ("--learning_rate=1", "--lr"),
            ("--rank", "--r"),
            ("--epochs", "--steps"),
            ("--model", "--base"),
            ("--output-dir", "--out"),
            ("--4bit", "--load-in-4bit"),
        ],
    )
    def test_what_other_programs_call_it(self, capsys, option, ours):
        with pytest.raises(SystemExit):
            main(["finetune", "--data", "sql", "--out", "x", option])
        assert f"did you mean '{ours}'?" in capsys.readouterr().err

    def test_names_of_other_programs_lead_to_options_that_exist(self, capsys):
        for command in cli_options.parser().commands:
            with pytest.raises(SystemExit):
                main([command, "--help"])
        own = set(re.findall(r"(?<![\w-])--?\w[\w-]*", capsys.readouterr().out))
        assert set(cli_options.ELSEWHERE) <= own
        assert not own.intersection(*[sum(cli_options.ELSEWHERE.values(), ())])

    @pytest.mark.parametrize("option", ["--bogus", "--frobnicate", "-x", "--zz=3"])
    @pytest.mark.parametrize("command", ["finetune", "generate", "student", "doctor"])
    def test_what_is_near_to_nothing_has_no_suggestion(self, capsys, command, option):
        with pytest.raises(SystemExit):
            main([command, option])
        assert f"unrecognized arguments: {option}\n" in capsys.readouterr().err

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--version"])
        installed = importlib.metadata.version("minipeft")
        assert stop.value.code == 0
        assert capsys.readouterr().out == f"minipeft {installed}\n"


class TestGenerate:
    """Text from the command line."""

    def test_prompt_from_stdin(self, base, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
        code, out, err = run(
            capsys, "generate", "--base", base, "--max-new-tokens", 3, "--json"
        )
        assert code == 0 and json.loads(out)["prompt"] == "the cat"

    @pytest.mark.parametrize("given", ["\\n", "\n"])
    def test_a_new_line_stops(self, base, capsys, monkeypatch, given):
        """The shell gives a backslash and an n."""
        seen = []
        monkeypatch.setattr(
            "minipeft.lm.generate",
            lambda *args, **options: seen.append(options["stop"]) or "",
        )
        argv = ["generate", "x", "--base", base, "--stop", given, "--stop", "ab"]
        assert run(capsys, *argv)[0] == 0 and seen == [["\n", "ab"]]

    def test_a_text_in_a_terminal_that_has_only_ascii(self, base, monkeypatch):
        out = in_ascii(monkeypatch)
        monkeypatch.setattr("minipeft.lm.generate", lambda *args, **options: "")
        assert main(["generate", "the caf\u00e9", "--base", base]) == 0
        assert out.buffer.getvalue() == rb"the caf\xe9" + os.linesep.encode()

    def test_top_k_without_a_temperature_would_do_nothing(self, base, capsys):
        for option in (["--top-k", "3"], ["--top-p", "0.9"]):
            code, _, err = run(capsys, "generate", "x", "--base", base, *option)
            assert code == 1 and "--temperature above 0" in err

    @pytest.mark.parametrize(
        "more", [[], ["--temperature", 1], ["--temperature", 1, "--json"]]
    )
    def test_a_base_with_nan(self, nan_base, capsys, more):
        code, _, err = self.generate(capsys, nan_base, *more)
        assert code == 1 and "minipeft: the model's logits are NaN" in err

    def test_nan_is_null_in_json(self, nan_base, tmp_path, capsys):
        texts = tmp_path / "a.txt"
        texts.write_text("".join(f"say {i} {i + 1}\n" for i in range(9)))
        argv = ["evaluate", "--base", nan_base, "--data", texts, "--json"]
        code, out, _ = run(capsys, *argv)
        found = json.loads(out, parse_constant=pytest.fail)
        assert code == 0 and found["loss"] is None and found["perplexity"] is None

    def generate(self, capsys, base, *argv):
        argv = ["generate", "the cat", "--base", base, "--max-new-tokens", 6, *argv]
        return run(capsys, *argv)

    def test_samples(self, base, capsys):
        argv = ["--num-samples", 4, "--seed", 1, "--json"]
        texts = json.loads(self.generate(capsys, base, *argv)[1])["completions"]
        assert len(texts) == 4 and len(set(texts)) > 1
        again = json.loads(self.generate(capsys, base, *argv)[1])["completions"]
        assert texts == again
        code, out, _ = self.generate(capsys, base, "--num-samples", 2)
        assert code == 0 and out.startswith("--- 1\nthe cat") and "\n--- 2\n" in out
        argv = ["--num-samples", 2, "--temperature", 0]
        code, _, err = self.generate(capsys, base, *argv)
        assert code == 1 and "--temperature above 0" in err

    @pytest.mark.parametrize(
        "option, value",
        [
            ("--temperature", "hot"),
            ("--top-p", "1.0001"),
            ("--stop", ""),
            ("--num-samples", "0"),
        ],
    )
    def test_what_cannot_be_computed_is_wrong_usage(self, base, capsys, option, value):
        with pytest.raises(SystemExit) as stop:
            self.generate(capsys, base, option, value)
        assert stop.value.code == 2
        assert f"argument {option}: {value!r}: expected" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "argv",
        [
            ["--temperature", "1e-4"],
            ["--temperature", "1e-40"],
            ["--temperature", "1e-300", "--top-p", "1e-300"],
            ["--temperature", "1e30"],
            ["--temperature", "1", "--top-p", "1e-300"],
            ["--temperature", "1", "--top-k", "1000000"],
        ],
    )
    def test_the_smallest_and_largest_numbers_work(self, base, capsys, argv):
        assert self.generate(capsys, base, *argv)[0] == 0

    def test_stop(self, base, capsys):
        whole = json.loads(self.generate(capsys, base, "--json")[1])["completion"]
        stop = whole[3:5]
        argv = ["--stop", "never there", "--stop", stop, "--json"]
        text = json.loads(self.generate(capsys, base, *argv)[1])["completion"]
        assert text == whole[: whole.index(stop)]

    @pytest.mark.parametrize("prompt", ["the \udc80", "\udcff", "a\ud83d"])
    def test_a_prompt_that_is_not_text(self, base, capsys, prompt):
        code, _, err = run(capsys, "generate", prompt, "--base", base)
        assert code == 1 and "the prompt is not UTF-8 text" in err

    def test_stdin_that_is_not_text(self, base, capsys, monkeypatch):
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = run(capsys, "generate", "--base", base)
        assert code == 1 and "not UTF-8" in err

    def test_a_terminal_is_told_what_is_waited_for(self, base, capsys, monkeypatch):
        stdin = io.StringIO("the cat\n")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "Type the prompt" not in run(capsys, "generate", "--base", base)[2]
        stdin = io.StringIO("the cat\n")
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = run(capsys, "generate", "--base", base)
        assert code == 0 and "Type the prompt; end it with Ctrl-" in err

    def test_a_prompt_beyond_the_context(self, base, capsys):
        for words in (64, 1000):
            argv = ["generate", "cat " * words, "--base", base]
            code, _, err = run(capsys, *argv)
            assert code == 1 and "but the model's context holds 64: shorten it" in err

    def test_a_space_at_the_end_changes_nothing(self, base, capsys):
        texts = []
        for prompt in ("the cat", "the cat ", "the cat   "):
            argv = ["generate", prompt, "--base", base, "--json"]
            texts.append(json.loads(run(capsys, *argv)[1])["completion"])
        assert texts[0] == texts[1] == texts[2]

    def test_the_first_example_of_the_help_does_not_loop(self, capsys):
        prompt = re.search('minipeft generate "(.*?)"', cli_options.ABOUT)[1]
        code, out, _ = run(capsys, "generate", prompt)
        sentences = re.findall(r"[^.?]+[.?]", out)
        assert code == 0 and len(sentences) >= 5
        assert len(set(sentences)) >= 0.7 * len(sentences), out
        # what it says about one person agrees with itself
        name = re.search(r"called (\w+)", out)[1]
        assert out.count(name) >= 3


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

    @pytest.mark.parametrize(
        "processor, capability, slow",
        [
            ("x86_64", "AVX2", True),
            ("AMD64", "DEFAULT", True),
            ("x86_64", "AVX512", False),
            ("x86_64", "AVX512_VNNI", False),
            ("arm64", "DEFAULT", False),
        ],
    )
    def test_a_processor_without_bfloat16(
        self, monkeypatch, processor, capability, slow
    ):
        monkeypatch.setattr(doctor.platform, "machine", lambda: processor)
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda: capability
        )
        assert slow == any("bfloat16" in text for _, text, _ in doctor.machine())

    @pytest.mark.parametrize("slow", [True, False])
    def test_bf16_on_such_a_processor(
        self, base, mine, tmp_path, capsys, monkeypatch, slow
    ):
        monkeypatch.setattr(doctor, "slow_in_bf16", lambda: slow)
        argv = tune(base, mine, tmp_path / "out", "--steps", 1, "--device", "cpu")
        code, _, err = run(capsys, *argv, "--bf16")
        assert code == 0, err
        assert slow == ("--bf16 is many times slower than 32 bits" in err)

    @pytest.mark.parametrize("build, size", [("13.0", "5.7 GB"), (None, "1.8 GB")])
    def test_true_sizes(self, monkeypatch, build, size):
        monkeypatch.setattr(torch.version, "cuda", build)
        assert f"take about {size}" in next(iter(doctor.disk()))[1]

    def test_doctor_knows_a_changed_base(self, tmp_path, capsys, monkeypatch):
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
