"""What is said of Adam with few bits, beside what it measures here.

Figures of the papers are of models that would take days; tensors, gradients and the model here are made up and
small. So a claim is of an order or of a factor, unless it follows from levels and decays alone.
"""

import jax
import numpy as np
import optax

from minitf import ModelConfig, initialize
from minitf.analysis.claims import Claim, claim, mean_ci95
from minitf.analysis.fourbit.moments import drift, momentum_of
from minitf.analysis.fourbit.probes import FIRST, PATTERNS, SECOND, first_error, second_error
from minitf.analysis.fourbit.training import DIVERGING, OPTIMIZERS, runs
from minitf.train.fourbit import scale_by_adam_4bit, state_bytes

PAPER = "Li, Chen and Zhu, NeurIPS 2023 (arXiv 2309.01507)"
DERIVED = "from the levels and decays of arXiv 2309.01507 and of its code"
# Adam with block scales is nowhere near this far from where it started after some hundred steps of rate 3e-3.
FAR = 100.0


def measure(quick: bool = False) -> list[Claim]:
    """All claims; ``quick`` leaves out those on training, which take a minute to compile."""
    return [
        *memory_claims(),
        *first_moment_claims(),
        *second_moment_claims(),
        *frozen_claims(),
        *sign_claims(),
        *([] if quick else training_claims()),
    ]


def memory_claims() -> list[Claim]:
    """Bytes of GPT-2's moments, from shapes alone."""
    config = ModelConfig(vocabulary=50257, layers=12, width=768, heads=12, length=1024, tied=True, biases=True)
    shapes = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    whole = state_bytes(shapes, optax.scale_by_adam())
    share = lambda second: state_bytes(shapes, scale_by_adam_4bit(second=second)) / whole
    statistic = "bytes of state over those in float32, GPT-2 of 124 million parameters"
    return [
        claim(
            "fourbit.memory",
            "Moments of four bits take less than an eighth of float32's memory, and scales hardly any.",
            source=f"{PAPER}, section 5: 4 + 32/128 bits, and 4 + 32 (n + m) / (n m)",
            statistic=statistic,
            value=share("rank1_linear"),
            direction="<",
            threshold=0.135,
            note="at least 1/8, by the codes alone; the scales are the rest",
        ),
        claim(
            "fourbit.memory_factored",
            "With a factored second moment, they take about a fifteenth.",
            source=f"{PAPER}, section 4.3",
            statistic=statistic,
            value=share("factored"),
            direction="<",
            threshold=0.07,
        ),
    ]


def first_moment_claims() -> list[Claim]:
    """What small blocks do for a first moment with outliers."""
    errors = {(name, p): first_error(coding, p) for name, coding in FIRST.items() for p in PATTERNS[:3]}
    table = "; ".join(
        f"{name}: " + ", ".join(f"{p} {errors[name, p][0]:.3f} / {errors[name, p][1]:.3f}" for p in PATTERNS[:3])
        for name in FIRST
    )
    note = f"error of what is no outlier / share of it that becomes 0. {table}"
    ratio = lambda pattern: errors["4-bit B2048", pattern][0] / errors["4-bit B128", pattern][0]
    source = f"{PAPER}, section 3 and figure 1"
    return [
        claim(
            "fourbit.small_blocks",
            "Where outliers stand in one column, blocks of 128 halve the error of blocks of 2048.",
            source=source,
            statistic="error with blocks of 2048 over that with 128; 512 x 768 normal numbers, a column times 60",
            value=ratio("columns"),
            direction=">",
            threshold=1.8,
            note=note,
        ),
        claim(
            "fourbit.small_blocks_rows",
            "Where outliers fill rows, the size of blocks matters less than half as much.",
            source=source,
            statistic="error with blocks of 2048 over that with 128 less 1, rows over columns",
            value=(ratio("rows") - 1) / (ratio("columns") - 1),
            direction="<",
            threshold=0.5,
        ),
        claim(
            "fourbit.bits",
            "Four bits cost some 15 times the error of eight.",
            source=DERIVED,
            statistic="error of four bits over that of eight, normal numbers, blocks of 128",
            value=errors["4-bit B128", "plain"][0] / errors["8-bit B128", "plain"][0],
            direction="within",
            threshold=(10.0, 20.0),
        ),
    ]


