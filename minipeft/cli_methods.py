"""The methods of `minipeft finetune` by their usual names, with defaults that work."""

import dataclasses
import json
import re
from dataclasses import dataclass, field

from .config import METHODS
from .errors import ConfigError, TargetError
from .io import did_you_mean


class MethodError(ValueError):
    """A method, or a field of one, that does not exist or lacks a value."""


@dataclass(frozen=True)
class Method:
    """One line of `minipeft methods`."""

    kind: str  # its peft_type
    about: str
    fields: dict = field(default_factory=dict)  # besides the configuration's defaults
    lr: float = 1e-2  # peak rate on the shipped base, as measured in the chapters
    in_4bit: bool = False
    fast_b: bool = False  # LoRA+


TOKENS = {"num_virtual_tokens": 8}
KNOWN = {
    "lora": Method("LORA", "a low-rank matrix BA beside each weight"),
    "dora": Method(
        "LORA", "LoRA that learns each row's length apart", {"use_dora": True}
    ),
    "rslora": Method(
        "LORA", "LoRA scaled by alpha / sqrt(r), for high ranks", {"use_rslora": True}
    ),
    "pissa": Method(
        "LORA",
        "LoRA that starts from the weight's largest singular directions",
        {"init_lora_weights": "pissa"},
        lr=3e-3,
    ),
    "olora": Method(
        "LORA",
        "LoRA that starts from the weight's QR decomposition",
        {"init_lora_weights": "olora"},
        lr=3e-3,
    ),
    "loraplus": Method(
        "LORA", "LoRA whose B learns 4 times as fast as A", lr=5e-3, fast_b=True
    ),
    "qlora": Method("LORA", "LoRA on a base that is stored in 4 bits", in_4bit=True),
    "adalora": Method(
        "ADALORA", "LoRA that moves its ranks to where they help", lr=5e-2
    ),
    "denselora": Method("DENSELORA", "one small dense matrix a layer, shared A and B"),
    "loha": Method("LOHA", "the elementwise product of two low-rank matrices", lr=5e-2),
    "lokr": Method("LOKR", "a Kronecker product of small matrices", lr=5e-2),
    "vera": Method(
        "VERA", "fixed random matrices, of which vectors are learnt", lr=1e-1
    ),
    "ia3": Method("IA3", "learnt factors on keys, values and activations", lr=1e-1),
    "bitfit": Method("BITFIT", "the biases alone", lr=5e-2),
    "ln-tuning": Method("LN_TUNING", "the norms alone", lr=5e-2),
    "pfeiffer": Method("BOTTLENECK", "a bottleneck after each MLP", lr=2e-2),
    "houlsby": Method(
        "BOTTLENECK",
        "bottlenecks after attention and after the MLP",
        {"placement": "houlsby"},
        lr=2e-2,
    ),
    "parallel": Method(
        "BOTTLENECK", "a bottleneck beside each MLP", {"placement": "parallel"}
    ),
    "prompt-tuning": Method(
        "PROMPT_TUNING", "learnt embeddings before the text", TOKENS, lr=0.3
    ),
    "prefix-tuning": Method(
        "PREFIX_TUNING", "learnt keys and values in every layer", TOKENS, lr=0.3
    ),
    "p-tuning": Method(
        "P_TUNING", "learnt embeddings that a small network writes", TOKENS
    ),
    "subspace": Method("SUBSPACE", "all weights, moved within a random subspace"),
}
FULL = "every weight; saved as a plain model"
ALIASES = {
    "lora+": "loraplus",
    "lora-plus": "loraplus",
    "prompt": "prompt-tuning",
    "soft-prompt": "prompt-tuning",
    "prefix": "prefix-tuning",
    "ptuning": "p-tuning",
    "prompt-encoder": "p-tuning",
    "(ia)3": "ia3",
    "layernorm": "ln-tuning",
    "bottleneck": "pfeiffer",
    "adapter": "pfeiffer",
    "parallel-adapter": "parallel",
    "full-fine-tuning": "full",
}

OPTIONS = {"r": "--r", "lora_alpha": "--alpha", "target_modules": "--targets"}

# fields that a run fills in itself
NOTED = {
    "base_model_name_or_path": "it is the name of --base",
    "revision": "it belongs to the name of --base",
    "inference_mode": "an adapter that is trained has it off",
}

