"""The longer runs of chapter 07: AdaLoRA against LoRA at equal final rank, and what its
parts are worth.

    python benchmarks/chapter07.py --jobs 2        # writes
      benchmarks/results/chapter07.json

AdaLoRA, two variants of it, and LoRA, each at its own best rate (see chapter06.py),
three seeds. The variants: without the penalty; and "no search", AdaLoRA's form and
penalty with the final rank in every matrix from the start. The ranks that each run
ended with are in the file too.
"""

from chapter06 import STEPS, again, around, main, start

ADA = dict(
    init_r=6, target_r=3, tinit=10, tfinal=40, deltaT=5, total_step=STEPS, lora_alpha=12
)
CASES = {
    "AdaLoRA 6 to 3": ("AdaLoraConfig", ADA),
    "LoRA r 3": ("LoraConfig", dict(r=3, lora_alpha=6)),
    "AdaLoRA 6 to 3, no penalty": ("AdaLoraConfig", ADA | dict(orth_reg_weight=0.0)),
    "AdaLoRA 3, no search": ("AdaLoraConfig", ADA | dict(init_r=3, lora_alpha=6)),
}
LORA = "LoRA r 3"
TURNS = [
    start(5e-2, *(method for method in CASES if method != LORA)),
    start(2e-2, LORA),
    *around(*CASES),
    again(*CASES),
]

if __name__ == "__main__":
    main("chapter07", CASES, TURNS, __doc__)
