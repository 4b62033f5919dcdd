"""What a training step needs of memory on one device of a mesh, on paper.

Formulas of a configuration and the sizes of a mesh; nothing is compiled. In them c are the bytes of a number in
the computation (4, or 2 in bfloat16; on a CPU always 4, since XLA computes in float32 there); D, H, G, h, F, T are
the width, heads, groups of keys, width of a head, hidden neurons and length; and a prime says that ``tensor``
divides: F' = F / tensor.

The state is counted leaf by leaf as :mod:`minitf.train.sharding` divides it, and what layers keep for the way back
array by array, as Korthikanti et al. (2022, section 4) do for another model.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minitf import ModelConfig, initialize
from minitf.analysis.plan.devices import Device
from minitf.attend_in_cache import block_of, blocks
from minitf.declaration import Declaration, declare, is_declaration
from minitf.mixers import Softmax
from minitf.mixers.softmax import fits_card, is_usual
from minitf.train import sharding
from minitf.train.batch import Batch
from minitf.train.config import MeshSettings, Objective, TrainConfig
from minitf.train.cross_entropy import chunks_of, rows_of_chunk
from minitf.train.objective import sums
from minitf.train.step import State, in_precision, layers_at_once
from minitf.train.trainer import models_at_once

FLOAT32 = 4
AXES = ("data", "fsdp", "tensor")
# Arrays of [rows, hidden] that autodiff keeps: how many of c bytes a number, and bytes of the others.
HIDDEN_KEPT = {"none": (0, 0), "relu": (1, 1), "gelu": (4, 0), "gelu_tanh": (5, 0), "swiglu": (6, 0)}
# Those left where XLA makes again what is cheap: what a product made, an exponential of it, what a product reads.
HIDDEN_FUSED = {"none": (0, 0), "relu": (1, 1), "gelu": (3, 0), "gelu_tanh": (3, 0), "swiglu": (4, 0)}


@dataclass(frozen=True, eq=False)
class Run:
    """All that a plan depends on, but for devices.

    Attributes:
        config: the whole run's.
        model: what is trained.
        objective: what is minimized.
        state: shapes of the training state; of many models with a leading axis.
        models: how many train; side by side they are not divided.
        seeds: how many different ones.
        windows: whether data comes from outside.
        operations: of a step of one model, as counted.
    """

    config: TrainConfig
    model: ModelConfig
    objective: Objective
    state: State
    models: int
    seeds: int
    windows: bool
    operations: float

    @property
    def number(self) -> int:
        """Bytes of a number in the computation: c."""
        return jnp.dtype(self.config.training.precision).itemsize

    def at_once(self, kind: str) -> int:
        """Models side by side in memory."""
        return models_at_once(self.config, self.models, self.state, kind)

    def unrolled(self, kind: str) -> bool:
        """Whether layers are compiled one by one, and not as a loop; those that differ always are."""
        most = layers_at_once(self.config, self.model, kind)
        return most is True or most >= self.model.layers or isinstance(self.model.mixer, tuple)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters, moments, average: of the state: weights in float32, what the optimizer keeps, the running mean.
        counts: the state's numbers, and those of the program's inputs.
        windows: tokens of one call of the program; those of the next wait beside.
        gradients: of all weights, in float32; of several parts a sum is kept beside.
        copies: weights in the precision of the computation, where that is another.
        gathered: weights of a layer, whole over ``fsdp``: this one's, the next one's, and this one's gradient.
        kept: activations that all layers keep for the way back.
        loss: logits of one chunk, their exponentials, their gradient; several chunks' slopes of what unembeds; on
            a CPU, of layers one by one, what the last of them holds by then.
        layer: what the way back through one layer holds besides.
        update: clipped gradients and an update; where steps may be skipped, all, and new weights beside old.
        in_turn: where models train after others, the new state of all, and that of those side by side.
        temporary: the most of it all, beside inputs, at any time of a step.
    """

    parameters: int
    moments: int
    average: int
    counts: int
    windows: int
    gradients: int
    copies: int
    gathered: int
    kept: int
    loss: int
    layer: int
    update: int
    in_turn: int
    temporary: int

    @property
    def arguments(self) -> int:
        """What the program's inputs need."""
        return self.parameters + self.moments + self.average + self.counts + self.windows

    @property
    def total(self) -> int:
        """All of it, with the windows of the next call."""
        return self.arguments + self.windows + self.temporary


