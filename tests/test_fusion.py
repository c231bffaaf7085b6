"""AdapterFusion against its equations written out, over experts of two kinds."""

import copy

import pytest
import torch
from bases import BASES, close, differ, inputs, rounding, run, shake
from safetensors.torch import load_file

import minipeft
from minipeft import (
    BottleneckConfig,
    ConfigError,
    FusionConfig,
    LoraConfig,
    PeftModel,
    TargetError,
    get_peft_model,
)
from minipeft.methods.fusion import Fusion, attention

EXPERTS = {
    "pfeiffer": lambda: BottleneckConfig(r=3),
    "parallel": lambda: BottleneckConfig(r=3, placement="parallel"),
    "houlsby": lambda: BottleneckConfig(r=3, placement="houlsby"),
    "lora": lambda: LoraConfig(r=3, target_modules=["v_proj", "down_proj"]),
}
cases = pytest.mark.parametrize(
    "name, kind",
    [
        *(("llama", kind) for kind in EXPERTS),
        ("hf_llama", "pfeiffer"),
        ("hf_llama", "lora"),
        ("gpt2", "pfeiffer"),
    ],
)


def with_experts(name="llama", kind="pfeiffer", count=3):
    torch.manual_seed(0)
    model = get_peft_model(BASES[name].make(), EXPERTS[kind](), "e0")
    for i in range(1, count):
        model.add_adapter(f"e{i}", EXPERTS[kind]())
    for i in range(count):
        shake(model, f"e{i}", seed=10 + i)
    return model


def fused(name="llama", kind="pfeiffer", count=3, moved=True, **fields):
    model = with_experts(name, kind, count)
    torch.manual_seed(1)
    model.add_adapter(
        "fusion", FusionConfig(adapters=[f"e{i}" for i in range(count)], **fields)
    )
    model.set_adapter("fusion")
    return shake(model, "fusion", seed=4, step=0.2) if moved else model


def fuse(part, y, updates):
    """The equations, for one token at a time, as the paper has them. y (B, T, d),
    updates N of (B, T, d)."""
    out, p = y.clone(), torch.zeros(*y.shape[:-1], len(updates))
    for b in range(y.shape[0]):
        for t in range(y.shape[1]):
            query = part.query.weight @ y[b, t] + part.query.bias
            scores = [
                query @ (part.key.weight @ u[b, t] + part.key.bias) for u in updates
            ]
            p[b, t] = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
            for share, u in zip(p[b, t], updates):
                out[b, t] += share * (
                    u[b, t] if part.value is None else part.value.weight @ u[b, t]
                )
    return out, p


