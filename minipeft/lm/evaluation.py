"""How good is it: the loss of the completions, the perplexity, and the task's own score
of what the model writes."""

import math

import torch

from .. import io
from .data import (
    Batches,
    DataError,
    check_example,
    check_examples,
    check_ids,
    max_tokens,
)
from .generation import generate as write_texts
from .generation import in_mode, unwrap_peft
from .gpt import GPT


def fast_loss(model):
    """Our GPT can apply its head only where a label is, which saves a small model much
    of its time. Others get {}."""
    return {"labels_only": True} if isinstance(unwrap_peft(model), GPT) else {}


def count_labels(batch):
    """Labels of a batch that count: all but -100, and none for the first token."""
    return (batch["labels"][:, 1:] != -100).sum().item()


@torch.no_grad()
def completion_loss(model, tokenizer, data, batch_size=64, bf16=False, progress=False):
    """Mean loss in nats per token of the completions, their ends included: {"loss",
    "perplexity", "tokens"}.

    `data`: a list of Examples, a list of ready batches (dicts of tensors), or an object
    with .batch(i) and a length. Raises DataError where nothing has a label."""
    batches = data
    if hasattr(data, "batch"):
        batches = map(data.batch, range(len(data)))
    else:
        check_examples(data)
        if data and not (isinstance(data[0], dict) and "labels" in data[0]):
            rows = Batches(data, tokenizer, batch_size, max_length=max_tokens(model))
            check_ids(model, [rows.largest_id()])
            batches = rows.in_order()
    device = next(model.parameters()).device
    total = count = 0
    with in_mode(model, training=False):
        for batch in io.progress(batches, "loss", progress):
            n = count_labels(batch)
            if not n:  # its mean is nan
                continue
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(**batch, **fast_loss(model)).loss
            total += loss.item() * n
            count += n
    if not count:
        raise DataError("there is no label to judge the model by")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": count}


def evaluate(
    model,
    tokenizer,
    data,
    split="test",
    limit=None,
    max_new_tokens=None,
    batch_size=64,
    generate=True,
    predictions=False,
    progress=True,
):
    """Evaluate on a Task's `split` or on a list of Examples; returns a dict, the model
    is left in the mode it was in.

    "loss", "perplexity"   of the completions, per token
    the task's metrics     of the completions that the model writes greedily (0 to 100),
                           unless generate=False
    "examples"             how many were used: `limit` takes the first ones; None all
    "predictions"          with predictions=True: what the model wrote, in the examples'
                           order
    max_new_tokens: None leaves room for the longest true completion and a little more.
    """
    bounds = {"least": 1, "also": (None,)}
    io.check_number("limit", limit, whole=True, **bounds, error=DataError)
    if split not in ("train", "valid", "test"):
        raise DataError(f"split {split!r}: expected train, valid or test")
    if predictions and not generate:
        raise ValueError("predictions=True needs generate=True: the model writes them")
    score = getattr(data, "score", None)
    if hasattr(data, "train"):  # a Task
        data = getattr(data, split)
    check_examples(data)
    examples = list(data)[:limit]
    if not examples:
        raise DataError(f"no examples to evaluate in split {split!r}")
    for example in examples:
        check_example(example)
    result = {"examples": len(examples)}
    loss = completion_loss(model, tokenizer, examples, batch_size, progress=progress)
    result |= {name: loss[name] for name in ("loss", "perplexity")}
    if not generate or not (score or predictions):
        return result
    if max_new_tokens is None:
        lengths = [len(tokenizer.encode(example.completion)) for example in examples]
        max_new_tokens = 8 + max(lengths)
    texts = []
    many = 4 * batch_size
    for at in io.progress(range(0, len(examples), many), "writing", progress):
        prompts = [example.prompt for example in examples[at : at + many]]
        texts += write_texts(
            model, tokenizer, prompts, max_new_tokens, batch_size=batch_size
        )
    if score:
        result |= score(texts, examples)
    return result | ({"predictions": texts} if predictions else {})
