"""Evaluation: the loss is a plain mean over tokens, the score is the task's, and the
model is left as it was."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_training import Letters, rounding, tiny

from minipeft.lanternwick.tasks import Example, Task
from minipeft.lm.data import DataError, encode
from minipeft.lm.evaluation import completion_loss, evaluate
from minipeft.lm.training import train


def examples(n=11):
    return [
        Example(
            "abcd"[i % 4] * (1 + i % 6), " " + "xyz"[i % 4 % 3] * (1 + i % 4 % 2), {}
        )
        for i in range(n)
    ]


def exact(predictions, examples):
    return {
        "exact": (
            100
            * sum(
                p.strip() == e.completion.strip()
                for p, e in zip(predictions, examples, strict=True)
            )
            / len(examples)
        )
    }


class Words(Letters):
    """Decodes what it encodes: 3 + code % 61 is one to one on these letters."""

    letters = {3 + ord(c) % 61: c for c in " abcdxyz"}

    def decode(self, ids):
        return "".join(self.letters.get(int(i), "?") for i in ids if i > 2)


def task():
    rows = examples(24)
    return Task("toy", "a toy", rows, rows[:8], rows[8:], "exact", 0.0, exact)


def by_hand(model, rows):
    """Row by row, without padding."""
    total = count = 0
    for row in rows:
        ids, labels = (torch.tensor([x]) for x in encode(Letters(), row))
        logits = model(input_ids=ids).logits
        total += F.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        ).item()
        count += (labels != -100).sum().item()
    return total / count, count


class TestLoss:
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_loss_is_the_mean_over_completion_tokens_whatever_the_batches(
        self, batch_size
    ):
        model = tiny().eval()
        loss, count = by_hand(model, examples())
        got = completion_loss(model, Letters(), examples(), batch_size)
        assert got["tokens"] == count
        assert got["loss"] == pytest.approx(loss, abs=rounding(loss))
        assert got["perplexity"] == pytest.approx(math.exp(loss), rel=rounding(loss))

    def test_ready_batches_and_objects_with_batches(self):
        from minipeft.lm.data import Batches

        model, rows = tiny().eval(), Batches(examples(12), Letters(), 4)
        loss = completion_loss(model, Letters(), examples(12))["loss"]
        for given in (rows, [rows.batch(i) for i in range(3)]):
            found = completion_loss(model, None, given)["loss"]
            assert found == pytest.approx(loss, abs=rounding(loss))

    def test_batches_without_labels_count_for_nothing(self):
        from minipeft.lm.data import Batches

        model, batch = tiny().eval(), Batches(examples(4), Letters(), 4).batch(0)
        alone = completion_loss(model, None, [batch])
        bare = batch | {"labels": torch.full_like(batch["labels"], -100)}
        assert completion_loss(model, None, [bare, batch, bare]) == alone
        for nothing in ([bare], [bare, bare], []):
            with pytest.raises(DataError, match="no label to judge the model by"):
                completion_loss(model, None, nothing)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_is_restored_and_no_gradient_is_left(self, training):
        model = tiny().train(training)
        evaluate(model, Words(), task(), max_new_tokens=3)
        assert model.training is training and all(
            p.grad is None for p in model.parameters()
        )
        with pytest.raises(DataError):
            evaluate(model, Words(), [Example("a" * 99, " x", {})])
        assert model.training is training


class TestEvaluate:
    def test_a_trained_model_scores_and_an_untrained_one_does_not(self):
        model, toy = tiny(), task()
        before = evaluate(model, Words(), toy)
        train(
            model,
            toy,
            tokenizer=Words(),
            steps=120,
            batch_size=8,
            lr=1e-2,
            progress=False,
        )
        after = evaluate(model, Words(), toy, predictions=True)
        assert (
            before["exact"] == 0
            and after["exact"] == 100
            and after["loss"] < 0.1 < before["loss"]
        )
        assert [p.strip() for p in after["predictions"]] == [
            e.completion.strip() for e in toy.test
        ] and after["examples"] == 16
        assert list(after) == ["examples", "loss", "perplexity", "exact", "predictions"]

    def test_split_limit_and_no_writing(self):
        model, toy = tiny(), task()
        assert evaluate(
            model, Words(), toy, split="valid", limit=3, generate=False
        ) == pytest.approx(
            {"examples": 3}
            | {
                k: v
                for k, v in completion_loss(model, Words(), toy.valid[:3]).items()
                if k != "tokens"
            }
        )
        # a list has no score
        assert set(evaluate(model, Words(), examples())) == {
            "examples",
            "loss",
            "perplexity",
        }
        plain_text = SimpleNamespace(
            train=[], valid=[], test=[Example("", "abc", {})], score=None
        )
        assert set(evaluate(model, Words(), plain_text)) == {
            "examples",
            "loss",
            "perplexity",
        }

    def test_wrong_split_and_empty(self):
        with pytest.raises(DataError, match="expected train, valid or test"):
            evaluate(tiny(), Words(), task(), split="tset")
        with pytest.raises(DataError, match="no examples"):
            evaluate(tiny(), Words(), [])

    @pytest.mark.parametrize("split", ["nope", None, "Test"])
    def test_a_wrong_split_of_a_list(self, split):
        with pytest.raises(DataError, match="split .*expected train, valid or test"):
            evaluate(tiny(), Letters(), examples(4), split=split)

    @pytest.mark.parametrize("data", [task(), task().test, examples(3)])
    def test_predictions_that_nobody_writes(self, data):
        with pytest.raises(ValueError, match="predictions=True needs generate=True"):
            evaluate(tiny(), Letters(), data, generate=False, predictions=True)

    @pytest.mark.parametrize("limit", [-1, 0, 1.5, "3", True])
    def test_a_limit_that_means_nothing(self, limit):
        with pytest.raises(
            DataError, match="limit = .*: expected a whole number at least 1"
        ):
            evaluate(None, Letters(), [1, 2, 3], limit=limit)
