"""PiSSA, OLoRA and rsLoRA against Hugging Face PEFT; LoRA+ against PEFT's groups."""

import copy
import json
import warnings

import peft
import peft.optimizers
import pytest
import torch
from bases import BASES, close, differ, inputs, loss_of, rounding, run
from safetensors.torch import load_file
from tolerance import tolerance
from torch import nn

import minipeft
from minipeft import ConfigError, LoraConfig, PeftModel, TargetError, get_peft_model
from minipeft.optim import create_loraplus_optimizer
from minipeft.weights import read_weight

ON = [BASES[name] for name in ("llama", "gpt2", "hf_llama", "hf_gpt2", "mlp")]
LORAS = {
    "rslora": dict(use_rslora=True, init_lora_weights=False),
    "pissa": dict(init_lora_weights="pissa"),
    "pissa, rslora": dict(init_lora_weights="pissa", use_rslora=True),
    "pissa_niter_4": dict(init_lora_weights="pissa_niter_4"),
    "olora": dict(init_lora_weights="olora"),
}
changing = pytest.mark.parametrize("init", ["pissa", "olora"])
everywhere = pytest.mark.parametrize("base", ON, ids=str)


def no_oracle(base, init):
    if str(base) == "hf_gpt2" and init == "olora":
        pytest.skip("PEFT's OLoRA does not run on Conv1D")


def both(base, **fields):
    models = []
    for package, config in ((minipeft, LoraConfig), (peft, peft.LoraConfig)):
        torch.manual_seed(0)
        adapter = config(r=4, lora_alpha=6, target_modules=list(base.targets), **fields)
        models.append(package.get_peft_model(base.make(), adapter).eval())
    return models


def save(model, folder, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'default' began as")
        model.save_pretrained(str(folder), **options)
    return load_file(folder / "adapter_model.safetensors")


# pissa_niter finds the largest directions by a few steps from random ones: what is left
# over is at most so many times the least
NEARLY = 1.05


def step(model, lr=0.1):
    """One step of SGD; the gradients, in the order of the parameters."""
    loss_of(model).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=lr).step()
    gradients = [p.grad for p in trained]
    model.zero_grad()
    return gradients


class TestConversion:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            dict(use_rslora=True),
            dict(rank_pattern={".*1.*": 2}, alpha_pattern={".*0.*": 3}),
        ],
        ids=["plain", "rslora", "patterns"],
    )
    @changing
    @everywhere
    def test_converted_to_a_plain_lora_of_twice_the_rank(
        self, base, init, fields, tmp_path
    ):
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(base.targets),
            init_lora_weights=init,
            modules_to_save=[base.norm],
            **fields,
        )
        model = get_peft_model(base.make(), config)
        save(model, tmp_path / "start")
        for _ in range(2):
            step(model)
        expected = run(model)
        differ(expected, run(base.make()))
        model.save_pretrained(
            tmp_path / "plain",
            path_initial_model_for_weight_conversion=tmp_path / "start",
        )
        saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
        assert saved["r"] == 8 and saved["init_lora_weights"] is True
        lora = PeftModel.from_pretrained(base.make(), tmp_path / "plain")
        close(run(lora), expected)
        with lora.disable_adapter():
            assert torch.equal(run(lora), run(base.make()))
        oracle = peft.PeftModel.from_pretrained(
            base.make(), str(tmp_path / "plain")
        ).eval()
        close(run(oracle), expected)

    @changing
    @pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2"])
    def test_the_conversion_is_that_of_peft(self, name, init, tmp_path):
        no_oracle(BASES[name], init)
        ours, theirs = both(BASES[name], init_lora_weights=init)
        for who, model in (("ours", ours), ("theirs", theirs)):
            save(model, tmp_path / who / "start")
            step(model)
        own = save(
            ours,
            tmp_path / "a",
            path_initial_model_for_weight_conversion=tmp_path / "ours" / "start",
        )
        other = save(
            theirs,
            tmp_path / "b",
            path_initial_model_for_weight_conversion=str(tmp_path / "theirs" / "start"),
        )
        assert own.keys() == other.keys()
        for key in own:
            close(own[key], other[key])
        facts = [
            json.loads((tmp_path / who / "adapter_config.json").read_text())
            for who in "ab"
        ]
        assert (
            [facts[0][f] for f in ("r", "lora_alpha")]
            == [facts[1][f] for f in ("r", "lora_alpha")]
            == [8, 12]
        )

    def test_saving_says_that_the_base_changed(self, tmp_path):
        base = BASES["llama"]
        model = get_peft_model(base.make(), LoraConfig(r=2, init_lora_weights="pissa"))
        with pytest.warns(
            UserWarning,
            match=("which changed the base.*path_initial_model_for_weight_conversion"),
        ):
            model.save_pretrained(tmp_path / "a")
        model = get_peft_model(
            base.make(), LoraConfig(r=2, init_lora_weights="pissa_niter_2")
        )
        with pytest.warns(UserWarning, match="changed the base"):
            model.save_pretrained(tmp_path / "b")
        with pytest.raises(ConfigError, match="cannot be made again"):
            PeftModel.from_pretrained(base.make(), tmp_path / "b")
        # as one does who saves the base too
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "b")
        changed = copy.deepcopy(model).unload()
        close(run(PeftModel.from_pretrained(changed, tmp_path / "b")), run(model))


