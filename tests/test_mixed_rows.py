"""A batch whose rows have different LoRAs, by two batched products: equal to the batch
split by rows, in outputs and all gradients; and split where the equation is another."""

import pytest
import torch
from bases import BASES, close, run
from tolerance import assert_within, size
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipeft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SubspaceConfig,
    get_peft_model,
)
from minipeft.methods.lora import Lora

D_IN, D_OUT, T = 24, 32, 5
# (dtype of the layer, dtype of x, autocast, bias of the layer)
SETTINGS = {
    "fp32": (torch.float32, torch.float32, False, True),
    "fp64, no bias": (torch.float64, torch.float64, False, False),
    "bf16 layer, fp32 adapters": (torch.bfloat16, torch.bfloat16, False, True),
    "autocast": (torch.float32, torch.float32, True, True),
}
BATCHES = {
    "each row its own": ["a", "b", "c"],
    "in another order": ["c", "a", "b"],
    "rows without": ["__base__", "b", "__base__", "a"],
    "repeated": ["b", "b", "a", "b"],
    "one row": ["c"],
    "elsewhere": ["a", "elsewhere", "b"],
}
CONFIGS = {
    "a": dict(r=4, lora_alpha=12),
    "b": dict(r=1, lora_alpha=2),
    "c": dict(r=6, lora_alpha=3, use_rslora=True),
}


def make(dtype=torch.float32, bias=True, change=None):
    """A model of two layers with adapters of three ranks and scalings on the first, and
    one on the other layer alone; all numbers of the adapters moved."""
    torch.manual_seed(0)
    layers = nn.Linear(D_IN, D_OUT, bias=bias), nn.Linear(D_OUT, D_OUT)
    model = nn.Sequential(*layers).to(dtype)
    fields = {name: dict(CONFIGS[name]) for name in CONFIGS}
    for name in fields:
        fields[name] |= dict(target_modules=["0"]) | (change or {}).get(name, {})
    peft_model = get_peft_model(model, LoraConfig(**fields["a"]), "a")
    for name in ("b", "c"):
        peft_model.add_adapter(name, LoraConfig(**fields[name]))
    peft_model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["1"]))
    if dtype == torch.float64:
        peft_model.double()
    with torch.no_grad():
        for name, p in peft_model.named_parameters():
            if ".adapters." in name:
                p += 0.3 * torch.randn_like(p)
                p.requires_grad_()
    peft_model.set_adapter(["a", "b", "c", "elsewhere"])
    return peft_model


