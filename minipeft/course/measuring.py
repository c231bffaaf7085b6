"""What a training step really holds, measured beside the memory ledger's arithmetic."""

import contextlib
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from ..lm.evaluation import fast_loss, unwrap_peft
from ..lm.gpt import GPT
from ..lm.memory import memory_ledger, weight_bytes
from ..lm.training import make_optimizer
from ..quant.linear4bit import is_4bit, quantized_tensors


class LiveTensors(TorchDispatchMode):
    """Within it: `bytes` of the tensors that were made here and still are, and the
    `peak` that there ever was."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.known = set()

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
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.bytes -= size


@contextlib.contextmanager
def own_gradients(model):
    """Within it the trained parameters have no gradients; afterwards those of before.
    Yields the parameters."""
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in params]
    devices = [params[0].device] if params[0].device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for p in params:
                p.grad = None
            yield params
    finally:
        for p, grad in zip(params, before):
            p.grad = grad


def random_ids(model, batch_size, seq_len):
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    return torch.randint(vocabulary, (batch_size, seq_len), device=device)


def idle_optimizer(model, optimizer):
    """An optimizer whose steps change nothing."""
    return make_optimizer(model, optimizer, 0.0, (0.9, 0.999), weight_decay=0.0)


def saved_bytes(model, loss_of, known):
    """Bytes that the forward pass saves for the backward pass, which is run too.
    known: the addresses of what was there before."""
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            # kept alive, so that no address is used twice
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()
    loss.backward()
    return sum(storage.nbytes() for storage in saved.values())


def checkpointed_bytes(gpt, loss_of):
    """What is kept with checkpointing: after the forward pass, and most by one layer
    when it is computed again."""
    live = LiveTensors()
    before = []
    layers = []
    hooks = []
    for block in gpt.model.layers:

        def enter(*_):
            return before.append(live.bytes)

        def leave(*_):
            return layers.append(live.bytes - before.pop())

        hooks.append(block.register_forward_pre_hook(enter))
        hooks.append(block.register_forward_hook(leave))
    try:
        with set_checkpoint_early_stop(False), live:
            loss = loss_of()
            kept = live.bytes - loss.nbytes
            layers.clear()
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return kept + max(layers, default=0)


def measured_step(model, batch_size, seq_len, optimizer):
    """One real step at rate 0, which changes nothing: bytes of (gradients, optimizer
    state, saved activations)."""
    with own_gradients(model) as params:
        ids = random_ids(model, batch_size, seq_len)

        def loss_of():
            return model(input_ids=ids, labels=ids, **fast_loss(model)).loss

        gpt = unwrap_peft(model)
        if isinstance(gpt, GPT) and gpt.is_gradient_checkpointing and gpt.training:
            kept = checkpointed_bytes(gpt, loss_of)
        else:
            there = [*model.parameters(), *model.buffers(), ids]
            known = {t.untyped_storage().data_ptr() for t in there}
            kept = saved_bytes(model, loss_of, known)
        stepper = idle_optimizer(model, optimizer)
        stepper.step()
        values = [t for state in stepper.state.values() for t in state.values()]
        states = sum(t.nbytes for t in values if torch.is_tensor(t))
        gradients = sum(p.grad.nbytes for p in params if p.grad is not None)
    return gradients, states, kept


def measured_ledger(model, batch_size=16, seq_len=64, optimizer="adamw"):
    """memory_ledger, and beside it what one step with random tokens really holds. The
    step has rate 0: weights and gradients are left as they were."""
    ledger = memory_ledger(model, batch_size, seq_len, optimizer)
    gradients, states, kept = measured_step(model, batch_size, seq_len, optimizer)
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if is_4bit(module):  # bitsandbytes keeps scales apart
            tensors += quantized_tensors(module)[1]
    storages = [t.untyped_storage() for t in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    measured = {
        "weights": sum(sizes.values()),
        "gradients": gradients,
        "optimizer": states,
        "activations": kept,
    }
    return replace(ledger, measured=measured)


def peak_bytes(model, batch_size=16, seq_len=64, optimizer="adamw"):
    """Bytes at the fullest moment of a training step, measured: what the ledger lists,
    and what comes and goes beside it.

    Two steps at rate 0 with random tokens; in the second the optimizer has its states.
    Nothing is changed."""
    live = LiveTensors()
    with own_gradients(model):
        stepper = idle_optimizer(model, optimizer)
        ids = random_ids(model, batch_size, seq_len)
        with live:
            for _ in range(2):
                stepper.zero_grad()
                model(input_ids=ids, labels=ids, **fast_loss(model)).loss.backward()
                stepper.step()
    return sum(weight_bytes(model).values()) + live.peak
