"""The command `minipeft`: pretrain, finetune, generate, evaluate, merge, student,
doctor. Heavy imports stand where they are used."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import sys
from pathlib import Path

ABOUT = """Fine-tune a small language model on your own machine: the course's methods from the command line.

Start with:
  minipeft doctor                                     is everything here that is needed?
  minipeft generate "Once upon a time"                what does the base model say?
  minipeft finetune --data sql --out my-adapter       train a LoRA adapter on a task of the course (a minute)
  minipeft generate "Question: How many bakers are there?\\nSQL:" --adapter my-adapter
  minipeft evaluate --data sql --adapter my-adapter
  minipeft merge --adapter my-adapter --out my-model  write it into the weights: a plain model again"""

FINETUNE = """Train a model on data, all of it or a small adapter beside it. Adapters are saved in Hugging Face PEFT's format.

Data: a task of Lanternwick (mood, records, sql, voice, extract, newcomers), a real data set (e2e_nlg,
sentence_polarity, tinyshakespeare; fetched on first use), or your own file: my.txt, or my.jsonl with lines of
{"prompt": ..., "completion": ...} or {"text": ...}.
Ctrl-C stops and saves; the same command goes on where it stopped, to the same weights as without the stop."""

FINETUNE_EXAMPLES = """examples:
  minipeft finetune --data sql --out sql-lora
  minipeft finetune --data e2e_nlg --method lora --r 16 --targets q_proj,v_proj --lr 5e-3 --steps 1000 --out e2e
  minipeft finetune --data my.txt --steps 500 --out mine
  minipeft finetune --data my.jsonl --base path/to/a/hugging-face/folder --lr 2e-4 --out mine
  minipeft finetune --data sql --method full --out sql-full      every weight, saved as a plain model
  minipeft finetune --data sql --set use_rslora=true --set init_lora_weights='"gaussian"' --out x"""

STUDENT = """Write the student's edition of chapters: solutions and hidden tests are taken out, outputs cleared, checks and hints kept.

