"""Chapter 01, the model: nucleus sampling, a loss with faults, what leaves the
probabilities alone, bases with other tokenizers, two pairings, and a decoder of one's
own."""

import copy
import math
import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ...lm import GPT, GPTConfig
from ..comparison import compare as told_apart
from .kinds import TRAPS, Choices, by_one_look, trap
from .practice import SEEDS, Adam, written
from .slips import Formula
from .teacher import Wrong, checks, compare, need

__all__ = [
    "choose_base",
    "halves_from_pairs",
    "my_decoder",
    "next_token_loss",
    "nucleus",
    "predict_same",
]


# ---------------------------------------------------------------------- next_token_loss


class WithoutCrossEntropy(TorchFunctionMode):
    """Refuses the functions that the exercise asks to write."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        need(
            name not in ("cross_entropy", "nll_loss", "cross_entropy_loss"),
            f"You call F.{name}: the exercise is to write the loss without it.",
        )
        return function(*args, **(kwargs or {}))


def asked_loss(logits, labels):
    logp = logits[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    asked = target != -100
    return -logp[asked].gather(-1, target[asked][:, None]).mean()


def check_large_logits(function) -> None:
    """exp(900) is infinite: a softmax has to subtract the maximum."""
    logits = 900 * torch.randn(2, 7, 11, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 7))
    logp = logits.log_softmax(-1)[:, :-1]
    right = -logp.gather(-1, labels[:, 1:, None]).mean()
    got = function(logits, labels)
    need(
        bool(torch.as_tensor(got).isfinite().all()),
        "Right for small logits, but for large ones exp overflows and your loss is"
        " inf or nan: log_softmax, or logsumexp, subtracts the maximum first.",
    )
    compare(got, right, {}, "Your loss of large logits")


def check_one_place(function) -> None:
    """One place is asked in one row, and none in the other."""
    logits = torch.randn(2, 7, 11, dtype=torch.float64)
    labels = torch.full((2, 7), -100)
    labels[1, 4] = 3
    right = -logits[1, 3].log_softmax(-1)[3]
    what = "Your loss of two rows, with one place that is asked,"
    compare(function(logits, labels), right, {}, what)


def log_probabilities(z, over: int = -1):
    return z - z.exp().sum(over, keepdim=True).log()


def mean_loss(logp, target, keep=None):
    """Over the places that are asked, or over those in `keep`."""
    keep = target != -100 if keep is None else keep
    return -logp.gather(-1, target.clamp(min=0)[..., None])[..., 0][keep].mean()


def prompts_and_answers(rows: int) -> tuple:
    """Logits and labels."""
    T, V = random.randint(9, 12), random.randint(17, 23)
    logits = (2 * torch.randn(rows, T, V, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, V, (rows, T))
    labels[0, -1] = 0  # a token like any other
    for row in range(rows):
        # a prompt, of another length in every row
        labels[row, : random.randint(2, 6)] = -100
    return logits, labels


def slips_of_places(logits, labels) -> dict:
    """{message: the loss} of wrong shifts, of places that are not asked, and of other
    numbers of places."""
    logp, V = log_probabilities(logits), logits.shape[-1]
    shifted, target = logp[:, :-1], labels[:, 1:]
    right, every = mean_loss(shifted, target), torch.ones_like(target, dtype=torch.bool)
    number = (target != -100).sum()
    return {
        "Nothing is shifted: place t is judged by token t, its own input. It"
        " should be judged by token t + 1.": mean_loss(logp, labels),
        "You shift the wrong way: place t is judged by the token before it.": mean_loss(
            logp[:, 1:], labels[:, :-1]
        ),
        "You shift twice: place t is judged by token t + 2.": mean_loss(
            logp[:, :-2], labels[:, 2:]
        ),
        "You count the places with -100 as if token 0 were wanted there: leave"
        " them out.": mean_loss(shifted, target, every),
        "You count the places with -100 as if the last token were wanted there"
        " (an index of -100, or -1, wraps around): leave them out.": mean_loss(
            shifted, torch.where(target < 0, V - 1, target), every
        ),
        "You leave token 0 out: only -100 means that nothing is asked.": mean_loss(
            shifted, target, target > 0
        ),
        "You divide by all places, also by those that nobody asked about.": (
            right * number / target.numel()
        ),
        "You give the sum: the mean is wanted.": right * number,
        "You divide by all places of the input, also by those that nobody asked"
        " about, and by the last one.": (right * number / labels.numel()),
        "You choose the places before the shift: by their own label, not by that"
        " of the token they are to foresee. So the first token of every answer is"
        " left out.": mean_loss(
            shifted, target, (target != -100) & (labels[:, :-1] != -100)
        ),
    }


def slips_of_softmax(z, target) -> dict:
    """{message: the loss} of softmaxes over another dimension."""
    return {
        "Your softmax runs over the places: it belongs to the last dimension, the"
        " vocabulary.": mean_loss(log_probabilities(z, over=1)[:, :-1], target),
        "Your softmax runs over the places (after the shift): it belongs to the"
        " last dimension, the vocabulary.": mean_loss(
            log_probabilities(z[:, :-1], over=1), target
        ),
    }


def slips_of_rows(shifted, target) -> dict:
    """{message: the loss} where each row has a mean of its own; of one row it is the
    right one."""
    rows = [mean_loss(*row) for row in zip(shifted, target)]
    message = (
        "You take the mean of the rows' means. Rows with few labels would count"
        " too much: one mean over all places that are asked."
    )
    return {message: torch.stack(rows).mean()} if len(rows) > 1 else {}


def slips_of_the_logarithm(z, target) -> dict:
    """{message: the loss} of another function of the probabilities."""
    shifted = log_probabilities(z)[:, :-1]
    right = mean_loss(shifted, target)
    return {
        "The sign is missing: the loss is minus the log of the probability.": -right,
        "You give bits (log2): nats are wanted, the natural logarithm.": (
            right / torch.tensor(2.0).log()
        ),
        "That is the perplexity, e to the loss.": right.exp(),
        "You forgot the logarithm: that is the probability itself.": mean_loss(
            -shifted.exp(), target
        ),
        "You forgot the softmax: logits are not log-probabilities.": mean_loss(
            z[:, :-1], target
        ),
    }


@checks(
    "One shift, the places that are asked, one mean over all of them, in nats; and"
    " gradients flow.",
    "logits are (B, T, V), labels (B, T).",
)
def next_token_loss(function) -> None:
    """function(logits, labels) -> the mean loss, a tensor of no dimension."""
    for rows in (1, 3):
        logits, labels = prompts_and_answers(rows)
        shifted, target = log_probabilities(logits)[:, :-1], labels[:, 1:]
        right = mean_loss(shifted, target)
        with WithoutCrossEntropy():
            got = function(logits, labels)
        mistakes = slips_of_places(logits, labels) | slips_of_softmax(logits, target)
        mistakes |= slips_of_rows(shifted, target)
        mistakes |= slips_of_the_logarithm(logits, target)
        formula = Formula(asked_loss, logits, labels)
        compare(got, right, mistakes, "Your loss", formula=formula)
    check_one_place(function)
    check_large_logits(function)


# ------------------------------------------------------------------------------ nucleus


def probabilities(p: float):
    """Probabilities whose sums are not near p, where some are cut off."""
    while True:
        V = random.randint(9, 13)
        probs = (1.5 * torch.randn(V, dtype=torch.float64)).softmax(0)
        total = probs.sort(descending=True).values.cumsum(0)
        enough = 2 <= (total < p).sum() + 1 <= V - 2 or p < 0.1 or p > 0.9
        if enough and min((each - p).abs().min() for each in (total, probs)) > 0.003:
            return probs


def nucleus_cases() -> list:
    """[(p, probabilities)]"""
    # binary fractions, whose sums are exact: the first two have 0.75, and no less
    exact = torch.tensor([2, 16, 1, 8, 1, 4], dtype=torch.float64) / 32
    near = torch.tensor([20, 63, 12, 128, 33], dtype=torch.float64) / 256
    many = (0.1 * torch.randn(150, dtype=torch.float64)).softmax(0)
    given = [(p, probabilities(p)) for p in (0.5, 0.8, 0.01, 0.95, 0.0)]
    given[4:4] = (0.75, exact), (0.75, near), (0.4987, many)  # near: two have 0.746
    return [*given, (1.0, exact)]


def cut(probs, mask, scale: bool = True):
    """In their old places the probabilities that a mask over the falling ones keeps."""
    ordered, order = probs.sort(descending=True)
    result = torch.zeros_like(probs)
    result[order[mask]] = ordered[mask]
    return result / result.sum() if scale and result.any() else result


def smallest_set(probs, p):
    """The mask over the falling probabilities that the exercise asks for."""
    ordered = probs.sort(descending=True).values
    keep = ordered.cumsum(0) - ordered < p  # those before do not have p yet
    keep[0] = True
    return keep


def nucleus_slips(probs, p) -> dict:
    """{message: the wrong result}"""
    V = len(probs)
    ordered, order = probs.sort(descending=True)
    total, keep = ordered.cumsum(0), smallest_set(probs, p)
    share = torch.arange(V) < max(1, round(p * V))
    sums = ordered[keep] / ordered[keep].sum()
    rising = probs.sort().values
    rare = rising.cumsum(0) - rising < p
    from_below = torch.zeros_like(probs)
    from_below[probs.sort().indices[rare]] = rising[rare]
    return {
        "The token that crosses the line is missing: together they must have *at"
        " least* p.": cut(probs, total <= p),
        "You keep one token too many where the first ones have exactly p: that is"
        " enough.": cut(probs, total - ordered <= p),
        "What you keep does not sum to one: scale it.": cut(probs, keep, scale=False),
        "You give the probabilities in falling order: put them back in their old"
        " places.": torch.cat((sums, torch.zeros(V - len(sums), dtype=sums.dtype))),
        "You put them back by the order of sorting, and the way back is its"
        " inverse: result[order] = sorted, or take sorted[order.argsort()].": (
            torch.where(keep, ordered, 0)[order] / ordered[keep].sum()
        ),
        "Your mask belongs to the sorted row, and you lay it over the old one: put"
        " it back first, mask[order] = keep.": probs
        * keep[order]
        / (probs * keep[order]).sum().clamp(min=1e-9),
        "You keep the share p of the tokens: p is the probability that those kept"
        " have together.": cut(probs, share),
        "You apply a softmax to probabilities: they need only be divided by their"
        " sum.": torch.where(cut(probs, keep) > 0, probs, -torch.inf).softmax(0),
        "You keep the tokens that have p each. p is what they have *together*.": (
            torch.where(probs >= p, probs, 0) / probs[probs >= p].sum()
        ),
        "You keep one token too many: the set has p before it.": cut(
            probs, total - ordered - torch.cat((torch.zeros(1), ordered[:-1])) < p
        ),
        "You begin with the rarest: sort falling.": from_below / from_below.sum(),
        "You drop what should be kept, and keep the tail.": cut(probs, ~keep),
        "Nothing is cut off.": probs,
    }


@checks("The smallest set that has p, in its old order, and it sums to one.")
def nucleus(function) -> None:
    """function(probs, p) -> probabilities of the same shape (V,)."""
    for p, probs in nucleus_cases():
        got = function(probs, p)
        if isinstance(got, torch.Tensor) and got.shape == probs.shape:
            need(
                not got.isnan().any() and bool(got.any()),
                f"For p = {p} you keep nothing. The likeliest token is always kept: the"
                " set has *at least* p, and p is what its tokens have together.",
            )
        # where p is 1 all are kept, and most mistakes do not show
        mistakes = {} if p == 1.0 else nucleus_slips(probs, p)
        compare(got, cut(probs, smallest_set(probs, p)), mistakes, "Your result")
    look_at_equal_ones(function)


def look_at_equal_ones(function) -> None:
    """Of tokens that are equally likely as few are kept as are needed, any of them."""
    probs = torch.tensor([1, 4, 2, 4, 1, 4], dtype=torch.float64) / 16
    got = function(probs, 0.4)
    need(isinstance(got, torch.Tensor), "Your result should be a tensor.")
    kept = got > 0
    need(
        int(kept.sum()) == 2,
        "Three tokens have the probability 0.25 each. For p = 0.4 two of them are"
        f" enough, and you keep {int(kept.sum())}: choose by place in the order, not by"
        " a smallest probability.",
    )
    right = torch.where(kept, probs, 0)
    compare(got, right / right.sum(), {}, "Your result for equal probabilities")


# -------------------------------------------------------------------- halves_from_pairs


@checks(
    "The rows are where the other way of turning expects them: the scores of all heads"
    " stay the same."
)
def halves_from_pairs(function) -> None:
    """function(weight, heads) -> weight, its rows reordered within each head."""
    heads, half, d = random.choice([2, 4]), random.choice([3, 5]), random.choice([6, 8])
    weight = torch.randn(heads * 2 * half, d, dtype=torch.float64)
    got = function(weight, heads)

    def move(z, a, b):
        return z.view(-1, a, b, z.shape[-1]).transpose(1, 2).reshape(len(z), -1)

    mistakes = {
        "That is the way back, from halves to pairs. Here the rows come as pairs:"
        " view them as (heads, pairs, 2).": move(weight, 2, half),
        "You reorder over all heads at once: each head has its own pairs, and keeps"
        " its own rows.": move(weight, heads * half, 2),
        "You reorder the columns, what is read; the turn is applied to what comes"
        " out, so to the rows.": (move(weight.T.contiguous(), d // 2, 2).T),
        "You swap the two members of each pair: that turns the other way.": (
            weight.view(-1, 2, d).flip(1).reshape(-1, d)
        ),
        "You put the second members first.": move(
            weight.view(-1, 2, d).flip(1).reshape(-1, d), half, 2
        ),
        "The rows are as they were.": weight,
        "You mix whole heads: within each head the rows move, and the heads stay.": (
            weight.view(heads, -1, d).flip(0).reshape(-1, d)
        ),
        "You view the rows as (pairs, 2, heads): the heads come first, each with its"
        " own rows in one piece.": weight.view(half, 2, heads, d)
        .permute(2, 1, 0, 3)
        .reshape(-1, d),
    }
    compare(got, move(weight, half, 2), mistakes, "Your weight")


# ------------------------------------------------------------------------- predict_same


def exchanged(weight, a, b, size, dim):
    """In place: the parts number a and b of a weight, each `size` long, change
    places."""
    parts = list(weight.split(size, dim))
    parts[a], parts[b] = parts[b], parts[a]
    weight.copy_(torch.cat(parts, dim))


def swap_heads(model, a, b):
    for block in model.model.layers:
        attention = block.self_attn
        exchanged(attention.q_proj.weight, a, b, attention.head_dim, 0)
        exchanged(attention.o_proj.weight, a, b, attention.head_dim, 1)


def scale(model, **factors):
    """Multiply weights by factors, in every block: q_proj=2."""
    for block in model.model.layers:
        for name, module in block.named_modules():
            factor = factors.get(name.rpartition(".")[2])
            if factor is not None:
                module.weight.mul_(factor)


def scale_norm(model):
    scale(model, input_layernorm=2, q_proj=0.5, k_proj=0.5, v_proj=0.5)


def add_to_head(model):
    head = model.get_output_embeddings().weight
    head.add_(torch.randn(head.shape[1], dtype=head.dtype))


# {edit: (what it does, why the probabilities stay or do not)}
EDITS = {
    "positions + 7": (None, "only distances count: both angles grow alike"),
    "last token": (None, "nobody looks ahead: the places before it do not see it"),
    "first token": (None, "every place sees what came before it"),
    "q × 2, k / 2": (
        lambda m: scale(m, q_proj=2, k_proj=0.5),
        "a score is a product of both, and rotation is linear",
    ),
    "v × 2, o / 2": (
        lambda m: scale(m, v_proj=2, o_proj=0.5),
        "between v and o there are only weighted sums, which are linear",
    ),
    "gate × 2, up / 2": (
        lambda m: scale(m, gate_proj=2, up_proj=0.5),
        "silu is not linear: silu(2z) is not 2 silu(z)",
    ),
    "up × 2, down / 2": (
        lambda m: scale(m, up_proj=2, down_proj=0.5),
        "up meets the gate in a product, and down is linear in it",
    ),
    "norm × 2, q k v / 2": (
        scale_norm,
        "the first norm's weights multiply what q, k and v read, and nothing else",
    ),
    "heads 0 and 1": (
        lambda m: swap_heads(m, 0, 1),
        "both belong to the same key-value head, and o adds the heads up",
    ),
    "heads 1 and 2": (
        lambda m: swap_heads(m, 1, 2),
        "query heads 0 and 1 share a key-value head, and 2 and 3 share the other: these"
        " two now read other keys and values",
    ),
    "head + c": (
        add_to_head,
        "all logits of a place grow by the same number, and softmax forgets it",
    ),
    "final norm × 2": (
        lambda m: m.model.norm.weight.mul_(2),
        "all logits are doubled: a temperature of one half",
    ),
    "embedding × 2": (
        lambda m: m.get_input_embeddings().weight.mul_(2),
        "the blocks add to it, and what they add is as large as before",
    ),
}
COMMON = "positions + 7", "norm × 2, q k v / 2", "head + c"
FORMS = {
    "a": (
        *COMMON,
        "last token",
        "q × 2, k / 2",
        "gate × 2, up / 2",
        "heads 0 and 1",
        "final norm × 2",
    ),
    "b": (
        *COMMON,
        "first token",
        "v × 2, o / 2",
        "up × 2, down / 2",
        "heads 1 and 2",
        "embedding × 2",
    ),
}


def llama() -> GPT:
    """A small Llama with four query heads, two key-value heads and a head of its own,
    whose weights are large enough for every part to count."""
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = GPTConfig(vocab_size=20, tie_word_embeddings=False, **shape, **heads)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, dtype=p.dtype) + (p.dim() == 1))
    return model


@torch.no_grad()
def stays(edit: str) -> bool:
    """Whether the probabilities at the last place (those before a token that is
    replaced) are the same after the edit, by running the model twice."""
    model = llama()
    ids = torch.tensor([[5, 1, 9, 12, 1, 7, 3]])
    other = ids.clone()
    places = torch.arange(ids.shape[1])[None]
    before = model(input_ids=ids).logits.softmax(-1)
    if edit == "last token":
        other[0, -1] = 8
    elif edit == "first token":
        other[0, 0] = 8
    elif edit == "positions + 7":
        places = places + 7
    else:
        EDITS[edit][0](model)
    after = model(input_ids=other, position_ids=places).logits.softmax(-1)
    seen = slice(0, -1) if edit == "last token" else slice(-1, None)
    return bool((after - before)[:, seen].abs().max() < 1e-5)


@checks(
    "All of them. Products, sums and a softmax leave room for such changes; silu, and"
    " sums of things of different size, do not."
)
def predict_same(predicted, form="a") -> None:
    """predicted: {edit: "same" or "other"}."""
    predicted = written(predicted, FORMS[form], form='{edit: "same" or "other"}')
    for edit in FORMS[form]:
        said = predicted[edit]
        need(
            said in ("same", "other"),
            f'{edit!r}: expected "same" or "other", found {said!r}.',
        )
        true = "same" if stays(edit) else "other"
        need(
            said == true,
            f"{edit!r}: you say {said!r}, and the run says {true!r}. Think of this:"
            f" {EDITS[edit][1]}.",
        )


# -------------------------------------------------------------------------- choose_base


def bases_drawn(rng, kind):
    """{name: {"tokens", "bytes", "loss"}} of models that read the same text."""
    size = rng.randint(90, 110) * 1000
    found = {}
    # (bytes a token, nats a byte)
    drawn = {"letters": (1.0, 0.95), "small": (2.6, 0.80), "large": (4.4, 0.90)}
    if kind == "close":
        drawn["small"], drawn["large"] = (2.6, 0.80), (4.4, 0.802)
        drawn["letters"] = (1.0, 0.801)
    if kind == "agree":
        drawn["letters"] = (1.0, 0.70)
    if kind == "paired":
        drawn["letters"] = (1.0, 0.83)
    if kind == "uneven":
        drawn["letters"] = (1.0, 0.83)
    for name, (each, nats) in drawn.items():
        losses = {
            seed: each * (nats + rng.uniform(-0.004, 0.004) + 0.003 * seed)
            for seed in SEEDS
        }
        if kind == "lucky" and name == "large":
            losses[1] = each * 0.7
        if kind == "uneven" and name == "letters":
            losses[1] += 0.2
        if kind == "paired":  # a seed is good for all models, or bad; in any order
            shared = dict(zip(SEEDS, (0.0, 0.1, -0.1)))
            order = rng.sample(SEEDS, 3)
            losses = {seed: losses[seed] + each * shared[seed] for seed in order}
        found[name] = {"tokens": round(size / each), "bytes": size, "loss": losses}
    if kind in TRAPS:  # by one look at the seeds "large" seems better than "small"
        for name, losses in zip(("small", "large"), trap(kind, 0.8, 0.02)):
            each, _ = drawn[name]
            found[name]["loss"] = {seed: each * losses[seed] for seed in SEEDS}
    names = list(found)
    rng.shuffle(names)
    return {name: found[name] for name in names}


def a_byte(model, upside_down=False):
    """{seed: nats a byte}"""
    share = model["tokens"] / model["bytes"]
    share = 1 / share if upside_down else share
    return {seed: loss * share for seed, loss in model["loss"].items()}


def mean(losses) -> float:
    return sum(losses.values()) / len(losses)


@checks(
    "Compared by the byte, which is the same for all; a token is as long as its"
    " tokenizer makes it."
)
def choose_base(function, given="loss") -> None:
    """function(models) -> (name, verdict)."""
    kinds = "plain", "close", "agree", "lucky", "plain", "uneven", "paired", *TRAPS
    names, verdicts = Choices(), Choices()
    for number, kind in enumerate(kinds):
        models = bases_drawn(random.Random(number), kind)
        shown = copy.deepcopy(models)
        if given == "perplexity":
            for model in shown.values():
                losses = model.pop("loss").items()
                model["perplexity"] = {seed: math.exp(loss) for seed, loss in losses}
        a_base(function(shown), models, names, verdicts)
    names.judge()
    verdicts.judge()


def a_base(got, models, names, verdicts) -> None:
    need(got is not None, "Your function gives None: is there a `return` at its end?")
    need(
        isinstance(got, (tuple, list)) and len(got) == 2,
        f"Return two things, the name and the verdict; you return {got!r}.",
    )
    name, verdict = got
    bytewise = {key: a_byte(model) for key, model in models.items()}
    strange = {key: a_byte(model, True) for key, model in models.items()}
    each = {key: list(losses.values()) for key, losses in bytewise.items()}
    right = min(bytewise, key=lambda key: mean(bytewise[key]))
    by_token = min(models, key=lambda key: mean(models[key]["loss"]))
    slips = by_one_look(each) | {
        "You compare losses per token. A model with short tokens has more of them, each"
        " easier to foresee: divide by what is the same for all, the bytes. (Nats a"
        " byte are nats a token times tokens a byte.)": [
            by_token,
            min(strange, key=lambda key: mean(strange[key])),
        ],
        "You take the worst: lower is better.": max(
            bytewise, key=lambda key: mean(bytewise[key])
        ),
    }
    names.add(
        name, right, slips, f"You choose {name!r}; by nats a byte it is {right!r}."
    )
    true = told_apart(bytewise[right], bytewise[by_token], loss=True).verdict
    tokenwise = models[right]["loss"], models[by_token]["loss"]
    verdicts.add_verdict(
        verdict,
        true,
        "these are losses (loss=True), and it is of the best by the byte against the"
        " best by the token.",
        f"You say {verdict!r}; the course's rule says {true!r} of {right!r} against"
        f" {by_token!r}, by nats a byte, paired by seed, with loss=True.",
        {
            "Your verdict compares the losses per token: compare nats a byte here"
            " too.": told_apart(*tokenwise, loss=True).verdict,
            "You lose which losses belong together: give `compare` two dictionaries by"
            " seed, as the seeds may come in any order.": [
                told_apart(each[right], each[by_token], loss=True).verdict,
                told_apart(
                    each[right], each[by_token], loss=True, paired=False
                ).verdict,
            ],
        },
    )


# --------------------------------------------------------------------------- my_decoder

LETTERS = 12
TRAININGS = 80, 200  # steps; the second is for a start that needs more


def periodic(rows, seed):
    """Token ids (rows, 15): three random tokens, again and again."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(LETTERS, (rows, 3), generator=draws).repeat(1, 5)


