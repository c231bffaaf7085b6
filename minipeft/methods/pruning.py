"""Which triplets of an AdaLoRA are left: in the adapter, and in its file. See
adalora.py for the equation, rank_allocator.py for the choice."""

import torch
from torch import nn

from ..slot import LinearDelta


class PrunableDelta(LinearDelta):
    """The book-keeping of pruning: which of the init_r triplets a layer has."""

    def __init__(self, rank_pattern):
        super().__init__()
        self.rank_pattern = rank_pattern  # [does this layer have the triplet?], init_r
        self.kept = [True] * sum(rank_pattern)  # of those it has: [not pruned?]

    def to_file(self):
        """Only what is kept."""
        kept = torch.tensor(self.kept, dtype=torch.bool)
        return {
            "lora_A": self.lora_A[kept],
            "lora_B": self.lora_B[:, kept],
            "lora_E": self.lora_E[kept],
        }

    def pruned_pattern(self):
        """rank_pattern without what is pruned"""
        kept = iter(self.kept)
        return [there and next(kept) for there in self.rank_pattern]

    def drop_pruned(self):
        """Free the memory of the pruned triplets, for good. Create a new optimizer
        afterwards."""
        trained = self.lora_E.requires_grad
        for name, tensor in self.to_file().items():
            setattr(self, name, nn.Parameter(tensor.detach().clone(), trained))
        self.rank_pattern = self.pruned_pattern()
        self.kept = [True] * len(self.lora_E)
