"""What is streamed is the text that is returned: every tokenizer, every prefix."""

import random

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from minipeft.lm import generate, load_pretrained, load_tokenizer
from minipeft.lm.generation import Writer
from minipeft.lm.tokenizer import Tokenizer, train_tokenizer

TEXTS = [
    " SELECT name FROM residents WHERE surname = 'Moss' AND trade IN ('miller');",
    ' {"who": "Mara", "pets": ["dog", "cat"]}\n\n    indented (twice) and "so"',
    " naïve café – 日本語 🙂👩‍👩‍👧 e\u0301 \ufffd 100 % ∘ ▁ don't",
    "\n\tdef f(x):\n        return x  # ∘▁x\n",
]


def byte_level():
    """A byte-level BPE as SmolLM2's and GPT-2's are: characters break anywhere."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    return Tokenizer(raw)


def stories(real):
    return load_tokenizer(real / "stories260K")


TOKENIZERS = {
    "lanternwick": lambda real: load_tokenizer("lanternwick"),
    "stories260K": stories,
    "byte-level": lambda real: byte_level(),
    "tiny": lambda real: train_tokenizer(["a (b) 'c' d"] * 9, 400),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param](request.getfixturevalue("real"))


def stream(tokenizer, prompt, ids, stops=()):
    """(the pieces, the text that is returned)"""
    writer = Writer(tokenizer, prompt, set(), list(stops))
    pieces = []
    for token in ids:
        is_over = writer.is_over(token)
        pieces.append(writer.piece())
        if is_over:
            break
    pieces.append(writer.piece(at_end=True))
    return pieces, writer.read()[0]


class TestWriter:
    @pytest.mark.parametrize("text", TEXTS)
    @pytest.mark.parametrize("prompt", ["", "SQL:", "(", "caf", "a ∘", "x\n"])
    def test_every_prefix_of_a_text(self, tokenizer, text, prompt):
        ids = tokenizer.encode(text)
        for end in range(len(ids) + 1):
            pieces, whole = stream(tokenizer, prompt, ids[:end])
            assert "".join(pieces) == whole

    def test_random_tokens(self, tokenizer):
        rng = random.Random(0)
        joiners = [i for i in range(len(tokenizer)) if tokenizer.is_partial(i)]
        for _ in range(100):
            ids = [
                rng.choice(joiners)
                if joiners and rng.random() < 0.5
                else rng.randrange(len(tokenizer))
                for _ in range(12)
            ]
            stops = rng.choice([[], ["a"], ["ab", "b "], ["\n\n", "):"]])
            pieces, whole = stream(tokenizer, "SQL:", ids, stops)
            assert "".join(pieces) == whole, (ids, stops)

    def test_characters_that_break_over_tokens_come_whole(self, tokenizer):
        pieces, _ = stream(tokenizer, "x", tokenizer.encode(" 🙂 ok"))
        assert not any("\ufffd" in piece for piece in pieces)

    def test_it_does_not_wait_for_the_end(self, tokenizer):
        ids = tokenizer.encode(" one two three four five six")
        pieces, _ = stream(tokenizer, "x", ids)
        assert sum(map(bool, pieces[:-1])) > len(ids) / 2

    def test_a_stop_string_is_held_back_and_not_shown(self, tokenizer):
        ids = tokenizer.encode(" one two; three")
        for stop in ("; three", ";", "two; t", "e"):
            pieces, whole = stream(tokenizer, "x", ids, [stop])
            assert "".join(pieces) == whole
            assert whole.strip() == "one two; three".split(stop)[0].strip()


def test_the_shipped_base():
    """The quotes and brackets of SQL: a mark joins them to the word behind."""
    model, tokenizer = load_pretrained("lanternwick"), load_tokenizer("lanternwick")
    for prompt in (
        "Question: Name each resident with the surname Moss.\nSQL:",
        'She said, "',
        "The trades are ('miller', '",
        "Mara's",
        "",
    ):
        whole = generate(model, tokenizer, prompt, max_new_tokens=24)
        pieces = list(generate(model, tokenizer, prompt, 24, stream=True))
        assert "".join(pieces) == whole and len(pieces) > 3
        drawn = {"temperature": 1.5, "seed": 3, "max_new_tokens": 24}
        whole = generate(model, tokenizer, prompt, **drawn)
        pieces = list(generate(model, tokenizer, prompt, stream=True, **drawn))
        assert "".join(pieces) == whole