def outputs_and_gradients(model, names, dtype, autocast, shape=(T, D_IN)):
    """(y, {name: gradient}), x's among them; None where there is no gradient."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(names), *shape, generator=generator).to(dtype)
    x.requires_grad_()
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad} | {"x": x}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, adapter_names=names)
    upstream = torch.randn(y.shape, generator=generator)
    loss = (y.float() * upstream).sum()
    found = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    return y, dict(zip(leaves, found))


class Counted:
    """The kernel, and how often it gave a result."""

    def __init__(self):
        self.kernel = vars(Lora)["rows_kernel"]
        self.used = 0

    def __call__(self, *given):
        y = self.kernel(*given)
        self.used += y is not None
        return y


@pytest.fixture
def counted(monkeypatch):
    counter = Counted()
    monkeypatch.setattr(Lora, "rows_kernel", staticmethod(counter))
    return counter


def split(monkeypatch):
    monkeypatch.setattr(Lora, "rows_kernel", None)


class TestGroupedEqualsSplit:
    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("batch", BATCHES)
    def test_outputs_and_gradients(self, batch, setting, counted, monkeypatch):
        layer, dtype, autocast, bias = SETTINGS[setting]
        names = BATCHES[batch]
        model = make(layer, bias)
        y, gradients = outputs_and_gradients(model, names, dtype, autocast)
        assert counted.used == 1 + ("elsewhere" in names)
        split(monkeypatch)
        expected, right = outputs_and_gradients(model, names, dtype, autocast)
        assert y.dtype == expected.dtype
        coarse = torch.bfloat16 if autocast else layer
        # bf16: each of a chain of four products is rounded; else sums of up to
        # D_OUT terms, two layers deep, or over the tokens of all rows
        chain = dict(steps=4) if coarse == torch.bfloat16 else dict(terms=64, steps=4)
        assert_within(y, expected, dtype=coarse, **chain)
        for name, gradient in right.items():
            other = gradients[name]
            if gradient is None:  # stacked all the same, and gets zero
                assert other is None or not other.any(), name
            else:
                assert gradient.abs().max() > 0, name
                assert_within(other, gradient, dtype=coarse, **chain)

    def test_each_row_is_what_its_adapter_gives_alone(self):
        model = make(torch.float64)
        names = ["a", "__base__", "c", "b", "c"]
        x = torch.randn(5, T, D_IN, dtype=torch.float64)
        mixed = model(x, adapter_names=names)
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(x[row : row + 1])
            else:
                model.set_adapter(name)
                alone = model(x[row : row + 1])
            assert_within(mixed[row : row + 1], alone, terms=D_OUT, steps=4)

    @pytest.mark.parametrize("shape", [(D_IN,), (2, T, D_IN), (0, D_IN)])
    def test_any_number_of_dimensions(self, shape, counted, monkeypatch):
        model = make(torch.float64)
        given = torch.randn(3, *shape, dtype=torch.float64)
        y = model(given, adapter_names=["a", "b", "c"])
        assert counted.used == 1
        split(monkeypatch)
        expected = model(given, adapter_names=["a", "b", "c"])
        assert y.shape == expected.shape
        if expected.numel():
            assert_within(y, expected, terms=D_OUT, steps=4)

    def test_several_rows_for_a_name_as_in_beam_search(self, counted, monkeypatch):
        slot = make(torch.float64).get_base_model()[0]
        from minipeft.slot import RowAdapters

        x = torch.randn(6, T, D_IN, dtype=torch.float64)
        for names in (["a", "c"], ["b", "__base__", "a"]):
            y = slot.forward_mixed_batch(RowAdapters(names), x)
            each = 6 // len(names)
            for row in range(6):
                slot.active.names = [names[row // each]]
                assert_within(y[row], slot(x[row]), terms=D_OUT, steps=2)
        assert counted.used == 2
        with pytest.raises(ValueError, match="4 adapter_names for a batch of 6 rows"):
            slot.forward_mixed_batch(RowAdapters(["a"] * 4), x)

    @pytest.mark.parametrize("kind", ["llama", "hf_gpt2"])
    def test_whole_models_and_ranks_by_pattern(self, kind, counted, monkeypatch):
        base = BASES[kind]
        torch.manual_seed(0)
        field = {"target_modules": "all-linear", "init_lora_weights": False}
        model = get_peft_model(base.make(), LoraConfig(r=3, **field), "a")
        pattern = {"q_proj": 7} if kind == "llama" else {"c_attn": 5}
        model.add_adapter("b", LoraConfig(r=2, rank_pattern=pattern, **field))
        names = ["b", "__base__", "a"]
        grouped = run(model, adapter_names=names)
        assert counted.used > 4
        split(monkeypatch)
        close(grouped, run(model, adapter_names=names))


class TestWhereItIsSplit:
    def used(self, model, counted, names=("a", "b", "c")):
        before = counted.used
        x = torch.randn(len(names), T, D_IN)
        y = model(x, adapter_names=list(names))
        for row, name in enumerate(names):  # and right all the same
            if not model.training:
                model.set_adapter(name)
                close(y[row], model(x[row : row + 1])[0])
        return counted.used > before

    def test_dropout_in_training(self, counted):
        model = make(change={"b": dict(lora_dropout=0.5)})
        assert not self.used(model.train(), counted)
        assert self.used(model, counted, ["a", "c"])  # these two have none
        assert self.used(model.eval(), counted)

    def test_dora(self, counted):
        model = make(change={"c": dict(use_dora=True)}).eval()
        assert not self.used(model, counted)
        assert self.used(model, counted, ["a", "b", "b"])

    def test_a_bias_on_B(self, counted):
        model = make(change={"a": dict(lora_bias=True)}).eval()
        assert not self.used(model, counted)
        assert self.used(model, counted, ["b", "c"])

    def test_a_hook_that_wants_to_see_the_rows(self, counted):
        model = make().eval()
        seen = []
        adapter = model.get_base_model()[0].adapters["b"]
        hook = adapter.register_forward_hook(lambda m, x, y: seen.append(y.shape))
        assert not self.used(model, counted)
        assert seen
        hook.remove()
        assert self.used(model, counted)

    def test_adapters_of_several_precisions(self, counted):
        model = make().eval()
        model.get_base_model()[0].adapters["c"].double()
        model(torch.randn(3, T, D_IN), adapter_names=["a", "b", "c"])
        assert counted.used == 0

    def test_a_subclass_has_its_own_equation(self, counted):
        class Doubled(Lora):
            def update(self, base, x):
                return 2 * super().update(base, x)

        model = make().eval()
        model.get_base_model()[0].adapters["b"].__class__ = Doubled
        assert Doubled.rows_kernel is None
        assert not self.used(model, counted)

    def test_embeddings(self, counted):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 6))
        field = dict(target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(model, LoraConfig(r=2, **field), "a")
        model.add_adapter("b", LoraConfig(r=3, **field))
        ids = torch.tensor([[1, 2], [3, 4]])
        y = model(ids, adapter_names=["a", "b"])
        assert counted.used == 0
        model.set_adapter("b")
        close(y[1], model(ids)[1])


def test_values_far_apart_do_not_leak_into_other_rows():
    model = make().eval()
    x = torch.randn(3, T, D_IN)
    quiet = model(x, adapter_names=["a", "b", "__base__"])
    loud = x.clone()
    loud[0] = 1e6
    heard = model(loud, adapter_names=["a", "b", "__base__"])
    assert_within(heard[1:], quiet[1:], terms=D_OUT, steps=4)
    assert size(heard[0]) > 1e4


def hf(name, **fields):
    """A tiny random model of the transformers library."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig if name.startswith("Bert") else None
    config = config or getattr(transformers, f"{name.partition('For')[0]}Config")
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16)
    if name.startswith("T5"):
        sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    else:
        sizes["intermediate_size"] = 24
    model = getattr(transformers, name)(config(vocab_size=40, **sizes, **fields))
    return model.eval()


