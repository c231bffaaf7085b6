"""Writes the shipped base's card (data/base/README.md), its curves and SHA256SUMS from
what was recorded.

    python benchmarks/base_card.py          after `make pretrain`, benchmarks/gates.py
      and benchmarks/spread.py
"""

import hashlib
import json

import torch
from common import RESULTS
from gates import generate, load_pretrained, load_tokenizer
from spread import table

from minipeft.course import figures
from minipeft.lanternwick import DATA
from minipeft.lanternwick.documents import stream
from minipeft.lanternwick.tasks import Example
from minipeft.lm.evaluation import completion_loss

FOLDER = DATA / "base"
ASKED = [
    "Question: What is Jonas by trade? Answer:",
    (
        "Mirabel is a cooper. She carries a rusty bell. Question: What is Mirabel's"
        " trade? Answer:"
    ),
]


def curves(history):
    """The warm-up in which copying appears, and the loss of the text that followed."""
    figures.curves(
        history["warmup"],
        "Warm-up on random tokens: " + ", ".join(history["warmup"]),
        "step (2,048 tokens each)",
        "accuracy",
        ylim=(0, 1),
        save=FOLDER / "warmup.png",
    )
    smooth = smooth_loss(history)
    figures.curves(
        {"loss": ([50 + 10 * i for i in range(len(smooth))], smooth)},
        "Then text, never the same twice",
        "step (2,048 tokens each)",
        "loss (nats a token), mean of 50 steps",
        ylim=(0, None),
        save=FOLDER / "curve.png",
    )


def smooth_loss(history):
    return torch.tensor(history["loss"]).unfold(0, 50, 10).mean(1).tolist()


def warmup_in_words(history):
    copied, told_apart = history["warmup"].values()
    return (
        f"The warm-up, {len(copied)} steps: copying comes first, {copied[99]:.2f} of it"
        f" right at step 100 and {copied[-1]:.2f} at the end; telling apart follows it,"
        f" jumps up and down, and ends at {told_apart[-1]:.2f}"
    )


def loss_in_words(history):
    smooth = smooth_loss(history)
    first, second = max(smooth[100:250]), max(smooth[260:350])
    return (
        f"The loss over {len(history['loss']):,} steps: from {smooth[0]:.1f} nats a"
        f" token to {smooth[-1]:.2f}, with a jump to {first:.1f} near step 1,500 and"
        f" one to {second:.1f} near step 2,800"
    )


def main():
    torch.manual_seed(0)
    model, tokenizer = load_pretrained("lanternwick"), load_tokenizer("lanternwick")
    history = json.loads((FOLDER / "history.json").read_text())
    gates, spread = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("gates", "spread")
    )
    curves(history)
    fresh = stream("validation")
    loss = completion_loss(
        model, tokenizer, [Example("", next(fresh).text, {}) for _ in range(400)]
    )["loss"]
    told = gates["stories"][:2] + [
        start + " |" + generate(model, tokenizer, start, max_new_tokens=3)
        for start in ASKED
    ]
    text = card(model, history, gates, spread, loss, told)
    (FOLDER / "README.md").write_text(text, encoding="utf-8")
    sums = [
        f"{hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors", "tokenizer.json")
    ]
    (FOLDER / "SHA256SUMS").write_text("".join(sums))


def quote(text):
    return "> " + text.replace("\n", "\n> ")


def card(model, history, gates, spread, loss, told):
    """The base's README.md. loss: on fresh documents. told: samples of its text."""
    zero = " · ".join(
        f"`{name}` {row['score']:g} ({row['floor']:g})"
        for name, row in gates["zero_shot"].items()
    )
    parameters, config = sum(p.numel() for p in model.parameters()), model.config
    return f"""# The base model of Lanternwick

A Llama-style language model of {parameters:,} parameters that was pretrained on nothing but the town's own text. Hugging Face layout:
`transformers` opens this folder. {config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads over
{config.num_key_value_heads} key-value heads, SwiGLU {config.intermediate_size}, biases on every projection, tied head, {config.vocab_size:,} tokens, rotary base
{config.rope_theta:,.0f}. Written by `benchmarks/base_card.py`.

| | |
|---|---|
| command | `{history["command"]}` (what `make pretrain` runs) |
| code | commit {history.get("commit", "of this file")} |
| seed | {history["seed"]} |
| text | {history["tokens"]:,} tokens in {history["steps"]:,} steps, made on the fly, never repeated |
| time | {history["minutes"]:g} minutes on one core of {history["machine"]} |
| loss | {sum(history["loss"][-100:]) / 100:.3f} nats per label over the last 100 steps; {loss:.3f} per token on 400 fresh documents, every token counted |

![{warmup_in_words(history)}](warmup.png)
![{loss_in_words(history)}](curve.png)

First a warm-up on random tokens (upper figure), which two hand-written pairs of heads begin. Then 9 % of the steps on people and stories of which only
the answers, and what was named before, are scored; until 17 % nearly all text demands copying; then all kinds are mixed, and from 75 % on there are
more stories. The loss jumps where the kind of text changes. `minipeft/lm/pretrain.py` says why.

## What it can do, and what not

Measured by `benchmarks/gates.py` ({gates["date"]}); `tests/test_base.py` measures it again on fewer examples.

| gate | wanted | measured |
|---|---|---|
| copies in context: questions about a stranger introduced just before | 80 % | {gates["copies"]["one"]:g} % |
| ... two strangers at once, to be told apart: a fact asked by the name; the name asked by a fact | (no gate) | {gates["copies"]["two, by name"]:g} %; {gates["copies"]["two, for the name"]:g} % |
| ... two, three, four strangers at once, all questions | (no gate) | {gates["copies"]["two"]:g} %, {gates["copies"]["three"]:g} %, {gates["copies"]["four"]:g} % |
| recalls the register, each fact in a phrasing never used for that resident | 90 % each | {", ".join(f"{key} {value:g} %" for key, value in gates["recalls"].items())} |
| ends lost-and-found stories: what is found is what was lost; names and things keep to the story | 80 % each | {gates["tracks"]["found"]:g} % of stories; {gates["tracks"]["mentions"]:g} % of mentions (no slip at all: {gates["tracks"]["whole"]:g} % of stories) |
| tokens that a task must output and the text never held | none | {len(gates["unseen_outputs"]) or "none"} |
| zero-shot on the tasks: score (floor) | floor + 10 at most | {zero} |

After {spread["steps"]} steps of batch {spread["batch"]}, each method at its best of three rates (in brackets; chosen by validation loss), {spread["items"]} test items, one
seed, so ±8 points (`benchmarks/spread.py`):

{table(spread["runs"])}

## Samples

Greedy. What stands before the bar was given. Read them for what they are: a very small model in a very small world.

{chr(10).join(quote(text) + chr(10) for text in told)}
## Limits

It knows Lanternwick and nothing else, in plain ASCII English. It speaks of nobody real. MIT licence.
"""


if __name__ == "__main__":
    main()
