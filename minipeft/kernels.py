"""Fused forms: what a method's class says as an equation, in less time or memory.

A method names its fused form as its class attribute `kernel`, and LinearDelta.forward,
the one place that chooses, calls it first. A kernel returns the layer's output, or None
where it would not pay: then the plain equation runs. A subclass does not inherit it,
for its equation may be another. `rows_kernel` likewise is for a batch whose rows have
different adapters; Slot.forward_fused_rows chooses it, else the rows are split.
tests/test_kernels.py and tests/test_mixed_rows.py hold every kernel equal to the plain
form, in outputs and gradients.
"""

import torch
import torch.nn.functional as F


def can_fuse(adapter, base, x):
    """True where W + delta may stand in for W, with the same result: the layer is a
    bare nn.Linear of one precision, and x is not dropped out for the adapter alone."""
    dtypes = {x.dtype, base.module.weight.dtype, next(adapter.parameters()).dtype}
    dropped = adapter.dropout and adapter.training
    autocast = torch.is_autocast_enabled(x.device.type)
    return base.is_plain_linear and len(dtypes) == 1 and not dropped and not autocast


# LoRA, AdaLoRA


def add_low_rank(adapter, base, x):
    """y + s B (A x), with the sum inside the second product: no second tensor of y's
    size (..., d_out)."""
    if getattr(adapter.lora_B, "bias", None) is not None:
        return None
    A, B = adapter.factors
    y = base(x)
    h = F.linear(adapter.adapter_input(x), A)  # (..., r)
    rows = y.numel() // len(B)  # not -1: AdaLoRA may prune all, r = 0
    out = torch.addmm(
        y.to(h.dtype).reshape(rows, len(B)),
        h.reshape(rows, B.shape[1]),
        B.T,
        alpha=adapter.scaling,
    )
    return out.view(y.shape).to(y.dtype)


def add_low_rank_rows(adapters, base, x):
    """y_i + s_i B_i (A_i x_i), i over the rows of x (or groups of consecutive rows):
    every row has its own LoRA, and two batched products serve all. The factors of each
    row are gathered, smaller ranks padded with zeros. Punica (Chen et al. 2023, arXiv
    2310.18547) and S-LoRA (Sheng et al. 2023, arXiv 2311.03285) do so on the GPU.

    adapters: one for each row or group, None for none. Returns None where their
    equations are not plain: a bias on B, dropout in training, hooks, several
    precisions."""
    if not can_stack(adapters):
        return None
    factors = [None if adapter is None else adapter.factors for adapter in adapters]
    A, B = stack_factors(factors)
    y = base(x)
    first = next(adapter for adapter in adapters if adapter is not None)
    rows = first.adapter_input(x).reshape(len(adapters), -1, A.shape[2])
    h = rows @ A.transpose(1, 2)  # (n, T, r)
    scaling = [0.0 if adapter is None else adapter.scaling for adapter in adapters]
    h = h * torch.tensor(scaling, dtype=h.dtype, device=h.device).view(-1, 1, 1)
    y_rows = y.reshape(len(adapters), -1, B.shape[1]).to(h.dtype)
    out = torch.baddbmm(y_rows, h, B.transpose(1, 2))  # (n, T, d_out)
    return out.view(y.shape).to(y.dtype)


def can_stack(adapters):
    """True where adapters, None among them, are plain LoRAs of one precision."""
    distinct = {id(a): a for a in adapters if a is not None}.values()
    kinds = {(A.dtype, A.device, B.dtype) for A, B in (a.factors for a in distinct)}
    return len(kinds) == 1 and not any(
        a.lora_B.bias is not None
        or (a.dropout and a.training)
        or a._forward_hooks
        or a._forward_pre_hooks
        for a in distinct
    )


def stack_factors(factors):
    """(n, r, d_in), (n, d_out, r) of n pairs A (r_i, d_in) and B (d_out, r_i), or None;
    r is the largest r_i. What is missing is zero."""
    pairs = {id(pair[0]): pair for pair in factors if pair is not None}
    r = max(len(A) for A, _ in pairs.values())
    for key, (A, B) in pairs.items():
        if len(A) < r:
            missing = r - len(A)
            pairs[key] = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
    A, B = next(iter(pairs.values()))
    none = None
    if None in factors:
        none = torch.zeros_like(A), torch.zeros_like(B)
    padded = [none if pair is None else pairs[id(pair[0])] for pair in factors]
    return tuple(torch.stack(parts) for parts in zip(*padded))


# DoRA


