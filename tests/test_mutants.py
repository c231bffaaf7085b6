"""The checks' mutation scores: the committed table, and a sample made again."""

import ast
import json

import mutants
import pytest

TABLE = json.loads(mutants.TABLE.read_text(encoding="utf-8"))
SOLUTIONS = mutants.solutions()
# survivors that the judge calls different, on inputs that the exercise rules out
RULED_OUT = {
    "allocate": "a tensor of booleans is as good as a list",
    "hash_project": "signs are 1 or -1, for which / and * are one",
    "ring_all_reduce": "chunks go round in any order; a message altered on its way"
    " then falls on another",
    "places": "what stands at padding is nobody's business",
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_no_mutant_that_differs_is_accepted(name):
    row = TABLE[name]
    assert not row["holes"] or name in RULED_OUT
    left = len(row["equivalent"]) + len(row["holes"]) + len(row["unjudged"])
    assert row["mutants"] == row["killed"] + left


def test_the_table_is_that_of_the_solutions():
    """An exercise whose solution has changed is analysed again."""
    assert set(TABLE) <= set(SOLUTIONS)
    for name, row in TABLE.items():
        assert row["solution"] == mutants.fingerprint(SOLUTIONS[name][1]), name


@pytest.mark.parametrize(
    "name", ["lora_delta", "same_run", "nucleus", "rank_at_budget"]
)
def test_a_sample_made_again(name):
    _, *solution = SOLUTIONS[name]
    row = mutants.analysed(name, *solution, step=3)
    assert row["killed"] and not row["holes"]


def test_the_judge_tells_apart_and_recognises():
    def right(A, B, alpha, r):
        return alpha / r * B @ A

    calls = mutants.record("lora_delta", [right])
    others = {
        lambda A, B, alpha, r: (B @ A) * alpha / r: False,
        lambda A, B, alpha, r: alpha / r * B.detach() @ A: True,
        lambda A, B, alpha, r: alpha * B @ A: True,
    }
    for other, expected in others.items():
        assert mutants.differs([right], [other], calls) == expected


def test_mutants_change_one_place_each():
    source = "def f(A, B):\n    return 2 * B @ A.T\n\n\ncheck.f(f)"
    texts = [text for _, text in mutants.mutants(source, learnt=True)]
    assert len(texts) == len(set(texts)) > 5
    original = ast.unparse(ast.Module(ast.parse(source).body[:-1], []))
    assert original not in texts
    assert any("2 * B @ A" in text and ".T" not in text for text in texts)
    assert any("cut_graph(B)" in text for text in texts)
