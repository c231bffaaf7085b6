"""Weighted combinations of adapters, as Hugging Face PEFT's add_weighted_adapter.

The wish is the weighted sum of the changes, sum_i w_i s_i B_i A_i. Its rank is the sum
of the ranks:
    cat      keeps all of it, exactly: the A's stacked above each other, the B's side by
             side
    svd      the matrix of the wanted rank that is nearest to the sum
    linear   adds up A's and B's separately. B_1 A_2 + B_2 A_1 come in too: cheap, and
             not the sum
Before summing, tensors may be thinned out to the share `density` of their entries:
    magnitude_prune   the largest entries stay
    ties     likewise; then the adapters vote on each entry's sign, and the mean is over
             those that agree (Yadav et al. 2023, arXiv 2306.01708)
    dare     entries stay at random, and are scaled up by 1 / density (Yu et al. 2023,
             arXiv 2311.03099); then linear or ties
"..._svd" does so with the changes themselves, the others with A's and B's separately.

IA3's vectors are added up: sum_i w_i l_i.
"""

import dataclasses
import math
import warnings

import torch

from . import io
from .config import ConfigError
from .methods.ia3 import IA3Config
from .methods.lora_config import LoraConfig
from .methods.modules_to_save import ModuleCopy
from .saving import tensor_key

SVD_DRIVERS = ("gesvd", "gesvdj", "gesvda")  # of torch.linalg.svd, on CUDA only
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


# ---- tensors -------------------------------------------------------------------------


