"""The longer runs of chapter 07: AdaLoRA against LoRA at equal final rank, and what its parts are worth.

    python benchmarks/chapter07.py --jobs 2        # writes benchmarks/results/chapter07.json

AdaLoRA and LoRA each at the best of a few rates (see chapter06.py), three seeds. Two variants of AdaLoRA run at its rate:
without the penalty; and "no search", AdaLoRA's form and penalty with the final rank in every matrix from the start. The
ranks that each run ended with are in the file too.
"""
from chapter06 import SEEDS, again, around, main, start

STEPS = 60
ADA = dict(init_r=6, target_r=3, tinit=8, tfinal=25, deltaT=4, total_step=STEPS, lora_alpha=12)
CASES = {"AdaLoRA 6 to 3": ("AdaLoraConfig", ADA), "LoRA r 3": ("LoraConfig", dict(r=3, lora_alpha=6)),
         "AdaLoRA 6 to 3, no penalty": ("AdaLoraConfig", ADA | dict(orth_reg_weight=0.0)),
         "AdaLoRA 3, no search": ("AdaLoraConfig", ADA | dict(init_r=3, lora_alpha=6))}
MAIN, LORA, *VARIANTS = CASES
TURNS = [start(2e-2, MAIN), start(1e-2, LORA), around(MAIN), again(*VARIANTS, seeds=SEEDS[:1], rate_of=MAIN), again(MAIN, LORA),
         again(*VARIANTS, rate_of=MAIN), around(LORA), again(LORA), around(MAIN, LORA), again(*VARIANTS, seeds=SEEDS[:1], rate_of=MAIN),
         again(MAIN, LORA), again(*VARIANTS, rate_of=MAIN)]

if __name__ == "__main__":
    main("chapter07", CASES, TURNS, __doc__, steps=STEPS)