def around(base, **configs):
    """`base` with adapters around the whole model, moved off their start."""
    first, *others = configs
    model = get_peft_model(base, configs[first], first)
    for name in others:
        model.add_adapter(name, configs[name])
    model.set_requires_grad(list(configs))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    return model


IDS = torch.arange(3, 24).view(3, 7)
LABELS = IDS.masked_fill(IDS % 4 == 0, -100)


class TestAroundTheModel:
    """Groups of rows run one after the other, and their outputs are put together."""

    @pytest.mark.parametrize("items", [None, 5])
    @pytest.mark.parametrize(
        "names",
        [["a", "b", "__base__"], ["a", "a", "a"], ["b", "a", "b"], ["c", "a", "c"]],
        ids=",".join,
    )
    def test_the_loss_is_that_of_each_row_alone(self, names, items):
        configs = {
            "a": PromptTuningConfig(num_virtual_tokens=3),
            "b": PromptTuningConfig(num_virtual_tokens=5),
            "c": SubspaceConfig(d=10),
        }
        model = around(hf("LlamaForCausalLM"), **configs)
        sums = []
        for row, name in enumerate(names):
            own = dict(input_ids=IDS[row : row + 1], labels=LABELS[row : row + 1])
            if name == "__base__":
                with model.disable_adapter():
                    loss = model(**own, num_items_in_batch=1).loss
            else:
                model.set_adapter(name)
                loss = model(**own, num_items_in_batch=1).loss
            sums.append(loss)
        # the first label has a position before it only where a prompt stands there
        prompt = torch.tensor([name in "ab" for name in names])
        learnt = LABELS != -100
        learnt[~prompt, 0] = False
        given = dict(adapter_names=names, labels=LABELS)
        if items:
            given["num_items_in_batch"] = items
        # an option may come before the tensors
        mixed = model(use_cache=False, input_ids=IDS, **given)
        expected = torch.stack(sums).sum() / (items or learnt.sum())
        assert_within(mixed.loss, expected, terms=64, steps=4)

    @pytest.mark.parametrize(
        "name, labels",
        [
            ("BertForMaskedLM", LABELS),
            ("BertForTokenClassification", LABELS % 2),
            ("BertForSequenceClassification", torch.tensor([0, 1, 1])),
            ("T5ForConditionalGeneration", LABELS),
        ],
    )
    def test_other_losses_are_refused(self, name, labels):
        model = around(hf(name), a=SubspaceConfig(d=10))
        given = dict(input_ids=IDS, adapter_names=["a", "__base__", "a"])
        with pytest.raises(ValueError, match="compute it from the logits"):
            model(**given, labels=labels)

    @pytest.mark.parametrize(
        "name, options",
        [
            ("BertModel", {}),
            ("LlamaForCausalLM", {"return_dict": False}),
            ("BertForQuestionAnswering", {}),
        ],
    )
    def test_outputs_that_cannot_be_joined(self, name, options):
        model = around(hf(name), a=SubspaceConfig(d=10))
        with pytest.raises(ValueError, match="an object with logits; found a "):
            model(input_ids=IDS, adapter_names=["a", "__base__", "a"], **options)

    @pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
    def test_what_the_configuration_asks_for_is_refused_too(self, name):
        fields = {name: True, "attn_implementation": "eager"}
        model = around(hf("LlamaForCausalLM", **fields), a=SubspaceConfig(d=10))
        names = ["a", "__base__", "a"]
        with pytest.raises(ValueError, match=f"{name}: adapters around the model"):
            model(input_ids=IDS, adapter_names=names)
        plain = model(input_ids=IDS, adapter_names=names, **{name: False})
        found = {key for key, value in plain.items() if value is not None}
        assert found == {"logits"}


