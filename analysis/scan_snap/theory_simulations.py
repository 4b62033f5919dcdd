"""Simulations that the theory's claims are measured on: the decoder alone, and the closed attention system.

Both use the exact shortcut Y = F C, with F the features of the K classes, and outputs that are
never a label share one column of C (so C has K + 1 columns, the last of multiplicity M - K). Everything runs
in float64 under a local ``enable_x64``.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minitf.analysis.scan_snap import theory

Scalar = Array | float


def equal_gram(overlap: float, classes: int) -> Float[np.ndarray, "classes classes"]:
    """F^T F when any two of the classes overlap by ``overlap``."""
    return (1 - overlap) * np.eye(classes) + overlap


def _residuals(logits: Array, vocabulary: Scalar) -> tuple[Array, Array]:
    """e_n - alpha_n for logits [class, outputs], row n being class n; and each output's multiplicity."""
    classes, outputs = logits.shape
    multiplicity = jnp.ones(outputs).at[classes].set(vocabulary - classes)
    masked = jnp.where(multiplicity > 0, logits, -jnp.inf)
    weight = jnp.exp(masked - masked.max(axis=1, keepdims=True))
    alpha = weight / jnp.sum(weight * multiplicity, axis=1, keepdims=True)
    return jnp.eye(classes, outputs) - alpha, multiplicity


@jax.jit
def _train_frozen_decoder(
    start: Array, gram: Array, mixing: Array, order: Array, eta_y: Scalar, vocabulary: Scalar
) -> Array:
    def step(coefficients: Array, visited: Array) -> tuple[Array, None]:
        residual, _ = _residuals(gram @ coefficients, vocabulary)
        return coefficients + eta_y * jnp.outer(mixing[:, visited], residual[visited]), None

    return jax.lax.scan(step, start, order)[0]


@jax.jit
def _push_coefficients(coefficients: Array, gram: Array, vocabulary: Scalar) -> Array:
    residual, multiplicity = _residuals(gram @ coefficients, vocabulary)
    return jnp.einsum("fo,no,o->fn", coefficients, residual, multiplicity)


def frozen_decoder(
    gram: Float[np.ndarray, "classes classes"],
    vocabulary: int,
    eta_y: float,
    order: Int[np.ndarray, "seeds steps"],
    record: Sequence[int],
    *,
    modified: bool,
) -> tuple[Float[np.ndarray, "seeds records classes outputs"], Float[np.ndarray, "seeds records f n"]]:
    """Batch-1 SGD on Y with frozen features; the classes are visited in the given order.

    ``modified`` is the update of Theorem 5, dY = eta_Y (f_n - F E' e_n) (e_n - alpha_n)^T; otherwise it is
    plain SGD, dY = eta_Y f_n (e_n - alpha_n)^T. Returns, after each number of steps in ``record``,
    which must increase, C with Y = F C, and the coefficients of the pushes
    g_n = Y (e_n - alpha_n) = sum over f of F_f push[f, n].
    Raises ValueError for a record beyond the order or out of order.
    """
    if list(record) != sorted(set(record)) or record[-1] > order.shape[1]:
        raise ValueError(f"record is {list(record)}; it must increase and end by step {order.shape[1]}")
    classes = gram.shape[0]
    mixing = np.linalg.inv(gram) if modified else np.eye(classes)
    with jax.enable_x64(True):
        train = jax.vmap(_train_frozen_decoder, in_axes=(0, None, None, 0, None, None))
        state = jnp.zeros((order.shape[0], classes, classes + 1))
        states, pushes = [], []
        for first, last in zip([0, *record[:-1]], record, strict=True):
            state = train(state, jnp.asarray(gram), mixing, order[:, first:last], eta_y, float(vocabulary))
            states.append(np.asarray(state))
            measure = jax.vmap(_push_coefficients, in_axes=(0, None, None))
            pushes.append(np.asarray(measure(state, jnp.asarray(gram), float(vocabulary))))
    return np.stack(states, axis=1), np.stack(pushes, axis=1)


