"""Make the reference files from the peers: ``python tests/parity/make_references.py`` (needs the peers extra).

Every weight is drawn by numpy from the name it has in the peer, so that the files depend on no library's
initializer. What is compared is what the peer computes in float64; its own float32 logits lie beside them.
"""

import contextlib
import json
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

import minitf

# Behind minitf, which must not be taken for the folder of its tests.
sys.path.append(str(Path(__file__).parents[1]))

from parity.families import FAMILIES

FOLDER = Path(__file__).parent / "references"
GRADIENTS = ("embedding", "layers.attention.query", "layers.attention.output", "layers.feed_forward.into")
BATCH, LENGTH, PADDED = 2, 10, 7


class DoubleTorch:
    """The module ``torch`` whose single precision is double: peers cast norms and softmax to float32 by name."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def double_precision(module):
    """Everything that a peer's module computes, in float64, its casts to float32 included."""
    single = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    module.torch = DoubleTorch()
    try:
        yield
    finally:
        module.torch = torch
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def draw_weights(model):
    """Weights of ordinary size in every parameter, the same for ever."""
    for name, parameter in model.named_parameters():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        values = generator.normal(size=parameter.shape)
        if parameter.ndim == 1:
            values = 0.2 * values + float(name.endswith("weight"))
        else:
            values /= np.sqrt(parameter.shape[-1])
        # Both precisions start from the same numbers, of which two can be added exactly in float32.
        parameter.data = torch.tensor(np.round(values * 2**14) / 2**14, dtype=parameter.dtype)


def inputs(vocabulary):
    tokens = np.random.default_rng(0).integers(vocabulary, size=(BATCH, LENGTH))
    valid = np.arange(LENGTH)[None, :] < np.array([LENGTH, PADDED])[:, None]
    return tokens, valid


def gradients(model, family, output):
    """Of the mean of the output under fixed weights, in minitf's names."""
    probe = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    torch.mean(output * probe).backward()
    peers = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in model.named_parameters()
    }
    mapped = family.weights(peers)
    return {name: mapped[name] for name in GRADIENTS}


def run(family, valid, tokens):
    model = family.build()
    draw_weights(model)
    return model, family.run(model, torch.tensor(tokens), torch.tensor(valid))


def make(family):
    """All arrays of one reference file, by name."""
    tokens, padding = inputs(family.config.vocabulary)
    everything = np.ones_like(padding)  # no padding
    model, single = run(family, everything, tokens)
    arrays = {f"weights.{name}": value for name, value in family.weights(numbers(model)).items()}
    arrays |= {"tokens": tokens.astype(np.int32), "valid": padding}
    arrays["float32.output"] = single["output"].detach().numpy()
    with double_precision(family.module):
        model, found = run(family, everything, tokens)
        arrays |= {f"gradient.{n}": g for n, g in gradients(model, family, found["output"]).items()}
        _, padded = run(family, padding, tokens)
    arrays |= {f"full.{name}": value.detach().numpy() for name, value in found.items()}
    arrays |= {f"padded.{name}": padded[name].detach().numpy() for name in ("output", "layers.pattern")}
    # safetensors writes the memory as it lies, whatever the strides.
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def numbers(model):
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def main():
    FOLDER.mkdir(exist_ok=True)
    peer = f"torch {torch.__version__}, transformers {transformers.__version__}"
    for name, family in FAMILIES.items():
        about = {
            "config": json.dumps(asdict(family.config)),
            "output": family.output,
            "peer": peer,
            "minitf": minitf.__version__,
        }
        save_file(make(family), FOLDER / f"{name}.safetensors", metadata=about)


if __name__ == "__main__":
    main()
