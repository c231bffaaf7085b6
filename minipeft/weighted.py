"""Floor 4: new LoRAs made of old ones, in the ways of Hugging Face PEFT's
add_weighted_adapter.

What one would like is the weighted sum of the changes, sum_i w_i s_i B_i A_i. Its rank
is the sum of the ranks:
    cat      keeps it all, exactly: A's stacked above each other, B's side by side
    svd      the nearest matrix of the rank wanted to that sum
    linear   adds up A's and B's separately. B_1 A_2 + B_2 A_1 come in too: cheap, and
      another thing altogether
And before summing, tensors may be thinned out, keeping the share `density` of their
entries:
    magnitude_prune   the largest entries stay
    ties     these too; then the adapters vote on each entry's sign, and the mean is
      over those who agree
             (Yadav et al. 2023, arXiv 2306.01708)
    dare     entries stay by chance, and are scaled up by 1 / density (Yu et al. 2023,
      2311.03099); then linear or ties
"..._svd" does so with the changes themselves, the others with A's and B's separately.
"""

import dataclasses
import difflib
import math
import warnings

import torch

from .config import ConfigError
from .methods.lora import LoraConfig

SEPARATE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = (
    "svd",
    "cat",
    *SEPARATE,
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
)


def keep_largest(tensor, density):
    mask = torch.zeros(tensor.numel())
    mask[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view_as(tensor).to(tensor)


def keep_random(tensor, density):
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def sum_of(tensors, weights, way, density=None, majority="total"):
    """The weighted sum of tensors of one shape. `majority` counts votes by size
    ("total") or by head ("frequency")."""
    if density is not None and density < 1:
        thin = keep_random if "dare" in way else keep_largest
        tensors = [thin(tensor, density) for tensor in tensors]
    tensors = torch.stack(tensors)  # (n, ...)
    weighted = tensors * torch.tensor(weights).to(tensors).view(
        -1, *[1] * (tensors.dim() - 1)
    )
    if "ties" not in way:
        return weighted.sum(0)
    votes = tensors if majority == "total" else tensors.sign()
    agree = tensors.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    # divided by their number, not their weights
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def low_rank(delta, rank, clamp=None, full_matrices=True, driver=None):
    """(A, B) with B A the matrix of that rank which is nearest to delta (d_out, d_in)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    A, B = Vh[:rank], U[:, :rank] * S[:rank]
    if clamp is not None:
        high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A, B = A.clamp(-high, high), B.clamp(-high, high)
    return A, B


def weighted(factors, weights, way, rank, svd=(), density=None, majority="total"):
    """One layer: the (A, B) of the new adapter, whose scaling is 1, from [(A, B,
    scaling)]."""
    if way == "cat":
        scaled = [A * (w * s) for (A, _, s), w in zip(factors, weights)]
        return torch.cat(scaled), torch.cat([B for _, B, _ in factors], 1)
    if way.endswith("svd"):
        deltas, how = (
            [B @ A * s for A, B, s in factors],
            way.removesuffix("svd").strip("_") or "linear",
        )
        return low_rank(sum_of(deltas, weights, how, density, majority), rank, *svd)
    roots = [math.sqrt(abs(w * s)) for (_, _, s), w in zip(factors, weights)]
    signed = [
        math.copysign(root, w * s)
        for root, (_, _, s), w in zip(roots, factors, weights)
    ]
    return (
        sum_of([A for A, _, _ in factors], signed, way, density, majority),
        sum_of([B for _, B, _ in factors], roots, way, density, majority),
    )


def plan(configs, parts, weights, paths, way, svd_rank, svd, density, majority):
    """The new adapter's config, and the function that fills its {path: adapter}. parts:
    the same of the old ones."""
    if way not in COMBINATION_TYPES:
        near = difflib.get_close_matches(str(way), COMBINATION_TYPES, n=1)
        raise ConfigError(
            f"unknown combination_type {way!r}"
            + (f" (nearest: {near[0]})" if near else "")
            + f"; valid: {', '.join(COMBINATION_TYPES)}"
        )
    if len(configs) != len(weights) or not configs:
        raise ConfigError(
            f"{len(configs)} adapters and {len(weights)} weights: one weight for each"
            " is expected"
        )
    if any(
        type(config) is not LoraConfig or config.use_dora or config.lora_bias
        for config in configs
    ):
        raise ConfigError(
            "only plain LoRAs can be combined, without use_dora and lora_bias"
        )
    if any(
        not hasattr(adapter, "factors") for part in parts for adapter in part.values()
    ):
        raise ConfigError("adapters with modules_to_save cannot be combined")
    thins = any(word in way for word in ("ties", "dare", "magnitude"))
    if thins and not (density is not None and density >= 0):
        raise ConfigError(
            f"{way} needs a density from 0 to 1, the share of entries that stay; given"
            f" was {density!r}"
        )
    if density is not None and not thins:
        warnings.warn(
            f"combination_type {way!r} keeps every entry: density = {density} is not"
            " used",
            stacklevel=3,
        )
    if len(configs) == 1:
        way, thins = "linear", False
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if way in SEPARATE and len(set(ranks)) > 1:
        raise ConfigError(
            f"{way} needs adapters of one rank; these have {ranks}. cat and svd"
            " take any"
        )
    rank = (
        sum(ranks)
        if way == "cat"
        else svd_rank or max(ranks)
        if way.endswith("svd")
        else ranks[0]
    )
    init = configs[0].init_lora_weights
    config = dataclasses.replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=paths,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        # leave the base alone
        init_lora_weights=init if isinstance(init, bool) else True,
    )

    @torch.no_grad()
    def fill(new):
        for path, adapter in new.items():
            here = [(part[path], w) for part, w in zip(parts, weights) if path in part]
            factors = [
                (*(factor.detach() for factor in old.factors), old.scaling)
                for old, _ in here
            ]
            A, B = weighted(
                factors,
                [w for _, w in here],
                way,
                rank,
                svd,
                density if thins else None,
                majority,
            )
            for own, factor, taken in zip(
                adapter.factors,
                (A, B),
                (slice(len(A)), (slice(None), slice(B.shape[1]))),
            ):
                # where fewer than `rank` came together, the rest stays zero
                own.zero_()
                own[taken] = factor

    return config, fill
