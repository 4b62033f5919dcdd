"""What the report of a walk shows, computed from the walk: numbers by token, station, layer and head."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minitf import tokenizer as tokenizers
from minitf.analysis import attribution
from minitf.analysis.geometry import by_sublayer, encoding_geometry
from minitf.analysis.lens import as_context, output_vectors, read, station_names, stations
from minitf.config import ModelConfig
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.pretrained import Pretrained
from minitf.vocabulary import Measured, vocabulary_of
from minitf.walk import Edit, Walk

TOP, NEURONS = 6, 12
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Labels:
    """Tokens as people read them; a number where there is no tokenizer, or no text to the token."""

    tokenizer: Any

    def __call__(self, token: int) -> str:
        """The label of one token."""
        if self.tokenizer is None:
            return str(token)
        try:
            return tokenizers.token_labels(self.tokenizer, [token])[0] or f"⟨{token}⟩"
        except (KeyError, ValueError):
            return f"⟨{token}⟩"


def walk_data(
    parameters: Parameters,
    tokens: Int[np.ndarray, " position"],
    config: ModelConfig,
    labels: Labels,
    edit: Edit | None = None,
    predicted: Int[np.ndarray, " position"] | None = None,
) -> Numbers:
    """Everything that the report shows of one run over ``tokens``, as plain numbers and text.

    Axes, outermost first: ``position``, then station, step, head or neuron; ``pattern`` is, of each layer,
    ``[head, query, key]``. Attribution is of ``predicted``, one token a position, by default what this walk
    predicts there; it is absent where the model does not allow it, as the pattern is where there is none. Of an
    edited walk ``edit_parts`` is what the edit itself put into the end; heads that a layer lacks are NaN.
    """
    asked = None if predicted is None else jnp.asarray(predicted)
    numbers = jax.device_get(_numbers(parameters, jnp.asarray(tokens)[None], config, edit, asked))
    names = station_names(config)
    if config.feed_forward == "none":
        names = [name for name in names if not name.endswith(".post")]
    tops = [
        [
            [
                {"label": labels(int(token)), "p": float(p)}
                for token, p in zip(numbers["top"][s, t], numbers["probability"][s, t], strict=True)
            ]
            for s in range(len(names))
        ]
        for t in range(len(tokens))
    ]
    found: Numbers = {
        "stations": names,
        "tops": tops,
        "rank": numbers["rank"].T,
        "next": [labels(int(token)) for token in numbers["target"]],
        "map": [_map(numbers, t, labels) for t in range(len(tokens))],
        "attention": {name: values.T for name, values in numbers["attention"].items()},
        "feed_forward": {name: values.T for name, values in numbers["feed_forward"].items()},
        "efficiency": numbers["efficiency"],
        "first_logits": numbers["first_logits"],
        "predicted_ids": numbers["predicted"],
        "predicted": [labels(int(token)) for token in numbers["predicted"]],
    }
    if "pattern" in numbers:
        each = [np.zeros((0, 0, 0)) if x is None else x.astype(float) for x in numbers["pattern"]]
        # Rows that sum to one need no more; others may be of any size.
        shares = all(np.allclose(pattern.sum(axis=-1), 1, atol=1e-3) for pattern in each)
        found["pattern"] = [np.round(pattern, 3 if shares else 7) for pattern in each]
    if "heads" in numbers:
        found |= {
            "heads": np.moveaxis(numbers["heads"], 1, 0),
            "start": numbers["start"],
            "attention_parts": numbers["attention_parts"].T,
            "feed_forward_parts": numbers["feed_forward_parts"].T,
            "bias": numbers["bias"],
        }
    if "edit_parts" in numbers:
        found["edit_parts"] = numbers["edit_parts"]
    if "neurons" in numbers:
        found["neurons"] = [_strongest(numbers["neurons"][:, t]) for t in range(len(tokens))]
    return found


def both_sides(
    model: Pretrained, tokens: Int[np.ndarray, " position"], edit: Edit | None = None, prompt: int | None = None
) -> Numbers:
    """What a page needs: the tokens, the walk over them, and the edited one, where there is an edit.

    Args:
        model: with its tokenizer, where it has one.
        tokens: of one sequence; from number ``prompt`` on they are shown as generated.
        edit: the second side.
    """
    labels = Labels(model.tokenizer)
    plain = walk_data(model.parameters, tokens, model.config, labels)
    edited = None
    if edit is not None:
        same = plain["predicted_ids"]
        edited = walk_data(model.parameters, tokens, model.config, labels, edit, predicted=same)
    sides = [side for side in (plain, edited) if side is not None]
    told = _told(model, tokens, edit, [side.pop("first_logits") for side in sides])
    return {
        "tokens": [labels(int(t)) for t in tokens],
        "prompt": len(tokens) if prompt is None else prompt,
        "layers": model.config.layers,
        "heads": [len(pattern) for pattern in plain.get("pattern", ())],
        "before": plain,
        "after": edited,
        **told,
    }


def _told(
    model: Pretrained, tokens: Int[np.ndarray, " position"], edit: Edit | None, first_logits: list[np.ndarray]
) -> Numbers:
    """Of a model that tells numbers of sequences: what each side's logits of the first token tell.

    One that sees both ways was trained on sequences filled up to its length, sees what fills them and tells the
    mean over all positions; so it is asked in the same way.
    """
    vocabulary = None if model.tokenizer is None else vocabulary_of(model.tokenizer)
    if not isinstance(vocabulary, Measured):
        return {}
    if model.config.causal:
        ends = [logits[-1] for logits in first_logits]
    else:
        full = np.full((1, model.config.length), vocabulary.size, np.int32)
        full[0, : len(tokens)] = tokens
        runs = (None,) if edit is None else (None, edit)
        ends = [_mean_told(model.parameters, jnp.asarray(full), model.config, one) for one in runs]
    return {"told": {"name": vocabulary.name, "numbers": [vocabulary.number(float(end)) for end in ends]}}


@partial(jax.jit, static_argnames="config")
def _mean_told(
    parameters: Parameters, tokens: Int[Array, "1 position"], config: ModelConfig, edit: Edit | None
) -> Float[Array, ""]:
    return jnp.mean(walk(parameters, tokens, config, edit=edit).logits[..., 0])


@partial(jax.jit, static_argnames="config")
def _numbers(
    parameters: Parameters,
    tokens: Int[Array, "1 position"],
    config: ModelConfig,
    edit: Edit | None,
    predicted: Int[Array, " position"] | None,
) -> dict[str, Any]:
    passed = walk(parameters, tokens, config, edit=edit)
    points = stations(passed)
    if config.feed_forward == "none":
        points = jnp.concatenate([points[:1], points[1::2]])
    logits = jax.lax.map(lambda stream: read(parameters, stream, config)[0], points)
    says = jax.nn.log_softmax(logits.astype(jnp.float32))
    probability, top = jax.lax.top_k(jnp.exp(says), min(TOP, config.vocabulary))
    predicted = jnp.argmax(passed.logits[0], axis=-1) if predicted is None else predicted
    target = jnp.concatenate([tokens[0, 1:], predicted[-1:]])
    rank = jnp.sum(says > jnp.take_along_axis(says, target[None, :, None], axis=-1), axis=-1)
    geometry = encoding_geometry(passed, config)
    moves: dict[str, Any] = {"attention": {}, "feed_forward": {}}
    for name in ("relative_step", "turning_angle"):
        first, second = by_sublayer(getattr(geometry, name)[..., 0, :], config)
        moves["attention"][name], moves["feed_forward"][name] = first, second
    found = {
        "points": _on_the_sphere(jax.vmap(lambda x: as_context(parameters, x, config))(points)[:, 0]),
        "top": top,
        "probability": probability,
        "vectors": _on_the_sphere(output_vectors(parameters, config).T[top]),
        "rank": rank,
        "target": target,
        "predicted": predicted,
        "efficiency": geometry.efficiency[0],
        "first_logits": passed.logits[0, :, 0],
        **moves,
    }
    if passed.layers.pattern is not None:
        found["pattern"] = [None if layer is None else layer[0] for layer in passed.layers.pattern]
    if config.post_norm or not config.residual or config.unembedding_transform:
        return found
    steps = attribution.by_step(parameters, passed, config, predicted[None])
    found |= {
        "heads": _own_heads(attribution.by_head(parameters, passed, config, predicted[None]).parts[:, 0], passed),
        "start": steps.start[0],
        "attention_parts": steps.attention[:, 0],
        "feed_forward_parts": jnp.zeros((0, len(predicted)))
        if steps.feed_forward is None
        else steps.feed_forward[:, 0],
        "bias": steps.bias[0],
    }
    if edit is not None:
        found["edit_parts"] = attribution.chosen_logit(passed.logits, predicted[None])[0] - steps.total[0]
    if steps.feed_forward is not None:
        found["neurons"] = attribution.by_neuron(parameters, passed, config, predicted[None]).parts[:, 0]
    return found


def _own_heads(parts: Float[Array, "layer position head"], passed: Walk) -> Float[Array, "layer position head"]:
    """No number in place of the heads that a layer lacks."""
    steps = passed.layers.head_steps
    if not isinstance(steps, tuple):
        return parts
    has = jnp.array([0 if layer is None else layer.shape[2] for layer in steps])
    return jnp.where(jnp.arange(parts.shape[-1]) < has[:, None, None], parts, jnp.nan)


def _on_the_sphere(points: Float[Array, "*rest width"]) -> Float[Array, "*rest width"]:
    """Of length one, so that only directions are compared."""
    points = points.astype(jnp.float32)
    length = jnp.linalg.norm(points, axis=-1, keepdims=True)
    return points / jnp.where(length == 0, 1.0, length)


def _map(numbers: Numbers, t: int, labels: Labels) -> Numbers:
    """One position's stations and the tokens that lead at them, in the three directions that vary most."""
    points = numbers["points"][:, t].astype(float)
    tokens, places = np.unique(numbers["top"][:, t, :3], return_index=True)
    vectors = numbers["vectors"][:, t, :3].reshape(-1, points.shape[1])[places].astype(float)
    together = np.concatenate([points, vectors])
    middle = together.mean(axis=0)
    _, sizes, directions = np.linalg.svd(together - middle, full_matrices=False)
    directions = directions[:3]
    share = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-30))
    return {
        "points": (points - middle) @ directions.T,
        "tokens": [
            {"label": labels(int(token)), "at": at}
            for token, at in zip(tokens, (vectors - middle) @ directions.T, strict=True)
        ],
        "share": share,
    }


def _strongest(parts: Float[np.ndarray, "layer hidden"]) -> list[Numbers]:
    """The neurons that move the logit most, either way."""
    flat = parts.reshape(-1)
    order = np.argsort(-np.abs(flat))[:NEURONS]
    return [
        {"layer": int(i // parts.shape[1]), "neuron": int(i % parts.shape[1]), "value": float(flat[i])}
        for i in order
    ]
