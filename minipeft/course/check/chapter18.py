"""Chapter 18, scaling up: a global batch's gradient, the ring, what is sent, what fits,
and why a run hangs."""

import random

import torch

from .kinds import Choices
from .practice import number
from .sandbox import unwatched
from .teacher import Wrong, checks, compare, need

__all__ = [
    "card_count",
    "combined_gradient",
    "first_mismatch",
    "ring_all_reduce",
    "step_cost",
    "traffic_order",
]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@checks(
    "Each process weighs by its share of all labels, so two processes with 4 rows learn"
    " what one with 8 learns.",
    "Each gradient is a tensor of one shape; labels is a list of whole numbers.",
)
def combined_gradient(function) -> None:
    """function(gradients, labels) -> the gradient of the mean loss over all labels."""
    for labels in numbers_of_labels():
        processes = len(labels)
        # the last size is W, so that a product that pairs the wrong sizes shows
        gradients = [draw(4, processes) * (n > 0) for n in labels]
        given = [g.clone() for g in gradients]
        got = function(given, list(labels))
        need(
            all(torch.equal(a, b) for a, b in zip(given, gradients)),
            "You change the gradients that you are given: a process still needs its"
            " own. Make a new tensor.",
        )
        weighted = sum(g * n for g, n in zip(gradients, labels))
        compare(
            got,
            weighted / sum(labels),
            slips_of_weighing(gradients, labels) | only_the_first(gradients, labels),
            "Your gradient",
        )


def slips_of_weighing(gradients, labels) -> dict:
    processes, total = len(labels), sum(labels)
    weighted = sum(g * n for g, n in zip(gradients, labels))
    return {
        "That is the mean of the processes' means: the fault itself. A process"
        " with few labels counts as much as one with many.": (
            sum(gradients) / processes
        ),
        "The sum of the processes' means: divide, and weigh by labels.": sum(gradients),
        "You weigh by labels, but divide by the number of processes: divide by"
        " all labels.": weighted / processes,
        "You weigh by labels, but do not divide by their sum.": weighted,
        "You weigh by labels and divide twice: by all labels, and by the number"
        " of processes.": weighted / total / processes,
        "You divide each mean by its labels: it is a mean already. Multiply,"
        " which makes it a sum again.": (
            sum(g / max(n, 1e-9) for g, n in zip(gradients, labels))
        ),
        "You divide the sum of the means by all labels.": sum(gradients) / total,
        "You multiply by the number of processes: W n_p / n is for an engine"
        " that averages afterwards.": weighted / total * processes,
        "You divide by the most labels that a process has: divide by all.": (
            weighted / max(labels)
        ),
        "You weigh by 1 / n: a process with more labels counts more.": sum(
            g / max(n, 1e-9) for g, n in zip(gradients, labels)
        )
        / sum(1 / max(n, 1e-9) for n in labels),
        "You weigh by the softmax of the labels: weigh by their shares.": sum(
            g * w for g, w in zip(gradients, torch.tensor(labels).double().softmax(0))
        ),
        "You weigh by the root of the labels: weigh by their shares.": sum(
            g * n**0.5 for g, n in zip(gradients, labels)
        )
        / sum(n**0.5 for n in labels),
        "The weights run along the wrong dimension: each process has one.": (
            (torch.stack(gradients) * torch.tensor(labels)).sum(0) / total
        ),
        "You take the process with the most labels: all of them count.": (
            gradients[labels.index(max(labels))]
        ),
        "You sort the labels: each number belongs to its own gradient.": sum(
            g * n for g, n in zip(gradients, sorted(labels))
        )
        / total,
        "A process with a single label counts too.": sum(
            g * n for g, n in zip(gradients, labels) if n != 1
        )
        / sum(n for n in labels if n != 1),
    }


def numbers_of_labels() -> list:
    """For two, three and five processes, in no order; alike; with a one and a zero."""
    low = random.randint(2, 9)  # near each other, so that a softmax has no winner
    middle = low + random.randint(2, 5)
    high = middle + random.randint(2, 5)
    return [[low, high], [middle, high, low], [high, 1, low, 0, middle], [high] * 3]


def only_the_first(gradients, labels) -> dict:
    """{message: what a sum over the first few processes gives}"""
    found = {"Only the first process counts.": gradients[0]}
    for few, word in ((2, "two"), (3, "three"), (4, "four")):
        part = sum(g * n for g, n in zip(gradients[:few], labels))
        if few < len(labels):
            words = f"Only the first {word} processes count."
            found[words] = part / sum(labels[:few])
    return found


