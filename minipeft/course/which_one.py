"""Which method should I use? Questions in their order, and the cells of chapter 16 that
the answers follow from.

    decide(Project(aim="teach", memory="4-bit base"))  ->  Answer
    write_page()                                       ->  chapters/which_one.md

Page and function read the same list of rules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..io import check_choice, write_text

AIMS = ("amplify", "teach", "facts")
MEMORIES = ("full", "adapter", "4-bit base")
NOTEBOOK = "16_bake_off.ipynb"


@dataclass(frozen=True, kw_only=True)
class Project:
    """What is known before anything is trained. Raises ValueError.

    aim            "amplify" what the base nearly does, "teach" what it does not do, or
                   "facts" that it never saw
    prompt_enough  the base with a few examples in its prompt already scores well enough
    memory         what fits while training: "full" fine-tuning; an "adapter" on the
                   base as it is; or only an adapter on a "4-bit base"
    tasks          how many tasks the one base serves
    examples       how many training examples a task has
    zero_latency   an answer must take no longer than the base's
    keep_base      what the base knew must still be there afterwards
    """

    aim: str = "teach"
    prompt_enough: bool = False
    memory: str = "adapter"
    tasks: int = 1
    examples: int = 2000
    zero_latency: bool = False
    keep_base: bool = False

    def __post_init__(self):
        check_choice("aim", self.aim, AIMS)
        check_choice("memory", self.memory, MEMORIES)


@dataclass(frozen=True)
class Answer:
    method: str
    why: str
    cell: str  # the heading in chapter 16 above the cell that it follows from

    def __str__(self):
        return f"{self.method}. {self.why} (chapter 16, {self.cell})"


@dataclass(frozen=True)
class Rule:
    question: str
    applies: Callable[[Project], bool]
    answer: Answer


RULES = [
    Rule(
        "Does the base already score well enough with a few examples in its prompt?",
        lambda p: p.prompt_enough,
        Answer(
            "none: prompt it",
            "Measure this first, it costs seconds. What follows is for a base that"
            " does not.",
            "5.2 Without any training",
        ),
    ),
    Rule(
        "Is it about facts that the base never saw, rather than about how to answer?",
        lambda p: p.aim == "facts",
        Answer(
            "none: retrieve it",
            "Put the passages that fit the question into the prompt. A new fact is then"
            " a new passage, and nothing that the base knew is lost. An adapter that is"
            " trained long enough recalls more here: LoRA of rank 4 had 71 % after"
            " 1,000 steps, three passages about 44 %. It costs a training for each"
            " change, and nine in ten of the old facts (switch it off, and you have"
            " these, and not the new ones).",
            "5.8 New facts: train them, or look them up",
        ),
    ),
    Rule(
        "Does training not fit with the base in 16 bits?",
        lambda p: p.memory == "4-bit base",
        Answer(
            "QLoRA: LoRA on all linear layers of a 4-bit base",
            "By its answers it is told apart from LoRA on the 32-bit base on no task"
            " (its loss is behind on some), and the base takes a fraction of the bytes"
            " (chapter 10).",
            "5.4 All tasks, all methods",
        ),
    ),
    Rule(
        "Does the task only amplify what the base nearly does, and must an answer take"
        " no longer, or are there many tasks or few examples?",
        lambda p: (
            p.aim == "amplify" and (p.zero_latency or p.tasks > 8 or p.examples < 100)
        ),
        Answer(
            "(IA)³",
            "Sixteen examples were enough, it trains 2,560 numbers, and it can be"
            " folded into the weights. Left unfolded it can be switched off: do that"
            " where the base is asked, for few numbers forget too (section 5.6). On a"
            " task that is new to the base it falls far behind.",
            "5.7 Score against data",
        ),
    ),
    Rule(
        "Is the score all that counts: one task, memory for full fine-tuning, and the"
        " base's knowledge may go?",
        lambda p: p.memory == "full" and p.tasks == 1 and not p.keep_base,
        Answer(
            "full fine-tuning",
            "After 300 steps it is ahead of LoRA of rank 4 on new facts, and its"
            " answers are behind on no task; on the other five of six tasks the two are"
            " a tie, and LoRA takes less memory. The lead is one of speed: after 1,000"
            " steps it is gone (65 against 71 %, a tie with a margin of 32 points)."
            " Search its rate at the run's own length (with that of a shorter one it"
            " falls behind, section 5.3), and mind what it forgets at that rate"
            " (section 5.6).",
            "5.4 All tasks, all methods",
        ),
    ),
    Rule(
        "Must what the base knew still be there?",
        lambda p: p.keep_base,
        Answer(
            "LoRA on all linear layers, switched off where the base is asked",
            "Switched off, it gives the base back bit for bit. If no time may be added"
            " either: the base, and a merged copy beside it. If one model must do both"
            " at once: old text among the new, a pull back to the start, or AdaLoRA,"
            " which kept the most in the mean of six tasks. That the base is frozen"
            " does not protect what it knew.",
            "5.6 What it forgets",
        ),
    ),
    Rule(
        "Must an answer take no longer than the base's?",
        lambda p: p.zero_latency,
        Answer(
            "LoRA on all linear layers, merged",
            "Merged it is a model like the base: with several tasks, a whole copy for"
            " each. Bottlenecks, prompts and prefixes cannot be merged. DoRA can; it"
            " trains slower.",
            "5.5 What it costs",
        ),
    ),
    Rule(
        "Are there many tasks to teach, so that the size of each file counts?",
        lambda p: p.tasks > 8,
        Answer(
            "LoKr",
            "With a quarter of the parameters of LoRA of rank 4 its answers are told"
            " apart from LoRA's on no task (its loss is behind on some; on one the"
            " margin is 38 points, so test it on yours). Here its steps take a third"
            " longer.",
            "5.4 All tasks, all methods",
        ),
    ),
    Rule(
        "Otherwise",
        lambda p: True,
        Answer(
            "LoRA on all linear layers, rank 4 or more",
            "Nothing that trains fewer parameters is ahead of it on any task, and it is"
            " cheap to train, to keep and to switch. Try four rates, then rank 16, with"
            " rsLoRA's scale too (ahead of rank 4 on three of six tasks), then DoRA"
            " (on one).",
            "5.4 All tasks, all methods",
        ),
    ),
]


def decide(project: Project) -> Answer:
    """The answer to the first question that the project answers with yes."""
    return next(rule.answer for rule in RULES if rule.applies(project))


def page() -> str:
    """The text of which_one.md."""
    lines = [
        "# Which one should I use?",
        "",
        "Go through the questions in their order, and stop at the first yes. Each"
        f" answer names the section of [chapter 16]({NOTEBOOK}) that it follows from:"
        " one small base, one town, three seeds; all methods on six tasks for 300"
        " steps, each at the best of four rates, and six of them on three tasks for"
        " 1,000. What that cannot tell is said in section 9 of the chapter.",
        "",
    ]
    for number, rule in enumerate(RULES, 1):
        answer = rule.answer
        lines += [
            f"{number}. **{rule.question}**",
            "",
            f"   → **{answer.method}.** {answer.why}",
            "",
            f"   *Follows from [{answer.cell}]({NOTEBOOK}).*",
            "",
        ]
    lines.append(
        "Made by `make chapters` from `minipeft/course/which_one.py`; with it a program"
        " can ask the same questions: `decide(Project(...))`."
    )
    return "\n".join(lines) + "\n"


def write_page(folder="chapters"):
    """Write which_one.md beside the chapters (`make chapters`)."""
    write_text(Path(folder) / "which_one.md", page())
