"""The command `minipeft`: its subcommands. Options and help are in cli_options.py.

What would fail at the end of a training is looked at before its beginning. Heavy
imports stand where they are used.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

from . import cli_options
from .errors import ConfigError, FileError
from .interrupts import restore
from .io import (
    all_or_nothing,
    check_file,
    did_you_mean,
    locked,
    make_folder,
    open_safetensors,
    read_json,
    read_text,
    remove_parts,
    replacing,
    write_text,
)
from .model_card import CARD, is_ours

CONFIG = "adapter_config.json"
ADAPTER_FILES = (CONFIG, "adapter_model.safetensors")
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CURVES = ("loss.csv", "loss.png")
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "valid_loss")  # of loss.csv
CHECKPOINTS = ("latest.safetensors", "best.safetensors")
SMALL = 10_000_000  # parameters: up to here one thread is the fastest
VALIDATION_EXAMPLES = 100  # a look at more costs more than it tells
LORA_PLUS_RATIO = 4


class UserError(ValueError):
    """What a person can mend: printed as one sentence, without a traceback."""


# ---- folders for results -------------------------------------------------------------


def free_folder(out, *inputs):
    """`out` as a Path. UserError if it is empty, a file or below one, or the folder of
    an input."""
    if not out.strip():
        raise UserError("--out is empty: name a folder")
    out = Path(out)
    if file := next((place for place in (out, *out.parents) if place.is_file()), None):
        raise UserError(f"--out {out}: {file} is a file; expected a folder")
    for folder in inputs:
        if out.exists() and Path(folder).exists() and out.samefile(folder):
            raise UserError(
                f"--out {out} holds what is read: it would be overwritten. Name another"
                " folder"
            )
    return out


def visible(folder):
    """Names in a folder, which may be absent; hidden ones do not count."""
    if not folder.exists():
        return []
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def new_folder(out, *inputs):
    """free_folder, and nothing is in it."""
    out = free_folder(out, *inputs)
    if names := visible(out):
        raise UserError(
            f"--out {out} is not empty, it holds {', '.join(names[:3])}"
            f"{' ...' if len(names) > 3 else ''}: name a new folder"
        )
    return out


def run_folder(out, full, restart, *inputs):
    """The folder of a finetune run: new, or of an earlier run that goes on or is
    replaced. What others put there is never touched."""
    out = free_folder(out, *inputs)
    unfinished = holds_run(out, "training")
    if not unfinished and not is_loss_table(out / "loss.csv"):
        return new_folder(str(out))
    own = (*MODEL_FILES, *TOKENIZER_FILES) if full else (*ADAPTER_FILES, CARD)
    check_places(out, *own, *CURVES)
    other = ADAPTER_FILES if full else MODEL_FILES
    if found := [name for name in other if (out / name).exists()]:
        what = "an adapter" if full else "a whole model"
        raise UserError(
            f"--out {out} holds {what} ({', '.join(found)}), which would lie beside the"
            " result: name another folder"
        )
    if not unfinished and not restart:
        raise UserError(
            f"--out {out} holds a finished run: name another folder, or --restart to"
            " replace it"
        )
    return out


def base_folder(out):
    """The folder of a pretraining: new, or of an earlier one that goes on or is
    finished."""
    out = free_folder(out)
    if not holds_run(out, "run") and not is_record(out / "history.json"):
        new_folder(str(out))
    check_places(out, *MODEL_FILES, *TOKENIZER_FILES, "history.json")
    return out


def holds_run(out, name):
    """Are the checkpoints of an unfinished run in out/name? One that was killed before
    the first left its lock, and nothing beside it."""
    folder = out / name
    latest = folder / CHECKPOINTS[0]
    if latest.exists():
        try:
            with open_safetensors(latest) as file:
                return "minipeft" in (file.metadata() or {})
        except FileError:  # whoever goes on from it says what is wrong
            return True
    locked_once = (folder / ".lock").is_file() and visible(out) == [name]
    return locked_once and set(visible(folder)) <= set(CHECKPOINTS)


def remove_run(folder):
    """Remove the checkpoints in a run's folder, and the folder if that was all."""
    for name in CHECKPOINTS:
        remove_parts(folder / name)
    with contextlib.suppress(OSError):  # a folder in a file's place is not ours
        for name in (*CHECKPOINTS, ".lock"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def is_loss_table(path):
    """Was it written by write_curves? Others have a loss.csv, too."""
    first = f"{','.join(COLUMNS)}\n".encode()
    return path.is_file() and path.read_bytes().startswith(first)


def is_record(path):
    """Is it a pretraining's history.json?"""
    try:
        command = read_json(path).get("command")
    except FileError:
        return False
    return str(command).startswith("minipeft pretrain ")


@contextlib.contextmanager
def claimed(out):
    """Within the block no other command writes into `out`, which is made if absent, and
    removed if it is empty at the end. Look again there what it holds: another command
    may have ended in between."""
    try:
        with locked(out, UserError):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows keeps an open file
                    (out / ".lock").unlink()
    finally:
        with contextlib.suppress(OSError):
            out.rmdir()


@contextlib.contextmanager
def claimed_run(args, out, full):
    """Claimed by the first process, which looks again there."""
    from .lm.distributed import is_first

    if not is_first():
        yield
        return
    with claimed(out):
        run_folder(args.out, full, args.restart)
        yield


def check_places(out, *names):
    """UserError where a file of the result could not be put: a folder is there."""
    for name in names:
        if (out / name).exists():
            check_file(out / name, UserError)


def is_users_card(place):
    """A model card that the user has written is not replaced."""
    return place.name == CARD and place.exists() and not is_ours(place)


# ---- models --------------------------------------------------------------------------


def device(args):
    import torch

    from .lm.distributed import own_gpu, processes

    if not args.device:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and processes() > 1:
        args.device = own_gpu()
    try:
        torch.empty(1, device=args.device).item()
    # unknown, or not on this machine
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = devices()
        reason = f"no such device here; expected {' or '.join(here)}"
        if args.device.partition(":")[0] in here:
            reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device}: {reason}") from None
    return args.device


