"""Recorded runs, as the benchmarks write them: one dict a run, with its learning rate
"lr", its "seed", its losses and whatever tells it from the others."""


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
