"""Train whatever requires a gradient: a whole model, or the few numbers of an adapter.

One loop for pretraining, full fine-tuning and every adapter. It can be stopped at any
time (Ctrl-C, a power cut) and goes on to bit-identical weights: batches depend only on
(seed, step), and the checkpoint holds the rest. Everything that decides the result is
in the checkpoint's settings; a run with other settings is refused.
"""

import contextlib
import json
import math
import signal
import threading
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..io import check_choice, check_file, check_number, locked, remove_parts, whole
from ..quant import AdamW8bit, PagedAdamW
from ..quant.optimizers import check_betas
from . import distributed
from .checkpoint import load_checkpoint, read_metadata, save_checkpoint, trained_tensors
from .data import Batches, check_ids, check_lengths, max_tokens
from .evaluation import completion_loss, count_labels, fast_loss
from .generation import in_mode

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adamw8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw8bit": partial(PagedAdamW, optim_bits=8),
}
SHARDED = ("adamw", "adam", "sgd")  # optimizers that know sharded tensors
SCHEDULES = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
}
# fields of an adapter's configuration that do not change its training
NOTES = {
    "base_model_name_or_path",
    "name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "transformers_version",
}


@dataclass
class History:
    """What happened. `losses`, `lr`, `grad_norm`: one number a step. `eval_loss`:
    [step, loss] pairs; `best`: the lowest."""

    losses: list = field(default_factory=list)
    lr: list = field(default_factory=list)
    grad_norm: list = field(default_factory=list)
    eval_loss: list = field(default_factory=list)
    best: list | None = None
    tokens: int = 0
    seconds: float = 0.0
    # None: ran to the end; "interrupted": Ctrl-C; "diverged": the loss, a gradient or a
    # weight became nan or infinite
    stopped: str | None = None

    @property
    def steps(self):
        return len(self.losses)

    @property
    def tokens_per_second(self):
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def recent(self):
        """Mean loss of the last 20 steps."""
        return sum(self.losses[-20:]) / max(1, len(self.losses[-20:]))

    def __repr__(self):
        speed = f"{self.tokens_per_second:,.0f} tokens/s"
        text = f"{self.steps} steps, {self.seconds:.0f} s, {speed}"
        if self.losses:
            text += f", loss {self.losses[0]:.3f} -> {self.recent:.3f}"
        if self.best:
            text += f", best eval loss {self.best[1]:.3f} at step {self.best[0]}"
        return f"History({text}{', ' + self.stopped.upper() if self.stopped else ''})"


def lr_factor(step, steps, warmup, schedule):
    """What the peak rate is multiplied by at `step` (from 0): a linear warm-up, then
    constant, linear or cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)  # 0 .. 1
    return SCHEDULES[schedule](done)


def check_ready(optimizer, model, **given):
    """ValueError for a ready optimizer of another model, or for a value beside it that
    is not its own."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            "the optimizer holds no parameter of this model: make it from"
            " model.parameters()"
        )
    defaults = {"lr": None, "weight_decay": 0.0, "betas": (0.9, 0.999)}
    for name, value in given.items():
        own = [optimizer.defaults.get(name)]
        own += [g.get(f"initial_{name}", g.get(name)) for g in optimizer.param_groups]
        if value != defaults[name] and value not in own:
            raise ValueError(
                f"{name} = {value}: the optimizer is ready and brings its own,"
                f" {own[0]}; leave {name} out"
            )


def make_optimizer(model, optimizer, lr, betas, weight_decay):
    """By name, by factory `f(param_groups, lr=...)`, or a ready torch optimizer (say
    LoRA+), returned as it is."""
    if isinstance(optimizer, torch.optim.Optimizer):
        given = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas)}
        check_ready(optimizer, model, **given)
        return optimizer
    if lr is None:
        raise ValueError(
            "train needs lr=..., for example 1e-3 for full fine-tuning, 1e-2 for LoRA"
            " on the shipped base"
        )
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2]
    vectors = [p for p in params if p.ndim < 2]  # biases and norms are never decayed
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if callable(optimizer):
        return optimizer(groups, lr=lr)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    extra = {} if optimizer == "sgd" else {"betas": betas}
    on = params[0].device.type
    sharded = distributed.is_part(params[0])
    if sharded:
        # 8-bit states are blocks of a whole tensor
        check_choice("optimizer of a sharded model", optimizer, SHARDED)
    # torch has no fused SGD for sharded tensors
    fused = ("adamw", "adam") if sharded else ("adamw", "adam", "sgd")
    if optimizer in fused and on in ("cpu", "cuda"):
        # one kernel for all tensors: an adapter has many tiny ones
        extra["fused"] = True
    return OPTIMIZERS[optimizer](groups, lr=lr, **extra)


