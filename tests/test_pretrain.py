"""Pretraining: the circuits written by hand do what they say, and the warm-up's rows
ask what they should."""

import pytest
import torch

from minipeft.lm import GPT, GPTConfig, load_tokenizer
from minipeft.lm.pretrain import (
    SHAPE,
    TextBatches,
    copy_batch,
    copy_warmup,
    induction_head,
    name_head,
    name_tokens,
    pretrain,
    recall_batch,
)
from minipeft.lm.tokenizer import train_tokenizer

VOCABULARY, NAMES = 600, torch.arange(20, 60)
POOL = torch.arange(100, 356)


def network(circuits):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, **SHAPE))
    if circuits:
        induction_head(model)
    if circuits == 2:
        name_head(model, NAMES)
    return model


def advantage(model, batch):
    """By how much the right token's score stands above the pool's, in standard
    deviations of the pool's, on the average."""
    ids, labels = batch
    with torch.no_grad():
        scores = model(ids).logits[:, :-1, POOL]
    target = labels[:, 1:]
    rows = target >= 0
    scores = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True)
    return scores[rows].gather(-1, target[rows][:, None]).mean().item()


def attention(model, layer, head, ids):
    """(T, T) attention of one head for one row of ids, from the q_proj and k_proj that
    the model has, by the textbook."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config, seen = model.config, {}
    block = model.model.layers[layer].self_attn
    hooks = [
        projection.register_forward_hook(
            lambda module, given, out, name=name: seen.update({name: out})
        )
        for name, projection in (("q", block.q_proj), ("k", block.k_proj))
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    h, T = config.head_dim, len(ids)
    q = seen["q"].view(1, T, -1, h).transpose(1, 2)
    k = (
        seen["k"]
        .view(1, T, -1, h)
        .transpose(1, 2)
        .repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
    )
    angles = torch.arange(T)[:, None] * config.rope_theta ** (
        -torch.arange(h // 2) / (h // 2)
    )
    cos, sin = (
        f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin)
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    scores = (q @ k.transpose(2, 3))[0, head] / h**0.5
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


class TestCircuits:
    def test_head_0_looks_one_token_back(self):
        ids = POOL[torch.randperm(256, generator=torch.Generator().manual_seed(0))[:40]]
        assert (
            attention(network(1), 0, 0, ids)[1:].argmax(-1) == torch.arange(39)
        ).float().mean() > 0.9
        assert (
            attention(network(0), 0, 0, ids)[1:].argmax(-1) == torch.arange(39)
        ).float().mean() < 0.5

    def test_head_2_looks_for_the_latest_name(self):
        generator = torch.Generator().manual_seed(0)
        ids = POOL[torch.randperm(256, generator=generator)[:60]]
        places = torch.tensor([3, 11, 20, 34, 47])
        ids[places] = NAMES[:5]
        latest = torch.tensor([places[places <= t].max() for t in range(3, 60)])
        # rough, as it says
        assert (
            attention(network(2), 0, 2, ids)[3:].argmax(-1) == latest
        ).float().mean() > 0.6
        assert (
            attention(network(1), 0, 2, ids)[3:].argmax(-1) == latest
        ).float().mean() < 0.3

    def test_the_circuits_copy_before_any_training(self):
        copied = copy_batch(POOL, torch.Generator().manual_seed(1), rows=64)
        assert advantage(network(1), copied) > advantage(network(0), copied) + 0.1

    def test_the_second_circuit_tells_names_apart_before_any_training(self):
        asked = recall_batch(POOL, NAMES, torch.Generator().manual_seed(1), rows=64)
        assert advantage(network(2), asked) > advantage(network(1), asked) + 0.02


class TestWarmUp:
    def test_rows_of_repetition(self):
        ids, labels = copy_batch(POOL, torch.Generator().manual_seed(2))
        rows, columns = (labels >= 0).nonzero(as_tuple=True)
        assert len(rows) and (POOL[labels[rows, columns]] == ids[rows, columns]).all()
        for row in ids.tolist():
            assert any(row[period:] == row[:-period] for period in range(4, 25))

    def test_rows_about_names_can_be_answered_by_the_name_only(self):
        ids, labels = recall_batch(
            POOL, NAMES, torch.Generator().manual_seed(3), rows=32
        )
        named = set(NAMES.tolist())
        for row, label in zip(ids.tolist(), labels.tolist()):
            told, after = {}, {}
            first = next(t for t, place in enumerate(label) if place >= 0)
            for t in (t for t, place in enumerate(label) if place >= 0):
                assert POOL[label[t]] == row[t]
                name = next(token for token in reversed(row[:t]) if token in named)
                # always the same answer for a name
                assert told.setdefault(name, row[t]) == row[t]
                after.setdefault(row[t - 1], set()).add(row[t])
            assert all(len(answers) > 1 for answers in after.values()) or len(told) == 1
            # each was told before it was asked
            assert set(told.values()) <= set(row[:first])

    def test_warm_up_returns_every_steps_accuracy(self):
        accuracies = copy_warmup(network(2), NAMES, most=2)
        assert list(accuracies) == ["copied", "told apart"] and all(
            len(values) == 2 for values in accuracies.values()
        )
        assert all(0 <= a <= 1 for values in accuracies.values() for a in values)


class TestCompiler:
    """A machine without a C++ compiler pretrains too, more slowly: a slim container,
    Windows."""

    @pytest.mark.parametrize(
        "system, found, cxx, compiles",
        [
            ("Linux", "g++", None, True),
            ("Linux", "clang++", None, False),
            ("Linux", "g++", "gone", False),  # torch looks for no other
            ("Linux", "cc-5", "cc-5", True),
            ("Darwin", "clang++", None, True),
            ("Windows", "g++", None, False),
            ("Windows", "cl", None, True),
        ],
    )
    def test_compiled_where_a_compiler_is(
        self, tmp_path, monkeypatch, system, found, cxx, compiles
    ):
        compiled = []
        monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr(
            "shutil.which", lambda name: name if name == found else None
        )
        monkeypatch.delenv("CXX", raising=False)
        if cxx:
            monkeypatch.setenv("CXX", cxx)
        tokenizer = train_tokenizer(["the cat sat on the mat"], 300)
        small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        shape = small | dict(num_attention_heads=1, max_position_embeddings=256)
        pretrain(tmp_path, 1, rows=1, tokenizer=tokenizer, shape=shape, warm=False)
        assert bool(compiled) == compiles and (tmp_path / "model.safetensors").exists()


class TestText:
    def test_every_first_name_is_one_token(self):
        tokenizer = load_tokenizer()
        from minipeft.lanternwick import words

        names = name_tokens(tokenizer)
        assert len(set(names.tolist())) == len(set(words.WOMEN + words.MEN))
        assert tokenizer.decode(names[:1].tolist()) == words.WOMEN[0]

    @pytest.mark.parametrize("step", [0, 9])
    def test_text_is_a_pure_function_of_seed_and_step(self, step):
        one, two = (
            TextBatches(load_tokenizer(), steps=10, seed=5, rows=2, length=64).batch(
                step
            )
            for _ in range(2)
        )
        assert (one["input_ids"] == two["input_ids"]).all() and (
            one["labels"] == two["labels"]
        ).all()
        assert not (
            one["input_ids"]
            == TextBatches(load_tokenizer(), steps=10, seed=6, rows=2, length=64).batch(
                step
            )["input_ids"]
        ).all()
