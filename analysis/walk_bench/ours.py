"""Our side of ``minitf bench walk``, as a worker process on one core."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from minitf.analysis.walk_bench.serve import Task, begin, serve


def main() -> None:
    """Serve; on a CPU with one core and one thread, as the peers; elsewhere with products in all of float32."""
    device = begin()
    if device == "cpu":
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax  # noqa: PLC0415 (after the flags)

    jax.config.update("jax_default_matmul_precision", "highest")
    serve({"version": jax.__version__, "device": jax.devices()[0].device_kind}, prepare, device)


def prepare(folder: str, size: dict[str, int]) -> dict[str, Task]:
    """What can be measured of a model."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    from minitf import walk  # noqa: PLC0415
    from minitf.analysis import association  # noqa: PLC0415
    from minitf.analysis.attribution_patching import attribution_patching  # noqa: PLC0415
    from minitf.analysis.patching import patch  # noqa: PLC0415
    from minitf.decode import generate  # noqa: PLC0415
    from minitf.parameters import split_layers  # noqa: PLC0415
    from minitf.pretrained import load  # noqa: PLC0415
    from minitf.record import record  # noqa: PLC0415
    from minitf.walk import leaves  # noqa: PLC0415

    model = load(folder)
    # The sweep runs one program for every layer, out of the stack. What runs the layers in order takes them apart
    # once, as the peers hold them, where there are fewer rows than weights to a row.
    stacked, config = model.parameters, model.config
    parameters = split_layers(stacked) if size["rows"] < config.width else stacked
    corrupt, clean = (jnp.asarray(x) for x in json.loads((Path(folder) / "tokens.json").read_text()))
    forward = jax.jit(lambda p, t: walk(p, t, config).logits)
    everything = jax.jit(lambda p, t: walk(p, t, config))
    shapes = jax.eval_shape(everything, parameters, corrupt)
    heads = jax.jit(lambda p, t: record(walk(p, t, config), "layers.z"))
    starts = jax.jit(lambda p, t: record(walk(p, t, config), "layers.resid_pre"))
    names = [name for name, _ in leaves(shapes) if name.startswith("layers.")]
    slope = jax.jit(lambda p, t, other: attribution_patching(p, t, other, _last, config, names))
    # Where no gradient is asked for, this need not be compiled.
    other = cache(lambda: everything(parameters, clean))

    def memory() -> dict[str, int]:
        analyses = [f.lower(parameters, corrupt).compile().memory_analysis() for f in (everything, forward)]
        kept, plain = (analysis for analysis in analyses if analysis is not None)
        arrays = sum(x.size * x.dtype.itemsize for _, x in leaves(shapes))
        return {
            "arrays": arrays,
            "output": kept.output_size_in_bytes,
            "temporary": kept.temp_size_in_bytes,
            "temporary_plain": plain.temp_size_in_bytes,
        }

    def sweep() -> Any:
        # The walks that a sweep reads are part of its cost, as they are of the peers'.
        found = patch(stacked, starts(parameters, corrupt), heads(parameters, clean), _last, config, at=(-1,))
        return np.asarray(found).reshape(-1).tolist()

    patterns = jax.jit(lambda p, t: record(walk(p, t, config), ("layers.resid_pre", "layers.pattern")))

    def loss(logits: Any) -> Any:
        says = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(says, corrupt[:, 1:, None], axis=-1))

    def ablation() -> Any:
        intact = patterns(parameters, corrupt)
        uniform = association.uniform(intact, intact, config, jax.random.key(0))
        return np.asarray(association.by_head(stacked, intact, uniform, loss, config)).reshape(-1).tolist()

    def written() -> Any:
        done = generate(stacked, np.asarray(corrupt).tolist(), config, steps=size["new_tokens"])
        return np.asarray(done.tokens).tolist()

    def block(value: Any) -> None:
        jax.block_until_ready(value)

    return {
        "forward": lambda: block(forward(parameters, corrupt)),
        "everything": lambda: block(everything(parameters, corrupt)),
        "memory": memory,
        "sweep": sweep,
        "ablation": ablation,
        "gradient": lambda: block(slope(parameters, corrupt, other())),
        "generate": written,
    }


def _last(logits: Any) -> Any:
    """The metric of the sweep: a logit at the last position, mean over the batch."""
    return logits[:, -1, 3].mean()


if __name__ == "__main__":
    main()
