"""The longer runs of chapter 08: LoRA, LoHa, LoKr, VeRA and DenseLoRA, numbers trained against loss.

    python benchmarks/chapter08.py --jobs 2        # writes benchmarks/results/chapter08.json

Each method and size at the best rate of a ladder (see chapter06.py), three seeds. VeRA's best once more with two other
draws of A and B, all else equal.
"""
from chapter06 import SEEDS, best, main

CASES = {f"LoRA r {r}": ("LoraConfig", dict(r=r, lora_alpha=2 * r)) for r in (1, 8)}
CASES |= {f"LoHa r {r}": ("LoHaConfig", dict(r=r, alpha=2 * r)) for r in (2,)}
CASES |= {f"LoKr r {r}": ("LoKrConfig", dict(r=r, alpha=r)) for r in (2, 64)}
CASES |= {f"VeRA r {r}": ("VeraConfig", dict(r=r)) for r in (256,)}
CASES |= {f"DenseLoRA r {r}": ("DenseLoraConfig", dict(r=r, lora_alpha=r)) for r in (16,)}
CASES |= {f"DenseLoRA linear r {r}": ("DenseLoraConfig", dict(r=r, lora_alpha=r, activation="linear")) for r in (16,)}
DRAWS = (1, 2)
START = {method: 5e-2 if "VeRA" in method else 1e-2 for method in CASES}
STEPS = 100


def draws(runs):
    """VeRA's best with the first seed, and other draws of A and B."""
    method = "VeRA r 256"
    same = next(run for run in runs if run["method"] == method and run["seed"] == SEEDS[0])
    kept = {key: same[key] for key in ("config", "seed", "steps", "test", "answers")} | {"lr": best(runs, method)}
    return [kept | {"method": f"{method}, draw {key}", "fields": same["fields"] | dict(projection_prng_key=key)} for key in DRAWS]


if __name__ == "__main__":
    main("chapter08", CASES, START, __doc__, steps=STEPS, extra=draws)
