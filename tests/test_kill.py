"""Training and saving, killed at random moments: what is on disk is always whole, and
the run goes on to the same bits.

A few kills here; MINIPEFT_FUZZ=N runs N of them.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipeft import LoraConfig, PeftModel, get_peft_model
from minipeft.lm import GPT, GPTConfig, load_pretrained, train
from minipeft.lm.checkpoint import load_checkpoint, read_metadata

KILLS = max(4, int(os.environ.get("MINIPEFT_FUZZ") or 0))
STEPS = 20
pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL"
)


class Rows:
    def batch(self, step):
        dice = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 40, (4, 8), generator=dice)
        return {"input_ids": ids, "labels": ids}


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_dropout=0.1, target_modules="all-linear")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return get_peft_model(GPT(GPTConfig(vocab_size=64, **sizes)), config)


def run(folder, log=None, optimizer="adamw"):
    """The run that is killed: it saves at every step."""
    model = adapted()
    history = train(
        model,
        Rows(),
        steps=STEPS,
        lr=1e-2,
        optimizer=optimizer,
        folder=folder,
        save_every=1,
        progress=False,
        log=log,
    )
    return model, history


def save(folder):
    """Saves one model of two, again and again."""
    models = []
    for value in (1.0, 2.0):
        model = GPT(GPTConfig(vocab_size=64, num_hidden_layers=2))
        adapter = get_peft_model(GPT(GPTConfig(vocab_size=64)), LoraConfig(r=64))
        for p in [*model.parameters(), *adapter.parameters()]:
            torch.nn.init.constant_(p, value)
        models.append((model, adapter))
    while True:
        for model, adapter in models:
            model.save_pretrained(folder / "model")
            adapter.save_pretrained(folder / "adapter")
            (folder / "ready").touch()


def start(what):
    code = f"import test_kill; test_kill.{what}"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; {code}"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def kill_after(process, ready, seconds, timeout=120):
    """SIGKILL, `seconds` after the file `ready` is there."""
    end = time.monotonic() + timeout
    while not ready.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(seconds)
    process.kill()
    process.wait()


@pytest.fixture
def dice():
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")  # shown where a test fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody kills."""
    model, history = run(tmp_path_factory.mktemp("whole"))
    return dict(model.named_parameters()), history


class TestTraining:
    def test_killed_runs_go_on_to_the_same_bits(self, tmp_path, dice, whole):
        latest = tmp_path / "latest.safetensors"
        for _ in range(KILLS):
            process = start(f"run(Path({str(tmp_path)!r}))")
            kill_after(process, latest, dice.uniform(0, 0.3))
            if latest.exists():
                facts = read_metadata(latest)
                done = len(facts["history"]["losses"])
                load_checkpoint(latest, adapted())
                assert 0 < done <= STEPS
        model, history = run(tmp_path)
        assert history.losses == whole[1].losses
        for name, p in model.named_parameters():
            assert torch.equal(p, whole[0][name]), name
        left = {path.name for path in tmp_path.iterdir()} - {".lock"}
        assert left == {"latest.safetensors"}  # what killed writers left is gone

    def test_killed_between_any_two_steps(self, tmp_path, dice, whole):
        """In one process: the weights in memory are thrown away at a random step."""
        for _ in range(2):
            stop_at = dice.randrange(STEPS)

            def log(step, facts, stop_at=stop_at):
                if step == stop_at:
                    raise MemoryError("killed")

            try:
                run(tmp_path, log)
            except MemoryError:
                pass
        model, history = run(tmp_path)
        assert history.losses == whole[1].losses
        for name, p in model.named_parameters():
            assert torch.equal(p, whole[0][name]), name


class TestSaving:
    def test_a_saved_model_and_adapter_are_always_whole(self, tmp_path, dice):
        for _ in range(max(2, KILLS // 4)):
            (tmp_path / "ready").unlink(missing_ok=True)
            process = start(f"save(Path({str(tmp_path)!r}))")
            kill_after(process, tmp_path / "ready", dice.uniform(0, 0.3))
            model = load_pretrained(tmp_path / "model")
            ends = [v for p in model.parameters() for v in (p.min(), p.max())]
            values = {v.item() for v in ends}
            assert values in ({1.0}, {2.0})
            base = GPT(GPTConfig(vocab_size=64))
            adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
            assert adapter.peft_config["default"].r == 64
            tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            assert {float(t.mean()) for t in tensors.values()} in ({1.0}, {2.0})