def state_bytes(run: Run, mesh: MeshSettings) -> dict[str, int]:
    """Bytes of the state's parts on each device: the sizes of the shards that the run's own rules give."""
    return _state_bytes(run, mesh.fsdp, mesh.tensor)


@functools.lru_cache(maxsize=1024)
def _state_bytes(run: Run, fsdp: int, tensor: int) -> dict[str, int]:
    # Over data it is whole. One device stands for all of them: sizes of shards follow from the mesh's shape alone.
    mesh = Mesh(np.full((1, fsdp, tensor), jax.devices()[0]), AXES)
    placed = sharding.of_state(run.state, run.model, mesh, run.models > 1)
    shard = lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
    sizes = jax.tree.map(shard, run.state, placed)
    return {name: sum(jax.tree.leaves(part)) for name, part in vars(sizes).items()}


def window_bytes(run: Run, mesh: MeshSettings, steps: int) -> int:
    """Of a call of so many steps, int32 ``[seed, step, batch, length + 1]``."""
    if not run.windows:
        return 0
    rows = run.config.training.batch // (mesh.data * mesh.fsdp)
    return run.seeds * steps * rows * (run.model.length + 1) * 4


def kind_of(device: Device | None) -> str:
    """The device's kind; a CPU where none is named."""
    return "cpu" if device is None else device.kind


def is_fused(run: Run, mesh: MeshSettings, device: Device | None) -> bool:
    """Whether the association is never stored: cuDNN's attention computes it, or that of one CPU."""
    m = run.model
    usual = is_usual(m) and not _window(m)
    unread = not run.config.objective.attention_dropout and _is_softmax(m)
    if kind_of(device) == "cpu":
        return mesh.devices == 1 and usual and unread
    fits = fits_card(jnp.dtype(run.config.training.precision), m.head_size)
    return kind_of(device) == "gpu" and usual and fits and unread


def _is_softmax(model: ModelConfig) -> bool:
    return model.mixer is None or isinstance(model.mixer, Softmax)


def _window(model: ModelConfig) -> int:
    return model.mixer.window if isinstance(model.mixer, Softmax) else 0


def has_formula(model: ModelConfig) -> bool:
    """Whether :func:`kept_of_layer` is of this model: one with softmax attention of the usual kind."""
    return _is_softmax(model) and model.attention == "query_key" and not _window(model)


def seen_keys(model: ModelConfig, length: int) -> tuple[int, int]:
    """Pairs of positions that are computed, and keys that are read: causal queries are taken in blocks.

    A block of ``s`` queries that ends at ``e`` has ``s e`` pairs and reads ``e`` keys.
    """
    taken = blocks(length, block_of(length) if model.causal else length)
    return sum((some.stop - some.start) * some.stop for some in taken), sum(some.stop for some in taken)


def kept_of_layer(
    model: ModelConfig, sequences: int, length: int, number: int, tensor: int, fused: bool, looped: bool
) -> int:
    """Bytes that one layer keeps for the way back (``has_formula(model)``), on one device.

    In a loop all that autodiff asks for, of every position:

    * 8 D + 12 for each norm (its rows less their mean, and divided, float32; three of scales), 4 D + 13 of l2
    * D c for what each of the two sub-layers reads
    * (H' + 2 G') h c for queries, keys and values, H' h c for the heads' mixtures, 4 H' h before they are divided
    * n F' c of the feed-forward, n by its kind (``HIDDEN_KEPT``)

    and of every head 4 + c for each pair of positions (exponentials, in float32 and as they are read), 9 for each
    query. A fused attention keeps 4 bytes for each query instead, and its mixtures twice. Layers one by one keep
    less: XLA makes again what is cheap, so a norm keeps the stream, D c, attention its exponentials or mixtures
    once and none undivided, and the feed-forward what ``HIDDEN_FUSED`` says.
    """
    m, c, rows = model, number, sequences * length
    heads, groups = _over(m.heads, tensor), _over(m.groups, tensor)
    hidden = _over(m.hidden_size, tensor)
    pairs, keys = seen_keys(m, length)
    sublayers = 1 if m.feed_forward == "none" else 2
    norms = 0 if m.norm == "none" else sublayers
    norm = m.width * c + 12
    if looped:
        norm = 4 * m.width + 13 if m.norm == "l2" else 8 * m.width + 12
    counted, others = (HIDDEN_KEPT if looped else HIDDEN_FUSED)[m.feed_forward]
    read = keys if looped and not fused else length
    row = norms * norm + sublayers * m.width * c + 2 * heads * m.head_size * c + hidden * (counted * c + others)
    if m.query_key_norm:
        row += (heads + groups) * (8 * m.head_size + 12)
    association = 4 * length if fused else FLOAT32 * pairs + 9 * length
    if looped:
        association += c * m.head_size * length if fused else c * pairs + FLOAT32 * m.head_size * length
    per_sequence = 2 * groups * m.head_size * c * read + heads * association
    return rows * row + sequences * per_sequence


