"""A decoder-only language model in one file: Llama and its relatives, and GPT-2, chosen
by configuration.

Module names are Hugging Face's (`model.layers.0.self_attn.q_proj`), and so are the
arguments and the fields of the output, so that an adapter written for one runs on the
other. Every projection is a plain `nn.Linear` of its own.

Shapes: B rows, T new tokens, P tokens already in the cache, S = P + T, d hidden_size, H
heads, K key-value heads, h head_dim, V vocabulary.

Llama: Touvron et al. 2023 (arXiv 2302.13971); rotary positions: Su et al. 2021
(2104.09864); grouped queries: Ainslie et al. 2023 (2305.13245); SwiGLU: Shazeer 2020
(2002.05202); GPT-2: Radford et al. 2019. No dropout anywhere.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..io import brief, check_choice, check_number, did_you_mean
from . import hf_format

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
MAX_LAYERS = 10_000  # a damaged file's number: modules are made one by one
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass
class GPTConfig:
    """The shape of a model, in Hugging Face's names. `model_type` decides the style;
    see MODEL_TYPES."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    # fewer than heads: grouped queries; None: as many
    num_key_value_heads: int | None = None
    head_dim: int | None = None  # None: hidden_size / heads
    max_position_embeddings: int = 512
    model_type: str = "llama"
    hidden_act: str | None = None  # None: silu, and gelu_new in GPT-2
    norm_eps: float = 1e-5  # rms_norm_eps or layer_norm_epsilon in Hugging Face's files
    rope_theta: float = 10000.0
    # {"rope_type": "linear" | "llama3", "factor": ...}
    rope_scaling: dict | None = None
    # on q, k, v and o (qwen2: always on q, k, v and never on o)
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True  # the head is the embedding, transposed
    sliding_window: int | None = None  # mistral: longer sequences than this are refused
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        check_choice("model_type", self.model_type, MODEL_TYPES)
        if self.hidden_act is None:
            self.hidden_act = "gelu_new" if self.is_gpt2 else "silu"
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        self._check_numbers()
        self._fill_heads()
        self._check_rope_scaling()
        if self.is_gpt2:
            self._check_gpt2()
            self.attention_bias = True
            self.mlp_bias = True
        self._check_biases()

    def _check_numbers(self):
        for name in SIZES:
            check_number(name, getattr(self, name), whole=True, least=1)
        check_number("num_hidden_layers", self.num_hidden_layers, most=MAX_LAYERS)
        for name in ("num_key_value_heads", "head_dim", "sliding_window"):
            check_number(name, getattr(self, name), whole=True, least=1, also=(None,))
        check_number("norm_eps", self.norm_eps, least=0)
        check_number("rope_theta", self.rope_theta, above=0)
        check_number("initializer_range", self.initializer_range, least=0)
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            check_choice(name, getattr(self, name), (True, False))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            least = -1 if name == "pad_token_id" else 0  # LLaMA-1's files have pad -1
            bounds = {"least": least, "most": self.vocab_size - 1, "also": (None,)}
            for token in ids if isinstance(ids, list) else [ids]:
                check_number(name, token, whole=True, **bounds)

    def _fill_heads(self):
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be shared among {heads} heads"
            )
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 and not self.is_gpt2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rotary positions need an even one"
            )

    def _check_rope_scaling(self):
        scaling = self.rope_scaling or {}
        if not isinstance(scaling, dict):
            raise ValueError(f"rope_scaling = {scaling!r}: expected a dict or None")
        if not scaling:
            return
        self.rope_scaling = scaling = hf_format.read_rope({"rope_scaling": scaling})
        kind = scaling["rope_type"]
        needed = hf_format.ROPE_TYPES[kind]
        known = ("rope_type", *needed)
        if unknown := [field for field in scaling if field not in known]:
            raise ValueError(
                f"rope_scaling of type {kind!r} has no {brief(unknown[0])}"
                f"{did_you_mean(unknown[0], known)}; expected {', '.join(known)}"
            )
        if missing := [field for field in needed if field not in scaling]:
            raise ValueError(
                f"rope_scaling of type {kind!r} lacks {', '.join(missing)}"
            )
        for field in needed:
            low = scaling["low_freq_factor"] if field == "high_freq_factor" else 0
            check_number(f"rope_scaling[{field!r}]", scaling[field], above=low)

    def _check_gpt2(self):
        plain = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size / self.num_attention_heads,
            "rope_theta": 1e4,
        }
        for field in (*plain, "rope_scaling", "sliding_window"):
            value = getattr(self, field)
            if value and value != plain.get(field):
                raise ValueError(
                    f"gpt2 has no {field} = {brief(value)}: its files have no place for"
                    " it, and transformers could not open them; take llama"
                )

    def _check_biases(self):
        kind = self.model_type
        mlp_bias = self.mlp_bias and kind not in ("llama", "gpt2")
        attention_bias = self.attention_bias and kind == "mistral"
        if mlp_bias or attention_bias:
            raise ValueError(
                f"{kind} has no such biases: transformers could not open it; take llama"
            )

    @property
    def is_gpt2(self):
        return self.model_type == "gpt2"

    def to_dict(self):
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class Output:
    logits: torch.Tensor = None  # (B, T, V)
    loss: torch.Tensor | None = None  # mean over the labels that count, in nats
    # one (keys, values) a layer, each (B, K, S, h)
    past_key_values: tuple | None = None


