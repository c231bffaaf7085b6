"""The longer runs of chapter 08: LoRA, LoHa, LoKr, VeRA and DenseLoRA, numbers trained
against loss.

    python benchmarks/chapter08.py --jobs 2        # writes
      benchmarks/results/chapter08.json

Each method at its own best rate (see chapter06.py), three seeds; DenseLoRA with and
without its GELU. VeRA's best once more with two other draws of A and B, all else equal.
"""

from chapter06 import SEEDS, again, around, main, start

CASES = {f"LoRA r {r}": ("LoraConfig", dict(r=r, lora_alpha=2 * r)) for r in (1, 4, 8)}
CASES |= {
    "LoHa r 2": ("LoHaConfig", dict(r=2, alpha=4)),
    "LoKr r 64": ("LoKrConfig", dict(r=64, alpha=64)),
    "VeRA r 256": ("VeraConfig", dict(r=256)),
    "DenseLoRA r 16": ("DenseLoraConfig", dict(r=16, lora_alpha=16)),
    "DenseLoRA linear r 16": (
        "DenseLoraConfig",
        dict(r=16, lora_alpha=16, activation="linear"),
    ),
}
METHODS, VERA = tuple(CASES), "VeRA r 256"
DRAWS = {
    f"VeRA r 256, draw {key}": ("VeraConfig", dict(r=256, projection_prng_key=key))
    for key in (1, 2)
}
TURNS = [
    start(1e-2, "LoRA r 8"),
    start(5e-2, VERA),
    start(2e-2, *(method for method in METHODS if method not in ("LoRA r 8", VERA))),
    *around(*METHODS),
    again(*DRAWS, seeds=SEEDS[:1], rate_of=VERA),
    again("DenseLoRA r 16", "DenseLoRA linear r 16"),
    again(*METHODS),
]

if __name__ == "__main__":
    main("chapter08", CASES | DRAWS, TURNS, __doc__)
