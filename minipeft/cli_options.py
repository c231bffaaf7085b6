"""The options of the command `minipeft`, and its help."""

import argparse
import importlib.metadata
import math
import re

from .io import brief, did_you_mean

ABOUT = """Fine-tune a small language model on your own machine: the course's methods
from the command line.

Start with:
  minipeft doctor                       is everything here that is needed?
  minipeft generate "The baker in Willow Court"
                                        what does the base model say?
  minipeft finetune --data sql --out sql-lora
                                        train a LoRA adapter on a task (a minute)
  minipeft generate "Question: Count the residents with a cat.\\nSQL:" \\
      --adapter sql-lora
  minipeft evaluate --data sql --adapter sql-lora
  minipeft merge --adapter sql-lora --out sql-model
                                        write it into the weights: a plain model"""

FINETUNE = """Train an adapter beside a model, or the whole model, on data. Adapters are
saved in Hugging Face PEFT's format.

Data: a task of Lanternwick (mood, records, sql, voice, extract, newcomers), a real data
set (e2e_nlg, sentence_polarity, tinyshakespeare; fetched on first use), or your own
file: my.txt, or my.jsonl or my.csv with records of
  {"prompt": ..., "completion": ...}       {"instruction": ..., "output": ...}
  {"text": ...}          {"messages": [{"role": "user", "content": ...}, ...]}
A tenth of your file is for validation and a tenth for the score at the end. The weights
with the lowest validation loss are kept. loss.csv and loss.png are saved beside them.

Ctrl-C stops and saves. The same command goes on where it stopped and comes to the same
weights as without the stop.

Several processes, one for each GPU:
  torchrun --standalone --nproc-per-node 2 -m -- minipeft finetune --data sql --out lora
(Without the -- torchrun reads --r and --log as its own.) Each process computes
--batch-size rows of a batch and holds the whole model (DDP), or with --fsdp a part of
every weight (FSDP2). The first one prints and writes to --out. Two processes with 4
rows give the weights of one with 8, up to rounding."""

FINETUNE_EXAMPLES = """examples:
  minipeft finetune --data sql --out sql-lora
  minipeft finetune --data sql --method dora --r 16 --out sql-dora
  minipeft finetune --data e2e_nlg --targets q_proj,v_proj --steps 1000 --out e2e
  minipeft finetune --data my.txt --steps 500 --out mine
  minipeft finetune --data my.jsonl --base a/folder --method qlora --out mine-4bit
  minipeft finetune --data sql --method full --out sql-full
  minipeft finetune --data sql --set lora_dropout=0.1 --log runs --out sql-dropout"""

STUDENT = """Write the students' edition of chapters: without solutions, hidden tests
and outputs, with checks and hints. nbgrader makes it: pip install 'minipeft[teach]'.

With --nbgrader a course folder is written: source/NAME/NAME.ipynb with solutions and
points, and nbgrader_config.py. In that folder `nbgrader generate_assignment NAME` makes
what students get, and `nbgrader autograde NAME` marks what they hand in.

With --otter each chapter has a folder with tests/, one for each exercise. In it `otter
generate` makes autograder.zip, for `otter run` and for Gradescope."""

DATA = "a task's name, or a .txt, .jsonl or .csv file"


def number(kind, least=-math.inf, above=-math.inf, most=math.inf):
    """For argparse: a finite number of that kind within these bounds. Anything else is
    wrong usage, in words that name the bounds."""
    bounds = {"at least": least, "above": above, "at most": most}
    words = " and ".join(
        f"{word} {bound:,}" for word, bound in bounds.items() if math.isfinite(bound)
    )
    expected = f"{'a whole number' if kind is int else 'a number'} {words}".rstrip()

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        good = abs(value) < math.inf and above < value and least <= value <= most
        if not good:
            finite = ", and finite" if math.isinf(value) else ""
            raise argparse.ArgumentTypeError(
                f"{brief(text)}: expected {expected}{finite}"
            )
        return value

    return read


