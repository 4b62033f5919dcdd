"""Causal scrubbing: a hypothesis says which examples may stand for each other where, and resampling tests it.

Chan et al. 2022, "Causal scrubbing: a method for rigorously testing interpretability hypotheses". If a part of the
walk tells the rest no more than the class of its example, any other example of the class serves as well. So every
part that the hypothesis names is replaced by that of an example drawn from the same class, and the run goes on
with it. What survives of the metric, between resampling without classes (0) and the model as it is (1), is what
the hypothesis recovers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from minitf.analysis.patching import Metric, Progress, bytes_per_run, runs_together
from minitf.analysis.resampling import Classes, by_example, classes, draw
from minitf.changes import change, compose, put_change
from minitf.config import ModelConfig
from minitf.model import unembed, walk
from minitf.parameters import Parameters
from minitf.record import record
from minitf.walk import Change, Edit, Leaf, Walk, get, leaf, leaf_axes

# One label for each example, [batch], or for each of its positions, [batch, position]; or how to label the tokens.
Labels = np.ndarray | Array | Sequence[Any] | Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Node:
    """A claim: what comes after a part of the walk reads no more of it than its example's label.

    ``name`` and ``place`` say which part: ``Node("layers.z", labels, {"layer": 1, "head": 2})``. Labels are of any
    kind that can be compared. All of the part is that of one example; with labels by position, each position (of
    the query, in scores and patterns) has an example of its own. Every node draws for itself.

    ``inputs`` say what the part itself is made of. It is then computed, in a run of the example drawn for it, with
    its inputs replaced by those of further examples, which agree with that one on the labels of the inputs.
    """

    name: str
    labels: Labels
    place: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: tuple["Node", ...] = ()


@struct.dataclass
class Scrubbed:
    """The metric of the model, and of every resample: with the hypothesis, and at random, without its classes.

    ``alone`` counts, for every node (each before its inputs), the examples to which no other is equivalent; where
    labels are by position, it counts their positions. They stand for themselves, so that nothing is tested there.
    """

    model: Leaf = leaf("")
    scrubbed: Leaf = leaf("resample")
    random: Leaf = leaf("resample")
    alone: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def recovered(self) -> float:
        """``(scrubbed - random) / (model - random)``, of the means over resamples.

        Raises ValueError where resampling at random does not change the metric, and nothing is to be recovered.
        """
        random = np.mean(self.random)
        if self.model == random:
            raise ValueError(
                f"the metric is {random}, resampled at random or not, so there is nothing to recover; resample a "
                "part that matters, or choose another metric"
            )
        return float((np.mean(self.scrubbed) - random) / (self.model - random))

    @property
    def standard_error(self) -> float:
        """The standard error of ``recovered``, to first order in those of the two means.

        Both means are of the same draws, so that a hypothesis without content has recovered nothing, exactly.
        """
        distance = self.model - np.mean(self.random)
        pairs = (self.scrubbed - (1 - self.recovered) * self.random) / distance
        return float(np.std(pairs, ddof=1) / math.sqrt(len(pairs)))


def scrub(
    parameters: Parameters,
    tokens: Int[Array, "batch position"],
    metric: Metric,
    config: ModelConfig,
    inputs: Sequence[Node],
    key: Key[Array, ""],
    *,
    rest_at_random: bool = False,
    resamples: int = 32,
    at: Sequence[int] | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    memory: int | None = None,
    progress: Progress = iter,
) -> Scrubbed:
    """Test the claim that the logits depend on their ``inputs``, and these on their labels, alone::

        copies = Node("layers.z", lambda tokens: tokens, {"layer": 1, "head": 3})
        found = scrub(parameters, tokens, loss, config, [copies], jax.random.key(0))
        found.recovered, found.standard_error, found.alone

    Args:
        tokens: the data set. All of it runs for every resample, and what is drawn comes from it.
        metric: of the logits of the data set in its order: a number, or one for each sequence, to be averaged. A
            function defined once, since every new one is compiled anew.
        inputs: the parts that are replaced. What comes after them, and is not replaced itself, follows from them.
        rest_at_random: which example a run is of, aside from the inputs that are replaced. False: the one whose
            logits, or whose part, are asked for. True: any other one, so that the hypothesis has to name all that
            matters, as in the paper. The resamples at random have the same rest.
        resamples: how often all is drawn, at least twice.
        at: the positions whose logits the metric gets, all by default.
        valid: False marks padding. Only examples that are padded alike then stand for each other.
        memory: bytes that the runs of one batch may take together; sets how many resamples run at once. As
            :func:`minitf.analysis.patching.patch` by default.
        progress: wraps the numbers of those batches, such as ``rich.progress.track``.

    Raises:
        ValueError: the parts, their labels or their inputs are not such that they could be tested.
    """
    _check(inputs, tokens, resamples, at)
    shapes = jax.eval_shape(lambda p, t: walk(p, t, config, valid=valid), parameters, tokens)
    alone, anyone = np.arange(len(tokens)), np.zeros(len(tokens), int)
    if valid is not None:
        anyone = np.unique(np.asarray(valid), axis=0, return_inverse=True)[1].reshape(-1)
    prepared = tuple(_prepared(node, np.asarray(tokens), anyone, shapes) for node in inputs)
    root = _Part(name="logits", where=None, classes=classes(alone), inputs=prepared)
    parts = list(_below(root))
    data = _data(parameters, tokens, valid, config=config, names=tuple({p.name: 0 for p in parts if not p.inputs}))

    fixed = None if at is None else tuple(int(i) for i in at)
    size = bytes_per_run(config, len(tokens), tokens.shape[1], fixed, shapes.end.dtype.itemsize)
    replaced = [get(shapes, part.name) for part in parts]
    size += sum(2 * value.size * value.dtype.itemsize for value in replaced)
    together = runs_together(resamples, size, memory)
    batches = math.ceil(resamples / together)
    numbers = jnp.arange(batches * together).reshape(batches, together)
    keys = jax.vmap(jax.vmap(lambda number: jax.random.fold_in(key, number)))(numbers)
    run = functools.partial(_resampled, parameters, tokens, data, valid, metric=metric, config=config, at=fixed)

    others = classes(anyone) if rest_at_random else None
    # The model is a resample in which all stand for themselves: of the same program, so the same to the last bit.
    jobs = [(_relabelled(root, alone), None if others is None else classes(alone), keys[0])]
    jobs += [(claim, others, some) for claim in (root, _relabelled(root, anyone)) for some in keys]
    found = [np.asarray(run(*jobs[i]), np.float64) for i in progress(range(len(jobs)))]
    return Scrubbed(
        model=found[0][0],
        scrubbed=np.concatenate(found[1 : 1 + batches])[:resamples],
        random=np.concatenate(found[1 + batches :])[:resamples],
        alone=tuple(_count_alone(part) for part in parts),
    )


@struct.dataclass
class _Part:
    """A node made ready: the change that is 1 where it is replaced, and its classes."""

    name: str = struct.field(pytree_node=False)
    where: Leaf
    classes: Classes
    inputs: tuple["_Part", ...]


@functools.partial(jax.jit, static_argnames=("config", "names"))
def _data(
    parameters: Parameters, tokens: Array, valid: Array | None, *, config: ModelConfig, names: tuple[str, ...]
) -> Walk:
    return record(walk(parameters, tokens, config, valid=valid), names)


@functools.partial(jax.jit, static_argnames=("metric", "config", "at"))
def _resampled(
    parameters: Parameters,
    tokens: Array,
    data: Walk,
    valid: Array | None,
    root: _Part,
    rest: Classes | None,
    keys: Array,
    *,
    metric: Metric,
    config: ModelConfig,
    at: tuple[int, ...] | None,
) -> Float[Array, " resample"]:
    """The metric for every key, all keys as one batch."""

    def run(part: _Part, examples: Array, draws: Iterator[Array]) -> Walk:
        """The walk of the examples in which the inputs of the part are replaced."""
        edit = Edit()
        for one in part.inputs:
            put = jnp.where(one.where.put == 1.0, value(one, examples, draws), -0.0)
            edit = compose(edit, put_change(one.name, Change(one.where.keep, put)))
        around = examples if rest is None else draw(rest, examples, next(draws))
        return walk(parameters, tokens[around], config, edit=edit, valid=None if valid is None else valid[around])

    def value(part: _Part, like: Array, draws: Iterator[Array]) -> Array:
        """The part's leaf for other examples, which agree with these on its labels."""
        drawn = draw(part.classes, like, next(draws))
        if part.inputs:
            return get(run(part, drawn, draws), part.name)
        return _taken(get(data, part.name), part.name, drawn)

    def one(key: Array) -> Array:
        # Each part draws once for itself, and each that is run once for the rest: all bits at once compile faster.
        count = 1 + 2 * len(list(_below(root)))
        draws = iter(jax.random.bits(key, (count, *tokens.shape), jnp.uint32))
        passed = run(root, jnp.arange(len(tokens)), draws)
        if at is None:
            return jnp.mean(metric(passed.logits))
        return jnp.mean(metric(unembed(parameters, passed.context[:, jnp.asarray(at)], config)))

    return jax.vmap(one)(keys)