def _over(size: int, devices: int) -> int:
    """A size divided by so many devices, where it can be."""
    return size // devices if size % devices == 0 else size


@functools.lru_cache(maxsize=64)
def kept_by_autodiff(run: Run, rematerialize: bool) -> int:
    """Of all layers and one sequence, for any mixer: what the gradient's own trace keeps, without weights."""
    model, length = run.model, run.model.length
    parameters = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, length), np.int32)
    dtype = jnp.dtype(run.config.training.precision)

    def loss(weights: Any, tokens: Any) -> Any:
        batch = Batch(tokens, tokens)
        # Rows one at a time: their logits are no part of what layers keep.
        settings = dataclasses.replace(run.config.objective, chunk=1)
        found = sums(
            in_precision(weights, dtype), batch, model, "next_token", settings, rematerialize=rematerialize
        )
        return found.loss

    kept = jax.eval_shape(lambda w, t: jax.vjp(lambda one: loss(one, t), w)[1], parameters, tokens)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return max(size(kept) - sum(x.size for x in jax.tree.leaves(parameters)) * run.number, 0)


def logit_bytes(run: Run, sequences: int, whole: int, tensor: int, device: Device | None) -> int:
    """Logits of a chunk (c), their exponentials (float32), their gradient (c), of the vocabulary's part.

    On a CPU the exponentials take the gradient's place.

    Chunks are of positions of all sequences: ``whole`` is their number on all devices. Where there are several,
    the slopes of what unembeds add up beside, in float32.
    """
    m = run.model
    rows = rows_of_chunk(m, run.config.objective, None if device is None else device.kind)
    vocabulary = _over(m.vocabulary, tensor)
    classifies = run.objective == "classification"
    length = 1 if classifies and m.causal else m.length
    # Regression, and a mean over all positions, want the logits whole.
    in_chunks = rows < whole * length and run.objective != "regression" and not (classifies and not m.causal)
    positions = chunks_of(whole, length, rows)[1] if in_chunks else length
    slopes = FLOAT32 * m.width * vocabulary if in_chunks else 0
    of_one = 2 * FLOAT32 if kind_of(device) == "cpu" else 2 * run.number + FLOAT32
    return sequences * positions * vocabulary * of_one + slopes


