"""What every check survives, whatever the learner's code does, and what all of them
share: seeded draws, tolerances, gradients."""

import random
import sys
import threading
import time

import numpy as np
import pytest
import torch

from minipeft.course import check
from minipeft.course.check import sandbox
from minipeft.course.check.teacher import checks, compare, same

CHECKS = sorted(
    name
    for name in check.__all__
    if name != "Verdict" and not name.startswith("chapter")
)
# checks whose answer is a class, or several functions: they say so
ANSWERS = {"pack_nibbles": 2}


def ask(name, answer):
    return getattr(check, name)(*[answer] * ANSWERS.get(name, 1))


def raises(error):
    def answer(*args, **kwargs):
        raise error

    return answer


@pytest.mark.parametrize("name", CHECKS)
def test_no_error_leaves_a_check(name):
    """Whatever is raised or returned, there is a verdict, and no error of its own."""
    answers = [
        raises(error)
        for error in (SystemExit(), KeyboardInterrupt(), GeneratorExit(), KeyError("x"))
    ]
    values = "text", ["a"], {"a": 1}, None, np.ones(3), 1.5, torch.ones(0), (1, 2), {}
    answers += [lambda *args, value=value, **kwargs: value for value in values]
    for answer in [*answers, *values, 3, int]:
        verdict = ask(name, answer)
        assert isinstance(verdict, check.Verdict) and not verdict
        assert "relative error 0%" not in verdict.message
        assert "Cannot specify" not in verdict.message, verdict.message
        assert "nan%" not in verdict.message


class TestInterrupts:
    def test_exit_is_explained(self):
        assert (
            "would end the whole notebook" in check.d90(lambda *a: sys.exit()).message
        )
        assert "SystemExit" in check.nucleus(raises(SystemExit(3))).message

    def test_an_interrupt_of_the_answer_is_no_interrupt_of_the_user(self):
        verdict = check.d90(raises(KeyboardInterrupt()))
        assert "KeyboardInterrupt" in verdict.message

    def test_the_users_interrupt_stops_the_cell(self):
        import _thread

        def answer(*args):
            _thread.interrupt_main()
            time.sleep(0.01)

        with pytest.raises(KeyboardInterrupt):
            check.d90(answer)


def never_ends(*args):
    while True:
        pass


def swallows(*args):
    while True:
        try:
            time.sleep(5)
        except Exception:
            pass


def calls_itself(*args):
    return calls_itself(*args)


class TestTimeLimit:
    @pytest.mark.parametrize("answer", [never_ends, swallows])
    def test_an_answer_that_never_ends(self, answer, monkeypatch):
        monkeypatch.setattr(sandbox, "LIMIT", 0.2)
        assert "had not ended after 0.2 seconds" in check.d90(answer).message

    def test_in_a_thread_or_where_there_is_no_alarm(self, monkeypatch):
        monkeypatch.setattr(sandbox, "LIMIT", 0.2)
        verdicts = []
        thread = threading.Thread(
            target=lambda: verdicts.append(check.d90(never_ends)), daemon=True
        )
        thread.start()
        thread.join(20)
        assert "had not ended" in verdicts[0].message
        monkeypatch.delattr(sandbox.signal, "setitimer")
        assert "had not ended" in check.nucleus(never_ends).message

    def test_time_that_other_programs_take_does_not_count(self):
        with sandbox.time_limit(0.5):  # waits: no processor time
            time.sleep(0.8)
        with pytest.raises(sandbox.TooLong), sandbox.time_limit(0.5):
            time.sleep(30)

    def test_endless_recursion(self):
        assert "RecursionError" in check.d90(calls_itself).message

    def test_an_alarm_that_was_set_before_rings(self):
        import signal

        rung = []
        before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            check.d90(lambda *args: None)
            time.sleep(0.5)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert rung


class TestSettings:
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda: torch.set_grad_enabled(False),
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_num_threads(torch.get_num_threads() + 1),
            lambda: torch.set_default_device("meta"),
        ],
    )
    def test_they_are_put_back_and_explained(self, spoil):
        before = {name: read() for name, (read, _) in sandbox.SETTINGS.items()}

        def answer(A, B, alpha, r):
            spoil()
            return alpha / r * B @ A

        verdict = check.lora_delta(answer)
        assert not verdict and "setting of the whole process" in verdict.message
        assert before == {name: read() for name, (read, _) in sandbox.SETTINGS.items()}
        assert check.lora_delta(lambda A, B, alpha, r: alpha / r * B @ A)

    def test_a_check_does_not_depend_on_the_notebooks_settings(self):
        with torch.no_grad():
            assert check.lora_delta(lambda A, B, alpha, r: alpha / r * B @ A)
            assert not torch.is_grad_enabled()
        torch.set_default_dtype(torch.float64)
        try:
            assert check.hash_project(
                lambda theta, index, sign: (
                    theta[index] * sign / torch.bincount(index).sqrt()[index]
                )
            )
        finally:
            torch.set_default_dtype(torch.float32)

    def test_random_states_are_put_back(self):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        expected = random.random(), np.random.rand(), torch.rand(1)
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

        def answer(A, B, alpha, r):
            random.seed(5)
            np.random.seed(5)
            torch.manual_seed(5)
            return alpha / r * B @ A

        check.lora_delta(answer)
        assert expected == (random.random(), np.random.rand(), torch.rand(1))


