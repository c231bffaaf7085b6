"""AdaLoRA: its penalty, its importance and its budget against PEFT, step by step; what
becomes of pruned ranks."""

import json

import peft
import pytest
import torch
from bases import BASES, METHODS, close, differ, inputs, rounding, run, shake
from safetensors.torch import load_file
from tolerance import assert_within, chance, tolerance

import minipeft
from minipeft import AdaLoraConfig, ConfigError, PeftModel, TargetError, get_peft_model
from minipeft.lm import train
from minipeft.lm.checkpoint import load_checkpoint, save_checkpoint
from minipeft.methods.adalora import AdaLora
from minipeft.methods.rank_allocator import RankAllocator

HF, LLAMA, METHOD = BASES["hf_llama"], BASES["llama"], METHODS["adalora"]
FIELDS = dict(
    init_r=4,
    target_r=2,
    tinit=2,
    tfinal=3,
    deltaT=2,
    total_step=14,
    lora_alpha=8,
    orth_reg_weight=0.3,
    # else PEFT has no penalty
    target_modules=["q_proj", "v_proj", "down_proj"],
    task_type="CAUSAL_LM",
)


def both(folder):
    """The same random adapter, ours and PEFT's, to train."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(HF.make(), peft.AdaLoraConfig(**FIELDS))
    theirs.save_pretrained(str(folder))
    ours = PeftModel.from_pretrained(HF.make().train(), folder, is_trainable=True)
    return ours.train(), theirs.train()


def loss(model):
    return model(**inputs(), labels=inputs()["input_ids"]).loss


def trained(ours, theirs, steps=14):
    allocator, optimizers = RankAllocator(ours), []
    for model in (ours, theirs):
        optimizers.append(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        )
    for step in range(1, steps + 1):
        losses = [loss(model) for model in (ours, theirs)]
        close(losses[0].detach(), losses[1].detach())
        for each, optimizer in zip(losses, optimizers):
            each.backward()
            optimizer.step()
        allocator.step()
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        yield step, allocator


class TestRegularization:
    def test_it_is_the_mean_over_all_matrices_and_only_in_training(self, tmp_path):
        ours, theirs = both(tmp_path)
        shake(ours)
        ours.save_pretrained(tmp_path)
        theirs = peft.PeftModel.from_pretrained(
            HF.make(), str(tmp_path), is_trainable=True
        ).train()
        close(loss(ours).detach(), loss(theirs).detach())
        plain = loss(ours.eval()).detach()  # PEFT has it in evaluation too
        parts = [part for part in ours.modules() if isinstance(part, AdaLora)]
        norms = [
            torch.linalg.norm(gram - torch.eye(4))
            for part in parts
            for gram in (part.lora_A @ part.lora_A.T, part.lora_B.T @ part.lora_B)
        ]
        penalty = 0.3 * sum(norms).detach() / len(norms)
        close(loss(ours.train()).detach(), plain + penalty)
        with ours.disable_adapter():
            close(loss(ours).detach(), loss(HF.make()).detach())

    @pytest.mark.parametrize(
        "copied", [["lm_head"], ["norm"], ["embed_tokens", "norm"], ["o_proj"]]
    )
    def test_beside_modules_to_save(self, copied, tmp_path):
        config = peft.AdaLoraConfig(**FIELDS, modules_to_save=copied)
        theirs = peft.get_peft_model(HF.make(), config).train()
        theirs.save_pretrained(str(tmp_path))
        ours = PeftModel.from_pretrained(HF.make().train(), tmp_path, is_trainable=True)
        for _ in range(3):
            losses = [loss(model) for model in (ours, theirs)]
            close(losses[0].detach(), losses[1].detach())
            for model, each in zip((ours, theirs), losses):
                each.backward()
                trained = [p for p in model.parameters() if p.requires_grad]
                torch.optim.SGD(trained, lr=0.5).step()
                model.zero_grad()
        close(run(ours.eval()), run(theirs.eval()))

    def test_it_is_zero_for_orthonormal_factors(self):
        model = get_peft_model(LLAMA.make(), METHOD.ours(LLAMA))
        for part in model.modules():
            if isinstance(part, AdaLora):
                torch.nn.init.orthogonal_(part.lora_A)
                torch.nn.init.orthogonal_(part.lora_B)
                r, d = len(part.lora_E), max(part.lora_A.shape[1], len(part.lora_B))
                # two norms of r x r entries; QR, then a sum of d products
                rounded = tolerance(torch.float32, 2 * r, terms=d, steps=2)
                assert part.regularization_loss() < rounded


class TestFilesAndConfig:
    def test_pruned_ranks_can_be_dropped_from_memory(self, tmp_path):
        ours, theirs = both(tmp_path)
        for _ in trained(ours, theirs):
            pass
        expected, before = run(ours.eval()), ours.get_nb_trainable_parameters()[0]
        kept = [
            (part, part.kept) for part in ours.modules() if isinstance(part, AdaLora)
        ]
        assert sum(sum(rows) for _, rows in kept) == 2 * 6  # target_r on average, of 4
        for part, _ in kept:
            part.drop_pruned()
        left = sum(
            (part.lora_A.shape[1] + part.lora_B.shape[0] + 1) * sum(rows)
            for part, rows in kept
        )
        assert ours.get_nb_trainable_parameters()[0] == left < before
        close(run(ours), expected)
        ours.save_pretrained(tmp_path / "small")
        close(
            run(peft.PeftModel.from_pretrained(HF.make(), str(tmp_path / "small"))),
            expected,
        )
        again = PeftModel.from_pretrained(
            HF.make(), tmp_path / "small", is_trainable=True
        ).train()
        allocator = RankAllocator(again)  # and what is left can be pruned further
        loss(again).backward()
        allocator.step()
        allocator.allocate(6)
        again.save_pretrained(tmp_path / "smaller")
        close(
            run(peft.PeftModel.from_pretrained(HF.make(), str(tmp_path / "smaller"))),
            run(again.eval()),
        )
        assert (
            sum(
                len(t)
                for k, t in load_file(
                    tmp_path / "smaller/adapter_model.safetensors"
                ).items()
                if "_E" in k
            )
            == 6
        )
        close(
            run(again.merge_and_unload()),
            run(peft.PeftModel.from_pretrained(HF.make(), str(tmp_path / "smaller"))),
        )

    @pytest.mark.parametrize(
        "fields, message",
        [
            (
                dict(init_r=4, target_r=8, total_step=9),
                "target_r = 8 is above init_r = 4",
            ),
            (
                dict(tinit=5, tfinal=4, total_step=9),
                r"tinit \+ tfinal = 5 \+ 4 leaves none of the total_step = 9",
            ),
            (dict(tinit=-1, total_step=9), "tinit = -1: expected a number at least 0"),
            (dict(), "total_step = None"),
            (dict(total_step=0), "total_step = 0"),
            (dict(total_step=9, init_r=0), "init_r = 0"),
            (dict(total_step=9, target_r=2.5), "target_r = 2.5"),
            (dict(total_step=9, deltaT=0), "deltaT = 0"),
            (dict(total_step=9, beta1=1.0), "beta1 = 1.0"),
            (dict(total_step=9, beta2=0), "beta2 = 0"),
            (dict(total_step=9, orth_reg_weight=-1), "orth_reg_weight = -1"),
            (dict(total_step=9, use_dora=True), "no use_dora"),
            (dict(total_step=9, use_rslora=True), "no use_rslora"),
            (dict(total_step=9, init_lora_weights="gaussian"), "one of True, False"),
            (dict(total_step=9, lora_dropout=1), "lora_dropout = 1"),
        ],
    )
    def test_configurations_that_mean_nothing(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            AdaLoraConfig(**fields)

    def test_wrong_places(self):
        with pytest.raises(TargetError, match="embed_tokens: .*not for embeddings"):
            get_peft_model(
                LLAMA.make(),
                AdaLoraConfig(total_step=9, target_modules=["embed_tokens"]),
            )
        with pytest.raises(
            ConfigError, match="'default' is not an AdaLoRA: LoraConfig"
        ):
            RankAllocator(get_peft_model(LLAMA.make(), minipeft.LoraConfig()))

    def test_the_same_seed_gives_the_same_adapter(self, tmp_path):
        for package, config in ((minipeft, AdaLoraConfig), (peft, peft.AdaLoraConfig)):
            torch.manual_seed(4)
            model = package.get_peft_model(HF.make(), config(**FIELDS))
            model.save_pretrained(str(tmp_path / package.__name__))
        own, other = (
            load_file(tmp_path / who / "adapter_model.safetensors")
            for who in ("minipeft", "peft")
        )
        assert {key: t.shape for key, t in own.items()} == {
            key: t.shape for key, t in other.items()
        }
        for tensors in (own, other):  # drawn in another order, by the same law
            drawn = torch.cat(
                [t.flatten() for key, t in tensors.items() if "lora_E" not in key]
            )
            # a square of mean 1 has a spread of sqrt(2), a root halves it
            close(drawn.std() / 0.02, torch.tensor(1.0), chance(0.5**0.5, len(drawn)))
            assert all((t == 0).all() for key, t in tensors.items() if "lora_E" in key)

    def test_rank_pattern_before_allocation_is_not_in_the_file(self, tmp_path):
        model = shake(get_peft_model(LLAMA.make(), METHOD.ours(LLAMA)))
        model.save_pretrained(tmp_path)
        assert "rank_pattern" not in json.loads(
            (tmp_path / "adapter_config.json").read_text()
        )
        differ(run(model), run(LLAMA.make()))


class TestAllocator:
    def test_it_does_what_pefts_does(self, tmp_path):
        ours, theirs = both(tmp_path)
        seen = set()
        for step, allocator in trained(ours, theirs):
            own, other = (
                ours.peft_config["default"].rank_pattern,
                theirs.peft_config["default"].rank_pattern,
            )
            assert (own is None) == (other is None)
            if own:
                assert own == {
                    key.removeprefix("model.").replace(".default", ""): kept
                    for key, kept in other.items()
                } or own == {
                    key.replace(".default", ""): kept for key, kept in other.items()
                }
                budget = sum(map(sum, own.values()))
                assert budget == allocator.budget(
                    min(step // 2 * 2, 11) if step < 11 else 11
                )
                seen.add(budget)
            close(run(ours.eval()), run(theirs.eval()), rounding(2 * step + 1))
            ours.train(), theirs.train()
        assert len(seen) > 2 and min(seen) == 2 * 6 and max(seen) < 4 * 6
        ranks = [
            sum(kept) for kept in ours.peft_config["default"].rank_pattern.values()
        ]
        assert len(set(ranks)) > 1  # and it did decide something

        ours.save_pretrained(tmp_path / "ours")  # only what is kept is in the file
        theirs.save_pretrained(str(tmp_path / "theirs"))
        own, other = (
            load_file(tmp_path / who / "adapter_model.safetensors")
            for who in ("ours", "theirs")
        )
        assert own.keys() == other.keys() and sorted(ranks) == sorted(
            len(t) for k, t in own.items() if "lora_E" in k
        )
        for key in own:
            close(own[key], other[key], rounding(2 * step))
        said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
        assert said["rank_pattern"] == ours.peft_config["default"].rank_pattern
        expected = run(ours.eval())
        for again in (
            PeftModel.from_pretrained(HF.make(), tmp_path / "ours"),
            PeftModel.from_pretrained(HF.make(), tmp_path / "theirs"),
            peft.PeftModel.from_pretrained(HF.make(), str(tmp_path / "ours")),
        ):
            close(run(again), expected, rounding(2 * step + 1))

    def test_a_pruned_rank_can_come_back_until_the_end(self):
        model = get_peft_model(
            LLAMA.make(),
            AdaLoraConfig(
                init_r=3, target_r=1, total_step=30, target_modules=["q_proj"]
            ),
        )
        allocator, part = (
            RankAllocator(model),
            next(m for m in model.modules() if isinstance(m, AdaLora)),
        )
        for parameter in part.parameters():
            allocator.sensitivity[parameter].fill_(1)
        for best in (0, 2):
            allocator.uncertainty[part.lora_E].zero_()[best] = 1
            with torch.no_grad():
                part.lora_E.fill_(1.0)
            allocator.allocate(4)  # of 6 in both layers
            assert part.lora_E[best] == 1

    def test_the_budget(self):
        config = AdaLoraConfig(
            init_r=8,
            target_r=2,
            tinit=10,
            tfinal=20,
            total_step=110,
            target_modules=["q_proj"],
        )
        allocator = RankAllocator(get_peft_model(LLAMA.make(), config))
        expected = [
            16 if t <= 10 else 4 if t >= 90 else int(4 + 12 * (1 - (t - 10) / 80) ** 3)
            for t in range(111)
        ]
        assert [allocator.budget(step) for step in range(111)] == expected
        same = RankAllocator(
            get_peft_model(
                LLAMA.make(), AdaLoraConfig(init_r=2, target_r=2, total_step=3)
            )
        )
        same.steps = 1
        same.step()  # nothing to prune is no error
        assert all(all(kept) for kept in same.config.rank_pattern.values())

    def test_a_matrix_may_lose_all_its_triplets(self, tmp_path):
        config = AdaLoraConfig(
            init_r=2, target_r=1, total_step=9, target_modules=["q_proj"]
        )
        model = shake(get_peft_model(HF.make(), config))
        allocator = RankAllocator(model)
        for layer, part in enumerate(allocator.adapters.values()):
            for parameter in part.parameters():
                allocator.sensitivity[parameter].fill_(layer + 1)
                allocator.uncertainty[parameter].uniform_(1, 1.1)
        allocator.allocate(2)
        expected = run(model)
        assert [sum(part.kept) for part in allocator.adapters.values()] == [0, 2]
        for part in allocator.adapters.values():
            part.drop_pruned()
        close(run(model), expected)
        model.save_pretrained(tmp_path)
        close(run(PeftModel.from_pretrained(HF.make(), tmp_path)), expected)
        close(run(peft.PeftModel.from_pretrained(HF.make(), str(tmp_path))), expected)
        close(run(model.merge_and_unload()), expected)


class Rows:
    """Batches of random ids; of `size` rows, the same rows whatever the size."""

    def __init__(self, size):
        self.size = size
        self.ids = torch.randint(3, 40, (96, 6), generator=torch.Generator())

    def batch(self, step):
        ids = self.ids[step * self.size : (step + 1) * self.size]
        return {"input_ids": ids, "labels": ids}


class TestInTheTrainingLoop:
    """lm.train(after_step=RankAllocator(model))"""

    def new(self):
        torch.manual_seed(0)
        fields = {k: v for k, v in FIELDS.items() if k != "task_type"}
        model = get_peft_model(LLAMA.make(), AdaLoraConfig(**fields))
        return model, RankAllocator(model)

    def train(self, model, allocator, rows, **options):
        options = dict(steps=14, lr=0.5, optimizer="sgd", progress=False) | options
        return train(model, rows, after_step=allocator, **options)

    def test_the_budget_is_reached(self):
        model, allocator = self.new()
        self.train(model, allocator, Rows(4))
        ranks = [
            sum(kept) for kept in model.peft_config["default"].rank_pattern.values()
        ]
        assert sum(ranks) == 2 * 6 and len(set(ranks)) > 1

    @pytest.mark.parametrize("parts", [2, 3, 4])
    def test_accumulated_batches_are_one_large_batch(self, parts):
        """Gradients are sums in another order: of at most 72 tokens, through two
        layers and 14 steps; penalty and sensitivity are counted once a step."""
        (one, its), (other, others) = self.new(), self.new()
        self.train(one, its, Rows(12 // parts), accumulate=parts, steps=8)
        self.train(other, others, Rows(12), steps=8)
        assert its.config.rank_pattern == others.config.rank_pattern
        for path, adapter in its.adapters.items():
            for name, p in adapter.named_parameters():
                twin = others.adapters[path].get_parameter(name)
                assert_within(p, twin, terms=72, steps=9 * 2 * 8)
                sensitivity = its.sensitivity[p], others.sensitivity[twin]
                assert_within(*sensitivity, terms=72, steps=9 * 2 * 8)

    @pytest.mark.parametrize("stop", [1, 4, 7, 12])
    def test_a_stopped_run_goes_on_to_the_same_bits(self, tmp_path, stop):
        def cut(step, facts):
            if step == stop:
                raise MemoryError("a power cut")

        (whole, _), (parts, allocator) = self.new(), self.new()
        self.train(whole, _, Rows(4))
        options = dict(folder=tmp_path, save_every=1)
        with pytest.raises(MemoryError):
            self.train(parts, allocator, Rows(4), log=cut, **options)
        again, allocator = self.new()
        self.train(again, allocator, Rows(4), **options)
        assert allocator.steps == 14
        ours, theirs = (m.peft_config["default"].rank_pattern for m in (again, whole))
        assert ours == theirs
        for p, q in zip(again.parameters(), whole.parameters(), strict=True):
            assert torch.equal(p, q)

    @pytest.mark.parametrize("stop", [1, 5])
    @pytest.mark.parametrize("before, now", [(True, False), (False, True)])
    def test_a_run_goes_on_as_it_began(self, tmp_path, stop, before, now):
        """With an allocator, or without one."""

        def cut(step, facts):
            if step == stop:
                raise MemoryError("a power cut")

        options = dict(folder=tmp_path, save_every=1)
        model, allocator = self.new()
        allocator = allocator if before else None
        with pytest.raises(MemoryError):
            self.train(model, allocator, Rows(4), log=cut, **options)
        model, allocator = self.new()
        names = "RankAllocator .now None" if before else "None .now RankAllocator"
        with pytest.raises(ValueError, match=f"other settings: after_step {names}"):
            self.train(model, allocator if now else None, Rows(4), **options)

    @pytest.mark.parametrize("steps", [0, 3, 14])
    def test_its_state_is_not_left_in_the_file(self, tmp_path, steps):
        model, allocator = self.new()
        if steps:
            self.train(model, allocator, Rows(4), steps=steps)
        file = tmp_path / "best.safetensors"
        save_checkpoint(file, model, after_step=allocator)
        other, its = self.new()
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ValueError, match="the state of an after_step.*: pass the"):
            load_checkpoint(file, other)
        assert all(map(torch.equal, before, other.parameters()))
        load_checkpoint(file, other, after_step=its)
        assert its.steps == steps
        assert all(map(torch.equal, model.parameters(), other.parameters()))

    def test_the_state_of_another_allocator_is_refused(self):
        _, allocator = self.new()
        fields = dict(init_r=4, target_r=2, total_step=14)
        for more in ({"target_modules": ["q_proj"]}, {"init_r": 3}):
            config = AdaLoraConfig(**{**fields, "target_modules": ["up_proj"], **more})
            other = RankAllocator(get_peft_model(LLAMA.make(), config))
            with pytest.raises(ValueError, match="not the state of an allocator"):
                allocator.load_state_dict(other.state_dict())
        allocator.load_state_dict(allocator.state_dict())
