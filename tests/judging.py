"""How the tests of a chapter's checks (test_checks_NN.py) try an answer."""

import random

SHAPES_SEEN = 5  # the checks draw their own shapes: try each answer on several draws


def judge(checker, *answers) -> list:
    random.seed(0)
    return [checker(*answers) for _ in range(SHAPES_SEEN)]


def accepts(checker, *answers):
    for verdict in judge(checker, *answers):
        assert verdict, verdict


def rejects(says: str, checker, *answers):
    for verdict in judge(checker, *answers):
        assert not verdict
        assert says in verdict.message, verdict.message
