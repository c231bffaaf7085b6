"""The memory ledger: what a training step holds, predicted by arithmetic. (The course
measures it: minipeft.course.measuring.)

    weights        every parameter, trained or frozen; in 4 bits with its scales
    gradients      one number for each trained parameter
    optimizer      two more for AdamW (the running means of the gradient and of its
      square), in 32 bits or in 8
    activations    what the forward pass keeps for the backward pass; it grows with the
      batch
    a dense weight where weights are in 4 bits: the largest of them, while its product
      is computed

Activations follow from one rule: a product y = x W keeps x if W is trained, and W (a
weight, already counted) if x needs a gradient. So a frozen layer need not keep its
input, but everything between the first adapter and the loss still keeps what its own
derivative needs: the queries, the keys, the gate. That is why an adapter saves
gradients and optimizer state almost entirely, and activations only by a part. The
counts were read off what torch's autograd saves on a CPU, and are tested against it.
"""

from dataclasses import dataclass, field

import torch

from ..quant.linear4bit import is_4bit, quantized_tensors
from ..quant.optimizers import BLOCK, SMALL
from .evaluation import unwrap_peft
from .gpt import GPT

# numbers of the parameter's own type for each trained number
STATES = {"adamw": 2, "adam": 2, "sgd": 0, "paged_adamw": 2}


def human(n):
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


@dataclass
class Ledger:
    """Bytes: `predicted` and `measured` by name. Printing it gives the table."""

    predicted: dict  # name -> bytes, None where there is no formula
    measured: dict  # empty unless measured
    batch_size: int
    seq_len: int
    # the weights' bytes by format: "bfloat16", "nf4", ...
    formats: dict = field(default_factory=dict)

    def total(self, of="predicted"):
        return sum(n or 0 for n in getattr(self, of).values())

    def __repr__(self):
        rows = [
            (name, n, self.measured.get(name)) for name, n in self.predicted.items()
        ]
        if len(self.formats) > 1:
            parts = [(f"  of it {name}", n, None) for name, n in self.formats.items()]
            rows[1:1] = parts
        measured = self.total("measured") if self.measured else None
        rows.append(("total", self.total(), measured))

        def show(n):
            return "-" if n is None else human(n)

        size = f"{self.batch_size} x {self.seq_len} tokens"
        lines = [f"{size:24}{'predicted':>12}{'measured':>12}"]
        lines += [f"{name:24}{show(a):>12}{show(b):>12}" for name, a, b in rows]
        return "\n".join(lines)


def weight_bytes(model):
    """{format: bytes} of all weights and buffers, each once. A 4-bit weight's scales
    count as its format."""
    found = {}
    seen = set()

    def count(name, tensors):
        for t in tensors:
            # by identity: on the meta device nothing has an address
            if id(t) not in seen:
                seen.add(id(t))
                found[name] = found.get(name, 0) + t.nbytes

    for module in model.modules():
        if is_4bit(module):
            count(*quantized_tensors(module))
        for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            count(str(t.dtype).removeprefix("torch."), [t])
    return found


