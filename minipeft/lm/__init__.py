"""The language model: its network, tokenizer, files, text generation, training and
evaluation."""

from .data import load_data
from .evaluation import evaluate
from .generation import generate
from .gpt import GPT, GPTConfig
from .hf_format import save_pretrained
from .memory import memory_ledger
from .pretrained import load_pretrained
from .shapes import SHAPES, on_paper
from .tokenizer import Tokenizer, load_tokenizer
from .training import train