# what errors tell those who call from Python, and the same in options
ADVICE = (
    (r", or make Batches\(.*", ""),
    (r"pass resume=False, or another folder", "say --restart, or another --out"),
    (r"Pass dequantize=True .*", "Name the model in 16 or 32 bits with --base"),
    (r"leave quantization out", "leave --load-in-4bit out, and say lora for qlora"),
)
# the same for the fields of a configuration
FIELDS = (
    (r"\b(\w+)=(True|False)\b", lambda m: f"--set {m[1]}={m[2].lower()}"),
    (r"\bset (\w+) = (\w+)", r"--set \1=\2"),
    (r"\bsay (?=\w+_)", "say --set "),
    (r"\bBitFitConfig\b", "--method bitfit"),
    (r"\bUse PromptTuningConfig\b", "Take --method prompt-tuning"),
)


def in_options(text, error, args):
    """An error's text, with the command's options for Python's arguments."""
    for pattern, words in ADVICE:
        text = re.sub(pattern, words, text)
    if getattr(args, "command", None) != "finetune":
        return text
    for name in vars(args):  # settings that differ from a checkpoint's
        flag = f"--{name.replace('_', '-')}"
        text = re.sub(rf"(?<=[:,] ){name}(?= \S+ \(now )", flag, text)
    if isinstance(error, (ConfigError, TargetError)):
        given = {item.partition("=")[0] for item in args.set}
        for name, flag in OPTIONS.items():
            if name not in given:
                text = re.sub(rf"^(say )?{name}(?=[ :])", rf"\g<1>{flag}", text)
        for pattern, words in FIELDS:
            text = re.sub(pattern, words, text)
    return text


def find_method(name):
    """(the usual name, its Method, or None for "full"). Upper case, _ and - do not
    matter."""
    plain = name.strip().lower().replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain == "full":
        return plain, None
    if plain in KNOWN:
        return plain, KNOWN[plain]
    kind = plain.upper().replace("-", "_")
    if kind in METHODS:  # a method of the library without a line here
        return plain, Method(kind, METHODS[kind].__doc__ or "")
    names = [*KNOWN, "full"]
    raise MethodError(
        f"--method {name!r}{did_you_mean(plain, [*names, *ALIASES])}: expected one of"
        f" {', '.join(names)}; `minipeft methods` says what each is"
    )


def parse_fields(items):
    """["r=8", "use_dora=true"] -> {"r": 8, "use_dora": True}; values are JSON, else
    text."""
    fields = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise MethodError(f"--set {item}: expected FIELD=VALUE")
        if name in fields:
            raise MethodError(f"--set {item}: {name} is set twice")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
    return fields


def make_config(name, method, steps, options, fields):
    """The configuration. options: {field: value or None} of the command's own options,
    None for what was not given; fields: from --set."""
    config_class = METHODS[method.kind]
    known = {field.name: field for field in dataclasses.fields(config_class)}
    choices = ", ".join(field_name for field_name in known if field_name not in NOTED)
    has = f"it has {choices}: --set FIELD=VALUE"
    for option, value in options.items():
        if value is not None and option not in known:
            raise MethodError(f"{OPTIONS[option]}: {name} has no field {option}; {has}")
    for option in fields:
        if option not in known:
            raise MethodError(
                f"--set: {name} has no field {option!r}{did_you_mean(option, known)};"
                f" {has}"
            )
        if option in NOTED:
            raise MethodError(f"--set: {option} is not a choice: {NOTED[option]}")
        if options.get(option) is not None:
            raise MethodError(
                f"--set: {option} has an option of its own, and both are given: leave"
                " one out"
            )
    values = {**method.fields}
    if method.kind == "ADALORA":
        schedule = {"tinit": steps // 10, "tfinal": 4 * steps // 10}
        values |= {"total_step": steps, **schedule}
    values |= fields
    values |= {option: value for option, value in options.items() if value is not None}
    if "lora_alpha" in known:
        rank = values.get("r", config_class.r)
        # what is no rank, or a huge one, is refused as that, not for its alpha
        good = isinstance(rank, int) and 0 < rank < 1e37
        values.setdefault("lora_alpha", 2 * rank if good else 1)
        values.setdefault("target_modules", "all-linear")
    for field_name, each in known.items():
        required = each.default is each.default_factory is dataclasses.MISSING
        if required and field_name not in values:
            raise MethodError(f"{name} needs --set {field_name}=VALUE")
    return config_class(**values)