def second_moment_claims() -> list[Claim]:
    """How far off steps would be after coding a second moment."""
    errors = {(name, p): second_error(coding, p) for name, coding in SECOND.items() for p in PATTERNS}
    table = "; ".join(
        f"{name}: " + ", ".join(f"{p} {errors[name, p][0]:.2f} / {errors[name, p][1]:.2f}" for p in PATTERNS)
        for name in SECOND
    )
    note = f"rms of log10 h(decoded) / h(v), h(v) = 1 / (sqrt(v) + 1e-6) / share that becomes 0. {table}"
    off = lambda name, pattern: errors[name, pattern][0]
    ratio_of_maps = [off(f"{s}/linear", p) / off(f"{s}/DE-0", p) for s in ("B128", "rank-1") for p in PATTERNS]
    return [
        claim(
            "fourbit.zero_point",
            "With 0 among the levels, many second moments become 0 where outliers stand in columns.",
            source=f"{PAPER}, section 4.1 and figure 3",
            statistic="share of zeros, B128/linear with 0 and B128/DE, each for columns, then rows and columns",
            value=[errors[name, p][1] for name in ("B128/linear with 0", "B128/DE") for p in PATTERNS[2:]],
            direction=">",
            threshold=0.1,
            note=note,
        ),
        claim(
            "fourbit.no_zero",
            "Without 0 among the levels, no second moment becomes 0.",
            source=f"{PAPER}, section 4.1",
            statistic="share of zeros, DE-0 and linear levels, blocks and rank 1, all patterns",
            value=[
                errors[f"{s}/{m}", p][1] for s in ("B128", "rank-1") for m in ("DE-0", "linear") for p in PATTERNS
            ],
            direction="==",
            threshold=0.0,
        ),
        claim(
            "fourbit.rank1_columns",
            "Scales of rows and columns serve outliers in columns better than scales of blocks.",
            source=f"{PAPER}, section 4.2",
            statistic="error with blocks over that with rank 1, for DE-0 and linear levels",
            value=[off(f"B128/{m}", "columns") / off(f"rank-1/{m}", "columns") for m in ("DE-0", "linear")],
            direction=">",
            threshold=2.0,
        ),
        claim(
            "fourbit.rank1_always",
            "Scales of rows and columns are better than those of blocks wherever outliers stand.",
            source=f"{PAPER}, section 4.2, as it could be read; it says itself that it depends",
            statistic="error with blocks over that with rank 1, DE-0 levels, for " + ", ".join(PATTERNS),
            value=[off("B128/DE-0", p) / off("rank-1/DE-0", p) for p in PATTERNS],
            direction=">",
            threshold=1.0,
            expected=False,
            note="a block lies within a row, and has its own scale; where both rows and columns are large, the "
            "lesser of the two is far above most numbers",
        ),
        claim(
            "fourbit.linear_is_best",
            "Linear levels code second moments better than DE-0.",
            source=f"{PAPER}, table 1: BLEU 67.8 against 67.5, with deviations of .5",
            statistic="error with linear levels over that with DE-0; blocks, then rank 1, for "
            + ", ".join(PATTERNS),
            value=ratio_of_maps,
            direction="<",
            threshold=1.0,
            expected=False,
            note="by this probe DE-0 is better everywhere. Linear's error has one sign: what is below 1/16 of the "
            "scale is rounded up, and steps become smaller.",
        ),
    ]