class TestEquation:
    @pytest.mark.parametrize("value", [True, False])
    def test_one_layer_is_the_papers_equation(self, value):
        torch.manual_seed(0)
        x, y, updates = (
            torch.randn(2, 3, 5),
            torch.randn(2, 3, 6),
            [torch.randn(2, 3, 6) for _ in range(3)],
        )
        part = Fusion(6, ["a", "b", "c"], value)
        for parameter in part.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)

        class Base:
            slot = None

            def __call__(self, x):
                return y

            def peer(self, name):  # an expert: what lies below it, plus its own
                return lambda below, x: below(x) + updates["abc".index(name)]

        seen = []
        part.softmax.register_forward_hook(lambda module, args, p: seen.append(p))
        with torch.no_grad():
            out, p = fuse(part, y, updates)
            close(part(Base(), x), out)
            close(seen[0], p)

    @cases
    def test_new_fusion_is_near_the_mean_of_the_experts(self, name, kind):
        """V is the identity but for 1e-6; with query and key at zero the mean is exact,
        layer by layer."""
        model = fused(name, kind, moved=False)
        for part in model._adapters_by_path("fusion").values():
            torch.nn.init.zeros_(part.query.weight)
            torch.nn.init.eye_(part.value.weight)
        oracle = with_experts(
            name, kind
        )  # the mean of three sums, made by stacking thirds
        for i in range(3):
            for part in oracle._adapters_by_path(f"e{i}").values():
                part.scaling = part.scaling / 3
        oracle.set_adapter(["e0", "e1", "e2"])
        if kind in (
            "lora",
            "parallel",
        ):  # experts that do not read each other's outputs
            close(run(model), run(oracle))
        differ(run(model), run(BASES[name].make()))

    def test_gradients_are_those_of_the_equation_written_with_autograd(self):
        model = fused("llama", "lora").double()
        slot = next(
            module
            for n, module in model.named_modules()
            if n.endswith("v_proj") and hasattr(module, "adapters")
        )
        part, x = slot.adapters["fusion"], torch.randn(2, 4, 16).double()
        slot(x).square().sum().backward()
        mine = {n: p.grad.clone() for n, p in part.named_parameters()}
        part.zero_grad()
        y = slot.base_layer(x)
        u = torch.stack(
            [
                slot.adapters[f"e{i}"].scaling
                * x
                @ slot.adapters[f"e{i}"].lora_A.weight.T
                # (N, B, T, d)
                @ slot.adapters[f"e{i}"].lora_B.weight.T
                for i in range(3)
            ]
        )
        q, k = (
            y @ part.query.weight.T + part.query.bias,
            u @ part.key.weight.T + part.key.bias,
        )
        p = torch.einsum("btd,nbtd->nbt", q, k).softmax(0)
        (
            y + torch.einsum("nbt,nbtd->btd", p, u @ part.value.weight.T)
        ).square().sum().backward()
        for n, parameter in part.named_parameters():
            close(mine[n], parameter.grad)

    def test_the_regularization_is_on_the_loss_in_training_only(self):
        model = fused(regularization=0.3)
        batch = inputs() | {"labels": inputs()["input_ids"]}
        plain = model.eval()(**batch).loss
        expected = sum(
            0.3 * (part.value.weight - torch.eye(16)).square().sum()
            for part in model._adapters_by_path("fusion").values()
        )
        close(model.train()(**batch).loss, plain + expected)
        assert expected > 0.1
        model.set_adapter("e0")
        with torch.no_grad():
            assert model.train()(**batch).loss == model.eval()(**batch).loss
            static = fused(value=False)
            assert static._adapters_by_path("fusion").popitem()[1].value is None
            assert static.train()(**batch).loss == static.eval()(**batch).loss

    def test_attention_can_be_read(self):
        model = fused(kind="houlsby")
        with attention(model, "fusion") as seen:
            run(model)
        assert list(seen) == list(model._adapters_by_path("fusion")) and len(seen) == 4
        for (p,) in seen.values():
            assert p.shape == (3, 6, 3)
            close(p.sum(-1), torch.ones(3, 6))
        run(model)
        assert all(len(calls) == 1 for calls in seen.values())  # the hooks are gone


