"""Every comparison that the chapters draw from their records, with its verdict.

    python benchmarks/verdicts.py              # all chapters
    python benchmarks/verdicts.py 06 07

For each pair: score and loss of the first case against the second, at the rates that
seed 0's validation loss chooses, by minipeft.course.compare. "short" are the runs of
the chapter's own script, whose scores are percentages; "long" are those of longer.py,
which keep every answer.
"""

import argparse
import json

from common import RESULTS

from minipeft.course import compare

# {chapter: [(the runs' group, first case, second case), ...]}
PAIRS = {
    "02": [
        *[(f"long sql {n}", "LoRA r 8", "full") for n in (300, 1000)],
        ("short 80", "lora 0.01", "full 0.001"),
        ("short 80", "rehearsal 0.001", "full 0.001"),
        ("short 80", "leash 0.001", "full 0.001"),
        ("short 80", "full 0.003", "full 0.001"),
    ],
    "04": [
        *[("short", f"all-linear r {r}", "full") for r in (4, 8, 32)],
        ("short", "q,v r 22", "all-linear r 4"),
        ("short", "q,v r 22", "full"),
        ("short", "q,k,v,o r 11", "all-linear r 4"),
        ("short", "mlp r 6", "all-linear r 4"),
        ("short", "mlp r 6", "q,k,v,o r 11"),
        ("short", "mlp r 6", "q,v r 22"),
        *[
            (f"long sql {n}", case, "full")
            for n in (300, 1000)
            for case in ("LoRA r 1", "LoRA r 4", "LoRA r 8", "LoRA r 32")
        ],
        ("long sql 300", "LoRA r 6, MLP", "LoRA r 11, attention"),
        ("long sql 300", "LoRA r 6, MLP", "LoRA r 4"),
    ],
    "05": [
        ("short", "r = 8", "full"),
        ("short", "r = 1", "r = 8"),
        ("short", "r = 64", "r = 8"),
        ("short", "r = 64, rsLoRA", "r = 64"),
        ("short", "r = 64, rsLoRA", "r = 8"),
        ("short", "r = 64, rsLoRA", "full"),
        ("short", "PiSSA", "r = 8"),
        ("short", "r = 8, 32 examples", "full, 32 examples"),
        ("short", "r = 8, 256 examples", "full, 256 examples"),
        ("short", "voice, mlp", "voice, all-linear"),
        ("short", "voice, mlp", "voice, q,k,v,o"),
        ("long sql 100 all", "LoRA+, A 0.005, B 0.01", "LoRA+, A 0.01, B 0.01"),
        ("long sql 100 all", "LoRA+, A 0.005, B 0.02", "LoRA+, A 0.01, B 0.01"),
        ("long sql 100 all", "LoRA+, A 0.01, B 0.005", "LoRA+, A 0.01, B 0.01"),
        ("long sql 100 32", "LoRA r 8, 32 examples", "full, 32 examples"),
        ("long sql 100 256", "LoRA r 8, 256 examples", "full, 256 examples"),
        ("long stowaway 60", "LoRA r 6, MLP", "LoRA r 11, attention"),
        ("long stowaway 60", "LoRA r 6, MLP", "LoRA r 22, q and v"),
        ("long stowaway 60", "LoRA r 6, MLP", "LoRA r 4"),
    ],
    "06": [
        ("short", "DoRA r 8", "LoRA r 8"),
        ("short", "LoRA r 8", "full"),
        ("short", "DoRA r 8", "full"),
        *[("long sql 100", f"DoRA r {r}", f"LoRA r {r}") for r in (1, 2, 4)],
        *[("long sql 300", f"DoRA r {r}", f"LoRA r {r}") for r in (1, 8)],
        ("long sql 300", "LoRA r 8", "full"),
        ("long sql 300", "DoRA r 8", "full"),
    ],
    "07": [
        ("short", "AdaLoRA 6 to 3", "LoRA r 3"),
        ("short", "AdaLoRA 6 to 3", "AdaLoRA 3, no search"),
        ("short", "AdaLoRA 6 to 3", "AdaLoRA 6 to 3, no penalty"),
        ("long sql 300", "AdaLoRA 6 to 3", "LoRA r 3"),
        ("long sql 300", "AdaLoRA 6 to 3", "AdaLoRA 3, no search"),
        ("long sql 300", "AdaLoRA 6 to 3", "AdaLoRA 6 to 3, no penalty"),
        ("long sql 300", "AdaLoRA 3, no search", "LoRA r 3"),
        ("long sql 1000", "AdaLoRA 6 to 3", "LoRA r 3"),
        ("long sql 300", "LoRA, AdaLoRA's ranks", "LoRA r 3"),
        ("long sql 300", "LoRA, AdaLoRA's ranks reversed", "LoRA r 3"),
        ("long sql 300", "LoRA, AdaLoRA's ranks", "LoRA, AdaLoRA's ranks reversed"),
    ],
    "08": [
        *[("short", case, "LoRA r 1") for case in ("LoKr r 64", "VeRA r 256")],
        *[
            ("short", case, "LoRA r 4")
            for case in ("LoHa r 2", "DenseLoRA r 16", "DenseLoRA linear r 16")
        ],
        ("short", "LoKr r 64", "VeRA r 256"),
        ("short", "DenseLoRA r 16", "DenseLoRA linear r 16"),
        ("short", "LoRA r 8", "LoRA r 4"),
        *[("long sql 300", case, "LoRA r 1") for case in ("LoKr r 64", "VeRA r 256")],
        *[
            ("long sql 300", case, "LoRA r 4")
            for case in ("LoHa r 2", "DenseLoRA r 16", "LoKr r 64", "VeRA r 256")
        ],
    ],
    "11": [
        *[
            ("short", case, "LoRA, attention")
            for case in ("parallel", "Houlsby", "after attention", "Pfeiffer")
        ],
        ("short", "parallel", "Pfeiffer"),
        ("short", "parallel", "Houlsby"),
        ("short", "after attention", "Pfeiffer"),
        ("short", "Houlsby", "Pfeiffer"),
        *[
            ("long sql 300", case, "LoRA r 6, MLP")
            for case in ("LoRA r 11, attention", "parallel", "Pfeiffer")
        ],
        *[
            ("long sql 300", case, "LoRA r 11, attention")
            for case in ("parallel", "Houlsby", "after attention", "Pfeiffer")
        ],
        ("long sql 100", "Pfeiffer, after the block", "Pfeiffer"),
        ("long sql 100", "parallel, raw stream", "parallel"),
        ("long sql 100", "parallel, raw stream", "Pfeiffer, after the block"),
        ("long sql 300", "parallel", "Pfeiffer"),
        ("long sql 300", "parallel", "Houlsby"),
        ("long sql 300", "after attention", "Pfeiffer"),
    ],
    "12": [
        ("short voice", "prefix 1", "prompt 5"),
        ("short voice", "prefix 6", "prompt 30"),
        ("short sql", "prefix 6", "prompt 30"),
        ("short sql", "LoRA, r = 1 None", "prefix 6"),
        ("long voice 100", "prefix, 6 tokens, reparametrised", "prefix, 6 tokens"),
        *[
            ("long sql 100 64", case, "full")
            for case in ("prompt, 10 tokens", "prefix, 6 tokens", "LoRA r 1")
        ],
    ],
    "13": [
        *[
            (f"long stowaway {n}", case, "full")
            for n in (60, 180)
            for case in (
                "LoRA r 1",
                "LoRA r 8",
                "BitFit",
                "(IA)³",
                "LayerNorm tuning",
                "LoRA r 1, q and v",
                "prompt, 10 tokens",
            )
        ],
        ("long stowaway 60", "LoRA r 1", "BitFit"),
        ("long stowaway 180", "LoRA r 1", "BitFit"),
        ("long stowaway 180", "LayerNorm tuning", "(IA)³"),
        *[
            (f"short voice {n}", case, "full fine-tuning")
            for n in (16, 64, 256)
            for case in ("(IA)³", "LoRA, r = 8, all linear")
        ],
    ],
    "14": [
        *[
            (f"{kind} mix {n}", "fusion", rival)
            for kind in ("short", "long")
            for n in (24, 192)
            for rival in ("one LoRA", "one adapter")
        ]
    ],
}
# {chapter: the key of a run's case, and how many answers a score stands for}
ANSWERS = {"02": 100, "04": 100, "05": 100, "06": 128, "07": 128, "08": 128, "11": 100}
ANSWERS |= {"12": 100, "13": 64, "14": 96}


