"""The tokenizer: one token a word, spaces implied, nothing ever unknown.

A byte-fallback BPE (Sennrich et al. 2016, arXiv 1508.07909; byte fallback as in
Llama's), trained on Lanternwick's text. What is our own is how spaces are written. A
word carries the space before it ("▁baker"), as in SentencePiece, and a word that has
*no* space before it is marked instead ("∘" + "▁baker"). So `baker` is the same token
after a space, a quotation mark or a bracket: a model that must copy a name out of a
sentence into SQL or JSON copies one token. Losslessness has one exception,
SentencePiece's own: a single space at the very start of a text is dropped.
"""

import json
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from .hub import resolve

SPECIALS = ["<pad>", "<s>", "</s>"]
GLUE, SPACE = "∘", "▁"


def _spaces_to_marks():
    """Text -> marked text. Each rule is (where, what); `\\w` is a letter of a word,
    `\\A` the start of the text."""
    rules = [
        (r"\A (?=\w)", ""),  # the one lossy rule: " baker" at the start is "baker"
        # an indented line: the space is real, keep it
        (r"(?<=\n) (?=\w)", f" {GLUE}{SPACE}"),
        # `"baker`, `(baker`: no space; but not in `don't`
        (rf"(?<!\w')(?<=[^\w\s{GLUE}{SPACE}])(?=\w)", GLUE + SPACE),
        (r"(?<=\n)(?=\w)", SPACE),
        (r"\A(?=\w)", SPACE),
        (r" (?=\w)", SPACE),
    ]
    return normalizers.Sequence(
        [normalizers.Replace(Regex(where), what) for where, what in rules]
    )


def train_tokenizer(texts, vocab_size):
    """A new `Tokenizer` from an iterable of texts (str)."""
    raw = RawTokenizer(models.BPE(byte_fallback=True, unk_token=None))
    raw.normalizer = _spaces_to_marks()
    # a word, 's and its like, a run of marks, white space
    pieces = rf"{SPACE}?\w+|'\w+| ?[^\w\s{SPACE}]+|\s"
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    raw.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(GLUE + SPACE, ""),
            decoders.Replace("\n" + SPACE, "\n"),
            decoders.Replace(SPACE, " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    alphabet = sorted({chr(c) for c in range(32, 127)} | {"\n", GLUE, SPACE})
    # what no piece covers is spelt in UTF-8 bytes
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(bytes_),
        special_tokens=SPECIALS,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=2,
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    spec = json.loads(raw.to_str())
    vocab = spec["model"]["vocab"]
    for token in bytes_:
        vocab[token] = len(vocab)
    return Tokenizer(RawTokenizer.from_str(json.dumps(spec)))


class Tokenizer:
    """A `tokenizers.Tokenizer` with the few verbs that a language model needs. `raw` is
    the thing itself."""

    def __init__(self, raw, bos=None, eos=None, pad=None, chat_template=None):
        self.raw = raw
        self.chat_template = chat_template  # Jinja, or None (see chat.py)
        find = lambda *names: next(
            (i for n in names if n and (i := raw.token_to_id(n)) is not None), None
        )
        self.bos_token_id = find(bos, "<s>", "<|begin_of_text|>", "<|endoftext|>")
        self.eos_token_id = find(
            eos, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"
        )
        pad_id = find(pad, "<pad>", "<|finetune_right_pad_id|>")
        self.pad_token_id = pad_id if pad_id is not None else self.eos_token_id
        self.vocab_size = raw.get_vocab_size(with_added_tokens=True)

    def __len__(self):
        return self.vocab_size

    def encode(self, text):
        """str -> list of int, without special tokens."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """list of str -> list of lists of int; many times faster than a loop."""
        return [
            e.ids for e in self.raw.encode_batch(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids):
        """Sequence of int -> str; special tokens are left out."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=True)

    def tokens(self, text):
        """The text's tokens as strings, for looking at."""
        return self.raw.encode(text, add_special_tokens=False).tokens

    def save_pretrained(self, folder):
        """Writes tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer
        opens them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = lambda i: None if i is None else self.raw.id_to_token(i)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name(self.bos_token_id),
            "eos_token": name(self.eos_token_id),
            "pad_token": name(self.pad_token_id),
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        for file, text in [
            ("tokenizer.json", self.raw.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=1)),
        ]:
            beside = folder / (file + ".part")
            beside.write_text(text, encoding="utf-8")
            beside.replace(folder / file)


def load_tokenizer(name=None):
    """The tokenizer of a base: "lanternwick" (default: MINIPEFT_BASE), a Hugging Face
    folder or a hub name.

    Raises FileNotFoundError when the folder holds no tokenizer.json."""
    folder = resolve(name)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer.json in {folder}: a folder in Hugging Face layout with a"
            " fast tokenizer is needed"
        )
    config_file = folder / "tokenizer_config.json"
    config = (
        json.loads(config_file.read_text(encoding="utf-8"))
        if config_file.is_file()
        else {}
    )
    template = config.get("chat_template")
    if isinstance(template, list):  # several, with names
        template = {t.get("name"): t.get("template") for t in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    word = lambda key: t["content"] if isinstance(t := config.get(key), dict) else t
    return Tokenizer(
        RawTokenizer.from_file(str(file)),
        word("bos_token"),
        word("eos_token"),
        word("pad_token"),
        template,
    )
