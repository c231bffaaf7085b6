"""`train` and `minipeft finetune` in two processes: one large batch's weights, one
writer, one sentence for an error, and the same bits after a stop.

All cases of `train` run in one pair of processes, on the CPU with gloo.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from test_training import Letters, examples, tiny
from tolerance import tolerance
from two_processes import join

from minipeft import get_peft_model
from minipeft.cli import main
from minipeft.cli_methods import KNOWN, make_config
from minipeft.lm import distributed
from minipeft.lm.training import make_optimizer, train
from minipeft.quant import quantize_model

STEPS = 4
# two layers of nine sums, of up to 64 terms, forth and back
ROUNDING = tolerance(torch.float32, terms=64, steps=2 * 9 * 2 * STEPS)
# its penalty on all matrices at once is computed outside of the sharded blocks
UNSHARDED = {"adalora"}
METHODS = [name for name in KNOWN if name not in ("loraplus", "subspace")] + ["full"]
CASES = [
    (engine, name)
    for name in METHODS
    for engine in ("ddp", "fsdp2")
    if not (engine == "fsdp2" and name in UNSHARDED)
]
# what else train is asked for, with LoRA
OPTIONS = {
    "accumulated": {"accumulate": 2},
    "evaluated": {"evaluate_every": 2, "valid": examples(7)},
    "labels in one half only": {"data": "half"},
    "rows that do not halve": {"data": "odd"},
}


class HalfLabelled:
    """Ready batches of four rows, of which the last two have no labels."""

    def batch(self, step):
        torch.manual_seed(step)
        ids = torch.randint(64, (4, 6))
        labels = ids.clone()
        labels[2:] = -100
        return {"input_ids": ids, "labels": labels}


def make(name, dropout=0.0):
    torch.manual_seed(1)
    base = tiny(initializer_range=0.2)
    if name == "full":
        return base
    method = KNOWN[name]
    if method.in_4bit:
        base = quantize_model(base)
    options = {"r": 4} if method.kind == "LORA" else {}
    fields = {"lora_dropout": dropout} if dropout else {}
    return get_peft_model(base, make_config(name, method, STEPS, options, fields))


def run(model, rows, **options):
    """Some steps of SGD: its result is linear in the gradients, so rounding stays
    small."""
    data = {"half": HalfLabelled(), "odd": examples(3)}.get(
        options.pop("data", None), examples(13)
    )
    given = dict(steps=STEPS, lr=0.1, optimizer="sgd", clip=0.5, progress=False)
    return train(
        model, data, tokenizer=Letters(), batch_size=rows, **{**given, **options}
    )


class InterruptOne:
    """Ctrl-C that only the first process gets, after the second step."""

    def __call__(self, step, facts):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def work(rank, folder):
    join(rank, folder)
    problems = {}
    for engine, name in CASES:
        model = make(name)
        if engine == "fsdp2":
            distributed.shard(model)
        try:
            run(model, 2)
            model.save_pretrained(folder / engine / name)
        except (RuntimeError, ValueError) as problem:
            problems[f"{engine}, {name}"] = str(problem)
    for name, options in OPTIONS.items():
        model = make("lora")
        history = run(model, 2, folder=folder / "runs" / name, **options)
        model.save_pretrained(folder / "options" / name)
        if rank == 0:
            text = json.dumps([history.losses, history.eval_loss, history.tokens])
            (folder / "options" / name / "history.json").write_text(text)
    for engine in ("ddp", "fsdp2"):
        resumed(engine, folder / "stop" / engine)
    (folder / f"problems {rank}.json").write_text(json.dumps(problems))
    dist.destroy_process_group()


def resumed(engine, folder):
    """The same training without a stop, and with one; dropout needs the random
    state."""
    for place, log in (("whole", None), ("stopped", InterruptOne()), ("stopped", None)):
        model = make("lora", dropout=0.3)
        if engine == "fsdp2":
            distributed.shard(model)
        history = run(model, 2, optimizer="adamw", folder=folder / place, log=log)
        assert history.stopped == ("interrupted" if log else None)
        assert history.steps == (2 if log else STEPS)
    model.save_pretrained(folder / "end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


def weights(folder):
    file = next(folder.glob("*model.safetensors"))
    return {name: t.double() for name, t in load_file(file).items()}


def distance(found, expected):
    """Relative, over all weights."""
    assert found.keys() == expected.keys()
    apart = sum((found[name] - expected[name]).square().sum() for name in expected)
    size = sum(t.square().sum() for t in expected.values())
    return (apart / size).sqrt().item()


@pytest.mark.parametrize("engine, name", CASES)
def test_two_processes_give_the_weights_of_one_large_batch(
    engine, name, folder, tmp_path
):
    problems = json.loads((folder / "problems 0.json").read_text())
    assert f"{engine}, {name}" not in problems
    model = make(name)
    model.save_pretrained(tmp_path / "start")
    run(model, 4)
    model.save_pretrained(tmp_path / "end")
    alone = weights(tmp_path / "end")
    assert distance(weights(folder / engine / name), alone) < ROUNDING
    assert distance(weights(tmp_path / "start"), alone) > 1e-4, "was not trained"


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_is_the_mean_over_all_labels(name, folder, tmp_path):
    """Completions differ in length: a mean of the processes' means would differ."""
    model = make("lora")
    history = run(model, 4, folder=tmp_path / "run", **OPTIONS[name])
    model.save_pretrained(tmp_path / "end")
    found = folder / "options" / name
    assert distance(weights(found), weights(tmp_path / "end")) < ROUNDING
    losses, evaluated, tokens = json.loads((found / "history.json").read_text())
    assert losses == pytest.approx(history.losses, rel=ROUNDING)
    assert [loss for _, loss in evaluated] == pytest.approx(
        [loss for _, loss in history.eval_loss], rel=ROUNDING
    )
    assert tokens == history.tokens


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_stop_changes_no_bit(engine, folder):
    """The Ctrl-C came to one process alone; both stopped after the same step."""
    whole, stopped = (
        load_file(folder / "stop" / engine / place / "latest.safetensors")
        for place in ("whole", "stopped")
    )
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    rng = whole["rng.cpu"]
    assert len(rng) == 2 and not torch.equal(rng[0], rng[1])  # each drops its own


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_another_number_of_processes_is_refused(engine, folder):
    with pytest.raises(ValueError, match=f"processes 2, {engine} \\(now 1\\)"):
        run(
            make("lora", dropout=0.3),
            2,
            optimizer="adamw",
            folder=folder / "stop" / engine / "whole",
        )


