"""Train whatever requires a gradient: a whole model, or the few numbers of an adapter.

One loop for pretraining, full fine-tuning and every adapter. It can be stopped at any
time (Ctrl-C, a power cut) and goes on to bit-identical weights, because nothing hides:
a batch is a pure function of the step, and a checkpoint holds all else.
"""

import math
import signal
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..quant import AdamW8bit, PagedAdamW
from .checkpoint import load_checkpoint, read_facts, save_checkpoint
from .data import Batches, room
from .evaluation import completion_loss, fast_loss

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adamw8bit": AdamW8bit,
    "paged_adamw": PagedAdamW,
    "paged_adamw8bit": partial(PagedAdamW, optim_bits=8),
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
    # None: ran to the end; "interrupted": Ctrl-C; "diverged": the loss became nan or
    # infinite
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
        text = (
            f"{self.steps} steps, {self.seconds:.0f} s, {self.tokens_per_second:,.0f}"
            " tokens/s"
        )
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
    return {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[schedule]


def make_optimizer(model, optimizer, lr, betas, weight_decay):
    """By name, by factory `f(param_groups, lr=...)`, or a ready torch optimizer (say
    LoRA+), returned as it is."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if lr is None:
        raise ValueError(
            "train needs lr=..., for example 1e-3 for full fine-tuning, 1e-2 for LoRA"
            " on the shipped base"
        )
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        # biases and norms are never decayed
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if callable(optimizer):
        return optimizer(groups, lr=lr)
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer {optimizer!r}: expected {', '.join(OPTIMIZERS)}, a factory, or"
            " a torch optimizer"
        )
    extra = {} if optimizer == "sgd" else {"betas": betas}
    if (
        params[0].device.type in ("cpu", "cuda")
        and not optimizer.endswith("adamw8bit")
        and "paged" not in optimizer
    ):
        # one kernel for all tensors: an adapter has many tiny ones
        extra["fused"] = True
    return OPTIMIZERS[optimizer](groups, lr=lr, **extra)


def gradients(model, batches, bf16=False):
    """Add the gradients of the mean loss over all labels of `batches`; returns that
    loss.

    Each batch weighs by its labels. A mean of the batches' means would favour the
    tokens of short completions."""
    device, extra, loss = next(model.parameters()).device, fast_loss(model), 0.0
    labels = [(batch["labels"][:, 1:] != -100).sum().item() for batch in batches]
    for batch, count in zip(batches, labels):
        if count:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                mean = model(
                    **{name: tensor.to(device) for name, tensor in batch.items()},
                    **extra,
                ).loss
            part = mean * (count / sum(labels))
            part.backward()
            loss += part.item()
    return loss


@contextmanager
def stop_politely():
    """First Ctrl-C: finish the step, so that no weights are half-updated. Second: stop
    at once."""
    asked = threading.Event()
    # only the main thread hears signals
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_interrupt(*_):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


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
):
    """Train the parameters of `model` that require a gradient; returns a History.

    data        a Task, a list of Examples (both need tokenizer=), or any object with
    .batch(step) -> model's arguments lr          the peak rate (a ready optimizer
    brings its own, one a group) warmup      steps of rising rate, or a fraction of all
    steps if below 1 optimizer   "adamw", "adamw8bit" (states in 8 bits), "paged_adamw"
    (states in pages, on a GPU), "adam", "sgd", or yours accumulate  batches of
    `batch_size` rows a step; the gradient is that of one large batch valid
    examples for evaluate_every (a Task brings its own). The best weights stay in
    folder/best.safetensors:
                checkpoint.load_checkpoint(file, model) puts them back
    folder      for checkpoints: latest.safetensors every `save_every` steps (default:
    as evaluate_every, else ten times),
                at the end and on Ctrl-C. The same call again goes on there;
                  resume=False starts anew
    log         called as log(step, {"loss", "lr", "grad_norm"}) after each step, the
    gradients still in place
    """
    if schedule not in ("cosine", "constant", "linear"):
        raise ValueError(f"schedule {schedule!r}: expected cosine, constant or linear")
    if steps < 1 or accumulate < 1:
        raise ValueError(
            f"steps and accumulate must be at least 1, not {steps} and {accumulate}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing to train: no parameter of the model requires a gradient"
        )
    valid = getattr(data, "valid", None) if valid is None else valid
    if evaluate_every and not valid:
        raise ValueError("evaluate_every needs valid=, a list of examples")
    if not hasattr(data, "batch"):
        if tokenizer is None:
            raise ValueError("train needs tokenizer= to make batches of examples")
        data = Batches(
            getattr(data, "train", data),
            tokenizer,
            batch_size,
            seed=seed,
            max_length=room(model),
        )
    warmup = round(warmup * steps) if warmup < 1 else int(warmup)
    save_every = save_every or evaluate_every or max(1, steps // 10)
    latest, best = (
        folder and Path(folder) / f"{name}.safetensors" for name in ("latest", "best")
    )
    optimizer = make_optimizer(model, optimizer, lr, betas, weight_decay)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [
        group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups
    ]
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "rates": rates,
        "warmup": warmup,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "clip": clip,
        "accumulate": accumulate,
        "bf16": bf16,
        "seed": seed,
        "optimizer": type(optimizer).__name__,
        "first_batch": zlib.crc32(data.batch(0)["input_ids"].cpu().numpy().tobytes()),
    }
    history, was_training, device = (
        History(),
        model.training,
        next(model.parameters()).device,
    )
    devices = [device] if device.type == "cuda" else []
    # the caller's random numbers stay as they were
    with torch.random.fork_rng(devices), stop_politely() as asked:
        torch.manual_seed(seed)
        if latest and latest.exists() and resume:
            saved = read_facts(latest)["settings"]
            if other := [
                f"{name} {saved.get(name)} (now {value})"
                for name, value in settings.items()
                if saved.get(name) != value
            ]:
                raise ValueError(
                    f"{latest} was made with other settings: {', '.join(other)}. "
                    "Repeat them to go on, or pass resume=False, or another folder"
                )
            history = History(**load_checkpoint(latest, model, optimizer)["history"])
            history.stopped = None
        bar = tqdm(
            total=steps,
            initial=history.steps,
            disable=not progress,
            unit="step",
            mininterval=0.5,
        )
        try:
            model.train()
            for step in range(history.steps, steps):
                started, done = time.perf_counter(), step + 1
                for group, peak in zip(optimizer.param_groups, rates):
                    group["lr"] = peak * lr_factor(step, steps, warmup, schedule)
                batches = [data.batch(step * accumulate + i) for i in range(accumulate)]
                optimizer.zero_grad(set_to_none=True)
                loss = gradients(model, batches, bf16)
                if not math.isfinite(loss):
                    # before the step: the weights are still the last good ones
                    history.stopped = "diverged"
                    break
                norm = torch.nn.utils.clip_grad_norm_(params, clip or math.inf).item()
                optimizer.step()
                history.losses.append(loss)
                history.lr.append(optimizer.param_groups[0]["lr"])
                history.grad_norm.append(norm)
                history.tokens += sum(
                    int(batch.get("attention_mask", batch["input_ids"] >= 0).sum())
                    for batch in batches
                )
                history.seconds += time.perf_counter() - started
                bar.set_postfix_str(
                    f"loss {history.recent:.3f}, {history.tokens_per_second:,.0f}"
                    " tokens/s",
                    refresh=False,
                )
                bar.update()
                if log:
                    log(step, {"loss": loss, "lr": history.lr[-1], "grad_norm": norm})
                if evaluate_every and (done % evaluate_every == 0 or done == steps):
                    now = completion_loss(
                        model, tokenizer, valid, batch_size=4 * batch_size, bf16=bf16
                    )["loss"]
                    history.eval_loss.append([done, now])
                    if history.best is None or now < history.best[1]:
                        history.best = [done, now]
                        if best:
                            save_checkpoint(best, model, step=done, loss=now)
                if asked.is_set() and done < steps:
                    history.stopped = "interrupted"
                if latest and (
                    done % save_every == 0 or done == steps or history.stopped
                ):
                    save_checkpoint(
                        latest,
                        model,
                        optimizer,
                        settings=settings,
                        history=asdict(history),
                    )
                if history.stopped:
                    break
        finally:
            bar.close()
            model.train(was_training)
            optimizer.zero_grad(set_to_none=True)
    return history
