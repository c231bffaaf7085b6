"""The longer runs of chapter 07: AdaLoRA against LoRA at equal final rank, and what its parts are worth.

    python benchmarks/chapter07.py --jobs 2        # writes benchmarks/results/chapter07.json

"no search" is AdaLoRA's form and penalty with the final rank in every matrix from the start: what is left is the form,
without the choice. Each method at the best rate of a ladder (see chapter06.py), three seeds; the ranks that each run
ended with are in the file too.
"""
from chapter06 import main

STEPS = 120
ADA = dict(init_r=6, target_r=3, tinit=12, tfinal=40, deltaT=4, total_step=STEPS, lora_alpha=12)
CASES = {"AdaLoRA 6 to 3": ("AdaLoraConfig", ADA),
         "AdaLoRA 6 to 3, no penalty": ("AdaLoraConfig", ADA | dict(orth_reg_weight=0.0)),
         "AdaLoRA 3, no search": ("AdaLoraConfig", ADA | dict(init_r=3, lora_alpha=6)),
         "LoRA r 3": ("LoraConfig", dict(r=3, lora_alpha=6))}
START = {method: 2e-2 if "Ada" in method else 1e-2 for method in CASES}

if __name__ == "__main__":
    main("chapter07", CASES, START, __doc__, steps=STEPS)
