"""The model card: a README.md beside a saved adapter, as the Hugging Face hub shows
it."""

from .errors import AdapterFileError
from .io import read_bytes

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
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in settings.items())
    metadata = ["library_name: peft"] + ([f"base_model: {base}"] if base else [])
    tags = "\n".join(f"- {tag}" for tag in ("minipeft", config.peft_type.lower()))
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
