"""The command ``minitf ablate``: replace the association of a trained model, and write what that costs."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minitf.analysis import association, prediction_quality
from minitf.analysis.ablate.page import DIGITS, page
from minitf.analysis.ablate.published import NEXT, published
from minitf.analysis.association import FRACTIONS
from minitf.analysis.claims import save_claims
from minitf.analysis.given import check_tokens
from minitf.analysis.page_parts import script_json
from minitf.analysis.run_folder import Problem, open_run_folder, told_to_people, writing_results
from minitf.files import write_atomically
from minitf.model import walk
from minitf.pretrained import Pretrained
from minitf.train.batch import NO_TARGET, Batch
from minitf.train.kept_models import load
from minitf.vocabulary import Labelled, Measured, mask_token_of, vocabulary_of

RANDOM_ORDERS = 2
MEASURES = {"loss", "accuracy", "divergence", "margins"}
CHARACTERS_A_TOKEN, LEAST_CHARACTERS = 40, 1 << 16  # of the text, what is surely enough at once
MASKED = 0.15  # share of the tokens that a model which sees both ways is asked for (Devlin et al. 2019)
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
        seed: of the choice of windows, of random replacements and orders, and of what is masked.
        mask: the token that stands for what is to be told, of a model that sees both ways; None: its tokenizer's.
    """

    model: str
    text: Path
    ids: bool = False
    length: int = 0
    windows: int = 16
    data: int = 32
    seed: int = 0
    mask: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("length", 2 if self.length else 0), ("windows", 1), ("data", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.seed >= 2**31:
            raise ValueError(f"seed is {self.seed}; it must be below 2^31")


def run(
    config: AblateConfig,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Measure every replacement; write ``report.html``, numbers and claims; returns the path of the report.

    Each replacement is kept in ``out/arrays`` when it is done; ``resume`` goes on with the next.

    Raises:
        Problem: model, text or folder cannot be used; its message is for people.
    """
    with told_to_people():
        say("loading the model")
        model = load(config.model)
        _check_tells_tokens(model)
        if not config.length:
            config = dataclasses.replace(config, length=min(LENGTH, model.config.length))
        elif config.length > model.config.length:
            raise Problem(f"length is {config.length}; this model reads at most {model.config.length} tokens")
        tokens = tokens_of(config, model)
        cuts = windows(tokens, config)
        association.check(jax.eval_shape(lambda p: walk(p, cuts[0], model.config), model.parameters))
        measured, data = (asked(cut, model, config.seed, config.mask) for cut in cuts)
        settings = {**vars(config), "text": str(config.text), "tokens": _digest(measured.tokens, data.tokens)}
        open_run_folder(out, settings, overwrite=overwrite, resume=resume)
    path = out / "report.html"
    with writing_results(out):
        # The page and the file say the same, to the last digit.
        measures = measure(model, measured, data, config.seed, say, out / "arrays")
        found = json.loads(script_json(measures, DIGITS))
        write_atomically(out / "ablate.json", (json.dumps(found, indent=1) + "\n").encode())
        claims = published(found)
        save_claims(out / "claims.json", claims)
        shown = [(name, str(value)) for name, value in vars(config).items() if name != "model"]
        shown.append(("tokens that windows were drawn from", f"{len(tokens):,}"))
        write_atomically(path, page(found, claims, model, config.model, shown).encode())
    return path


def _check_tells_tokens(model: Pretrained) -> None:
    """Raises Problem for a model of whole sequences: of tokens it was never asked."""
    vocabulary = None if model.tokenizer is None else vocabulary_of(model.tokenizer)
    if isinstance(vocabulary, Labelled | Measured):
        what = "its label" if isinstance(vocabulary, Labelled) else f"its number {vocabulary.name!r}"
        raise Problem(
            f"this model was trained to tell of a whole sequence {what}, and not tokens, which are asked for "
            "here; from Python, minitf.analysis.association replaces associations under any metric"
        )


def tokens_of(config: AblateConfig, model: Pretrained) -> Int[np.ndarray, " token"]:
    """The file's tokens. Raises ValueError where there are none, or not of this model."""
    text = _read(config.text)
    if config.ids:
        words = text.replace(",", " ").split()
        wrong = next((word for word in words if not re.fullmatch("-?[0-9]{1,18}", word)), None)
        if wrong is not None:
            raise Problem(
                f"{config.text} is to hold token ids, and {wrong[:40]!r} is none: for text leave out --ids"
            )
        tokens = [int(word) for word in words]
    elif model.tokenizer is None:
        raise Problem("minitf has no tokenizer for this model: give a file of token ids, and --ids")
    else:
        needed, tokens = (config.windows + config.data) * config.length, []
        # No more than is needed, for some tokenizers take long over long texts; in pieces that are few, for some
        # put a token of their own at the beginning of each.
        piece = max(CHARACTERS_A_TOKEN * needed, LEAST_CHARACTERS)
        for start in range(0, len(text), piece):
            tokens += model.tokenizer.encode(text[start : start + piece])
            if len(tokens) >= 4 * needed:
                break
    check_tokens(tokens, model.config)
    return np.array(tokens, np.int32)


def windows(tokens: Int[np.ndarray, " token"], config: AblateConfig) -> tuple[Array, Array]:
    """Windows to measure on and windows for means, drawn from all of the tokens, none in both."""
    count = len(tokens) // config.length
    if count < config.windows + config.data:
        raise Problem(
            f"{config.windows} + {config.data} windows of {config.length} tokens need a text of "
            f"{(config.windows + config.data) * config.length}; {config.text} has {len(tokens)}"
        )
    cut = tokens[: count * config.length].reshape(count, config.length)
    chosen = np.random.default_rng(config.seed).permutation(count)[: config.windows + config.data]
    return jnp.asarray(cut[chosen[: config.windows]]), jnp.asarray(cut[chosen[config.windows :]])


def asked(tokens: Int[Array, "batch position"], model: Pretrained, seed: int, mask: int | None = None) -> Batch:
    """Every next token; of a model that sees both ways, what stood where a few tokens are masked.

    Raises Problem for such a model whose mask is not known, and for a mask that has no use or is no token.
    """
    if model.config.causal:
        if mask is not None:
            raise Problem(f"mask is {mask}; this model predicts next tokens, so nothing is masked: leave it out")
        return Batch(tokens, prediction_quality.next_tokens(tokens))
    mask = _mask_of(model) if mask is None else mask
    if mask is None:
        raise Problem(
            "this model sees later positions too, so it is asked what stood under masked tokens, and it has no "
            "tokenizer that says which token is the mask: say --mask TOKEN"
        )
    check_tokens([mask], model.config)
    chosen = jax.random.uniform(jax.random.key(seed), tokens.shape) < MASKED
    # At least one in each window, whatever its length.
    chosen = chosen.at[:, tokens.shape[1] // 2].set(True)
    return Batch(jnp.where(chosen, mask, tokens), jnp.where(chosen, tokens, NO_TARGET))


def _mask_of(model: Pretrained) -> int | None:
    """The token that stands for what is to be told: the tokenizer's own, or the one after all of its tokens."""
    vocabulary = None if model.tokenizer is None else vocabulary_of(model.tokenizer)
    if vocabulary is None:
        return None
    own = mask_token_of(vocabulary)
    return vocabulary.size if own is None and model.config.vocabulary == vocabulary.size + 1 else own


def measure(
    model: Pretrained,
    measured: Batch,
    data: Batch,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
    kept_in: Path | None = None,
) -> dict[str, Any]:
    """Loss, accuracy and divergence: intact, for each head, and for shares of all heads in several orders.

    ``margins`` are half of the 95 % intervals, over windows, of how much each of the three changes; of the intact
    model, of the measure itself.

    Orders are by what heads cost on windows of ``data``, which nothing is measured on. What is found of a
    replacement is kept in the folder ``kept_in``, if any, and read where it is there.
    """
    parameters, config = model.parameters, model.config
    kept = jax.jit(lambda p, t: association.kept(walk(p, t, config)))
    say("the intact model")
    intact, of_data = kept(parameters, measured.tokens), kept(parameters, data.tokens)
    few = len(measured.tokens)
    others = kept(parameters, data.tokens[:few])
    metric = prediction_quality.metric_by_window(measured.targets, intact.logits)
    as_it_is = jax.jit(metric)(intact.logits)
    told = lambda numbers: _told(numbers, as_it_is, measured.targets)
    metric_of_others = prediction_quality.metric(data.targets[:few], others.logits)
    found: dict[str, Any] = {
        "layers": config.layers,
        "heads": intact.layers.pattern.shape[2],
        "asked": NEXT if config.causal else "masked tokens",
        "windows": len(measured.tokens),
        "intact": _told(as_it_is, jnp.zeros_like(as_it_is), measured.targets),
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
            heads = told(association.by_head(parameters, intact, pattern, metric, config))
            of_others = jax.jit(replace, static_argnums=2)(others, of_data, config, key)
            costs = association.by_head(parameters, others, of_others, metric_of_others, config)
            importance = np.asarray(prediction_quality.as_quality(costs).loss)
            orders = association.orders(importance, range(seed, seed + RANDOM_ORDERS))
            masks = association.every_share(orders, importance.shape)
            shares = association.with_heads_replaced(parameters, measured.tokens, pattern, masks, metric, config)
            by_order = shares.reshape(len(orders), len(FRACTIONS), *shares.shape[1:])
            one = {"heads": heads, "orders": dict(zip(orders, map(told, by_order), strict=True))}
            if file is not None:
                write_atomically(file, script_json(one, DIGITS).encode())
        found["replacements"][name] = one
    # Where layers differ, some have fewer heads than there is room for; those are no numbers.
    of_heads = found["replacements"]["uniform"]["heads"]["loss"]
    heads_there = int(np.sum(np.isfinite(np.array(of_heads, float))))
    found["fractions"] = [association.replaced(share, heads_there) / heads_there for share in FRACTIONS]
    return found


def _kept(file: Path | None) -> dict[str, Any] | None:
    """What an earlier run found of a replacement; None where it did not, or the file is damaged."""
    if file is None or not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        return None
    try:
        every = [found["heads"], *found["orders"].values()]
        whole = len(every) == 3 + RANDOM_ORDERS and all(set(one) == MEASURES for one in every)
        return found if whole and all(len(one["loss"]) == len(FRACTIONS) for one in every[1:]) else None
    except (AttributeError, KeyError, TypeError):
        return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise Problem(f"The text {file} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise Problem(f"The text {file} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _digest(*tokens: Array) -> str:
    """Of the windows, so that no run goes on with another text under the same name."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in tokens)).hexdigest()[:16]


def _told(
    numbers: Float[Array, "*places window three"],
    intact: Float[Array, "window three"],
    targets: Int[Array, "window position"],
) -> dict[str, Any]:
    """Means over windows by name, and the margins of what they differ by from the intact ones."""
    found, base = (vars(prediction_quality.as_quality(x)) for x in (numbers, intact))
    means = {name: np.asarray(np.mean(value, axis=-1), float) for name, value in found.items()}
    changes = {name: np.asarray(value, float) - np.asarray(base[name], float) for name, value in found.items()}
    return {**means, "margins": {name: prediction_quality.margin(x, targets) for name, x in changes.items()}}