NAMES_OF_LORAS = ["a", "b", "__base__"]


def loras(base=None):
    """A model with LoRAs "a" (active) and "b" of random numbers, both trained."""
    torch.manual_seed(0)
    field = dict(target_modules="all-linear", init_lora_weights=False)
    model = BASES["llama"].make() if base is None else base
    model = get_peft_model(model, LoraConfig(r=2, **field), "a")
    model.add_adapter("b", LoraConfig(r=3, **field))
    model.set_requires_grad(["a", "b"])
    return model


class TestRowsBelongToOneCall:
    CALLS = {
        "the base": lambda model, ids: model.get_base_model()(ids).logits,
        "base_model": lambda model, ids: model.base_model(ids).logits,
        "its generate": lambda model, ids: model.get_base_model().generate(
            input_ids=ids, max_new_tokens=3, do_sample=False
        ),
    }

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("kind", ["llama", "hf_llama", "hf_gpt2"])
    def test_the_next_call_is_as_ever(self, kind, call):
        model, call = loras(BASES[kind].make()), self.CALLS[call]
        with torch.no_grad():
            expected = call(model, IDS), call(model, IDS[:2])
            model(input_ids=IDS, adapter_names=["b"] * 3)
            assert torch.equal(call(model, IDS), expected[0])
            model.generate(input_ids=IDS, max_new_tokens=1, adapter_names=["b"] * 3)
            assert torch.equal(call(model, IDS[:2]), expected[1])
            with pytest.raises(IndexError):
                model(input_ids=1000 * IDS, adapter_names=["b"] * 3)
            assert torch.equal(call(model, IDS), expected[0])

    def test_a_call_within_a_call_leaves_it_its_rows(self):
        model = make().eval()
        x = torch.randn(3, T, D_IN)
        names = ["a", "b", "c"]
        expected = model(x, adapter_names=names)
        within = []

        def call_once(*_):
            if not within:
                within.append(x)
                model(x)

        model.get_base_model()[0].register_forward_pre_hook(call_once)
        assert torch.equal(model(x, adapter_names=names), expected)
        assert within


class TestGeneratingWithRows:
    OPTIONS = {
        "greedy": dict(do_sample=False),
        "beams": dict(do_sample=False, num_beams=2),
        "several": dict(do_sample=True, num_return_sequences=2),
    }

    @pytest.mark.parametrize("option", OPTIONS)
    @pytest.mark.parametrize("names", [["a", "b"], ["b"], ["a"] * 8])
    @pytest.mark.parametrize("given", ["input_ids", "inputs", "first", "embeds"])
    def test_one_name_a_row(self, given, names, option):
        model = loras(BASES["hf_llama"].make())
        ids = IDS[[0, 1, 2, 0]]
        embeds = model.get_base_model().get_input_embeddings()(ids)
        args = (ids,) if given == "first" else ()
        kwargs = {} if args else {given: ids}
        if given == "embeds":
            kwargs = dict(inputs_embeds=embeds, attention_mask=torch.ones_like(ids))
        kwargs |= self.OPTIONS[option] | dict(max_new_tokens=2, pad_token_id=0)
        found = f"{len(names)} adapter_names for a batch of 4 rows: one name a row"
        with pytest.raises(ValueError, match=found):
            model.generate(*args, adapter_names=names, **kwargs)
        rows = ["a", "__base__", "b", "b"]
        generated = model.generate(*args, adapter_names=rows, **kwargs)
        assert len(generated) == 4 * (1 + (option == "several"))

    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["b"] * 6])
    def test_a_gpt_of_the_package(self, names):
        model = loras()
        ids = dict(input_ids=IDS, max_new_tokens=2)
        with pytest.raises(ValueError, match="for a batch of 3 rows: one name a row"):
            model.generate(**ids, adapter_names=names)
        assert len(model.generate(**ids, adapter_names=["a", "b", "b"])) == 3

    @pytest.mark.parametrize("names", [["a"], ["a", "b"], ["b"] * 6])
    def test_an_encoder_and_a_decoder(self, names):
        model = loras(hf("T5ForConditionalGeneration", decoder_start_token_id=0))
        given = dict(input_ids=IDS, max_new_tokens=2, num_beams=2, do_sample=False)
        with pytest.raises(ValueError, match="for a batch of 3 rows: one name a row"):
            model.generate(adapter_names=names, **given)
        assert len(model.generate(adapter_names=["a", "b", "b"], **given)) == 3

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
    def test_a_number_before_the_batch(self, dtype):
        model = loras(BASES["hf_llama"].make())
        items = dict(num_items_in_batch=torch.tensor(5, dtype=dtype))
        given = dict(input_ids=IDS, labels=IDS, adapter_names=["a", "b", "a"])
        assert torch.equal(model(**items, **given).loss, model(**given, **items).loss)