def devices():
    """The devices of this machine that its build of torch can use."""
    import torch

    gpus = {"cuda": torch.cuda, "mps": torch.backends.mps}
    return ["cpu", *(name for name, gpu in gpus.items() if gpu.is_available())]


def base_of(args):
    """The base's name: --base, or the one that --adapter was made for, or None."""
    from . import PeftConfig
    from .lm.data import beside

    adapter = getattr(args, "adapter", None)
    if adapter and not (Path(adapter) / CONFIG).is_file():
        what = f"it has no {CONFIG}"
        if not Path(adapter).is_dir():
            folders = beside(Path(adapter), lambda at: (at / CONFIG).is_file())
            near = did_you_mean(adapter, folders)
            what = f"there is no such folder{near}"
        raise UserError(f"no adapter in {adapter}: {what}")
    check_base(args.base, "say --adapter")
    if adapter and not args.base:
        return PeftConfig.from_pretrained(adapter).base_model_name_or_path
    return args.base


def check_base(base, instead):
    """UserError if --base is an adapter's folder, which is no model."""
    if base and (Path(base) / CONFIG).is_file() and not is_model(Path(base)):
        raise UserError(f"--base {base} holds an adapter, and no model: {instead}")


def is_model(folder):
    return any((folder / name).exists() for name in MODEL_FILES)


def open_model(args, base):
    """The base, with the adapter of --adapter if there is one.

    A small one computes in one thread. Several wait for each other at each of its many
    short steps, and for the whole machine where other programs keep it busy."""
    import torch

    from . import PeftModel
    from .lm import load_pretrained

    quantization = "nf4" if getattr(args, "load_in_4bit", False) else None
    model = load_pretrained(base, device=device(args), quantization=quantization)
    if sum(p.numel() for p in model.parameters()) <= SMALL:
        torch.set_num_threads(1)
    if getattr(args, "adapter", None):
        model = PeftModel.from_pretrained(model, args.adapter)
    return model


# ---- finetune ------------------------------------------------------------------------


