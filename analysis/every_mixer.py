"""The sequence mixers by the names that tables and reports give them."""

from collections.abc import Mapping

from minitf import mixers
from minitf.mixers import Mixer

EVERY: Mapping[str, Mixer] = {
    "softmax": mixers.Softmax(),
    "uniform": mixers.Uniform(),
    "exponential average": mixers.ExponentialAverage(),
    "frozen": mixers.Frozen(),
    "synthesizer, fixed": mixers.Synthesizer("fixed"),
    "synthesizer, trained": mixers.Synthesizer("trained"),
    "synthesizer, factored": mixers.Synthesizer("factored"),
    "synthesizer, dense": mixers.Synthesizer("dense"),
    "proximity": mixers.Proximity(),
    "FNet": mixers.Fourier(),
    "gMLP": mixers.SpatialGate(),
    "MLP-Mixer": mixers.TokenNetwork(),
    "linear attention": mixers.LinearAttention(),
    "RetNet": mixers.Retention(),
    "DeltaNet": mixers.DeltaNet(),
    "AFT full": mixers.AttentionFree(),
    "AFT simple": mixers.AttentionFree("simple"),
    "AFT local": mixers.AttentionFree("local"),
    "AFT conv": mixers.AttentionFree("conv"),
    "RWKV-4": mixers.Rwkv4(),
    "RWKV-6": mixers.Rwkv6(),
    "S4D": mixers.DiagonalStateSpace(),
    "Mamba": mixers.Mamba(),
    "Mamba-2": mixers.Mamba2(),
    "minGRU": mixers.MinimalGru(),
    "GRU": mixers.Gru(),
    "LSTM": mixers.Lstm(),
    "convolution": mixers.Convolution(),
}

# Every position sees all others: not for causal models.
BOTH_WAYS = ("FNet",)