class TestPissaAndOlora:
    @pytest.mark.parametrize("name", LORAS)
    @everywhere
    def test_outputs_gradients_one_step_and_files_are_those_of_peft(
        self, base, name, tmp_path
    ):
        no_oracle(base, name)
        ours, theirs = both(base, **LORAS[name])
        close(run(ours), run(theirs))
        for own, other in zip(step(ours), step(theirs), strict=True):
            close(own, other)
            assert own.abs().max() > 1e-6
        close(run(ours), run(theirs), rounding(3))  # forward, backward, forward
        differ(run(ours), run(base.make()))
        own, other = save(ours, tmp_path / "ours"), save(theirs, tmp_path / "theirs")
        assert own.keys() == other.keys()
        for key in own:
            close(own[key], other[key])
        if "niter" not in name:  # the base is changed again on loading
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # PEFT has something to say about Conv1D
                close(
                    run(
                        peft.PeftModel.from_pretrained(
                            base.make(), str(tmp_path / "ours")
                        ).eval()
                    ),
                    run(ours),
                )
            close(
                run(PeftModel.from_pretrained(base.make(), tmp_path / "theirs")),
                run(theirs),
            )

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
    @everywhere
    def test_the_model_is_as_before_and_the_base_is_not(self, base, init):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=list(base.targets), init_lora_weights=init
        )
        model, plain = get_peft_model(base.make(), config), base.make()
        close(run(model), run(plain))
        with model.disable_adapter():
            differ(run(model), run(plain), 1e-2)
        differ(run(copy.deepcopy(model).unload()), run(plain), 1e-2)
        for path, slot in model._slots().items():
            if slot.adapters:
                adapter, W = (
                    slot.adapters["default"],
                    read_weight(plain.get_submodule(path)),
                )
                taken = adapter.delta(None)
                close(taken + read_weight(slot.base_layer), W)
                if init == "olora":
                    B = adapter.lora_B.weight
                    close(B.T @ B, torch.eye(4))  # Q's columns
                    close(B @ B.T @ W, taken / adapter.scaling)  # R = Q^T W
                else:  # Eckart and Young: no rank-4 matrix is nearer
                    values = torch.linalg.svdvals(W)
                    rest = values[4:].square().sum().sqrt()
                    terms = max(W.shape)
                    off = tolerance(torch.float32, values[0], terms, steps=2)
                    most = rest if init == "pissa" else rest * NEARLY
                    assert rest - off < (W - taken).norm() < most + off
        close(run(model.merge_and_unload()), run(plain))

    def test_olora_on_conv1d_is_olora_on_the_same_linear(self):
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        conv, linear = Conv1D(12, 8), nn.Linear(8, 12)
        linear.weight.data, linear.bias.data, x = (
            conv.weight.data.T.contiguous(),
            conv.bias.data.clone(),
            torch.randn(5, 8),
        )
        models = [
            get_peft_model(
                nn.Sequential(layer),
                LoraConfig(r=3, target_modules=["0"], init_lora_weights="olora"),
            )
            for layer in (conv, linear)
        ]
        for own, other in zip(*(list(model.parameters()) for model in models)):
            close(own.T if own.shape != other.shape else own, other)
        close(models[0](x), models[1](x))

    def test_wrong_configurations(self, tmp_path):
        base = BASES["llama"]
        for wrong, says in (
            ("pisa", "did you mean 'pissa'"),
            ("pissa_niter_", "pissa_niter_"),
            ("pissa_niter_x", "expected one of True, False, gaussian"),
            ("olora_3", "'olora_3'"),
            ("gaussian_2", "did you mean 'gaussian'"),
        ):
            with pytest.raises(ConfigError, match=says):
                LoraConfig(init_lora_weights=wrong)
        plain = base.make()
        before = {name: p for name, p in plain.named_parameters()}
        for init in ("pissa", "olora"):
            with pytest.raises(TargetError, match="r = 17.*only 16 directions"):
                get_peft_model(
                    plain,
                    LoraConfig(r=17, target_modules=["q_proj"], init_lora_weights=init),
                )
            # the others are put back
            with pytest.raises(TargetError, match="layers.1.mlp.down_proj: r = 30"):
                get_peft_model(
                    plain,
                    LoraConfig(
                        r=2,
                        target_modules=["q_proj", "down_proj"],
                        init_lora_weights=init,
                        rank_pattern={"layers.1.mlp.down_proj": 30},
                    ),
                )
        assert all(p is before[name] for name, p in plain.named_parameters())
        model = get_peft_model(base.make(), LoraConfig(r=2))
        with pytest.raises(
            ConfigError, match="'pissa' changes the base, on which default"
        ):
            model.add_adapter("second", LoraConfig(r=2, init_lora_weights="pissa"))
        model.save_pretrained(tmp_path)
        other = get_peft_model(
            base.make(),
            LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights="pissa"),
        )
        with pytest.raises(ConfigError, match="initial adapter is another one"):
            other.save_pretrained(
                tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path
            )

    @changing
    def test_a_4_bit_base_is_refused(self, init):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer = bitsandbytes.nn.Linear4bit(
            64, 64, quant_type="nf4", compute_dtype=torch.float32
        )
        model = nn.Sequential(layer.to("cpu"))
        with pytest.raises(TargetError, match="0: .*4-bit Linear4bit would round it"):
            get_peft_model(
                model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
            )

    def test_a_combination_of_pissas_does_not_change_the_base_again(self):
        base = BASES["llama"]
        model = get_peft_model(base.make(), LoraConfig(r=4, init_lora_weights="pissa"))
        step(model)
        expected = run(model)
        model.add_weighted_adapter(["default"], [1.0], "again", combination_type="cat")
        model.set_adapter("again")
        close(run(model), expected)

    @changing
    def test_a_16_bit_base(self, init):
        base, config = (
            BASES["hf_llama"],
            dict(r=4, target_modules=["q_proj"], init_lora_weights=init),
        )
        ours = get_peft_model(base.make().bfloat16(), LoraConfig(**config))
        theirs = peft.get_peft_model(
            base.make().bfloat16(), peft.LoraConfig(**config)
        ).eval()
        assert {p.dtype for p in ours.parameters() if p.requires_grad} == {
            torch.float32
        }
        own, other = (
            dict(model.base_model.model.named_parameters()) for model in (ours, theirs)
        )
        name = "model.layers.0.self_attn.q_proj.base_layer.weight"
        assert own[name].dtype == torch.bfloat16 and torch.equal(own[name], other[name])
        close(run(ours), run(theirs), rounding(dtype=torch.bfloat16))


