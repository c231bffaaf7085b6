"""The longer runs of chapter 08: LoRA, LoHa, LoKr, VeRA and DenseLoRA, numbers trained against loss.

    python benchmarks/chapter08.py --jobs 2        # writes benchmarks/results/chapter08.json

Each method at the best of a few rates with one seed (see chapter06.py); DenseLoRA, with and without its GELU, at one rate
with three, which shows how much a seed changes. VeRA's best once more with two other draws of A and B, all else equal.
"""
from chapter06 import SEEDS, again, around, main, start

CASES = {f"LoRA r {r}": ("LoraConfig", dict(r=r, lora_alpha=2 * r)) for r in (1, 8)}
CASES |= {"LoHa r 2": ("LoHaConfig", dict(r=2, alpha=4)), "LoKr r 64": ("LoKrConfig", dict(r=64, alpha=64)),
          "VeRA r 256": ("VeraConfig", dict(r=256)), "DenseLoRA r 16": ("DenseLoraConfig", dict(r=16, lora_alpha=16)),
          "DenseLoRA linear r 16": ("DenseLoraConfig", dict(r=16, lora_alpha=16, activation="linear"))}
CASES |= {f"VeRA r 256, draw {key}": ("VeraConfig", dict(r=256, projection_prng_key=key)) for key in (1, 2)}
GELU, LINEAR, VERA, *DRAWS = "DenseLoRA r 16", "DenseLoRA linear r 16", "VeRA r 256", "VeRA r 256, draw 1", "VeRA r 256, draw 2"
SMALL = ("LoHa r 2", "LoKr r 64", "LoRA r 1")
TURNS = [start(1e-2, "LoRA r 8", *SMALL, GELU), start(5e-2, VERA), around(VERA), again(*DRAWS, seeds=SEEDS[:1], rate_of=VERA),
         again(GELU, LINEAR, seeds=SEEDS, rate_of=GELU), around(*SMALL), around("LoRA r 8"), around(VERA), again(*DRAWS, seeds=SEEDS[:1], rate_of=VERA),
         around(GELU, LINEAR), again(GELU, LINEAR), around(*SMALL)]

if __name__ == "__main__":
    main("chapter08", CASES, TURNS, __doc__, steps=60)
