"""The page of ``minitf ablate``: one self-contained file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitf.analysis import page_parts
from minitf.analysis.claims import Claim
from minitf.pretrained import Pretrained

HERE = Path(__file__).parent
DIGITS = 7  # what a head costs is a small difference of losses


def page(
    data: Mapping[str, Any],
    claims: Sequence[Claim],
    model: Pretrained,
    name: str,
    settings: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole report as HTML text; ``data`` as :func:`minitf.analysis.ablate.job.measure` makes it."""
    return page_parts.page_of_model(
        HERE / "ablate.html.j2",
        HERE / "ablate.js",
        data,
        model,
        name,
        digits=DIGITS,
        conclusions=conclusions(data),
        claims=page_parts.claim_rows(claims),
        explained={name: EXPLAINED[name] for name in data["replacements"]},
        asked=data["asked"],
        settings=settings,
    )


# What stands in place of a head's association, for people.
EXPLAINED = {
    "uniform": "every key in sight counts the same",
    "mean over data": "the head's mean over other windows, place by place: the text has no part in it",
    "mean per lag": "that mean as a function of the distance alone",
    "identity": "every position sees itself alone",
    "rows shuffled": "each row's weights given to other keys in sight",
    "random": "softmax of random scores, the same for every text",
    "top 1": "the largest weight of each row alone, as heavy as the row was",
    "top 4": "the four largest weights of each row, as heavy as the row was",
    "rank 1": "the closest matrix of rank one; what is out of sight is cut off, and rows are made as heavy as "
    "they were, but at most ten times heavier",
    "rank 4": "the same of rank four",
    "positions only": "softmax of the mean score over other windows: the part of the scores that places explain",
    "contents only": "softmax of the scores less that mean: the part that they do not explain",
}


def conclusions(data: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in sentences."""
    intact = float(data["intact"]["loss"])
    order = "least important first"

    def growth(name: str, share: int) -> float:
        return float(data["replacements"][name]["orders"][order]["loss"][share]) - intact

    def lost(name: str, share: int) -> str:
        margin = data["replacements"][name]["orders"][order]["margins"]["loss"][share]
        # Nothing has no sign.
        told = f"{round(growth(name, share), 3) + 0.0:+.3f}"
        return told if margin is None else f"{told} \u00b1 {margin:.3f}"

    asked = "" if data["asked"] == "the next token" else f", asked for {data['asked']}"
    half = len(data["fractions"]) // 2
    share = {0.5: "half", 1.0: ""}.get(data["fractions"][half], f"{data['fractions'][half]:.0%}")
    some = f"; {share} of the heads, the least important first: {lost('mean over data', half)}" if share else ""
    found = [
        f"As it is, the model loses {intact:.3f} nats a token{asked}.",
        f"Every head's association replaced by its mean over data: {lost('mean over data', -1)} nats{some}.",
        f"By a uniform average {lost('uniform', -1)}, by nothing but the position itself {lost('identity', -1)}.",
    ]
    if "positions only" in data["replacements"]:
        found.append(
            f"The part of the scores that places explain, alone: {lost('positions only', -1)}; the rest "
            f"alone: {lost('contents only', -1)}."
        )
    best = min((name for name in data["replacements"]), key=lambda name: growth(name, -1))
    return [*found, f"Of all replacements, {best} ends best ({lost(best, -1)})."]
