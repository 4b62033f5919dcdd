"""The contract of every sequence mixer: filters, an association, an aggregate under it, a filter back.

    f = filter(x)                      position by position: values v, and what the association is made of
    A = association(f)                 [batch, head, query, key], where there is one
    z = aggregate(f)                   the fast way to  z[t] = sum_s A[t, s] v[s]
    z_t, state = step(f_t, state)      the same, one position after another
    out = gate(z, f)                   position by position again; then the map W_O back to the stream

Groups are called heads, as in attention. In a mixer that weighs every channel by itself a head is one channel and
is one wide. A mixer is a frozen dataclass whose fields are its settings; its weights are a pytree made from what
it declares. :mod:`minitf.layer` runs it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from minitf import aggregate, filter
from minitf.changes import apply
from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype, statistics_dtype
from minitf.places import Places
from minitf.walk import LayerWalk

Stream = Float[Array, "batch position width"]
Weights = Any
State = Any
Seen = Float[Array, "batch seen width"]
At = Int[Array, "#batch position"]
Now = Int[Array, " batch"]
Heads = Float[Array, "batch position head head_width"]
Pairs = Float[Array, "#batch head query key"]
Step = tuple[Heads, State]
Source = Literal["position", "query", "key", "pair", "path"]


@dataclasses.dataclass(frozen=True)
class About:
    """What a mixer is, as a test can measure it.

    Attributes:
        causal: no query sees a later key.
        heads: how many associations there are.
        granularity: whether one association serves a whole head or a single channel; ``none`` without one.
        provenance: what A[t, s] may depend on besides t and s: the query x_t, the key x_s, both as a pair, what
            lies between them (path). Empty: the data has no part in it; then ``by_lag`` says whether only t - s
            counts.
        normalized: every row sums to one (``exactly``), to at most one, or to anything.
        state: numbers that one sequence hands on from position to position while decoding, in one layer.
        exponent: of the cost of a full pass in the sequence length, long sequences.
    """

    causal: bool
    heads: int
    granularity: Literal["head", "channel", "none"]
    provenance: frozenset[Source] = frozenset()
    by_lag: bool = False
    normalized: Literal["exactly", "at most", "no"] = "no"
    state: int = 0
    exponent: float = 1.0


@struct.dataclass
class Filtered:
    """What the filters made of the stream.

    ``v`` ``[batch, position, head, head_width]`` is what will be mixed; ``q`` and ``k`` what pairs are compared
    by, where there are such; ``extras`` what else the association, the aggregate or the gate need, by name.
    """

    v: Any
    q: Any = None
    k: Any = None
    extras: Any = struct.field(default_factory=dict)


@struct.dataclass
class Mixed:
    """A mixer's part of one layer's walk.

    ``out`` is ``z`` after the gate; ``state`` is what later positions need.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    scores: Any = None
    pattern: Any = None
    z: Any = None
    out: Any = None
    state: Any = None


