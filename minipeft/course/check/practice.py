"""What several chapters' checks need: a small model and a small task to train a
learner's own method on, predictions that were written down, and what an answer forms
on its way."""

import copy
import gc
import tracemalloc
import types

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...lm import GPT, GPTConfig
from ...model import get_peft_model
from ..comparison import compare as told_apart
from .sandbox import unwatched
from .teacher import Wrong, need, same

SEEDS = 0, 1, 2
VOCABULARY = 24


def small_gpt(seed: int = 0, layers: int = 2) -> GPT:
    """A Llama-style network of 16 channels, with grouped keys and values."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return GPT(GPTConfig(vocab_size=VOCABULARY, **shape, **heads))


def chains(rows: int, seed: int, length: int = 10) -> torch.Tensor:
    """Token ids (rows, length): each token has one successor, and only the first of a
    row is drawn."""
    successor = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(9))
    draws = torch.Generator().manual_seed(seed)
    ids = [torch.randint(VOCABULARY, (rows,), generator=draws)]
    for _ in range(length - 1):
        ids.append(successor[ids[-1]])
    return torch.stack(ids, 1)


class Adam:
    """Adam for some dozen steps. The first use of torch.optim loads a compiler, which
    takes longer than the training does."""

    def __init__(self, parameters, lr: float):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.lr = lr
        self.means = [
            (torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters
        ]
        self.steps = 0

    def step(self, loss) -> None:
        need(
            bool(loss.isfinite()),
            f"Trained on a small task, the loss is {loss.item()} after {self.steps}"
            " steps.",
        )
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.steps += 1
        with torch.no_grad():
            for p, g, (m, v) in zip(self.parameters, gradients, self.means):
                if g is None:
                    continue
                m.lerp_(g, 0.1)
                v.lerp_(g * g, 0.001)
                m_hat = m / (1 - 0.9**self.steps)
                v_hat = v / (1 - 0.999**self.steps)
                p -= self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def fit(loss, parameters, steps: int, lr: float) -> None:
    """`steps` steps of Adam on loss(), which may draw new data each time."""
    adam = Adam(parameters, lr)
    for _ in range(steps):
        adam.step(loss())


def train_small(model, steps: int, lr: float, seed: int) -> None:
    """Adam on what requires a gradient, 8 new rows a step."""
    adam = Adam(model.parameters(), lr)
    for step in range(steps):
        ids = chains(8, 1000 * seed + step)
        adam.step(model(input_ids=ids, labels=ids).loss)


@torch.no_grad()
def loss_on_new(model) -> float:
    ids = chains(64, 999_999)
    return model.eval()(input_ids=ids, labels=ids).loss.item()


def needs_to_learn(config, steps: int = 60, lr: float = 3e-2) -> None:
    """Train a method of the learner's own on a small task with three seeds: by the
    course's rule it has to be ahead of the frozen base."""
    own, frozen = {}, {}
    for seed in SEEDS:
        base = small_gpt(seed, layers=1)
        frozen[seed] = loss_on_new(base)
        torch.manual_seed(seed)
        model = get_peft_model(base, copy.deepcopy(config)).train()
        train_small(model, steps, lr, seed)
        own[seed] = loss_on_new(model)
    result = told_apart(own, frozen, loss=True)
    need(
        result.verdict == "ahead",
        f"Trained on a small task for {steps} steps with three seeds, your method is"
        f" {result} of the untouched base in loss: it learns too little.",
    )


def without_seeding(make):
    """make(), which may draw random numbers, and must not seed the generator that
    everybody shares."""
    before = torch.initial_seed()
    made = make()
    need(
        torch.initial_seed() == before,
        "Your code seeds torch's global generator (torch.manual_seed): all draws"
        " after it, for another layer or for the data, begin again from there. Draw"
        " with a generator of its own (torch.Generator), or leave the seed alone.",
    )
    return made


def plain_words(text) -> str:
    """A case without what two people write differently: capitals, spaces, commas, and
    the sign of a product."""
    letters = str(text).casefold().replace("×", "x").replace("*", "x")
    return "".join(one for one in letters if one.isalnum() or one in "/-+.=")


def written(
    predicted, cases, todo="write your prediction", form="{case: number}"
) -> dict:
    """{case: what is predicted}: a dictionary that has all cases and no other; a name
    may differ in capitals, spaces and commas. todo, form: the words for one that is
    empty, or something else."""
    need(
        predicted is not None,
        f"There is nothing here yet: {todo} in the place of None.",
    )
    need(
        isinstance(predicted, dict),
        f"Give a dictionary {form}; yours is a {type(predicted).__name__}.",
    )
    known = {plain_words(case): case for case in cases}
    if len(known) == len(cases):
        spelt = {case: known.get(plain_words(case), case) for case in predicted}
        if len({*spelt.values()}) == len(spelt):
            predicted = {spelt[case]: said for case, said in predicted.items()}
    missing = [case for case in cases if case not in predicted]
    need(not missing, f"There is no prediction for {', '.join(map(repr, missing))}.")
    unknown = [case for case in predicted if case not in cases]
    need(
        not unknown,
        f"{', '.join(map(repr, unknown))} is not one of"
        f" {', '.join(map(repr, cases))}: leave it out.",
    )
    return predicted