def loss_after_three(model, ids):
    logits = model(ids)[:, 2:-1].reshape(-1, LETTERS)
    return F.cross_entropy(logits, ids[:, 3:].reshape(-1))


@checks(
    "Causal, aware of order, rows apart from each other, and of the right shape; and"
    " trained with three seeds it foresees by looking back, ahead of what the letters"
    " without their order would allow, by the course's rule.",
    "ids are (B, T), logits (B, T, vocab).",
)
def my_decoder(decoder_class) -> None:
    """decoder_class(vocab, d, heads, layers), an nn.Module: ids (B, T) -> logits (B, T,
    vocab)."""
    need(
        isinstance(decoder_class, type) and issubclass(decoder_class, nn.Module),
        "Give me the class itself, a subclass of nn.Module.",
    )
    look_at_logits(shaken(decoder_class(LETTERS, 16, 2, 1)))
    look_at_places(shaken(decoder_class(LETTERS, 16, 2, 1)))
    look_at_weights(decoder_class)
    look_at_heads(decoder_class)
    look_at_sums(decoder_class)
    letters_only = dict.fromkeys(SEEDS, math.log(3))
    for steps in TRAININGS:
        found = {seed: trained_decoder(decoder_class, seed, steps) for seed in SEEDS}
        result = told_apart(found, letters_only, loss=True)
        if result.verdict == "ahead":
            return
    raise Wrong(
        f"Trained for {steps} steps on rows that repeat three tokens, with three seeds,"
        f" your loss is {result} of ln 3, what one has who knows the three tokens and"
        " not their order. Do positions reach the attention, and are they as large as"
        " the tokens' vectors?"
    )


