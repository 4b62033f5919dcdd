"""The page of ``minitf ablate``: one self-contained file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitf.analysis import page_parts
from minitf.pretrained import Pretrained

HERE = Path(__file__).parent
DIGITS = 7  # what a head costs is a small difference of losses


def page(data: Mapping[str, Any], model: Pretrained, name: str, settings: Sequence[tuple[str, str]] = ()) -> str:
    """The whole report as HTML text; ``data`` as :func:`minitf.analysis.ablate.job.measure` makes it."""
    return page_parts.page_of_model(
        HERE / "ablate.html.j2",
        HERE / "ablate.js",
        data,
        model,
        name,
        digits=DIGITS,
        conclusions=conclusions(data),
        settings=settings,
    )


def conclusions(data: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    intact = float(data["intact"]["loss"])
    order = "least important first"

    def lost(name: str, share: int) -> float:
        return float(data["replacements"][name]["orders"][order]["loss"][share]) - intact

    found = [
        f"As it is, the model loses {intact:.3f} nats a token.",
        f"Every head's association replaced by its mean over data: {lost('mean over data', -1):+.3f} nats; half "
        f"of the heads, the least important first: {lost('mean over data', len(data['fractions']) // 2):+.3f}.",
        f"By a uniform average {lost('uniform', -1):+.3f}, by nothing but the position itself "
        f"{lost('identity', -1):+.3f}.",
    ]
    if "positions only" in data["replacements"]:
        found.append(
            f"Places explain so much of the scores that their part alone costs {lost('positions only', -1):+.3f}; "
            f"the rest alone costs {lost('contents only', -1):+.3f}."
        )
    cheapest = min((name for name in data["replacements"]), key=lambda name: lost(name, -1))
    return [*found, f"The least is lost with: {cheapest} ({lost(cheapest, -1):+.3f})."]