def optimizer_bytes(optimizer, params):
    """Bytes of the states; None where there is no formula."""
    if optimizer in ("adamw8bit", "paged_adamw8bit"):
        # a byte for each mean, a scale for each block; small ones: 32 bits
        def in_8(n):
            return 2 * n + 2 * 4 * -(-n // BLOCK)

        sizes = [p.numel() for p in params]
        return sum(in_8(n) if n >= SMALL else 8 * n for n in sizes)
    if not isinstance(optimizer, str) or optimizer not in STATES:
        return None
    states = STATES[optimizer]
    # and for each a step count
    return sum(p.nbytes for p in params) * states + 4 * len(params) * (states > 0)


def is_trained(module):
    return any(p.requires_grad for p in module.parameters())


class ActivationCounter:
    """Counts the numbers that each token keeps, layer by layer.

    needs_grad: do gradients go back to what came before? size: bytes of one number.
    An adapter in 32 bits over a model in 16 keeps a copy of its input in 32. So does,
    `widened`, an RMSNorm on a CPU, which has no kernel of its own for 16 bits."""

    def __init__(self, needs_grad, size=4, widened=False):
        self.needs_grad = needs_grad
        self.size = size
        self.widened = widened
        self.numel = 0

    def norm(self, module, d, heads=1):
        trained = is_trained(module)
        if isinstance(module, torch.nn.LayerNorm):
            if self.needs_grad or trained:
                self.numel += d + 2  # its input, mean, 1 / deviation
        else:
            width = d * (4 / self.size if self.widened else 1)
            if self.needs_grad:  # its input; 1 / rms, in 32 bits
                self.numel += width + heads * 4 / self.size
            if module.weight.requires_grad:
                self.numel += width  # normalised input
        self.needs_grad = self.needs_grad or trained

    def linear(self, *layers, kept=False):
        """Linear layers that read the same input: it is kept once. Returns which of
        them pass gradients on."""
        shared = 0
        for slot in layers:
            layer = getattr(slot, "base_layer", slot)
            if layer.weight.requires_grad:
                shared = layer.in_features
            for adapter in active_adapters(slot):
                if self.adapter(adapter, layer.in_features):
                    shared = layer.in_features
        self.numel += 0 if kept else shared
        return [self.needs_grad or is_trained(slot) for slot in layers]

    def adapter(self, adapter, d_in):
        """Count what an adapter keeps for itself. Returns True if it keeps the shared
        input as well."""
        # 1, or 2 for 32 bits over 16
        wider = next(adapter.parameters()).element_size() / self.size
        drops = bool(getattr(adapter, "dropout", 0)) and adapter.training
        if hasattr(adapter, "lora_A") and is_trained(adapter.lora_B):
            # A x, which B reads
            self.numel += adapter.lora_A.out_features * wider
            # its own thinned input, the mask
            self.numel += drops * d_in * (1 + self.needs_grad) * wider
        if not is_trained(adapter) or drops:
            return False
        if wider > 1:
            self.numel += d_in * wider
        return wider <= 1

    def attention(self, block, config, seq_len, written_out):
        """One attention layer. Returns True if its queries or keys get gradients."""
        h = config.head_dim
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        self.norm(block.input_layernorm, config.hidden_size)
        layer = block.self_attn
        q, k, v = self.linear(layer.q_proj, layer.k_proj, layer.v_proj)
        if hasattr(layer, "q_norm"):
            self.needs_grad = q
            self.norm(layer.q_norm, heads * h, heads)
            self.needs_grad = k
            self.norm(layer.k_norm, kv_heads * h, kv_heads)
            q = k = self.needs_grad
        self.needs_grad = q or k or v
        # keys, queries, values, for every head, each for another's gradient;
        # probabilities
        if self.needs_grad and written_out:
            self.numel += heads * h * (q + k + (q or k)) + heads * seq_len
        elif self.needs_grad:  # queries and output; keys and values; a sum in 32 bits
            self.numel += heads * h * 2 + kv_heads * h * 2 + heads * 4 / self.size
        kept = self.needs_grad and not written_out
        (self.needs_grad,) = self.linear(layer.o_proj, kept=kept)
        return (q or k) and not config.is_gpt2

    def mlp(self, block, config):
        self.norm(block.post_attention_layernorm, config.hidden_size)
        d_ff = config.intermediate_size
        mlp = block.mlp
        if mlp.gated:
            gate, up = self.linear(mlp.gate_proj, mlp.up_proj)
            # the gate before its activation; each factor's other factor
            self.numel += d_ff * (gate + gate + up)
            self.needs_grad = gate or up
        else:
            (self.needs_grad,) = self.linear(mlp.up_proj)
            self.numel += d_ff * self.needs_grad
        (self.needs_grad,) = self.linear(mlp.down_proj)


def active_adapters(slot):
    """The adapters that are in use on a layer; none where it is not a slot."""
    if not getattr(slot, "is_slot", False) or not slot.active.enabled:
        return []
    return [slot.adapters[n] for n in slot.active.names if n in slot.adapters]


def activation_bytes(model, batch_size, seq_len, labels=None):
    """What the forward pass of a GPT (adapted or not) keeps, in bytes; None for other
    models.

    `labels`: tokens of the batch with a label (default: all but the first of each row).
    Exact for the GPT and LoRA in float32 on a CPU; another adapter counts as the input
    that it reads."""
    gpt = unwrap_peft(model)
    if not isinstance(gpt, GPT):
        return None
    config = gpt.config
    size = gpt.dtype.itemsize
    tokens = batch_size * seq_len
    labels = batch_size * (seq_len - 1) if labels is None else labels
    d = config.hidden_size
    positions = config.is_gpt2 and gpt.model.embed_positions.weight.requires_grad
    on_cpu = gpt.device.type == "cpu"
    written_out = gpt.dtype == torch.bfloat16 and on_cpu  # see gpt.attend
    counter = ActivationCounter(
        is_trained(gpt.model.embed_tokens) or positions,
        size,
        widened=size < 4 and on_cpu and not config.is_gpt2,
    )
    rotated = 0  # layers whose queries or keys get gradients
    per_layer = []
    for block in gpt.model.layers:
        before = counter.numel
        residual = counter.needs_grad
        rotated += counter.attention(block, config, seq_len, written_out)
        residual = residual or counter.needs_grad
        counter.needs_grad = residual
        counter.mlp(block, config)
        counter.needs_grad = counter.needs_grad or residual
        per_layer.append(counter.numel - before)
    body = counter.numel
    counter.norm(gpt.model.norm, d)
    cut = gpt.is_gradient_checkpointing
    # each layer keeps its input alone; one layer at a time is computed again,
    if cut and body:
        # and ends with its output, in place of that input,
        counter.numel += len(per_layer) * d + max(per_layer) - body
        # or beside it, if what it kept was the widened input
        counter.numel += d if counter.widened else 0
    total = int(counter.numel * tokens * size)
    if rotated:
        layers = 1 if cut else rotated
        total += rotary_bytes(config.head_dim, seq_len, size, layers, cut)
    total += positions * seq_len * 8  # the positions' numbers: once
    total += counter.needs_grad * tokens  # where the labels are
    if counter.needs_grad or is_trained(gpt.lm_head):
        head_input = d * size if gpt.lm_head.weight.requires_grad else 0
        # input, log-probabilities, labels; how many
        total += labels * (head_input + config.vocab_size * 4 + 8) + 4
    return total


def rotary_bytes(head_dim, seq_len, size, layers, checkpointing):
    """The rotary angles: once for all layers, in 32 bits; from which each layer makes
    its own in 16."""
    in_32 = checkpointing or size == 4
    in_16 = layers * (size < 4)
    return 2 * seq_len * head_dim * (4 * in_32 + size * in_16)


def memory_ledger(model, batch_size=16, seq_len=64, optimizer="adamw"):
    """The Ledger of one training step of `model` as it is now: what requires a gradient
    counts as trained.

    optimizer: "adamw", "adamw8bit", "paged_adamw", "adam", "sgd", or a factory, of
    whose state nothing is predicted. It needs no memory itself, and works on torch's
    meta device, for 8 billion parameters too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    formats = weight_bytes(model)
    predicted = {
        "weights": sum(formats.values()),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": optimizer_bytes(optimizer, trained),
        "activations": activation_bytes(model, batch_size, seq_len) if trained else 0,
    }
    packed = [module for module in model.modules() if is_4bit(module)]
    if packed:
        predicted["a dense weight"] = max(
            m.in_features * m.out_features * (m.compute_dtype or model.dtype).itemsize
            for m in packed
        )
    return Ledger(predicted, {}, batch_size, seq_len, formats)