With --nbgrader a course folder is written: source/NAME/NAME.ipynb with solutions and points, and nbgrader_config.py.
In that folder `nbgrader generate_assignment NAME` makes what students get, `nbgrader autograde NAME` marks what they hand in."""


class UserError(ValueError):
    """Said in one line, without a traceback."""


def nearest(what, value, valid):
    close = difflib.get_close_matches(value, valid, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UserError(f"{what} {value!r}{hint}: expected one of {', '.join(valid)}")


def number(kind, least=-math.inf, above=-math.inf, most=math.inf):
    """For argparse: a finite number of that kind within these bounds, or wrong usage
    that names them."""
    bounds = {"at least": least, "above": above, "at most": most}
    said = " and ".join(
        f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)
    )
    said = f"{'a whole number' if kind is int else 'a number'} {said}".rstrip()

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (
            math.isfinite(value) and value >= least and value > above and value <= most
        ):
            raise argparse.ArgumentTypeError(f"{text!r}: expected is {said}")
        return value

    return read


COUNT, SEED = number(int, least=1), number(int, least=0, most=2**63 - 1)


def parser():
    top = argparse.ArgumentParser(
        "minipeft",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True)

    def add(name, help, description=None, epilog=None, model=True):
        sub = commands.add_parser(
            name,
            help=help,
            description=description or help,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if model:
            sub.add_argument(
                "--base",
                help=(
                    "the model: lanternwick, a folder in Hugging Face's layout, or a"
                    " hub name. Default: the one an adapter was made for, else"
                    " MINIPEFT_BASE, else lanternwick"
                ),
            )
            sub.add_argument(
                "--device", help="cpu, cuda, mps; default: a GPU if there is one"
            )
        sub.add_argument(
            "--json",
            action="store_true",
            help="the result as one JSON object, all else on stderr",
        )
        sub.add_argument(
            "--traceback",
            action="store_true",
            help="on an error, show where in the code it happened",
        )
        return sub

    commands.add_parser(
        "pretrain",
        add_help=False,
        help="make the base model from nothing (options: pretrain --help)",
    )
    tune = add(
        "finetune",
        "train an adapter, or the whole model, on data",
        FINETUNE,
        FINETUNE_EXAMPLES,
    )
    tune.add_argument(
        "--data", required=True, help="a task's name, or a .txt or .jsonl file"
    )
    tune.add_argument("--out", required=True, help="folder for the result")
    tune.add_argument(
        "--method",
        default="lora",
        help="lora, another adapter, or full (default: %(default)s)",
    )
    tune.add_argument(
        "--r",
        type=number(int),
        help="rank: in how many directions a layer may change (default: the method's)",
    )
    tune.add_argument(
        "--alpha",
        type=number(float),
        help="the change is scaled by alpha / r (default: 2 r)",
    )
    tune.add_argument(
        "--targets",
        help="layers with an adapter, as q_proj,v_proj; or all-linear (LoRA's default)",
    )
    tune.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the method's configuration, its value as JSON",
    )
    tune.add_argument(
        "--lr",
        type=number(float, above=0),
        help=(
            "peak learning rate; small models want more, adapters more than full"
            " fine-tuning (default: lanternwick 1e-2, full 3e-3; other bases 2e-4, full"
            " 2e-5)"
        ),
    )
    tune.add_argument(
        "--steps",
        type=COUNT,
        default=300,
        help="batches to train on (default: %(default)s)",
    )
    tune.add_argument(
        "--batch-size",
        type=COUNT,
        default=16,
        help="rows in a batch (default: %(default)s)",
    )
    tune.add_argument(
        "--accumulate",
        type=COUNT,
        default=1,
        help="batches a step, to save memory (default: %(default)s)",
    )
    tune.add_argument(
        "--bf16",
        action="store_true",
        help="compute in 16 bits: faster on a GPU and on newer processors",
    )
    tune.add_argument(
        "--seed",
        type=SEED,
        default=0,
        help="the same seed gives the same result (default: %(default)s)",
    )
    tune.add_argument(
        "--limit",
        type=number(int, least=0),
        default=200,
        help="test examples for the score, 0 for none (default: 200)",
    )
    tune.add_argument(
        "--restart",
        action="store_true",
        help="begin anew where --out holds an unfinished run",
    )

    text = add(
        "generate",
        "continue a prompt",
        'Continue a prompt, or what stdin says. "\\n" in it is a new line.',
    )
    text.add_argument("prompt", nargs="?")
    text.add_argument("--adapter", help="folder of an adapter")
    text.add_argument(
        "--max-new-tokens",
        type=COUNT,
        default=100,
        help="at most so many (default: %(default)s)",
    )
    text.add_argument(
        "--temperature",
        type=number(float, least=0),
        default=0.0,
        help="0: the likeliest word; 1: as the model believes",
    )
    text.add_argument("--top-k", type=COUNT, help="choose among the k likeliest only")
    text.add_argument(
        "--top-p",
        type=number(float, above=0, most=1),
        help="choose among the likeliest that together have this probability",
    )
    text.add_argument("--seed", type=SEED, help="makes sampling repeatable")

    test = add(
        "evaluate", "score a model on data: loss, perplexity, the task's own metric"
    )
    test.add_argument(
        "--data", required=True, help="a task's name, or a .txt or .jsonl file"
    )
    test.add_argument("--adapter", help="folder of an adapter")
    test.add_argument(
        "--split",
        default="test",
        choices=("train", "valid", "test"),
        help="default: %(default)s",
    )
    test.add_argument("--limit", type=COUNT, help="only the first so many examples")
    test.add_argument(
        "--show",
        type=number(int, least=0),
        default=3,
        help="examples to show (default: %(default)s)",
    )

    merge = add(
        "merge",
        "write an adapter into its base's weights: a plain model, with nothing to"
        " compute beside it",
    )
    merge.add_argument("--adapter", required=True, help="folder of the adapter")
    merge.add_argument(
        "--out",
        required=True,
        help="folder for the merged model, in Hugging Face's layout",
    )

    handout = add(
        "student",
        "chapters without their solutions, for learners or for nbgrader",
        STUDENT,
        model=False,
    )
    handout.add_argument(
        "chapters",
        nargs="*",
        metavar="chapter.ipynb",
        help="chapters, in their full edition",
    )
    handout.add_argument(
        "--all", action="store_true", help="all chapters of the course"
    )
    handout.add_argument("--out", required=True, help="folder for the result")
    handout.add_argument(
        "--nbgrader",
        action="store_true",
        help="write an nbgrader course folder (needs minipeft[teach])",
    )
    handout.add_argument(
        "--force",
        action="store_true",
        help="replace editions that are in --out already",
    )

    add(
        "doctor",
        "check packages, the base model, memory, disk and GPU, and say what to do",
        model=False,
    )
    return top


# ---- what the commands share ---------------------------------------------------------------------------------------


def device(args):
    import torch

    if not args.device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device).item()
    # unknown, or not on this machine
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {args.device}: {str(error).splitlines()[0]}"
        ) from None
    return args.device


def free_folder(out, *others):
    """`out`, if a result may be written there: it is no file, nor below one, nor the
    folder of what is read."""
    out = Path(out)
    if file := next((place for place in (out, *out.parents) if place.is_file()), None):
        raise UserError(f"--out {out}: {file} is a file; a folder is expected")
    for other in others:
        if out.exists() and Path(other).exists() and out.samefile(other):
            raise UserError(
                f"--out {out} holds what is read: it would be overwritten. Name another"
                " folder"
            )
    return out


def open_model(args):
    """(model, tokenizer, name of the base), with the adapter of --adapter if there is
    one."""
    from . import PeftConfig, PeftModel
    from .lm import load_pretrained, load_tokenizer

    adapter, base = getattr(args, "adapter", None), args.base
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"no adapter in {adapter}: it has no adapter_config.json")
    if adapter and not base:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    model, tokenizer = load_pretrained(base, device=device(args)), load_tokenizer(base)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model, tokenizer, model.name_or_path


def adapter_config(args):
    from .config import METHODS

    names = {kind.lower().replace("_", "-"): kind for kind in METHODS}
    if args.method not in names:
        nearest("--method", args.method, [*names, "full"])
    method = METHODS[names[args.method]]
    fields, options = [field.name for field in dataclasses.fields(method)], {}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: expected FIELD=VALUE")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    targets = (
        args.targets.split(",")
        if args.targets and args.targets != "all-linear"
        else args.targets
    )
    for name, value in {
        "r": args.r,
        "lora_alpha": args.alpha,
        "target_modules": targets,
    }.items():
        if value is not None and name not in fields:
            raise UserError(
                f"{args.method} has no field {name}; it has {', '.join(fields)}"
            )
        if value is not None:
            options[name] = value
    if "lora_alpha" in fields:
        rank = options.get("r", method.r)  # what is no rank, the configuration refuses
        options = {
            "lora_alpha": 2 * (rank if isinstance(rank, int) else 0),
            "target_modules": "all-linear",
        } | options
    for name in options:
        if name not in fields:
            nearest(f"--set: {args.method} has no field", name, fields)
    for field in dataclasses.fields(method):
        if (
            field.default is field.default_factory is dataclasses.MISSING
            and field.name not in options
        ):
            raise UserError(f"{args.method} needs --set {field.name}=VALUE")
    return method(**options)


def show(prompt, text, wanted):
    print(
        f"\n{prompt}\n  said   {' '.join(text.split())[:200]}\n  wanted"
        f" {' '.join(wanted.split())[:200]}"
    )


# ---- the commands --------------------------------------------------------------------------------------------------


def finetune(args):
    import torch

    from . import get_peft_model
    from .lm import evaluate, load_data, train
    from .lm.pretrained import resolve

    full, out = args.method == "full", free_folder(args.out, resolve(args.base))
    if full and (
        args.set
        or any(given is not None for given in (args.r, args.alpha, args.targets))
    ):
        raise UserError(
            "--method full trains every weight: --r, --alpha, --targets and --set are"
            " for adapters"
        )
    config = None if full else adapter_config(args)
    task = load_data(args.data)
    model, tokenizer, name = open_model(args)
    if args.lr is None:
        args.lr = (
            (3e-3 if full else 1e-2)
            if name == "lanternwick"
            else (2e-5 if full else 2e-4)
        )
    torch.manual_seed(args.seed)
    if not full:
        model = get_peft_model(model, config)
    trained, everything = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every)
        for every in (False, True)
    )
    print(
        f"{name}, {args.method}: {trained:,} of {everything:,} parameters are trained,"
        f" rate {args.lr:g}, {len(task.train):,} examples"
    )
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
        seed=args.seed,
        folder=out / "training",
        resume=not args.restart,
    )
    if history.stopped == "diverged":
        raise UserError(
            f"the loss became infinite after {history.steps} steps, and nothing is"
            " saved: try a smaller --lr, with --restart"
        )
    model.save_pretrained(out, **({"tokenizer": tokenizer} if full else {}))
    print(
        f"{history}\nsaved in {out}"
        + (": the same command goes on" if history.stopped == "interrupted" else "")
    )
    result = {
        "base": name,
        "data": args.data,
        "method": args.method,
        "trained": trained,
        "parameters": everything,
        "lr": args.lr,
        "steps": history.steps,
        "stopped": history.stopped,
        "loss": history.losses[-1],
        "seconds": round(history.seconds, 1),
        "tokens_per_second": round(history.tokens_per_second),
        "out": str(out),
    }
    if args.limit and not history.stopped:
        scores = evaluate(
            model, tokenizer, task, limit=args.limit, predictions=task.score is not None
        )
        for example, text in zip(task.test[:3], scores.pop("predictions", [])):
            show(example.prompt, text, example.completion)
        result["test"] = scores
        print("\n" + table(scores))
    return result, 130 if history.stopped else 0


def table(scores):
    return "\n".join(
        f"{name:12}{value:>10{',' if isinstance(value, int) else '.2f'}}"
        for name, value in scores.items()
    )


def generate(args):
    from .lm import generate as write

    if not args.temperature and (args.top_k or args.top_p):
        raise UserError(
            "--top-k and --top-p say what may be drawn: give a --temperature above 0"
        )
    prompt = (
        args.prompt if args.prompt is not None else sys.stdin.read().rstrip("\n")
    ).replace("\\n", "\n")
    model, tokenizer, name = open_model(args)
    pieces = [prompt]
    print(prompt, end="", flush=True)
    write(
        model,
        tokenizer,
        prompt,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        seed=args.seed,
        stream=lambda piece: (pieces.append(piece), print(piece, end="", flush=True)),
    )
    print()
    return {"base": name, "prompt": prompt, "completion": "".join(pieces[1:])}, 0


def evaluate(args):
    from .lm import evaluate as score
    from .lm import load_data

    task = load_data(args.data)
    model, tokenizer, name = open_model(args)
    scores = score(
        model,
        tokenizer,
        task,
        split=args.split,
        limit=args.limit,
        predictions=task.score is not None,
    )
    for example, text in zip(
        getattr(task, args.split)[: args.show], scores.pop("predictions", [])
    ):
        show(example.prompt, text, example.completion)
    print("\n" + table(scores))
    return {
        "base": name,
        "adapter": args.adapter,
        "data": args.data,
        "split": args.split,
        **scores,
    }, 0


def merge(args):
    from .lm.pretrained import resolve

    free_folder(args.out, args.adapter)
    model, tokenizer, name = open_model(args)
    free_folder(args.out, resolve(name))
    plain = model.merge_and_unload(safe_merge=True)
    plain.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"{args.adapter} is written into {name}: {args.out}. Use it as --base"
        f" {args.out}"
    )
    return {"base": name, "adapter": args.adapter, "out": args.out}, 0


def student(args):
    from .course.student import write_all

    free_folder(args.out)
    made = write_all(chapters(args), args.out, args.nbgrader, args.force)
    print(*made, sep="\n")
    if args.nbgrader:
        print(f"now: cd {args.out} && nbgrader generate_assignment {made[0].stem}")
    return {"made": [str(path) for path in made]}, 0


def chapters(args):
    """The notebooks that `minipeft student` is to make editions of."""
    if args.all and args.chapters:
        raise UserError(
            f"--all takes every chapter: leave out {', '.join(args.chapters)}, or --all"
        )
    if not args.all and not args.chapters:
        raise UserError("name a chapter, or say --all")
    if not args.all:
        return [Path(name) for name in args.chapters]
    home = Path(__file__).parents[1] / "chapters"
    if not (found := sorted(home.glob("*.ipynb"))):
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
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "merge": merge,
    "student": student,
    "doctor": doctor,
}


def main(argv=None):
    """Returns the exit code: 0 done; 1 something to mend, in one line on stderr; 2
    wrong usage; 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args = argparse.Namespace(traceback=True, json=False)
    try:
        if argv[:1] == ["pretrain"]:
            from .lm.pretrain import main as pretrain

            return pretrain(argv[1:]) or 0
        args = parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            result, code = COMMANDS[args.command](args)
        if args.json:
            print(json.dumps(result))
        return code
    except KeyboardInterrupt:
        print("\nminipeft: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minipeft ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"minipeft: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
