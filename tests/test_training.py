"""Training: it learns, it is the same whole or in pieces, and it can be stopped at any
step."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tolerance import assert_within, tolerance
from torch import nn

from minipeft.errors import FileError
from minipeft.lm.checkpoint import load_checkpoint, save_checkpoint, trained_tensors
from minipeft.lm.data import Batches
from minipeft.lm.gpt import GPT, GPTConfig
from minipeft.lm.training import History, lr_factor, train


class Letters:
    """A tokenizer of single characters."""

    bos_token_id, eos_token_id, pad_token_id, vocab_size = 1, 2, 0, 64

    def encode(self, text):
        return [3 + ord(c) % 61 for c in text]

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids if i > 2)


def examples(n=24):
    return [
        SimpleNamespace(
            prompt="abc"[i % 3] * (1 + i % 5), completion=f" {i % 7}{i % 3}", meta={}
        )
        for i in range(n)
    ]


def rounding(value) -> float:
    """What rounding does to a value of this size that comes out of tiny()."""
    return tolerance(torch.float32, value, terms=64, steps=2 * 9)


def tiny(seed=0, vocab_size=64, **fields):
    torch.manual_seed(seed)
    return GPT(
        GPTConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            attention_bias=True,
            **fields,
        )
    )


class Dropout(nn.Module):
    """A tiny model in which the random state matters."""

    def __init__(self, config=None):
        super().__init__()
        self.inner, self.config = tiny(), None
        self.inner.model.norm = nn.Sequential(self.inner.model.norm, nn.Dropout(0.3))

    def forward(self, **batch):
        return self.inner(**batch)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


common = dict(tokenizer=Letters(), batch_size=4, lr=1e-2, progress=False)


class Interrupt:
    """Sends this process a Ctrl-C after `step`."""

    def __init__(self, step):
        self.step = step

    def __call__(self, step, facts):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class TestLearning:
    def test_it_learns_and_reports(self):
        model, seen = tiny().eval(), []
        history = train(
            model,
            examples(),
            steps=40,
            log=lambda step, facts: seen.append((step, facts["loss"])),
            **common,
        )
        assert history.losses[-1] < 0.6 * history.losses[0]
        assert (
            len(history.losses)
            == len(history.lr)
            == len(history.grad_norm)
            == history.steps
            == 40
        )
        assert seen == list(enumerate(history.losses))
        assert (
            history.tokens_per_second > 0
            and history.stopped is None
            and "40 steps" in repr(history)
        )
        assert not model.training and all(p.grad is None for p in model.parameters())

    def test_only_what_requires_a_gradient_moves(self):
        model, before = tiny(), tiny()
        for name, p in model.named_parameters():
            p.requires_grad_("bias" in name)
        train(model, examples(), steps=3, **common)
        for (name, p), q in zip(model.named_parameters(), before.parameters()):
            if "k_proj.bias" in name:
                continue  # the loss does not depend on it: its gradient is rounding
            assert torch.equal(p, q) == ("bias" not in name), name

    def test_same_seed_same_weights_and_the_callers_random_numbers_are_left_alone(self):
        a, b, c = Dropout(), Dropout(), Dropout()
        torch.manual_seed(5)
        train(a, examples(), steps=4, seed=3, **common)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(drawn, torch.rand(3))
        train(b, examples(), steps=4, seed=3, **common)
        train(c, examples(), steps=4, seed=4, **common)
        assert equal(a, b) and not equal(a, c)


class TestResuming:
    @pytest.mark.parametrize(
        "optimizer",
        [
            "adamw",
            "sgd",
            torch.optim.Adagrad,
            lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9),
        ],
    )
    def test_interrupted_training_resumes_to_bit_identical_weights(
        self, tmp_path, optimizer
    ):
        options = common | dict(
            steps=12,
            optimizer=optimizer,
            warmup=2,
            accumulate=2,
            weight_decay=0.1,
            evaluate_every=3,
            valid=examples(5),
        )
        whole, parts = Dropout(), Dropout()
        straight = train(whole, examples(), **options)
        first = train(parts, examples(), folder=tmp_path, log=Interrupt(4), **options)
        assert first.stopped == "interrupted" and first.steps == 5
        fresh = Dropout()  # a new process: nothing but the file
        second = train(fresh, examples(), folder=tmp_path, log=Interrupt(7), **options)
        assert second.steps == 8
        third = train(Dropout(), examples(), folder=tmp_path, **options)
        final = Dropout()
        load_checkpoint(tmp_path / "latest.safetensors", final)
        assert equal(whole, final) and third.stopped is None
        assert (third.losses, third.lr, third.eval_loss, third.best) == (
            straight.losses,
            straight.lr,
            straight.eval_loss,
            straight.best,
        )
        # done already: nothing happens
        again = train(final, examples(), folder=tmp_path, **options)
        assert equal(whole, final) and again.losses == straight.losses
        assert not list(tmp_path.glob("*.tmp"))

    def test_a_killed_run_goes_on_from_its_last_checkpoint(self, tmp_path):
        def die(step, facts):
            if step == 6:
                raise SystemExit("power cut")

        options = common | dict(steps=10, save_every=2)
        whole, cut = tiny(), tiny()
        train(whole, examples(), **options)
        with pytest.raises(SystemExit):
            train(cut, examples(), folder=tmp_path, log=die, **options)
        other = tiny(1)
        steps = []
        train(
            other,
            examples(),
            folder=tmp_path,
            log=lambda step, facts: steps.append(step),
            **options,
        )
        assert steps == [6, 7, 8, 9] and equal(whole, other)

    def test_resuming_an_adapter_saves_only_the_adapter(self, tmp_path):
        model = tiny()
        for name, p in model.named_parameters():
            p.requires_grad_("v_proj" in name)
        train(model, examples(), steps=2, folder=tmp_path, **common)
        assert set(trained_tensors(model)) == {
            n for n, _ in model.named_parameters() if "v_proj" in n
        }
        assert (tmp_path / "latest.safetensors").stat().st_size < 30_000
        with pytest.raises(ValueError, match="another model"):
            load_checkpoint(tmp_path / "latest.safetensors", tiny())

    def test_other_settings_are_not_mixed(self, tmp_path):
        train(tiny(), examples(), steps=2, folder=tmp_path, **common)
        with pytest.raises(ValueError, match="steps 2 .now 3."):
            train(tiny(), examples(), steps=3, folder=tmp_path, **common)
        with pytest.raises(ValueError, match="data .checksum"):
            train(tiny(), examples()[::-1], steps=2, folder=tmp_path, **common)
        assert (
            train(
                tiny(), examples(), steps=3, folder=tmp_path, resume=False, **common
            ).steps
            == 3
        )


class TestTheLoop:
    def test_accumulation_is_the_gradient_of_one_large_batch(self):
        """Micro-batches with different numbers of labels: a mean of means is wrong."""
        rows = Batches(examples(), Letters(), 4)
        small = [rows.batch(i) for i in range(2)]
        width = max(b["input_ids"].shape[1] for b in small)
        pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        whole = {
            k: torch.cat(
                [
                    nn.functional.pad(b[k], (0, width - b[k].shape[1]), value=pad[k])
                    for b in small
                ]
            )
            for k in pad
        }
        small[0]["labels"][:, :-3] = -100
        whole["labels"][:4, : small[0]["labels"].shape[1] - 3] = -100
        models = tiny(), tiny()
        options = dict(steps=1, lr=1.0, clip=None, optimizer="sgd", progress=False)
        a = train(
            models[0],
            SimpleNamespace(batch=lambda step: small[step]),
            accumulate=2,
            **options,
        )
        b = train(models[1], SimpleNamespace(batch=lambda step: whole), **options)
        assert a.losses[0] == pytest.approx(b.losses[0], abs=rounding(b.losses[0]))
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(p, q, atol=rounding(1), rtol=0)

    def test_against_a_plain_loop(self):
        model, plain = tiny(), tiny()
        history = train(
            model,
            examples(),
            steps=6,
            warmup=2,
            schedule="linear",
            weight_decay=0.1,
            clip=0.5,
            **common,
        )
        batches = Batches(examples(), Letters(), 4, seed=0, max_length=32)
        matrices = [p for p in plain.parameters() if p.ndim > 1]
        vectors = [p for p in plain.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": 0.1},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=1e-2,
        )
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min((step + 1) / 2, 1 - (step - 2) / 4)
            optimizer.zero_grad()
            loss = plain(**batches.batch(step)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            rounded = rounding(loss)
            assert history.losses[step] == pytest.approx(loss.item(), abs=rounded)
        # forward and backward, six times
        steps = 2 * 9 * 2 * 6
        for p, q in zip(model.parameters(), plain.parameters()):
            assert_within(p, q, terms=64, steps=steps, least=1.0)

    def test_schedules(self):
        def at(schedule):
            return [lr_factor(s, 12, 2, schedule) for s in range(12)]

        for schedule in ("constant", "linear", "cosine"):
            assert at(schedule)[:3] == [0.5, 1.0, 1.0]
        assert (
            at("constant")[-1] == 1
            and at("linear")[-1] == pytest.approx(0.1)
            and at("cosine")[7] == pytest.approx(0.5)
        )
        assert all(a >= b for a, b in zip(at("cosine")[1:], at("cosine")[2:]))

    def test_a_ready_optimizer_keeps_its_rates_by_group(self):
        model = tiny()
        names = dict(model.named_parameters())
        fast, slow = (
            [p for n, p in names.items() if "v_proj" in n],
            [p for n, p in names.items() if "v_proj" not in n],
        )
        optimizer = torch.optim.SGD(
            [{"params": slow, "lr": 0.0}, {"params": fast, "lr": 0.1}]
        )
        # the second run starts from the peak again, not from where the first one's
        # schedule
        # ended
        for _ in range(2):
            history = train(
                model,
                examples(),
                tokenizer=Letters(),
                steps=3,
                batch_size=4,
                optimizer=optimizer,
                schedule="linear",
                progress=False,
            )
        assert optimizer.param_groups[1]["lr"] == pytest.approx(
            0.1 / 3
        ) and history.lr == [0, 0, 0]
        fresh = dict(tiny().named_parameters())
        assert all(
            torch.equal(p, fresh[n]) != ("v_proj" in n) for n, p in names.items()
        )

    def test_best_checkpoint_is_kept(self, tmp_path):
        model = tiny()
        bad = dict(common, lr=0.3)  # far too high: the best is not the last
        history = train(
            model,
            examples(),
            steps=9,
            evaluate_every=1,
            valid=examples(6),
            folder=tmp_path,
            **bad,
        )
        step, loss = history.best
        assert loss == min(l for _, l in history.eval_loss) and [
            s for s, _ in history.eval_loss
        ] == list(range(1, 10))
        best = tiny()
        assert load_checkpoint(tmp_path / "best.safetensors", best) == {
            "step": step,
            "loss": loss,
        }
        from minipeft.lm.evaluation import completion_loss

        found = completion_loss(best, Letters(), examples(6))["loss"]
        assert found == pytest.approx(loss, abs=rounding(loss))

    def test_divergence_stops_and_keeps_the_last_good_weights(self):
        model = tiny()

        def poison(step):
            return Batches(examples(), Letters(), 4).batch(step)

        def explode(step, facts):
            if step == 1:
                model.lm_head.weight.data[0, 0] = float("nan")

        history = train(
            model,
            SimpleNamespace(batch=poison),
            steps=5,
            lr=1e-3,
            progress=False,
            log=explode,
        )
        assert (
            history.stopped == "diverged"
            and history.steps == 2
            and "DIVERGED" in repr(history)
        )

    def test_bf16_autocast_trains_float_weights(self):
        model = tiny()
        history = train(model, examples(), steps=10, bf16=True, **common)
        assert (
            model.lm_head.weight.dtype == torch.float32
            and history.losses[-1] < history.losses[0]
        )

    def test_optimizer_state_that_is_not_float_survives(self, tmp_path):
        """8-bit states are bytes and plain numbers; load_state_dict would cast them to
        the weight's dtype."""
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        p = optimizer.param_groups[0]["params"][1]
        optimizer.state[p] = {
            "codes": torch.arange(5, dtype=torch.uint8),
            "count": 3,
            "qmap": torch.linspace(0, 1, 4),
        }
        save_checkpoint(tmp_path / "c.safetensors", model, optimizer, note="x")
        other = torch.optim.SGD(model.parameters(), lr=0.2)
        assert load_checkpoint(tmp_path / "c.safetensors", model, other)["note"] == "x"
        assert (
            torch.equal(other.state[p]["codes"], torch.arange(5, dtype=torch.uint8))
            and other.state[p]["count"] == 3
        )
        assert other.param_groups[0]["lr"] == 0.1