@checks(
    "Every process has the sum, sent 2 (W − 1) / W of the buffer, and spoke to one"
    " neighbour only: the ring, one of the ways that NCCL has.",
    "Each buffer is a flat tensor whose length is a multiple of W.",
    in_place=True,
)
def ring_all_reduce(function) -> None:
    """function(buffers, send) -> list of W tensors, each the sum; send(source, target,
    tensor) -> the tensor as it arrives."""
    for W, size in ((2, 3), (3, 3), (4, 3), (5, 1)):
        buffers = [draw(size * W) for _ in range(W)]
        cable = Cable(W)
        got = function([b.clone() for b in buffers], cable.send)
        check_sums(got, buffers, W)
        sent, enough = cable.sent, 2 * (W - 1) * size
        need(
            sum(sent) > 0,
            "Nothing was sent: processes share no memory. What one needs from another"
            " goes through send(source, target, tensor).",
        )
        need(
            len({(b - a) % W for a, b in cable.pairs}) == 1,
            "Somebody sends to more than one neighbour: in a ring, process i sends to"
            " i + 1 (the last one to 0) in every round.",
        )
        need(
            max(sent) <= enough,
            f"A process sent {max(sent)} numbers of a buffer of {size * W}, and"
            f" 2 (W − 1) / W of it, {enough}, are enough: send chunks of 1/W,"
            " first to add up, then to hand round.",
        )
        need(
            min(sent) == enough,
            f"A process sent {min(sent)} numbers of a buffer of {size * W}, too few:"
            " somebody reads another's memory. What a process knows is its own buffer,"
            " and what `send` gives.",
        )
        need(
            len({tensor.data_ptr() for tensor in got}) == W,
            "All processes hold one and the same tensor: each has a memory of its own.",
        )
        if W == 3:
            look_at_each_message(unwatched(function), buffers, len(cable.pairs_in_turn))


class Cable:
    """What goes from process to process. altered: the message that arrives changed."""

    def __init__(self, W, altered=None):
        self.W, self.altered = W, altered
        self.sent, self.pairs_in_turn = [0] * W, []

    @property
    def pairs(self):
        return {*self.pairs_in_turn}

    def send(self, source, target, tensor):
        need(
            source in range(self.W) and target in range(self.W),
            f"send(source, target, tensor): processes are 0 to {self.W - 1}; the"
            f" neighbour of the last one is 0. You have {source} and {target}.",
        )
        self.sent[source] += tensor.numel()
        self.pairs_in_turn.append((source, target))
        changed = len(self.pairs_in_turn) - 1 == self.altered
        return tensor + 1 if changed else tensor.clone()


def look_at_each_message(function, buffers, messages: int) -> None:
    """Where one message arrives changed, the process that it reached ends with another
    sum."""
    right = sum(buffers)
    for at in random.sample(range(messages), min(messages, 24)):
        cable = Cable(len(buffers), altered=at)
        got = function([b.clone() for b in buffers], cable.send)
        source, target = cable.pairs_in_turn[at]
        need(
            not torch.allclose(got[target], right),
            f"Process {target} does not use what arrives from process {source}: I have"
            " changed it on the way, and the sum is the same. What a process knows is"
            " its own buffer, and what `send` gives.",
        )


def check_sums(got, buffers, W):
    need(got is not None, "Your answer is None: is there a `return` at the end?")
    need(
        isinstance(got, (list, tuple)) and len(got) == W,
        f"Return a list of {W} tensors, one a process.",
    )
    right = sum(buffers)
    same = [isinstance(g, torch.Tensor) and g.shape == right.shape for g in got]
    need(all(same), "Each process ends with a tensor of the buffer's shape.")
    kinds = {tensor.dtype for tensor in got} - {right.dtype}
    need(
        not kinds,
        f"The buffers are {right.dtype}, and your sums {', '.join(map(str, kinds))}:"
        " keep the dtype.",
    )
    for rank, tensor in enumerate(got):
        if torch.allclose(tensor, right):
            continue
        if torch.allclose(tensor, right / W):
            raise Wrong("You divide by W: all-reduce gives the sum here.")
        whole = [torch.allclose(g, right) for g in got]
        if sum(whole):
            raise Wrong(
                f"Process {whole.index(True)} has the sum, process {rank} has not: the"
                " second half of the ring hands the sums round."
            )
        if torch.allclose(tensor, buffers[rank]):
            raise Wrong(f"Process {rank} ends with what it began with.")
        parts = [
            torch.allclose(mine, theirs)
            for mine, theirs in zip(tensor.chunk(W), right.chunk(W))
        ]
        if sum(parts) == 1:
            raise Wrong(
                "Each process has the sum of one chunk only: that is a reduce-scatter."
                " W − 1 more rounds hand the sums round (all-gather)."
            )
        raise Wrong(
            f"Process {rank} ends with other numbers than the sum"
            f" (first {tensor[0]:.3f}, expected {right[0]:.3f}). Which chunk does"
            " process i send in round k? The one it received in the round before."
        )