COUNT = number(int, least=1, most=10**9)
SEED = number(int, least=0, most=2**63 - 1)


def some_text(text):
    if not text:
        raise argparse.ArgumentTypeError("'': expected some text")
    return text


def version():
    try:
        return importlib.metadata.version("minipeft")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


# What other programs call our options
ELSEWHERE = {
    "--r": ("--rank", "--lora-r", "--lora-rank"),
    "--alpha": ("--lora-alpha",),
    "--targets": ("--target-modules", "--lora-target"),
    "--lr": ("--learning-rate",),
    "--steps": ("--epochs", "--num-train-epochs", "--max-steps", "--iters"),
    "--accumulate": ("--gradient-accumulation-steps", "--grad-accum"),
    "--base": ("--model", "--model-name", "--model-name-or-path", "--base-model"),
    "--data": ("--train-file", "--train", "--file"),
    "--out": ("--output-dir", "--save", "--save-path", "-o"),
    "--adapter": ("--lora", "--adapter-path", "--peft", "--checkpoint"),
    "--load-in-4bit": ("--4bit", "--qlora", "--quantize", "--quantization"),
    "--max-new-tokens": ("-n", "--length", "--max-length"),
    "--num-samples": ("--n-samples", "--num-return-sequences", "--samples"),
    "--device": ("--gpu", "--cpu", "--cuda"),
}