class Rotary:
    """Turns positions into rotary angles. Plain tensors, always float32: no weights,
    nothing to save."""

    def __init__(self, config):
        h = config.head_dim
        scaling = config.rope_scaling or {}
        even = torch.arange(0, h, 2, dtype=torch.float32, device="cpu")
        frequency = 1 / config.rope_theta ** (even / h)  # (h/2,)
        kind = scaling.get("rope_type", "default")
        if kind == "linear":  # positions closer together
            frequency = frequency / scaling["factor"]
        elif kind == "llama3":  # slow waves slowed further, fast ones kept
            low = scaling["low_freq_factor"]
            high = scaling["high_freq_factor"]
            old_context = scaling["original_max_position_embeddings"]
            turns = old_context * frequency / (2 * math.pi)  # within the old context
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = frequency * (keep + (1 - keep) / scaling["factor"])
        self.frequency = frequency

    def __call__(self, position_ids):  # (B or 1, T) -> two of (B or 1, 1, T, h)
        frequency = self.frequency.to(position_ids.device)
        angle = position_ids[:, None, :, None].float() * frequency
        cos = angle.cos()
        sin = angle.sin()
        # the minus sign of the rotation lives in sin
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + h/2]) by its angle. x (B, heads, T, h)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(q, k, v, mask=None):
    """softmax(q kT / sqrt(h)) v, causal if there is no mask. q (B, H, T, h), k and v
    (B, K, S, h) -> (B, H, T, h)."""
    T = q.shape[2]
    heads = q.shape[1] // k.shape[1]
    # a plain bool even where torch.compile has a symbol for T
    causal = True if mask is None and T > 1 else False
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=heads > 1
        )
    # Written out: on a CPU, the backward pass of torch's bfloat16 kernel takes 40 % of
    # a small model's whole step.
    k = k.repeat_interleave(heads, 1)
    v = v.repeat_interleave(heads, 1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
    if causal:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        open_ = torch.zeros_like(mask, dtype=q.dtype)
        scores = scores + open_.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1) @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        h = config.head_dim
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        is_qwen2 = config.model_type == "qwen2"
        qkv_bias = config.attention_bias or is_qwen2
        self.head_dim = h
        self.q_proj = nn.Linear(d, heads * h, bias=qkv_bias)
        self.k_proj = nn.Linear(d, kv_heads * h, bias=qkv_bias)
        self.v_proj = nn.Linear(d, kv_heads * h, bias=qkv_bias)
        o_bias = config.attention_bias and not is_qwen2
        self.o_proj = nn.Linear(heads * h, d, bias=o_bias)
        if config.model_type == "qwen3":  # each head normalised before its rotation
            self.q_norm = nn.RMSNorm(h, config.norm_eps)
            self.k_norm = nn.RMSNorm(h, config.norm_eps)

    def forward(
        self, x, cos=None, sin=None, mask=None, past_k=None, past_v=None, new_kv=None
    ):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, h)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, h)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.to(x.dtype)).to(v.dtype)
            k = self.k_norm(k.to(x.dtype)).to(v.dtype)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, heads, T, h)
        if cos is not None:
            cos = cos.to(q.dtype)
            sin = sin.to(q.dtype)
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        if past_k is not None:
            k = torch.cat((past_k, k), dim=2)  # (B, K, S, h)
            v = torch.cat((past_v, v), dim=2)
        if new_kv is not None:
            new_kv.append((k, v))
        y = attend(q, k, v, mask)  # (B, H, T, h)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        d_ff = config.intermediate_size
        bias = config.mlp_bias
        self.gated = not config.is_gpt2
        if self.gated:
            self.gate_proj = nn.Linear(d, d_ff, bias=bias)
        self.up_proj = nn.Linear(d, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d, bias=bias)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        if self.gated:  # SwiGLU
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = nn.LayerNorm if config.is_gpt2 else nn.RMSNorm
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = norm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.norm_eps)

    def forward(self, x, *attention):  # x (B, T, d); the rest is attention's
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The body: token ids (B, T) to what the head reads, a plain tensor (B, T, d) after
    the last norm."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        norm = nn.LayerNorm if config.is_gpt2 else nn.RMSNorm
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        if config.is_gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, d)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Block(config) for _ in layers)
        self.norm = norm(d, config.norm_eps)
        self.rotary = None if config.is_gpt2 else Rotary(config)
        # torch's checkpoint, when it is on (transformers' name: adapters look for it)
        self._gradient_checkpointing_func = None

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        new_kv=None,
    ):
        """As GPT.forward. new_kv: a list to which every layer appends its (keys,
        values), each (B, K, S, h)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        # (B, T, d)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        P = past_key_values[0][0].shape[2] if past_key_values else 0
        mask = self.attention_mask(attention_mask, B, T, P, x.device)
        if position_ids is None:
            position_ids = torch.arange(P, P + T, device=x.device)[None]  # (1, T)
        cos = sin = None
        if self.rotary is None:
            self._check_length(P + T if x.is_meta else int(position_ids.max()) + 1)
            x = x + self.embed_positions(position_ids)
        else:
            cos, sin = self.rotary(position_ids)
        for i, layer in enumerate(self.layers):
            past_k, past_v = past_key_values[i] if P else (None, None)
            inputs = (x, cos, sin, mask, past_k, past_v)
            if self._gradient_checkpointing_func and self.training:
                x = self._gradient_checkpointing_func(layer, *inputs)
            else:
                x = layer(*inputs, new_kv)
        return self.norm(x)

    def _check_length(self, length):
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens are more than max_position_embeddings"
                f" {self.config.max_position_embeddings}"
            )

    def attention_mask(self, attention_mask, B, T, P, device):
        """Booleans (B or 1, 1, T, S), True where a query may look; None for plain
        causal attention."""
        S = P + T
        window = self.config.sliding_window
        if window is not None and S > window:
            raise ValueError(
                f"{S} tokens are more than this model's sliding window of {window}: not"
                " supported"
            )
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        if attention_mask is not None and attention_mask.shape != (B, S):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; expected ({B}, {S}):"
                f" {P} tokens of the past and {T} new ones"
            )
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded and (P == 0 or T == 1):
            return None
        query = torch.arange(P, S, device=device)[:, None]
        key = torch.arange(S, device=device)[None]
        mask = (key <= query)[None, None]  # (1, 1, T, S)
        if padded:  # padding still looks at itself: an empty softmax would be NaN
            mask = mask & attention_mask[:, None, None].bool() | (key == query)
        return mask


class GPT(nn.Module):
    """The language model: a Decoder and a head that turns what it says of each position
    into V logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        labels_only=False,
    ):
        """Hugging Face's forward -> Output.

        input_ids (B, T) int64, or inputs_embeds (B, T, d). attention_mask (B, P + T): 1
        for real tokens, 0 for padding on either side; or (B, 1, T, P + T) booleans,
        used as they are. position_ids (B, T): P, P + 1, ... unless given.
        past_key_values: a (keys, values) pair a layer, each (B, K, P, h). labels (B,
        T): the input ids themselves, -100 where no loss is wanted; they are shifted
        here. logits_to_keep = n: logits of the last n positions only. labels_only: the
        head is applied only where a label is, and logits are (N, V) for those N
        positions: the head is a large share of a small model's work. Raises ValueError
        for shapes that do not fit.
        """
        checkpointing = self.is_gradient_checkpointing and self.training
        new_kv = [] if use_cache and not checkpointing else None
        x = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            new_kv,
        )  # (B, T, d)
        if labels is not None:
            # position t predicts token t + 1
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            if labels_only:
                counts = labels != -100
                x = x[counts]  # (N, d)
                labels = labels[counts]  # (N,)
        if logits_to_keep and x.dim() == 3:
            x = x[:, -logits_to_keep:]
            labels = None if labels is None else labels[:, -logits_to_keep:]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            scores = logits.float().flatten(0, -2)
            loss = F.cross_entropy(scores, labels.flatten(), ignore_index=-100)
        return Output(logits, loss, None if new_kv is None else tuple(new_kv))

    def generate(self, input_ids, attention_mask=None, **options):
        """Continue input_ids (B, T) -> (B, T + new), rows that end early filled up; see
        generation.generate_ids."""
        from .generation import generate_ids

        return generate_ids(self, input_ids, attention_mask, **options)

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder in Hugging Face's layout; transformers opens it."""
        hf_format.save_pretrained(self, folder, tokenizer)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, module):
        self.model.embed_tokens = module

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, module):
        self.lm_head = module

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """Keep only each layer's input for the backward pass and compute the rest
        again: less memory, more time."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.model._gradient_checkpointing_func = partial(checkpoint, **options)

    def gradient_checkpointing_disable(self):
        self.model._gradient_checkpointing_func = None

    @property
    def is_gradient_checkpointing(self):
        return self.model._gradient_checkpointing_func is not None

    def enable_input_require_grads(self):
        """Reentrant checkpointing gives no gradient where no input asks for one, as
        over a frozen embedding."""
        self.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )

    @property
    def device(self):
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self):
        return self.get_input_embeddings().weight.dtype
