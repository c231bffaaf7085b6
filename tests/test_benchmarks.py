"""The benchmarks run, at a toy size, and write down what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import printed

from minipeft.lanternwick.scoring import bleu
from minipeft.lanternwick.tasks import Example, Task
from minipeft.lm import GPT, GPTConfig
from minipeft.lm.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench  # noqa: E402
import chapter16  # noqa: E402
import common  # noqa: E402
import demo  # noqa: E402
import e2e_nlg  # noqa: E402
import longer  # noqa: E402
import verdicts  # noqa: E402

LONG = [
    path
    for path in sorted(common.RESULTS.glob("chapter*.json"))
    if '"long_runs"' in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A base model's folder and a task of six examples."""
    folder = tmp_path_factory.mktemp("toy")
    train = [
        Example(f"Record: name: {name}\nText:", f" {name} is a pub.", {})
        for name in ("Ann", "Bob", "Cat")
    ]
    judged = [
        Example(
            e.prompt,
            e.completion,
            {"references": [e.completion, f"A pub called {e.completion}"]},
        )
        for e in train
    ]
    tokenizer = train_tokenizer([e.prompt + e.completion for e in train] * 3, 450)
    torch.manual_seed(0)
    GPT(
        GPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
        )
    ).save_pretrained(folder, tokenizer)

    def score(said, examples):
        return {"bleu": bleu(said, [e.meta["references"] for e in examples])}

    return str(folder), Task(
        "toy", "pubs", train * 8, judged, judged, "bleu", 0.0, score
    )


def test_e2e_writes_every_run_and_does_none_twice(toy, tmp_path, monkeypatch, capsys):
    base, task = toy
    monkeypatch.setattr(e2e_nlg, "load_data", lambda name: task)
    out = tmp_path / "e2e.json"
    arguments = [
        "--base",
        base,
        "--steps",
        "2",
        "--sweep-steps",
        "1",
        "--limit",
        "2",
        "--seeds",
        "0",
        "--out",
        str(out),
    ]
    e2e_nlg.main(arguments)
    record = json.loads(out.read_text())
    assert {"command", "date", "commit", "machine", "versions"} <= record.keys()
    assert [run["method"] for run in record["runs"]] == list(e2e_nlg.METHODS)
    assert len(record["sweep"]) >= 12
    for run in record["runs"]:
        tried = [s for s in record["sweep"] if s["method"] == run["method"]]
        assert run["lr"] == min(tried, key=lambda s: s["valid_loss"])["lr"]
        # followed until a rate on either side is worse, or the ladder ends
        at = e2e_nlg.LADDER.index(run["lr"])
        beside = set(e2e_nlg.LADDER[max(at - 1, 0) : at + 2])
        assert beside <= {s["lr"] for s in tried}
        assert run["test_records"] == 2 and 0 <= run["bleu"] <= 100
    full, eight, one, fresh = (run["trained"] for run in record["runs"])
    assert full == fresh > eight == 8 * one
    monkeypatch.setattr(
        e2e_nlg, "one_run", lambda *a, **k: pytest.fail("it was done already")
    )
    e2e_nlg.main(arguments)
    assert json.loads(out.read_text()) == record
    assert capsys.readouterr().out.count("random init") >= 2  # the table


def test_demo_shows_before_after_and_the_cost(toy, tmp_path, monkeypatch, capsys):
    base, task = toy
    monkeypatch.setenv("MINIPEFT_BASE", base)
    monkeypatch.setattr(demo, "load_data", lambda name: task)
    before, after = demo.main(
        ["--steps", "30", "--limit", "3", "--keep", str(tmp_path / "kept")]
    )
    assert after["loss"] < before["loss"]
    said = capsys.readouterr().out
    assert all(
        word in said
        for word in (
            "Before:",
            "After:",
            "trained parameters",
            "memory: optimizer",
            "the file to keep",
        )
    )
    assert (tmp_path / "kept" / "adapter_config.json").is_file()


