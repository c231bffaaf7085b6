"""Recorded runs, as the benchmarks write them: one dict a run, with its learning rate
"lr", its "seed", its losses and whatever tells it from the others."""

from ..io import read_json
from .comparison import compare
from .figures import against_steps, table


def matching(runs: list, **wanted) -> list:
    """The runs that have these values."""
    return [
        run for run in runs if all(run[key] == value for key, value in wanted.items())
    ]


def at_best_rate(runs: list, **wanted) -> list:
    """The runs of all seeds, in their order, at the rate with the lowest validation
    loss of the first seed. wanted: as in `matching`."""
    runs = matching(runs, **wanted)
    first = matching(runs, seed=min(run["seed"] for run in runs))
    best = min(first, key=lambda run: run["valid_loss"])["lr"]
    return sorted(matching(runs, lr=best), key=lambda run: run["seed"])


def longer_runs(record, cases, steps, against=None, task="sql", examples=None):
    """A table of the longer runs of a chapter (benchmarks/longer.py), one line a case,
    each at its best rate: the test loss and the score of every seed, and what `compare`
    says of it and the case `against`.

    record: the content of benchmarks/results/chapterNN.json, or its path. cases: their
    names, or {name to show: name in the record}."""
    if not isinstance(record, dict):
        record = read_json(record)
    runs = record["long_runs"]["runs"]
    runs = matching(runs, steps=steps, task=task, examples=examples)
    cases = cases if isinstance(cases, dict) else dict(zip(cases, cases))
    rows = []
    for shown, case in cases.items():
        at_best = at_best_rate(runs, case=case)
        rows.append(
            [
                shown,
                f"{at_best[0]['parameters']:,}",
                rate_and_edge(runs, case),
                ", ".join(f"{run['test_loss']:.3f}" for run in at_best),
                ", ".join(f"{run['score']:.0f}" for run in at_best),
            ]
        )
        if against is not None:
            other = at_best_rate(runs, case=cases.get(against, against))
            rows[-1] += versus(at_best, other) if other != at_best else ["", ""]
    header = [f"{steps} steps", "parameters", "best rate", "test loss", "right (%)"]
    judged = [f"against {against}: loss", "answers"] if against is not None else []
    return table(rows, header + judged)


def longer_curves(
    record, cases, title, task="sql", examples=None, steps=None, shorter=None
):
    """Draw the longer runs of a chapter against their steps, a line for each case.
    Left: the validation loss along the runs of `steps`, or of the greatest length that
    all cases have. Right: the score on the test split at the end of runs of each
    length. Every length has a best rate of its own, as in `longer_runs`.

    record, cases, task, examples: as in `longer_runs`. shorter: {steps: {name to show:
    its runs}}, other runs of the chapter, where the longer ones lack a length."""
    if not isinstance(record, dict):
        record = read_json(record)
    runs = matching(record["long_runs"]["runs"], task=task, examples=examples)
    cases = cases if isinstance(cases, dict) else dict(zip(cases, cases))
    ends = {}  # {name to show: {steps: the runs of all seeds}}
    for shown, case in cases.items():
        lengths = {run["steps"] for run in matching(runs, case=case)}
        ends[shown] = {n: at_best_rate(runs, case=case, steps=n) for n in lengths}
    common = set.intersection(*map(set, ends.values()))
    if not common:
        raise ValueError(f"there is no length that all of {', '.join(cases)} have")
    steps = steps or max(common)
    losses = {shown: on_the_way(ended[steps]) for shown, ended in ends.items()}
    for length, others in (shorter or {}).items():
        for shown, their_runs in others.items():
            ends[shown].setdefault(length, their_runs)
    scores = {
        shown: {n: [run["score"] for run in ended[n]] for n in sorted(ended)}
        for shown, ended in ends.items()
    }
    against_steps(losses, scores, title)


def on_the_way(runs):
    """{steps: the validation losses of all `runs` after so many}, to the end."""
    along = [run["along"] | {run["steps"]: run["valid_loss"]} for run in runs]
    return {int(look): [losses[look] for losses in along] for look in along[0]}


def rate_and_edge(runs, case):
    """The best rate of a case, the lowest and the highest that were tried, and a word
    if the best one is either of them."""
    rates = sorted({run["lr"] for run in matching(runs, case=case)})
    best = at_best_rate(runs, case=case)[0]["lr"]
    if len(rates) == 1:
        return f"{best:g} (the only one tried)"
    edge = ", at the edge" if best in (rates[0], rates[-1]) else ""
    return f"{best:g} ({rates[0]:g}–{rates[-1]:g}{edge})"


def versus(ours, theirs):
    """What `compare` says of two cases' runs: by loss, by right answers."""
    by_seed = [
        [{run["seed"]: run[key] for run in runs} for runs in (ours, theirs)]
        for key in ("test_loss", "right")
    ]
    return [str(compare(*by_seed[0], loss=True)), str(compare(*by_seed[1]))]


def real_size(record, columns: dict, cases=None, against=None):
    """A table of runs on SmolLM2, one line a case, with the values of all its seeds.
    record: the content of benchmarks/results/real_size.json, or its path.

    columns: {heading: a run's key}; a value with a fraction is written with two
    decimals. The rate is the one that the trials chose, between the lowest and the
    highest that they tried; the runs are those at that rate. cases: only these, in this
    order; None: all. A case that was not run gets a line that says so. against: a case;
    then the last column is what `compare` says of the test losses, of the seeds that
    both cases have."""
    if not isinstance(record, dict):
        record = read_json(record)
    cases = cases or list(dict.fromkeys(run["case"] for run in record["runs"]))
    runs = {case: chosen_by_trials(record, case) for case in cases}
    yardstick = against and {
        run["seed"]: run["test_loss"] for run in chosen_by_trials(record, against)
    }
    rows = []
    for case in cases:
        if not runs[case]:
            rows.append([case, "not run", *[""] * (1 + len(columns) + bool(against))])
            continue
        tried = matching(record["trials"], case=case)
        rate = rate_and_edge(tried, case) if tried else ""
        values = [[run[key] for run in runs[case]] for key in columns.values()]
        shown = [
            ", ".join(f"{v:.2f}" if isinstance(v, float) else f"{v:,}" for v in seeds)
            for seeds in values
        ]
        rows.append([case, f"{runs[case][0]['parameters']:,}", rate, *shown])
        if against:
            losses = {run["seed"]: run["test_loss"] for run in runs[case]}
            both = [seed for seed in losses if seed in yardstick]
            sides = ({seed: x[seed] for seed in both} for x in (losses, yardstick))
            judged = tried and both and case != against
            rows[-1].append(str(compare(*sides, loss=True)) if judged else "")
    steps = max(run["steps"] for run in record["runs"])
    last = [f"loss, against {against}"] if against else []
    return table(rows, [f"{steps} steps", "parameters", "rate", *columns, *last])


def chosen_by_trials(record, case) -> list:
    """A case's runs, one a seed, at the rate with the lowest loss in its trials."""
    runs = matching(record["runs"], case=case)
    if tried := matching(record["trials"], case=case):
        best = min(tried, key=lambda trial: trial["valid_loss"])
        runs = matching(runs, lr=best["lr"])
    return sorted(runs, key=lambda run: run["seed"])
