"""Chapters run on another base (`MINIPEFT_BASE`): here a tiny random GPT-2, as Hugging
Face saves it, with a tokenizer of its own."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from minipeft.lm import load_data

CHAPTERS = Path(__file__).parents[1] / "chapters"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder: 2 layers of width 64, and 1,024 byte pairs learnt from the tasks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    tasks = [load_data(name) for name in ("sql", "voice", "records")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [e.prompt + e.completion for task in tasks for e in task.train[:300]]
    tokenizer.train_from_iterator(texts, trainer)
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"vocab_size": 1024, "n_positions": 512, "n_embd": 64, "n_layer": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_head=4, **size, **ends))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "chapter",
    ["01_model", "04_lora", "09_nf4", "13_ia3_and_bitfit"],
    ids=lambda name: name[:2],
)
def test_a_chapter_runs_on_a_gpt2(chapter, gpt2, monkeypatch):
    monkeypatch.setenv("MINIPEFT_BASE", str(gpt2))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = nbformat.read(CHAPTERS / f"{chapter}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(CHAPTERS)}}
    )
    client.execute()  # raises where a cell fails
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "Not on this base:" in said  # it did run on the other one