@pytest.mark.parametrize("free", [0, 1000])
def test_demo_looks_for_room_before_it_trains(toy, tmp_path, monkeypatch, capsys, free):
    base, task = toy
    monkeypatch.setenv("MINIPEFT_BASE", base)
    monkeypatch.setattr(demo, "load_data", lambda name: task)
    monkeypatch.setattr(demo, "free_space", lambda folder: free)
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("it trained"))
    with pytest.raises(OSError, match=r"kept: the adapter needs .* kB of disk"):
        demo.main(["--keep", str(tmp_path / "kept")])
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("argument", ["--keep=demo.py", "--task=sqll"])
def test_demo_answers_in_a_sentence(argument):
    command = [sys.executable, demo.__file__, argument]
    folder = Path(demo.__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1 and done.stderr.startswith("demo: "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_climbing_ends_between_two_worse_rates():
    ladder = (1, 3, 10, 30, 100, 300)
    for best in ladder[1:-1]:
        tried = {}
        while more := common.climb(tried, ladder, 10):
            tried |= {
                rate: abs(ladder.index(rate) - ladder.index(best)) for rate in more
            }
        assert (
            {3, 10, 30} <= tried.keys()
            and ladder[ladder.index(best) - 1] in tried
            and ladder[ladder.index(best) + 1] in tried
        )
    assert common.climb({100: 1.0, 300: 0.5}, ladder, 10) == []  # the ladder ends
    assert (
        common.finite(float("nan")) == common.finite(1e9) == 100.0
        and common.finite(0.12346) == 0.1235
    )


def test_a_sweep_keeps_the_longer_runs(tmp_path, monkeypatch):
    out = tmp_path / "chapter.json"
    monkeypatch.setattr(common, "weights", lambda: "a base")
    common.save(out, {"weights": "another", "runs": [1], "long_runs": {"runs": [2]}})
    common.sweep(lambda turn, runs: [{"at": turn}], dict, [0], {}, out, 1)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["runs"] == [{"at": 0}] and record["long_runs"] == {"runs": [2]}


def test_longer_runs_climb_then_repeat_the_best_rate(monkeypatch):
    """Best rate 5e-3 on the way; three rates with seed 0, then the other seeds."""
    made = []
    monkeypatch.setattr(longer, "pool", lambda: made)
    line = longer.entry("06", "full", 300, 2e-3)
    while jobs := longer.next_jobs(line):
        for job in jobs:
            made.append(job | {"valid_loss": abs(job["lr"] - 5e-3)})
    assert [(run["lr"], run["seed"]) for run in made] == [
        (1e-3, 0),
        (2e-3, 0),
        (5e-3, 0),
        (1e-2, 0),
        (5e-3, 1),
        (5e-3, 2),
    ]
    # without a ladder: only these rates
    line = longer.entry("06", "LoRA r 8", 300, [1e-3, 3e-3], seeds=(0, 1))
    assert [job["lr"] for job in longer.next_jobs(line)] == [1e-3, 3e-3]


@pytest.mark.parametrize(
    "again, kept",
    [
        ({"seconds": 9}, 1),  # the same run, made for another chapter
        ({"seed": 1}, 2),
        ({"fields": {"rate_B": 1e-2}}, 2),
        ({"lr": 1e-2}, 2),
    ],
)
def test_a_run_that_was_made_twice_is_kept_once(monkeypatch, again, kept):
    record = {}
    monkeypatch.setattr(longer, "records", lambda: {"12": record})
    monkeypatch.setattr(longer, "ground", lambda: "weights")
    monkeypatch.setattr(longer, "save", lambda path, record: None)
    run = {"case": "full", "task": "sql", "examples": None, "steps": 300}
    run |= {"lr": 1e-3, "seed": 0, "seconds": 8}
    for each in (run, run | again):
        longer.keep(each, ["12"])
    assert len(record["long_runs"]["runs"]) == kept


def test_a_longer_run_without_validation_or_score_is_printed():
    run = {"task": "mix", "case": "fusion", "steps": 80, "lr": 3e-3, "seed": 0}
    run |= {"valid_loss": None, "test_loss": 0.5, "score": 50.0, "seconds": 9}
    assert "valid - test 0.5000 score 50.0 (9 s)" in longer.line_of(run)
    run |= {"valid_loss": 0.25, "score": None}
    assert "valid 0.2500 test 0.5000 score - (9 s)" in longer.line_of(run)


def test_a_matrix_that_lost_all_its_rank_gets_no_lora(monkeypatch):
    ranks = {"layers.0.q_proj": 5, "layers.1.q_proj": 0, "layers.0.up_proj": 2}
    run = {"case": "AdaLoRA 6 to 3", "steps": 300, "seed": 0, "valid_loss": 1.0}
    monkeypatch.setattr(longer, "pool", lambda: [run | {"ranks": ranks}])
    config = longer.CASES["LoRA, AdaLoRA's ranks"]({"steps": 300, "seed": 0})
    assert config.target_modules == ["layers.0.q_proj", "layers.0.up_proj"]
    assert config.rank_pattern == {"layers.0.q_proj": 5, "layers.0.up_proj": 2}


def test_reversed_ranks_stay_with_their_kind():
    ranks = {"0.q": 1, "1.q": 5, "2.q": 3, "0.up": 0, "1.up": 2}
    turned = {"0.q": 5, "1.q": 1, "2.q": 3, "0.up": 2, "1.up": 0}
    assert longer.backwards(ranks) == turned


@pytest.mark.parametrize("path", LONG, ids=lambda path: path.stem)
def test_longer_runs_say_how_they_were_made_and_keep_their_answers(path):
    record = json.loads(path.read_text(encoding="utf-8"))["long_runs"]
    plain = [{**run, "seconds": None} for run in record["runs"]]
    assert all(plain.count(run) == 1 for run in plain)  # none stands twice
    assert {"command", "date", "machine", "commit", "seeds", "weights"} <= set(record)
    for run in record["runs"]:
        made = {"case", "task", "steps", "lr", "seed", "parameters", "test_loss"}
        assert made <= set(run)
        if "right" in run:
            skills = 3 if run["task"] == "mix" else 1
            assert len(run["right"]) == skills * record["test"]
            share = 100 * run["right"].count("1") / len(run["right"])
            # of three skills it is the mean of three that were rounded too
            rounded = printed(2) * (1 if skills == 1 else 2)
            assert share == pytest.approx(run["score"], abs=rounded)


def test_verdicts_of_every_chapter_that_has_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verdicts.py", "07", "13"])
    verdicts.main()
    said = capsys.readouterr().out
    assert "long sql 300: AdaLoRA 6 to 3 against LoRA r 3" in said
    assert "the only one tried" in said and "not told apart" in said


def test_bench_serves_many_adapters(tmp_path):
    """Its rows, and a part measured again beside the record's other rows."""
    record = {"rows": [bench.row("kept", 1.0, "s")], "batch": [1, 4]} | common.facts()
    common.save(tmp_path / "bench.json", record)
    parts = {"serving": lambda: bench.serving(1, "tiny")}
    for _ in range(2):  # the second time its own rows are replaced
        again = bench.replaced(tmp_path / "bench.json", "serving", parts)
        assert again["rows"][0]["what"] == "kept" and len(again["rows"]) == 9
        common.save(tmp_path / "bench.json", again)
    goals = [row["goal"] for row in again["rows"][1:]]
    assert goals == [1.5, 0.25, None, None, None, 0.25, None, None]
    assert again["again"]["serving"]["machine"] == record["machine"]
    assert "The rows of “serving”" in bench.markdown(again)
    with pytest.raises(ValueError, match="unknown --only 'serve'.*serving"):
        bench.replaced(tmp_path / "bench.json", "serve", parts)


def test_bench_measures_and_judges(tmp_path):
    rows = [
        *bench.steps_against_peft("ours", 1, 1, 4, "tiny"),
        *bench.small_costs(1, "tiny"),
    ]
    assert all(row["value"] is not None for row in rows)
    record = common.facts() | {"rows": rows}
    common.save(tmp_path / "bench.json", record)
    assert json.loads((tmp_path / "bench.json").read_text()) == record
    assert bench.markdown(record).count("\n| ") == len(rows) + 1
    assert bench.row("a / b", [2.0, 4.0, 9.0], "s", [1.0, 4.0, 3.0], goal=1.0) == {
        "what": "a / b",
        "value": 4.0,
        "against": 3.0,
        "unit": "s",
        "ratio": 2.0,
        "goal": 1.0,
        "met": False,
        "rounds": 3,
        # of the ratios 2, 1, 3 the median is off by 1
        "chance": 2 * 1.25 * 1.48 * 1.0 / 3**0.5,
    }
    for last, said in ((1.004, "NO"), (1.0004, "yes")):  # no rounding in our favour
        exact = bench.row("a / b", last, "MB", 1.0, goal=1.0)
        assert exact["met"] == (said == "yes") and f"| {said} |" in bench.markdown(
            common.facts() | {"rows": [exact]}
        )
    noisy = bench.row("a / b", [1.1, 0.9, 1.01, 1.2, 0.8], "s", [1.0] * 5, goal=1.0)
    assert not noisy["met"] and "no, by chance or not" in bench.markdown(
        common.facts() | {"rows": [noisy]}
    )


@pytest.mark.parametrize(
    "kind, what",
    [(kind, dropout) for kind in bench.NAMES for dropout in (0.0, bench.DROPOUT)]
    + [(kind, name) for name, (kind, _) in bench.RACED.items()],
)
def test_a_step_takes_no_more_memory_than_pefts(kind, what):
    ours, theirs = (
        bench.fullest_moment(kind, library, what, 4, 64, "small")
        for library in ("minipeft", "peft")
    )
    assert ours <= theirs


def test_latency_of_every_method(monkeypatch):
    few = {name: bench.METHODS[name] for name in ("LoRA", "(IA)³", "parallel adapter")}
    with monkeypatch.context() as only:
        only.setattr(bench, "METHODS", few)
        rows = [*bench.latencies(1, "tiny")]
    # two batch sizes; an adapter with a bend is not merged
    assert len(rows) == 2 * (2 * 2 + 1)
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in rows)


def test_chapter05s_record_holds_every_run_of_its_plan():
    import chapter05

    record = json.loads((common.RESULTS / "chapter05.json").read_text(encoding="utf-8"))
    jobs = [
        job
        for seed in chapter05.SEEDS
        for job in chapter05.jobs_of(seed, record["runs"])
    ]
    assert all(len(common.found(record["runs"], **job)) == 1 for job in jobs)
    assert record["steps"] == chapter05.STEPS and record["budget"] == chapter05.budget()


def test_chapter12s_record_holds_every_run_of_its_plan(monkeypatch):
    import chapter12

    record = json.loads((common.RESULTS / "chapter12.json").read_text(encoding="utf-8"))
    # without pretraining
    monkeypatch.setattr(
        chapter12, "ground", {run["base"]: run["on"] for run in record["runs"]}.get
    )
    plan = [
        (part, stage)
        for part in ("starts", "voice", "sql", "sizes")
        for stage in range(chapter12.STAGES + 1)
    ]
    jobs = [
        job
        for part, stage in plan
        for job in chapter12.jobs_of(part, record["runs"], stage)
    ]
    assert len(jobs) > 60 and all(
        len(common.found(record["runs"], **job)) == 1 for job in jobs
    )
    assert {run["steps"] for run in record["runs"]} == set(chapter12.STEPS.values())


def test_chapter03s_runs_have_their_best_stride_between_two_worse_ones():
    import chapter03

    record = json.loads((common.RESULTS / "chapter03.json").read_text(encoding="utf-8"))
    cases = {
        (run["start"], run["way"], run["d"], run["steps"]) for run in record["runs"]
    }
    # one base for each start
    assert len({run["on"] for run in record["runs"]}) == len(
        {run["start"] for run in record["runs"]}
    )
    for start, way, d, steps in cases:
        runs = common.found(record["runs"], start=start, way=way, d=d, steps=steps)
        best = chapter03.LADDER.index(chapter03.best(runs))
        tried = {chapter03.LADDER.index(run["stride"]) for run in runs}
        assert {best - 1, best + 1} <= tried or d and steps == chapter03.LONGER
        assert len(common.found(runs, stride=chapter03.best(runs))) == len(
            chapter03.SEEDS
        )


@pytest.mark.parametrize("name", ["chapter06", "chapter07", "chapter08"])
def test_the_best_rates_of_chapters_06_to_08_lie_between_worse_ones(name):
    import importlib

    import chapter06

    runs = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))[
        "runs"
    ]
    turns, seen = importlib.import_module(name).TURNS, set()
    for turn in turns:  # every run of the plan is there
        seen |= set(turn(runs))
    assert seen <= {(run["method"], run["lr"], run["seed"]) for run in runs}
    for method in {run["method"] for run in runs if "draw" not in run["method"]}:
        at, tried = (
            chapter06.best(runs, method),
            [run["lr"] for run in common.found(runs, method=method)],
        )
        assert min(tried) < at < max(tried), method