# LoRA+

LORAPLUS = {
    "usual": dict(),
    "bias and saved norm": dict(
        lora_bias=True, target_modules=["q_proj"], modules_to_save=["norm"]
    ),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "layer norm": dict(target_modules=["c_attn"], modules_to_save=["ln_f"]),
}


class TestLoraPlus:
    @pytest.mark.parametrize("name", LORAPLUS)
    def test_groups_and_one_step_are_those_of_peft(self, name, tmp_path):
        base = BASES["hf_gpt2" if name == "layer norm" else "hf_llama"]
        fields = {"target_modules": list(base.targets)} | LORAPLUS[name]
        optimizers, files = [], []
        for package, config, create in (
            (minipeft, LoraConfig, create_loraplus_optimizer),
            (peft, peft.LoraConfig, peft.optimizers.create_loraplus_optimizer),
        ):
            torch.manual_seed(0)
            model = package.get_peft_model(
                base.make(), config(r=4, init_lora_weights=False, **fields)
            ).eval()
            optimizer = create(
                model,
                torch.optim.SGD,
                lr=0.1,
                loraplus_lr_ratio=16,
                loraplus_weight_decay=0.1,
                loraplus_lr_embedding=1e-2,
                momentum=0.5,
            )
            loss_of(model).backward()
            optimizer.step()
            optimizers.append(optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                files.append(save(model, tmp_path / package.__name__))
        for own, other in zip(
            *(optimizer.param_groups for optimizer in optimizers), strict=True
        ):
            assert {k: v for k, v in own.items() if k != "params"} == {
                k: v for k, v in other.items() if k != "params"
            }
            assert sorted(p.shape for p in own["params"]) == sorted(
                p.shape for p in other["params"]
            )
        for key in files[0]:
            close(files[0][key], files[1][key])

    def test_what_means_nothing_is_refused(self):
        model = get_peft_model(BASES["llama"].make(), LoraConfig())
        for ratio in (0, -2, float("nan")):
            with pytest.raises(ConfigError, match="loraplus_lr_ratio = "):
                create_loraplus_optimizer(
                    model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio
                )
        with pytest.raises(ConfigError, match="lr = 0"):
            create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=0, loraplus_lr_ratio=4
            )
        with pytest.raises(ConfigError, match="trains no lora_B"):
            model.set_adapter("default", inference_mode=True)
            create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4
            )

    def test_in_our_training_loop(self):
        from minipeft.lm import train

        model = get_peft_model(BASES["llama"].make(), LoraConfig(r=2))
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4
        )

        class Data:
            def batch(self, step):
                return inputs() | {"labels": inputs()["input_ids"]}

        seen = []
        train(
            model,
            Data(),
            steps=3,
            warmup=2,
            schedule="constant",
            optimizer=optimizer,
            progress=False,
            log=lambda *_: seen.append(
                [group["lr"] for group in optimizer.param_groups]
            ),
        )
        assert seen == [pytest.approx([5e-4, 5e-7, 2e-3, 2e-3])] + 2 * [
            pytest.approx([1e-3, 1e-6, 4e-3, 4e-3])
        ]