def test_states_in_8_bits_are_not_sharded(monkeypatch):
    monkeypatch.setattr(distributed, "is_part", lambda tensor: True)
    with pytest.raises(ValueError, match="adamw8bit.*expected one of adamw, adam, sgd"):
        make_optimizer(tiny(), "adamw8bit", 1e-3, (0.9, 0.999), 0.0)


def test_fewer_rows_than_processes(monkeypatch):
    monkeypatch.setattr(distributed, "processes", lambda: 3)
    with pytest.raises(ValueError, match="2 rows for 3 processes"):
        distributed.my_rows({"input_ids": torch.zeros(2, 5)})


# ---- the command line ----------------------------------------------------------------


def torchrun(*arguments):
    """(exit code, stdout, what the processes themselves print on stderr)"""
    # without the -- torchrun takes --r and --log for options of its own
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m -- minipeft"
    done = subprocess.run(
        [sys.executable, *command.split(), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    own = [line for line in done.stderr.splitlines() if line.startswith("minipeft")]
    return done.returncode, done.stdout, [line for line in own if "FAILED" not in line]


def test_finetune_in_two_processes(tmp_path):
    code, out, _ = torchrun(
        *"finetune --data mood --method qlora --fsdp --steps 2 --batch-size 2".split(),
        *f"--limit 0 --r 4 --json --out {tmp_path}/x".split(),
    )
    assert code == 0
    result = json.loads(out)  # one object: one process prints
    assert result["steps"] == 2
    files = {path.name for path in (tmp_path / "x").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "loss.csv"}
    assert "training" not in files


def test_an_error_is_one_sentence(tmp_path):
    code, out, lines = torchrun("finetune", "--data", "nosuch", "--out", tmp_path / "x")
    assert code == 1 and out == ""
    assert len(lines) == 1 and "nosuch" in lines[0]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--data mood --out x --fsdp", "start them with torchrun"),
        ("--data mood --out x --fsdp --method full", "--nproc-per-node"),
    ],
)
def test_fsdp_needs_processes(arguments, message, capsys):
    assert main(["finetune", *arguments.split()]) == 1
    assert message in capsys.readouterr().err


def test_adalora_is_not_sharded(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    arguments = "--data mood --out x --fsdp --method adalora"
    assert main(["finetune", *arguments.split()]) == 1
    assert "adalora" in capsys.readouterr().err
