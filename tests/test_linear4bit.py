"""4-bit layers, models of them, and adapters over them: against the dense layer with
the same weight, and bitsandbytes."""

import copy

import bases
import bitsandbytes
import peft
import pytest
import torch
from bases import BASES, METHODS, close, differ, loss_of, rounding, run, shake
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import minipeft
from minipeft import (
    LoraConfig,
    NotMergeableError,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from minipeft.quant import (
    BitsAndBytesConfig,
    Linear4bit,
    dequantize_model,
    dequantize_nf4,
    linear4bit,
    quantize_model,
    quantize_nf4,
)
from minipeft.weights import logical_numel, read_weight

BACKENDS = ("torch", "bitsandbytes")


def make(name):
    """A model of tests/bases.py, but 64 wide, where the kernels of bitsandbytes are
    right."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(bases, "WIDTH", 64)
        torch.manual_seed(1)
        return BASES[name].build().eval()


KINDS = ("llama", "gpt2", "hf_llama", "hf_gpt2", "mlp")


def pair(d_in=96, d_out=80, bias=True, **options):
    """(a 4-bit layer, the dense layer with the weight it stands for)"""
    torch.manual_seed(1)
    layer = Linear4bit.from_linear(nn.Linear(d_in, d_out, bias=bias), **options)
    twin = nn.Linear(d_in, d_out, bias=bias)
    twin.weight = nn.Parameter(read_weight(layer), requires_grad=False)
    if bias:
        twin.bias = nn.Parameter(layer.bias.detach().clone())
    return layer, twin


class TestLayer:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
    def test_forward_and_backward_are_those_of_the_dense_layer(self, bias, quant_type):
        layer, twin = pair(bias=bias, quant_type=quant_type)
        results = []
        for each in (layer, twin):
            x = torch.randn(
                3, 5, 96, generator=torch.Generator().manual_seed(2)
            ).requires_grad_()
            y = each(x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad] + ([each.bias.grad] if bias else []))
        for ours, theirs in zip(*results):
            close(ours, theirs)
            assert ours.dtype == theirs.dtype
        assert layer.weight.grad is None

    def test_the_dense_weight_is_not_kept_for_the_backward_pass(self):
        layer, twin = pair(512, 512)
        for each, most in ((layer, 0), (twin, 512 * 512 * 4)):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.append(t.nbytes) or t, lambda t: t
            ):
                each(torch.randn(2, 512, requires_grad=True))
            assert sum(saved) <= most + 512 * 8

    def test_the_input_gets_a_gradient_and_only_where_wanted(self):
        layer, _ = pair()
        layer.bias.requires_grad_(False)
        assert not layer(torch.randn(2, 96)).requires_grad
        x = torch.randn(2, 96, requires_grad=True)
        close(
            torch.autograd.grad(layer(x).sum(), x)[0],
            read_weight(layer).sum(0).expand(2, -1),
        )
        assert torch.autograd.gradcheck(
            layer.double(), torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
        )

    def test_dtypes(self):
        layer, twin = pair(compute_dtype=torch.bfloat16)
        x = torch.randn(4, 96)
        assert layer(x).dtype == torch.float32
        assert torch.equal(layer(x), twin.bfloat16()(x.bfloat16()).float())
        plain, twin = pair()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(plain(x), twin(x)) and plain(x).dtype == torch.bfloat16

    @pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
    def test_an_input_that_is_not_floating_point(self, dtype, compute_dtype):
        """nn.Linear refuses it, too; rounded to whole numbers, the result says
        nothing."""
        layer, twin = pair(compute_dtype=compute_dtype)
        x = torch.ones(2, 96, dtype=dtype)
        with pytest.raises(RuntimeError):
            twin(x)
        with pytest.raises(TypeError, match=f"x is {dtype}: expected floating-point"):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(TypeError, match="expected floating-point"):
                layer(x)
        assert layer(x.float()).dtype == torch.float32

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        "given, near",
        [
            (torch.int8, ""),
            (torch.float8_e4m3fn, ""),
            ("flaot16", r" \(did you mean torch.float16\?\)"),
            ("nn", ""),
            (16, ""),
        ],
    )
    def test_what_is_no_compute_dtype(self, given, near, backend):
        message = f"compute_dtype '?{given}'?.*{near}; expected one of None, "
        model = nn.Sequential(nn.Linear(64, 8))
        options = dict(bnb_4bit_compute_dtype=given, backend=backend)
        for make_one in (
            lambda: quantize_model(model, backend, compute_dtype=given),
            lambda: Linear4bit(64, 8, compute_dtype=given),
            lambda: BitsAndBytesConfig(**options),
        ):
            with pytest.raises(ValueError, match=message):
                make_one()
        assert type(model[0]) is nn.Linear
        quantized = quantize_model(model)
        with pytest.raises(ValueError, match=message.replace("compute_", "")):
            dequantize_model(quantized, given)
        assert type(quantized[0]) is Linear4bit

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        "name", ["float16", "bfloat16", "torch.float32", "half", "double"]
    )
    def test_a_compute_dtype_by_its_name(self, name, backend):
        dtype = getattr(torch, name.removeprefix("torch."))
        model = quantize_model(
            nn.Sequential(nn.Linear(64, 8)), backend, compute_dtype=name
        )
        assert model[0].compute_dtype is dtype
        config = BitsAndBytesConfig(bnb_4bit_compute_dtype=name)
        assert config.options()["compute_dtype"] is dtype
        assert dequantize_model(model, name)[0].weight.dtype is dtype

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_scales_survive_a_change_of_dtype(self, double_quant):
        layer, _ = pair(double_quant=double_quant)
        before = dequantize_nf4(layer.quantized)
        again = layer.bfloat16().float()
        assert torch.equal(dequantize_nf4(again.quantized), before)
        assert all(b.dtype in (torch.float32, torch.uint8) for b in layer.buffers())
        assert torch.equal(dequantize_nf4(copy.deepcopy(layer).quantized), before)
        assert copy.deepcopy(layer).weight.data_ptr() != layer.weight.data_ptr()


def shake_base(model):
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(4)
        )
    return model


class TestFiles:
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_state_dicts_are_those_of_bitsandbytes(self, double_quant):
        torch.manual_seed(0)
        dense = nn.Linear(128, 96)
        ours = Linear4bit.from_linear(dense, double_quant=double_quant)
        theirs = bitsandbytes.nn.Linear4bit(
            128, 96, quant_type="nf4", compress_statistics=double_quant
        )
        theirs.load_state_dict(dense.state_dict())
        theirs = theirs.to("cpu")
        mine, other = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == other.keys()
        for key in mine:
            assert mine[key].shape == other[key].shape or "quant_state" in key, key
            assert torch.equal(mine[key], other[key]) or "quant_state" in key, key
        from_theirs = Linear4bit(128, 96, double_quant=not double_quant)
        from_theirs.load_state_dict(other)
        assert (
            torch.equal(read_weight(from_theirs), read_weight(ours))
            and from_theirs.double_quant == double_quant
        )
        back = bitsandbytes.nn.Params4bit.from_prequantized(
            mine["weight"],
            {
                k.removeprefix("weight."): v
                for k, v in mine.items()
                if k.startswith("weight.")
            },
            device="cpu",
        )
        assert torch.equal(
            bitsandbytes.functional.dequantize_4bit(back.data, back.quant_state),
            read_weight(ours),
        )

    def test_a_dense_weight_that_is_loaded_is_quantised(self):
        layer, dense = Linear4bit(96, 80), nn.Linear(96, 80)
        layer.load_state_dict(dense.state_dict())
        assert torch.equal(
            read_weight(layer), dequantize_nf4(quantize_nf4(dense.weight))
        )
        assert torch.equal(layer.bias, dense.bias)

    def test_safetensors(self, tmp_path):
        model, other = (quantize_model(make("llama")) for _ in range(2))
        shaken = quantize_model(shake_base(make("llama")))
        save_model(shaken, tmp_path / "model.safetensors")
        differ(run(model), run(shaken))
        load_model(other, tmp_path / "model.safetensors")
        assert torch.equal(run(other), run(shaken))
        save_file(
            {k: v for k, v in shaken.state_dict().items() if k != "lm_head.weight"},
            tmp_path / "plain.safetensors",
        )
        model.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=False)
        assert torch.equal(run(model), run(shaken))

    def test_a_broken_state_dict_is_refused(self):
        state = pair()[0].state_dict()
        del state["weight.absmax"]
        with pytest.raises(ValueError, match="not whole"):
            pair()[0].load_state_dict(state)
        with pytest.raises(RuntimeError, match="size mismatch"):
            pair()[0].load_state_dict(nn.Linear(96, 81).state_dict())


def lora(base, **more):
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(base.targets), **more)


def qlora(model, base, **more):
    torch.manual_seed(0)
    return shake(get_peft_model(model, lora(base, **more)))


class TestModels:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", KINDS)
    def test_a_quantised_model_is_the_dense_one_with_rounded_weights(
        self, name, backend
    ):
        base = BASES[name]
        model, rounded = quantize_model(make(base.name), backend), make(base.name)
        n = 0
        for path, module in model.named_modules():
            if type(module).__name__ == "Linear4bit":
                dense = rounded.get_submodule(path)
                weight = dequantize_nf4(
                    quantize_nf4(minipeft.weights.read_weight(dense))
                )
                minipeft.weights.write_weight(dense, weight)
                n += 1
        # all but lm_head
        assert n == sum(minipeft.weights.is_linear(m) for m in rounded.modules()) - (
            name != "mlp"
        )
        close(run(model), run(rounded))
        differ(run(model), run(make(base.name)))
        restored = dequantize_model(model)
        assert not [m for m in restored.modules() if type(m).__name__ == "Linear4bit"]
        close(run(restored), run(rounded))

    def test_skip_and_ties_and_wrong_names(self):
        model = quantize_model(
            make("llama"), skip=("lm_head", "q_proj", "layers.1.mlp.down_proj")
        )
        kinds = {
            path: type(m).__name__
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear)
        }
        assert (
            kinds["model.layers.0.self_attn.q_proj"]
            == kinds["model.layers.1.mlp.down_proj"]
            == "Linear"
        )
        assert kinds["model.layers.0.mlp.down_proj"] == "Linear4bit"
        tied = quantize_model(make("llama"), skip=())  # the head is the embedding
        assert (
            type(tied.lm_head) is nn.Linear
            and tied.lm_head.weight is tied.model.embed_tokens.weight
        )
        with pytest.raises(ValueError, match="torch, bitsandbytes"):
            quantize_model(make("llama"), "cuda")
        with pytest.raises(ValueError, match="blocks of 64"):
            quantize_model(make("llama"), "bitsandbytes", block_size=128)
        with pytest.raises(ValueError, match="16 inputs"):
            quantize_model(BASES["llama"].make(), "bitsandbytes")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_parameters_are_counted_as_the_weights_they_are(self, backend):
        dense = make("hf_llama")
        count = sum(p.numel() for p in dense.parameters())
        quantised = quantize_model(make("hf_llama"), backend)
        assert (
            sum(p.numel() for p in quantised.parameters())
            < count
            == sum(map(logical_numel, quantised.parameters()))
        )
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        expected = get_peft_model(dense, config).get_nb_trainable_parameters()
        model = get_peft_model(quantised, config)
        assert model.get_nb_trainable_parameters() == expected
        theirs = peft.get_peft_model(
            quantize_model(make("hf_llama"), backend),
            peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        )
        assert theirs.get_nb_trainable_parameters() == expected

    def test_the_meta_device_has_the_sizes_without_the_memory(self):
        with torch.device("meta"):
            big = nn.ModuleDict({"proj": nn.Linear(8192, 28672, bias=False)})
        layer = quantize_model(big)["proj"]
        assert (
            layer.weight.device.type == "meta"
            and logical_numel(layer.weight) == 8192 * 28672
        )
        stored = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
        # four bits a weight, eight a block, 32 for 256 blocks, and one mean
        n = 8192 * 28672
        assert 8 * stored == 4 * n + 8 * n // 64 + 32 * n // (64 * 256) + 32


class TestAdapters:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", KINDS)
    def test_lora_over_4_bits_is_lora_over_the_rounded_weights(self, name, backend):
        base = BASES[name]
        model = qlora(quantize_model(make(base.name), backend), base)
        dense = qlora(dequantize_model(quantize_model(make(base.name))), base)
        close(run(model), run(dense))
        for each in (model, dense):
            loss_of(each.train()).backward()
        expected = {n: p.grad for n, p in dense.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            if name in expected:
                close(parameter.grad, expected[name], rounding(2))
                assert parameter.grad.abs().max() > 0
            else:
                assert parameter.grad is None

    @pytest.mark.parametrize(
        "name",
        [
            "dora",
            "adalora",
            "loha",
            "lokr",
            "vera",
            "ia3",
            "bitfit",
            "bottleneck",
            "prompt",
            "prefix",
        ],
    )
    def test_every_adapter_over_both_backends(self, name):
        method, base, results = METHODS[name], BASES["llama"], []
        for backend in BACKENDS:
            torch.manual_seed(0)
            model = get_peft_model(
                quantize_model(make(base.name), backend), method.ours(base)
            )
            shake(model, step=method.step)
            loss_of(model).backward()
            results.append(
                [run(model), *(p.grad for p in model.parameters() if p.requires_grad)]
            )
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs, rounding(2))
        differ(results[0][0], run(quantize_model(make(base.name))))

    def test_peft_gives_the_same_over_our_layers(self, tmp_path):
        base = BASES["hf_llama"]
        model = qlora(quantize_model(make(base.name)), base)
        model.save_pretrained(tmp_path)
        oracle = peft.PeftModel.from_pretrained(
            quantize_model(make(base.name)), str(tmp_path), is_trainable=True
        )
        close(run(oracle), run(model))
        for each in (model, oracle):
            loss_of(each).backward()
        theirs = {
            n.replace(".default", ""): p.grad
            for n, p in oracle.named_parameters()
            if p.grad is not None
        }
        ours = {
            n.replace(".adapters.default", ""): p.grad
            for n, p in model.named_parameters()
            if p.grad is not None
        }
        assert ours.keys() == theirs.keys() != set()
        for key in ours:
            close(ours[key], theirs[key])

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_the_layers_of_bitsandbytes_are_kept_from_packing_themselves_anew(
        self, double_quant
    ):
        """A call in eval mode packs them for inference on some CPUs: then there are no
        gradients, and other weights."""

        def model():
            torch.manual_seed(3)
            theirs = bitsandbytes.nn.Linear4bit(
                64, 64, bias=False, quant_type="nf4", compress_statistics=double_quant
            )
            theirs.weight = bitsandbytes.nn.Params4bit(
                torch.randn(64, 64),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=double_quant,
                module=theirs,
            )
            return nn.Sequential(nn.Linear(64, 64), theirs).to("cpu").eval()

        fresh, used = model(), model()
        with torch.no_grad():
            used(torch.randn(2, 64))  # packed, on such a CPU
        # the scales went through 16 bits
        assert (read_weight(fresh[1]) - read_weight(used[1])).abs().max() < 0.03
        for each in (fresh, used):
            adapted = shake(get_peft_model(each, LoraConfig(r=2, target_modules=["0"])))
            with torch.no_grad():
                adapted(torch.randn(2, 64))  # in eval mode once more
            adapted(torch.ones(2, 64)).sum().backward()
            grads = [p.grad for p in adapted.parameters() if p.requires_grad]
            assert all(g is not None and g.abs().max() > 0 for g in grads)


class TestMerging:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_merging_is_refused_or_made_dense_or_reported(self, backend):
        base = BASES["llama"]

        def fresh():
            return qlora(quantize_model(make(base.name), backend), base)

        model = fresh()
        before, base_alone = run(model), run(quantize_model(make(base.name), backend))
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotMergeableError, match="dequantize=True"):
                merge()
        close(run(model), before)
        plain = model.merge_and_unload(dequantize=True)
        assert not [m for m in plain.modules() if type(m).__name__ == "Linear4bit"]
        close(run(plain), before, rounding(2))
        model = fresh()
        with pytest.warns(
            UserWarning,
            match="rounding 6 merged weights to 4 bits again: the error is [0-9]+%",
        ):
            model.merge_adapter(lossy=True)
        differ(run(model), before, 1e-3)
        with model.disable_adapter():
            close(run(model), base_alone)
        model.unmerge_adapter()
        close(run(model), before)
        # what was unmerged no longer counts
        with pytest.warns(UserWarning, match="rounding 6 merged weights"):
            rounded = model.merge_and_unload(lossy=True)
        assert [m for m in rounded.modules() if type(m).__name__ == "Linear4bit"]

    def test_the_reported_rounding_error_is_the_one_there_is(self):
        dense = nn.ModuleDict({"proj": nn.Linear(128, 128, bias=False)})
        dense.forward = lambda x: dense["proj"](x)
        model = get_peft_model(
            quantize_model(dense), LoraConfig(r=4, target_modules=["proj"])
        )
        shake(model, step=0.05)
        slot = model.get_base_model()["proj"]
        before, delta = (
            read_weight(slot.base_layer),
            slot.adapters["default"].delta(None).detach(),
        )
        with pytest.warns(UserWarning) as caught:
            model.merge_adapter(lossy=True)
        error = (read_weight(slot.base_layer) - before - delta).norm() / delta.norm()
        assert f"{float(error):.0%}" in str(caught[0].message)

    def test_a_failed_dense_merge_leaves_the_4_bit_model(self):
        base = BASES["llama"]
        model = qlora(quantize_model(make(base.name)), base)
        before = run(model)
        with torch.no_grad():
            bad = [p for p in model.parameters() if p.requires_grad][-1]
            kept = bad.clone()
            bad.fill_(torch.nan)
        with pytest.raises(NotMergeableError, match="not finite"):
            model.merge_and_unload(dequantize=True, safe_merge=True)
        with torch.no_grad():
            bad.copy_(kept)
        assert torch.equal(run(model), before)
        assert [m for m in model.modules() if isinstance(m, Linear4bit)]


class TestPreparing:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_prepare_model_for_kbit_training(self, backend, reentrant):
        base = BASES["hf_llama"]
        model = prepare_model_for_kbit_training(
            quantize_model(make(base.name).bfloat16(), backend),
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        assert not any(p.requires_grad for p in model.parameters())
        for name, p in model.named_parameters():
            assert p.dtype == (
                torch.uint8 if type(p).__name__ == "Params4bit" else torch.float32
            ), name
        adapted = qlora(model, base).train()
        loss_of(adapted).backward()
        plain = qlora(
            prepare_model_for_kbit_training(
                quantize_model(make(base.name).bfloat16(), backend), False
            ),
            base,
        ).train()
        loss_of(plain).backward()
        expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
        for name, p in adapted.named_parameters():
            if p.requires_grad:
                close(p.grad, expected[name])
                assert p.grad.abs().max() > 0

    def test_gradients_over_bitsandbytes_are_ours_but_for_its_rounding(
        self, monkeypatch
    ):
        """Its backward pass makes the dense weight in the type that was quantised, here
        16 bits; its forward pass, and ours, does not."""
        base, results = BASES["hf_llama"], []

        def rounding(ctx, dy):
            return dy @ dequantize_nf4(ctx.q, torch.bfloat16).to(dy.dtype), None, None

        for backend in BACKENDS:
            if backend == "torch":
                monkeypatch.setattr(
                    linear4bit.MatMul4bit, "backward", staticmethod(rounding)
                )
            model = qlora(
                prepare_model_for_kbit_training(
                    quantize_model(make(base.name).bfloat16(), backend), False
                ),
                base,
            ).train()
            loss_of(model).backward()
            results.append(
                [run(model), *(p.grad for p in model.parameters() if p.requires_grad)]
            )
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)

    def test_prepare_leaves_a_dense_model_without_checkpointing(self):
        model = prepare_model_for_kbit_training(make("llama").bfloat16())
        assert not model.is_gradient_checkpointing and {
            p.dtype for p in model.parameters()
        } == {torch.float32}

    def test_configurations(self):
        parse = BitsAndBytesConfig.make
        assert parse("nf4").options() == dict(
            backend="torch",
            skip=("lm_head",),
            quant_type="nf4",
            double_quant=True,
            compute_dtype=None,
            block_size=64,
        )
        assert (
            parse(
                dict(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype="bfloat16",
                    backend="bitsandbytes",
                )
            ).options()["compute_dtype"]
            == torch.bfloat16
        )
        import transformers

        theirs = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        assert (
            parse(theirs).options()["double_quant"]
            and parse(theirs.to_dict()).options() == parse(theirs).options()
        )
        for wrong in (
            dict(load_in_8bit=True, load_in_4bit=False),
            dict(bnb_4bit_quant="nf4"),
        ):
            with pytest.raises(ValueError, match="bnb_4bit_quant_type"):
                parse(wrong)

    @pytest.mark.parametrize("given", [True, 4, object()])
    def test_what_is_no_configuration(self, given):
        with pytest.raises(ValueError, match="quantization = .*expected 'nf4'"):
            BitsAndBytesConfig.make(given)

    @pytest.mark.parametrize("name", ["load_in_4bit", "bnb_4bit_use_double_quant"])
    def test_a_text_is_neither_yes_nor_no(self, name):
        with pytest.raises(ValueError, match=f"unknown {name} 'false'.*True, False"):
            BitsAndBytesConfig(**{name: "false"})


class TestStateDict:
    """What does not fit is refused; nothing is half-loaded, nothing ignored."""

    @pytest.mark.parametrize("shape", [(60, 32), (64, 31), (32, 64), (128, 16)])
    def test_a_dense_weight_of_another_shape(self, shape):
        layer = Linear4bit.from_linear(nn.Linear(64, 32))
        before = layer.weight.clone()
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict(nn.Linear(*shape).state_dict())
        assert torch.equal(layer.weight, before)

    @pytest.mark.parametrize("shape", [(60, 32), (32, 64), (128, 16)])
    def test_a_packed_weight_of_another_shape(self, shape):
        layer = Linear4bit.from_linear(nn.Linear(64, 32, bias=False))
        other = Linear4bit.from_linear(nn.Linear(*shape, bias=False)).state_dict()
        with pytest.raises(ValueError, match=r"weight: found .*, expected \(32, 64\)"):
            layer.load_state_dict(other)

    @pytest.mark.parametrize("key", ["weight.scale", "weight.SCB", "weight.quant_x"])
    def test_what_belongs_to_no_weight_in_4_bits_is_unexpected(self, key):
        layer = Linear4bit.from_linear(nn.Linear(64, 32))
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
            layer.load_state_dict({**layer.state_dict(), key: torch.ones(2)})
        dense = nn.Linear(64, 32).state_dict() | {"weight.absmax": torch.ones(32)}
        with pytest.raises(RuntimeError, match="Unexpected key.*weight.absmax"):
            layer.load_state_dict(dense)

    @pytest.mark.parametrize("strict", [True, False])
    def test_a_packed_weight_without_its_scales(self, strict):
        layer = Linear4bit.from_linear(nn.Linear(64, 32))
        state = {k: v for k, v in layer.state_dict().items() if "weight." not in k}
        assert set(state) == {"weight", "bias"}
        with pytest.raises(ValueError, match="without its quant_state and absmax"):
            layer.load_state_dict(state, strict=strict)

    @pytest.mark.parametrize(
        "key, change",
        [
            ("weight", lambda t: t[:-1]),
            ("weight.absmax", lambda t: t[:-1]),
            ("weight.nested_absmax", lambda t: t.repeat(2)),
            ("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-5]),
            ("weight.quant_state.bitsandbytes__nf4", lambda t: t * 0 + 91),
        ],
    )
    def test_parts_that_do_not_fit_together(self, key, change):
        layer = Linear4bit.from_linear(nn.Linear(64, 32))
        state = layer.state_dict()
        state[key] = change(state[key])
        with pytest.raises(ValueError, match="^weight: "):
            layer.load_state_dict(state)

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
    def test_a_stored_weight_that_was_not_floating_point(self, dtype):
        layer = Linear4bit.from_linear(nn.Linear(64, 32))
        layer.dtype = getattr(torch, dtype)
        with pytest.raises(ValueError, match=f"quant_state is damaged.*{dtype}"):
            layer.load_state_dict(layer.state_dict())

    def test_a_weight_that_is_missing(self):
        layer = Linear4bit.from_linear(nn.Linear(64, 32))
        with pytest.raises(RuntimeError, match='Missing key.* "weight"'):
            layer.load_state_dict({"bias": torch.zeros(32)})


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64)])
def test_any_number_of_dimensions_with_a_trained_bias(shape):
    dense = nn.Linear(64, 32)
    layer = Linear4bit.from_linear(dense)
    twin = nn.Linear(64, 32)
    twin.weight.data = read_weight(layer)
    twin.bias.data = dense.bias.data.clone()
    x, y = (torch.randn(shape).requires_grad_() for _ in range(2))
    y.data = x.data
    layer(x).square().sum().backward()
    twin(y).square().sum().backward()
    for ours, exact in ((x.grad, y.grad), (layer.bias.grad, twin.bias.grad)):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(
    "skip, near",
    [(["q_prj"], "q_proj"), ("up_porj", "up_proj"), (("Q_PROJ",), "q_proj")],
)
def test_a_skipped_name_that_no_layer_has(skip, near):
    model = make("llama")
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        quantize_model(model, skip=skip)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())
    assert quantize_model(model, skip="q_proj").model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [nn.Linear, Linear4bit])
def test_a_layer_that_is_no_model(made, backend):
    """There is no place to put the new layer in."""
    with pytest.raises(ValueError, match=f"a {made.__name__} itself.*from_linear"):
        quantize_model(made(64, 64), backend)


class Twice(nn.Module):
    """One Linear at two places: under two names, in one list, in two parents."""

    def __init__(self, where):
        super().__init__()
        self.plain = nn.Linear(64, 64)
        shared = nn.Linear(64, 64)
        self.a = shared
        if where == "names":
            self.b = shared
        elif where == "list":
            self.b = nn.Sequential(nn.ReLU(), shared)
        else:
            self.a, self.b = nn.Sequential(shared), nn.ModuleDict({"x": shared})


@pytest.mark.parametrize("where", ["names", "list", "parents"])
def test_one_layer_at_two_places(where):
    model = Twice(where)
    with pytest.raises(minipeft.TargetError, match="^a.*stands at 2 places.*quantised"):
        quantize_model(model)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())
    left = quantize_model(model, skip=["a", "a.0"][where == "parents"])
    assert type(left.plain) is Linear4bit


def test_one_block_at_two_places():
    """Its layer has one parent: all see the new one."""
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model = quantize_model(nn.Sequential(block, block))
    assert type(model[0][0]) is Linear4bit and model[1][0] is model[0][0]


def test_importing_it_greets_nobody():
    import subprocess
    import sys

    code = (
        "import minipeft.quant, torch;"
        "m = torch.nn.Sequential(torch.nn.Linear(64, 64));"
        "minipeft.quant.quantize_model(m, backend='bitsandbytes')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("saved", ["mlp", "down_proj", "layers.1", "self_attn"])
def test_a_quantised_module_cannot_be_saved_whole(saved):
    """It has no floats to train: refused, and the model is as before."""
    model = quantize_model(BASES["llama"].make())
    before, names = run(model), [name for name, _ in model.named_modules()]
    config = minipeft.LoraConfig(target_modules=["q_proj"], modules_to_save=[saved])
    if saved != "down_proj":
        config.target_modules = ["embed_tokens"]
    with pytest.raises(minipeft.TargetError, match="is quantised"):
        minipeft.get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(run(model), before)
