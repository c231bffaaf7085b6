"""Bottleneck adapters against nn.Sequential written from the papers' equations, and
found in models by structure."""

import copy
from pathlib import Path

import pytest
import torch
from bases import BASES, close, differ, inputs, loss_of, run, shake
from safetensors.torch import load_file
from tolerance import assert_within, size
from torch import nn

import minipeft
from minipeft import (
    BottleneckConfig,
    ConfigError,
    FusionConfig,
    LoraConfig,
    TargetError,
    get_peft_model,
)
from minipeft.methods.bottleneck import Bottleneck
from minipeft.slot import Slot
from minipeft.targets import walk

ACTS = {"swish": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU()}
# what a block has
NAMED = {"llama": ("self_attn.o_proj", "mlp"), "hf_gpt2": ("attn.c_proj", "mlp")}
TRANSFORMERS = [base for base in BASES.values() if base.layered]


class After(nn.Module):
    """h <- h + s A(h): Houlsby et al. 2019, section 2.1, behind a part of the block."""

    def __init__(self, part, adapter, scaling):
        super().__init__()
        self.part, self.adapter, self.scaling = part, adapter, scaling

    def forward(self, *args, **kwargs):
        h = self.part(*args, **kwargs)
        return h + self.scaling * self.adapter(h)


class Beside(After):
    """h <- f(x) + s A(x): He et al. 2021, table 1"""

    def forward(self, x):
        return self.part(x) + self.scaling * self.adapter(x)


def by_hand(base, placement, ours, act, scaling):
    """The same model with nn.Sequential adapters put in by hand, taking over our
    adapters' numbers."""
    model = base.make()
    attention, feed_forward = NAMED.get(base.name, NAMED["llama"])
    for path, parent, name, module in list(walk(model)):
        if (
            path.endswith("." + feed_forward)
            or path.endswith("." + attention)
            and placement == "houlsby"
        ):
            mine = ours._adapters_by_path("default")[path]
            adapter = nn.Sequential(
                nn.Linear(16, mine.adapter_down.out_features),
                act,
                nn.Linear(mine.adapter_down.out_features, 16),
            )
            adapter[0].load_state_dict(mine.adapter_down.state_dict())
            adapter[2].load_state_dict(mine.adapter_up.state_dict())
            setattr(
                parent,
                name,
                (Beside if placement == "parallel" else After)(
                    module, adapter, scaling
                ),
            )
    return model


HUB = Path(__file__).parent / "data" / "adapters_hub"
# two layers of nine sums, of at most 4 · 32 terms, and of an adapter's two after each
HUB_SUMS = dict(terms=4 * 32, steps=2 * (9 + 2 * 2))


def hub_base(name):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(HUB / name).eval()


def fill(model, recorded, theirs, mine="default"):
    """Copy an adapter of adapter-hub's file into ours, layer by layer."""
    for path, part in model._adapters_by_path(mine).items():
        layer = next(step for step in path.split(".") if step.isdigit())
        where = "attention_adapters" if "attn" in path else "output_adapters"
        prefix = f".{layer}.{where}.adapters.{theirs}."
        found = {
            key.split(prefix)[1]: value
            for key, value in recorded.items()
            if prefix in key
        }
        scaling = found.pop("scaling", None)
        if scaling is not None:
            part.scaling.data.copy_(scaling)
        part.load_state_dict(
            {key.replace("down.0", "down"): value for key, value in found.items()},
            strict=False,
        )
        assert len(found) == 4