class Trap(torch.autograd.Function):
    """The identity, whose gradient is `bad` at its n-th backward pass."""

    calls, at, bad = 0, 3, float("nan")

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        Trap.calls += 1
        return dy * (Trap.bad if Trap.calls == Trap.at else 1.0)


def trapped(bad, at=3):
    Trap.calls, Trap.at, Trap.bad = 0, at, bad
    model = tiny()
    model.model.layers[0].register_forward_hook(lambda m, args, y: Trap.apply(y))
    return model


class TestArguments:
    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(schedule="cosin"), "did you mean .cosine"),
            (dict(steps=0), "at least 1"),
            (dict(lr=None), "needs lr"),
            (dict(tokenizer=None), "tokenizer="),
            (dict(optimizer="adamv"), "expected one of adamw"),
            (dict(evaluate_every=2), "valid="),
            (dict(clip=-1.0), "clip = -1.0: expected a number above 0 or None"),
            (dict(clip=float("nan")), "clip = nan"),
            (dict(clip=-float("inf")), "clip = -inf"),
            (dict(clip="1"), "clip = '1'"),
            (dict(lr=float("inf")), "lr = inf: expected a number at least 0"),
            (dict(lr=True), "lr = True"),
            (dict(lr="1e-3"), "lr = '1e-3'"),
            (dict(weight_decay=-1.0), "weight_decay = -1.0"),
            (dict(weight_decay=float("nan")), "weight_decay = nan"),
            (dict(warmup=-0.5), "warmup = -0.5"),
            (dict(warmup=1.5), "warmup = 1.5: expected whole steps, or a fraction"),
            (dict(warmup=None), "warmup = None"),
            (dict(evaluate_every=1.5, valid=[1]), "evaluate_every = 1.5"),
            (dict(evaluate_every=-1, valid=[1]), "evaluate_every = -1"),
            (dict(save_every=-1), "save_every = -1"),
            (dict(save_every="x"), "save_every = 'x'"),
            (dict(seed=1.5), "seed = 1.5"),
            (dict(seed="a"), "seed = 'a'"),
            (
                dict(seed=2**70),
                "seed = 11805.*: expected a whole number from 0 to 18446",
            ),
            (dict(seed=2**64), "seed = "),
            (dict(seed=-1), "seed = -1"),
            (dict(batch_size=None), "batch_size = None"),
            (dict(batch_size=0), "batch_size = 0: expected a whole number at least 1"),
            (dict(betas=0.9), "betas = 0.9: expected two numbers"),
            (dict(betas=(0.9, 1.0)), "betas = 1.0: expected .* below 1"),
        ],
    )
    def test_wrong_arguments(self, change, message):
        with pytest.raises(ValueError, match=message):
            train(tiny(), examples(), **(common | dict(steps=2) | change))

    @pytest.mark.parametrize("tokenizer", ["lanternwick", 3])
    def test_what_is_no_tokenizer(self, tokenizer):
        with pytest.raises(ValueError, match="expected load_tokenizer"):
            train(tiny(), examples(), **(common | dict(steps=2, tokenizer=tokenizer)))

    def test_a_folder_without_a_name(self):
        with pytest.raises(FileError, match="found an empty name"):
            train(tiny(), examples(), **common, steps=2, folder="")

    @pytest.mark.parametrize(
        "change",
        [
            dict(clip=float("inf")),
            dict(warmup=1.0),
            dict(warmup=0.5),
            dict(warmup=9),
            dict(seed=2**64 - 1),
            dict(seed=2**63),
            dict(betas=[0.9, 0.0]),
            dict(lr=0.0),
        ],
    )
    def test_extreme_arguments(self, change):
        assert train(tiny(), examples(), **common | dict(steps=2) | change).steps == 2

    @pytest.mark.parametrize("clip", [None, float("inf")])
    def test_without_clipping(self, clip):
        models = tiny(), tiny()
        for model, most in zip(models, (clip, 1e30)):
            train(model, examples(), **common | dict(steps=2, clip=most))
        assert equal(*models)

    def test_an_optimizer_of_another_model(self):
        other = torch.optim.SGD(tiny().parameters(), lr=0.1)
        with pytest.raises(ValueError, match="holds no parameter of this model"):
            train(tiny(), examples(), steps=2, optimizer=other, **common)

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(lr=1e-3), "lr = 0.001: the optimizer .*brings its own, 0.1"),
            (dict(weight_decay=0.5), "weight_decay = 0.5: the optimizer .*, 0.01"),
            (dict(betas=(0.9, 0.99)), "betas = .0.9, 0.99.: .*its own, .0.9, 0.999."),
            (dict(lr=0.1, betas=(0.8, 0.9)), "betas = .0.8, 0.9."),
        ],
    )
    def test_what_a_ready_optimizer_would_drop(self, change, message):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        options = common | dict(lr=None, steps=2, optimizer=optimizer) | change
        with pytest.raises(ValueError, match=message):
            train(model, examples(), **options)

    @pytest.mark.parametrize(
        "change", [dict(lr=0.1), dict(lr=0.2), dict(betas=[0.9, 0.99]), dict(lr=None)]
    )
    def test_what_a_ready_optimizer_has(self, change):
        model = tiny()
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": 0.2}, {"params": rest}]
        optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99))
        options = common | dict(lr=None, steps=2, optimizer=optimizer) | change
        for _ in range(2):  # at the end the schedule has changed the rates
            assert train(model, examples(), **options).steps == 2

    @pytest.mark.parametrize(
        "methods, folder, missing",
        [
            ([], False, "step"),
            (["state_dict"], False, "step"),
            (["step"], True, "state_dict"),
            (["step", "state_dict"], True, "load_state_dict"),
        ],
    )
    def test_an_after_step_that_lacks_a_method(
        self, tmp_path, methods, folder, missing
    ):
        after_step = SimpleNamespace(**dict.fromkeys(methods, dict))
        options = common | dict(steps=2, folder=tmp_path / "new" if folder else None)
        with pytest.raises(ValueError, match=rf"after_step has no {missing}\(\)"):
            train(tiny(), examples(), after_step=after_step, **options)
        assert not list(tmp_path.iterdir())

    def test_an_after_step_without_a_state_needs_no_folder(self):
        after_step = SimpleNamespace(step=lambda: None)
        options = common | dict(steps=2, after_step=after_step)
        assert train(tiny(), examples(), **options).steps == 2

    @pytest.mark.parametrize("accumulate", [1, 3])
    @pytest.mark.parametrize("bare", [(0,), (1, 2), (0, 1, 2)])
    def test_steps_without_labels(self, bare, accumulate):
        """Only those warn: a batch without labels beside others is no fault."""
        batches = Batches(examples(), Letters(), 4)

        def batch(i):
            rows, none = batches.batch(i), i // accumulate in bare
            none = none or i % accumulate  # of three, the first may have labels
            blank = torch.full_like(rows["labels"], -100)
            return rows | {"labels": blank} if none else rows

        data, model = SimpleNamespace(batch=batch), tiny()
        options = common | dict(steps=3, accumulate=accumulate)
        with pytest.warns(UserWarning, match="no label to learn") as seen:
            losses = train(model, data, **options).losses
        assert [i for i in range(3) if losses[i] == 0] == list(bare) and len(
            seen
        ) == len(bare)

    def test_nothing_to_train(self):
        with pytest.raises(ValueError, match="nothing to train"):
            train(tiny().requires_grad_(False), examples(), steps=2, **common)

    def test_works_on_hugging_face_models(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        history = train(
            transformers.LlamaForCausalLM(config), examples(), steps=10, **common
        )
        assert history.losses[-1] < history.losses[0]

    def test_history_defaults(self):
        assert History().tokens_per_second == 0 and repr(History()).startswith(
            "History(0 steps"
        )


class TestDivergence:
    """What is not finite never enters the weights that are kept."""

    @pytest.mark.parametrize("clip", [None, 1.0])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_gradient_beside_a_finite_loss(self, tmp_path, bad, clip):
        options = dict(common, clip=clip, steps=5, save_every=1, folder=tmp_path)
        model = trapped(bad)
        history = train(model, examples(), **options)
        assert history.stopped == "diverged" and history.steps == 2
        assert all(p.isfinite().all() for p in model.parameters())
        kept = tiny()
        load_checkpoint(tmp_path / "latest.safetensors", kept)
        assert all(map(torch.equal, model.parameters(), kept.parameters()))
        # mended, it goes on
        assert train(trapped(1.0), examples(), **options).steps == 5

    def test_weights_that_a_step_made_infinite_are_not_saved(self, tmp_path):
        class Blast(torch.optim.SGD):
            def step(self):
                super().step()
                if len(self.losses) == 2:
                    self.param_groups[0]["params"][0].data.fill_(float("inf"))
                self.losses.append(1)

        model = tiny()
        optimizer = Blast(model.parameters(), lr=1e-3)
        optimizer.losses = []
        options = dict(common, lr=None, optimizer=optimizer, steps=5, save_every=1)
        history = train(model, examples(), folder=tmp_path, **options)
        assert history.stopped == "diverged"
        kept = tiny()
        load_checkpoint(tmp_path / "latest.safetensors", kept)
        assert all(p.isfinite().all() for p in kept.parameters())

    @pytest.mark.parametrize(
        "options, at",
        [
            (dict(accumulate=2), 6),  # the second batch of the third step
            (dict(accumulate=3), 7),  # the first of three
            (dict(bf16=True), 3),
            (dict(optimizer="adamw8bit"), 3),
            (dict(evaluate_every=1, valid=examples(3)), 3),
        ],
        ids=str,
    )
    def test_wherever_it_comes_from(self, tmp_path, options, at):
        options = dict(common, steps=5, save_every=1, folder=tmp_path) | options
        history = train(trapped(float("nan"), at=at), examples(), **options)
        assert history.stopped == "diverged" and history.steps == 2
        for name in {"latest", "best"} & {p.stem for p in tmp_path.iterdir()}:
            kept = tiny()
            load_checkpoint(tmp_path / f"{name}.safetensors", kept)
            assert all(p.isfinite().all() for p in kept.parameters())
        straight = tmp_path / "straight"
        whole, mended = trapped(1.0), trapped(1.0)
        train(whole, examples(), **options | dict(folder=straight))
        assert train(mended, examples(), **options).steps == 5
        assert equal(whole, mended)  # nothing of it is left

    def test_the_first_step(self, tmp_path):
        options = dict(common, steps=5, save_every=1, folder=tmp_path)
        assert train(trapped(float("nan"), at=1), examples(), **options).steps == 0
        assert not (tmp_path / "latest.safetensors").exists()


def adapted(base=None, **changes):
    from minipeft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    fields = dict(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base or tiny(), LoraConfig(**fields | changes))


class TestSettings:
    """Everything that decides the result is a setting; another value is refused."""

    @pytest.fixture
    def folder(self, tmp_path):
        train(adapted(), examples(), steps=4, folder=tmp_path, **common)
        return tmp_path

    def resumed(self, folder, model=None, data=None, **changes):
        options = dict(common, steps=4, folder=folder) | changes
        return train(model or adapted(), data or examples(), **options)

    def test_what_runs_after_a_step(self, tmp_path):
        class Halver:
            def __init__(self, model):
                self.weight = next(p for p in model.parameters() if p.requires_grad)

            def step(self):
                self.weight.data.mul_(0.5)

            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        class Other(Halver):
            pass

        def run(make, **changes):
            model = adapted()
            after_step = make and make(model)
            return self.resumed(tmp_path, model, after_step=after_step, **changes)

        run(Halver)
        assert run(Halver).steps == 4
        for make, now in ((None, "None"), (Other, "Other")):
            with pytest.raises(ValueError, match=f"after_step Halver .now {now}"):
                run(make)
        run(None, resume=False)
        with pytest.raises(ValueError, match="after_step None .now Halver"):
            run(Halver)

    def test_the_same_goes_on(self, folder):
        assert self.resumed(folder).steps == 4

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(lora_alpha=99), "adapter default, lora_alpha 16 .now 99."),
            (dict(lora_dropout=0.5), "lora_dropout 0.0 .now 0.5."),
            (dict(use_rslora=True), "use_rslora False .now True."),
            (dict(init_lora_weights="gaussian"), "init_lora_weights True"),
            (dict(alpha_pattern={"q_proj": 2}), "alpha_pattern"),
            (dict(target_modules=["q_proj"]), "target_modules"),
        ],
    )
    def test_another_adapter(self, folder, change, message):
        with pytest.raises(ValueError, match=f"other settings: .*{message}"):
            self.resumed(folder, adapted(**change))

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(norm_eps=0.1), "model, norm_eps|model, rms_norm_eps"),
            (dict(rope_theta=500.0), "model, rope_"),
            (dict(hidden_act="gelu"), "model, hidden_act silu .now gelu"),
        ],
    )
    def test_another_configuration_of_the_base(self, folder, change, message):
        """The weights are the same; what they compute is not."""
        with pytest.raises(ValueError, match=f"other settings: .*({message})"):
            self.resumed(folder, adapted(tiny(**change)))

    def test_another_base(self, folder):
        for change in (lambda p: p.mul_(2), lambda p: p[0, 0].add_(1e-3)):
            base = tiny()
            with torch.no_grad():
                change(base.model.layers[1].mlp.up_proj.weight)
            with pytest.raises(ValueError, match="model .checksum."):
                self.resumed(folder, adapted(base))
        with pytest.raises(ValueError, match="model .checksum."):
            self.resumed(folder, adapted(tiny().bfloat16()))

    def test_other_data(self, folder):
        rows = examples()
        for other in (
            rows[:-1],
            [*rows[:-1], rows[0]],
            [
                *rows[:5],
                SimpleNamespace(prompt=rows[5].prompt, completion=" x", meta={}),
                *rows[6:],
            ],
        ):
            with pytest.raises(ValueError, match="data .checksum."):
                self.resumed(folder, data=other)

    def test_data_that_are_only_batches(self, tmp_path):
        class Rows:
            def __init__(self, odd):
                self.odd = odd

            def batch(self, step):
                ids = torch.full((2, 6), 5)
                ids[0, 0] = self.odd if step == 3 else 5  # only in the last batch
                return {"input_ids": ids, "labels": ids}

        self.resumed(tmp_path, data=Rows(7))
        with pytest.raises(ValueError, match="data .checksum."):
            self.resumed(tmp_path, data=Rows(8))

    def test_another_tokenizer(self, tmp_path):
        from minipeft.lm.tokenizer import train_tokenizer

        one = train_tokenizer(["a b c d"] * 5, 400)
        two = train_tokenizer(["b a d c x"] * 5, 400)
        rows = [SimpleNamespace(prompt="a", completion=" b", meta={})] * 8
        model = adapted(tiny(vocab_size=500))
        self.resumed(tmp_path, model, rows, tokenizer=one)
        with pytest.raises(ValueError, match="tokenizer .checksum."):
            self.resumed(tmp_path, model, rows, tokenizer=two)

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(betas=(0.9, 0.95)), "betas"),
            (dict(lr=2e-3), r"groups: initial_lr 0.0\d+ .now 0.002."),
            (dict(weight_decay=0.1), "weight_decay"),
            (dict(seed=7), "seed 0 .now 7."),
            (dict(optimizer="adamw8bit"), "optimizer AdamW .now AdamW8bit."),
        ],
    )
    def test_other_settings_of_the_run(self, folder, change, message):
        with pytest.raises(ValueError, match=f"other settings: .*{message}"):
            self.resumed(folder, **change)

    def test_resume_false_starts_again(self, folder):
        model = adapted(lora_alpha=99)
        assert self.resumed(folder, model, resume=False).steps == 4
        assert self.resumed(folder, adapted(lora_alpha=99)).steps == 4


