"""P-tuning: a small network computes the prompt, so that its vectors are learned
together.

    model([f(Z); E(x)]),    Z (n, d) and the network f trained

Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385. The network is for training
only: files hold f(Z), an ordinary prompt. (P-tuning v2 is a different method: see
prefix.py.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .prompt import Prompt
from .virtual import VirtualTokensConfig


class LSTMEncoder(nn.Module):
    """MLP(BiLSTM(Z)), (n, d) -> (n, d): each virtual token depends on all others."""

    def __init__(self, d, h, num_layers, dropout):
        super().__init__()
        self.lstm = nn.LSTM(d, h, num_layers, dropout=dropout, bidirectional=True)
        self.mlp = nn.Sequential(
            nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d)
        )

    def forward(self, Z):
        hidden, _ = self.lstm(Z)  # (n, 2 h)
        return self.mlp(hidden)


@dataclass(kw_only=True)
class PromptEncoderConfig(VirtualTokensConfig):
    """Hugging Face PEFT's fields and defaults."""

    peft_type: ClassVar[str] = "P_TUNING"
    belongs_to: ClassVar[dict] = {
        "encoder_num_layers": ("encoder_reparameterization_type", "LSTM"),
        "encoder_dropout": ("encoder_reparameterization_type", "LSTM"),
    }
    # or "LSTM", bidirectional, as in the paper
    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None  # None: the model's width
    # of the LSTM; the MLP always has three matrices
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0  # between the LSTM's layers

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("encoder_reparameterization_type", ("MLP", "LSTM"))
        self.check_number("encoder_hidden_size", whole=True, least=1, also=(None,))
        self.check_positive("encoder_num_layers")
        self.check_probability("encoder_dropout")

    def create(self, base, path):
        d = self.token_dim
        h = self.encoder_hidden_size
        Z = torch.randn(self.num_virtual_tokens, d)
        if self.encoder_reparameterization_type == "LSTM":
            layers, dropout = self.encoder_num_layers, self.encoder_dropout
            return Prompt(Z, LSTMEncoder(d, h, layers, dropout))
        mlp = nn.Sequential(
            nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d)
        )
        return Prompt(Z, mlp)
