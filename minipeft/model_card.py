"""The model card: a README.md beside a saved adapter, as the Hugging Face hub shows
it."""

import json

from .errors import AdapterFileError
from .io import read_bytes, read_text

CARD = "README.md"
OURS = "<!-- written by minipeft: remove this line to keep changes of your own -->"


def is_ours(file):
    """True for a card that this package wrote. Raises AdapterFileError."""
    return OURS.encode() in read_bytes(file, AdapterFileError)


def model_card(config, tensors, folder):
    """The card's text: base, method, parameters, how to load it. None where the folder
    has a card that somebody else has written."""
    file = folder / CARD
    if file.exists() and not is_ours(file):
        return None
    base = config.base_model_name_or_path
    method = type(config).__name__.removesuffix("Config")
    count = sum(tensor.numel() for tensor in tensors.values())
    settings = config.to_dict()
    for name in ("peft_type", "base_model_name_or_path", "inference_mode"):
        settings.pop(name, None)
    rows = "\n".join(f"| {name} | `{cell(v)}` |" for name, v in settings.items())
    metadata = ["library_name: peft"]
    if base:
        metadata.append(f"base_model: {json.dumps(base)}")  # YAML, also of "a: b"
    tags = "\n".join(f"- {tag}" for tag in tags_of(config))
    return f"""---
{chr(10).join(metadata)}
tags:
{tags}
---
{OURS}

# {method} adapter

- **Base model:** {base or "not recorded"}
- **Method:** {method} (`{config.peft_type}`)
- **Saved parameters:** {count:,}

## How to load it

```python
from minipeft import PeftModel  # or from peft, for methods that it has

model = PeftModel.from_pretrained(base, "this folder")  # base: {base or "the model"}
```

## Settings

| field | value |
|---|---|
{rows}
"""


def updated_card(config, folder):
    """The text of a card that somebody else has written, say Trainer, with the
    adapter's metadata. Raises AdapterFileError where its metadata cannot be read."""
    from huggingface_hub import ModelCard

    text = read_text(folder / CARD, AdapterFileError)
    try:
        card = ModelCard(text)
    except Exception as problem:  # yaml's errors and huggingface_hub's own
        raise AdapterFileError(
            f"{folder / CARD}: its metadata cannot be read: {problem}"
        ) from None
    card.data.library_name = "peft"
    if config.base_model_name_or_path:
        card.data.base_model = config.base_model_name_or_path
    tags = dict.fromkeys([*(card.data.tags or ()), *tags_of(config)])
    card.data.tags = list(tags)
    return str(card)


def tags_of(config):
    return "minipeft", config.peft_type.lower()


def cell(value):
    """A value as it can stand in a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())
