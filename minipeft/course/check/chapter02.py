"""Chapter 02, full fine-tuning: the bill, AdamW, accumulated gradients, what is kept
for the way back, three families."""

import random

import torch

from .teacher import Wrong, checks, compare, need

__all__ = ["accumulated", "adamw_step", "families", "kept_numbers", "step_bytes"]


# --------------------------------------------------------------------------- step_bytes


@checks("Frozen 2 bytes, trained 16: the bill is right, for 7B with a LoRA too.")
def step_bytes(function) -> None:
    """function(total, trained) -> bytes: frozen numbers in 16 bits; trained ones,
    gradient and two means in 32."""
    small = random.randint(1_000, 9_000)
    for total, trained in (
        (small, small // 4 + 1),
        (small, small),
        (6_738_415_616 + 39_976_960, 39_976_960),
    ):
        got, frozen = function(total, trained), total - trained
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        right = 2 * frozen + 16 * trained
        slips = {
            "You let every number have a gradient and two means: only the trained"
            " ones do.": 2 * frozen + 4 * trained + 12 * total,
            "You charge 16 bytes for the frozen numbers too: they cost 2.": 16 * total,
            "Adam keeps *two* means for each trained number; you count one.": (
                2 * frozen + 12 * trained
            ),
            "The gradients are missing: 4 bytes for each trained number.": (
                right - 4 * trained
            ),
            "The optimizer is missing: 8 bytes for each trained number.": (
                right - 8 * trained
            ),
            "The frozen numbers are missing: they are not trained, but they are"
            " there.": 16 * trained,
            "You count the trained numbers twice, as a part of the total and by"
            " themselves: frozen is total - trained.": 2 * total + 16 * trained,
            "You take the trained numbers, or their gradients, in 16 bits: here both"
            " are in 32.": right - 2 * trained,
            "You store the frozen numbers in 32 bits: here they are kept in 16.": (
                4 * frozen + 16 * trained
            ),
            "You add another copy in 32 bits: here the trained numbers are stored in"
            " 32 bits already.": right + 4 * trained,
            "You let every number have a gradient: only the trained ones have one.": (
                right + 4 * frozen
            ),
            "That is gigabytes: bytes are wanted.": right / 1e9,
            "That is gibibytes: bytes are wanted.": right / 2**30,
            "You count numbers: each is several bytes.": frozen + 4 * trained,
        }
        if got != right:
            raise Wrong(
                next(
                    (
                        message
                        for message, wrong in slips.items()
                        if got == wrong and wrong != right
                    ),
                    f"For {total:,} parameters of which {trained:,} are trained you get"
                    f" {got:,}; I count {right:,}.",
                )
            )


# --------------------------------------------------------------------------- adamw_step


@checks(
    "Means, corrections, the place of eps and the decay are right, at the first step"
    " and later.",
    "p, g, m and v have one shape, and so have the results.",
)
def adamw_step(function) -> None:
    """function(p, g, m, v, t, lr, beta1, beta2, eps, weight_decay) -> (p, m, v)."""
    for t in (7, 1):
        p, g = (torch.randn(4, 5, dtype=torch.float64) for _ in range(2))
        m = torch.randn(4, 5, dtype=torch.float64) * (t > 1)
        v = torch.rand(4, 5, dtype=torch.float64) * (t > 1)
        lr, b1, b2, eps, decay = (
            0.03,
            random.uniform(0.8, 0.9),
            random.uniform(0.95, 0.99),
            0.02,
            random.uniform(0.1, 0.4),
        )
        got = function(p, g, m, v, t, lr, b1, b2, eps, decay)
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        need(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Give three tensors: the new p, m and v.",
        )
        new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        compare(
            got[1],
            new_m,
            {
                "m: the weights are swapped: the old mean keeps beta1, the new"
                " gradient comes with 1 - beta1.": ((1 - b1) * m + b1 * g),
                "m: the gradient comes in whole; it should come with 1 - beta1.": (
                    b1 * m + g
                ),
                "m: you used beta2; the mean of the gradient has beta1.": (
                    b2 * m + (1 - b2) * g
                ),
                "m: you give the corrected mean. Keep the plain one; the correction"
                " is for this step only.": (new_m / (1 - b1**t)),
                "m: the decay has got into the gradient. That is L2 with Adam; in"
                " AdamW the decay goes to p directly.": (
                    b1 * m + (1 - b1) * (g + decay * p)
                ),
                "m has not changed.": m,
            },
            "The new m",
        )
        compare(
            got[2],
            new_v,
            {
                "v: it is the mean of the gradient's *square*.": b2 * v + (1 - b2) * g,
                "v: you used beta1; the mean of the square has beta2.": (
                    b1 * v + (1 - b1) * g * g
                ),
                "v: the square comes in whole; it should come with 1 - beta2.": (
                    b2 * v + g * g
                ),
                "v: you square the mean m; square the gradient.": (
                    b2 * v + (1 - b2) * new_m * new_m
                ),
                "v: you give the corrected mean. Keep the plain one.": (
                    new_v / (1 - b2**t)
                ),
                "v has not changed.": v,
            },
            "The new v",
        )

        def step(
            m_hat=new_m / (1 - b1**t),
            v_hat=new_v / (1 - b2**t),
            shrink=1 - lr * decay,
            sign=-1,
            bottom=None,
        ):
            bottom = v_hat.sqrt() + eps if bottom is None else bottom
            return p * shrink + sign * lr * m_hat / bottom

        v_hat = new_v / (1 - b2**t)
        compare(
            got[0],
            step(),
            {
                "p goes up the gradient: subtract.": step(sign=1),
                "The correction of the means is missing: divide m by 1 - beta1^t and"
                " v by 1 - beta2^t. Without it the first steps are far too small, or"
                " too large.": step(new_m, new_v),
                "m is not corrected: divide it by 1 - beta1^t.": step(m_hat=new_m),
                "v is not corrected: divide it by 1 - beta2^t.": step(v_hat=new_v),
                "t counts from 1, and you count from 0 (or one too far).": step(
                    new_m / (1 - b1 ** (t + 1)), new_v / (1 - b2 ** (t + 1))
                ),
                "eps stands under the root: it is added after the root is taken.": step(
                    bottom=(v_hat + eps).sqrt()
                ),
                "eps is missing.": step(bottom=v_hat.sqrt()),
                "The root is missing: divide by √v, not by v.": step(
                    bottom=v_hat + eps
                ),
                "The decay is missing: p shrinks by the factor 1 - lr ·"
                " weight_decay.": step(shrink=1),
                "The decay is not scaled by the rate: the factor is 1 - lr ·"
                " weight_decay.": step(shrink=1 - decay),
                "You let p shrink after the step: the decay comes first, so that it"
                " does not touch the step itself.": (
                    (p - lr * (new_m / (1 - b1**t)) / (v_hat.sqrt() + eps))
                    * (1 - lr * decay)
                ),
                "eps is added before v is corrected: correct first, then the root,"
                " then eps.": step(bottom=(new_v.sqrt() + eps) / (1 - b2**t) ** 0.5),
                "You correct by 1 - beta · t: it is the power, 1 - beta^t.": step(
                    new_m / (1 - b1 * t), new_v / abs(1 - b2 * t)
                ),
                "You divide m by v's correction, and v by m's.": step(
                    new_m / (1 - b2**t), new_v / (1 - b1**t)
                ),
                "You step by the plain gradient: the mean m is what Adam follows.": (
                    step(m_hat=g)
                ),
                "The rate is missing from the step.": (
                    p * (1 - lr * decay) - new_m / (1 - b1**t) / (v_hat.sqrt() + eps)
                ),
            },
            "The new p",
        )


# -------------------------------------------------------------------------- accumulated


@checks(
    "The gradient of the large batch, however unequal the pieces.",
    "All gradients have one shape, and so has the result.",
)
def accumulated(function) -> None:
    """function(grads, labels) -> the gradient of the mean loss over all labels."""
    count = random.choice([3, 4])
    grads = [torch.randn(3, 4, dtype=torch.float64) for _ in range(count)]
    labels = random.sample(range(2, 40), count)
    got = function(grads, labels)
    stack, n = (
        torch.stack(grads),
        torch.tensor(labels, dtype=torch.float64)[:, None, None],
    )
    compare(
        got,
        (stack * n).sum(0) / sum(labels),
        {
            "You take the mean of the means. A batch with few labels would count as"
            " much as one with many: weigh each by its labels.": stack.mean(0),
            "You add the gradients up: that is a step several times too long. The"
            " mean over all labels is wanted.": stack.sum(0),
            "You give the gradient of the *sum* of all losses: divide by all labels"
            " together.": ((stack * n).sum(0)),
            "You divide by the number of batches; divide by the number of labels.": (
                (stack * n).sum(0) / count
            ),
            "You weigh the wrong way round: many labels, much weight.": (
                (stack / n).sum(0) / (1 / n).sum()
            ),
            "You divide each gradient by its labels: it is a mean already. Multiply,"
            " add, and divide by all.": ((stack / n).sum(0)),
            "You weigh by the labels and divide by their sum: that is all. The number"
            " of batches has no place here.": (
                (stack * n).sum(0) / sum(labels) / count
            ),
            "That is the last batch's gradient alone.": stack[-1],
            "You divide by the labels of the last batch, not by all.": (
                (stack * n).sum(0) / labels[-1]
            ),
        },
        "Your gradient",
    )


# ------------------------------------------------------------------------- kept_numbers


@checks(
    "What you count is what autograd keeps. The layers below the first trained one cost"
    " nothing."
)
def kept_numbers(function) -> None:
    """function(widths, trained) -> numbers kept for one row by a chain of Linear and
    ReLU."""
    layers = random.choice([4, 5])
    first = 2
    patterns = [
        [True] * layers,
        [i == first for i in range(layers)],
        [i == layers - 1 for i in range(layers)],
        [i in (0, layers - 1) for i in range(layers)],
        [False] * layers,
    ]
    for trained in patterns:
        # any two together are larger than a third, so that no two slips agree
        widths = random.sample(range(50, 95), layers + 1)
        got = function(list(widths), list(trained))
        need(
            got is not None, "Your function gives None: is there a `return` at its end?"
        )
        # does a gradient go back through place i?
        passes = [any(trained[:i]) for i in range(layers + 1)]
        kept = [passes[i] * (i > 0) or trained[i] for i in range(layers)]
        right = sum(width for width, k in zip(widths, kept) if k)
        inputs = sum(width for width, k in zip(widths, trained) if k)
        slips = {
            "You count every place between the layers. Below the first trained layer"
            " no gradient goes, and nothing is kept.": sum(widths[:-1]),
            "You count the last output too: nobody needs it for the way back (there"
            " is no ReLU after it).": right + widths[-1],
            "You count only the inputs of trained layers. Above them each ReLU that a"
            " gradient passes keeps its output as well.": inputs,
            "You count places twice: a ReLU's output *is* the next layer's input, and"
            " it is kept once.": (
                right
                + sum(widths[i] for i in range(1, layers) if passes[i] and trained[i])
            ),
            "You count only what lies above the first trained layer: that layer keeps"
            " its own input too.": sum(
                widths[i] for i in range(1, layers) if passes[i]
            ),
            "The way back goes from the loss *down* to the trained layers: what"
            " counts is whether a layer below is trained, not above.": sum(
                widths[i] for i in range(layers) if any(trained[i:])
            ),
            "The input of the chain is kept only if the first layer is trained; no"
            " ReLU stands before it.": (right + widths[0] * (not trained[0])),
            "You count outputs in the place of inputs: a linear layer keeps what it"
            " read.": sum(
                widths[i + 1]
                for i in range(layers)
                if passes[i] and i > 0 or trained[i]
            ),
            "You count the weights: they are in memory anyway.": (
                right + sum(a * b for a, b, t in zip(widths, widths[1:], trained) if t)
            ),
        }
        if got != right:
            raise Wrong(
                next(
                    (
                        message
                        for message, wrong in slips.items()
                        if got == wrong and wrong != right
                    ),
                    f"For widths {widths} with trained = {trained} you get {got};"
                    f" autograd keeps {right} numbers a row.",
                )
            )


# ----------------------------------------------------------------------------- families

FAMILIES = {
    "LoRA": "reparametrised",
    "BitFit": "selective",
    "prompt tuning": "additive",
    "prefix tuning": "additive",
    "bottleneck adapter": "additive",
    "random subspace": "reparametrised",
    "last block only": "selective",
    "QLoRA": "reparametrised",
}
REASONS = {
    "LoRA": (
        "its A and B are new numbers, but what they make, BA, is a change of W of W's"
        " own shape."
    ),
    "BitFit": "it trains biases that are there already.",
    "prompt tuning": (
        "it puts new vectors before the input; no weight changes, and no change of"
        " weights does the same."
    ),
    "prefix tuning": "it puts new keys and values into every layer; no weight changes.",
    "bottleneck adapter": (
        "it puts small networks into the blocks; with a nonlinearity inside, no matrix"
        " does the same."
    ),
    "random subspace": "few numbers φ make a change Pφ of all the old weights.",
    "last block only": "it trains old numbers, and freezes the others.",
    "QLoRA": (
        "it is LoRA; that the frozen base is stored in 4 bits changes nothing about"
        " what is trained."
    ),
}


@checks("All eight are in their places.")
def families(answer) -> None:
    """answer: {method: "additive" | "selective" | "reparametrised"}"""
    if answer is None or answer == {}:
        raise NotImplementedError
    need(isinstance(answer, dict), 'Write it as a dictionary: {"LoRA": "...", ...}.')
    kinds = sorted(set(FAMILIES.values()))
    for name, kind in answer.items():
        need(
            name in FAMILIES,
            f"{name!r} is not among the eight; they are: {', '.join(FAMILIES)}.",
        )
        need(
            kind in kinds,
            f"{name}: {kind!r} is no family here; they are {', '.join(kinds)}.",
        )
        need(kind == FAMILIES[name], f"{name} is not {kind}: {REASONS[name]}")
    missing = [name for name in FAMILIES if name not in answer]
    need(not missing, f"Still to be sorted: {', '.join(missing)}.")