def finetune(args):
    from .cli_methods import find_method
    from .lm import distributed, load_data, load_tokenizer
    from .lm.pretrained import resolve

    name, method = find_method(args.method)
    if args.fsdp:
        check_fsdp(method, distributed.processes())
    if method is None:
        refuse_adapter_options(args)
    check_base(args.base, "take its base, or make a model of both: minipeft merge")
    config = None if method is None else configuration(args, name, method)
    args.load_in_4bit |= method is not None and method.in_4bit
    out = run_folder(args.out, method is None, args.restart, resolve(args.base))
    tokenizer = load_tokenizer(args.base)
    task = load_data(args.data, tokenizer)
    model = open_model(args, args.base)
    base = model.name_or_path
    args.lr = args.lr or default_rate(base, method)
    model = with_adapter(model, config, args.seed)
    check_disk(out, disk_of_run(model), "the run")
    writer = summary_writer(args.log) if distributed.is_first() else None
    trained, everything = parameter_counts(model)
    print(
        f"{base}, {name}: {trained:,} of {everything:,} parameters are trained, rate"
        f" {args.lr:g}, {len(task.train):,} examples{several(args)}"
    )
    budget = rank_allocator(model, method)
    with tempfile.TemporaryDirectory() as folder:
        options = saving_options(model, config, tokenizer, folder)
        if args.fsdp:
            distributed.shard(model)
        distributed.wait()  # all have looked at --out before anything is written there
        with claimed_run(args, out, method is None):
            history = run_training(
                args, model, tokenizer, task, out, method, writer, budget
            )
            kept = save_run(args, model, out, history, options, budget)
    result = {
        "base": base,
        "data": args.data,
        "method": name,
        "trained": trained,
        "parameters": everything,
        "lr": args.lr,
        "steps": history.steps,
        "stopped": history.stopped,
        "loss": history.losses[-1],
        "valid_loss": history.best and history.best[1],
        "kept_step": kept,
        "seconds": round(history.seconds, 1),
        "tokens_per_second": round(history.tokens_per_second),
        "out": str(out),
    }
    if args.limit and not history.stopped:
        result["test"] = test_scores(args, model, tokenizer, task)
    return result, 130 if history.stopped else 0


def with_adapter(model, config, seed):
    """The model, with a new adapter unless config is None."""
    import torch

    from . import get_peft_model

    torch.manual_seed(seed)
    if config is None:
        return model
    check_memory(model, config)
    return get_peft_model(model, config)


def check_fsdp(method, processes):
    if processes == 1:
        raise UserError(
            "--fsdp shards the model over several processes: start them with torchrun"
            " --standalone --nproc-per-node 2 -m -- minipeft finetune ..."
        )
    if method is not None and method.kind == "ADALORA":
        raise UserError(
            "--fsdp: adalora's penalty and its budget look at all layers' matrices at"
            " once, and each process has a part of them. Leave --fsdp out (DDP), or"
            " take --method lora"
        )


def several(args):
    """How many processes train, where it is more than one."""
    from .lm.distributed import processes

    if processes() == 1:
        return ""
    engine = "FSDP2" if args.fsdp else "DDP"
    rows = processes() * args.batch_size
    return f", {processes()} processes ({engine}), {rows} rows a batch"


def refuse_adapter_options(args):
    given = any(option is not None for option in (args.r, args.alpha, args.targets))
    if given or args.set or args.load_in_4bit:
        raise UserError(
            "--method full trains every weight: --r, --alpha, --targets, --set and"
            " --load-in-4bit are for adapters"
        )


def configuration(args, name, method):
    from .cli_methods import make_config, parse_fields

    targets = args.targets
    if targets and targets != "all-linear":
        targets = targets.split(",")
    options = {"r": args.r, "lora_alpha": args.alpha, "target_modules": targets}
    return make_config(name, method, args.steps, options, parse_fields(args.set))


def default_rate(base, method):
    """The method's rate on the shipped base; larger models need far less."""
    if base == "lanternwick":
        return 3e-3 if method is None else method.lr
    return 2e-5 if method is None else method.lr / 50