def numbers(predicted, cases) -> dict:
    """{case: the learner's number}, for a prediction that has all of them."""
    predicted = written(predicted, cases)
    return {case: number(case, predicted[case]) for case in cases}


def number(case, value) -> float:
    need(
        value is not None,
        "There is nothing here yet: write your prediction in the place of None.",
    )
    try:
        usable = not isinstance(value, (str, bool)) and float(value) == float(value)
    except (TypeError, ValueError):
        usable = False
    need(usable, f"{case!r}: expected a number, found {value!r}.")
    return float(value)


def missed(said: float, true: float) -> str:
    """ "3, which is too small": how a predicted number misses, without telling it. What
    rounding leaves of a sum that is zero has no sign."""
    if said * true < 0 and abs(true) > 1e-12:
        return f"{said:.4g}, which has the wrong sign"
    small, large = sorted((abs(said), abs(true)))
    far = "far " if large > 4 * small else ""
    return f"{said:.4g}, which is {far}too {'small' if abs(said) == small else 'large'}"


# ---- a copy of what was built --------------------------------------------------------


@torch.no_grad()
def copy_stands_alone(module, output, learnt=None) -> None:
    """A deep copy of what a learner built gives the same, also after the original's
    numbers have changed. output(module): what it computes; learnt: the part of it whose
    numbers change, None: all of it."""
    before = output(module)
    try:
        twin = copy.deepcopy(module)
    except RuntimeError as error:
        raise Wrong(
            "It cannot be copied (copy.deepcopy), nor saved: it keeps a tensor that was"
            " computed in a forward, with its graph. Keep parameters and plain numbers."
        ) from error
    need(
        same(output(twin), before), "A copy of it (copy.deepcopy) gives another output."
    )
    part = module if learnt is None else learnt
    numbers = [p for p in part.parameters() if p.requires_grad]
    numbers += [buffer for buffer in part.buffers() if buffer.is_floating_point()]
    kept = [p.clone() for p in numbers]
    for p in numbers:
        p.mul_(1.5).add_(0.1)
    moved, there = output(module), output(twin)
    for p, value in zip(numbers, kept):
        p.copy_(value)
    need(
        same(there, before) or same(moved, before),
        "A copy of it (copy.deepcopy) computes with the numbers of the first one: a"
        " lambda or another function that was made at the start holds them. Read them"
        " from self where they are used.",
    )


# ---- what is formed on the way -------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Within it, the largest number of entries of a tensor that an operation gave."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.entries = max(self.entries, part.numel())
        return result


def python_bytes(function, *args) -> int:
    """The most bytes that Python and numpy held at once during a call. torch's tensors
    are not among them: see LargestTensor."""
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def calls_of_autograd(function, *args) -> int:
    """How often a call asks autograd for gradients."""
    asked, engine = [], torch.autograd._engine_run_backward

    def noting(*given, **options):
        asked.append(1)
        return engine(*given, **options)

    torch.autograd._engine_run_backward = noting
    try:
        unwatched(function)(*args)
    finally:
        torch.autograd._engine_run_backward = engine
    return len(asked)


# ---- what is kept --------------------------------------------------------------------


def held(thing, without=(), kinds=torch.Tensor | np.ndarray) -> list:
    """All tensors and numpy arrays that an object keeps alive: attributes, buffers,
    what lies in lists, in closures, or on a module inside it. without: objects that
    are not looked into; kinds: other things to look for."""
    found, seen, todo = [], {id(one) for one in without}, [thing]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType):
            continue
        seen.add(id(one))
        if isinstance(one, kinds):
            found.append(one)
        if isinstance(one, torch.Tensor | np.ndarray):
            continue
        if isinstance(one, types.FunctionType):  # without the notebook's globals
            todo += [cell.cell_contents for cell in one.__closure__ or ()]
            todo += one.__defaults__ or ()
        else:
            todo += gc.get_referents(one)
    return found


def held_entries(thing) -> int:
    """The entries of the largest array of floating-point numbers that is held, or how
    many single ones are."""
    sizes = [
        one.numel() if isinstance(one, torch.Tensor) else one.size
        for one in held(thing)
        if "float" in str(one.dtype)
    ]
    return max([*sizes, len(held(thing, kinds=float))])
