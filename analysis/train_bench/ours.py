"""Our side: a worker that trains with the programs of ``minitf train``."""

from functools import cache
from typing import Any

from minitf.analysis.walk_bench.serve import Task, begin, serve


def prepare(name: str, size: dict[str, Any]) -> dict[str, Task]:
    """Training of that size: one turn of all its models, and one look at their walks; and bare products."""
    from minitf.analysis.train_bench.program import products, training  # noqa: PLC0415 (begin comes first)
    from minitf.analysis.train_bench.sizes import Size  # noqa: PLC0415

    # Each is made, and compiled, when it is first asked for.
    model = cache(lambda: training(Size(**size)))
    chain = cache(lambda: products(size["products"]))

    def multiplied() -> float:
        return chain()()

    return {"train": lambda: model().train(), "look": lambda: model().look(), "products": multiplied}


if __name__ == "__main__":
    device = begin()
    serve({"side": "minitf"}, prepare, device)
