"""Generation against transformers' generate and against the plainest loop one can
write."""

import json

import pytest
import torch
from tolerance import chance

from minipeft.lanternwick.tasks import Example
from minipeft.lm import GPT, GPTConfig, generate, load_pretrained, load_tokenizer
from minipeft.lm.data import encode
from minipeft.lm.generation import generate_ids, sample

SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


class Letters:
    """A tokenizer of single characters. A space at a text's start is dropped, as
    SentencePiece does."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    alphabet = "   abcdefghijklmnopqrstuvwxyz .,!?'-\n();"

    def encode(self, text):
        return [self.alphabet.index(c, 3) for c in text]

    def decode(self, ids):
        return "".join(self.alphabet[i] for i in ids if i > 2).removeprefix(" ")


def plain_loop(model, ids, most):
    """One row, no cache, no padding: the definition of greedy generation. Returns the
    new tokens, without the end."""
    new = []
    while len(new) < most:
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in model.config.eos_token_id:
            break
        new.append(token)
    return new


@pytest.fixture
def model():
    model = GPT(GPTConfig(**SIZES, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


PROMPTS = ["abc", "a", "hello there, you", "the cat sat", "z", "no", "why not?", "abc"]


class TestAgainstOthers:
    @pytest.mark.parametrize("style", ["llama", "gpt2"])
    def test_a_padded_cached_batch_says_what_each_row_says_alone(self, style):
        ends = [2, 10, 15, 20, 25, 30]  # many, so that rows end at different times
        model, tokenizer = (
            GPT(GPTConfig(**{**SIZES, "eos_token_id": ends}, model_type=style)).eval(),
            Letters(),
        )
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) * 0.3)
        rows = [[1] + tokenizer.encode(p) for p in PROMPTS]
        expected = [plain_loop(model, row, 20) for row in rows]
        assert len({len(new) for new in expected}) > 2
        texts = generate(model, tokenizer, PROMPTS, max_new_tokens=20, batch_size=3)
        assert texts == [
            tokenizer.decode(r[1:] + e)[len(p) :]
            for r, e, p in zip(rows, expected, PROMPTS)
        ]
        assert generate(model, tokenizer, PROMPTS[2], max_new_tokens=20) == texts[2]

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
    def test_as_transformers_generates(self, kind, tmp_path):
        pytest.importorskip("transformers", reason="the oracle is transformers")
        from test_gpt import oracle

        theirs = oracle(kind, pad_token_id=0)
        theirs.save_pretrained(tmp_path)
        ours = load_pretrained(tmp_path)
        ids, real = torch.randint(3, 61, (4, 7)), torch.ones(4, 7, dtype=torch.long)
        real[0, :4], real[1, :1] = 0, 0
        for eos in (2, [2, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25]):
            options = dict(
                attention_mask=real, max_new_tokens=12, eos_token_id=eos, pad_token_id=0
            )
            expected = theirs.generate(ids, do_sample=False, **options)
            assert torch.equal(ours.generate(ids, **options), expected)
            # our loop, their model and cache
            assert torch.equal(generate_ids(theirs, ids, **options), expected)

    def test_the_model_is_left_in_its_mode(self, model):
        model.train()
        model.gradient_checkpointing_enable()
        text = generate(model, Letters(), "abc", max_new_tokens=3)
        assert model.training and text == generate(
            model.eval(), Letters(), "abc", max_new_tokens=3
        )
        assert not model.training
        model.train()
        # a reader who stops listening
        next(generate(model, Letters(), "abc", max_new_tokens=3, stream=True))
        assert model.training


class TestSampling:
    def test_sampling(self, model):
        tokenizer = Letters()

        def draw(**more):
            return generate(
                model,
                tokenizer,
                PROMPTS,
                max_new_tokens=10,
                **{"temperature": 2.0, **more},
            )

        assert draw(seed=1) == draw(seed=1) != draw(seed=2)
        greedy = draw(temperature=0)
        assert (
            draw(top_k=1) == greedy
            and draw(top_p=1e-9) == greedy
            and draw(temperature=1e-6) == greedy
        )

    @pytest.mark.parametrize(
        "name, value",
        [
            ("temperature", -1.0),
            ("temperature", float("nan")),
            ("top_k", 0),
            ("top_k", -3),
            ("top_p", 0.0),
            ("top_p", 1.5),
            ("max_new_tokens", -1),
        ],
    )
    def test_settings_that_mean_nothing(self, model, name, value):
        with pytest.raises(ValueError, match=f"{name} = {value}: expected"):
            generate(model, Letters(), PROMPTS, **{"temperature": 1.0, name: value})

    def test_top_k_and_top_p_are_distributions(self):
        probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
        logits = probs.log().expand(40_000, 4)

        def dice():
            return torch.Generator().manual_seed(0)

        def counts(**how):
            return (
                torch.bincount(sample(logits, generator=dice(), **how), minlength=4)
                / 40_000
            )

        def within(got, expected):
            off = (got - torch.tensor(expected)).abs().max()
            assert off < chance(0.5, 40_000)  # a share's largest spread

        within(counts(temperature=1.0), [0.4, 0.3, 0.2, 0.1])
        within(counts(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0])
        # the second is needed to reach 0.6
        within(counts(temperature=1.0, top_p=0.6), [4 / 7, 3 / 7, 0, 0])
        halves = torch.tensor([0.5, 0.25, 0.25]).log().expand(99, 3)
        # it is reached, so no other is needed
        assert (sample(halves, 1.0, top_p=0.5, generator=dice()) == 0).all()
        within(counts(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30])


class TestText:
    def test_stops(self, model):
        tokenizer = Letters()
        whole = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
        stops = [t[3:5] for t in whole if len(t) > 6][:2]

        def cut(text):
            return text[: min((text.find(s) for s in stops if s in text), default=None)]

        assert generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop=stops) == [
            cut(t) for t in whole
        ]
        letter = next(t for t in whole if len(t) > 6)[3]
        expected = [t.split(letter)[0] for t in whole]
        assert (
            generate(
                model,
                tokenizer,
                PROMPTS,
                max_new_tokens=20,
                stop=tokenizer.encode(letter),
            )
            == expected
        )
        assert (
            generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop=letter)
            == expected
        )

    def test_streaming(self, model):
        tokenizer = Letters()
        for prompt in PROMPTS:
            whole = generate(model, tokenizer, prompt, max_new_tokens=20)
            pieces = list(
                generate(model, tokenizer, prompt, max_new_tokens=20, stream=True)
            )
            assert "".join(pieces) == whole and (len(pieces) > 1 or len(whole) < 2)
            heard = []
            assert (
                generate(
                    model, tokenizer, prompt, max_new_tokens=20, stream=heard.append
                )
                == whole
                == "".join(heard)
            )
            stop = whole[2:5] or "never"
            pieces = generate(
                model, tokenizer, prompt, max_new_tokens=20, stream=True, stop=stop
            )
            assert "".join(pieces) == whole.split(stop)[0]
        with pytest.raises(ValueError, match="one prompt"):
            generate(model, tokenizer, PROMPTS, stream=True)

    def test_small_cases(self, model):
        assert generate(model, Letters(), []) == []
        assert generate(model, Letters(), "abc", max_new_tokens=0) == ""
        assert isinstance(generate(model, Letters(), "", max_new_tokens=4), str)

    def test_only_the_last_logits_are_asked_for(self, model):
        seen = []
        model.lm_head.register_forward_hook(
            lambda module, args, output: seen.append(output.shape[1])
        )
        generate(model, Letters(), PROMPTS, max_new_tokens=3)
        assert set(seen) == {1}

    def test_stories260k_streams_its_story(self, real):
        folder = real / "stories260K"
        golden = json.loads((folder / "golden.json").read_text())
        model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
        pieces = list(generate(model, tokenizer, "", max_new_tokens=199, stream=True))
        assert (
            "".join(pieces).strip() == golden["greedy_text"].strip()
            and len(pieces) > 150
        )
        start = golden["greedy_text"].strip()[:40]
        rest = generate(model, tokenizer, [start, "Lily"], max_new_tokens=20)[0]
        assert (start + rest) == golden["greedy_text"].strip()[: len(start + rest)]


class TestExtremes:
    def test_tiny_temperatures_are_greedy(self):
        logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, 0.0, -1e-3]])
        for temperature in (1e-10, 1e-40, 5e-324):
            assert sample(logits, temperature).tolist() == [1, 1]
        assert sample(1e30 * logits, 1e-40, top_k=2, top_p=0.5).tolist() == [1, 1]

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("row", [[0, torch.nan], [torch.inf, 0], [-torch.inf] * 2])
    def test_logits_that_say_nothing(self, row, temperature):
        logits = torch.tensor([[0.0, 1.0], row])
        with pytest.raises(ValueError, match="logits are NaN or infinite: look for"):
            sample(logits, temperature)

    def test_ties_stay_ties(self):
        logits = torch.tensor([[7.0, 7.0, 1.0]]).expand(400, 3)
        assert set(sample(logits, 1e-40).tolist()) == {0, 1}

    @pytest.mark.parametrize("top_p", [1e-300, 1e-45, 5e-324, 1e-12])
    def test_a_tiny_top_p_leaves_the_likeliest(self, top_p):
        logits = torch.randn(20, 50)
        drawn = sample(logits, 1.0, top_p=top_p)
        assert torch.equal(drawn, logits.argmax(-1))

    @pytest.mark.parametrize("stop", ["", ["a", ""], [None], [1.5], True, b"a"])
    def test_stops_that_mean_nothing(self, model, stop):
        with pytest.raises(ValueError, match="stop = "):
            generate(model, Letters(), "abc", stop=stop)

    @pytest.mark.parametrize("size", [0, -1, 1.5, None])
    def test_batches_of_no_prompt(self, model, size):
        with pytest.raises(ValueError, match="batch_size = .*at least 1"):
            generate(model, Letters(), ["abc"], batch_size=size)

    @pytest.mark.parametrize("names", [[], ["a"], ["a", "a", "no"]])
    def test_a_name_for_each_prompt(self, model, names):
        with pytest.raises(ValueError, match="adapter_names for 2 prompts: expected"):
            generate(model, Letters(), ["abc", "b"], adapter_names=names)

    @pytest.mark.parametrize("number", [1.5, "3", True, float("inf")])
    def test_numbers(self, model, number):
        with pytest.raises(ValueError, match="max_new_tokens = .*: expected a whole"):
            generate(model, Letters(), "abc", max_new_tokens=number)
        if not isinstance(number, float) or number == float("inf"):
            with pytest.raises(ValueError, match="temperature = "):
                generate(model, Letters(), "abc", temperature=number)

    @pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "x"])
    def test_seeds(self, model, seed):
        with pytest.raises(ValueError, match="seed = .*: expected a whole number from"):
            generate(model, Letters(), "abc", temperature=1.0, seed=seed)

    @pytest.mark.parametrize("prompts", [None, 3, b"abc", {"abc": 1}, ["a", 3], [None]])
    def test_prompts_that_are_no_texts(self, model, prompts):
        with pytest.raises(ValueError, match="found .*expected a "):
            generate(model, Letters(), prompts)
        assert generate(model, Letters(), iter(["abc"])) == [
            generate(model, Letters(), "abc")
        ]

    @pytest.mark.parametrize("rows", [(0, 3), (2, 0)])
    def test_rows_without_tokens(self, model, rows):
        for mask in (torch.ones(rows), torch.zeros(2, 3)):
            ids = torch.ones(mask.shape, dtype=torch.int64)
            with pytest.raises(ValueError, match="a row without tokens"):
                generate_ids(model, ids, mask)

    def test_what_is_no_tokenizer(self, model):
        """The encode of transformers' slow tokenizers puts an end token behind each
        prompt."""
        slow = pytest.importorskip("transformers").ByT5Tokenizer()
        for tokenizer in (None, "lanternwick", slow):
            with pytest.raises(ValueError, match="expected load_tokenizer"):
                generate(model, tokenizer, "abc")
            with pytest.raises(ValueError, match="expected load_tokenizer"):
                encode(tokenizer, Example("abc", " d", {}))

    def test_half_a_character(self, model):
        with pytest.raises(ValueError, match="the prompt is not text"):
            generate(model, Letters(), "ab\ud83d")

    def test_ids_beyond_the_vocabulary(self, model):
        with pytest.raises(ValueError, match="gives the id 40, but .* has 40 tokens"):
            generate_ids(model, torch.tensor([[3, 40]]))

    @pytest.mark.parametrize("style", ["llama", "gpt2"])
    def test_the_context(self, style):
        sizes = dict(SIZES, max_position_embeddings=8, eos_token_id=None)
        model = GPT(GPTConfig(**sizes, model_type=style)).eval()
        with pytest.raises(ValueError, match="has 9 tokens, but .* context holds 8"):
            generate(model, Letters(), "abcdefgh")  # and bos
        rows = torch.tensor([[5, 6, 7, 8]])
        exact = generate_ids(model, rows, max_new_tokens=5)  # the last is not read
        with pytest.warns(UserWarning, match="context of 8 tokens is full"):
            longer = generate_ids(model, rows, max_new_tokens=50)
        assert torch.equal(longer, exact) and exact.shape == (1, 9)
        with pytest.warns(UserWarning, match="full"):  # each row has its own end
            texts = generate(model, Letters(), ["abcdef", "a"], 20)
        with pytest.warns(UserWarning, match="full"):
            assert texts == [generate(model, Letters(), p, 20) for p in ("abcdef", "a")]

    def test_spaces_at_a_prompts_end_are_dropped_as_in_training(self, model):
        whole = generate(model, Letters(), "abc", max_new_tokens=8)
        assert generate(model, Letters(), "abc  ", max_new_tokens=8) == whole
        assert generate(model, Letters(), "abc\n  ", max_new_tokens=8) != whole