def labels_of(batches):
    """How many there are. Warns of none."""
    labels = sum(count_labels(batch) for batch in batches)
    if not labels:
        warnings.warn(
            "a step has no label to learn, for all of its batches' are -100: its loss"
            " counts as 0",
            stacklevel=3,
        )
    return labels


def accumulate_grads(model, batches, bf16=False):
    """Add the gradients of the mean loss over all labels of `batches`; returns that
    loss. Of several processes each computes with its own rows.

    Each part weighs by its labels. A mean of the parts' means would favour the tokens
    of short completions."""
    device = next(model.parameters()).device
    extra = fast_loss(distributed.model_of(model))
    labels = labels_of(batches)
    # DDP and FSDP2 divide the sum of the processes' gradients by their number
    scale = distributed.processes() / max(1, labels)
    loss = 0.0
    for i, batch in enumerate(batches, 1):
        batch = distributed.my_rows(batch)
        count = count_labels(batch)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with distributed.sync(model, last=i == len(batches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                mean = model(**batch, **extra).loss
            # without labels the mean is nan, and other processes wait for the zeros
            part = (mean if count else mean.nan_to_num(0.0)) * (count * scale)
            part.backward()
        loss += part.item()
    return distributed.total(loss) / distributed.processes()


@contextmanager
def finish_step_on_interrupt():
    """First Ctrl-C: finish the step, so that no weights are half-updated. Second: stop
    at once. Yields an Event, set by the first."""
    stop = threading.Event()
    # only the main thread hears signals
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_interrupt(*_):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# ---- what decides the result ---------------------------------------------------------


def frozen_checksum(model):
    """CRC-32 of every tensor that is not trained (the base's weights), and of all
    names, shapes and dtypes; the sum of all processes'."""
    trained = trained_tensors(model)
    crc = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        text = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        crc = zlib.crc32(text.encode(), crc)
        if name not in trained and not tensor.is_meta:
            crc = crc_of(distributed.local(tensor), crc)
    return distributed.total(crc)


def model_settings(model):
    """{"model, norm_eps": 1e-5, ...}: the configuration of a model that has one, for
    what is computed depends on more than weights."""
    config = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    return {
        f"model, {name}": value
        for name, value in fields.items()
        if name.lstrip("_") not in NOTES and value is not None
    }


def crc_of(tensor, crc=0):
    """CRC-32 of a tensor's bytes, going on from `crc`."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    for part in flat.split(1 << 26):  # a GPU's tensor needs no whole copy
        crc = zlib.crc32(part.cpu().numpy().tobytes(), crc)
    return crc


def data_checksum(data, steps):
    """CRC-32 of the rows; of the first, middle and last batches where only batches are
    to be had."""
    if hasattr(data, "checksum"):
        return data.checksum()
    crc = 0
    for step in (0, steps // 2, steps - 1):
        for name, tensor in sorted(data.batch(step).items()):
            crc = crc_of(tensor, zlib.crc32(name.encode(), crc))
    return crc


def tokenizer_checksum(tokenizer):
    raw = getattr(tokenizer, "raw", getattr(tokenizer, "backend_tokenizer", None))
    return zlib.crc32(raw.to_str().encode()) if hasattr(raw, "to_str") else None


def adapter_settings(model):
    """{"adapter default, r": 8, ...}: the fields of the adapters' configurations."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return {}
    active = model.active_adapters
    settings = {"active adapters": list(active() if callable(active) else active)}
    for adapter, config in configs.items():
        for name, value in config.to_dict().items():
            if name not in NOTES:
                settings[f"adapter {adapter}, {name}"] = value
    return settings


def as_json(settings):
    """The settings as they come back from a file: sets as sorted lists, and so on."""

    def plain(value):
        return sorted(value) if isinstance(value, set) else str(value)

    return json.loads(json.dumps(settings, default=plain))


def difference(name, saved, now):
    """In words; of dictionaries, as an optimizer's groups are, what differs in the
    first two that do."""
    pairs = [(saved, now)]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        pairs = [(old, new) for old, new in zip(saved, now) if old != new]
    old, new = pairs[0]
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        changes = [f"{key} {old.get(key)} (now {new.get(key)})" for key in keys]
        return f"{name}: {', '.join(changes)}"
    return f"{name} {saved} (now {now})"


def check_settings(path, settings):
    """ValueError that names what differs between a checkpoint's settings and these."""
    saved = {"processes": 1} | read_metadata(path).get("settings", {})
    names = [*settings, *(name for name in saved if name not in settings)]
    other = [
        difference(name, saved.get(name), settings.get(name))
        for name in names
        if saved.get(name) != settings.get(name)
    ]
    if other:
        raise ValueError(
            f"{path} was made with other settings: {', '.join(other)}. Repeat them to"
            " go on, or pass resume=False, or another folder"
        )


# ---- the loop ------------------------------------------------------------------------


def train(
    model,
    data,
    *,
    tokenizer=None,
    steps,
    batch_size=16,
    lr=None,
    warmup=0,
    schedule="cosine",
    weight_decay=0.0,
    betas=(0.9, 0.999),
    clip=1.0,
    accumulate=1,
    bf16=False,
    optimizer="adamw",
    evaluate_every=None,
    valid=None,
    seed=0,
    folder=None,
    save_every=None,
    resume=True,
    progress=True,
    log=None,
    after_step=None,
):
    """Train the parameters of `model` that require a gradient; returns a History.

    In a process group (torchrun) all processes call it alike: DDP, or FSDP2 if `model`
    is sharded (distributed.shard). The gradient is that of one large batch.

    data        a Task, a list of Examples (both need tokenizer=), or any object with
                .batch(step) -> model's arguments
    batch_size  rows a process
    lr          the peak rate (a ready optimizer brings its own, one a group)
    warmup      steps of rising rate, or a fraction of all steps if below 1
    optimizer   "adamw", "adamw8bit" (states in 8 bits), "paged_adamw" (states in pages,
                on a GPU), "adam", "sgd", or yours
    accumulate  batches of `batch_size` rows a step; the gradient is that of one large
                batch
    valid       examples for evaluate_every, or a Task that has them (data that are a
                Task bring their own). The best weights stay in folder/best.safetensors:
                checkpoint.load_checkpoint(file, model) puts them back (with an
                after_step also after_step=)
    folder      for checkpoints: latest.safetensors every `save_every` steps (default:
                as evaluate_every, else ten times), at the end and on Ctrl-C. The same
                call again goes on there; resume=False starts again. One run at a time
                writes there, in the first process; all must be able to read it
    log         called as log(step, {"loss", "lr", "grad_norm"}) after each step, the
                gradients still in place; in the first process
    after_step  likewise, by its .step(), such as an AdaLoRA's RankAllocator; in every
                process. Its state_dict(), tensors by name, is part of the checkpoints
    """
    valid = getattr(data if valid is None else valid, "valid", valid)  # of a Task
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "warmup": warmup,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "clip": clip,
        "accumulate": accumulate,
        "bf16": bf16,
        "seed": seed,
        "processes": describe_processes(model),
    }
    every = {"evaluate_every": evaluate_every, "save_every": save_every}
    check_numbers(settings | every | {"lr": lr})
    check_betas(betas)
    check_arguments(model, schedule, evaluate_every, valid)
    check_after_step(after_step, folder)
    settings["warmup"] = warmup_steps(warmup, steps)
    rows = batch_size * distributed.processes()
    batches = make_batches(model, data, tokenizer, rows, seed, valid)
    optimizer = make_optimizer(model, optimizer, lr, betas, weight_decay)
    run = Run(model, batches, optimizer, settings, tokenizer, valid, evaluate_every)
    run.save_every = save_every or evaluate_every or max(1, steps // 10)
    run.log = log
    run.after_step = after_step
    return run.go(folder, resume, progress)


NUMBERS = {  # what io.check_number is told about each number of train
    "steps": {"whole": True, "least": 1},
    "batch_size": {"whole": True, "least": 1},
    "accumulate": {"whole": True, "least": 1},
    "lr": {"least": 0, "also": (None,)},
    "warmup": {"least": 0},
    "weight_decay": {"least": 0},
    "clip": {"above": 0, "also": (None, math.inf)},
    "evaluate_every": {"whole": True, "least": 1, "also": (None,)},
    "save_every": {"whole": True, "least": 1, "also": (None,)},
    "seed": {"whole": True, "least": 0, "most": 2**64 - 1},  # as torch's
}


def check_numbers(given):
    for name, bounds in NUMBERS.items():
        check_number(name, given[name], **bounds)


def check_arguments(model, schedule, evaluate_every, valid):
    check_choice("schedule", schedule, SCHEDULES)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing to train: no parameter of the model requires a gradient"
        )
    if evaluate_every and not valid:
        raise ValueError("evaluate_every needs valid=, a list of examples")


def check_after_step(after_step, folder):
    needed = [
        "step",
        *(["state_dict", "load_state_dict"] if folder is not None else []),
    ]
    missing = [name for name in needed if not hasattr(after_step, name)]
    if after_step is not None and missing:
        raise ValueError(
            f"after_step has no {missing[0]}(): expected an object with"
            f" {', '.join(needed)}"
        )


def warmup_steps(warmup, steps):
    if warmup < 1:
        return round(warmup * steps)
    if warmup != int(warmup):
        raise ValueError(
            f"warmup = {warmup}: expected whole steps, or a fraction of all below 1"
        )
    return int(warmup)


def describe_processes(model):
    """1, "2, ddp" or "2, fsdp2": part of the settings, for it decides the last bits."""
    count = distributed.processes()
    if count == 1:
        return count
    return f"{count}, {'fsdp2' if distributed.is_sharded(model) else 'ddp'}"


def make_batches(model, data, tokenizer, batch_size, seed, valid):
    """`data` as an object with .batch(step). Whatever cannot be trained on or evaluated
    later is a ValueError now."""
    if hasattr(data, "batch"):
        return data
    if tokenizer is None:
        raise ValueError("train needs tokenizer= to make batches of examples")
    most = max_tokens(model)
    examples = getattr(data, "train", data)
    batches = Batches(examples, tokenizer, batch_size, seed=seed, max_length=most)
    check_ids(model, [batches.largest_id()])
    for others in (valid, getattr(data, "test", None)):
        check_lengths(tokenizer, others or [], most)
    return batches


class Run:
    """One call of `train`: a step, and what is kept of it."""

    def __init__(
        self, model, data, optimizer, settings, tokenizer, valid, evaluate_every
    ):
        self.model = model
        self.parallel = distributed.parallel(model)  # the forward pass in training
        self.data = data
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.settings = settings
        self.tokenizer = tokenizer
        self.valid = valid
        self.evaluate_every = evaluate_every
        self.history = History()
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.rates = [group["initial_lr"] for group in optimizer.param_groups]
        self.folder = None
        self.latest = None
        self.log = None
        self.after_step = None

    def go(self, folder, resume, progress):
        """All steps, or those that a stopped run has left."""
        device = next(self.model.parameters()).device
        with contextlib.ExitStack() as stack:
            # the caller's random numbers stay as they were
            devices = [device] if device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            stop = stack.enter_context(finish_step_on_interrupt())
            # each drops out its own
            torch.manual_seed((self.settings["seed"] + distributed.rank()) % 2**64)
            if folder is not None and distributed.is_first():
                stack.enter_context(locked(folder))
            if folder is not None:
                self.open(Path(folder), resume)
            stack.callback(self.optimizer.zero_grad, set_to_none=True)
            return self.loop(stop, progress)

    def open(self, folder, resume):
        """Take the folder for checkpoints, and go on from the one there, if any."""
        self.folder = folder
        self.latest = folder / "latest.safetensors"
        for name in ("latest", "best"):
            file = folder / f"{name}.safetensors"
            if distributed.is_first():
                remove_parts(file)
            if file.exists():
                check_file(file)
        self.settings = as_json(self.settings | self.facts())
        if resume and self.latest.exists():
            check_settings(self.latest, self.settings)
            saved = load_checkpoint(
                self.latest, self.model, self.optimizer, self.after_step
            )
            self.history = History(**saved["history"])
            self.history.stopped = None

    def facts(self):
        """What else decides the result."""
        batches = self.settings["steps"] * self.settings["accumulate"]
        groups = [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        facts = {
            "optimizer": type(self.optimizer).__name__,
            "optimizer's groups": groups,
            "model (checksum)": frozen_checksum(self.model),
            **model_settings(self.model),
            "data (checksum)": data_checksum(self.data, batches),
            "tokenizer (checksum)": tokenizer_checksum(self.tokenizer),
            **adapter_settings(self.model),
        }
        if self.after_step:
            facts["after_step"] = type(self.after_step).__name__
        if self.evaluate_every:
            texts = repr([(e.prompt, e.completion) for e in self.valid])
            facts["evaluate_every"] = self.evaluate_every
            facts["valid (checksum)"] = zlib.crc32(texts.encode())
        return facts

    def loop(self, stop, progress):
        steps = self.settings["steps"]
        first = self.history.steps
        shown = progress and distributed.is_first()
        options = {"unit": "step", "mininterval": 0.5, "disable": not shown}
        with tqdm(total=steps, initial=first, **options) as bar, in_mode(self.model):
            for step in range(first, steps):
                if not self.step(step):
                    self.history.stopped = "diverged"
                    break
                speed = f"{self.history.tokens_per_second:,.0f} tokens/s"
                bar.set_postfix_str(f"loss {self.history.recent:.3f}, {speed}", False)
                bar.update()
                self.keep(step + 1, stop)
                if self.history.stopped:
                    break
        return self.history

    def step(self, step):
        """One step; False, and no weight changed, if the loss or a gradient is nan or
        infinite."""
        started = time.perf_counter()
        steps, accumulate = self.settings["steps"], self.settings["accumulate"]
        factor = lr_factor(
            step, steps, self.settings["warmup"], self.settings["schedule"]
        )
        for group, peak in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = peak * factor
        batches = [self.data.batch(step * accumulate + i) for i in range(accumulate)]
        self.optimizer.zero_grad(set_to_none=True)
        loss = accumulate_grads(self.parallel, batches, self.settings["bf16"])
        clip = self.settings["clip"] or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        norm = whole(norm).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            return False
        self.optimizer.step()
        history = self.history
        history.losses.append(loss)
        history.lr.append(self.optimizer.param_groups[0]["lr"])
        history.grad_norm.append(norm)
        history.tokens += sum(count_tokens(batch) for batch in batches)
        history.seconds += time.perf_counter() - started
        if self.after_step:
            self.after_step.step()
        if self.log and distributed.is_first():
            self.log(step, {"loss": loss, "lr": history.lr[-1], "grad_norm": norm})
        return True

    def keep(self, done, stop):
        """Evaluate and save, where it is time to."""
        steps = self.settings["steps"]
        history = self.history
        is_last = done == steps
        if self.evaluate_every and (done % self.evaluate_every == 0 or is_last):
            self.evaluate(done)
        # Ctrl-C may reach the processes at different steps
        if distributed.total(stop.is_set()) and not is_last:
            history.stopped = "interrupted"
        if done % self.save_every == 0 or is_last or history.stopped:
            if not self.is_finite():
                history.stopped = "diverged"  # the file keeps the last good weights
            elif self.latest:
                metadata = {"settings": self.settings, "history": asdict(history)}
                self.save(self.latest, self.optimizer, **metadata)

    def is_finite(self):
        held = map(distributed.local, trained_tensors(self.model).values())
        return not distributed.total(not all(t.isfinite().all() for t in held))

    def evaluate(self, done):
        """Every process evaluates all of `valid`; the first one's result counts."""
        loss = completion_loss(
            self.model,
            self.tokenizer,
            self.valid,
            batch_size=4 * self.settings["batch_size"],
            bf16=self.settings["bf16"],
        )["loss"]
        loss = distributed.total(loss if distributed.is_first() else 0.0)
        self.history.eval_loss.append([done, loss])
        best = self.history.best
        if math.isfinite(loss) and (best is None or loss < best[1]):
            self.history.best = [done, loss]
            if self.folder:
                self.save(self.folder / "best.safetensors", step=done, loss=loss)

    def save(self, file, optimizer=None, **metadata):
        save_checkpoint(file, self.model, optimizer, self.after_step, **metadata)


def count_tokens(batch):
    """Tokens of a batch, padding left out."""
    return int(batch.get("attention_mask", batch["input_ids"] >= 0).sum())
