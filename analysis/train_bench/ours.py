"""Our side: a worker that trains with the programs of ``minitf train``, on one core."""

from typing import Any

from minitf.analysis.walk_bench.serve import Task, one_core, serve


def prepare(name: str, size: dict[str, Any]) -> dict[str, Task]:
    """Training of that size: one turn of all its models."""
    import jax  # noqa: PLC0415 (one_core comes first)
    import numpy as np  # noqa: PLC0415

    from minitf import ModelConfig  # noqa: PLC0415
    from minitf.analysis.train_bench.sizes import DECAY, RATE, Size  # noqa: PLC0415
    from minitf.train import sharding, trainer  # noqa: PLC0415
    from minitf.train.batch import next_token  # noqa: PLC0415
    from minitf.train.settings import as_config  # noqa: PLC0415
    from minitf.train.step import Program  # noqa: PLC0415

    s = Size(**size)
    config = as_config(
        {
            "training": {"steps": 10**6, "batch": s.batch, "seeds": s.seeds, "steps_per_call": s.steps},
            "optimizer": {"rate": RATE, "weight_decay": DECAY, "schedule": "constant", "warm_up": 0, "clip": 0.0},
        }
    )
    model = ModelConfig(s.vocabulary, s.layers, s.width, s.heads, length=s.length, tied=True)
    program = Program(config, model, "next_token", as_batch=lambda window, key: next_token(window))
    mesh = sharding.mesh_of(config.mesh)
    programs = trainer.compiled(program, mesh, 1.0, s.length)
    shape = (s.seeds, s.steps, s.batch, s.length + 1)
    tokens = jax.device_put(
        np.random.default_rng(0).integers(0, s.vocabulary, shape, np.int32), sharding.of_windows(mesh)
    )
    kept: dict[str, Any] = {"state": programs.start(), "done": 0}

    def train() -> float:
        done = kept["done"]
        kept["state"], measures = programs.advance(kept["state"], tokens, done, done + s.steps)
        kept["done"] = done + s.steps
        return float(np.mean(np.asarray(measures.loss)[..., -1]))

    return {"train": train}


if __name__ == "__main__":
    one_core()
    serve({"side": "minitf"}, prepare)