def nearest(option, own):
    """ " (did you mean '--lr'?)" for an option that is near to one of `own`, or that
    other programs have for it; else "" """
    option = option.lower().replace("_", "-")
    for ours, theirs in ELSEWHERE.items():
        if option in theirs and ours in own:
            return f" (did you mean {ours!r}?)"
    return did_you_mean(option, own)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says which options it does not know, with the nearest of
    its own, before it asks for those that are missing."""

    needed = ()  # actions

    def parse_known_args(self, args=None, namespace=None):
        self.needed = [action for action in self._actions if action.required]
        for action in self.needed:
            action.required = False
        _, unknown = super().parse_known_args(args, argparse.Namespace())
        self.require()
        if unknown:
            own = re.findall(r"--[\w-]+", self.format_usage())
            options = [word for word in unknown if word.startswith("-")]
            near = [nearest(word.partition("=")[0], own) for word in options]
            if not options and any(each.dest == "prompt" for each in self._actions):
                near = ['. A prompt of several words stands in quotes: "like this"']
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(near)}")
        return super().parse_known_args(args, namespace)

    def require(self):
        for action in self.needed:
            action.required = True

    def error(self, message):
        self.require()  # so that the usage says so, too
        super().error(message)


def parser():
    top = Parser(
        "minipeft",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"minipeft {version()}")
    commands = top.add_subparsers(dest="command", metavar="command", required=True)
    for add in (
        add_pretrain,
        add_finetune,
        add_generate,
        add_evaluate,
        add_merge,
        add_methods,
        add_student,
        add_doctor,
    ):
        add(commands)
    top.commands = list(commands.choices)
    return top


def parse(argv):
    """The arguments; what a subcommand does not know is answered by its own usage."""
    top = parser()
    names = ", ".join(top.commands)
    if not argv:
        top.error(f"no command: expected one of {names}")
    if not argv[0].startswith("-") and argv[0] not in top.commands:
        near = did_you_mean(argv[0], [*top.commands, "--help", "--version"])
        top.error(f"no command {argv[0]!r}{near}: expected one of {names}")
    return top.parse_args(argv)


def add_command(commands, name, help, description=None, epilog=None):
    command = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON object, and all else on stderr",
    )
    command.add_argument(
        "--traceback",
        action="store_true",
        help="on an error, show where in the code it happened",
    )
    return command


def add_model_options(command, in_4bit=True):
    command.add_argument(
        "--base",
        type=some_text,
        help=(
            "the model: lanternwick, a folder in Hugging Face's layout, or a name on"
            " its hub. Default: the one an adapter was made for, else MINIPEFT_BASE,"
            " else lanternwick"
        ),
    )
    command.add_argument(
        "--device",
        type=some_text,
        help="cpu, cuda, mps; default: a GPU if there is one",
    )
    if in_4bit:
        command.add_argument(
            "--load-in-4bit",
            action="store_true",
            help="store the base's linear layers in NF4, 4 bits a weight",
        )


def add_pretrain(commands):
    pretrain = add_command(
        commands,
        "pretrain",
        "make the base model from nothing",
        "Pretrain the base model from nothing: one to three hours on a core, in"
        "\nbfloat16 where the processor has it. Ctrl-C stops it; the same command goes"
        "\non where it stopped.",
    )
    pretrain.add_argument(
        "--out",
        default="base",
        help="folder for the model, in Hugging Face's layout (default: %(default)s)",
    )
    pretrain.add_argument(
        "--steps",
        type=COUNT,
        default=16_000,
        help="steps of 2,048 tokens (default: %(default)s)",
    )
    pretrain.add_argument("--seed", type=SEED, default=7, help="default: %(default)s")
    pretrain.add_argument(
        "--lr",
        type=number(float, above=0),
        default=3e-3,
        help="peak learning rate (default: %(default)s)",
    )


def add_finetune(commands):
    tune = add_command(
        commands,
        "finetune",
        "train an adapter, or the whole model, on data",
        FINETUNE,
        FINETUNE_EXAMPLES,
    )
    add_model_options(tune)
    tune.add_argument("--data", required=True, help=DATA)
    tune.add_argument("--out", required=True, help="a new folder for the result")
    add_method_options(tune)
    add_training_options(tune)
    add_parallel_options(tune)
    add_result_options(tune)


def add_method_options(tune):
    tune.add_argument(
        "--method",
        default="lora",
        help="lora, dora, qlora, prefix-tuning, ..., or full: `minipeft methods` lists"
        " them (default: %(default)s)",
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
        type=some_text,
        help="layers with an adapter, as q_proj,v_proj; or all-linear (LoRA's default)",
    )
    tune.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the method's configuration, its value as JSON",
    )


def add_training_options(tune):
    tune.add_argument(
        "--lr",
        type=number(float, above=0),
        help="peak learning rate. Small models need more, and adapters more than full"
        " fine-tuning (default: the method's; for lora 1e-2 on lanternwick, 2e-4 on"
        " other bases)",
    )
    tune.add_argument(
        "--steps",
        type=COUNT,
        default=300,
        help="optimizer steps (default: %(default)s)",
    )
    tune.add_argument(
        "--batch-size",
        type=COUNT,
        default=16,
        help="rows in a batch, of each process (default: %(default)s)",
    )
    tune.add_argument(
        "--accumulate",
        type=number(int, least=1, most=10_000),
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


def add_parallel_options(tune):
    tune.add_argument(
        "--fsdp",
        action="store_true",
        help="with torchrun: shard every weight, the frozen base's too, over the"
        " processes (FSDP2)",
    )


def add_result_options(tune):
    tune.add_argument(
        "--evaluate-every",
        type=number(int, least=0, most=10**9),
        metavar="STEPS",
        help="how often the validation loss is computed, 0 for never (default: ten"
        " times in all)",
    )
    tune.add_argument(
        "--limit",
        type=number(int, least=0, most=10**9),
        default=200,
        help="test examples for the score, 0 for none (default: %(default)s)",
    )
    tune.add_argument(
        "--log",
        type=some_text,
        metavar="FOLDER",
        help="write losses and rates there for TensorBoard (pip install tensorboard)",
    )
    tune.add_argument(
        "--restart",
        action="store_true",
        help="start over where --out holds a run, finished or not",
    )


def add_generate(commands):
    text = add_command(
        commands,
        "generate",
        "continue a prompt",
        'Continue a prompt, or what comes from stdin. "\\n" in it is a new line.',
    )
    add_model_options(text)
    text.add_argument(
        "prompt", nargs="?", help="the text to continue; default: what stdin gives"
    )
    text.add_argument("--adapter", type=some_text, help="folder of an adapter")
    text.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message: put it into the base's chat template",
    )
    text.add_argument(
        "--max-new-tokens",
        type=number(int, least=1, most=1_000_000),
        default=100,
        help="how many tokens to write at most (default: %(default)s)",
    )
    text.add_argument(
        "--temperature",
        type=number(float, least=0),
        help="0: the likeliest token; 1: as the model believes (default: 0, or 0.8"
        " for several samples)",
    )
    text.add_argument("--top-k", type=COUNT, help="draw from the k likeliest tokens")
    text.add_argument(
        "--top-p",
        type=number(float, above=0, most=1),
        help="draw from the likeliest tokens that together have this probability",
    )
    text.add_argument("--seed", type=SEED, help="makes sampling repeatable")
    text.add_argument(
        "--num-samples",
        type=number(int, least=1, most=1000),
        default=1,
        help="how many texts to write (default: %(default)s)",
    )
    text.add_argument(
        "--stop",
        action="append",
        type=some_text,
        metavar="TEXT",
        help='end before this text ("\\n": a new line); may be given several times',
    )


def add_evaluate(commands):
    test = add_command(
        commands,
        "evaluate",
        "score a model on data: loss, perplexity, the task's own metric",
    )
    add_model_options(test)
    test.add_argument("--data", required=True, help=DATA)
    test.add_argument("--adapter", type=some_text, help="folder of an adapter")
    test.add_argument(
        "--split",
        default="test",
        choices=("train", "valid", "test"),
        help="default: %(default)s",
    )
    test.add_argument("--limit", type=COUNT, help="only the first so many examples")
    test.add_argument(
        "--show",
        type=number(int, least=0, most=10**9),
        default=3,
        help="examples to show (default: %(default)s)",
    )


def add_merge(commands):
    merge = add_command(
        commands,
        "merge",
        "write an adapter into its base's weights: a plain model, with nothing to"
        " compute beside it",
    )
    add_model_options(merge, in_4bit=False)
    merge.add_argument(
        "--adapter", type=some_text, required=True, help="folder of the adapter"
    )
    merge.add_argument(
        "--out",
        required=True,
        help="a new folder for the merged model, in Hugging Face's layout",
    )


def add_methods(commands):
    add_command(commands, "methods", "list the methods of finetune, a line each")


def add_student(commands):
    student = add_command(
        commands,
        "student",
        "chapters without their solutions, for learners or for nbgrader",
        STUDENT,
    )
    student.add_argument(
        "chapters",
        nargs="*",
        metavar="chapter.ipynb",
        help="chapters, in their full edition",
    )
    student.add_argument(
        "--all", action="store_true", help="all chapters of the repository"
    )
    student.add_argument("--out", required=True, help="folder for the result")
    graders = student.add_mutually_exclusive_group()
    graders.add_argument(
        "--nbgrader", action="store_true", help="write an nbgrader course folder"
    )
    graders.add_argument(
        "--otter",
        action="store_true",
        help="write a folder a chapter, with tests for Otter-Grader and Gradescope",
    )
    student.add_argument(
        "--force", action="store_true", help="replace editions that are there already"
    )
    student.add_argument(
        "--variant",
        type=number(int, least=0),
        default=0,
        metavar="N",
        help="the class that it is for: classes 0, 1, 2, ... get other numbers and"
        " other faults in exercises that have variants (default: 0, as in the"
        " chapters)",
    )


def add_doctor(commands):
    add_command(
        commands,
        "doctor",
        "check packages, the base model, memory, disk and GPU, and say what to do",
    )
