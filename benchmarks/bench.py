"""`make bench`: how fast, how much memory, against Hugging Face's peft where there is
something to compare with.

    python benchmarks/bench.py            # about twelve minutes; writes
      benchmarks/results/bench.json and bench.md
    python benchmarks/bench.py --full     # larger batches, more measurements of memory

Contestants take turns within one process, round after round, and a ratio is the median
of the rounds' ratios: whatever slows the machine slows both. Times are seconds of
processor time on one thread, so other programs matter little; how much chance is left
is shown by racing one contestant against its own twin. Memory and import time are
measured in processes of their own.
"""

import argparse
import copy
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import RESULTS, facts, save
from tqdm import tqdm

from minipeft import LoraConfig, NotMergeableError, get_peft_model
from minipeft.course.measuring import peak_bytes
from minipeft.io import check_choice
from minipeft.lm import (
    GPT,
    GPTConfig,
    load_data,
    load_pretrained,
    load_tokenizer,
    train,
)
from minipeft.lm.data import Batches

DROPOUT = 0.05
TARGETS = {
    "ours": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
TARGETS["llama"] = TARGETS["ours"]
# By name: the class of configuration, and its fields. Those in RACED are raced against
# peft's.
METHODS = {
    "LoRA": ("LoraConfig", dict(r=8, target_modules=TARGETS["ours"])),
    "DoRA": ("LoraConfig", dict(r=8, target_modules=TARGETS["ours"], use_dora=True)),
    "AdaLoRA": (
        "AdaLoraConfig",
        dict(
            init_r=12,
            target_r=8,
            total_step=1000,
            target_modules=TARGETS["ours"],
            task_type="CAUSAL_LM",
        ),
    ),
    "VeRA": ("VeraConfig", dict(r=256, target_modules=TARGETS["ours"])),
    "LoHa": ("LoHaConfig", dict(r=8, target_modules=TARGETS["ours"])),
    "LoKr": ("LoKrConfig", dict(r=8, target_modules=TARGETS["ours"])),
    "DenseLoRA": ("DenseLoraConfig", dict(r=16, target_modules=TARGETS["ours"])),
    "(IA)³": (
        "IA3Config",
        dict(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    ),
    "BitFit": ("BitFitConfig", dict(target_modules=TARGETS["ours"], add_bias=True)),
    "LayerNorm": (
        "LNTuningConfig",
        dict(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    ),
    "Houlsby": ("BottleneckConfig", dict(placement="houlsby")),
    "Pfeiffer": ("BottleneckConfig", dict(placement="pfeiffer")),
    "parallel adapter": ("BottleneckConfig", dict(placement="parallel")),
    "prompt": (
        "PromptTuningConfig",
        dict(num_virtual_tokens=10, task_type="CAUSAL_LM"),
    ),
    "prefix": (
        "PrefixTuningConfig",
        dict(num_virtual_tokens=10, task_type="CAUSAL_LM"),
    ),
}
RACED = {
    "DoRA": ("ours", 0.9),
    "LoHa": ("ours", 0.75),
    "LoKr": ("ours", 0.8),
    "VeRA": ("ours", 0.85),
    "(IA)³": ("ours", 1.0),
}
# peft adds AdaLoRA's regularization for CAUSAL_LM only
RACED |= {name: ("llama", 1.0) for name in ("AdaLoRA", "prompt", "prefix")}
WHY = {  # what is written below the table where such a row misses its goal
    "DoRA step / peft's": (
        "DoRA: nearly all of our step is a plain LoRA's (see the row `DoRA step / our"
        " LoRA's`), and most of that are the products with W, which both make alike."
        " The norms take one per cent of it."
    ),
    "peak of the process": (
        "The process: what the C library's malloc holds beside the tensors that live;"
        " they are counted exactly in the rows `peak of all tensors`."
    ),
}
NAMES = {"ours": "our GPT", "gpt2": "Hugging Face GPT-2", "llama": "Hugging Face Llama"}


def make(kind, size="full"):
    """A random network: hidden size 384, 6 layers, 10 to 13 million weights; a smaller
    one; or a toy."""
    d, layers, vocab = {
        "full": (384, 6, 4096),
        "small": (128, 2, 512),
        "tiny": (32, 2, 64),
    }[size]
    torch.manual_seed(0)
    if kind == "ours":
        return GPT(
            GPTConfig(
                vocab_size=vocab,
                hidden_size=d,
                intermediate_size=2 * d,
                num_hidden_layers=layers,
            )
        )
    import transformers

    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocab,
                n_embd=d,
                n_layer=layers,
                n_head=4,
                n_positions=256,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=d,
            intermediate_size=2 * d,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
    )


def adapt(model, kind, library, what=0.0):
    """what: the dropout of a LoRA, or the name of another method."""
    if isinstance(what, str):
        config, fields = METHODS[what]
        package = importlib.import_module(library)
        return package.get_peft_model(model, getattr(package, config)(**fields))
    settings = dict(r=8, lora_alpha=16, target_modules=TARGETS[kind], lora_dropout=what)
    if library == "minipeft":
        return get_peft_model(model, LoraConfig(**settings))
    import peft

    return peft.get_peft_model(
        model, peft.LoraConfig(**settings, fan_in_fan_out=kind == "gpt2")
    )


def stepper(model, batch, length):
    """A function that does one training step on (batch, length) random tokens."""
    model.train()
    ids = torch.randint(0, 64, (batch, length))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3
    )

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def race(contestants, rounds, repeat=1):
    """{name: function} -> {name: [seconds in each round]}; everyone once a round, the
    first round is thrown away."""
    times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        # nobody is always the one after somebody
        for name in (list(contestants), list(contestants)[::-1])[turn % 2]:
            started = time.process_time()
            for _ in range(repeat):
                contestants[name]()
            if turn:
                times[name].append((time.process_time() - started) / repeat)
    return times


def row(what, value, unit, against=None, goal=None):
    """value and against: lists of measurements, paired by round; or plain numbers. With
    `against` the goal is for the ratio.

    chance: how far the median of the rounds' ratios may be off, twice its standard
    error. A goal is met or not by the ratio itself, to three digits; a miss by no more
    than chance is told from one by more."""
    value, against = (
        [x] if isinstance(x, (int, float)) else x
        for x in (value, [] if against is None else against)
    )

    def middle(xs):
        return statistics.median(xs) if xs else None

    ratios = [a / b for a, b in zip(value, against)]
    ratio = middle(ratios)
    chance = (
        2 * 1.25 * 1.48 * middle([abs(r - ratio) for r in ratios]) / len(ratios) ** 0.5
        if len(ratios) > 1
        else None
    )
    judged = middle(value) if ratio is None else ratio
    return {
        "what": what,
        "value": middle(value),
        "against": middle(against),
        "unit": unit,
        "ratio": ratio,
        "goal": goal,
        "met": None if goal is None else round(judged, 3) <= goal,
        "chance": chance,
        "rounds": len(value),
    }


def steps_against_peft(kind, rounds, batch, length, size="full"):
    base = make(kind, size)

    def step(model):
        return stepper(model, batch, length)

    contestants = {
        "full": step(copy.deepcopy(base)),
        "twin": step(adapt(copy.deepcopy(base), kind, "peft")),
    }
    for dropout in (0.0, DROPOUT):
        for library in ("peft", "minipeft"):  # who is compared runs one after the other
            contestants[library, dropout] = step(
                adapt(copy.deepcopy(base), kind, library, dropout)
            )
    times, name = race(contestants, rounds), NAMES[kind]
    yield row(
        f"LoRA step / full fine-tuning's step, {name}",
        times["minipeft", 0.0],
        "s",
        times["full"],
    )
    for dropout in (0.0, DROPOUT):
        yield row(
            f"LoRA step / peft's, {name}, dropout {dropout}",
            times["minipeft", dropout],
            "s",
            times["peft", dropout],
            goal=1.0,
        )
    yield row(
        f"chance: peft's step / the same again, {name}",
        times["twin"],
        "s",
        times["peft", 0.0],
    )


def methods_against_peft(rounds, batch, length, times=1, size="full"):
    for name, (kind, goal) in RACED.items():
        contestants = {
            library: stepper(
                adapt(make(kind, size), kind, library, name), batch, length
            )
            for library in ("peft", "minipeft")
        }
        if name == "DoRA":
            contestants["LoRA"] = stepper(
                adapt(make(kind, size), kind, "minipeft", "LoRA"), batch, length
            )
        raced = race(contestants, rounds)
        yield row(
            f"{name} step / peft's, {NAMES[kind]}",
            raced["minipeft"],
            "s",
            raced["peft"],
            goal=goal,
        )
        if name == "DoRA":
            yield row(
                f"DoRA step / our LoRA's, {NAMES[kind]}",
                raced["minipeft"],
                "s",
                raced["LoRA"],
                goal=1.1,
            )
        yield from memory_of(
            kind, name, f"{name}, {NAMES[kind]}", batch, length, times, size
        )


def latencies(rounds, size="full"):
    """A forward pass of every method, not merged and merged, against the base, for one
    row and for 32."""
    base, length = make("ours", size).eval(), 8 if size == "tiny" else 32
    models = {"base": base}
    for name in METHODS:
        models[name] = adapt(copy.deepcopy(base), "ours", "minipeft", name).eval()
        try:
            models[f"{name}, merged"] = copy.deepcopy(models[name]).merge_and_unload()
        except NotMergeableError:
            pass
    for batch in (1, 2 if size == "tiny" else 32):
        ids = torch.randint(0, 64, (batch, length))
        with torch.no_grad():
            times = race(
                {
                    name: lambda model=model: model(input_ids=ids)
                    for name, model in models.items()
                },
                rounds,
                repeat=8 if batch == 1 else 1,
            )
        for name in list(models)[1:]:
            yield row(
                f"forward of {name} / base, {batch} x {length} tokens",
                times[name],
                "s",
                times["base"],
            )


def child(code, *arguments):
    """Run a function of this file in a process of its own; its result comes back as
    JSON."""
    command = (
        f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import"
        f" bench; print(json.dumps(bench.{code}(*{arguments!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"bench.{code}{arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(kind, library, what, batch, length, size):
    """In a fresh process: MB that it held at its peak. What malloc makes of the tensors
    is in it, and varies by some per cent."""
    import peft  # noqa: F401

    torch.set_num_threads(1)
    # what a first step loads is nobody's
    stepper(adapt(make(kind, "tiny"), kind, library, what), 2, 8)()
    step = stepper(adapt(make(kind, size), kind, library, what), batch, length)
    for _ in range(2):
        step()
    status = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
    )
    # not getrusage's: that may be the parent's, from before exec
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def fullest_moment(kind, library, what, batch, length, size):
    """MB of all tensors at the fullest moment of a step, weights and optimizer among
    them: exact, the same every time."""
    return (
        peak_bytes(adapt(make(kind, size), kind, library, what).train(), batch, length)
        / 1e6
    )


def memory_of(kind, what, end, batch, length, times=1, size="full"):
    held = {
        library: fullest_moment(kind, library, what, batch, length, size)
        for library in ("minipeft", "peft")
    }
    yield row(
        f"peak of all tensors / peft's, {end}",
        held["minipeft"],
        "MB",
        held["peft"],
        goal=1.0,
    )
    if not Path("/proc/self/status").is_file():
        return  # no Linux: no way to ask
    rounds = [
        [
            child("peak_memory", kind, library, what, batch, length, size)
            for library in held
        ]
        for _ in range(times)
    ]
    ours, theirs = zip(*rounds)
    yield row(f"peak of the process / peft's, {end}", ours, "MB", theirs, goal=1.0)


def memory_against_peft(kind, batch, length, times=1, size="full"):
    for dropout in (0.0, DROPOUT):
        yield from memory_of(
            kind,
            dropout,
            f"{NAMES[kind]}, dropout {dropout}",
            batch,
            length,
            times,
            size,
        )


def small_costs(rounds, size="full"):
    """An idle slot, and a merged model against its base."""
    layer, x = torch.nn.Linear(8, 8), torch.randn(1, 8)
    holder = get_peft_model(
        torch.nn.Sequential(copy.deepcopy(layer)), LoraConfig(target_modules=["0"])
    )
    slot = holder.get_base_model()[0]
    with torch.no_grad(), holder.disable_adapter():
        times = race(
            {"slot": lambda: slot(x), "layer": lambda: layer(x)},
            30 * rounds,
            repeat=100,
        )
    # so short that the best round is the undisturbed one
    idle = (min(times["slot"]) - min(times["layer"])) * 1e6
    yield row(
        "an idle slot (adapters disabled), a call, best round", idle, "µs", goal=3.0
    )
    base, ids = make("ours", size).eval(), torch.randint(0, 64, (2, 32))

    def lora():
        return adapt(copy.deepcopy(base), "ours", "minipeft").eval()

    models = {
        "base": base,
        "unmerged": lora(),
        "merged": lora(),
        "folded": lora().merge_and_unload(),
    }
    models["merged"].merge_adapter()
    with torch.no_grad():
        times = race(
            {
                name: lambda model=model: model(input_ids=ids)
                for name, model in models.items()
            },
            3 * rounds,
            repeat=4,
        )
    yield row(
        "forward of merge_and_unload / base",
        times["folded"],
        "s",
        times["base"],
        goal=1.02,
    )
    yield row(
        "forward of merge_adapter / base (slots stay)",
        times["merged"],
        "s",
        times["base"],
    )
    yield row("forward of LoRA unmerged / base", times["unmerged"], "s", times["base"])


def serving(rounds, size="full"):
    """16 rows, each with an adapter of its own: LoRAs of rank 8 on all linear layers of
    a Hugging Face Llama. A prompt of 32 tokens a row, and one token a row."""
    names = [f"adapter {number}" for number in range(16)]
    models = {name: many_loras(name, names, size) for name in ("minipeft", "peft")}
    for length in (32, 1):
        ids = torch.randint(0, 64, (len(names), length))
        contestants = {}
        for library, model in models.items():
            contestants[library, "one"] = lambda model=model: model(input_ids=ids)
            contestants[library, "mixed"] = lambda model=model: model(
                input_ids=ids, adapter_names=names
            )
            contestants[library, "swap"] = lambda model=model: swap(model, names, ids)
        with torch.no_grad():
            times = race(contestants, rounds)
        end = f"16 x {length} tokens"
        for library, who in (("minipeft", ""), ("peft", "peft's: ")):
            mixed = times[library, "mixed"]
            yield row(
                f"{who}16 adapters in a batch / one adapter for all rows, {end}",
                mixed,
                "s",
                times[library, "one"],
                goal=1.5 if (library, length) == ("minipeft", 32) else None,
            )
            yield row(
                f"{who}16 adapters in a batch / swapping merged weights, {end}",
                mixed,
                "s",
                times[library, "swap"],
                goal=0.25 if library == "minipeft" else None,
            )


def many_loras(library, names, size):
    """A Llama of hidden size 256 and 4 layers with a LoRA of each name, none zero."""
    import transformers

    d, layers = (32, 2) if size == "tiny" else (256, 4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=d,
            intermediate_size=2 * d,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
    ).eval()
    package = importlib.import_module(library)
    config = package.LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS["llama"], init_lora_weights=False
    )
    model = package.get_peft_model(model, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


def swap(model, names, ids):
    """Each row through weights into which its adapter is merged."""
    for name, one in zip(names, ids):
        model.set_adapter(name)
        model.merge_adapter()
        model(input_ids=one[None])
        model.unmerge_adapter()
    model.set_adapter(names[0])


def imports(times=3):
    code = (
        "import time, torch; t = time.process_time(); import {};"
        " print(time.process_time() - t)"
    )

    def once(name):
        return subprocess.run(
            [sys.executable, "-c", code.format(name)],
            check=True,
            capture_output=True,
            text=True,
        )

    def run(name):
        return [float(once(name).stdout) for _ in range(times)]

    yield row("import minipeft, after torch", run("minipeft"), "s", goal=0.3)
    yield row("import minipeft.lm, after torch", run("minipeft.lm"), "s")


def training_speed(steps=20):
    """Tokens a second of processor time, one thread."""
    tokenizer = load_tokenizer()
    data = Batches(load_data("sql").train, tokenizer)
    for name, adapted in (("full", False), ("LoRA r=8", True)):
        for bf16 in (False, True):
            model = load_pretrained()
            if adapted:
                model = get_peft_model(
                    model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
                )
            used = time.process_time()
            history = train(
                model, data, steps=steps, lr=1e-4, bf16=bf16, progress=False
            )
            precision = "bf16" if bf16 else "fp32"
            speed = history.tokens / (time.process_time() - used)
            yield row(
                f"training the base on sql, {name}, {precision}", speed, "tokens/s"
            )


def real_rows(rounds):
    import bench_real  # it needs this file

    return bench_real.rows(rounds)


def peak_of_loading(folder, quantized):
    """For `child`: a process that only loads the model."""
    import bench_real

    return bench_real.peak_of_loading(folder, quantized)


def show(number):
    return (
        ""
        if number is None
        else f"{number:,.0f}"
        if number >= 1000
        else f"{number:.3g}"
    )


def markdown(record):
    lines = [
        "| what | ours | against | unit | ratio | goal | met |",
        "|---|---:|---:|---|---:|---:|---|",
    ]
    for r in record["rows"]:
        ratio = (
            ""
            if r["ratio"] is None
            else f"{r['ratio']:.3f}" + (f" ± {r['chance']:.3f}" if r["chance"] else "")
        )
        goal, met = (
            "" if r["goal"] is None else f"≤ {r['goal']:g}",
            {None: "", True: "yes", False: "NO"}[r["met"]],
        )
        if r["met"] is False and r["chance"] and r["ratio"] - r["chance"] <= r["goal"]:
            met = "no, by chance or not"
        lines.append(
            f"| {r['what']} | {show(r['value'])} | {show(r['against'])} | {r['unit']} |"
            f" {ratio} | {goal} | {met} |"
        )
    where = [
        f"`{record['command']}`",
        record["date"],
        f"commit {record['commit']}",
        record["machine"],
        *(
            f"{name} {record['versions'][name]}"
            for name in ("torch", "peft", "transformers")
        ),
    ]
    lines += [
        f"\nThe rows of “{name}”: `{how['command']}`, {how['date']}, {how['machine']}."
        for name, how in record.get("again", {}).items()
    ]
    lines += [
        f"\n{why}"
        for what, why in WHY.items()
        if any(r["met"] is False and r["what"].startswith(what) for r in record["rows"])
    ]
    return ", ".join(where) + ".\n\n" + "\n".join(lines) + "\n"


def replaced(out, name, parts):
    """The record in `out` with one part's rows measured again, and how under
    "again"."""
    check_choice("--only", name, parts)
    record = json.loads(out.read_text(encoding="utf-8"))
    rows = list(parts[name]())
    measured = {row["what"] for row in rows}
    kept = [row for row in record["rows"] if row["what"] not in measured]
    again = record.get("again", {}) | {name: facts()}
    return record | {"rows": kept + rows, "again": again}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="steps of 16 x 128 tokens, 15 rounds"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="toy networks: does it work at all?"
    )
    parser.add_argument(
        "--only", metavar="PART", help="measure one part, keep the record's other rows"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "bench.json")
    given = parser.parse_args(argv)
    size = "tiny" if given.tiny else "full"
    rounds, batch, length = (
        (2, 2, 8) if given.tiny else (15, 16, 128) if given.full else (15, 4, 64)
    )
    times = 3 if given.full else 1
    parts = {
        NAMES[kind]: lambda kind=kind: steps_against_peft(
            kind, rounds, batch, length, size
        )
        for kind in NAMES
    }
    parts["memory"] = lambda: memory_against_peft(
        "ours", *((2, 8) if given.tiny else (8, 128)), times, size
    )
    parts["methods"] = lambda: methods_against_peft(
        *((2, 2, 8) if given.tiny else (15, 8, 128)), times, size
    )
    parts["latency"] = lambda: latencies(rounds, size)
    parts |= {
        "small costs": lambda: small_costs(rounds, size),
        "serving": lambda: serving(rounds, size),
        "imports": lambda: imports(5 if given.full else 3),
    }
    parts["training"] = lambda: training_speed(
        2 if given.tiny else 60 if given.full else 20
    )
    parts["a real model"] = lambda: real_rows(2 if given.tiny else 5)
    torch.set_num_threads(1)
    if given.only:
        record = replaced(given.out, given.only, parts)
    else:
        rows, progress = [], tqdm(parts.items())
        for name, part in progress:
            progress.set_description(name)
            rows += part()
        record = facts() | {"batch": [batch, length], "rows": rows}
    save(given.out, record)
    given.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
