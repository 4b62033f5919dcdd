"""The transformer of the paper, from torch's own layers; and how to catch what goes through a module."""

import math

import torch
from torch import nn


def caught(module: nn.Module, found: dict, name: str, output: bool = False) -> None:
    """Keep what goes into a module (or comes out of it) as one more layer of a leaf."""

    def keep(_module, arguments, result=None):
        value = result if output else arguments[0]
        found.setdefault(name, []).append(value)

    if output:
        module.register_forward_hook(keep)
    else:
        module.register_forward_pre_hook(keep)


class PostNormEncoder(nn.Module):
    """Vaswani et al. 2017 from torch's own layers: scaled embedding, sinusoids, post-norm, ReLU."""

    def __init__(self, vocabulary, width, hidden, layers, heads):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, valid):
        length = tokens.shape[1]
        place, column = torch.arange(length)[:, None], torch.arange(0, self.width, 2)[None, :]
        angle = place.double() / 10000 ** (column.double() / self.width)
        position = torch.stack([torch.sin(angle), torch.cos(angle)], dim=-1).reshape(length, self.width)
        x = self.embedding(tokens) * math.sqrt(self.width) + position.to(self.embedding.weight.dtype)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        leaves: dict[str, list] = {"layers.resid_pre": [], "layers.pattern": [], "layers.resid_mid": []}
        for layer in self.layers:
            masks = {"attn_mask": future, "key_padding_mask": ~valid}
            _, pattern = layer.self_attn(x, x, x, **masks, average_attn_weights=False)
            leaves["layers.resid_pre"].append(x)
            leaves["layers.pattern"].append(pattern)
            caught(layer.norm1, leaves, "layers.resid_mid", output=True)
            x = layer(x, src_mask=future, src_key_padding_mask=~valid)
        stacked = {name: torch.stack(values) for name, values in leaves.items()}
        return stacked | {"output": self.head(x), "context": x, "end": x}
