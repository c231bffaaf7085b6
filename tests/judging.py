"""How the tests of a chapter's checks (test_checks_NN.py) try an answer."""

from minipeft.course.check import sandbox

VARIANTS = 5  # a check's draws follow from its name and the variant: try several


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
    for verdict in judge(checker, *answers, **numbers):
        assert not verdict
        assert says in verdict.message, verdict.message
