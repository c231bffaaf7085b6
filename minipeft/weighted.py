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


@dataclasses.dataclass(kw_only=True)
class Combination:
    """A weighted sum of adapters: the new one's configuration, and what makes its
    tensors."""

    adapters: list  # {path: adapter} of each old adapter
    weights: list  # one for each
    paths: list  # of the layers, in the order of the model
    config: object = None
    combination_type: str = "linear"
    rank: int = 0
    options: dict = dataclasses.field(default_factory=dict)  # of combine_factors
    copies: dict = dataclasses.field(default_factory=dict)  # modules_to_save

    def at(self, path):
        """[(old adapter, its weight)] of those that stand there"""
        pairs = zip(self.adapters, self.weights)
        return [(by_path[path], w) for by_path, w in pairs if path in by_path]

    @torch.no_grad()
    def tensors(self):
        """{key: tensor} of the new adapter"""
        combine = ia3_tensors if isinstance(self.config, IA3Config) else lora_tensors
        found = {}
        for path in self.paths:
            for name, tensor in combine(self, path).items():
                found[tensor_key(path, name)] = tensor
        for path, copy in self.copies.items():
            for name, tensor in copy.to_file().items():
                found[tensor_key(path, name)] = tensor
        return found


def ia3_tensors(combination, path):
    here = combination.at(path)
    vectors = [adapter.ia3_l for adapter, _ in here]
    return {"ia3_l": weighted_sum(vectors, [w for _, w in here], "linear")}


def lora_tensors(combination, path):
    here = combination.at(path)
    old = [(*adapter.factors, adapter.scaling) for adapter, _ in here]
    weights = [w for _, w in here]
    kind = combination.combination_type
    rank = combination.rank
    A, B = combine_factors(old, weights, kind, rank, **combination.options)
    # where fewer than `rank` come together, the rest is zero
    A = torch.nn.functional.pad(A, (0, 0, 0, rank - len(A)))
    B = torch.nn.functional.pad(B, (0, rank - B.shape[1]))
    names = here[0][0].state_dict()  # A's name, B's name
    return dict(zip(names, (A, B)))


def plan_combination(configs, adapters, weights, paths, **options):
    """The Combination of adapters. Raises ConfigError where they cannot be combined so.

    configs, adapters ({path: adapter}) and weights: of each. paths: in the order of the
    model. options: those of PeftModel.add_weighted_adapter.
    """
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
    copies = module_copies(adapters)
    paths = [path for path in paths if path not in copies]
    plan = Combination(adapters=adapters, weights=weights, paths=paths, copies=copies)
    if all(type(config) is IA3Config for config in configs):
        check_ia3(options)
        plan_ia3(plan, configs)
    else:
        plan_loras(plan, configs, **options)
    plan.config.modules_to_save = sorted(copies) or None
    return plan


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


def check_ia3(options):
    """IA3s have one way to be combined, the weighted sum of their vectors, as in PEFT:
    raises ConfigError where another is asked for."""
    kind = options["combination_type"]
    if kind not in ("svd", "linear"):  # PEFT's default, or what is done
        raise ConfigError(
            f"combination_type = {io.brief(kind)}: IA3s are combined by the weighted"
            " sum of their vectors; expected 'linear'"
        )
    for name in ("svd_rank", "density"):
        if options[name] is not None:
            raise ConfigError(
                f"{name} = {options[name]!r} has no effect on IA3s: leave it out"
            )


def plan_ia3(plan, configs):
    scales_input = []
    for path in plan.paths:
        shapes = {adapter.ia3_l.shape for adapter, _ in plan.at(path)}
        if len(shapes) > 1:
            raise ConfigError(
                f"{path}: one of the adapters scales its input, another its output"
                " (feedforward_modules)"
            )
        if shapes.pop()[0] == 1:  # (1, d_in)
            scales_input.append(path)
    plan.config = dataclasses.replace(
        configs[0], feedforward_modules=scales_input, **only_at(plan.paths)
    )


def only_at(paths):
    """Fields that choose just these layers."""
    return dict(
        target_modules=list(paths),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
    )


def plan_loras(plan, configs, combination_type, svd_rank, **options):
    if svd_rank is not None:
        io.check_number("svd_rank", svd_rank, whole=True, least=1, error=ConfigError)
        if not combination_type_of(configs, combination_type).endswith("svd"):
            warnings.warn(
                f"combination_type {combination_type!r} keeps the ranks: svd_rank ="
                f" {svd_rank} is not used",
                stacklevel=5,
            )
    clamp, _, driver = options["svd"]
    if clamp is not None:
        io.check_number("svd_clamp", clamp, least=0, most=1, error=ConfigError)
    if driver is not None:
        io.check_choice("svd_driver", driver, SVD_DRIVERS, ConfigError)
    majorities = ("total", "frequency")
    io.check_choice(
        "majority_sign_method", options["majority"], majorities, ConfigError
    )
    ranks = check_loras(configs, combination_type, options["density"])
    kind = combination_type_of(configs, combination_type)
    if not thins_out(kind):
        options["density"] = None
    for path in plan.paths:
        here = [len(adapter.factors[0]) for adapter, _ in plan.at(path)]
        check_ranks(path, here, kind)
    plan.combination_type = kind
    plan.rank = sum(ranks) if kind == "cat" else max(ranks)
    if kind.endswith("svd"):
        plan.rank = svd_rank or plan.rank
    plan.options = options
    init = configs[0].init_lora_weights
    plan.config = dataclasses.replace(
        configs[0],
        r=plan.rank,
        lora_alpha=plan.rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=init if isinstance(init, bool) else True,  # base untouched
        **only_at(plan.paths),
    )


def combination_type_of(configs, combination_type):
    """A single LoRA is scaled, whatever is asked for, as in PEFT."""
    return "linear" if len(configs) == 1 else str(combination_type)


def thins_out(combination_type):
    return any(word in combination_type for word in ("ties", "dare", "magnitude"))


def check_loras(configs, combination_type, density):
    """The ranks of the adapters. Raises ConfigError where they cannot be combined
    so."""
    io.check_choice(
        "combination_type", combination_type, COMBINATION_TYPES, ConfigError
    )
    for config in configs:
        if type(config) is not LoraConfig or config.use_dora or config.lora_bias:
            raise ConfigError(
                f"{type(config).__name__}: only plain LoRAs (without use_dora and"
                " lora_bias) can be combined, or only IA3s"
            )
    if thins_out(combination_type):
        io.check_number(
            f"{combination_type} needs a density, the share of entries that stay:"
            " density",
            density,
            least=0,
            error=ConfigError,
        )
    elif density is not None:
        warnings.warn(
            f"combination_type {combination_type!r} keeps every entry: density ="
            f" {density} is not used",
            stacklevel=6,
        )
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    check_ranks("", ranks, combination_type if len(configs) > 1 else "cat")
    return ranks


def check_ranks(path, ranks, combination_type):
    if combination_type in SEPARATE and len(set(ranks)) > 1:
        where = f" at {path}" if path else ""
        raise ConfigError(
            f"{combination_type} needs adapters of one rank; these have {ranks}{where}."
            " cat and svd take any"
        )
