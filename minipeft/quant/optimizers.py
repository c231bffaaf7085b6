"""Optimizers that need less memory: AdamW with its two running means in 8 bits, and
AdamW with them in pages.

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
Each step: take the means out of their 8 bits, do Adam's update in 32, put them back.
Blocks keep an outlier's harm local; the dynamic map keeps small numbers apart from
zero, which the divisor's square root depends on.
"""

import warnings

import torch

from ..io import brief, check_choice, check_number
from .bitsandbytes import import_bitsandbytes
from .blockwise import check_code, dequantize_blockwise, dynamic_map, nearest_codes

BLOCK, SMALL = 256, 4096


def check_betas(betas):
    """ValueError unless these are AdamW's two."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas = {brief(betas)}: expected two numbers")
    for beta in betas:
        check_number("betas", beta, least=0, below=1)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017, 1711.05101) with 8-bit states: 2 bytes a
    weight instead of 8.

    Tensors of fewer than min_8bit_size numbers keep 32-bit states, as in bitsandbytes.
    Every weight has its step count. signed, unsigned: the codebooks of the two means,
    sorted; by default the dynamic maps.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        min_8bit_size=SMALL,
        signed=None,
        unsigned=None,
        grid=None,
    ):
        check_number("lr", lr, least=0)
        check_number("eps", eps, least=0)
        check_number("weight_decay", weight_decay, least=0)
        check_betas(betas)
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.min_8bit_size = min_8bit_size
        self.grid = grid
        self.codes = {
            "exp_avg": dynamic_map() if signed is None else signed,
            "exp_avg_sq": dynamic_map(signed=False) if unsigned is None else unsigned,
        }
        for code in self.codes.values():
            check_code(code)

    def load(self, state, name):
        """A running mean in 32 bits."""
        if f"{name}_absmax" not in state:
            return state[name]
        absmax = state[f"{name}_absmax"]
        return dequantize_blockwise(state[name], absmax, self.codes[name], BLOCK)

    def store(self, state, name, value):
        """Put a running mean back into its 8 bits."""
        if f"{name}_absmax" in state:
            code = self.codes[name]
            value, absmax = nearest_codes(value, code, BLOCK, self.grid)
            state[f"{name}_absmax"] = absmax
        state[name] = value

    def init_state(self, p):
        state = self.state[p]
        state["step"] = 0
        for name in self.codes:
            if p.numel() >= self.min_8bit_size:
                state[f"{name}_absmax"] = None
            self.store(state, name, torch.zeros_like(p, dtype=torch.float32))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, **group)
        return loss

    def update(self, p, lr, betas, eps, weight_decay, **_):
        """One step of AdamW for one parameter."""
        if p.grad.is_sparse:
            raise RuntimeError(
                "AdamW8bit has no sparse gradients: leave nn.Embedding's sparse=True"
                " out"
            )
        if not self.state[p]:
            self.init_state(p)
        state = self.state[p]
        state["step"] += 1
        beta1, beta2 = betas
        grad = p.grad.float()
        exp_avg = self.load(state, "exp_avg").mul_(beta1)
        exp_avg.add_(grad, alpha=1 - beta1)
        exp_avg_sq = self.load(state, "exp_avg_sq").mul_(beta2)
        exp_avg_sq.addcmul_(grad, grad, value=1 - beta2)
        divisor = exp_avg_sq.sqrt() / (1 - beta2 ** state["step"]) ** 0.5
        divisor.add_(eps)
        step_size = lr / (1 - beta1 ** state["step"])
        weight = p.float() * (1 - lr * weight_decay)
        p.copy_(weight.addcdiv_(exp_avg, divisor, value=-step_size))
        self.store(state, "exp_avg", exp_avg)
        self.store(state, "exp_avg_sq", exp_avg_sq)

    def load_state_dict(self, state_dict):
        load_uncast(self, state_dict)


def load_uncast(optimizer, state_dict):
    """torch's load_state_dict, without its cast of every state to the dtype of the
    weight, which ruins states in 8 bits."""
    torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, saved in state_dict["state"].items():
        state = optimizer.state[params[index]]
        for name, value in saved.items():
            if torch.is_tensor(value):
                state[name] = value.to(state[name].device, copy=True)


def as_list(params):
    """What a group holds: one parameter, or any iterable, which may end after once."""
    return [params] if torch.is_tensor(params) else list(params)


def PagedAdamW(
    params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, optim_bits=32
):
    """AdamW whose states live in unified memory: where the GPU's is full, the driver
    moves pages of them to the CPU's and back. It is bitsandbytes' own, for GPUs. On a
    CPU there is nothing to page: a plain AdamW, and a warning."""
    check_choice("optim_bits", optim_bits, (8, 32))
    groups = [
        group | {"params": as_list(group["params"])}
        if isinstance(group, dict)
        else group
        for group in params
    ]
    first = groups[0] if groups else None
    if isinstance(first, dict):
        first = next(iter(first["params"]), None)
    if isinstance(first, tuple):  # (its name, a parameter)
        first = first[1]
    if getattr(first, "is_cuda", False):
        Paged = import_bitsandbytes().optim.PagedAdamW
        return Paged(groups, lr, betas, eps, weight_decay, optim_bits=optim_bits)
    warnings.warn(
        "paging moves optimizer states between a GPU's memory and the CPU's: on a CPU"
        " it does nothing, and this is plain AdamW",
        stacklevel=2,
    )
    kind = AdamW8bit if optim_bits == 8 else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