def frozen_claims(steps: int = 1500) -> list[Claim]:
    """Whether codes still change when a second moment is long in training."""
    slow = {name: drift(steps, b2=0.999, second=name) for name in ("block_linear", "rank1_linear", "block_de0")}
    rounded = drift(steps, b2=0.999, second="block_linear", stochastic=True)
    fast = drift(steps, b2=0.95, second="rank1_linear")
    statistic = (
        f"share of bytes of codes that differ after {steps} steps from two thirds of them; stationary gradients"
    )
    bias = ", ".join(f"{name} {d.bias:+.2f} +- {d.spread:.2f}" for name, d in slow.items())
    return [
        claim(
            "fourbit.frozen",
            "With b2 = .999, linear levels and the nearest of them, codes of the second moment stop changing.",
            source="SOLO (signal swamping) and " + DERIVED,
            statistic=statistic + "; blocks, rank 1",
            value=[slow["block_linear"].changed, slow["rank1_linear"].changed],
            direction="<",
            threshold=0.001,
            note=f"log10 of the coded over the exact moment: {bias}. A step moves a moment by some .001 of "
            "its scale, and half a level is 1/32: it follows its data by its scales alone.",
        ),
        claim(
            "fourbit.not_frozen",
            "Levels that are dense near 0, rounding at random, or b2 = .95 keep them changing.",
            source="SOLO and " + DERIVED,
            statistic=statistic + "; block_de0, block_linear at random, rank1_linear with b2 = .95",
            value=[slow["block_de0"].changed, rounded.changed, fast.changed],
            direction=">",
            threshold=0.05,
        ),
    ]


def sign_claims() -> list[Claim]:
    """What the missing level -1 does to a momentum."""
    values = [
        float(momentum_of(-1.0)[0]),
        float(momentum_of(1.0)[0]),
        float(momentum_of(-1.0, signed_scale=True)[0]),
        float(momentum_of(-1.0, bits=8)[0]),
    ]
    expected = [0.1 / (1 - 0.9 * 0.8875), 1.0, 1.0, 0.9404]
    return [
        claim(
            "fourbit.sign",
            "A constant negative gradient makes half its momentum, lacking a level -1; a signed scale mends it.",
            source=DERIVED + ": (1 - b1) / (1 - .8875 b1)",
            statistic="momentum over the true one: negative; positive; negative, signed scale; negative, 8 bit",
            value=values,
            direction="within",
            threshold=[(x - 0.001, x + 0.001) for x in expected],
        )
    ]


def training_claims(seeds: int = 5, steps: int = 300) -> list[Claim]:
    """A small model by several optimizers."""
    found = runs({**OPTIMIZERS, **DIVERGING}, seeds, steps)
    whole = found["32 bit"].loss
    few = [name for name in OPTIMIZERS if name != "32 bit"]
    difference = [float(np.mean(found[name].loss - whole) / np.std(whole, ddof=1)) for name in few]
    losses = ", ".join(f"{name} {mean_ci95(run.loss)[0]:.4f}" for name, run in found.items())
    far = lambda names: [float(found[name].farthest.max()) for name in names]
    return [
        claim(
            "fourbit.loss",
            "Trained with moments of four bits, a model is as good as with those of 32.",
            source=f"{PAPER}, table 2",
            statistic="mean loss less that of 32 bit, paired, over the deviation of the latter between seeds; "
            + ", ".join(few),
            value=difference,
            direction="within",
            threshold=(-1.0, 1.0),
            n=seeds,
            note=f"held-out nats: {losses}; one layer, width 32, a Markov chain of 16 tokens, {steps} steps",
        ),
        claim(
            "fourbit.diverges",
            "With 0 among the levels of the second moment training diverges.",
            source=f"{PAPER}, table 1: 66 % of runs unstable with B128/DE",
            statistic="largest weight at the end, of any seed; " + ", ".join(DIVERGING),
            value=far(DIVERGING),
            direction=">",
            threshold=FAR,
            n=seeds,
        ),
        claim(
            "fourbit.stays",
            "Without, it does not.",
            source=f"{PAPER}, table 1",
            statistic="largest weight at the end, of any seed; " + ", ".join(OPTIMIZERS),
            value=far(OPTIMIZERS),
            direction="<",
            threshold=FAR,
            n=seeds,
        ),
    ]
