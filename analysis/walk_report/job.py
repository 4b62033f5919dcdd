"""The command ``minitf walk``: load, generate, edit, walk, and write the page."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minitf.analysis.given import check_tokens
from minitf.analysis.run_folder import ANEW, Problem, open_run_folder, told_to_people, writing_results
from minitf.analysis.walk_report import page
from minitf.analysis.walk_report.data import both_sides
from minitf.changes import compose
from minitf.config import ModelConfig
from minitf.decode import Sampling, stream
from minitf.edits import ablate, steer
from minitf.files import write_atomically
from minitf.model import walk
from minitf.pretrained import Pretrained
from minitf.train.kept_models import load
from minitf.walk import Edit, Walk

# The page holds every head's association, so its size grows with the square of the text.
FARTHEST = 1e18  # whose square is a float32
LONGEST = 256


@dataclasses.dataclass(frozen=True)
class WalkConfig:
    """What to walk, and what to change in it.

    Attributes:
        model: as :func:`minitf.pretrained.load` takes it.
        text: the prompt; numbers if ``ids``.
        ids: the text is token ids, apart by spaces or commas; needed for a model without tokenizer.
        generate: tokens to add to the text before it is walked.
        sampling: how they are chosen.
        seed: of the choices.
        ablate: heads to leave out, each ``LAYER.HEAD``, counted from 0.
        steer: ``LAYER:COEFFICIENT:TEXT:TEXT``: moves the residual stream after that layer, at every position, from
            what the second text ends in towards what the first ends in.
    """

    model: str
    text: str
    ids: bool = False
    generate: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    ablate: tuple[str, ...] = ()
    steer: str = ""

    def __post_init__(self) -> None:
        if self.generate < 0:
            raise ValueError(f"generate is {self.generate}; it must be at least 0")


def run(
    config: WalkConfig, out: Path, *, overwrite: bool = False, say: Callable[[str], None] = lambda text: None
) -> Path:
    """Walk the text and write ``report.html`` and ``walk.json`` to ``out``; returns the report's path.

    ``say`` gets the prompt and then each generated token's text as it comes, if any are asked for.

    Raises:
        Problem: model, text, edit or folder cannot be used; its message is for people.
    """
    with told_to_people():
        model = load(config.model)
        tokens = _tokens(config, model)
        edit = edit_of(config, model)
        if config.generate and not model.config.causal:
            raise Problem("the model sees later positions too (it is not causal), so it cannot generate a text")
        room = min(model.config.length, LONGEST)
        if len(tokens) + config.generate > room:
            raise Problem(
                f"{len(tokens)} tokens of text and {config.generate} to generate are more than the {room} that "
                "this model, or a page, has room for"
            )
        open_run_folder(out, dataclasses.asdict(config), overwrite=overwrite, resumable=False)
        prompt = len(tokens)
        if config.generate:
            tokens = _generated(config, model, tokens, edit, say)
        data = both_sides(model, tokens, edit, prompt=prompt)
        path = out / "report.html"
        shown = page.page(data, model, config.model, _in_words(config), _settings(config))
        with writing_results(out, ANEW):
            write_atomically(out / "walk.json", page.as_json(data).encode())
            write_atomically(path, shown.encode())
    return path


def _in_words(config: WalkConfig) -> list[str]:
    heads = [f"head {head} left out" for head in config.ablate]
    return [*heads, *([f"steered {config.steer}"] if config.steer else [])]


def _settings(config: WalkConfig) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in vars(config).items() if key != "model" and value not in ("", ())]


def edit_of(config: WalkConfig, model: Pretrained) -> Edit | None:
    """The edit that the options ask for, or None. Raises ValueError in sentences for people."""
    like = jax.eval_shape(
        lambda: walk(model.parameters, jnp.zeros((1, 1), jnp.int32), model.config),
    )
    edit: Edit | None = None
    for head in config.ablate:
        found = re.fullmatch(r"(\d+)\.(\d+)", head)
        if not found:
            raise ValueError(f"--ablate {head}: name a head as LAYER.HEAD, such as 0.3")
        more = ablate(like, "layers.z", layer=int(found[1]), head=int(found[2]))
        edit = more if edit is None else compose(edit, more)
    if config.steer:
        more = _steering(config.steer, model, like)
        edit = more if edit is None else compose(edit, more)
    return edit


def _steering(option: str, model: Pretrained, like: Walk) -> Edit:
    parts = option.split(":", 3)
    try:
        layer, coefficient, (towards, away) = int(parts[0]), float(parts[1]), parts[2:]
    except (ValueError, IndexError):
        raise ValueError(
            f"--steer {option}: say LAYER:COEFFICIENT:TEXT:TEXT, such as 2:4:happy:sad, to move from the second "
            "text towards the first"
        ) from None
    if not np.isfinite(coefficient):
        raise ValueError(f"--steer {option}: the coefficient is {coefficient}; it must be finite")
    if model.tokenizer is None:
        raise ValueError("--steer compares two texts, and minitf has no tokenizer for this model")
    if not 0 <= layer < model.config.layers:
        raise ValueError(f"--steer {option}: the model has no layer {layer}, only 0 to {model.config.layers - 1}")

    def ending(text: str) -> Any:
        tokens = _checked(list(model.tokenizer.encode(text)), model.config)
        passed = walk(model.parameters, jnp.array([tokens]), model.config)
        return passed.layers.resid_post[layer, 0, -1]

    vector = ending(towards) - ending(away)
    length = abs(coefficient) * float(np.linalg.norm(np.asarray(vector, np.float64)))
    if not length <= FARTHEST:
        raise ValueError(
            f"--steer {option}: the stream would be moved by {length:.2g}; it must be at most {FARTHEST:.0g}, or "
            "lengths are no numbers"
        )
    return steer(like, vector, layer=layer, coefficient=coefficient)


def _tokens(config: WalkConfig, model: Pretrained) -> np.ndarray:
    if config.ids:
        words = config.text.replace(",", " ").split()
        wrong = [word for word in words if not re.fullmatch(r"\d+", word)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no token id; with --ids the text is whole numbers")
        tokens = [int(word) for word in words]
    elif model.tokenizer is None:
        raise ValueError(
            "minitf has no tokenizer for this model; give token ids with --ids (a tokenizer.json beside the model "
            "is read where the package tokenizers is installed: pip install tokenizers)"
        )
    else:
        tokens = list(model.tokenizer.encode(config.text))
    return np.array(_checked(tokens, model.config), np.int32)


def _checked(tokens: list[int], config: ModelConfig) -> list[int]:
    if not tokens:
        raise ValueError("the text is empty")
    check_tokens(tokens, config)
    if len(tokens) > config.length:
        raise ValueError(f"a text of {len(tokens)} tokens is longer than the model's {config.length} positions")
    return tokens


def _generated(
    config: WalkConfig, model: Pretrained, tokens: np.ndarray, edit: Edit | None, say: Callable[[str], None]
) -> np.ndarray:
    """The tokens and those that follow, said as they come: text, or ids where there is no tokenizer."""
    ids, told = tokens.tolist(), ""

    def tell() -> None:
        nonlocal told
        # The whole text each time: a character may need several tokens.
        text = " ".join(map(str, ids)) if model.tokenizer is None else model.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            say(text[len(told) :])
            told = text

    tell()
    steps = stream(
        model.parameters,
        [ids],
        model.config,
        steps=config.generate,
        sampling=config.sampling,
        key=jax.random.key(config.seed),
        edit=edit,
    )
    for (token,) in steps:
        ids.append(int(token))
        tell()
    return np.array(ids, np.int32)