ORDER = ["DDP, LoRA", "FSDP2, QLoRA", "DDP, full", "FSDP2, LoRA", "FSDP2, full"]


def plain_name(name) -> str:
    """Without spaces and capitals."""
    return "".join(str(name).lower().split())


KNOWN = {plain_name(name): name for name in ORDER}


@checks(
    "DDP sends the gradients of what is trained; FSDP2 gathers what is stored, twice,"
    " and the gradients come on top."
)
def traffic_order(names, first="least") -> None:
    """names: the five ways, the one that sends least first (or "most")."""
    need(names is not None, "There is nothing here yet: give a list of the five names.")
    names = names.tolist() if hasattr(names, "tolist") else names
    if isinstance(names, (list, tuple)):
        names = [KNOWN.get(plain_name(name), name) for name in names]
    need(
        isinstance(names, (list, tuple)) and sorted(map(str, names)) == sorted(ORDER),
        f"Give each of these once: {', '.join(map(repr, sorted(ORDER)))}.",
    )
    names = list(names) if first == "least" else list(names)[::-1]
    place = {name: names.index(name) for name in ORDER}
    need(
        names != ORDER[::-1],
        f"That is the reverse: begin with the one that sends {first}.",
    )
    need(
        place["DDP, LoRA"] == 0,
        "The least is sent where only an adapter's gradients travel. Does a frozen"
        " weight travel under DDP? Under FSDP2?",
    )
    need(
        place["FSDP2, LoRA"] > place["DDP, full"],
        "FSDP2 with LoRA sends more than DDP with all gradients: it gathers every"
        " frozen weight once forward and once backward.",
    )
    need(
        place["FSDP2, QLoRA"] < place["DDP, full"],
        "In 4 bits a weight is an eighth of 32: gathered twice it is still less than"
        " its gradient in 32 bits, sent round the ring (2 (W − 1) / W).",
    )
    need(
        place["FSDP2, full"] == 4,
        "FSDP2 with all weights trained gathers as much as with LoRA, and its gradients"
        " come on top.",
    )
    need(names == ORDER, "One pair is still the wrong way round: compute the bytes.")


STEP_SLIPS = {
    "Checkpointing adds one forward pass, and not a third of the step: that is its"
    " share in full fine-tuning only.": lambda f, c: (3 - f) * (4 / 3 if c else 1),
    "Checkpointing adds one forward pass, and not a half of the step: that is its share"
    " over a frozen base only.": lambda f, c: (3 - f) * (1.5 if c else 1),
    "Turned round: a frozen base costs less.": lambda f, c: 2 + f + c,
    "Checkpointing saves memory and costs time: it adds a forward pass.": (
        lambda f, c: 3 - f - c
    ),
    "Frozen and checkpointing have changed places.": lambda f, c: 3 - c + f,
    "The forward pass itself is forgotten.": lambda f, c: 2 - f + c,
    "Checkpointing computes forward once more, not twice.": lambda f, c: 3 - f + 2 * c,
    "Over a frozen base checkpointing costs a forward pass, too.": (
        lambda f, c: 3 - f + (c and not f)
    ),
    "The base decides too, and not checkpointing alone.": lambda f, c: 4 if c else 2,
    "Neither a frozen base nor checkpointing changes anything for you.": (
        lambda f, c: 3
    ),
}


