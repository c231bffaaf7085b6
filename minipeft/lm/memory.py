"""The memory ledger: what a training step holds, predicted by arithmetic and measured
beside it.

    weights        every parameter, trained or frozen; in 4 bits with its scales
    gradients      one number for each trained parameter
    optimizer      two more for AdamW (the running means of the gradient and of its
      square), in 32 bits or in 8
    activations    what the forward pass keeps for the backward pass; it grows with the
      batch
    a dense weight where weights are in 4 bits: the largest of them, while its product
      is computed

Activations follow from one rule: a product y = x W keeps x if W is trained, and W (a
weight, already counted) if x is to get a gradient. So a frozen layer need not keep its
input, but everything between the first adapter and the loss still keeps what its own
derivative needs: the queries, the keys, the gate. That is why an adapter saves
gradients and optimizer state almost entirely, and activations only by a part. The
counts were read off what torch's autograd saves on a CPU, and are tested against it.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from ..quant.optimizers import BLOCK, SMALL
from .evaluation import bare, fast_loss
from .gpt import GPT
from .training import make_optimizer

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
    measured: dict  # empty without measure=True
    batch_size: int
    seq_len: int
    # the weights' bytes by format: "bfloat16", "nf4", ...
    formats: dict = field(default_factory=dict)

    def total(self, of="predicted"):
        return sum(n or 0 for n in getattr(self, of).values())

    def __repr__(self):
        show = lambda n: "-" if n is None else human(n)
        rows = [
            (name, n, self.measured.get(name)) for name, n in self.predicted.items()
        ]
        if len(self.formats) > 1:
            rows[1:1] = [
                (f"  of it {name}", n, None) for name, n in self.formats.items()
            ]
        rows.append(
            ("total", self.total(), self.total("measured") if self.measured else None)
        )
        head = f"{f'{self.batch_size} x {self.seq_len} tokens':24}{'predicted':>12}{'measured':>12}"
        return "\n".join(
            [head, *(f"{name:24}{show(a):>12}{show(b):>12}" for name, a, b in rows)]
        )


def weight_bytes(model):
    """{format: bytes} of all weights and buffers, each once. A 4-bit weight's scales
    count as its format."""
    found, seen = {}, set()

    def count(name, tensors):
        for t in tensors:
            # by identity: on the meta device nothing has an address
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                found[name] = found.get(name, 0) + t.nbytes

    for module in model.modules():
        four = type(module).__name__ == "Linear4bit"
        if four:
            count(*quantized_tensors(module))
        for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            count(str(t.dtype).removeprefix("torch."), [t])
    return found


def quantized_tensors(layer):
    """("nf4", the tensors that a 4-bit layer's weight consists of), of our kind or of
    bitsandbytes'."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.quant_type, [
            layer.weight,
            layer.absmax,
            layer.absmax2,
            layer.offset,
        ]
    nested = (
        [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    )
    return state.quant_type, [layer.weight, state.absmax, state.code, *nested]


def optimizer_bytes(optimizer, params):
    """Bytes of the states; None where there is no formula."""
    # a byte for each mean, a scale for each block; small ones: 32 bits
    if optimizer in ("adamw8bit", "paged_adamw8bit"):
        return sum(
            2 * n + 2 * 4 * -(-n // BLOCK) if n >= SMALL else 8 * n
            for n in (p.numel() for p in params)
        )
    if not isinstance(optimizer, str) or optimizer not in STATES:
        return None
    states = STATES[optimizer]
    # and for each a step count
    return sum(p.nbytes for p in params) * states + 4 * len(params) * (states > 0)


def trained(module):
    return any(p.requires_grad for p in module.parameters())


class Layers:
    """Counts the numbers that each token keeps, layer by layer. `flow`: do gradients go
    back to what came before? `size`: bytes of one. An adapter in 32 bits over a model
    in 16 keeps a copy of its input in 32. So does, `widened`, an RMSNorm on a CPU,
    which has no kernel of its own for 16 bits."""

    def __init__(self, flow, size=4, widened=False):
        self.flow, self.size, self.widened, self.numbers = flow, size, widened, 0

    def norm(self, module, d, heads=1):
        weight = module.weight.requires_grad
        if isinstance(module, torch.nn.LayerNorm):
            # its input, mean, 1 / deviation
            self.numbers += d + 2 if self.flow or trained(module) else 0
        else:
            wide = 4 / self.size if self.widened else 1
            # its input; 1 / rms, in 32 bits
            self.numbers += d * wide + heads * 4 / self.size if self.flow else 0
            self.numbers += d * wide if weight else 0  # normalised input
        self.flow = self.flow or trained(module)

    def linear(self, *sites, kept=False):
        """Linear layers that read the same input: it is kept once. Returns which of
        them pass gradients on."""
        shared = 0
        for site in sites:
            layer, adapters = getattr(site, "base_layer", site), []
            if layer is not site and site.active.enabled:
                adapters = [
                    site.adapters[name]
                    for name in site.active.names
                    if name in site.adapters
                ]
            if layer.weight.requires_grad:
                shared = layer.in_features
            for adapter in adapters:
                # 1, or 2 for 32 bits over 16
                wider = next(adapter.parameters()).element_size() / self.size
                drops = bool(getattr(adapter, "dropout", 0)) and adapter.training
                if hasattr(adapter, "lora_A") and trained(adapter.lora_B):
                    # A x, which B reads
                    self.numbers += adapter.lora_A.out_features * wider
                    # its own thinned input, the mask
                    self.numbers += drops * layer.in_features * (1 + self.flow) * wider
                if trained(adapter) and not drops and wider > 1:
                    self.numbers += layer.in_features * wider
                elif trained(adapter) and not drops:
                    shared = layer.in_features
        self.numbers += 0 if kept else shared
        return [self.flow or trained(site) for site in sites]


def activation_bytes(model, batch_size, seq_len, labels=None):
    """What the forward pass of a GPT (adapted or not) keeps, in bytes; None for other
    models.

    `labels`: tokens of the batch with a label (default: all but the first of each row).
    Exact for the GPT and LoRA in float32 on a CPU; another adapter counts as the input
    that it reads."""
    gpt = bare(model)
    if not isinstance(gpt, GPT):
        return None
    config, tokens, size = gpt.config, batch_size * seq_len, gpt.dtype.itemsize
    labels = batch_size * (seq_len - 1) if labels is None else labels
    d, h, heads, groups = (
        config.hidden_size,
        config.head_dim,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    positions = config.is_gpt2 and gpt.model.embed_positions.weight.requires_grad
    on_cpu = gpt.device.type == "cpu"
    at = Layers(
        trained(gpt.model.embed_tokens) or positions,
        size,
        widened=size < 4 and on_cpu and not config.is_gpt2,
    )
    rotated, per_layer = 0, []  # layers whose queries or keys get gradients
    written_out = gpt.dtype == torch.bfloat16 and on_cpu  # see gpt.attend
    for block in gpt.model.layers:
        before, attention, mlp = at.numbers, block.self_attn, block.mlp
        residual = at.flow
        at.norm(block.input_layernorm, d)
        q, k, v = at.linear(attention.q_proj, attention.k_proj, attention.v_proj)
        if hasattr(attention, "q_norm"):
            for name, count in (("q_norm", heads), ("k_norm", groups)):
                at.flow = q if name == "q_norm" else k
                at.norm(getattr(attention, name), count * h, count)
            q = k = at.flow
        rotated += (q or k) and not config.is_gpt2
        at.flow = q or k or v
        # keys, queries, values, for every head, each for another's gradient;
        # probabilities
        if at.flow and written_out:
            at.numbers += heads * h * (q + k + (q or k)) + heads * seq_len
        elif at.flow:  # queries and output; keys and values; one sum a head, in 32 bits
            at.numbers += heads * h * 2 + groups * h * 2 + heads * 4 / size
        (at.flow,) = at.linear(attention.o_proj, kept=at.flow and not written_out)
        at.flow = residual = residual or at.flow
        at.norm(block.post_attention_layernorm, d)
        wide = config.intermediate_size
        if mlp.gated:
            gate, up = at.linear(mlp.gate_proj, mlp.up_proj)
            # the gate before its activation; each factor's other factor
            at.numbers += wide * (gate + gate + up)
            at.flow = gate or up
        else:
            (at.flow,) = at.linear(mlp.up_proj)
            at.numbers += wide * at.flow
        (at.flow,) = at.linear(mlp.down_proj)
        at.flow = at.flow or residual
        per_layer.append(at.numbers - before)
    body = at.numbers
    at.norm(gpt.model.norm, d)
    cut = gpt.is_gradient_checkpointing
    # each layer keeps its input alone; one layer at a time is computed again,
    if cut and body:
        # and ends with its output, in place of that input,
        at.numbers += len(per_layer) * d + max(per_layer) - body
        # or beside it, if what it kept was the widened input
        at.numbers += d if at.widened else 0
    total = int(at.numbers * tokens * size)
    # the angles: once for all layers, in 32 bits; of which each layer makes 16 for
    # itself
    if rotated:
        in_32, in_16 = cut or size == 4, (1 if cut else rotated) * (size < 4)
        total += 2 * seq_len * h * (4 * in_32 + size * in_16)
    total += positions * seq_len * 8  # the positions' numbers: once
    total += at.flow * tokens  # where the labels are
    if at.flow or trained(gpt.lm_head):
        head_input = d * size if gpt.lm_head.weight.requires_grad else 0
        # input, log-probabilities, labels; how many
        total += labels * (head_input + config.vocab_size * 4 + 8) + 4
    return total


class Alive(TorchDispatchMode):
    """Within it: `bytes` of the tensors that were made here and still are, and the
    `most` that there ever were."""

    def __init__(self):
        super().__init__()
        self.bytes, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        # what comes in was there before, or is known
        for t in tree_leaves((args, kwargs)):
            if torch.is_tensor(t):
                self.add(t.untyped_storage(), 0)
        for t in tree_leaves(result):
            if torch.is_tensor(t):
                self.add(t.untyped_storage(), t.untyped_storage().nbytes())
        return result

    def add(self, storage, size):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def checkpointed_bytes(gpt, loss_of):
    """What is kept with checkpointing: after the forward pass, and most by one layer
    when it is computed again."""
    alive, before, layers = Alive(), [], []
    hooks = [
        hook
        for block in gpt.model.layers
        for hook in (
            block.register_forward_pre_hook(lambda *_: before.append(alive.bytes)),
            block.register_forward_hook(
                lambda *_: layers.append(alive.bytes - before.pop())
            ),
        )
    ]
    try:
        with set_checkpoint_early_stop(False), alive:
            loss = loss_of()
            kept = alive.bytes - loss.nbytes
            layers.clear()
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return kept + max(layers, default=0)


@torch.enable_grad()
def measured_step(model, batch_size, seq_len, optimizer):
    """One real step at rate 0, which changes nothing: bytes of (gradients, optimizer
    state, saved activations)."""
    params = [p for p in model.parameters() if p.requires_grad]
    device, saved, kept = params[0].device, {}, None
    own = {
        t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]
    }
    ids = torch.randint(
        model.get_input_embeddings().weight.shape[0],
        (batch_size, seq_len),
        device=device,
    )
    own.add(ids.untyped_storage().data_ptr())

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # kept alive, so that no address is used twice
            saved[storage.data_ptr()] = storage
        return tensor

    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    loss_of = lambda: model(input_ids=ids, labels=ids, **fast_loss(model)).loss
    if (
        isinstance(bare(model), GPT)
        and bare(model).is_gradient_checkpointing
        and bare(model).training
    ):
        kept = checkpointed_bytes(bare(model), loss_of)
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of()
        loss.backward()
        kept = sum(storage.nbytes() for storage in saved.values())
    stepper = make_optimizer(
        model, optimizer, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0
    )
    stepper.step()
    size = lambda tensors: sum(
        t.numel() * t.element_size() for t in tensors if torch.is_tensor(t)
    )
    states = size(t for state in stepper.state.values() for t in state.values())
    result = size(p.grad for p in params), states, kept
    for p, grad in zip(params, before):
        p.grad = grad
    return result


def memory_ledger(model, batch_size=16, seq_len=64, optimizer="adamw", measure=False):
    """The Ledger of one training step of `model` as it is now: what requires a gradient
    counts as trained.

    optimizer   "adamw", "adamw8bit", "paged_adamw", "adam", "sgd", or a factory (then
    its state is only measured) measure     also run one step with random tokens, at
    rate 0; weights and gradients are left as they were.
                The prediction alone needs no memory: it works on torch's meta device,
                  for 8 billion parameters too"""
    ours = [p for p in model.parameters() if p.requires_grad]
    formats = weight_bytes(model)
    predicted = {
        "weights": sum(formats.values()),
        "gradients": sum(p.nbytes for p in ours),
        "optimizer": optimizer_bytes(optimizer, ours),
        "activations": activation_bytes(model, batch_size, seq_len) if ours else 0,
    }
    four = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    if four:
        predicted["a dense weight"] = max(
            m.in_features * m.out_features * (m.compute_dtype or model.dtype).itemsize
            for m in four
        )
    measured = {}
    if measure:
        devices = [p.device for p in ours[:1] if p.device.type == "cuda"]
        with torch.random.fork_rng(devices):
            gradients, state, activations = measured_step(
                model, batch_size, seq_len, optimizer
            )
        tensors = [*model.parameters(), *model.buffers()]
        # bitsandbytes keeps scales apart
        tensors += [t for m in four for t in quantized_tensors(m)[1] if t is not None]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tensors
        }
        measured = {
            "weights": sum(storages.values()),
            "gradients": gradients,
            "optimizer": state,
            "activations": activations,
        }
    return Ledger(predicted, measured, batch_size, seq_len, formats)


@torch.enable_grad()
def peak_bytes(model, batch_size=16, seq_len=64, optimizer="adamw"):
    """Bytes at the fullest moment of a training step, measured: what the ledger lists,
    and what comes and goes beside it.

    Two steps at rate 0 with random tokens; in the second the optimizer has its states.
    Nothing is changed."""
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in params]
    stepper, alive = (
        make_optimizer(model, optimizer, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0),
        Alive(),
    )
    with torch.random.fork_rng([]):
        ids = torch.randint(
            model.get_input_embeddings().weight.shape[0],
            (batch_size, seq_len),
            device=params[0].device,
        )
        with alive:
            for _ in range(2):
                stepper.zero_grad()
                model(input_ids=ids, labels=ids, **fast_loss(model)).loss.backward()
                stepper.step()
    for p, grad in zip(params, before):
        p.grad = grad
    return sum(weight_bytes(model).values()) + alive.most
