"""Our side: a worker that trains with the programs of ``minitf train``, on one core."""

from typing import Any

from minitf.analysis.walk_bench.serve import Task, one_core, serve


def prepare(name: str, size: dict[str, Any]) -> dict[str, Task]:
    """Training of that size: one turn of all its models, and one look at their walks."""
    from minitf.analysis.train_bench.program import training  # noqa: PLC0415 (one_core comes first)
    from minitf.analysis.train_bench.sizes import Size  # noqa: PLC0415

    made = training(Size(**size))
    return {"train": made.train, "look": made.look}


if __name__ == "__main__":
    one_core()
    serve({"side": "minitf"}, prepare)
