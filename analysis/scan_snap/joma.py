"""JoMA (Tian et al. 2024, arXiv 2310.00535): joint dynamics of attention and the layer above it, simulated.

One block: attended token frequencies b, features f = U_C b + u_q, units h_k = phi(w_k . f). With the token
vectors U_C orthonormal, v_k = U_C^T w_k are the first rows of W [token + rest, unit]. Everything is float64
under a local ``enable_x64``; seeds are one vmapped program. What is claimed of it: :mod:`joma_claims`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import integrate

AttentionKind = Literal["linear", "exp", "softmax"]
UnitKind = Literal["linear", "relu"]
Scalar = Array | float

TOKENS, DISTINCT, UNITS, WIDTH = 20, 10, 20, 30  # Fig. 2: half of the tokens tell the classes apart
TEMPERATURE, FIG2_RATE, FIG2_STEPS = 0.5, 0.1, 2000
FIG4_RATE, FIG4_TEMPERATURE, FIG4_START, FIG4_STEPS = 0.02, 3.0, 0.05, 5000
# What the authors' Fig. 4 script draws with its seed, sorted.
FIG4_AUTHORS_MU = (1.265, 1.396, 1.922, 2.367, 2.470, 2.489, 2.897, 2.902, 3.305, 3.689)
WINNER_DRIVES = (0.4, 0.6, 0.8, 0.9, 1.0)
SALIENCE_MU = (1.0, 1.5, 2.0)


# Theorem 1: invariants


@dataclasses.dataclass(frozen=True)
class InvariantCase:
    """One setting in which an invariant is tried; ``summed`` adds z over the queries before comparing."""

    name: str
    attention: AttentionKind
    unit: UnitKind
    queries: int = 1
    summed: bool = False
    structured: bool = True  # whether the label depends on the tokens


INVARIANT_CASES = (
    InvariantCase("exp, ReLU units", "exp", "relu"),
    InvariantCase("exp, linear units", "exp", "linear"),
    InvariantCase("linear attention, ReLU units", "linear", "relu"),
    InvariantCase("linear attention, linear units", "linear", "linear"),
    InvariantCase("exp, three queries", "exp", "relu", queries=3),
    InvariantCase("exp, three queries summed", "exp", "relu", queries=3, summed=True),
    InvariantCase("softmax, unstructured samples", "softmax", "relu", structured=False),
)


def _attend(x: Array, z: Array, kind: AttentionKind) -> Array:
    """b for frequencies x [query, sample, token] under logits z [query, token]."""
    if kind == "linear":
        return x * z[:, None]
    b = x * jnp.exp(z)[:, None]
    return b if kind == "exp" else b / b.sum(axis=-1, keepdims=True)


def _draw_problem(case: InvariantCase, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Frequencies x [query, sample, token], labels y [query, sample], output map, start of W and of z."""
    tokens, samples, units, labels = 8, 64, 6, 4
    x = generator.dirichlet(np.ones(tokens), (case.queries, samples))
    y = generator.integers(0, labels, x.shape[:2])
    return (
        x,
        np.argmax(x[..., :labels], axis=-1) if case.structured else y,
        generator.normal(size=(units, labels)),
        0.3 * generator.normal(size=(tokens + case.queries, units)),
        np.full((case.queries, tokens), float(case.attention == "linear")),
    )


