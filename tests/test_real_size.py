"""The benchmarks on a real model run, at a toy size, and say so where it is absent."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tolerance import assert_within, tolerance

from minipeft.lanternwick.tasks import Example, Task
from minipeft.lm import GPT, GPTConfig
from minipeft.lm.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench  # noqa: E402
import bench_real  # noqa: E402
import real_fusion  # noqa: E402
import real_size  # noqa: E402
import three_ways  # noqa: E402

ABSENT = "nobody/has-this-model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    text = "Record: name: Ann\nText: Ann is a pub. User: Assistant: Review: sad"
    tokenizer = train_tokenizer([text] * 3, 450)
    torch.manual_seed(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    GPT(GPTConfig(vocab_size=len(tokenizer), **config)).save_pretrained(
        folder, tokenizer
    )
    return str(folder)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The task of five records; few steps; the record in a folder of its own."""
    examples = [
        Example(
            f"Record: name: {name}\nText:", f" {name} is a pub.", {"references": [name]}
        )
        for name in ("Ann", "Bob", "Cat", "Dan", "Eve")
    ]
    task = Task("toy", "pubs", examples * 4, examples, examples, "bleu", 0.0, None)
    monkeypatch.setattr(real_size, "load_data", lambda name: task)
    for name, value in {
        "TRAIN": 16,
        "VALID": 2,
        "TEST": 3,
        "STEPS": 10,
        "TRIAL": 2,
        "NEW_TOKENS": 3,
        "INSTRUCTIONS": ("Who?",),
        "OUT": tmp_path / "real_size.json",
    }.items():
        monkeypatch.setattr(real_size, name, value)
    real_size.data.cache_clear()
    yield tmp_path / "real_size.json"
    real_size.data.cache_clear()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["real_size.py", *arguments])
    real_size.main()


class TestRecord:
    def test_runs_are_written_as_they_come_in_and_not_made_twice(
        self, folder, toy, monkeypatch
    ):
        cases = ["before", "LoRA r 4", "(IA)³", "QLoRA r 4", "LoRA r 4, chat"]
        cases.append("AdaLoRA 6 to 4")
        run(monkeypatch, "--model", folder, "--cases", *cases)
        record = json.loads(toy.read_text())
        assert {"command", "machine", "date", "commit", "weights"} <= record.keys()
        assert [r["case"] for r in record["runs"]] == cases
        for r in record["runs"]:
            assert len(r["texts"]) == 3 and len(r["answers"]) == 1
            assert 0 <= r["bleu"] <= 100 and r["shakespeare"] > 0
            assert ("losses" in r) == (r["case"] != "before")
        before, lora, _, qlora, *_ = record["runs"]
        assert qlora["megabytes"] < lora["megabytes"] and before["parameters"] == 0
        monkeypatch.setattr(
            real_size, "one_run", lambda *a, **k: pytest.fail("it was done already")
        )
        run(monkeypatch, "--model", folder, "--cases", *cases)
        assert json.loads(toy.read_text())["runs"] == record["runs"]

    def test_a_rate_is_climbed_for_once_and_serves_all_seeds(
        self, folder, toy, monkeypatch
    ):
        ladder = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
        monkeypatch.setattr(real_size, "LADDER", ladder)
        asked = ["--model", folder, "--cases", "(IA)³", "--seeds", "0", "1"]
        run(monkeypatch, *asked)
        record = json.loads(toy.read_text())
        tried = {t["lr"]: t["valid_loss"] for t in record["trials"]}
        assert len(tried) == len(record["trials"])  # none of them twice
        best = ladder.index(min(tried, key=tried.get))
        assert 0 < best < len(ladder) - 1
        assert {ladder[best - 1], ladder[best + 1]} <= tried.keys()
        assert [r["seed"] for r in record["runs"]] == [0, 1]
        assert {r["lr"] for r in record["runs"]} == {ladder[best]}
        assert record["runs"][0]["losses"] != record["runs"][1]["losses"]

    def test_other_scores_are_written_beside_the_texts(self, toy, monkeypatch):
        tests = [{"references": ["Ann", "Bo"]}, {"references": ["Cy."]}]
        runs = [{"texts": ["Ann", "x"]}, {"texts": ["Bo", "Cy."]}]
        toy.write_text(json.dumps({"trials": [], "runs": runs, "test": tests}))

        class Rouge:
            def __init__(self, kinds):
                assert kinds == ["rougeL"]

            def score_multi(self, references, text):
                right = float(text in references)
                return {"rougeL": types.SimpleNamespace(fmeasure=right)}

        def nist(references, texts):
            assert references == [[["Ann"], ["Bo"]], [["Cy", "."]]]  # words
            return len(texts)

        fetched = []
        monkeypatch.setattr(real_size, "pip", lambda *asked: fetched.append(asked))
        for name, what in {
            "nltk.translate.nist_score": {"corpus_nist": nist},
            "rouge_score.rouge_scorer": {"RougeScorer": Rouge},
        }.items():
            for package in (name.split(".")[0], name.rpartition(".")[0], name):
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
            vars(sys.modules[name]).update(what)
        run(monkeypatch, "--score")
        record = json.loads(toy.read_text())
        assert [r["rouge_l"] for r in record["runs"]] == [50.0, 100.0]
        assert [r["nist"] for r in record["runs"]] == [2, 2]
        assert set(record["scorers"]) <= set(fetched[0])

    def test_running_text_is_trained_on_and_judged(self, folder, toy, monkeypatch):
        plays = [Example("", " Ann is a pub." * 40, {})] * 3
        task = dataclasses.replace(real_size.load_data("toy"), train=plays, valid=plays)
        of = {"tinyshakespeare": task}
        load = real_size.load_data
        monkeypatch.setattr(real_size, "load_data", lambda name: of.get(name, load("")))
        monkeypatch.setattr(real_size, "ROW", 16)
        run(monkeypatch, "--model", folder, "--cases", "LoRA r 4, Shakespeare")
        (made,) = json.loads(toy.read_text())["runs"]
        assert made["losses"] and 0 < made["shakespeare"] < 20

    def test_the_spectrum_of_what_full_training_changed(self, folder, monkeypatch):
        base = real_size.load_pretrained(folder)
        model = real_size.load_pretrained(folder)
        weight = model.model.layers[0].self_attn.q_proj.weight
        with torch.no_grad():
            weight += torch.outer(
                torch.randn(len(weight)), torch.randn(weight.shape[1])
            )
        for p, q in zip(model.parameters(), base.parameters()):
            if p is not weight:
                p.data += 1e-3 * torch.randn_like(p)
        monkeypatch.setattr(real_size, "LARGEST", (1, 8))
        rows = real_size.spectrum(model, folder)
        assert rows["0.self_attn.q_proj"]["d90"] == 1  # an outer product has one
        assert rows["0.self_attn.q_proj"]["share"][0] == 1
        assert rows["0.mlp.up_proj"]["d90"] > 8