class TestExperts:
    @cases
    def test_only_fusion_is_trained_and_saved(self, name, kind, tmp_path):
        model, before = fused(name, kind), None
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable and all(".adapters.fusion." in n for n in trainable)
        parts = model._adapters_by_path("fusion")
        assert model.get_nb_trainable_parameters()[0] == sum(
            3 * d * d + 2 * d
            for d in [part.value.out_features for part in parts.values()]
        )
        experts = {
            n: p.clone() for n, p in model.named_parameters() if "adapters.e" in n
        }
        before = run(model)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.5
        )
        model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        optimizer.step()
        model.eval()
        differ(run(model), before)
        for n, p in model.named_parameters():
            assert n not in experts or torch.equal(p, experts[n]) and p.grad is None
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "fusion" / "adapter_model.safetensors")
        assert {key.rpartition(".")[0].rpartition(".")[2] for key in saved} == {
            "query",
            "key",
            "value",
        }
        assert (
            sum(t.numel() for t in saved.values())
            == model.get_nb_trainable_parameters()[0]
        )
        again = PeftModel.from_pretrained(
            BASES[name].make(), tmp_path / "e0", adapter_name="e0"
        )
        for other in ("e1", "e2", "fusion"):
            again.load_adapter(tmp_path / other, other)
        again.set_adapter("fusion")
        assert torch.equal(run(again), run(model))

    def test_an_expert_alone_is_what_it_was(self):
        model, alone = fused(), with_experts()
        for name in ("e0", "e1", "e2"):
            model.set_adapter(name)
            alone.set_adapter(name)
            assert torch.equal(run(model), run(alone))
        with model.disable_adapter():
            assert torch.equal(run(model), run(BASES["llama"].make()))

    def test_rows_copies_checkpointing_and_taking_off(self):
        model = fused()
        whole = run(model)
        mixed = run(model, adapter_names=["fusion", "__base__", "e1"])
        close(mixed[0], whole[0])
        close(mixed[1], run(BASES["llama"].make())[1])
        assert torch.equal(run(copy.deepcopy(model)), whole)
        gradients = []
        for reentrant in (None, False, True):
            model.zero_grad()
            if reentrant is not None:
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": reentrant}
                )
            model.train()(**inputs(), labels=inputs()["input_ids"]).loss.backward()
            gradients.append(
                {
                    n: p.grad.clone()
                    for n, p in model.named_parameters()
                    if p.requires_grad
                }
            )
        for other in gradients[1:]:
            for n in other:
                close(other[n], gradients[0][n])
        model.eval()
        with pytest.raises(minipeft.NotMergeableError, match="'fusion'"):
            model.merge_adapter()
        with pytest.raises(minipeft.AdapterNameError, match="'fusion' needs 'e2'"):
            model.delete_adapter("e2")
        plain = model.unload()
        assert torch.equal(run(plain), run(BASES["llama"].make()))

    def test_wrong_experts(self):
        for wrong, says in (
            ([], "two or more"),
            (["a"], "two or more"),
            (["a", "a"], "two or more"),
            ("ab", r"adapters = 'ab': expected list"),
        ):
            with pytest.raises(ConfigError, match=says):
                FusionConfig(adapters=wrong)
        with pytest.raises(minipeft.AdapterNameError, match="no .*there are: none"):
            get_peft_model(BASES["llama"].make(), FusionConfig(adapters=["a", "b"]))
        model = with_experts()
        with pytest.raises(minipeft.AdapterNameError, match="'e7'.*e0, e1, e2"):
            model.add_adapter("fusion", FusionConfig(adapters=["e0", "e7"]))
        model.add_adapter("elsewhere", LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(
            TargetError, match="'e0' and 'elsewhere' stand at different layers"
        ):
            model.add_adapter("fusion", FusionConfig(adapters=["e0", "elsewhere"]))
        norms = get_peft_model(
            BASES["llama"].make(), BottleneckConfig(r=2, train_layernorm=True), "a"
        )
        norms.add_adapter("b", BottleneckConfig(r=2, train_layernorm=True))
        with pytest.raises(TargetError, match="copy of its own"):
            norms.add_adapter("fusion", FusionConfig(adapters=["a", "b"]))
        assert list(norms.peft_config) == ["a", "b"]

    @pytest.mark.parametrize(
        "config",
        [
            lambda: minipeft.DoraConfig(r=2),
            lambda: minipeft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
            lambda: minipeft.LoKrConfig(r=2, target_modules=["q_proj", "v_proj"]),
            lambda: minipeft.AdaLoraConfig(init_r=3, target_r=2, total_step=10),
            lambda: minipeft.VeraConfig(r=4, target_modules=["q_proj"]),
            lambda: minipeft.DenseLoraConfig(r=2, target_modules=["q_proj"]),
            lambda: minipeft.BitFitConfig(target_modules=["up_proj"]),
            lambda: minipeft.IA3Config(),
            lambda: minipeft.IA3Config(
                target_modules=["down_proj"], feedforward_modules=["down_proj"]
            ),
        ],
    )
    def test_any_method_can_be_an_expert(self, config):
        """Of two equal experts each has half of the attention, and W_v is the identity:
        fusion gives what one of them gives."""
        model = get_peft_model(BASES["llama"].make(), config(), "a")
        model.add_adapter("b", config())
        shake(model, "a")
        ours, others = (model._adapters_by_path(name) for name in ("a", "b"))
        for path, adapter in ours.items():
            others[path].load_state_dict(adapter.state_dict())
        model.set_adapter("a")
        alone = run(model)
        differ(alone, run(BASES["llama"].make()))
        model.add_adapter("fusion", FusionConfig(adapters=["a", "b"], value=False))
        model.set_adapter("fusion")
        close(run(model), alone, rounding(2))  # each expert runs