@functools.partial(jax.jit, static_argnames="case")
def _invariant_error(
    problem: tuple[Array, ...], case: InvariantCase, step_size: Scalar, steps: Array | int
) -> Array:
    """|dz - predicted dz| / |dz| after gradient descent."""
    x, y, out, w0, z0 = problem
    tokens = x.shape[-1]

    def loss(state: tuple[Array, Array]) -> Array:
        w, z = state
        pre = _attend(x, z, case.attention) @ w[:tokens] + w[tokens:][:, None]
        hidden = jax.nn.relu(pre) if case.unit == "relu" else pre
        log_probability = jax.nn.log_softmax(hidden @ out)
        return -jnp.mean(jnp.take_along_axis(log_probability, y[..., None], axis=-1))

    def step(_: Array | int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(lambda p, g: p - step_size * g, state, jax.grad(loss)(state))

    w, z = jax.lax.fori_loop(0, steps, step, (w0, z0))
    squares = jnp.sum(w[:tokens] ** 2 - w0[:tokens] ** 2, axis=1)
    if case.attention == "linear":
        moved, predicted = z**2 - z0**2, squares[None]
    elif case.attention == "exp":
        moved, predicted = z - z0, squares[None] / 2
    else:
        mean_b = _attend(x, z0, case.attention).mean(axis=1)
        moved, predicted = z - z0, (squares[None] - jnp.sum(squares) * mean_b) / 2
    if case.summed:
        moved, predicted = moved.sum(axis=0), predicted[0]
    return jnp.linalg.norm(moved - predicted) / jnp.linalg.norm(moved)


def invariant_errors(
    case: InvariantCase, seed: int, seeds: int, step_size: float, duration: float = 10.0
) -> Float[np.ndarray, " seed"]:
    """Relative error of an invariant of Theorem 1, one per random problem, after gradient descent for
    ``duration`` units of time (number of steps times step size)."""
    problems = [_draw_problem(case, np.random.default_rng([seed, i])) for i in range(seeds)]
    steps = round(duration / step_size)
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *problems)
        return np.asarray(jax.vmap(lambda p: _invariant_error(p, case, step_size, steps))(stacked))


# Figs. 2 and 3


def _correlation(a: Array, b: Array) -> Array:
    a, b = a - a.mean(), b - b.mean()
    return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b) + 1e-300)


def fig2_start(
    generator: np.random.Generator, gaussian: bool
) -> tuple[Float[np.ndarray, "token class"], Float[np.ndarray, "width unit"], Float[np.ndarray, " token"]]:
    """Token frequencies of 20 classes and the start of W and z, the latter two N(0, 1) / 100.

    Frequencies are uniform noise on [0, .5], columns normalized to sum to 1; in the ``gaussian`` variant the
    distinct tokens i (the first half) have exp(-(i - 10 k / 20)^2 / 30) in class k instead.
    """
    x = generator.uniform(0, 0.5, (TOKENS, UNITS))
    if gaussian:
        token, label = np.arange(DISTINCT)[:, None], np.arange(UNITS)[None, :]
        x[:DISTINCT] = np.exp(-((token - DISTINCT * label / UNITS) ** 2) / 30)
    w, z = generator.normal(size=(WIDTH, UNITS)) / 100, generator.normal(size=TOKENS) / 100
    return x / x.sum(axis=0), w, z


@functools.partial(jax.jit, static_argnames="steps")
def _fig2_run(x: Array, w0: Array, z0: Array, steps: int) -> tuple[Array, ...]:
    query = jnp.zeros((WIDTH, 1)).at[TOKENS].set(1.0)
    mean_b = x.mean(axis=1)

    def loss(state: tuple[Array, Array]) -> Array:
        w, z = state
        b = jnp.exp(z / TEMPERATURE)[:, None] * x
        features = jnp.zeros((WIDTH, UNITS)).at[:TOKENS].set(b / b.sum(axis=0)) + query
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(features.T @ w)))

    def terms(w: Array) -> tuple[Array, Array]:
        squares = jnp.sum(w[:TOKENS] ** 2, axis=1)
        return squares / (2 * TEMPERATURE), -mean_b * jnp.sum(w**2) / (2 * TEMPERATURE)

    first0, second0 = terms(w0)
    constant = z0 - first0 - second0

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        w, z = state
        first, second = terms(w)
        predictions = (first + second + constant, first, second)
        seen = (*(_correlation(z, p) for p in predictions), w[:4, 0])
        return jax.tree.map(lambda p, g: p - FIG2_RATE * g, state, jax.grad(loss)(state)), seen

    (w, _), (full, first, second, component) = jax.lax.scan(step, (w0, z0), None, length=steps)
    return full, first, second, component, w0[: TOKENS + 1], w[: TOKENS + 1]


