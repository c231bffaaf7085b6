"""Recorded runs, as the benchmarks write them: one dict a run, with its learning rate
"lr", its "seed", its losses and whatever tells it from the others."""

from ..io import read_json
from .figures import table


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


def real_size(record, columns: dict, cases=None):
    """A table of runs on SmolLM2, one line a run. record: the content of
    benchmarks/results/real_size.json, or its path.

    columns: {heading: a run's key}; a value with a fraction is written with two
    decimals. cases: only these, in this order; None: all. A case that was not run gets
    a line that says so."""
    if not isinstance(record, dict):
        record = read_json(record)
    cases = cases or [run["case"] for run in record["runs"]]
    rows = []
    for case in dict.fromkeys(cases):
        runs = matching(record["runs"], case=case)
        if not runs:
            rows.append([case, "not run", *[""] * (2 + len(columns))])
        for run in runs:
            lr = "" if run["lr"] is None else f"{run['lr']:g}"
            settings = [f"{run['parameters']:,}", lr, f"{run['steps']}, {run['seed']}"]
            values = [run[key] for key in columns.values()]
            shown = [f"{v:.2f}" if isinstance(v, float) else f"{v:,}" for v in values]
            rows.append([case, *settings, *shown])
    return table(rows, ["", "parameters", "rate", "steps, seed", *columns])