class Checkpointed(nn.Module):
    """A layer that calls torch's checkpoint itself."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer = layer
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


class TestRecomputingUnderCheckpointing:
    """Layers that run again in the backward pass do so with the rows of their call."""

    CALLS = {
        "other rows": (NAMES_OF_LORAS, ["b", "a", "a"]),
        "a batch of another size": (["a", "a", "b"], ["b", "a"]),
        "one without": (["b", "b", "a"], None),
        "the first without": (None, ["b", "__base__", "b"]),
        "three": (NAMES_OF_LORAS, None, ["b", "b", "a"]),
    }

    def gradients(self, model, calls, order=None):
        """{name: gradient} of the sum of the losses of calls with these rows, whose
        backward passes run in `order`; None: in one."""
        model.train().zero_grad()
        losses = []
        for i, names in enumerate(calls):
            ids = IDS.roll(i, 1)[: len(names) if names else 3]
            given = dict(input_ids=ids, labels=ids, adapter_names=names)
            losses.append(model(**given).loss)
        for loss in [sum(losses)] if order is None else [losses[i] for i in order]:
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n: g.clone() for n, g in found.items() if g is not None}

    def check(self, make, calls, reentrant, order=None):
        expected = self.gradients(make(), calls)
        model = make()
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        found = self.gradients(model, calls, order)
        assert found.keys() >= expected.keys()
        for name, gradient in expected.items():
            close(found[name], gradient)
        assert any(gradient.abs().max() > 1e-6 for gradient in expected.values())

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("calls", CALLS)
    @pytest.mark.parametrize("kind", ["llama", "hf_llama", "hf_gpt2"])
    def test_calls_before_one_backward_pass(self, kind, calls, reentrant):
        def make():
            return loras(BASES[kind].make())

        self.check(make, self.CALLS[calls], reentrant)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_backward_passes_in_any_order(self, order, reentrant):
        self.check(loras, self.CALLS["other rows"], reentrant, order)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize(
        "kind, config",
        [
            ("llama", PromptTuningConfig(num_virtual_tokens=3)),
            ("hf_llama", PromptTuningConfig(num_virtual_tokens=3)),
            ("llama", PrefixTuningConfig(num_virtual_tokens=2)),
        ],
    )
    def test_beside_an_adapter_around_the_model(self, kind, config, reentrant):
        def make():
            torch.manual_seed(0)
            field = dict(target_modules=["q_proj"], init_lora_weights=False)
            lora = LoraConfig(r=2, **field)
            return around(BASES[kind].make(), a=config, b=lora)

        calls = self.CALLS["other rows"]
        self.check(make, calls, reentrant)
        self.check(make, (calls[1],), reentrant)

    @pytest.mark.parametrize("kind", ["llama", "hf_llama"])
    def test_the_model_checkpoints_as_before(self, kind):
        model = loras(BASES[kind].make())
        model.gradient_checkpointing_enable()
        name = "_gradient_checkpointing_func"

        def functions():
            return [m for m in map(vars, model.modules()) if name in m]

        before = [m[name] for m in functions()]
        self.gradients(model, [NAMES_OF_LORAS])
        assert before and [m[name] for m in functions()] == before

    @pytest.mark.parametrize("around_the_model", [False, True])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints_that_are_not_seen_are_refused(
        self, reentrant, around_the_model
    ):
        layers = [nn.Linear(6, 6), Checkpointed(nn.Linear(6, 6), reentrant)]
        field = dict(r=2, init_lora_weights=False)
        inner = LoraConfig(target_modules=["0", "layer"], **field)
        model = get_peft_model(nn.Sequential(*layers), inner, "a")
        other = SubspaceConfig(d=3) if around_the_model else inner
        model.add_adapter("b", other)
        x = torch.randn(3, 6, requires_grad=True)
        rows = dict(adapter_names=NAMES_OF_LORAS)
        with pytest.raises(ValueError, match="checkpoint of the model's own.*enable"):
            model(x, **rows)
        model(x).sum().backward()  # one adapter for all rows is as ever
        with torch.no_grad():
            model(x, **rows)