@checks(
    "Forward, backward to the inputs, backward to the weights, and once more forward"
    " for checkpointing: 3, 4, 2 and 3 forwards."
)
def step_cost(function, forward=1) -> None:
    """function(frozen, checkpointing) -> cost of a step in forward passes, or in what
    `forward` says that one of them costs."""
    right = {(False, False): 3, (False, True): 4, (True, False): 2, (True, True): 3}
    got = {given: function(*given) for given in right}
    need(
        all(value is not None for value in got.values()),
        "Your cost is None: is there a `return` at the end?",
    )
    said = {given: number(f"your cost for {given}", got[given]) for given in right}
    got = {given: value / forward for given, value in said.items()}
    look_at_the_unit(got, right, forward)
    slips = {
        "A frozen base still sends gradients to its inputs: one forward's cost, not"
        " none.": {**right, (True, False): 1, (True, True): 2},
        "The backward pass of a trained model is two products for each of the forward"
        " pass: to the inputs and to the weights.": {
            **right,
            (False, False): 2,
            (False, True): 3,
        },
        "A frozen base costs less: the products that make weight gradients are not"
        " computed.": {**right, (True, False): 3, (True, True): 4},
        "Checkpointing computes the forward pass once more, frozen or not.": {
            **right,
            (False, True): 3,
            (True, True): 2,
        },
        "Checkpointing computes the forward pass a second time, not the whole step.": {
            **right,
            (False, True): 6,
            (True, True): 4,
        },
    }
    slips |= {
        message: {(f, c): cost(f, c) for f, c in right}
        for message, cost in STEP_SLIPS.items()
    }
    choices = Choices(lambda a, b: abs(a - b) < 1e-9)
    for (frozen, checkpointing), expected in right.items():
        value = got[frozen, checkpointing]
        choices.add(
            value,
            expected,
            {text: wrong[frozen, checkpointing] for text, wrong in slips.items()},
            f"frozen={frozen}, checkpointing={checkpointing}: your cost is that of"
            f" {value:g} forward passes. Which of the three products are computed, and"
            " which one twice?",
        )
    choices.judge()


def look_at_the_unit(got, right, forward) -> None:
    """All costs are the right ones times one number."""
    factors = [got[given] / right[given] for given in right]
    factor = factors[0]
    if abs(factor - 1) < 1e-9 or max(factors) - min(factors) > 1e-9 * abs(factor):
        return
    unit = "forward passes" if forward == 1 else "the unit of the question"
    raise Wrong(
        f"The ratios of your costs are right, and all are {factor:g} times too large:"
        f" they are not in {unit}. What is the cost of one forward pass?"
        if factor > 0
        else "All your costs are zero, or negative."
    )


def cards_needed(sharded, whole, card, sizes, ddp=False):
    for count in sizes:
        if (sharded if ddp else sharded / count) + whole <= card:
            return count
    return None