def keep_largest(tensor, density):
    mask = torch.zeros(tensor.numel())
    mask[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view_as(tensor).to(tensor)


def keep_random(tensor, density):
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def weighted_sum(tensors, weights, combination_type, density=None, majority="total"):
    """The weighted sum of tensors of one shape. `majority` counts votes by size
    ("total") or by head ("frequency")."""
    if density is not None and density < 1:
        thin_out = keep_random if "dare" in combination_type else keep_largest
        tensors = [thin_out(tensor, density) for tensor in tensors]
    tensors = torch.stack(tensors)  # (n, ...)
    weights = torch.tensor(weights).to(tensors)
    weighted = tensors * weights.view(-1, *[1] * (tensors.dim() - 1))
    if "ties" not in combination_type:
        return weighted.sum(0)
    votes = tensors if majority == "total" else tensors.sign()
    agree = tensors.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    # divided by their number, not their weights
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def low_rank(delta, rank, clamp=None, full_matrices=True, driver=None):
    """(A, B) with B A the matrix of that rank which is nearest to delta (d_out,
    d_in)."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=full_matrices, driver=driver)
    A = Vh[:rank]
    B = U[:, :rank] * S[:rank]
    if clamp is not None:
        high = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
        A = A.clamp(-high, high)
        B = B.clamp(-high, high)
    return A, B


def combine_factors(old, weights, kind, rank, svd=(), density=None, majority="total"):
    """One layer: the (A, B) of the new adapter, whose scaling is 1, from [(A, B,
    scaling)] of the old ones."""
    signed = [w * s for (_, _, s), w in zip(old, weights)]
    if kind == "cat":
        A = torch.cat([A * w for (A, _, _), w in zip(old, signed)])
        return A, torch.cat([B for _, B, _ in old], 1)
    if kind.endswith("svd"):
        deltas = [B @ A * s for A, B, s in old]
        kind = kind.removesuffix("svd").strip("_") or "linear"
        return low_rank(
            weighted_sum(deltas, weights, kind, density, majority), rank, *svd
        )
    roots = [math.sqrt(abs(w)) for w in signed]
    signed_roots = [math.copysign(root, w) for root, w in zip(roots, signed)]
    A = weighted_sum([A for A, _, _ in old], signed_roots, kind, density, majority)
    return A, weighted_sum([B for _, B, _ in old], roots, kind, density, majority)


# ---- adapters ------------------------------------------------------------------------


class Combination:
    """A weighted sum of adapters: the new one's `config`, and what makes its tensors.
    Raises ConfigError where they cannot be combined so.

    configs, adapters ({path: adapter}) and weights: of each old one. paths: in the
    order of the model. options: those of PeftModel.add_weighted_adapter.
    """

    def __init__(self, configs, adapters, weights, paths, **options):
        check_weights(configs, weights)
        self.copies = module_copies(adapters)
        self.old = {  # path: [(adapter, its weight)] of those that stand there
            path: [(at[path], w) for at, w in zip(adapters, weights) if path in at]
            for path in paths
            if path not in self.copies
        }
        self.options = options
        all_ia3 = all(type(config) is IA3Config for config in configs)
        self.combine = combine_ia3s if all_ia3 else combine_loras
        make_config = ia3_config if all_ia3 else lora_config
        self.config = make_config(configs, self.old, **options)
        self.config.modules_to_save = sorted(self.copies) or None
        if len(configs) == 1:  # it is scaled, whatever is asked for, as in PEFT
            options["combination_type"] = "linear"

    @torch.no_grad()
    def tensors(self):
        """{key: tensor} of the new adapter"""
        parts = {
            path: self.combine(here, self.config, **self.options)
            for path, here in self.old.items()
        }
        parts |= {path: copy.to_file() for path, copy in self.copies.items()}
        return {
            tensor_key(path, name): tensor
            for path, part in parts.items()
            for name, tensor in part.items()
        }


def check_weights(configs, weights):
    if not isinstance(weights, (list, tuple)):
        raise ConfigError(
            f"weights = {io.brief(weights)}: expected a list of numbers, one for each"
            " adapter"
        )
    if len(configs) != len(weights) or not configs:
        raise ConfigError(
            f"{len(configs)} adapters and {len(weights)} weights: expected one weight"
            " for each"
        )
    for weight in weights:
        io.check_number("weight", weight, error=ConfigError)


def module_copies(adapters):
    """{path: the copy of a whole module (modules_to_save) there}. Copies cannot be
    summed: raises ConfigError where two adapters have one at the same place. (PEFT
    starts the combination from the base's module again.)"""
    copies = {}
    for by_path in adapters:
        for path, adapter in by_path.items():
            if isinstance(adapter, ModuleCopy):
                if path in copies:
                    raise ConfigError(
                        f"two of the adapters have a copy of {path} (modules_to_save):"
                        " such copies cannot be summed"
                    )
                copies[path] = adapter
    return copies


def only_at(paths):
    """Fields that choose just these layers."""
    return dict(
        target_modules=list(paths),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
    )


def ia3_config(configs, old, combination_type, svd_rank, density, **_):
    """IA3s are combined in one way, the weighted sum of their vectors, as in PEFT: any
    other is a ConfigError."""
    if combination_type not in ("svd", "linear"):  # PEFT's default, or what is done
        raise ConfigError(
            f"combination_type = {io.brief(combination_type)}: IA3s are combined by the"
            " weighted sum of their vectors; expected 'linear'"
        )
    for name, value in (("svd_rank", svd_rank), ("density", density)):
        if value is not None:
            raise ConfigError(f"{name} = {value!r} has no effect on IA3s: leave it out")
    for path, here in old.items():
        if len({adapter.ia3_l.shape for adapter, _ in here}) > 1:
            raise ConfigError(
                f"{path}: one of the adapters scales its input, another its output"
                " (feedforward_modules)"
            )
    scales_input = [path for path, here in old.items() if here[0][0].feedforward]
    fields = only_at(old) | {"feedforward_modules": scales_input}
    return dataclasses.replace(configs[0], **fields)


def combine_ia3s(here, config, **_):
    vectors = [adapter.ia3_l for adapter, _ in here]
    return {"ia3_l": weighted_sum(vectors, [w for _, w in here], "linear")}


def lora_config(configs, old, combination_type, svd_rank, svd, density, majority):
    """The new LoRA has scaling 1."""
    check_loras(configs, combination_type, svd_rank, svd, density, majority)
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    rank = sum(ranks) if combination_type == "cat" else max(ranks)
    if len(configs) > 1:
        if combination_type.endswith("svd"):
            rank = svd_rank or rank
        check_ranks("", ranks, combination_type)
        for path, here in old.items():
            here = [len(adapter.factors[0]) for adapter, _ in here]
            check_ranks(path, here, combination_type)
    init = configs[0].init_lora_weights
    fields = only_at(old) | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": init if isinstance(init, bool) else True,  # base untouched
    }
    return dataclasses.replace(configs[0], **fields)


def combine_loras(here, config, combination_type, svd, density, majority, **_):
    factors = [(*adapter.factors, adapter.scaling) for adapter, _ in here]
    weights = [w for _, w in here]
    density = density if thins_out(combination_type) else None
    kind, rank = combination_type, config.r
    A, B = combine_factors(factors, weights, kind, rank, svd, density, majority)
    # where fewer than `rank` come together, the rest is zero
    A = torch.nn.functional.pad(A, (0, 0, 0, rank - len(A)))
    B = torch.nn.functional.pad(B, (0, rank - B.shape[1]))
    names = here[0][0].state_dict()  # A's name, B's name
    return dict(zip(names, (A, B)))


def thins_out(combination_type):
    return any(word in combination_type for word in ("ties", "dare", "magnitude"))


def check_loras(configs, combination_type, svd_rank, svd, density, majority):
    """Raise ConfigError for adapters or options that make no combination; warn of
    options that have no effect on it."""
    for config in configs:
        if type(config) is not LoraConfig or config.use_dora or config.lora_bias:
            raise ConfigError(
                f"{type(config).__name__}: only plain LoRAs (without use_dora and"
                " lora_bias) can be combined, or only IA3s"
            )
    for name, value, valid in (
        ("combination_type", combination_type, COMBINATION_TYPES),
        ("svd_driver", svd[2], (None, *SVD_DRIVERS)),
        ("majority_sign_method", majority, ("total", "frequency")),
    ):
        io.check_choice(name, value, valid, ConfigError)
    bounds = {"also": (None,), "error": ConfigError}
    io.check_number("svd_rank", svd_rank, whole=True, least=1, **bounds)
    io.check_number("svd_clamp", svd[0], least=0, most=1, **bounds)
    unused = []
    truncates = combination_type.endswith("svd") and len(configs) > 1
    if svd_rank is not None and not truncates:
        unused.append(f"keeps the ranks: svd_rank = {svd_rank}")
    if thins_out(combination_type):
        io.check_number(
            f"{combination_type} needs a density, the share of entries that stay:"
            " density",
            density,
            least=0,
            error=ConfigError,
        )
    elif density is not None:
        unused.append(f"keeps every entry: density = {density}")
    for what in unused:
        warnings.warn(
            f"combination_type {combination_type!r} {what} is not used", stacklevel=5
        )


def check_ranks(path, ranks, combination_type):
    if combination_type in SEPARATE and len(set(ranks)) > 1:
        where = f" at {path}" if path else ""
        raise ConfigError(
            f"{combination_type} needs adapters of one rank; these have {ranks}{where}."
            " cat and svd take any"
        )