def check_memory(model, config):
    """ConfigError if a rank needs more memory than the machine has: weights, gradients
    and two moments, 4 bytes each."""
    from .doctor import memory
    from .weights import is_linear

    # AdaLoRA begins with more ranks than it keeps
    name = "init_r" if hasattr(config, "init_r") else "r"
    rank = getattr(config, name, None)
    found = memory()
    if config.peft_type == "LOKR" or not isinstance(rank, int) or found is None:
        return
    paths = config.resolve(model).select(model)
    layers = [model.get_submodule(path) for path in paths]
    layers = [layer for layer in layers if is_linear(layer)]
    width = sum(layer.in_features + layer.out_features for layer in layers)
    if 16 * rank * width > found[1]:
        most = max(1, found[1] // (16 * width))
        raise ConfigError(
            f"{name} = {rank:,} needs {16 * rank * width // 10**9:,} GB of memory, and"
            f" this machine has {found[1] / 1e9:.0f} GB: it can be at most {most:,},"
            " and more than a layer's smaller side adds nothing"
        )


def check_disk(out, needed, what):
    """UserError unless `needed` bytes are free for `out`."""
    from .doctor import free_space

    free = free_space(out)
    if needed > free:
        raise UserError(
            f"--out {out}: {what} needs {needed / 1e6:,.0f} MB of disk, and"
            f" {free / 1e6:,.0f} MB are free"
        )


def disk_of_run(model):
    """Bytes of result and checkpoints: the weights four times, with two moments and a
    copy that is being written."""
    trained, _ = parameter_counts(model)
    return 4 * trained * 8 + 1_000_000


def parameter_counts(model):
    """(trained, all)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def rank_allocator(model, method):
    """What takes ranks away while an AdaLoRA trains; None for other methods."""
    from .methods.rank_allocator import RankAllocator

    return RankAllocator(model) if method and method.kind == "ADALORA" else None


def run_training(args, model, tokenizer, task, out, method, writer, budget):
    import torch

    from .doctor import slow_in_bf16
    from .lm import train
    from .lm.distributed import is_first
    from .optim import create_loraplus_optimizer

    if args.bf16 and args.device == "cpu" and slow_in_bf16():
        note = "--bf16 is many times slower than 32 bits on this processor"
        print(f"minipeft: {note}", file=sys.stderr)
    optimizer = "adamw"
    if method is not None and method.fast_b:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=args.lr, loraplus_lr_ratio=LORA_PLUS_RATIO
        )
    every = args.evaluate_every
    if every is None:
        every = max(1, args.steps // 10)
    if args.restart and is_first():
        remove_run(out / "training")
    try:
        history = train(
            model,
            task,
            tokenizer=tokenizer,
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            warmup=min(20, args.steps // 10),
            accumulate=args.accumulate,
            bf16=args.bf16,
            optimizer=optimizer,
            evaluate_every=every or None,
            valid=task.valid[:VALIDATION_EXAMPLES],
            seed=args.seed,
            folder=out / "training",
            resume=not args.restart,
            log=writer and (lambda step, values: log_step(writer, step, values)),
            after_step=budget,
        )
    finally:
        if is_first() and not (out / "training" / "latest.safetensors").exists():
            remove_run(out / "training")  # nothing is there to go on from
    if history.stopped == "diverged":
        raise UserError(
            f"the loss became infinite after step {history.steps}, and nothing is"
            " saved: try a smaller --lr, with --restart"
        )
    for step, loss in history.eval_loss if writer else []:
        writer.add_scalar("valid_loss", loss, step)
    return history


def summary_writer(folder):
    """TensorBoard's writer for --log, or None."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--log needs TensorBoard: pip install tensorboard") from None
    make_folder(folder, UserError)
    return SummaryWriter(folder)


def log_step(writer, step, values):
    for name, value in values.items():
        writer.add_scalar(name, value, step + 1)


def saving_options(model, config, tokenizer, folder):
    """The arguments of save_pretrained. PiSSA and OLoRA change the base: `folder` keeps
    how the adapter began, so that it is saved as a LoRA for the base as it was."""
    from .methods.lora_init import changes_base

    if config is None:
        return {"tokenizer": tokenizer}
    if not changes_base(config):
        return {}
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder)
    return {"path_initial_model_for_weight_conversion": folder}