class Mixer:
    """What a mixer must say; the defaults are for one without gate, short convolution or state.

    ``reach`` is how many earlier inputs its filters see (a short convolution, a token shift);
    ``leaves`` are those of the walk that it has beyond values, ``z`` and what each head adds.
    """

    reach: ClassVar[int] = 0
    leaves: ClassVar[frozenset[str]] = frozenset({"pattern"})

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError where the mixer cannot be part of such a model."""

    def about(self, config: ModelConfig) -> About:
        """What it is in a model of this configuration."""
        raise NotImplementedError

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Its weights by name, as :class:`minitf.declaration.Make` declares them."""
        raise NotImplementedError

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """The filters, values alone by default.

        ``x`` begins ``reach`` positions before the first one; ``state`` is for cells alone.
        """
        return Filtered(v=project(x, weights["value"]))

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs | None:
        """A, whole; with a batch of one where the data has no part in it."""
        raise NotImplementedError

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """``sum_s A[t, s] v[s]``; by the association itself, unless there is a faster way."""
        return under(self.association(weights, f, config), f.v)

    def empty_state(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """Before the first position."""
        raise NotImplementedError

    def step(self, weights: Weights, f: Filtered, state: State, position: Now, config: ModelConfig) -> Step:
        """The aggregate at one position, and the state after it."""
        raise NotImplementedError

    def gate(self, weights: Weights, z: Heads, f: Filtered, config: ModelConfig) -> Heads:
        """What is done to ``z`` at each position alone, before the output map."""
        return z

    def mix(
        self, weights: Weights, x: Stream, config: ModelConfig, edit: LayerWalk, places: Places, past: State
    ) -> Mixed:
        """All of it, with the edits of its leaves; what is not read is not computed."""
        if places.goes_on:
            return _go_on(self, weights, x, config, edit, places, past)
        if places.padded:
            raise ValueError(
                f"{type(self).__name__} would mix padding into what follows: put padding at the end of causal "
                "sequences, where nothing sees it, and leave valid out"
            )
        before = jnp.pad(x, ((0, 0), (self.reach, 0), (0, 0)))
        f = _edited(self.filter(weights, before, config, places.query), edit)
        pattern = None
        if "pattern" in self.leaves and (places.association or edit.pattern is not None):
            pattern = self.association(weights, f, config)
            assert pattern is not None, "a mixer that says it has a pattern has an association"
            # What no data has a part in is the same for every sequence.
            pattern = jnp.broadcast_to(pattern.astype(f.v.dtype), (x.shape[0], *pattern.shape[1:]))
        if edit.pattern is None:
            z = self.aggregate(weights, f, config)
        else:
            assert pattern is not None
            pattern = apply(edit.pattern, pattern)
            z = under(pattern, f.v)
        z = apply(edit.z, z.astype(f.v.dtype))
        return Mixed(q=f.q, k=f.k, v=f.v, pattern=pattern, z=z, out=self.gate(weights, z, f, config))

    def start(self, config: ModelConfig, batch: int, slots: int, dtype: Any) -> State:
        """The state before the first position: the aggregate's, and the inputs that filters reach back to."""
        tail = jnp.zeros((batch, self.reach, config.width), dtype)
        return {"tail": tail, "own": self.empty_state(config, batch, slots, dtype)}


def _edited(f: Filtered, edit: LayerWalk) -> Filtered:
    changed = {
        name: apply(getattr(edit, name), value)
        for name, value in (("q", f.q), ("k", f.k), ("v", f.v))
        if value is not None
    }
    return dataclasses.replace(f, **changed)


def _go_on(
    mixer: Mixer, weights: Weights, x: Stream, config: ModelConfig, edit: LayerWalk, places: Places, past: State
) -> Mixed:
    """The positions one after another, from a state; positions that do not count leave it as it is."""
    if edit.pattern is not None:
        raise ValueError(
            "while decoding, the association of a recurrent mixer is never made, so it cannot be edited; edit "
            "layers.v, layers.z or layers.attention_step"
        )
    batch, length, _ = x.shape
    counts = jnp.ones((batch, length), bool) if places.counts is None else places.counts
    positions = jnp.broadcast_to(places.query, (batch, length))

    def one(state: State, at: tuple[Array, Array, Array, Array]) -> tuple[State, tuple[Array, ...]]:
        token, position, count, number = at
        here = _at(number, length, edit)
        window = jnp.concatenate([state["tail"], token[:, None]], axis=1)
        f = _edited(mixer.filter(weights, window, config, position[:, None], state["own"]), here)
        z, own = mixer.step(weights, f, state["own"], position, config)
        z = apply(here.z, z.astype(f.v.dtype))
        after = {"tail": window[:, 1:], "own": own}
        keep = lambda new, old: jnp.where(count.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return jax.tree.map(keep, after, state), (f.v[:, 0], z[:, 0], mixer.gate(weights, z, f, config)[:, 0])

    by_time = (jnp.moveaxis(x, 1, 0), positions.T, counts.T, jnp.arange(length))
    state, found = jax.lax.scan(one, past, by_time)
    v, z, out = (jnp.moveaxis(y, 0, 1) for y in found)
    return Mixed(v=v, z=z, out=out, state=state)


def _at(number: Array, length: int, edit: LayerWalk) -> LayerWalk:
    """The changes of queries, keys, values and z at one of so many positions."""

    def part(x: Any) -> Any:
        if jnp.ndim(x) < 3 or x.shape[-3] != length:
            return x
        return jax.lax.dynamic_slice_in_dim(x, number, 1, axis=x.ndim - 3)

    return jax.tree.map(part, LayerWalk(q=edit.q, k=edit.k, v=edit.v, z=edit.z))


def check_least(mixer: Mixer, least: int, *names: str) -> None:
    """Raise ValueError for a setting of a mixer that is below ``least``, by name."""
    for name in names:
        if getattr(mixer, name) < least:
            raise ValueError(
                f"{type(mixer).__name__}: {name} is {getattr(mixer, name)}; it must be at least {least}"
            )


def under(
    association: Float[Array, "#batch head query key"] | None, v: Float[Array, "batch key head head_width"]
) -> Float[Array, "batch query head head_width"]:
    """The values mixed under an association: what every fast way must equal."""
    assert association is not None, "a mixer without association has its own aggregate"
    return aggregate.combine(jnp.broadcast_to(association, (v.shape[0], *association.shape[1:])), v).astype(
        v.dtype
    )


def project(x: Float[Array, "batch position width"], weight: Float[Array, "width head head_width"]) -> Array:
    """A linear filter into heads, ``[batch, position, head, head_width]``."""
    rows = filter.linear(x.reshape(-1, x.shape[-1]), weight.reshape(weight.shape[0], -1))
    return rows.reshape(*x.shape[:2], *weight.shape[1:])


def normed(
    x: Float[Array, "*axes width"],
    kind: Literal["layer", "rms"],
    config: ModelConfig,
    gain: Float[Array, " width"] | None = None,
) -> Float[Array, "*axes width"]:
    """A norm of the last axis inside a mixer, with the model's epsilon; no leaf of the walk holds its scale."""
    out = filter.normalize(*filter.norm_parts(x.reshape(-1, x.shape[-1]), kind, config.norm_epsilon), gain)
    return out.astype(x.dtype).reshape(x.shape)


def past(length: int) -> Array:
    """True where the key is not after the query, ``[query, key]``."""
    return aggregate.allowed_pairs(length, True, True)


def visible(length: int, config: ModelConfig) -> Array:
    """Which keys a query may see, ``[query, key]``: of mixers that can be causal or not, as the model is."""
    return aggregate.allowed_pairs(length, config.causal, True)


def remember(kept: Float[Array, "batch slot ..."], new: Array, position: Int[Array, " batch"]) -> Array:
    """The values of all positions so far, with one more."""
    return kept.at[jnp.arange(kept.shape[0]), position].set(new[:, 0])


Two = tuple[Array, Array]


def recurrence(
    decay: Float[Array, "#batch #position ..."], inputs: Float[Array, "batch position ..."]
) -> Float[Array, "batch position ..."]:
    """``h[t] = decay[t] * h[t-1] + inputs[t]`` for all t, from ``h[-1] = 0``.

    In as many blocks as each has positions: all blocks at once, position by position, then what the blocks before
    each leave. So few steps follow one another, in two small programs: a scan in log2 steps over all positions
    (Blelloch 1990) takes XLA ten times as long to compile, and longer to run. In at least float32 on the way.
    """

    def step(held: Two, now: Two) -> tuple[Two, Two]:
        (kept, h), (decay, new) = held, now
        after = kept * decay, decay * h + new
        return after, after

    def join(h: Array, block: Two) -> Two:
        return block[0] * h + block[1], h

    decay, new = in_statistics_dtype(decay), in_statistics_dtype(inputs)
    decays, new = in_short_chunks(jnp.broadcast_to(decay, new.shape)), in_short_chunks(new)
    _, (kept, inside) = jax.lax.scan(step, (jnp.ones_like(new[0]), jnp.zeros_like(new[0])), (decays, new))
    _, before = jax.lax.scan(join, jnp.zeros_like(new[0, 0]), (kept[-1], inside[-1]))
    return from_short_chunks(inside + kept * before, inputs.shape[1]).astype(inputs.dtype)


def product_association(
    log_decay: Float[Array, "batch position head"], weight: Float[Array, "batch position head"]
) -> Float[Array, "batch head query key"]:
    """``A[t, s] = exp(sum of log_decay over s+1..t) * weight[s]`` for s <= t: of every gated recurrence."""
    between = sums_between(jnp.moveaxis(log_decay, 2, 1))
    return jnp.exp(jnp.where(past(between.shape[-1]), between, -jnp.inf)) * jnp.moveaxis(weight, 2, 1)[:, :, None]


def sums_between(x: Float[Array, "*axes position"]) -> Float[Array, "*axes query key"]:
    """``sum of x over s < j <= t``, each summed by itself: differences of long sums would lose their digits."""
    length = x.shape[-1]
    later = aggregate.allowed_pairs(length, True, False)
    return jnp.cumsum(jnp.where(later, in_statistics_dtype(x)[..., :, None], 0.0), axis=-2)


def sums_after(x: Float[Array, "batch position ..."]) -> Float[Array, "batch position ..."]:
    """``sum of x over j > s``, each summed from the end: what is left after s."""
    return jnp.pad(jnp.cumsum(x[:, :0:-1], axis=1)[:, ::-1], ((0, 0), (0, 1), *((0, 0),) * (x.ndim - 2)))


def by_distance(kernel: Float[Array, "head lag"], length: int) -> Float[Array, "1 head query key"]:
    """``A[t, s] = kernel[t - s]``, zero beyond the kernel and for later keys."""
    lag = np.arange(length)[:, None] - np.arange(length)[None, :]
    within = (lag >= 0) & (lag < kernel.shape[-1])
    return jnp.where(jnp.asarray(within), kernel[:, np.where(within, lag, 0)], 0.0)[None]


CHUNK = 64  # positions whose pairs are held at once


def in_chunks(x: Array, size: int, fill: float = 0.0) -> Array:
    """``[chunk, batch, size, ...]`` from ``[batch, position, ...]``, ``fill`` after the end.

    As few chunks as hold at most ``size`` each, and as short as so many can be.
    """
    batch, length = x.shape[:2]
    chunks = -(-length // size)
    size = -(-length // max(chunks, 1))
    rest = ((0, 0), (0, chunks * size - length), *((0, 0),) * (x.ndim - 2))
    padded = jnp.pad(x, rest, constant_values=fill)
    return jnp.moveaxis(padded.reshape(batch, chunks, size, *x.shape[2:]), 1, 0)


def from_chunks(x: Array, length: int) -> Array:
    """What :func:`in_chunks` took apart, put together."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]


def in_short_chunks(x: Array, fill: float = 0.0) -> Array:
    """``[size, chunk, batch, ...]``, as many chunks as each has positions, about: to step through side by side."""
    return jnp.moveaxis(in_chunks(x, math.isqrt(max(x.shape[1] - 1, 0)) + 1, fill), 2, 0)


def from_short_chunks(x: Array, length: int) -> Array:
    """What :func:`in_short_chunks` took apart, put together."""
    return from_chunks(jnp.moveaxis(x, 0, 2), length)


def chunked_products(
    q: Float[Array, "batch position head key_width"],
    k: Float[Array, "batch position head key_width"],
    v: Float[Array, "batch position head head_width"],
    log_decay: Float[Array, "#batch position head"],
    size: int = CHUNK,
) -> Float[Array, "batch position head head_width"]:
    """``sum over s <= t of exp(decay over s+1..t) (q[t] . k[s]) v[s]``, chunk by chunk (Sun et al. 2023, 2.4).

    Inside a chunk by its association, between chunks by the state ``S = decay S + k v^T``. Every exponent is at
    most zero, so nothing overflows however long the sequence; products are of the inputs' precision, what is
    summed up of at least float32.
    """
    length, dtype = q.shape[1], statistics_dtype(v.dtype)
    weighed = lambda x, log: (x * jnp.exp(log)[..., None]).astype(x.dtype)

    def chunk(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, decay = now
        between = jnp.where(past(q.shape[1]), sums_between(jnp.moveaxis(decay, 2, 1)), -jnp.inf)
        inside = product("bthc,bshc->bhts", q, k) * jnp.exp(between)
        z = product("bhts,bshv->bthv", inside.astype(v.dtype), v)
        total = jnp.cumsum(decay, axis=1)
        z = z + product("bthc,bhcv->bthv", weighed(q, total), state.astype(v.dtype))
        new = product("bshc,bshv->bhcv", weighed(k, sums_after(decay)), v)
        return jnp.exp(total[:, -1])[..., None, None] * state + new, z.astype(v.dtype)

    empty = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype)
    parts = (q, k, v, in_statistics_dtype(log_decay))
    _, z = jax.lax.scan(chunk, empty, tuple(in_chunks(x, size) for x in parts))
    return from_chunks(z, length)


def product(equation: str, *factors: Array) -> Array:
    """An einsum that is summed up in at least float32, of factors as they are."""
    dtype = statistics_dtype(jnp.result_type(*factors))
    if jax.default_backend() == "cpu":  # which has no such product of halves
        factors = tuple(x.astype(dtype) for x in factors)
    return jnp.einsum(equation, *factors, preferred_element_type=dtype)


def decayed_products(
    q: Float[Array, "batch position head key_width"],
    k: Float[Array, "batch position head key_width"],
    log_decay: Float[Array, "#batch position head"],
) -> Float[Array, "batch head query key"]:
    """The association of :func:`chunked_products`, whole."""
    return product("bthc,bshc->bhts", q, k) * product_association(log_decay, jnp.ones_like(log_decay))


def short_convolution(
    x: Float[Array, "batch seen channel"], kernel: Float[Array, "tap channel"]
) -> Float[Array, "batch position channel"]:
    """Each channel's last few inputs under fixed weights; the last tap is the present one."""
    taps = kernel.shape[0]
    length = x.shape[1] - taps + 1
    return sum(x[:, tap : tap + length] * kernel[tap] for tap in range(taps))  # type: ignore[return-value]