class TestFusion:
    def test_all_rivals_are_measured_and_experts_are_not_trained_twice(
        self, folder, toy, monkeypatch, tmp_path
    ):
        scene = [Example("", " Ann is a pub." * 40, {})] * 3
        task = dataclasses.replace(real_size.load_data("toy"), train=scene, valid=scene)
        of = {"tinyshakespeare": task}
        load = real_size.load_data
        monkeypatch.setattr(real_size, "load_data", lambda name: of.get(name, load("")))
        for name, value in {
            "STEPS": {"expert": 10, "fusion": 10, "LoRA r 8": 10},
            "RATES": {"fusion": (1e-3, 1e-2), "LoRA r 8": (1e-3,)},
            "TRIAL": 2,
            "MIX": 8,
            "TEST": 3,
            "PIECE": 20,
            "PLAYS": 200,
            "OUT": tmp_path / "real_fusion.json",
        }.items():
            monkeypatch.setattr(real_fusion, name, value)
        arguments = ["--model", folder, "--experts", str(tmp_path / "experts")]
        monkeypatch.setattr(sys, "argv", ["real_fusion.py", *arguments])
        real_fusion.main()
        record = json.loads((tmp_path / "real_fusion.json").read_text())
        found = {run["case"]: run for run in record["runs"]}
        experts = ["expert e2e", "expert plays"]
        assert list(found) == ["base", *experts, "mean", "fusion", "LoRA r 8"]
        assert len({(run["e2e"], run["plays"]) for run in found.values()}) == 6
        assert [trial["case"] for trial in record["trials"]].count("fusion") == 2
        assert found["fusion"]["parameters"] > 0 == found["mean"]["parameters"]
        # half of what was done is lost: the rest stays, and the experts are not touched
        kept = {"runs": record["runs"][:3], "trials": []}
        (tmp_path / "real_fusion.json").write_text(json.dumps(record | kept))
        files = sorted((tmp_path / "experts").rglob("*.safetensors"))
        before = [path.read_bytes() for path in files]
        real_fusion.main()
        again = json.loads((tmp_path / "real_fusion.json").read_text())
        assert again["runs"] == record["runs"] and len(files) == 2
        assert [path.read_bytes() for path in files] == before


class TestAbsent:
    """No network here: a hub's name that no cache has is absent."""

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path))

        def refuse(name, **more):
            raise OSError("offline")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)

    def test_real_size_says_that_it_is_skipped(self, toy, monkeypatch, capsys):
        run(monkeypatch, "--model", ABSENT)
        assert f"skipped: no model {ABSENT}" in capsys.readouterr().out
        assert not toy.exists()

    def test_bench_has_a_row_that_says_so(self, monkeypatch):
        monkeypatch.setattr(bench_real, "MODEL", ABSENT)
        (row,) = bench_real.rows(1)
        assert "skipped" in row["what"] and row["met"] is None
        assert "skipped" in bench.markdown(real_size.facts() | {"rows": [row]})


def test_three_trainings_are_one(folder, toy, monkeypatch, tmp_path):
    out = tmp_path / "three_ways.json"
    monkeypatch.setattr(three_ways, "STEPS", 4)
    monkeypatch.setattr(three_ways, "BATCH", 2)
    monkeypatch.setattr(
        sys, "argv", ["three_ways.py", "--model", folder, "--out", str(out)]
    )
    three_ways.main()
    record = json.loads(out.read_text())
    assert {"command", "machine", "date", "commit", "weights"} <= record.keys()
    ours, *theirs = (torch.tensor(losses) for losses in record["losses"].values())
    assert len(ours) == 4 and ours[0] != ours[-1]
    # two layers of nine sums, of up to 64 terms, forth and back, over four steps
    for losses in theirs:
        assert_within(losses, ours, terms=64, steps=2 * 9 * 2 * 4)
    for off in record["logits_off"].values():
        assert off.pop("without the adapter") > 0
        # logits of so young a model are of size 1
        assert max(off.values()) < tolerance(torch.float32, terms=64, steps=2 * 9)


def test_three_ways_says_that_it_is_skipped(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["three_ways.py", "--model", ABSENT])
    with pytest.raises(SystemExit, match="is not here"):
        three_ways.main()


def test_bench_measures_every_row_at_a_toy_size(folder):
    rows = [*bench_real.rows(1, folder, batch=2, length=8, new_tokens=4)]
    named = " ".join(row["what"] for row in rows)
    for part in (
        "step, fp32 / peft's",
        "passed through",
        "generating",
        "loading",
        "NF4",
    ):
        assert part in named
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in rows)
