"""Sequence mixers under one contract: filters, an association, an aggregate (:mod:`minitf.mixers.contract`)."""

from minitf.mixers.aft import AttentionFree
from minitf.mixers.average import ExponentialAverage, Uniform
from minitf.mixers.contract import About, Filtered, Mixer
from minitf.mixers.convolution import Convolution
from minitf.mixers.fourier import Fourier
from minitf.mixers.gated import Gru, Lstm, MinimalGru
from minitf.mixers.mamba import Mamba, Mamba2
from minitf.mixers.products import DeltaNet, LinearAttention, Retention
from minitf.mixers.proximity import Proximity
from minitf.mixers.rwkv import Rwkv4, Rwkv6
from minitf.mixers.softmax import Softmax
from minitf.mixers.state_space import DiagonalStateSpace
from minitf.mixers.table import Frozen, Synthesizer
from minitf.mixers.token_network import SpatialGate, TokenNetwork

__all__ = [
    "About",
    "AttentionFree",
    "Convolution",
    "DeltaNet",
    "DiagonalStateSpace",
    "ExponentialAverage",
    "Filtered",
    "Fourier",
    "Frozen",
    "Gru",
    "LinearAttention",
    "Lstm",
    "Mamba",
    "Mamba2",
    "MinimalGru",
    "Mixer",
    "Proximity",
    "Retention",
    "Rwkv4",
    "Rwkv6",
    "Softmax",
    "SpatialGate",
    "Synthesizer",
    "TokenNetwork",
    "Uniform",
]
