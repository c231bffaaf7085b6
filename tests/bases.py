"""The tables that the adapters' tests are crossed over: tiny models of every kind, and
the methods.

A new method is one line in METHODS.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tolerance import tolerance
from torch import nn

import minipeft

VOCABULARY, WIDTH, LAYERS = 40, 16, 2


class MLP(nn.Module):
    """No language model: anything with nn.Linear in it can be adapted."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, 24), "down": nn.Linear(24, WIDTH)})
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.head(self.norm(x))


def gpt(**fields):
    from minipeft.lm.gpt import GPT, GPTConfig

    return GPT(
        GPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=32,
            initializer_range=0.2,
            **fields,
        )
    )


def transformers(name, **fields):
    import transformers

    if name == "GPT2":
        sizes = dict(
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        sizes = dict(
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
        **fields,
    )
    return getattr(
        transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    )(config)


@dataclass(frozen=True)
class BaseCase:
    name: str
    build: Callable[[], nn.Module]
    # some linear layers, of unequal shapes
    targets: tuple = ("q_proj", "v_proj", "down_proj")
    block: str = "mlp"  # a module of several layers: x -> x, in every layer
    embedding: str = "embed_tokens"
    norm: str = "norm"  # a small module outside the targets: for modules_to_save
    layered: bool = True  # a transformer, with checkpointing
    dense: bool = True  # weights that one can merge into

    def make(self):
        """A fresh model, always the same, in eval mode."""
        return copy.deepcopy(_made(self.name))

    def __repr__(self):
        return self.name


@functools.cache
def _made(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return (BASES | IN_4_BITS)[name].build().eval()


BASES = {
    case.name: case
    for case in [
        BaseCase("llama", lambda: gpt(attention_bias=True, mlp_bias=True)),
        BaseCase(
            "gpt2",
            lambda: gpt(
                model_type="gpt2", hidden_act="gelu_new", tie_word_embeddings=False
            ),
        ),
        BaseCase("hf_llama", lambda: transformers("Llama", tie_word_embeddings=False)),
        BaseCase("hf_mistral", lambda: transformers("Mistral")),
        BaseCase("hf_qwen2", lambda: transformers("Qwen2", tie_word_embeddings=True)),
        BaseCase(
            "hf_gpt2",
            lambda: transformers("GPT2"),
            ("c_attn", "mlp.c_proj"),
            "mlp",
            "wte",
            "ln_f",
        ),
        BaseCase(
            "mlp", MLP, ("up", "layers.1.down"), "up", "embed", "norm", layered=False
        ),
    ]
}
FEW = ("llama", "hf_llama", "hf_gpt2")  # enough for a method that does nothing unusual
LINEAR = ("llama", "gpt2", "hf_llama")  # where PEFT adapts no Conv1D
# both of our styles, both of Hugging Face's kinds of layer
WIDE = ("llama", "gpt2", "hf_llama", "hf_gpt2")
TEXTS = tuple(name for name, base in BASES.items() if base.layered)


@dataclass(frozen=True)
class Method:
    """One way to adapt a model. `fields` are our configuration's and PEFT's alike."""

    name: str
    config: str  # the class's name in minipeft
    fields: Callable = lambda base: {}  # base case -> fields besides target_modules
    peft: str | None = None  # the class's name in Hugging Face PEFT; None: not there
    # trainable parameters of one layer, from (d_in, d_out)
    count: Callable | None = None
    bases: tuple = FEW
    mergeable: bool = True
    additive: bool = True  # two adapters' changes add up
    dropout: str | None = None  # the field that holds the probability
    # target_modules; None: stands around the whole model
    where: Callable | None = lambda base: list(base.targets)
    step: float = 0.2  # how far `shake` moves the parameters

    def options(self, base, **more):
        targets = {} if self.where is None else {"target_modules": self.where(base)}
        return {**targets, **self.fields(base), **more}

    def ours(self, base, **more):
        return getattr(minipeft, self.config)(**self.options(base, **more))

    def theirs(self, base, **more):
        import peft

        return getattr(peft, self.peft)(**self.options(base, **more))

    def __repr__(self):
        return self.name


METHODS = {
    method.name: method
    for method in [
        Method(
            "lora",
            "LoraConfig",
            lambda base: dict(r=4, lora_alpha=8),
            peft="LoraConfig",
            dropout="lora_dropout",
            count=lambda d_in, d_out: 4 * (d_in + d_out),
            bases=tuple(BASES),
        ),
        Method(
            "dora",
            "DoraConfig",
            lambda base: dict(r=4, lora_alpha=8, use_dora=True),
            peft="LoraConfig",
            dropout="lora_dropout",
            count=lambda d_in, d_out: 4 * (d_in + d_out) + d_out,
            bases=WIDE,
            additive=False,
        ),
        Method(
            "adalora",
            "AdaLoraConfig",
            lambda base: dict(init_r=5, target_r=3, total_step=10, lora_alpha=25),
            peft="AdaLoraConfig",
            dropout="lora_dropout",
            count=lambda d_in, d_out: 5 * (d_in + d_out + 1),
            bases=WIDE,
            step=0.3,
        ),
        Method(
            "denselora",
            "DenseLoraConfig",
            lambda base: dict(r=4),
            dropout="lora_dropout",
            bases=FEW,
            mergeable=False,
        ),
        Method(
            "denselora_linear",
            "DenseLoraConfig",
            lambda base: dict(r=4, activation="linear"),
            bases=FEW,
            step=0.15,
        ),
        Method(
            "loha",
            "LoHaConfig",
            lambda base: dict(r=3, alpha=6),
            peft="LoHaConfig",
            count=lambda d_in, d_out: 2 * 3 * (d_in + d_out),
            bases=LINEAR,
            step=0.4,
        ),
        Method(
            "loha_conv1d",
            "LoHaConfig",
            lambda base: dict(r=3, alpha=6),
            bases=("hf_gpt2",),
            step=0.4,
        ),
        Method(
            "lokr",
            "LoKrConfig",
            lambda base: dict(r=4, alpha=8),
            peft="LoKrConfig",
            bases=LINEAR,
        ),
        Method(
            "lokr_factored",
            "LoKrConfig",
            lambda base: dict(r=1, alpha=1, decompose_both=True),
            peft="LoKrConfig",
            bases=("llama", "hf_llama"),
            step=0.4,
        ),
        Method(
            "lokr_conv1d",
            "LoKrConfig",
            lambda base: dict(r=4, alpha=8),
            bases=("hf_gpt2",),
        ),
        Method(
            "vera",
            "VeraConfig",
            lambda base: dict(r=10),
            peft="VeraConfig",
            dropout="vera_dropout",
            count=lambda d_in, d_out: 10 + d_out,
            bases=WIDE,
            step=0.6,
        ),
        Method(
            "ia3",
            "IA3Config",
            lambda base: dict(feedforward_modules=[base.targets[-1]]),
            peft="IA3Config",
            bases=tuple(BASES),
            additive=False,
            step=0.5,
        ),
        Method(
            "bottleneck",
            "BottleneckConfig",
            lambda base: dict(r=3),
            bases=tuple(BASES),
            mergeable=False,
            where=lambda base: [base.block],
        ),
        Method(
            "bottleneck_parallel",
            "BottleneckConfig",
            lambda base: dict(r=3, placement="parallel", scaling="learned"),
            mergeable=False,
            where=lambda base: [base.block],
        ),
        Method(
            "bitfit",
            "BitFitConfig",
            count=lambda d_in, d_out: d_out,
            bases=("llama", "gpt2", "hf_gpt2", "mlp"),
        ),
        Method(
            "bitfit_added",
            "BitFitConfig",
            lambda base: dict(add_bias=True),
            count=lambda d_in, d_out: d_out,
            bases=("hf_llama", "hf_qwen2"),
            mergeable=False,
        ),
        Method(
            "ln_tuning",
            "LNTuningConfig",
            peft="LNTuningConfig",
            bases=("hf_gpt2",),
            additive=False,
            where=lambda base: ["ln_1", "ln_2"],
        ),
        Method(
            "prompt",
            "PromptTuningConfig",
            lambda base: dict(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            peft="PromptTuningConfig",
            bases=TEXTS,
            mergeable=False,
            where=None,
        ),
        Method(
            "p_tuning",
            "PromptEncoderConfig",
            lambda base: dict(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            peft="PromptEncoderConfig",
            mergeable=False,
            where=None,
        ),
        Method(
            "prefix",
            "PrefixTuningConfig",
            lambda base: dict(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            peft="PrefixTuningConfig",
            bases=TEXTS,
            mergeable=False,
            where=None,
        ),
        Method(
            "subspace",
            "SubspaceConfig",
            lambda base: dict(d=50),
            bases=tuple(BASES),
            where=None,
        ),
        Method(
            "subspace_aware",
            "SubspaceConfig",
            lambda base: dict(d=60, projection="hash", structure_aware=True),
            where=None,
            additive=False,
        ),
    ]
}
APART = {"FusionConfig"}  # configurations that are tested in files of their own only
CASES = [(method, BASES[name]) for method in METHODS.values() for name in method.bases]
# Over a base in 4 bits: methods that read its weight, and some that do not.
IN_4_BITS = {
    "llama_nf4": BaseCase(
        "llama_nf4",
        lambda: minipeft.quant.quantize_model(BASES["llama"].build()),
        dense=False,
    )
}
CASES += [
    (METHODS[name], base)
    for base in IN_4_BITS.values()
    for name in (
        "lora",
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
    )
]


def inputs(rows=3, length=6):
    """The same token ids every time: {"input_ids": (rows, length)}."""
    return {
        "input_ids": torch.randint(
            3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2)
        )
    }


def run(model, **kwargs):
    """Logits (B, T, V) without gradients, of whatever model; those of virtual tokens in
    front are left out."""
    with torch.no_grad():
        return logits(model(**inputs(), **kwargs))[:, -inputs()["input_ids"].shape[1] :]


def logits(output):
    return getattr(output, "logits", output)


def loss_of(model, **kwargs):
    return logits(model(**inputs(), **kwargs)).float().logsumexp(-1).mean()


def shake(model, name="default", seed=3, step=0.3):
    """Move every parameter of an adapter of ours away from where it started, so that it
    does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".adapters." + name + "." in path or path.startswith(f"shared.{name}."):
                parameter += step * torch.randn(
                    parameter.shape, generator=generator
                ).to(parameter)
    return model


def adapted(method, base, name="default", dtype=torch.float32, **more):
    """(model of ours with a shaken adapter of that method)"""
    torch.manual_seed(0)
    return shake(
        minipeft.get_peft_model(base.make().to(dtype), method.ours(base, **more), name),
        name,
        step=method.step,
    )


def rounding(passes=1, dtype=torch.float32, size=1.0):
    """What rounding does to an output of these models whose largest entry is `size`.
    The longest sum has 4 · WIDTH terms (GPT-2's MLP); norm, q, scores, values, o, norm,
    gate, up and down follow one another in each layer.

    passes: through the model; forward and backward are two, which gradients need.
    In 16 bits it is roundings that count: of each layer's nine results."""
    terms = 1 if dtype.itemsize == 2 else 4 * WIDTH
    return tolerance(dtype, size, terms, steps=9 * LAYERS * passes)


ROUNDING = rounding()


def close(a, b, allowed=ROUNDING):
    """Largest difference, relative to the largest entry where that is above 1."""
    error = (a.double() - b.double()).abs().max() / max(
        1.0, float(b.double().abs().max())
    )
    assert error <= allowed, f"differ by {error:.2e}"


def differ(a, b, least=1e-4):
    assert (a.float() - b.float()).abs().max() > least, "do not differ"