def save_often(what, folder, value):
    """What one of two processes does."""
    model = adapted() if what != "model" else tiny()
    for p in model.parameters():
        p.data.fill_(value)
    for _ in range(30):
        if what == "checkpoint":
            save_checkpoint(os.path.join(folder, "latest.safetensors"), model)
        else:
            model.save_pretrained(folder)


class TestFolder:
    def test_a_second_writer_is_refused(self, tmp_path):
        from minipeft.errors import FileError

        def log(step, facts):
            with pytest.raises(FileError, match="is in use"):
                train(tiny(), examples(), steps=2, folder=tmp_path, **common)

        train(tiny(), examples(), steps=2, folder=tmp_path, log=log, **common)

    @pytest.mark.parametrize("how", ["link", "dots", "relative", "new"])
    def test_the_same_folder_by_another_name(self, tmp_path, monkeypatch, how):
        from minipeft.errors import FileError

        folder = tmp_path / "run"
        if how != "new":
            folder.mkdir()
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(tmp_path)
        other = {"link": tmp_path / "link", "dots": folder / ".." / "run"}
        other = other.get(how, "run")

        def log(step, facts):
            with pytest.raises(FileError, match="is in use"):
                train(tiny(), examples(), steps=2, folder=other, **common)

        train(tiny(), examples(), steps=2, folder=folder, log=log, **common)
        assert train(tiny(), examples(), steps=2, folder=other, **common).steps == 2

    @pytest.mark.parametrize("what", ["checkpoint", "adapter", "model"])
    def test_processes_that_save_to_one_place(self, tmp_path, what):
        """Each file is one writer's, whole, and nobody fails."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[3]); import test_training;"
            "test_training.save_often(sys.argv[1], sys.argv[2], float(sys.argv[4]))"
        )
        here = os.path.dirname(__file__)
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", code, what, str(tmp_path), here, str(value)],
                stderr=subprocess.PIPE,
            )
            for value in (1.0, 2.0)
        ]
        for writer in writers:
            assert writer.wait() == 0, writer.stderr.read().decode()
        for file in tmp_path.glob("*.safetensors"):
            from safetensors.torch import load_file

            tensors = load_file(file)
            values = {float(t.mean()) for k, t in tensors.items() if "rng" not in k}
            assert values in ({1.0}, {2.0})
        assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))

    @pytest.mark.parametrize(
        "damage", ["empty", "cut", "junk", "no metadata", "folder"]
    )
    def test_a_damaged_checkpoint(self, tmp_path, damage):
        from safetensors.torch import load_file, save_file

        from minipeft.errors import FileError

        options = dict(common, steps=2, folder=tmp_path)
        train(tiny(), examples(), **options)
        latest = tmp_path / "latest.safetensors"
        content = latest.read_bytes()
        if damage == "no metadata":
            save_file(load_file(latest), latest)
        elif damage == "folder":
            latest.unlink()
            latest.mkdir()
        else:
            damaged = {"empty": b"", "cut": content[:-9], "junk": b"junk" * 99}[damage]
            latest.write_bytes(damaged)
        model = tiny()
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(FileError, match="latest.safetensors"):
            train(model, examples(), **options)
        assert all(map(torch.equal, model.parameters(), before))

    def test_where_nothing_can_be_written(self):
        from minipeft.errors import FileError

        steps = []
        with pytest.raises(FileError, match="cannot write into /proc"):
            train(
                tiny(),
                examples(),
                steps=2,
                folder="/proc/minipeft",
                log=lambda *step: steps.append(step),
                **common,
            )
        assert not steps


class TestFoundBeforeTraining:
    @pytest.mark.parametrize(
        "data, message",
        [
            ([{"prompt": "a", "completion": " b"}], "found .'prompt'.*an Example"),
            ([("a", " b")], "found .'a', ' b'.: expected an Example"),
            (["a", "b"], "found 'a': expected an Example"),
            ([SimpleNamespace(prompt="a", completion=3)], "completion=3.*an Example"),
            ([SimpleNamespace(prompt=3, completion="a")], "prompt=3.*an Example"),
            ([*examples(5), None], "found None: expected an Example"),
            ("sql", "'sql' .* expected a list of Examples"),
            (7, "7 .* expected a list of Examples"),
        ],
    )
    def test_data_that_are_no_examples(self, data, message):
        from minipeft.lm.data import DataError
        from minipeft.lm.evaluation import completion_loss, evaluate

        with pytest.raises(DataError, match=message):
            train(tiny(), data, steps=2, **common)
        with pytest.raises(DataError, match=message):
            train(tiny(), examples(), steps=2, valid=data, evaluate_every=1, **common)
        for judge in (completion_loss, evaluate):
            with pytest.raises(DataError, match=message):
                judge(tiny(), Letters(), data)

    @pytest.mark.parametrize("prompt, completion", [(None, "a"), ("", "a"), ("b", "")])
    def test_examples_with_little_in_them(self, prompt, completion):
        row = SimpleNamespace(prompt=prompt, completion=completion, meta=None)
        assert train(tiny(), [row] * 4, steps=2, **common).steps == 2

    @pytest.mark.parametrize("n", [1, 3, 5])
    def test_a_task_as_valid_is_its_valid_examples(self, n):
        from minipeft.lanternwick.tasks import Task

        rows = examples()
        task = Task("t", "t", rows, rows[:n], rows, "exact", 0.0, None)
        options = dict(steps=2, evaluate_every=1) | common
        a, b = (train(tiny(), rows, valid=v, **options) for v in (task, rows[:n]))
        assert a.eval_loss == b.eval_loss and len(a.eval_loss) == 2

    @pytest.mark.parametrize("prompt", ["p" * 99, "p" * 40, "p" * 31])
    def test_advice_that_train_can_take(self, prompt):
        from minipeft.lm.data import DataError

        rows = [SimpleNamespace(prompt=prompt, completion=" c", meta={})] * 4
        with pytest.raises(DataError, match=r"or make Batches\(.*, truncate=True\)"):
            train(tiny(), rows, steps=2, **common)
        rows = Batches(rows, Letters(), 4, max_length=32, truncate=True)
        assert train(tiny(), rows, steps=2, **common).steps == 2

    def test_a_test_example_that_is_too_long(self):
        from minipeft.lanternwick.tasks import Example, Task
        from minipeft.lm.data import DataError

        rows = examples()
        long = Example("p" * 99, " c", {"file": "my.jsonl", "line": 7})
        for valid, test in (([long], rows), (rows, [*rows, long])):
            task = Task("t", "t", rows, valid, test, "exact", 0.0, None)
            with pytest.raises(DataError, match="my.jsonl, line 7: .*Shorten") as error:
                train(tiny(), task, steps=2, **common)
            assert "truncate" not in str(error.value)

    def test_ids_beyond_the_vocabulary(self):
        with pytest.raises(ValueError, match="vocabulary has 20 tokens"):
            train(tiny(vocab_size=20), examples(), steps=2, **common)
