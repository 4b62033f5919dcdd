"""A small model of random weights, in a folder as a user has one, and tokens whose texts break careless pages."""

import jax

from minitf import ModelConfig, initialize
from minitf.pretrained import Pretrained, save

CONFIG = ModelConfig(
    vocabulary=20, layers=2, width=12, heads=3, length=16, hidden=48, biases=True, tied=True, norm="layer"
)
EVIL = ["<script>alert(1)</script>", "</script><b>bold</b>", "&amp;", "$x^2$", "<!--", "tab\t"]


class EvilTokenizer:
    """Every text is the tokens 0, 1, 2, ..., which are written as what breaks pages."""

    name, n_vocab = "evil", CONFIG.vocabulary

    def encode(self, text):
        return list(range(len(text)))

    def decode(self, ids):
        return "".join(self.decode_single_token_bytes(i).decode() for i in ids)

    def decode_single_token_bytes(self, token):
        return (EVIL[token] if token < len(EVIL) else f"t{token}").encode()


def model(tokenizer=None):
    parameters = initialize(CONFIG, jax.random.key(0))
    # Of ordinary size, so that heads look somewhere and logits differ.
    return Pretrained("gpt2", CONFIG, jax.tree.map(lambda x: 20 * x, parameters), tokenizer)


def saved(folder):
    save(folder, model())
    return folder
