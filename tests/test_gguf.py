"""Chapter 17's lines that write a LoRA as GGUF: the file holds what llama.cpp looks
for."""

import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import load_file

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import GPT, GPTConfig

CHAPTER = Path(__file__).parents[1] / "chapters" / "17_ecosystem.ipynb"


def lines_of_the_chapter():
    """The block that writes GGUF, and the function that it uses."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    block = next(c.source for c in cells if "import gguf" in c.source)
    rows = next(c.source for c in cells if "def rows_for_llama_cpp" in c.source)
    rows = re.search(r"def rows_for_llama_cpp.*?\n\n\n", rows, re.S)[0]
    return rows + re.search(r"```python\n(.*?)```", block, re.S)[1]


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2), (6, 1)])
def test_the_file_holds_the_adapter(tmp_path, heads, kv_heads):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(heads)
    base = GPT(
        GPTConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
    )
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    model = get_peft_model(base, config)
    for p in model.parameters():
        p.data.normal_()
    model.save_pretrained(tmp_path)
    scope = {"json": json, "load_file": load_file}
    exec(lines_of_the_chapter(), scope)
    scope["write_gguf"](tmp_path, tmp_path / "a.gguf", heads, kv_heads, 2)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {t.name: torch.tensor(t.data.copy()) for t in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 6
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(found) == len(saved) == 12
    key = "base_model.model.model.layers.1.self_attn.{}.lora_{}.weight"
    for ours, theirs, n in (("q", "q", heads), ("k", "k", kv_heads), ("v", "v", None)):
        A, B = (saved[key.format(f"{ours}_proj", part)] for part in "AB")
        if n:  # row i and row i + h/2 of a head become neighbours
            order = torch.arange(len(B)).view(n, 2, -1).mT.flatten()
            B = B[order]
        assert torch.equal(found[f"blk.1.attn_{theirs}.weight.lora_a"], A)
        assert torch.equal(found[f"blk.1.attn_{theirs}.weight.lora_b"], B)