class TestAgainstAdapterHub:
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    @pytest.mark.parametrize(
        "case, fields",
        [
            ("pfeiffer", {}),
            ("parallel", {"placement": "parallel"}),
            ("parallel_learned_scale", {"placement": "parallel", "scaling": "learned"}),
        ],
    )
    def test_what_reads_the_stream_equals_adapter_hub(self, name, case, fields):
        """adapter-hub/adapters 1.3.0 with the same weights; reads="sublayer"
        differs."""
        recorded = load_file(HUB / f"{name}_{case}.safetensors")
        effect = (recorded["logits"] - recorded["base_logits"]).abs().max()
        for reads in ("stream", "sublayer"):
            config = BottleneckConfig(r=4, reads=reads, **fields)
            model = get_peft_model(hub_base(name), config).eval()
            fill(model, recorded, "a")
            with torch.no_grad():
                logits = model(input_ids=recorded["input_ids"]).logits
            if reads == "stream":
                assert_within(logits, recorded["logits"], **HUB_SUMS)
            else:
                assert (logits - recorded["logits"]).abs().max() > 0.1 * effect

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_houlsby_equals_adapter_hub(self, name):
        recorded = load_file(HUB / f"{name}_houlsby.safetensors")
        config = BottleneckConfig(r=4, placement="houlsby")
        model = get_peft_model(hub_base(name), config).eval()
        fill(model, recorded, "a")
        with torch.no_grad():
            logits = model(input_ids=recorded["input_ids"]).logits
        differ(recorded["logits"], recorded["base_logits"], 1e-2)
        assert_within(logits, recorded["logits"], **HUB_SUMS)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_fusion_of_two_that_read_the_stream_equals_adapter_hub(self, name):
        recorded = load_file(HUB / f"{name}_fusion.safetensors")
        model = get_peft_model(
            hub_base(name), BottleneckConfig(r=4, reads="stream"), "a"
        )
        model.add_adapter("b", BottleneckConfig(r=4, reads="stream"))
        for expert in ("a", "b"):
            fill(model, recorded, expert, expert)
        model.add_adapter("fusion", FusionConfig(adapters=["a", "b"]))
        queries = []  # over which the scores sum: they are larger than the logits
        for path, part in model._adapters_by_path("fusion").items():
            part.query.register_forward_hook(lambda *call: queries.append(call[-1]))
            layer = path.rpartition(".")[2]
            for key, parameter in part.named_parameters():
                (theirs,) = (
                    value
                    for full, value in recorded.items()
                    if full.endswith(
                        f".{layer}.output_adapters.adapter_fusion_layer.a,b.{key}"
                    )
                )
                parameter.data.copy_(theirs)
        model.set_adapter("fusion")
        with torch.no_grad():
            logits = model.eval()(input_ids=recorded["input_ids"]).logits
        differ(recorded["logits"], recorded["base_logits"], 1e-2)
        # in each layer two experts, and of fusion query, key, scores, value and mean
        steps = 2 * (9 + 2 * 2 + 5)
        sums = dict(terms=4 * 32, steps=steps, least=size(*queries))
        assert_within(logits, recorded["logits"], **sums)

    @pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
    @pytest.mark.parametrize("base", TRANSFORMERS, ids=str)
    def test_reading_the_stream_starts_as_nothing_trains_and_is_saved(
        self, base, placement, tmp_path
    ):
        config = BottleneckConfig(r=3, placement=placement, reads="stream")
        model = get_peft_model(base.make(), config)
        close(run(model), run(base.make()), 0)
        shake(model).save_pretrained(tmp_path)
        again = minipeft.PeftModel.from_pretrained(base.make(), tmp_path)
        assert torch.equal(run(again), run(model))
        differ(run(model), run(base.make()))
        loss_of(model).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(gradients) == 2 * 4 and all(g.abs().max() > 0 for g in gradients)
        with model.disable_adapter():
            close(run(model), run(base.make()), 0)

    def test_the_streams_gradient_passes_a_checkpoint_or_is_refused(self):
        base = BASES["hf_llama"]
        config = BottleneckConfig(r=3, placement="parallel", reads="stream")
        gradients = {}
        for reentrant in (None, False, True):
            torch.manual_seed(0)
            model = shake(get_peft_model(base.make(), config)).train()
            if reentrant is not None:
                model.get_base_model().gradient_checkpointing_enable(
                    {"use_reentrant": reentrant}
                )
                model.get_base_model().enable_input_require_grads()
            if reentrant:
                with pytest.raises(RuntimeError, match="use_reentrant=False"):
                    model(**inputs())
                continue
            model(**inputs()).logits.logsumexp(-1).mean().backward()
            gradients[reentrant] = [
                p.grad for p in model.parameters() if p.requires_grad
            ]
        for plain, checkpointed in zip(*gradients.values()):
            close(plain, checkpointed)

    def test_who_cannot_read_the_stream(self):
        llama = BASES["llama"].make
        with pytest.raises(ConfigError, match="houlsby reads the part's output"):
            BottleneckConfig(placement="houlsby", reads="stream")
        stream = BottleneckConfig(r=2, placement="parallel", reads="stream")
        model = get_peft_model(llama(), stream, "a")
        model.add_adapter("b", stream)
        with pytest.raises(TargetError, match="reads the stream within the block"):
            model.add_adapter("fusion", FusionConfig(adapters=["a", "b"]))
        three = llama()
        for block in three.model.layers:
            block.another_norm = nn.LayerNorm(16)
        with pytest.raises(TargetError, match="layers.0: .* has 3 norms"):
            get_peft_model(three, stream)