def save_run(args, model, out, history, options, budget):
    """Save the best weights and the curves; returns the step they are of."""
    from .lm.checkpoint import load_checkpoint
    from .lm.distributed import is_first, wait

    kept = history.steps
    best = out / "training" / "best.safetensors"
    if history.best and not history.stopped and best.exists():
        load_checkpoint(best, model, after_step=budget)
        kept = history.best[0]
    wait()  # all have read what the first process removes below
    if not is_first():
        model.save_pretrained(out, **options)  # gathers its parts, and writes nothing
        return kept
    with all_or_nothing(out, is_users_card) as part:
        model.save_pretrained(part, **options)
        if "tokenizer" in options:  # a whole model
            copy_generation_config(args.base, part)
        title = f"{args.method} on {Path(args.data).name}"
        write_curves(part, history, title)
    print(f"{history}\nsaved in {out}", end="")
    if history.stopped == "interrupted":
        print(": the same command goes on")
        return kept
    remove_run(out / "training")
    if kept == history.steps:
        print()
    else:
        print(f": the weights of step {kept}, whose validation loss is the lowest")
    return kept


def copy_generation_config(base, folder):
    """What transformers' generate reads: a model that is made of `base` ends its texts
    as that does."""
    from .lm.pretrained import GENERATION, resolve

    file = resolve(base) / GENERATION
    if file.is_file():
        write_text(folder / GENERATION, read_text(file))


def write_curves(folder, history, title):
    """loss.csv, and loss.png where matplotlib is installed."""
    valid = {step: loss for step, loss in history.eval_loss}
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(COLUMNS)
    for i, loss in enumerate(history.losses):
        rest = [history.lr[i], history.grad_norm[i], valid.get(i + 1, "")]
        table.writerow([i + 1, loss, *rest])
    write_text(folder / "loss.csv", rows.getvalue())
    try:
        from .course import figures
    except ImportError as error:
        print(f"no loss.png: {error}")
        return
    runs = {"training": history.losses}
    if valid:
        runs["validation"] = (list(valid), list(valid.values()))
    smooth = max(1, len(history.losses) // 30)
    with replacing(folder / "loss.png") as part:
        figures.curves(
            runs, title, "step", "loss (nats a token)", smooth=smooth, save=part
        )


def test_scores(args, model, tokenizer, task):
    from .lm import evaluate

    scored = task.score is not None
    scores = evaluate(model, tokenizer, task, limit=args.limit, predictions=scored)
    for example, text in zip(task.test[:3], scores.pop("predictions", [])):
        show(example.prompt, text, example.completion)
    print(f"\n{table(scores)}")
    return scores


def show(prompt, text, expected):
    print(f"\n{prompt}")
    print(f"  generated {' '.join(text.split())[:200]}")
    print(f"  expected  {' '.join(expected.split())[:200]}")


def table(scores):
    lines = []
    for name, value in scores.items():
        form = "," if isinstance(value, int) else ".2f"
        lines.append(f"{name:12}{value:>10{form}}")
    return "\n".join(lines)


# ---- the other commands --------------------------------------------------------------


def pretrain(args):
    from .doctor import slow_in_bf16
    from .lm.pretrain import pretrain as run

    out = base_folder(args.out)
    bf16 = not slow_in_bf16()
    with claimed(out):
        base_folder(args.out)
        _, _, history = run(out, args.steps, args.seed, args.lr, bf16=bf16)
    print(history)
    result = {"out": str(out), "steps": history.steps, "stopped": history.stopped}
    return result, 130 if history.stopped == "interrupted" else 0


def generate(args):
    from .lm import generate as write
    from .lm import load_tokenizer

    temperature = args.temperature
    if temperature is None:
        temperature = 0.8 if args.num_samples > 1 else 0.0
    if not temperature and (args.top_k or args.top_p or args.num_samples > 1):
        raise UserError(
            "--top-k, --top-p and --num-samples need chance: give a --temperature"
            " above 0"
        )
    prompt = read_prompt(args)
    base = base_of(args)
    tokenizer = load_tokenizer(base)
    prompt, shown = prepare_prompt(args, prompt, tokenizer)
    model = open_model(args, base)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop": args.stop and [text.replace("\\n", "\n") for text in args.stop],
        "seed": args.seed,
    }
    result = {"base": model.name_or_path, "prompt": prompt}
    if args.num_samples > 1:
        prompts = [prompt] * args.num_samples
        texts = write(model, tokenizer, prompts, **options)
        for number, text in enumerate(texts, 1):
            print(f"--- {number}\n{shown}{text}")
        return result | {"completions": texts}, 0
    print(shown, end="", flush=True)
    text = write(model, tokenizer, prompt, stream=print_piece, **options)
    print()
    return result | {"completion": text}, 0