def short_runs(chapter: str, record: dict) -> list:
    """The runs of the chapter's own script, with a group and a case."""
    runs = []
    for run in record["runs"]:
        group, case = "short", run.get("method") or run.get("case")
        if chapter == "02":
            group, case = "short 80", f"{run['way']} {run['lr']:g}"
        if chapter == "04":
            case = f"{run['targets']} r {run['r']}" if run["targets"] else "full"
        if chapter == "05":
            case = case_of_chapter05(run, record["cases"])
        if chapter == "12":
            group, case = f"short {run['part']}", f"{run['method']} {run['n']}"
        if chapter == "13":
            group = f"short {run['task']} {run['examples'] or run['steps']}"
        if chapter == "14":
            group = f"short mix {run['examples']}"
        if not run.get("trial"):
            runs.append(run | {"group": group, "case": case})
    return runs


def case_of_chapter05(run: dict, cases: dict):
    from chapter05 import PLAIN

    def same(what):
        return all(
            run[key] == value
            for key, value in (PLAIN | what).items()
            if key not in ("lr", "seed")
        )

    return next((name for name, what in cases.items() if same(what)), None)


def long_runs(record: dict) -> list:
    runs = []
    for run in record.get("long_runs", {}).get("runs", []):
        amount = run["examples"] if run["task"] == "mix" else run["steps"]
        group = f"long {run['task']} {amount}"
        if run["task"] == "sql" and run["steps"] == 100 and "fields" in run:
            group += f" {run['examples'] or 'all'}"
        elif run["task"] == "sql" and run["examples"]:
            group += f" {run['examples']}"
        runs.append(run | {"group": group})
    return runs