RECORDS = sorted(common.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_how_it_was_made(path):
    """Command, machine, date and versions stand once in a record, and in each part of
    it that another command made; steps and seed, where something was trained, in the
    part or with each run."""
    record = json.loads(path.read_text(encoding="utf-8"))
    made_apart = [record.get(name) for name in common.BESIDE]
    for part in [record, *filter(None, made_apart)]:
        assert {"command", "machine", "date", "versions"} <= part.keys()
        trained = [run for run in part.get("runs", []) if "lr" in run]
        for kind, kinds in (("steps", "steps"), ("seed", "seeds")):
            with_each = trained and all(kind in run for run in trained)
            anything = trained or {"warmup", "found"} & part.keys()
            assert kinds in part or with_each or not anything, (kind, part.keys())


class TestBakeOff:
    """Every method of chapter 16 gets the same number of trials."""

    @pytest.mark.parametrize("best", [3e-3, 1e-2, 3e-2])
    def test_four_rates_and_no_more(self, best):
        tried = {}
        while rates := chapter16.next_rates(tried, 1e-2):
            tried |= {lr: abs(lr - best) for lr in rates}
        assert len(tried) == chapter16.TRIALS
        assert {3e-3, 1e-2, 3e-2} < set(tried)
        (fourth,) = set(tried) - {3e-3, 1e-2, 3e-2}
        # beyond the best at an edge, else between it and its better neighbour
        assert {3e-3: fourth == 1e-3, 3e-2: fourth == 0.1}.get(
            best, 3e-3 < fourth < 3e-2
        )

    def test_the_first_rates_leave_room_on_either_side(self):
        for case, (_, first) in chapter16.METHODS.items():
            at = chapter16.LADDER.index(first)
            assert 2 <= at <= len(chapter16.LADDER) - 3, case

    def test_the_other_seeds_wait_for_the_trials(self):
        runs = []
        while jobs := chapter16.next_jobs(runs, "sql", "full", None, 300):
            kinds = {job["trial"] for job in jobs}
            assert len(kinds) == 1
            runs += [job | {"valid_loss": job["lr"]} for job in jobs]
        trials = [run for run in runs if run["trial"]]
        rest = [run for run in runs if not run["trial"]]
        assert len(trials) == chapter16.TRIALS and len(rest) == len(chapter16.SEEDS)
        assert {run["lr"] for run in rest} == {min(run["lr"] for run in trials)}

    def test_two_records_of_one_file_lose_nothing(self, tmp_path):
        path = tmp_path / "record.json"
        one, other = chapter16.Record(path), chapter16.Record(path)
        one.change("runs", {"case": "a"})
        other.change("runs", {"case": "b"})
        one.change("costs", {"full": 1})
        record = other.read()
        assert [run["case"] for run in record["runs"]] == ["a", "b"]
        assert record["costs"] == {"full": 1}

    def test_it_names_every_machine_once(self, tmp_path):
        for machine in ("one", "other", "one"):
            record = chapter16.Record(tmp_path / "record.json")
            record.about["machine"] = machine
            record.change("runs", {"case": machine})
        assert record.read()["machine"] == "one; other"