def print_piece(piece):
    print(piece, end="", flush=True)


def read_prompt(args):
    """The prompt as text, from the command line or stdin."""
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            end = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
            print(f"Type the prompt; end it with {end}.", file=sys.stderr)
        try:
            prompt = sys.stdin.read().rstrip("\n")
        except UnicodeDecodeError:
            raise UserError("what comes from stdin is not UTF-8 text") from None
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None
    return prompt.replace("\\n", "\n")


def prepare_prompt(args, prompt, tokenizer):
    """(the prompt as training treats it, the part to print)"""
    from .lm.chat import prompt_text
    from .lm.user_data import trim

    if args.chat:
        message = {"role": "user", "content": prompt}
        return prompt_text([message], tokenizer), ""
    prompt = trim(prompt)
    return prompt, prompt


def evaluate(args):
    from .lm import evaluate as score
    from .lm import load_data, load_tokenizer

    base = base_of(args)
    tokenizer = load_tokenizer(base)
    task = load_data(args.data, tokenizer)
    model = open_model(args, base)
    scores = score(
        model,
        tokenizer,
        task,
        split=args.split,
        limit=args.limit,
        predictions=task.score is not None,
    )
    examples = getattr(task, args.split)[: args.show]
    for example, text in zip(examples, scores.pop("predictions", [])):
        show(example.prompt, text, example.completion)
    print(f"\n{table(scores)}")
    result = {
        "base": model.name_or_path,
        "adapter": args.adapter,
        "data": args.data,
        "split": args.split,
    }
    return result | scores, 0


def merge(args):
    from .lm import load_tokenizer
    from .lm.pretrained import resolve

    base = base_of(args)
    out = new_folder(args.out, args.adapter, resolve(base))
    tokenizer = load_tokenizer(base)
    model = open_model(args, base)
    name = model.name_or_path
    plain = model.merge_and_unload(safe_merge=True)
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    check_disk(out, size + 1_000_000, "the model")
    with claimed(out):
        new_folder(args.out)
        with all_or_nothing(out) as part:
            plain.save_pretrained(part, tokenizer=tokenizer)
            copy_generation_config(base, part)
    print(f"{args.adapter} is merged into {name}. Use it as --base {out}")
    return {"base": name, "adapter": args.adapter, "out": str(out)}, 0


def methods(args):
    from .cli_methods import FULL, KNOWN

    lines = {name: method.about for name, method in KNOWN.items()} | {"full": FULL}
    for name, about in lines.items():
        print(f"{name:14} {about}")
    return {"methods": lines}, 0


def student(args):
    free_folder(args.out)
    paths = chapters(args)
    try:
        from .course.student import write_all
    except ImportError:
        raise UserError(
            "students' editions need nbgrader and what the chapters need: pip install"
            " 'minipeft[teach]'"
        ) from None
    grader = "nbgrader" if args.nbgrader else "otter" if args.otter else None
    made = write_all(paths, args.out, grader, args.force, args.variant)
    print(*made, sep="\n")
    if grader == "nbgrader":
        print(f"now: cd {args.out} && nbgrader generate_assignment {made[0].stem}")
    if grader == "otter":
        print(f"now: cd {made[0].parent} && otter generate")
    return {"made": [str(path) for path in made]}, 0


