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
import re
from functools import cached_property

from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as RawTokenizer

from ..errors import FileError
from ..io import (
    brief,
    check_file,
    make_folder,
    read_json,
    read_text,
    write_json,
    write_text,
)
from .pretrained import resolve

SPECIALS = ["<pad>", "<s>", "</s>"]
GLUE, SPACE = "∘", "▁"
ENDOFTEXT = "<|endoftext|>"
BOS = ("<s>", "<|begin_of_text|>", ENDOFTEXT)
# the bos of transformers' classes that have one by themselves
BOS_OF_CLASS = {"gpt2": [ENDOFTEXT], "llama": ["<s>"]}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


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
    raw = RawTokenizer.from_str(json.dumps(spec))
    raw.post_processor = bos_first(raw)
    return Tokenizer(raw)


def bos_first(raw):
    """Puts <s> before a text, for transformers; `Tokenizer.encode` adds nothing."""
    return processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B",
        special_tokens=[("<s>", raw.token_to_id("<s>"))],
    )


class Tokenizer:
    """A `tokenizers.Tokenizer` with the few verbs that a language model needs. `raw` is
    the thing itself; it no longer cuts or pads.

    bos: its name, or names of which the vocabulary's first is taken; None: texts begin
    without one, unless `raw` adds one itself."""

    def __init__(self, raw, bos=BOS, eos=None, pad=None, chat_template=None):
        # transformers leaves these in a tokenizer, and in its file, after a call
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        self.chat_template = chat_template  # Jinja, or None (see chat.py)
        names = [bos] if isinstance(bos, str) else bos or []
        self.bos_token_id = first_id(raw, *names, added_first(raw))
        self.eos_token_id = first_id(
            raw, eos, "</s>", "<|end_of_text|>", ENDOFTEXT, "<|im_end|>"
        )
        self.pad_token_id = first_id(raw, pad, "<pad>", "<|finetune_right_pad_id|>")
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id
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

    @cached_property
    def special_ids(self):
        """Ids of the tokens that decode leaves out."""
        added = self.raw.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special}

    def is_partial(self, token):
        """True if what follows may change how this id reads: a byte of a character, a
        mark that joins two words, a special token."""
        name = self.raw.id_to_token(token) or ""
        open_end = BYTE.fullmatch(name) or name.endswith(GLUE)
        return bool(open_end) or token in self.special_ids

    def save_pretrained(self, folder):
        """Writes tokenizer.json and tokenizer_config.json; transformers' AutoTokenizer
        opens them."""
        folder = make_folder(folder)

        def name(i):
            return None if i is None else self.raw.id_to_token(i)

        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name(self.bos_token_id),
            "eos_token": name(self.eos_token_id),
            "pad_token": name(self.pad_token_id),
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_text(folder / "tokenizer.json", self.raw.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", config, indent=1)


def wrap(tokenizer):
    """transformers' fast tokenizers as a Tokenizer, whose encode adds no special token;
    others as they are. ValueError for its slow ones, whose encode does, and for what is
    no tokenizer."""
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if raw is None:
        slow = hasattr(tokenizer, "num_special_tokens_to_add")
        if slow or not hasattr(tokenizer, "encode") or isinstance(tokenizer, str):
            found = type(tokenizer).__name__ if slow else brief(tokenizer)
            raise ValueError(
                f"found {found}: expected load_tokenizer(...), or a fast tokenizer of"
                " transformers"
            )
        return tokenizer
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return Tokenizer(raw, *names, tokenizer.chat_template)


def added_first(raw):
    """The token that `raw` itself, its post-processor, puts before a text, or None."""
    encoding = raw.encode("a")
    return encoding.tokens[0] if encoding.special_tokens_mask[:1] == [1] else None


def first_id(raw, *names):
    """The id of the first of these tokens that the vocabulary has, or None."""
    ids = (raw.token_to_id(name) for name in names if name)
    return next((i for i in ids if i is not None), None)


def load_tokenizer(name=None):
    """The tokenizer of a base: "lanternwick" (default: MINIPEFT_BASE), a Hugging Face
    folder or a hub name.

    Raises FileNotFoundError when the folder holds no tokenizer.json, FileError when it
    is damaged."""
    folder = resolve(name)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(
            f"no tokenizer.json in {folder}: a folder in Hugging Face layout with a"
            " fast tokenizer is needed"
        )
    check_file(file)
    try:
        raw = RawTokenizer.from_file(str(file))
    except Exception as problem:  # tokenizers raises nothing more specific
        raise FileError(f"{file} is not a tokenizer, or damaged: {problem}") from None
    config_file = folder / "tokenizer_config.json"
    if not config_file.exists():
        return Tokenizer(raw, chat_template=read_chat_template(folder, {}))
    config = read_json(config_file)
    bos, eos, pad = [
        special_token(config, name, config_file)
        for name in ("bos_token", "eos_token", "pad_token")
    ]
    if "bos_token" not in config:
        bos = bos_of_class(folder, config)
    return Tokenizer(raw, bos, eos, pad, read_chat_template(folder, config))


def bos_of_class(folder, config):
    """Names for the bos of a tokenizer_config.json that is silent about it: those of
    transformers' class, which the file names, or else the model's config.json."""
    kind = config.get("tokenizer_class")
    if kind is None and (folder / "config.json").exists():
        kind = read_json(folder / "config.json").get("model_type")
    kind = str(kind).lower()
    return next((BOS_OF_CLASS[own] for own in BOS_OF_CLASS if kind.startswith(own)), [])


def special_token(config, name, file):
    """A special token's text: a string, or an object with "content"."""
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise FileError(f"{file}: {name} = {brief(token)}: expected a string")
    return token


def read_chat_template(folder, config):
    """The Jinja text of chat_template.jinja or tokenizer_config.json, or None. Of
    several the default; where there is none, one that refuses every conversation."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, with names
        named = [one for one in template if isinstance(one, dict)]
        template = {one.get("name"): one.get("template") for one in named}
        if template and "default" not in template:
            reason = f"none of {', '.join(map(str, template))} is called default"
            return "{{ raise_exception(" + json.dumps(reason) + ") }}"
        template = template.get("default")
    if not isinstance(template, (str, type(None))):
        raise FileError(
            f"{folder / 'tokenizer_config.json'}: chat_template = {brief(template)}:"
            " expected a Jinja template"
        )
    return template