def dora(adapter, base, x):
    """g (W x + s B A x) + b, with the sum inside the second product, in place where W x
    is nobody else's. Under dropout W x is needed twice, so the plain equation runs."""
    if adapter.dropout and adapter.training:
        return None
    A, B = adapter.lora_A.weight, adapter.lora_B.weight
    g = adapter.lora_magnitude_vector / adapter.norm(base)
    h = F.linear(adapter.adapter_input(x), A).reshape(-1, len(A))  # (N, r)
    unmerged = base.unmerged
    b = unmerged.bias
    if unmerged is base.module and can_fuse(adapter, base, x):
        y = F.linear(x, base.weight).reshape(-1, len(B))
        z = y.addmm_(h, B.T, alpha=adapter.scaling)  # (W + s B A) x (N, d_out)
    else:
        y = base(x).reshape(-1, len(B))
        z = y.to(h.dtype) if b is None else y.to(h.dtype) - b.to(h.dtype)
        z = torch.addmm(z, h, B.T, alpha=adapter.scaling)
    out = g * z if b is None else torch.addcmul(b.to(z.dtype), g, z)
    return out.view(*x.shape[:-1], len(B)).to(y.dtype)


# LoHa


def loha(adapter, base, x):
    """(W + delta) x in one product where that is possible, and nothing of delta's size
    kept for the backward pass."""
    if can_fuse(adapter, base, x):
        weight = Hadamard.apply(base.weight, *adapter.factors, adapter.scaling)
        return F.linear(x, weight, base.bias)
    y = base(x)
    delta = Hadamard.apply(None, *adapter.factors, adapter.scaling)
    return (y + F.linear(adapter.adapter_input(x), delta)).to(y.dtype)


class Hadamard(torch.autograd.Function):
    """W + s (B1 A1) * (B2 A2). The backward pass computes both products again from the
    factors, which is all that is kept."""

    @staticmethod
    def forward(ctx, W, B1, A1, B2, A2, scaling):
        ctx.save_for_backward(B1, A1, B2, A2)
        ctx.scaling = scaling
        delta = (B1 @ A1).mul_(B2 @ A2).mul_(scaling)  # (d_out, d_in)
        return delta if W is None else delta.add_(W)

    @staticmethod
    def backward(ctx, grad):
        B1, A1, B2, A2 = ctx.saved_tensors
        grad = grad * ctx.scaling
        one, two = grad * (B2 @ A2), grad * (B1 @ A1)
        return None, one @ A1.T, B1.T @ one, two @ A2.T, B2.T @ two, None


# LoKr


def lokr(adapter, base, x):
    """y + s C X D^T, with the sum inside the second product, and X D^T not kept for the
    backward pass."""
    y = base(x)
    C, D = adapter.factors
    X = adapter.adapter_input(x).reshape(-1, C.shape[1], D.shape[1])  # (N, m, n)
    Y = y.to(X.dtype).reshape(-1, len(C), len(D))  # (N, p, q)
    return AddKronecker.apply(Y, X, adapter.scaling * C, D).view(y.shape).to(y.dtype)


class AddKronecker(torch.autograd.Function):
    """Y + C X D^T for each of N matrices X (m, n) and Y (p, q). The backward pass
    computes X D^T again."""

    @staticmethod
    def forward(ctx, Y, X, C, D):
        ctx.save_for_backward(X, C, D)
        return torch.baddbmm(Y, C.expand(len(X), *C.shape), X @ D.T)

    @staticmethod
    def backward(ctx, grad):
        X, C, D = (tensor.to(grad.dtype) for tensor in ctx.saved_tensors)  # autocast's
        dXD = C.T @ grad  # (N, m, q), the gradient of X D^T
        dX = dXD @ D
        dD = dXD.flatten(0, 1).T @ X.flatten(0, 1)
        del dXD  # before another tensor of its size is made
        return grad, dX, (grad @ (X @ D.T).mT).sum(0), dD


# VeRA


def vera(adapter, base, x):
    """(W + b * B d A) x in one product, where that takes fewer multiplications."""
    A, B = adapter.projections(base)
    (r, d_in), d_out, N = A.shape, len(B), x.numel() // A.shape[1]
    flops_fused = (N + 2 * r) * d_in * d_out
    flops_separate = 2 * N * r * (d_in + d_out)
    if flops_fused >= flops_separate or not can_fuse(adapter, base, x):
        return None
    vectors = adapter.vera_lambda_b, adapter.vera_lambda_d
    return FusedVera.apply(x, base.weight, base.bias, *vectors, A, B)


class FusedVera(torch.autograd.Function):
    """x (W + b * B d A)^T + bias. The gradients of b and d are read off one matrix
    M (d_out, r), the gradient of b B d A without them, made in the cheaper order;
    autograd would make the gradient of all of W first."""

    @staticmethod
    def forward(ctx, x, W, bias, b, d, A, B):
        weight = torch.addmm(W, b[:, None] * B * d, A)  # (d_out, d_in)
        ctx.save_for_backward(x, weight, b, d, A, B)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, b, d, A, B = ctx.saved_tensors
        rows = grad.reshape(-1, len(B))  # (N, d_out)
        M = B * torch.linalg.multi_dot((rows.T, x.reshape(len(rows), -1), A.T))
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, M @ d, b @ M, None, None
