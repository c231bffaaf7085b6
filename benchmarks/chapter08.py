"""The longer runs of chapter 08: LoRA, LoHa, LoKr, VeRA and DenseLoRA at two sizes each, each at a rate that suits it.

    python benchmarks/chapter08.py            # writes benchmarks/results/chapter08.json
"""
from chapter06 import sweep

CASES = {f"LoRA r {r}": ("LoraConfig", dict(r=r, lora_alpha=2 * r)) for r in (1, 8)}
CASES |= {f"LoHa r {r}": ("LoHaConfig", dict(r=r, alpha=2 * r)) for r in (1, 4)}
CASES |= {f"LoKr r {r}": ("LoKrConfig", dict(r=r, alpha=r)) for r in (2, 64)}
CASES |= {f"VeRA r {r}": ("VeraConfig", dict(r=r)) for r in (64, 256)}
CASES |= {f"DenseLoRA r {r}": ("DenseLoraConfig", dict(r=r, lora_alpha=r)) for r in (16,)}
CASES |= {f"DenseLoRA linear r {r}": ("DenseLoraConfig", dict(r=r, lora_alpha=r, activation="linear")) for r in (16,)}
DRAWS = {f"VeRA r 256, seed of A and B {key}": ("VeraConfig", dict(r=256, projection_prng_key=key)) for key in (1, 2)}
RATES = {method: (5e-2,) if "VeRA" in method else (1e-2,) for method in CASES | DRAWS}

if __name__ == "__main__":
    sweep("chapter08", CASES | DRAWS, RATES, (0,), __doc__, steps=40)