# Theorem 2: linear units, winner takes all


def winner_takes_all(
    drives: tuple[float, ...] = WINNER_DRIVES, until: float = 6.0
) -> tuple[Float[np.ndarray, " time"], Float[np.ndarray, "token time"], Float[np.ndarray, "token time"]]:
    """One linear unit under exp attention: dv = Delta o e^z, dz = Delta o e^z o v, from v = z = 0.

    Integrated as a joint flow (z is not set to v^2 / 2, so that the invariant is part of what is tested)
    until the largest v reaches ``until``. Returns the times, v and z.
    """
    drive = np.asarray(drives)
    tokens = len(drive)

    def flow(_: float, state: np.ndarray) -> np.ndarray:
        v, z = state[:tokens], state[tokens:]
        dv = drive * np.exp(z)
        return np.concatenate([dv, dv * v])

    def reached(_: float, state: np.ndarray) -> float:
        return float(state[:tokens].max() - until)

    reached.terminal = True  # type: ignore[attr-defined]
    run = integrate.solve_ivp(
        flow,
        (0.0, 10.0 / np.abs(drive).max()),
        np.zeros(2 * tokens),
        method="DOP853",
        events=reached,
        rtol=1e-12,
        atol=1e-12,
    )
    return run.t, run.y[:tokens], run.y[tokens:]


# Theorems 3 and 4: nonlinear units


def salience_logs(
    times: Float[np.ndarray, " time"], mu: tuple[float, ...] = SALIENCE_MU
) -> Float[np.ndarray, "component time"]:
    """ln(1/delta_j) for dv = (mu - v) o e^{v^2/2} from v = 0, with delta_j = 1 - v_j / mu_j.

    Integrated as L = ln(1/delta), dL/dt = e^{v^2/2}, v = mu (1 - e^{-L}), which never underflows.
    """
    target = np.asarray(mu)

    def flow(_: float, logs: np.ndarray) -> np.ndarray:
        return np.exp((target * -np.expm1(-logs)) ** 2 / 2)

    run = integrate.solve_ivp(
        flow, (0.0, float(times[-1])), np.zeros(len(mu)), "DOP853", t_eval=times, rtol=1e-10, atol=1e-12
    )
    return run.y


