"""Adam whose two moments take four bits a weight (Li, Chen and Zhu, NeurIPS 2023), as an optax transformation.

``codebooks`` are the levels that a code stands for, ``packing`` puts two codes in a byte, ``quantized`` is a
tensor as codes and scales, ``layout`` says which tensors a weight of a model is, ``coding`` how its moments are
coded, ``moments`` is the step of one weight, and ``adam`` the transformation.
"""

from minitf.train.fourbit.adam import (
    Adam4BitState,
    Moments,
    adamw_4bit,
    as_adam,
    from_adam,
    scale_by_adam_4bit,
    state_bytes,
)
from minitf.train.fourbit.codebooks import Codebook, dynamic_exponent, linear
from minitf.train.fourbit.coding import MomentCoding
from minitf.train.fourbit.quantized import Quantized, dequantize, quantize

__all__ = [
    "Adam4BitState",
    "Codebook",
    "MomentCoding",
    "Moments",
    "Quantized",
    "adamw_4bit",
    "as_adam",
    "dequantize",
    "dynamic_exponent",
    "from_adam",
    "linear",
    "quantize",
    "scale_by_adam_4bit",
    "state_bytes",
]