@torch.no_grad()
def shaken(model, seed: int = 1):
    """The model with a little added to every weight: one that starts at zero counts."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
def look_at_places(model):
    """Up to 64 places, no two of them alike, and none that depends on how many come
    after it."""
    ids = torch.arange(64)[None] * 5 % 7  # the tokens 0 to 6
    ids[:, [0, 1, 2, 4, 8, 16, 32]] = torch.tensor([11, 7, 8, 9, 10, 8, 9])
    logits = model(ids)
    need(
        torch.allclose(model(ids[:, :5]), logits[:, :5], atol=1e-4),
        "The logits of the first five places change when more tokens follow them:"
        " something in your model depends on the length of the row (places counted"
        " from its end?), and so on the future.",
    )
    for apart in (1, 2, 4, 8, 16, 32):
        order = list(range(64))
        order[0], order[apart] = apart, 0
        need(
            bool((model(ids[:, order]) - logits)[0, -1].abs().max() > 1e-6),
            f"The first token and the one {apart} places after it may change places,"
            " and the last place does not notice: two of your 64 places are alike.",
        )


class AttentionRows(TorchFunctionMode):
    """Within it, for how many queries attention weighs places: the rows of all
    softmaxes over them."""

    def __init__(self, places):
        super().__init__()
        self.places, self.rows = places, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        # both give a row for each query
        weighs = name == "softmax" and result.shape[-1] == self.places
        if weighs or name == "scaled_dot_product_attention":
            self.rows += result.numel() // result.shape[-1]
        return result


@torch.no_grad()
def attention_rows(model, ids) -> int:
    with AttentionRows(ids.shape[1]) as seen:
        model(ids)
    return seen.rows


@torch.no_grad()
def look_at_heads(decoder_class):
    """One head and four, with the same weights: the scores are other ones, and there
    are four times as many."""
    one, four = (shaken(decoder_class(LETTERS, 16, n, 1)) for n in (1, 4))
    shapes = [[p.shape for p in model.parameters()] for model in (one, four)]
    if shapes[0] != shapes[1]:
        return
    four.load_state_dict(one.state_dict(), strict=False)
    ids = periodic(4, 0)
    need(
        not torch.allclose(one(ids), four(ids), atol=1e-5),
        "`heads` has no effect: with the same weights one head and four give the same"
        " logits.",
    )
    few, many = (attention_rows(model, ids) for model in (one, four))
    need(
        many == 4 * few,
        "With four heads each place should weigh the others four times, once for each"
        f" head; with one head your model weighs {few // ids.numel()} times a place,"
        f" and with four {many // ids.numel()} times.",
    )


@torch.no_grad()
def look_at_sums(decoder_class):
    """A block whose weights are all zero adds nothing, so two layers are as one."""
    one, two = (shaken(decoder_class(LETTERS, 16, 2, n)) for n in (1, 2))
    shared, all_of_two = one.state_dict(), two.state_dict()
    names_differ = not shared.keys() < all_of_two.keys()
    if names_differ or any(all_of_two[n].shape != w.shape for n, w in shared.items()):
        return  # the second layer's weights have no names of their own
    for name, weight in all_of_two.items():
        weight.copy_(shared[name]) if name in shared else weight.zero_()
    ids = periodic(4, 0)
    need(
        torch.allclose(one(ids), two(ids), atol=1e-4),
        "A second layer whose weights are all zero changes the logits. Each part,"
        " attention and MLP, reads behind its norm and is *added* to what came in, so"
        " that such a layer adds nothing.",
    )


@torch.no_grad()
def look_at_logits(model):
    ids = torch.tensor([[3, 5, 1, 0, 7, 2], [4, 4, 8, 9, 1, 2]])
    logits = model(ids)
    need(logits is not None, "forward gives None: is there a `return` at its end?")
    need(
        isinstance(logits, torch.Tensor) and logits.shape == (2, 6, LETTERS),
        f"Expected logits of shape (2, 6, {LETTERS}) for ids of shape (2, 6); yours"
        f" are {tuple(getattr(logits, 'shape', ()))}.",
    )
    sums = logits.exp().sum(-1)
    need(
        not torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        and not torch.allclose(logits.sum(-1), torch.ones_like(sums), atol=1e-3),
        "Your last dimension is normalised already: return logits, before the softmax.",
    )
    other = ids.clone()
    other[0, 4] = 11
    changed = model(other) - logits
    need(
        bool(changed[0, :4].abs().max() < 1e-4),
        "A place sees what comes after it: with another token at place 4, the logits"
        " at places 0 to 3 change. The mask hides the future.",
    )
    need(
        bool(changed[0, 4].abs().max() > 1e-6),
        "A place does not see its own token: the mask hides only what comes after.",
    )
    need(
        bool(changed[0, 5].abs().max() > 1e-6),
        "A place does not see the place before it: is the attention's result added?",
    )
    need(
        bool(changed[1].abs().max() < 1e-4),
        "A row of the batch changes when another row does: attention belongs to the"
        " places of one row.",
    )
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    need(
        bool((model(swapped) - logits)[0, -1].abs().max() > 1e-6),
        "The order of the tokens before it makes no difference to the last place: your"
        " model knows no positions.",
    )


def look_at_weights(decoder_class):
    torch.manual_seed(2)
    model = decoder_class(LETTERS, 24, 3, 2)
    one, two = (
        sum(p.numel() for p in decoder_class(LETTERS, 24, 3, n).parameters())
        for n in (1, 2)
    )
    need(two > one, "`layers` has no effect: two layers have the parameters of one.")
    need(
        two - one > 4.5 * 24**2,
        f"A block of width 24 has {two - one:,} parameters: attention's four matrices"
        " alone have 2,304. Is there an MLP in each block?",
    )
    model(periodic(4, 0)).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    need(
        not idle,
        f"No gradient reaches {', '.join(idle[:3])}: is it used in forward, and is"
        " nothing detached?",
    )


def trained_decoder(decoder_class, seed, steps) -> float:
    torch.manual_seed(seed)
    model = decoder_class(LETTERS, 32, 4, 1)
    adam = Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        adam.step(loss_after_three(model, periodic(32, 1000 * seed + step)))
    with torch.no_grad():
        return loss_after_three(model.eval(), periodic(256, 999_999)).item()
