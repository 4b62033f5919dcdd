"""What is measured of our side: the programs of ``minitf train``, on random tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minitf import ModelConfig
from minitf.analysis.train_bench.sizes import DECAY, RATE, Size
from minitf.analysis.training.prepared import LOOKED_AT
from minitf.analysis.training.statistics import looker
from minitf.train import sharding, trainer
from minitf.train.batch import next_token
from minitf.train.settings import as_config
from minitf.train.step import Program


@dataclass(frozen=True)
class Training:
    """A model under way.

    Attributes:
        train: takes the steps of one turn; returns the last one's loss.
        look: what ``minitf train`` records of the walk; returns the mean entropy of attention, as a share.
    """

    train: Callable[[], float]
    look: Callable[[], float]


PRODUCTS = 10  # one after another


def model_of(size: Size) -> ModelConfig:
    """The model of that size."""
    return ModelConfig(
        size.vocabulary,
        size.layers,
        size.width,
        size.heads,
        length=size.length,
        tied=True,
        biases=size.published,
    )


def products(width: int) -> Callable[[], float]:
    """What a card can do: dense products in bfloat16, each of the one before; they return their operations.

    Of noise, since a card takes less time for zeros.
    """
    draw = lambda key: jax.random.normal(key, (width, width), jnp.bfloat16) / width**0.5
    first, second = map(draw, jax.random.split(jax.random.key(0)))
    chain = jax.jit(lambda x, y: jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ y, x))

    def run() -> float:
        jax.block_until_ready(chain(first, second))
        return 2.0 * PRODUCTS * width**3

    return run


def training(size: Size, optimizer: str = "adamw") -> Training:
    """A fresh training of that size; its programs are compiled here or when first called."""
    config = as_config(
        {
            "training": {
                "steps": 10**6,
                "batch": size.batch,
                "seeds": size.seeds,
                "steps_per_call": size.steps,
                "precision": size.precision,
            },
            "optimizer": {
                "name": optimizer,
                "rate": RATE,
                "weight_decay": DECAY,
                "schedule": "constant",
                "warm_up": 0,
                "clip": 0.0,
            },
        }
    )
    model = model_of(size)
    program = Program(config, model, "next_token", as_batch=lambda window, key: next_token(window))
    mesh = sharding.mesh_of(config.mesh)
    programs = trainer.compiled(program, mesh, 1.0, size.length)
    shape = (size.seeds, size.steps, size.batch, size.length + 1)
    tokens = jax.device_put(
        np.random.default_rng(0).integers(0, size.vocabulary, shape, np.int32), sharding.of_windows(mesh)
    )
    shown = next_token(jnp.resize(tokens[0, 0], (LOOKED_AT, size.length + 1)))
    kept: dict[str, Any] = {"state": programs.start(), "done": 0}

    def train() -> float:
        done = kept["done"]
        kept["state"], measures = programs.advance(kept["state"], tokens, done, done + size.steps)
        kept["done"] = done + size.steps
        return float(np.mean(np.asarray(measures.loss)[..., -1]))

    looked = looker(shown, model, batched=size.seeds > 1)

    def look() -> float:
        found = jax.tree.map(np.asarray, looked(kept["state"].parameters))
        return float(np.mean(found["entropy"]))

    return Training(train, look)