CARDS = [  # (sharded, whole, card, sizes)
    (100.0, 10.0, 24.0, (1, 2, 4, 8)),
    (40.0, 5.0, 80.0, (1, 2, 4, 8)),
    (28.0, 10.0, 24.0, (1, 2, 4, 8)),  # exactly full
    (400.0, 30.0, 24.0, (1, 2, 4, 8)),  # never
    (300.0, 4.0, 24.0, (1, 2, 4, 8)),  # too large for eight
    (60.0, 3.0, 24.0, (8, 4, 2, 1)),  # not sorted
    (70.0, 1.0, 24.0, (1, 3, 6)),  # 24.33, 24.67 and 25.2 on three
    (71.0, 1.0, 24.0, (1, 3, 6)),
    (72.6, 1.0, 24.0, (1, 3, 6)),
    (74.6, 1.0, 24.0, (1, 3, 6)),  # 2 GB are more than GiB against GB
    (74.85, 1.0, 24.0, (1, 3, 6)),  # 25.95: GiB of all of a card
    (69.03, 1.0, 24.0, (1, 3, 6)),  # 24.01
    (94.0, 3.0, 24.0, (1, 2, 4, 8)),
    (380.0, 4.0, 24.0, (32, 16, 64, 24)),
    (10.0, 40.0, 24.0, (1, 2, 4, 8)),  # what each needs is too large
    (10.0, 24.0, 24.0, (1, 2, 4, 8)),  # and fills the card
]
CARD_SLIPS = {  # {message: how many cards this mistake finds}
    "You divide everything by the number of cards: activations and the gathered block"
    " are there on each card.": lambda a, b, c, s: cards_needed(a + b, 0, c, sorted(s)),
    "You divide nothing: FSDP2 shards, DDP does not.": lambda a, b, c, s: cards_needed(
        a, b, c, sorted(s), ddp=True
    ),
    "You forget what each card needs for itself.": lambda a, b, c, s: cards_needed(
        a, 0, c, sorted(s)
    ),
    "You divide what each card needs for itself, and not what is sharded.": (
        lambda a, b, c, s: next((n for n in sorted(s) if a + b / n <= c), None)
    ),
    "You give the most cards that fit: the fewest are asked for.": lambda a, b, c, s: (
        cards_needed(a, b, c, sorted(s, reverse=True))
    ),
    "You take the sizes in their order: they need not be sorted.": cards_needed,
    "A card that is exactly full is enough.": lambda a, b, c, s: cards_needed(
        a, b, c - 1e-6, sorted(s)
    ),
    "Where no number is enough, return None, not the largest.": lambda a, b, c, s: (
        cards_needed(a, b, c, sorted(s)) or max(s)
    ),
    "Where no number is enough, return None, not 0.": lambda a, b, c, s: (
        cards_needed(a, b, c, sorted(s)) or 0
    ),
    "Only numbers of cards in `sizes` can be had.": lambda a, b, c, s: cards_needed(
        a, b, c, range(1, 1000)
    ),
    "Only numbers of cards in `sizes` can be had, not all up to the largest.": (
        lambda a, b, c, s: cards_needed(a, b, c, range(1, max(s) + 1))
    ),
    "Only numbers of cards in `sizes` can be had, and not all powers of two.": (
        lambda a, b, c, s: cards_needed(a, b, c, (1, 2, 4, 8, 16, 32))
    ),
    "You divide without a rest (//): 17.5 GB are more than 17.": (
        lambda a, b, c, s: next((n for n in sorted(s) if a // n + b <= c), None)
    ),
    "You round what a card needs: 24.3 GB do not fit into 24.": (
        lambda a, b, c, s: next((n for n in sorted(s) if round(a / n + b) <= c), None)
    ),
    "Return the number of cards, not its place in `sizes`.": lambda a, b, c, s: (
        place_in(sorted(s), cards_needed(a, b, c, sorted(s)))
    ),
}


def place_in(sizes, count):
    return None if count is None else sizes.index(count)


def slips_with(reserve) -> dict:
    """More of CARD_SLIPS: c is what may be filled of a card, beside `reserve` GB that
    stay free."""
    slips = {
        "All numbers are in one unit, GB: convert nothing.": lambda a, b, c, s: (
            cards_needed(a, b, (c + reserve) * 2**30 / 1e9 - reserve, sorted(s))
        )
    }
    if reserve:
        slips |= {
            f"{reserve} GB of each card have to stay free.": lambda a, b, c, s: (
                cards_needed(a, b, c + reserve, sorted(s))
            ),
            "What has to stay free is not divided: it stays free on each card.": (
                lambda a, b, c, s: cards_needed(a + reserve, b, c + reserve, sorted(s))
            ),
        }
    return slips


@checks(
    "What is sharded is divided, what each card needs for itself is not; and if no"
    " number is enough, you say so."
)
def card_count(function, reserve=0) -> None:
    """function(sharded, whole, card, sizes) -> the fewest cards that are enough, or
    None. reserve: the GB of a card that have to stay free."""
    got = [function(a, b, c + reserve, list(sizes)) for a, b, c, sizes in CARDS]
    right = [cards_needed(a, b, c, sorted(sizes)) for a, b, c, sizes in CARDS]
    slips = {
        message: [wrong(*case) for case in CARDS]
        for message, wrong in (CARD_SLIPS | slips_with(reserve)).items()
    }
    need(got != [None] * len(got), "Your answer is None for every case.")
    choices = Choices()
    for at, (case, mine, expected) in enumerate(zip(CARDS, got, right)):
        sharded, whole, card, sizes = case
        choices.add(
            mine,
            expected,
            {message: wrong[at] for message, wrong in slips.items()},
            f"sharded={sharded}, whole={whole}, card={card + reserve}, sizes={sizes}:"
            f" I find {expected}, you {mine}.",
        )
    choices.judge()
    need(
        function(100.0, 10.0, 24.0 + reserve, []) is None,
        "No cards can be rented at all (`sizes` is empty), and you find some that are"
        " enough.",
    )


def runs_of(missing) -> list:
    """[(what each process calls, what is to be returned)]"""
    good = ["all-gather", "all-reduce", "all-reduce", "reduce-scatter"]
    return [
        ([good, good], None),
        ([good, good, good], None),
        (
            [good, [*good[:2], "broadcast", good[3]]],
            (2, {0: "all-reduce", 1: "broadcast"}),
        ),
        ([good, good[:3]], (3, {0: "reduce-scatter", 1: missing})),
        ([good[:3], good], (3, {0: missing, 1: "reduce-scatter"})),
        (
            [good, good, ["broadcast", *good[1:2], "barrier"]],
            (0, {0: "all-gather", 1: "all-gather", 2: "broadcast"}),
        ),
        ([[], good], (0, {0: missing, 1: "all-gather"})),
        (  # the first two part later than the third does
            [good, [*good[:3], "barrier"], [good[0], "broadcast", *good[2:]]],
            (1, {0: "all-reduce", 1: "all-reduce", 2: "broadcast"}),
        ),
        (  # the same calls, in another order
            [good, [good[1], good[0], *good[2:]]],
            (0, {0: "all-gather", 1: "all-reduce"}),
        ),
        (  # the first and the last agree
            [good, [*good[:2], "barrier", good[3]], good],
            (2, {0: "all-reduce", 1: "barrier", 2: "all-reduce"}),
        ),
        (  # each calls another
            [good, [good[0], "barrier"], [good[0], "broadcast", good[2]]],
            (1, {0: "all-reduce", 1: "barrier", 2: "broadcast"}),
        ),
        (  # the fourth alone
            [good, good, good, good[:2]],
            (2, {0: "all-reduce", 1: "all-reduce", 2: "all-reduce", 3: missing}),
        ),
        (  # one collective, of two blocks
            [["all-gather block 1"], ["all-gather block 2"]],
            (0, {0: "all-gather block 1", 1: "all-gather block 2"}),
        ),
        ([[], []], None),
    ]


@checks(
    "The first call that differs is where all wait for each other, and a list that ends"
    " early is a difference too."
)
def first_mismatch(function, missing=None) -> None:
    """function(calls) -> (index, {rank: name}) of the first collective in which the
    processes differ, or None. missing: the name for a process that calls no more."""
    cases = runs_of(missing)
    got = [function([list(one) for one in calls]) for calls, _ in cases]
    need(
        got != [None] * len(got),
        "Your answer is None for every run: some of them are fine, the others hang.",
    )
    look_at_which_are_found(got)
    from_one = all(
        isinstance(answer, list | tuple) and answer[:1] in ((at[0] + 1,), [at[0] + 1])
        for answer, (_, at) in zip(got, cases)
        if at is not None
    )
    for answer, (calls, right) in zip(got, cases):
        answer = tuple(answer) if isinstance(answer, list) else answer
        if answer != right:
            name_fault(answer, calls, right, from_one, missing)


def look_at_which_are_found(got) -> None:
    """got: what is returned for each of runs_of()."""
    shortest = [got[i] for i in (3, 4, 6)]
    need(
        shortest != [None, None, None],
        "You stop where the shortest list ends: a process that makes no further call"
        " lets the others wait. zip is too short here.",
    )
    need(
        got[5] is not None or got[10] is None or got[9] is not None,
        "You stop only where all processes differ: one that differs from the others is"
        " enough.",
    )
    need(
        got[5] is not None or got[9] is None,
        "You compare the first two processes only: there may be more.",
    )
    need(
        got[5] is None or got[9] is not None,
        "You compare some of the processes only: look at all of them in each call.",
    )


def name_fault(answer, calls, right, from_one, missing) -> None:
    """from_one: whether all calls are counted from 1."""
    need(right is not None, "You find a difference in a run where all calls agree.")
    need(answer is not None, f"You find no difference in {calls}.")
    need(
        isinstance(answer, tuple) and len(answer) == 2,
        "Return (index, {rank: name}), or None.",
    )
    index, names = answer
    need(not from_one, "You count from 1: the first call has index 0.")
    need(
        index == right[0],
        f"You name call {index}, the first difference is in call {right[0]}: what"
        " comes after it is never reached.",
    )
    need(
        isinstance(names, dict) and set(names) == set(right[1]),
        "Name what every process calls there, the ones that agree too: {rank: name}.",
    )
    raise Wrong(
        f"In call {index} I find {right[1]}, you {names}. A process that makes no"
        f" call any more has {missing!r}."
    )