def memory(run: Run, mesh: MeshSettings, parts: int, steps: int, device: Device | None) -> Memory:
    """What one device of the mesh holds, of calls of ``steps`` steps whose batch is taken in ``parts``.

    The most at any time of a step is the largest of: everything kept, and the loss; everything kept (or, of layers
    one by one, gradients in its place), and one layer's way back; gradients, updates and new weights. On a
    CPU nothing is made again of layers one by one, as XLA has it there.
    """
    m, t, on_cpu = run.model, mesh.tensor, kind_of(device) == "cpu"
    c = FLOAT32 if on_cpu else run.number
    state, windows = state_bytes(run, mesh), window_bytes(run, mesh, steps)
    many = run.at_once(kind_of(device))
    gradients = state["parameters"] // run.models * many
    whole = run.config.training.batch // parts
    sequences = max(whole // (mesh.data * mesh.fsdp), 1)
    rows, unrolled = sequences * m.length, run.unrolled(kind_of(device))
    rematerialize = run.config.training.rematerialize and not (on_cpu and unrolled)
    fused = is_fused(run, mesh, device)
    stream = rows * m.width * c
    if has_formula(m):
        one = lambda looped: kept_of_layer(m, sequences, m.length, c, t, fused, looped)
        again = one(False)
        kept = m.layers * (stream if rematerialize else one(not unrolled))
    else:
        kept = sequences * kept_by_autodiff(run, rematerialize) * c // run.number
        again = sequences * kept_by_autodiff(run, False) // m.layers * c // run.number
    # Start and end of the walk, and what is unembedded.
    kept += 3 * stream + dropout_bytes(run, sequences, c)
    hidden = 0 if m.feed_forward == "none" else _over(m.hidden_size, t)
    layer = 2 * stream
    if rematerialize:
        layer += again
        if on_cpu:
            # What its linear maps read is laid out anew for the slopes of their weights.
            layer += rows * (3 * m.width + hidden) * c
    elif not unrolled:
        # A loop keeps its arrays to the end: gradients of the feed-forward's, of scores and patterns, come on top.
        pairs = 0 if fused else sequences * _over(m.heads, t) * seen_keys(m, m.length)[0]
        layer += 2 * (rows * hidden + pairs) * c
    loss = logit_bytes(run, sequences, whole, t, device)
    if on_cpu and unrolled and not rematerialize:
        # Beside the loss, the last layer's way back has begun: four arrays of its feed-forward's, as measured.
        loss += 4 * rows * hidden * c
    copies = 0 if run.number == FLOAT32 else gradients // FLOAT32 * run.number
    gathered = 3 * largest_gathered(m, t) * c if mesh.fsdp > 1 and run.models == 1 else 0
    summed = gradients if parts > 1 else 0
    kept, loss, layer = many * kept, many * loss, many * layer
    back = max(kept, gradients) if unrolled else kept + gradients
    update = gradients * (3 if run.config.optimizer.average else 2)
    if run.config.training.when_not_finite != "skip":
        fsdp, tensor = (mesh.fsdp, t) if run.models == 1 else (1, 1)
        of_one = max(numbers_on_device(one, fsdp, tensor) for one in weights_of(m))
        update = gradients * (run.config.optimizer.clip > 0) + many * of_one * FLOAT32
    in_turn = 0
    if many < run.models:
        trained = state["parameters"] + state["moments"] + state["average"]
        in_turn = trained + trained // run.models * many
    temporary = in_turn + max(
        copies + gathered + summed + kept + loss,
        copies + gathered + summed + back + layer,
        gradients + summed + update,
    )
    return Memory(
        parameters=state["parameters"],
        moments=state["moments"],
        average=state["average"],
        counts=state["step"] + state["skipped"] + 8,
        windows=windows,
        gradients=gradients + summed,
        copies=copies,
        gathered=gathered,
        kept=kept,
        loss=loss,
        layer=layer,
        update=update,
        in_turn=in_turn,
        temporary=temporary,
    )


# Arrays as large as what is dropped, as measured on a CPU: masks, what they are drawn from, what is left.
DROPOUT_KEPT, ATTENTION_DROPOUT_KEPT = 3, 5


def dropout_bytes(run: Run, sequences: int, number: int) -> int:
    """What dropout keeps: of the start, of every step, and of patterns, which it has whole, in sight or not."""
    o, m = run.config.objective, run.model
    steps = 1 + m.layers * (1 if m.feed_forward == "none" else 2)
    on_stream = steps * sequences * m.length * m.width * number if o.dropout else 0
    on_patterns = m.layers * sequences * m.heads * m.length**2 * number if o.attention_dropout else 0
    return DROPOUT_KEPT * on_stream + ATTENTION_DROPOUT_KEPT * on_patterns


def weights_of(model: ModelConfig) -> list[Declaration]:
    """The declaration of every weight, or stack of weights."""
    return jax.tree.leaves(declare(model), is_leaf=is_declaration)


@functools.lru_cache(maxsize=1024)
def largest_gathered(model: ModelConfig, tensor: int) -> int:
    """Numbers of what is gathered at a time: a layer's weights, or the embedding, divided by ``tensor`` alone."""
    inside = outside = 0
    for declaration in weights_of(model):
        size = numbers_on_device(declaration, 1, tensor)
        if declaration.axes[0][0] == "layer":
            inside += size // model.layers
        else:
            outside = max(outside, size)
    return max(inside, outside)


@functools.lru_cache(maxsize=4096)
def numbers_on_device(declaration: Declaration, fsdp: int, tensor: int) -> int:
    """Numbers of a weight on each device."""
    sizes = {"data": 1, "fsdp": fsdp, "tensor": tensor}
    names = [name for name in sharding.of_weight(declaration, sizes) if name is not None]
    return math.prod(declaration.shape) // math.prod(sizes[str(name)] for name in names)
