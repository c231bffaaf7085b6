"""The longer runs of chapter 07: AdaLoRA, with and without its penalty, against a LoRA of the same final rank.

    python benchmarks/chapter07.py            # writes benchmarks/results/chapter07.json
"""
from chapter06 import sweep

STEPS = 60
ADA = dict(init_r=6, target_r=3, tinit=8, tfinal=25, deltaT=5, total_step=STEPS, lora_alpha=12)
CASES = {"AdaLoRA 6 to 3": ("AdaLoraConfig", ADA),
         "AdaLoRA 6 to 3, no penalty": ("AdaLoraConfig", ADA | dict(orth_reg_weight=0.0)),
         "LoRA r = 3": ("LoraConfig", dict(r=3, lora_alpha=6))}
RATES = {method: (2e-2,) if "Ada" in method else (1e-2,) for method in CASES}

if __name__ == "__main__":
    sweep("chapter07", CASES, RATES, (0,), __doc__, steps=STEPS)