def split_push(push: Float[np.ndarray, "*batch f n"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean iota and mean beta over the classes: g_n = iota f_n - beta sum over the other f_n'."""
    classes = push.shape[-1]
    own = np.trace(push, axis1=-2, axis2=-1)
    beta = -(push.sum(axis=(-2, -1)) - own) / (classes * (classes - 1))
    return np.asarray(own / classes), np.asarray(beta)


# The closed system: Lemma 4's attention with Theorem 1's decoder push


@dataclasses.dataclass(frozen=True)
class ClosedSystem:
    """One common token and ``distinct`` own tokens per class, one query for all classes, time in steps.

    ``frequency`` P(l|n) [class, token], token 0 being common; ``z`` [time, token] the attention logits;
    ``exponent`` B = eta_Z int xi [time]; ``xi`` [time], the same for every class by symmetry.
    """

    frequency: Float[np.ndarray, "class token"]
    z: Float[np.ndarray, "time token"]
    exponent: Float[np.ndarray, " time"]
    xi: Float[np.ndarray, " time"]
    overlap: float
    classes: int
    vocabulary: int

    @property
    def common_rate(self) -> float:
        """A = K (1 - f_ct^2): how much faster the shared common token falls than B grows, at the start."""
        return self.classes * (1 - self.overlap)

    @property
    def initial(self) -> float:
        """C_0, from xi = gamma / C_0 at the start: 1 / ((K - 1) beta rho)."""
        coefficients = theory.theorem1_coefficients(equal_gram(self.overlap, self.classes), self.vocabulary)
        return 1 / (-coefficients[0, 1] * (self.classes - 1) * self.overlap)


@functools.partial(jax.jit, static_argnames=("vocabulary",))
def _run_closed(frequency: Array, gamma: Array, eta_z: Scalar, *, vocabulary: int) -> tuple[Array, Array, Array]:
    """z, B and xi before each step."""
    classes, tokens = frequency.shape
    q1, q0 = 1 + 1 / (vocabulary - 1), -vocabulary / (vocabulary - 1) ** 2
    noise_free = (q1 - q0) * jnp.eye(classes) + q0

    def step(carry: tuple[Array, Array], size: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        z, exponent = carry
        weighted = frequency * jnp.exp(z)
        f = weighted / jnp.linalg.norm(weighted, axis=1, keepdims=True)
        gram = f @ f.T
        beta = -jnp.linalg.solve(gram, noise_free) * (1 - jnp.eye(classes))
        xi = size * jnp.mean(jnp.sum(beta * gram, axis=0))
        pushed_away = beta.T @ f
        along = jnp.sum(pushed_away * f, axis=1, keepdims=True)
        growth = eta_z * size * jnp.sum(f * (along * f - pushed_away), axis=0)
        return (z + growth, exponent + eta_z * xi), (z, exponent, xi)

    _, seen = jax.lax.scan(step, (jnp.zeros(tokens), jnp.zeros(())), gamma)
    return seen


def closed_system(
    overlap: float,
    classes: int,
    vocabulary: int,
    eta_y: float,
    eta_z: float,
    *,
    steps: int,
    distinct: int = 5,
) -> ClosedSystem:
    """Lemma 4, dz = eta_Z gamma sum_n diag(f_n) sum_n' beta_nn' (f_n f_n^T - I) f_n', by Euler steps of 1.

    The distinct tokens of a class have frequencies in the ratio 1 : 2 : ... : ``distinct``; the common
    token's is chosen so that two classes overlap by ``overlap`` at the start. No factor 1/K, as the lemma
    prints it. beta is Theorem 1's, of the current features.
    """
    own = np.arange(1, distinct + 1) / distinct
    common = np.sqrt(overlap / (1 - overlap) * np.sum(own**2))
    frequency = np.zeros((classes, 1 + classes * distinct))
    frequency[:, 0] = common
    for n in range(classes):
        frequency[n, 1 + distinct * n : 1 + distinct * (n + 1)] = own
    frequency /= frequency.sum(axis=1, keepdims=True)
    size = theory.gamma(np.arange(steps), classes, vocabulary, eta_y)
    with jax.enable_x64(True):
        z, exponent, xi = _run_closed(jnp.asarray(frequency), jnp.asarray(size), eta_z, vocabulary=vocabulary)
        arrays = [np.asarray(x) for x in (z, exponent, xi)]
    return ClosedSystem(frequency, arrays[0], arrays[1], arrays[2], overlap, classes, vocabulary)


def ratio_law_error(frequency: Float[np.ndarray, " token"], z: Float[np.ndarray, "time token"]) -> float:
    """max |r / (r(0) chi) - 1| over time and pairs of one class's distinct tokens (Theorem 3).

    ``frequency`` and ``z`` hold the distinct tokens of that class only, weakest first; r is about the
    stronger token of each pair.
    """
    worst = 0.0
    for weak in range(len(frequency)):
        for strong in range(weak + 1, len(frequency)):
            start = (frequency[strong] / frequency[weak]) ** 2
            ratio = start * np.exp(2 * (z[:, strong] - z[:, weak])) - 1
            law = theory.ratio_excess(frequency[strong], frequency[weak], z[:, strong])
            worst = max(worst, float(np.max(np.abs(ratio / law - 1))))
    return worst