def at_best(runs: list, group: str, case: str) -> dict:
    """{seed: run} at the rate that is best on validation with the first seed."""
    runs = [run for run in runs if (run["group"], run["case"]) == (group, case)]
    if not runs:
        return {}
    first = min(run["seed"] for run in runs)
    tried = [run for run in runs if run["seed"] == first]
    rate = min(tried, key=lambda run: run.get("valid_loss") or 0)["lr"]
    return {run["seed"]: run for run in runs if run["lr"] == rate}


def rate_of(runs: list, group: str, case: str) -> str:
    """The rate, and whether a worse one was tried on either side."""
    chosen = at_best(runs, group, case)
    first = min(chosen)
    lr = chosen[first]["lr"]
    tried = sorted(
        run["lr"]
        for run in runs
        if (run["group"], run["case"], run["seed"]) == (group, case, first)
    )
    if len(tried) == 1:
        return f"lr {lr:g}, the only one tried"
    return f"lr {lr:g}" + (", at the edge" if lr in (tried[0], tried[-1]) else "")


def score_of(run: dict):
    """Every answer if they are known, else the percentage."""
    if "right" in run:
        return run["right"]
    if "scores" in run:
        return sum(run["scores"].values()) / len(run["scores"])
    return run.get("score")


def loss_of(run: dict):
    losses = run.get("losses")
    if isinstance(losses, dict):
        return sum(losses.values()) / len(losses)
    return run.get("test_loss", run.get("valid_loss"))


def row(runs: list, group: str, one: str, two: str, answers: int):
    """One line: what was measured for either case, and the verdicts; None if a case has
    not been run."""
    first, second = at_best(runs, group, one), at_best(runs, group, two)
    if not first or not second:
        return None
    parts = [f"{group}: {one} against {two}"]
    scores = [{s: score_of(run) for s, run in side.items()} for side in (first, second)]
    scores = [{s: v for s, v in side.items() if v is not None} for side in scores]
    if set(scores[0]) & set(scores[1]):
        verdict = compare(*scores, answers=answers)
        shown = " / ".join(
            f"{shown_scores(side)} ({rate_of(runs, group, case)})"
            for side, case in ((first, one), (second, two))
        )
        parts.append(f"  score {shown}: {verdict}")
    losses = [{s: loss_of(run) for s, run in side.items()} for side in (first, second)]
    if None not in [*losses[0].values(), *losses[1].values()]:
        shown = " / ".join(
            ", ".join(f"{loss:.4f}" for loss in side.values()) for side in losses
        )
        parts.append(f"  loss {shown}: {compare(*losses, loss=True)}")
    return "\n".join(parts)


def shown_scores(side: dict) -> str:
    values = [
        run.get("score") if "score" in run else score_of(run) for run in side.values()
    ]
    return ", ".join(f"{value:.0f}" for value in values if value is not None)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", default=list(PAIRS))
    for chapter in parser.parse_args().chapters:
        path = RESULTS / f"chapter{chapter}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        runs = short_runs(chapter, record) + long_runs(record)
        print(f"\n# chapter {chapter}")
        for group, one, two in PAIRS[chapter]:
            line = row(runs, group, one, two, ANSWERS[chapter])
            print(line or f"{group}: {one} against {two}: not run")


if __name__ == "__main__":
    main()