@pytest.mark.parametrize("name", ["lora_delta", "rank_at_budget", "fair_gap"])
def test_the_same_answer_gets_the_same_message(name):
    messages = {ask(name, lambda *args: torch.ones(2, 3)).message for _ in range(3)}
    assert len(messages) == 1


class TestNumbers:
    """numpy's and torch's are right where the value is."""

    @pytest.mark.parametrize("kind", [np.int64, torch.tensor])
    def test_counts(self, kind):
        def kept(widths, trained):
            places = range(1, len(trained))
            inside = [widths[i] * any(trained[: i + 1]) for i in places]
            return kind(widths[0] * trained[0] + sum(inside))

        def rank(shapes, layers, targets, budget):
            return kind(budget // (layers * sum(sum(shapes[name]) for name in targets)))

        assert check.kept_numbers(kept)
        assert check.rank_at_budget(rank)

    def test_arrays(self):
        def halves(weight, heads):
            rows, d = weight.shape
            w = weight.numpy().reshape(heads, -1, 2, d)
            return np.swapaxes(w, 1, 2).reshape(rows, d)

        assert check.halves_from_pairs(halves)
        assert check.bias_gradient(lambda g, x: g.numpy().sum((0, 1)))


def test_arguments_are_left_as_they_are():
    def adds(grads, labels):
        labels[0] += 0
        grads.append(grads[0])

    assert "You changed `grads` in place" in check.accumulated(adds).message
    doubles = check.lora_delta(lambda A, B, alpha, r: alpha / r * B @ A.data.mul_(2))
    assert "You changed `A` in place" in doubles.message
    empties = check.choose_base(lambda models: models.clear() or ("small", "ahead"))
    assert "You changed `models` in place" in empties.message


class TestSame:
    def test_rounding_in_32_bits_is_none(self):
        x = torch.randn(50, 60, dtype=torch.float64)
        y = torch.randn(60, 40, dtype=torch.float64)
        assert same(x.float() @ y.float(), x @ y)
        assert same((x.float() @ y.float()).double(), x @ y)
        assert not same((x @ y) * (1 + 1e-4), x @ y)
        assert not same(x.bfloat16().double() @ y, x @ y)

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite(self, wrong):
        right = torch.ones(3)
        found = right.clone()
        found[1] = wrong
        assert not same(found, right)
        verdict = checks("")(lambda: compare(found, right, {}, "Your x"))()
        assert ("nan" if wrong != wrong else "inf") in verdict.message
        assert "relative" not in verdict.message

    def test_nothing_and_whole_numbers(self):
        assert same(torch.ones(0, 3), torch.ones(0, 3))
        assert not same(torch.tensor([10_000_001]), torch.tensor([10_000_000]))
        assert same(torch.tensor([3.0]), torch.tensor([3]))


class TestGradients:
    """compare looks at all of them, with their values."""

    @staticmethod
    def verdict(answer):
        @checks("all")
        def product(function):
            a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
            compare(function(a, b), a @ b + a, {}, "Your result")

        return product(answer)

    def test_right_ones(self):
        assert self.verdict(lambda a, b: a @ b + a)
        assert self.verdict(lambda x, y: (x[:, :, None] * y).sum(1) + x)
        assert self.verdict(lambda a, b: (a.double() @ b.double() + a).float())

    @pytest.mark.parametrize(
        "says, answer",
        [
            ("lost touch with a and b", lambda a, b: (a @ b + a).detach()),
            ("no gradient reaches b", lambda a, b: a @ b.detach() + a),
            ("not the right gradient of a", lambda a, b: a @ b + a.detach()),
            ("not the right gradient of a", lambda a, b: a.data @ b + a),
            ("not the right gradient of b", lambda a, b: a @ (2 * b - b.data) + a),
        ],
    )
    def test_wrong_ones(self, says, answer):
        assert says in self.verdict(answer).message


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_nothing_looks_like_a_wrong_result_that_is_not_finite(bad):
    """A mistake that divides by zero names no other answer."""
    wrong = torch.tensor([bad, 1.0])
    assert not same(torch.tensor([2.0, 1.0]), wrong)
    assert not same(torch.tensor([2.0, torch.inf]), wrong)
    assert same(wrong, wrong) == (bad == bad)