@functools.partial(jax.jit, static_argnames="steps")
def _fig4_run(mu: Array, steps: int) -> tuple[Array, Array]:
    def step(v: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        attention = jax.nn.softmax(v**2 / FIG4_TEMPERATURE)
        entropy = -jnp.sum(attention * jnp.log(attention))
        return v + FIG4_RATE * (mu - v) * attention, (v, entropy)

    return jax.lax.scan(step, jnp.full(mu.shape, FIG4_START), None, length=steps)[1]


def fig4(
    mu: tuple[float, ...] | np.ndarray, steps: int = FIG4_STEPS
) -> tuple[Float[np.ndarray, "time component"], Float[np.ndarray, " time"]]:
    """Fig. 4: v += .02 (mu - v) o softmax(v^2 / 3) from v = .05; v and the entropy in nats before each
    step."""
    with jax.enable_x64(True):
        v, entropy = _fig4_run(jnp.asarray(mu), steps)
        return np.asarray(v), np.asarray(entropy)


# All together


@dataclasses.dataclass(frozen=True)
class JomaResults:
    """Everything the report draws of JoMA; float64 numpy arrays only.

    Invariants: ``invariant_error`` [case, step_size, seed], cases in the order of ``INVARIANT_CASES``, for
    step sizes ``invariant_step`` [step_size], each half of the one before.
    Fig. 2: correlations of z with its prediction, ``fig2_full``, and with each term alone, ``fig2_first`` and
    ``fig2_second``, all [variant, seed, step] with variant 0 gaussian, 1 random; ``fig2_x`` the frequencies
    of the first seed [variant, token, class].
    Fig. 3 (gaussian, first seed): ``fig3_v_start``, ``fig3_v_end`` [token (20 contextual, then the query),
    unit] and ``fig3_component`` [step, 4], components 0-3 of v_0.
    Theorem 2: ``winner_time`` [time], ``winner_v``, ``winner_z`` [token, time], ``winner_drive`` [token].
    Theorem 4: ``salience_time`` [time], ``salience_log`` ln(1/delta) [component, time], ``salience_mu``.
    Fig. 4: ``fig4_mu`` [variant, component] with variant 0 the authors', 1 the uniform grid; ``fig4_v``
    [variant, snapshot, component] every 100 steps; ``fig4_entropy`` [variant, step]; ``fig4_late_entropy``
    [variant], after 200 000 steps. Entropies in nats.
    """

    invariant_step: np.ndarray
    invariant_error: np.ndarray
    fig2_x: np.ndarray
    fig2_full: np.ndarray
    fig2_first: np.ndarray
    fig2_second: np.ndarray
    fig3_v_start: np.ndarray
    fig3_v_end: np.ndarray
    fig3_component: np.ndarray
    winner_drive: np.ndarray
    winner_time: np.ndarray
    winner_v: np.ndarray
    winner_z: np.ndarray
    salience_mu: np.ndarray
    salience_time: np.ndarray
    salience_log: np.ndarray
    fig4_mu: np.ndarray
    fig4_v: np.ndarray
    fig4_entropy: np.ndarray
    fig4_late_entropy: np.ndarray


def run_joma(
    seed: int = 0, seeds: int = 10, fig2_steps: int = FIG2_STEPS, late_steps: int = 200_000
) -> JomaResults:
    """Simulate all of JoMA's small experiments (some ten seconds on one core at full size).

    Raises ValueError for fewer than one seed or a late time before Fig. 4's last step.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; at least 1 is needed")
    if late_steps < FIG4_STEPS:
        raise ValueError(f"late_steps is {late_steps}; Fig. 4 itself runs {FIG4_STEPS} steps")
    step_sizes = (0.02, 0.01, 0.005)
    errors = [[invariant_errors(c, seed, seeds, size) for size in step_sizes] for c in INVARIANT_CASES]
    starts = [
        fig2_start(np.random.default_rng([seed, i]), gaussian) for gaussian in (True, False) for i in range(seeds)
    ]
    with jax.enable_x64(True):
        x, w, z = (jnp.asarray(np.stack(part)) for part in zip(*starts, strict=True))
        flat = jax.vmap(functools.partial(_fig2_run, steps=fig2_steps))(x, w, z)
        runs = [np.asarray(a).reshape(2, seeds, *a.shape[1:]) for a in flat]
    winner_time, winner_v, winner_z = winner_takes_all()
    salience_time = np.concatenate([np.linspace(0.02, 5, 250), np.geomspace(6, 1e4, 100)])
    mu = np.stack([FIG4_AUTHORS_MU, np.linspace(1, 4, 10)])
    hill = [fig4(m, late_steps) for m in mu]
    return JomaResults(
        invariant_step=np.array(step_sizes),
        invariant_error=np.array(errors),
        fig2_x=np.asarray(x)[[0, seeds]],
        fig2_full=runs[0],
        fig2_first=runs[1],
        fig2_second=runs[2],
        fig3_v_start=runs[4][0, 0],
        fig3_v_end=runs[5][0, 0],
        fig3_component=runs[3][0, 0],
        winner_drive=np.array(WINNER_DRIVES),
        winner_time=winner_time,
        winner_v=winner_v,
        winner_z=winner_z,
        salience_mu=np.array(SALIENCE_MU),
        salience_time=salience_time,
        salience_log=salience_logs(salience_time),
        fig4_mu=mu,
        fig4_v=np.stack([v[:FIG4_STEPS:100] for v, _ in hill]),
        fig4_entropy=np.stack([entropy[:FIG4_STEPS] for _, entropy in hill]),
        fig4_late_entropy=np.array([entropy[-1] for _, entropy in hill]),
    )
