"""A small text model for tests of heads on a shared body."""

import torch
from torch import nn


class Body(nn.Module):
    """Embeddings with a layer on them: (B, T) to (B, T, 8)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        return torch.tanh(self.layer(self.embedding(input_ids)))