class TestConfig:
    @pytest.mark.parametrize(
        "fields",
        [
            dict(r=5),
            dict(reduction_factor=4),
            dict(non_linearity="gelu"),
            dict(scaling=0.5),
            dict(placement="parallel", non_linearity="gelu", r=2),
        ],
    )
    def test_fields(self, fields):
        base, config = BASES["llama"], BottleneckConfig(**fields)
        model = shake(get_peft_model(base.make(), config))
        oracle = by_hand(
            base,
            config.placement,
            model,
            ACTS[fields.get("non_linearity", "relu")],
            fields.get("scaling", 4.0 if config.placement == "parallel" else 1.0),
        )
        close(run(model), run(oracle))
        part = next(iter(model._adapters_by_path("default").values()))
        assert part.adapter_down.out_features == fields.get(
            "r", 4 if "reduction_factor" in fields else 1
        )

    def test_a_learned_scaling_starts_at_one_and_learns(self):
        learned, fixed = (
            shake(
                get_peft_model(BASES["llama"].make(), BottleneckConfig(r=3, scaling=s)),
                step=0,
            )
            for s in ("learned", 1.0)
        )
        for model in (learned, fixed):
            torch.manual_seed(0)
            for part in model._adapters_by_path("default").values():
                part.reset_parameters("bert")
        close(run(learned), run(fixed), 0)
        learned(**inputs(), labels=inputs()["input_ids"]).loss.backward()
        for part in learned._adapters_by_path("default").values():
            assert (
                part.scaling.shape == (1,)
                and part.scaling.item() == 1
                and part.scaling.grad.abs() > 0
            )

    @pytest.mark.parametrize(
        "init, down, up",
        [
            ("identity", 0.02, 0.0),
            ("bert", 0.02, 0.02),
            ("mam", (1 / 300) ** 0.5 / 3**0.5, 0.0),
        ],
    )
    def test_inits_as_the_library_adapters_has_them(self, init, down, up):
        torch.manual_seed(0)
        adapter = Bottleneck(300, 200, 300, False, "relu", 1.0)
        adapter.reset_parameters(init)
        assert abs(adapter.adapter_down.weight.std().item() - down) < 0.02 * down
        assert abs(adapter.adapter_up.weight.std().item() - up) <= 0.02 * up
        assert (
            adapter.adapter_down.bias.abs().max()
            == adapter.adapter_up.bias.abs().max()
            == 0
        )
        x = torch.randn(4, 300)
        assert (adapter(nn.Identity(), x) - x).abs().max() <= (0.5 if up else 0)

    def test_norms_are_trained_and_saved_if_asked_for(self, tmp_path):
        base = BASES["hf_gpt2"]
        model = get_peft_model(base.make(), BottleneckConfig(r=2, train_layernorm=True))
        names = {
            n.rpartition(".adapters")[0].rpartition(".")[2]
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        assert names == {"ln_1", "ln_2", "ln_f", "mlp"}
        shake(model).save_pretrained(tmp_path)
        again = minipeft.PeftModel.from_pretrained(base.make(), tmp_path)
        assert torch.equal(run(again), run(model))

    @pytest.mark.parametrize(
        "fields, message",
        [
            (
                dict(placement="houlsbi"),
                "unknown placement 'houlsbi' .did you mean 'houlsby'",
            ),
            (dict(r=0), "r = 0"),
            (dict(r=-1), "r = -1"),
            (dict(r=2.5), "r = 2.5"),
            (dict(r=4, reduction_factor=2), "not both"),
            (dict(reduction_factor=0), "reduction_factor = 0"),
            (
                dict(non_linearity="rulu"),
                "unknown non_linearity 'rulu' .did you mean 'relu'",
            ),
            (
                dict(init="zero"),
                "unknown init 'zero'; expected one of identity, bert, mam",
            ),
            (
                dict(reads="norm"),
                "unknown reads 'norm'; expected one of sublayer, stream",
            ),
            (dict(scaling="learnt"), "'learned'"),
        ],
    )
    def test_wrong_configurations(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            BottleneckConfig(**fields)


class TestPlacements:
    @pytest.mark.parametrize("base", TRANSFORMERS, ids=str)
    @pytest.mark.parametrize(
        "placement, act, scaling, r",
        [
            ("houlsby", "swish", 1.0, 1),
            ("pfeiffer", "relu", 1.0, 1),
            ("parallel", "relu", 4.0, 8),
        ],
    )
    def test_each_placement_is_the_papers_equation_found_by_structure(
        self, base, placement, act, scaling, r
    ):
        model = shake(
            get_peft_model(base.make(), BottleneckConfig(placement=placement))
        )
        parts = model._adapters_by_path("default")
        assert len(parts) == (4 if placement == "houlsby" else 2)  # 2 layers
        oracle = by_hand(base, placement, model, ACTS[act], scaling)
        close(run(model), run(oracle))
        differ(run(model), run(base.make()))
        count = 2 * 16 * r + r + 16  # 2 d m + m + d, d = 16
        assert {
            sum(p.numel() for p in part.parameters()) for part in parts.values()
        } == {count}
        assert model.get_nb_trainable_parameters()[0] == len(parts) * count
        for each in (model, oracle):
            (each(**inputs()).logits.logsumexp(-1).mean()).backward()
        mine = [
            p.grad
            for _, part in sorted(parts.items())
            for p in (*part.adapter_down.parameters(), *part.adapter_up.parameters())
        ]
        theirs = [
            p.grad
            for _, module in sorted(oracle.named_modules())
            if isinstance(module, After)
            for p in module.adapter.parameters()
        ]
        assert len(mine) == len(theirs) and max(g.abs().max() for g in mine) > 1e-6
        for a, b in zip(mine, theirs):
            close(a, b)

    @pytest.mark.parametrize("name", ["llama", "hf_llama", "hf_gpt2"])
    def test_parallel_to_attention(self, name):
        """attention takes more than x, and may be called by keyword and give a tuple"""
        base = BASES[name]
        attention = "attn" if name == "hf_gpt2" else "self_attn"
        model = shake(
            get_peft_model(
                base.make(),
                BottleneckConfig(r=3, placement="parallel", target_modules=[attention]),
            )
        )
        seen, plain = [], base.make()
        for path, _, _, module in list(walk(plain)):
            if path.endswith("." + attention):
                mine = model._adapters_by_path("default")[path]

                def hook(module, args, kwargs, output, mine=mine):
                    x = args[0] if args else kwargs["hidden_states"]
                    seen.append(x)
                    y, *rest = output if isinstance(output, tuple) else [output]
                    y = y + 4 * mine.adapter_up(mine.adapter_down(x).clamp(min=0))
                    return (y, *rest) if isinstance(output, tuple) else y

                module.register_forward_hook(hook, with_kwargs=True)
        close(run(model), run(plain))
        assert len(seen) == 2
        with pytest.raises(ValueError, match="more than one tensor.*last linear"):
            run(model, adapter_names=["default", "__base__", "default"])

    def test_beside_a_lora_within_the_same_module(self):
        base = BASES["llama"]
        model = get_peft_model(base.make(), BottleneckConfig(r=3), "bottleneck")
        model.add_adapter(
            "lora", LoraConfig(r=2, target_modules=["down_proj", "q_proj"])
        )
        shake(shake(model, "bottleneck"), "lora")
        model.set_adapter(["bottleneck", "lora"])
        both = run(model)
        merged = copy.deepcopy(model)
        merged.merge_adapter(["lora"])
        close(run(merged), both)
        plain = get_peft_model(
            base.make(), LoraConfig(r=2, target_modules=["down_proj", "q_proj"])
        )
        plain.add_adapter("bottleneck", BottleneckConfig(r=3))
        for path, part in {**model._adapters_by_path("lora")}.items():
            plain._adapters_by_path("default")[path].load_state_dict(part.state_dict())
        for path, part in model._adapters_by_path("bottleneck").items():
            plain._adapters_by_path("bottleneck")[path].load_state_dict(
                part.state_dict()
            )
        plain.set_adapter(["default", "bottleneck"])
        close(run(plain), both)

    @pytest.mark.parametrize(
        "placement, count", [("houlsby", 10), ("pfeiffer", 4), ("parallel", 4)]
    )
    def test_blocks_whose_parts_stand_in_a_list(self, placement, count):
        """As a T5's; its decoder has two attentions a block."""
        transformers = pytest.importorskip("transformers")
        sizes = dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
        config = transformers.T5Config(
            vocab_size=40, decoder_start_token_id=0, pad_token_id=0, **sizes
        )
        base = transformers.T5ForConditionalGeneration(config).eval()
        ids = torch.randint(1, 40, (2, 6))
        before = base(input_ids=ids, labels=ids).logits
        model = get_peft_model(base, BottleneckConfig(r=3, placement=placement)).eval()
        assert len(model._adapters_by_path("default")) == count
        close(model(input_ids=ids, labels=ids).logits, before)
        shake(model)
        model(input_ids=ids, labels=ids).loss.backward()
        for p in model.parameters():
            assert not p.requires_grad or p.grad.abs().max() > 0
        differ(model(input_ids=ids, labels=ids).logits, before)

    @pytest.mark.parametrize("reads", ["sublayer", "stream"])
    def test_experts_whose_last_layer_is_a_gate(self, reads):
        """Of one number, (d, 1): no width of the stream."""
        transformers = pytest.importorskip("transformers")
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4)
        sizes |= dict(num_key_value_heads=2, num_experts=4, moe_intermediate_size=8)
        config = transformers.Qwen2MoeConfig(vocab_size=40, **sizes)
        base = transformers.Qwen2MoeForCausalLM(config).eval()
        ids = torch.arange(6)[None]
        before = base(ids).logits
        model = get_peft_model(base, BottleneckConfig(r=3, reads=reads)).eval()
        close(model(ids).logits, before)
        differ(shake(model)(ids).logits, before)

    def test_where_no_blocks_are(self):
        with pytest.raises(TargetError, match="say target_modules"):
            get_peft_model(BASES["mlp"].make(), BottleneckConfig())
        with pytest.raises(TargetError, match="norm: RMSNorm has no linear layers"):
            get_peft_model(
                BASES["llama"].make(), BottleneckConfig(target_modules=["norm"])
            )
        assert not any(isinstance(m, Slot) for m in BASES["llama"].make().modules())
