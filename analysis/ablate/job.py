"""The command ``minitf ablate``: replace the association of a trained model, and write what that costs."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from minitf.analysis import association
from minitf.analysis.ablate.page import DIGITS, page
from minitf.analysis.association import FRACTIONS, Quality
from minitf.analysis.given import check_tokens
from minitf.analysis.page_parts import script_json
from minitf.analysis.patching import Metric
from minitf.analysis.run_folder import Problem, open_run_folder, told_to_people, writing_results
from minitf.files import write_atomically
from minitf.model import walk
from minitf.pretrained import Pretrained
from minitf.train.kept_models import load

RANDOM_ORDERS = 2
LENGTH = 64  # of a window where nothing else is asked for


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """What to ablate, and on which text.

    Attributes:
        model: as :func:`minitf.pretrained.load` takes it; some of its layers have an association.
        text: a file of text to predict; of token ids, with ``ids``.
        ids: the file holds token ids, apart by spaces, commas or line ends.
        length: tokens in a window; 0 for 64, or as many as the model reads.
        windows: windows on which the loss is measured.
        data: further windows, from which means are taken.
        seed: of the choice of windows, of random replacements and orders.
    """

    model: str
    text: Path
    ids: bool = False
    length: int = 0
    windows: int = 16
    data: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 2 if self.length else 0), ("windows", 1), ("data", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def run(
    config: AblateConfig,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Measure every replacement; write ``report.html`` and ``ablate.json`` to ``out``; returns the report's path.

    Each replacement is kept in ``out/arrays`` when it is done; ``resume`` goes on with the next.

    Raises:
        Problem: model, text or folder cannot be used; its message is for people.
    """
    with told_to_people():
        say("loading the model")
        model = load(config.model)
        if not config.length:
            config = dataclasses.replace(config, length=min(LENGTH, model.config.length))
        elif config.length > model.config.length:
            raise Problem(f"length is {config.length}; this model reads at most {model.config.length} tokens")
        measured, data = windows(tokens_of(config, model), config)
        association.check(jax.eval_shape(lambda p: walk(p, measured, model.config), model.parameters))
        settings = {**vars(config), "text": str(config.text), "tokens": _digest(measured, data)}
        open_run_folder(out, settings, overwrite=overwrite, resume=resume)
    path = out / "report.html"
    with writing_results(out):
        # The page and the file say the same, to the last digit.
        measures = measure(model, measured, data, config.seed, say, out / "arrays")
        found = json.loads(script_json(measures, DIGITS))
        write_atomically(out / "ablate.json", (json.dumps(found, indent=1) + "\n").encode())
        shown = [(name, str(value)) for name, value in vars(config).items() if name != "model"]
        write_atomically(path, page(found, model, config.model, shown).encode())
    return path


def tokens_of(config: AblateConfig, model: Pretrained) -> Int[np.ndarray, " token"]:
    """The file's tokens. Raises ValueError where there are none, or not of this model."""
    text = config.text.read_text(encoding="utf-8")
    if config.ids:
        try:
            tokens = [int(number) for number in text.replace(",", " ").split()]
        except ValueError as error:
            raise Problem(f"{config.text} is to hold token ids: {error}") from None
    elif model.tokenizer is None:
        raise Problem("minitf has no tokenizer for this model: give a file of token ids, and --ids")
    else:
        needed, tokens = (config.windows + config.data) * config.length, []
        # Line by line, and no more than is needed: some tokenizers take long over long texts.
        for line in text.splitlines(keepends=True):
            tokens += model.tokenizer.encode(line)
            if len(tokens) >= 4 * needed:
                break
    check_tokens(tokens, model.config)
    return np.array(tokens, np.int32)


def windows(tokens: Int[np.ndarray, " token"], config: AblateConfig) -> tuple[Array, Array]:
    """Windows to measure on and windows for means, drawn from the whole text, none in both."""
    count = len(tokens) // config.length
    if count < config.windows + config.data:
        raise Problem(
            f"{config.windows} + {config.data} windows of {config.length} tokens need a text of "
            f"{(config.windows + config.data) * config.length}; {config.text} has {len(tokens)}"
        )
    cut = tokens[: count * config.length].reshape(count, config.length)
    chosen = np.random.default_rng(config.seed).permutation(count)[: config.windows + config.data]
    return jnp.asarray(cut[chosen[: config.windows]]), jnp.asarray(cut[chosen[config.windows :]])


def measure(
    model: Pretrained,
    tokens: Array,
    data: Array,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
    kept_in: Path | None = None,
) -> dict[str, Any]:
    """Loss, accuracy and divergence: intact, for each head, and for shares of all heads in several orders.

    What is found of a replacement is kept in the folder ``kept_in``, if any, and read where it is there.
    """
    parameters, config = model.parameters, model.config
    kept = jax.jit(lambda p, t: association.kept(walk(p, t, config)))
    say("the intact model")
    intact, of_data = kept(parameters, tokens), kept(parameters, data)
    as_it_is = association.quality(intact.logits, tokens, intact.logits)
    metric = association.metric(tokens, intact.logits)
    found: dict[str, Any] = {
        "layers": config.layers,
        "heads": intact.layers.pattern.shape[2],
        "fractions": FRACTIONS,
        "intact": _plain(as_it_is),
        "replacements": {},
    }
    possible = association.possible(intact)
    for number, (name, replace) in enumerate(possible.items()):
        say(f"{number + 1} of {len(possible)}: {name}")
        file = None if kept_in is None else kept_in / f"{name.replace(' ', '_')}.json"
        one = _kept(file)
        if one is None:
            key = jax.random.fold_in(jax.random.key(seed), number)
            pattern = jax.jit(replace, static_argnums=2)(intact, of_data, config, key)
            heads = association.as_quality(association.by_head(parameters, intact, pattern, metric, config))
            one = {"heads": _plain(heads), "orders": _shares(model, tokens, pattern, metric, heads, seed)}
            if file is not None:
                write_atomically(file, script_json(one, DIGITS).encode())
        found["replacements"][name] = one
    return found


def _kept(file: Path | None) -> dict[str, Any] | None:
    """What an earlier run found of a replacement; None where it did not, or the file is damaged."""
    if file is None or not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) and set(found) == {"heads", "orders"} else None


def _digest(*tokens: Array) -> str:
    """Of the windows, so that no run goes on with another text under the same name."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in tokens)).hexdigest()[:16]


def _shares(
    model: Pretrained, tokens: Array, pattern: Array, metric: Metric, heads: Quality, seed: int
) -> dict[str, Any]:
    """For each order, the quality at every share of the heads."""
    importance = np.asarray(heads.loss)
    orders = association.orders(importance, range(seed, seed + RANDOM_ORDERS))
    masks = association.every_share(orders, importance.shape)
    found = association.with_heads_replaced(model.parameters, tokens, pattern, masks, metric, model.config)
    together = association.as_quality(found)
    shares = {name: np.asarray(value).reshape(len(orders), -1) for name, value in vars(together).items()}
    return {order: {name: values[i] for name, values in shares.items()} for i, order in enumerate(orders)}


def _plain(quality: Quality) -> Mapping[str, Any]:
    return {name: np.asarray(value, float) for name, value in vars(quality).items()}