def _taken(values: Array, name: str, examples: Int[Array, " batch *position"]) -> Array:
    """The leaf as the examples have it, or at each position as that position's example has it."""
    axes = leaf_axes()[name]
    batch = axes.index("batch")
    if examples.ndim == 1:
        return jnp.take(values, examples, axis=batch)
    sizes = [1] * len(axes)
    sizes[batch], sizes[_position_axis(name)] = examples.shape
    return jnp.take_along_axis(values, examples.reshape(sizes), axis=batch)


def _position_axis(name: str) -> int:
    axes = leaf_axes()[name]
    return axes.index("query" if "query" in axes else "position")


def _prepared(node: Node, tokens: np.ndarray, padding: np.ndarray, shapes: Walk) -> _Part:
    like = get(shapes, node.name)
    if like is None:
        raise ValueError(f"this model's walk has no {node.name!r} to resample")
    if isinstance(like, tuple):
        raise ValueError(f"the layers differ in {node.name!r}; what all layers have alike can be resampled")
    if "batch" not in leaf_axes()[node.name] or "batch" in node.place or node.name == "logits":
        raise ValueError(
            f"{node.name!r} at {dict(node.place)} is not what all examples have one of, before the logits, so it "
            "cannot be resampled"
        )
    labels = np.asarray(node.labels(tokens) if callable(node.labels) else node.labels)
    if labels.shape not in (tokens.shape[:1], tokens.shape):
        raise ValueError(
            f"the labels of {node.name!r} have the shape {labels.shape}; it must be {tokens.shape[:1]}, one label "
            f"for each example, or {tokens.shape}, one for each of its positions"
        )
    if node.inputs and labels.ndim != 1:
        raise ValueError(
            f"{node.name!r} has inputs, so it is computed from one example and needs one label for each"
        )
    number = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    number = number * (padding.max() + 1) + by_example(padding, labels.shape)
    where = get(change(shapes, node.name, keep=0.0, put=1.0, **node.place), node.name)
    if not np.any(np.asarray(where.put) == 1.0):
        raise ValueError(f"{node.name!r} at {dict(node.place)} is no place at all")
    inputs = tuple(_prepared(one, tokens, padding, shapes) for one in node.inputs)
    part = _Part(name=node.name, where=where, classes=classes(number), inputs=inputs)
    for one in inputs:
        if min(_moments(one)) >= max(_moments(part)):
            raise ValueError(f"{one.name!r} is not computed before {part.name!r}, so it is no input of it")
    return part