def chapters(args):
    """The notebooks that `minipeft student` is to make editions of."""
    if args.all and args.chapters:
        raise UserError(
            f"--all takes every chapter: leave out {', '.join(args.chapters)}, or --all"
        )
    if not args.all and not args.chapters:
        raise UserError("name a chapter, or say --all")
    home = Path(__file__).parents[1] / "chapters"
    found = sorted(home.glob("[0-9][0-9]_*.ipynb"))
    if not args.all:
        for path in map(Path, args.chapters):
            if not path.is_file():
                others = sorted(path.parent.glob("*.ipynb")) or found
                near = did_you_mean(path.name, [other.name for other in others])
                there = f"; {others[0].parent.resolve()} has others" if others else ""
                raise UserError(f"{path}: no such notebook{near}{there}")
        return [Path(name) for name in args.chapters]
    if not found:
        raise UserError(
            "--all: the chapters are in minipeft's repository, not in the installed"
            " package. Get the repository, or name the notebooks"
        )
    return found


def doctor(args):
    from .doctor import checks

    found = []
    for good, what, advice in checks():
        print(f"{'ok ' if good else '-> '} {what}{'' if good else f'. {advice}'}")
        found.append({"ok": good, "what": what, "advice": None if good else advice})
    return {"checks": found}, 0 if all(check["ok"] for check in found) else 1


COMMANDS = {
    "pretrain": pretrain,
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "merge": merge,
    "methods": methods,
    "student": student,
    "doctor": doctor,
}

# ---- errors --------------------------------------------------------------------------

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
)
NO_MEMORY = (
    "out of memory",
    "can't allocate",
    "not enough memory",
    "Storage size calculation overflowed",
)


def sentence(error):
    """What a person reads of an error that a person can cause; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        # of two files, copied or renamed, the second is the one that is written
        return f"{error.filename2 or error.filename}: {error.strerror}"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply"
    memory = isinstance(error, RuntimeError) and any(w in text for w in NO_MEMORY)
    if memory or isinstance(error, MemoryError):
        return "not enough memory: a smaller --batch-size, --r or base needs less"
    if isinstance(error, RuntimeError) and any(w in text for w in LOST):
        return "another process of the run has ended, and this one with it"
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    if isinstance(error, OverflowError):
        return f"a number is too large: {text}"
    if type(error).__name__ == "SafetensorError":
        return text
    return None


def main(argv=None):
    """Returns the exit code: 0 done; 1 something to mend, in one sentence on stderr; 2
    wrong usage; 130 Ctrl-C."""
    args = argparse.Namespace(traceback=True, json=False)
    several = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun has started this process
    try:
        restore()
        lossy(sys.stdout)
        with together() if several else contextlib.nullcontext():
            args = cli_options.parse(sys.argv[1:] if argv is None else argv)
            if several and args.command != "finetune":
                raise UserError(
                    f"torchrun is for finetune: start {args.command} as `minipeft"
                    f" {args.command} ...`"
                )
            return run(args)
    except KeyboardInterrupt:
        if not several or may_report():
            print("\nminipeft: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minipeft ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if several and not may_report():
            return 1  # another process has said what is wrong
        if args.traceback or (text := sentence(error)) is None:
            raise
        from .cli_methods import in_options

        print(f"minipeft: {in_options(text, error, args)}", file=sys.stderr)
        return 1


def lossy(stream):
    """Characters that the terminal's encoding lacks are written as \\u2026 is here."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def run(args):
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        result, code = COMMANDS[args.command](args)
    if args.json:
        # JSON has no NaN and no infinity: null
        text = json.dumps(result)
        print(json.dumps(json.loads(text, parse_constant=lambda name: None)))
    return code


def together():
    """The processes of torchrun as a group."""
    from .lm.distributed import process_group

    return process_group()


def may_report():
    from .lm import distributed

    return distributed.may_report()


if __name__ == "__main__":
    sys.exit(main())
