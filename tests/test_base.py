"""The shipped base: its files, and the gates of its card measured again on fewer
examples."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from tolerance import assert_within

from minipeft.lanternwick import DATA
from minipeft.lm import load_pretrained, load_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gates  # noqa: E402

sys.path.remove(str(BENCHMARKS))
FOLDER = DATA / "base"


@pytest.fixture(scope="module")
def base():
    return load_pretrained("lanternwick"), load_tokenizer("lanternwick")


class TestFiles:
    def test_files_are_the_recorded_ones(self):
        for line in (FOLDER / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split()
            assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, (
                name
            )
        assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 16e6

    def test_size_and_shape(self, base):
        model, tokenizer = base
        assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
        assert model.config.num_key_value_heads < model.config.num_attention_heads
        assert len(tokenizer) == model.config.vocab_size
        assert (
            model.model.layers[0].mlp.up_proj.bias is not None
            and model.model.layers[0].self_attn.q_proj.bias is not None
        )

    def test_transformers_opens_it(self, base):
        transformers = pytest.importorskip("transformers")
        model, tokenizer = base
        other = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
        text = (
            'Mara\'s dog said, "Come here!"\n'
            "SELECT name FROM residents WHERE pet = 'dog'"
            ' ; {"who": "Mara"} caf\u00e9'
        )
        ids = tokenizer.encode(text)
        assert their_tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text == their_tokenizer.decode(ids)
        x = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            terms, layers = model.config.intermediate_size, len(model.model.layers)
            sums = dict(terms=terms, steps=9 * layers)
            assert_within(model(x).logits, other(x).logits, **sums)

    def test_the_card_tells_what_was_measured(self):
        card = (FOLDER / "README.md").read_text()
        recorded = json.loads((BENCHMARKS / "results" / "gates.json").read_text())
        assert (
            f"{recorded['copies']['one']:g} %" in card
            and f"{recorded['tracks']['found']:g} %" in card
        )
        history = json.loads((FOLDER / "history.json").read_text())
        assert len(history["loss"]) == history["steps"] and history["command"] in card


@pytest.fixture(scope="module")
def tracked(base):
    return gates.tracks(*base, stories=60, seed=2)[0]


class TestAbilities:
    def test_copies_in_context(self, base):
        assert gates.copies(*base, documents=60, seed=1)["one"] >= 80

    def test_recalls_the_register(self, base):
        for attribute, right in gates.recalls(*base).items():
            assert right >= 90, attribute

    def test_what_is_found_is_what_was_lost(self, tracked):
        assert tracked["found"] >= 80

    def test_names_and_things_keep_to_the_story(self, tracked):
        assert tracked["mentions"] >= 80

    def test_every_token_a_task_must_output_was_in_the_text(self, base):
        assert gates.unseen_outputs(base[1], documents=15_000) == []

    def test_cannot_do_the_tasks_yet(self, base):
        for name, row in gates.zero_shot(*base, limit=48).items():
            assert row["score"] <= row["floor"] + 10, name

    def test_the_gates_can_fail(self, base):
        """The same measures on the same network before training."""
        from minipeft.lm import GPT

        torch.manual_seed(0)
        untrained = GPT(base[0].config).eval()
        assert gates.copies(untrained, base[1], documents=10)["one"] < 10
        assert gates.tracks(untrained, base[1], stories=10)[0]["gate"] < 20


class TestBosInTransformers:
    """transformers puts <s> first; our encode adds none, and the ids agree."""

    TEXTS = ["Day 12.", "", " baker", 'She said, "Come!"\n\nNo.', "café 🙂"]

    @pytest.fixture(params=["shipped", "saved", "trained"])
    def folder(self, request, tmp_path, base):
        if request.param == "shipped":
            return FOLDER
        tokenizer = base[1]
        if request.param == "trained":
            from minipeft.lm.tokenizer import train_tokenizer

            tokenizer = train_tokenizer(self.TEXTS * 5, 400)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    def test_the_same_ids(self, folder):
        transformers = pytest.importorskip("transformers")
        from minipeft.lm import load_tokenizer

        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = load_tokenizer(folder)
        for text in self.TEXTS:
            ids = ours.encode(text)
            assert ours.bos_token_id not in ids
            assert theirs(text)["input_ids"] == [ours.bos_token_id, *ids]
            assert theirs.encode(text, add_special_tokens=False) == ids
            text_again = theirs.decode([1, *ids], skip_special_tokens=True)
            assert text_again == ours.decode(ids)

    def test_generate_takes_either(self, base):
        transformers = pytest.importorskip("transformers")
        from minipeft.lm import generate

        model, tokenizer = base
        theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
        prompt = "In the morning"
        expected = generate(model, tokenizer, prompt, max_new_tokens=6)
        assert generate(model, theirs, prompt, max_new_tokens=6) == expected
        pieces = generate(model, theirs, prompt, max_new_tokens=6, stream=True)
        assert "".join(pieces) == expected
        ids = torch.tensor([theirs(prompt)["input_ids"]])
        new = model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :]
        assert tokenizer.decode(new).strip() == expected.strip()

    def test_training_takes_either(self, base):
        transformers = pytest.importorskip("transformers")
        from minipeft.lm import load_data
        from minipeft.lm.data import Batches, encode

        theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
        examples = load_data("sql").train[:20]
        rows = Batches(examples, base[1]).rows
        assert Batches(examples, theirs).rows == rows
        assert encode(theirs, examples[0]) == rows[0]
