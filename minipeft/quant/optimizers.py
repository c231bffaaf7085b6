"""Optimizers that need less memory: AdamW with its two running means in 8 bits, and
AdamW with them in pages.

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861.
Each step: take the means out of their 8 bits, do Adam's update in 32, put them back.
Blocks keep an outlier's harm local; the dynamic map keeps small numbers apart from
zero, which the divisor's square root depends on.
"""

import warnings

import torch

from .blockwise import dequantize_blockwise, dynamic_map, quantize_blockwise

BLOCK, SMALL = 256, 4096


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
        if (
            lr < 0
            or eps < 0
            or weight_decay < 0
            or not all(0 <= beta < 1 for beta in betas)
        ):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: none"
                " may be negative, and betas must be below 1"
            )
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        )
        self.min_8bit_size, self.grid = min_8bit_size, grid
        self.codes = {
            "mean": dynamic_map() if signed is None else signed,
            "square": dynamic_map(signed=False) if unsigned is None else unsigned,
        }

    def read(self, state, name):
        if f"{name}_absmax" not in state:
            return state[name]
        return dequantize_blockwise(
            state[name], state[f"{name}_absmax"], self.codes[name], BLOCK
        )

    def write(self, state, name, value):
        if f"{name}_absmax" in state:
            state[name], state[f"{name}_absmax"] = quantize_blockwise(
                value, self.codes[name], BLOCK, self.grid
            )
        else:
            state[name] = value

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for name in self.codes:
                        if p.numel() >= self.min_8bit_size:
                            state[f"{name}_absmax"] = None
                        self.write(
                            state, name, torch.zeros_like(p, dtype=torch.float32)
                        )
                state["step"] += 1
                grad = p.grad.float()
                mean = self.read(state, "mean").mul_(beta1).add_(grad, alpha=1 - beta1)
                square = (
                    self.read(state, "square")
                    .mul_(beta2)
                    .addcmul_(grad, grad, value=1 - beta2)
                )
                divisor = (square.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(
                    group["eps"]
                )
                weight = p.float() * (1 - lr * group["weight_decay"])
                p.copy_(
                    weight.addcdiv_(
                        mean, divisor, value=-lr / (1 - beta1 ** state["step"])
                    )
                )
                self.write(state, "mean", mean)
                self.write(state, "square", square)
        return loss

    def load_state_dict(self, state_dict):
        # casts all states to the weights' dtype: put them back as they were
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p = params[index]
            self.state[p] = {
                k: v.to(p.device, copy=True) if torch.is_tensor(v) else v
                for k, v in saved.items()
            }


def PagedAdamW(
    params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, optim_bits=32
):
    """AdamW whose states live in unified memory: where the GPU's is full, the driver
    moves pages of them to the CPU's and back. It is bitsandbytes' own, for GPUs. On a
    CPU there is nothing to page: a plain AdamW, and a warning."""
    groups = list(params)
    first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
    if first.is_cuda:
        from bitsandbytes.optim import PagedAdamW as Paged

        return Paged(groups, lr, betas, eps, weight_decay, optim_bits=optim_bits)
    warnings.warn(
        "paging moves optimizer states between a GPU's memory and the CPU's: on a CPU"
        " it does nothing, and this is plain AdamW",
        stacklevel=2,
    )
    kind = AdamW8bit if optim_bits == 8 else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