def _moments(part: _Part) -> list[tuple[float, int]]:
    """When the part is computed, in each of its layers."""
    names = list(leaf_axes())
    number = names.index(part.name)
    if not part.name.startswith("layers."):
        return [(-1.0 if number < names.index("layers.resid_pre") else math.inf, number)]
    where = np.asarray(part.where.put == 1.0)
    return [(float(layer), number) for layer in np.flatnonzero(where.any(axis=tuple(range(1, where.ndim))))]


def _below(part: _Part) -> Iterator[_Part]:
    """The parts under this one, each before its inputs."""
    for one in part.inputs:
        yield one
        yield from _below(one)


def _relabelled(part: _Part, labels: np.ndarray) -> _Part:
    """The part and its inputs with the same labels everywhere."""
    return dataclasses.replace(
        part,
        classes=classes(by_example(labels, part.classes.size.shape)),
        inputs=tuple(_relabelled(one, labels) for one in part.inputs),
    )


def _count_alone(part: _Part) -> int:
    """How many examples, or positions of examples among those of the part, stand for themselves."""
    alone = part.classes.size == 1
    if alone.ndim == 1:
        return int(alone.sum())
    where, axis = np.asarray(part.where.put == 1.0), _position_axis(part.name)
    return int((alone & where.any(axis=tuple(i for i in range(where.ndim) if i != axis))).sum())


def _check(
    inputs: Sequence[Node],
    tokens: Int[Array, "batch position"],
    resamples: int,
    at: Sequence[int] | None,
) -> None:
    batch, length = tokens.shape
    if not inputs:
        raise ValueError("there are no inputs, so no claim to test")
    if batch < 2:
        raise ValueError(f"there are {batch} examples; another one can be drawn from at least 2")
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}; how far they differ is seen from at least 2")
    if at is not None and not all(-length <= i < length for i in at):
        raise ValueError(f"at={list(at)} leaves the {length} positions of the tokens")
