"""How the tests of a chapter's checks (test_checks_NN.py) try an answer."""

import os
from dataclasses import dataclass
from typing import ClassVar

from minipeft import LayerConfig
from minipeft.course.check import sandbox

# A check's draws follow from its name and the variant: a right answer is tried with
# several, a mistake with two of them. `make fuzz` tries more of both.
DRAWS = os.environ.get("MINIPEFT_DRAWS")
VARIANTS = int(DRAWS or 3)
OF_MISTAKES = int(DRAWS or 2)


def judge(checker, *answers, variants: int = VARIANTS, **numbers) -> list:
    verdicts = []
    for sandbox.variant in range(variants):
        verdicts.append(checker(*answers, **numbers))
    sandbox.variant = 0
    return verdicts


def accepts(checker, *answers, **numbers):
    for verdict in judge(checker, *answers, **numbers):
        assert verdict, verdict


def rejects(says: str, checker, *answers, **numbers):
    for verdict in judge(checker, *answers, variants=OF_MISTAKES, **numbers):
        assert not verdict
        assert says in verdict.message, verdict.message


def configured(adapter):
    """A configuration: a layer gets adapter(its weight, r, lora_alpha)."""

    @dataclass(kw_only=True)
    class Configured(LayerConfig):
        peft_type: ClassVar[str] = "TEST_BUILT"
        r: int = 8
        lora_alpha: int = 16

        def create(self, base, path):
            return adapter(base.weight, self.r, self.lora_alpha)

    return Configured
