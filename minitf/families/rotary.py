"""Rotary positions in a config.json: ``rope_parameters``, or the older ``rope_scaling`` and single names."""

import math
from typing import Any

from minitf.config import ModelConfig
from minitf.families import settings
from minitf.families.mapping import Json
from minitf.rotary import RotaryScaling

# What each rule is described by, beside the base and the fraction.
_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "beta_slow",
        "beta_fast",
        "original_max_position_embeddings",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_ALL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read(
    json: Json, base: str = "rope_theta", fraction: str = "partial_rotary_factor", usual: float = 1.0
) -> Json:
    """``rotary_base``, ``rotary_fraction`` and ``rotary_scaling`` of a model.

    ``base`` and ``fraction`` are the older names; ``usual`` is the fraction of a file that gives none.

    Raises:
        ValueError: a rule or a setting that minitf does not have, or a description in an unknown form.
    """
    found: Json = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = json.get(name)
        if part is None:
            continue
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise ValueError(f"config.json: {name} is {part!r}, which minitf cannot read")
        part = {key: value for key, value in part.items() if value is not None}
        part["rope_type"] = _rule(part, name)
        unknown = set(part) - {*_ALL, *_SETTINGS[part["rope_type"]]}
        if unknown:
            raise ValueError(f"config.json: {name} has settings that minitf does not know: {sorted(unknown)}")
        odd = [key for key in part if key in found and part[key] != found[key]]
        if odd:
            raise ValueError(f"config.json: rope_scaling and rope_parameters differ in {', '.join(odd)}")
        found |= part
    return {
        "rotary_base": settings.number(found, "rope_theta", json.get(base) or 10000.0),
        "rotary_fraction": settings.number(found, "partial_rotary_factor", json.get(fraction) or usual),
        "rotary_scaling": _scaling(found, json),
    }


def _rule(part: Json, name: str) -> str:
    rule = part.get("rope_type", part.get("type", "default"))
    if not isinstance(rule, str) or rule not in _SETTINGS:
        raise ValueError(
            f"config.json: {name} scales the rotary positions by the rule {rule!r}; minitf has the rules "
            f"{', '.join(_SETTINGS)}, whose angles do not depend on how long the text is"
        )
    return rule


def _scaling(found: Json, json: Json) -> RotaryScaling | None:
    rule = found.get("rope_type", "default")
    if rule == "default":
        return None
    factor = settings.number(found, "factor")
    if rule == "linear":
        return RotaryScaling("linear", factor)
    length = _original_length(found, json)
    if rule == "llama3":
        slow, fast = (settings.number(found, f"{name}_freq_factor") for name in ("low", "high"))
        return RotaryScaling("llama3", factor, length, slow, fast)
    return RotaryScaling(
        "yarn",
        factor,
        length,
        settings.number(found, "beta_slow", 1.0),
        settings.number(found, "beta_fast", 32.0),
        settings.number(found, "attention_factor", _attention_factor(found, factor)),
        settings.flag(found, "truncate", True),
    )


def _original_length(found: Json, json: Json) -> int:
    """The length before; where it stands nowhere, it is the length now, as in transformers."""
    name = "original_max_position_embeddings"
    outside = json.get(name)
    if outside is not None and found.get(name, outside) != outside:
        raise ValueError(
            f"config.json: {name} is {outside}, but among the settings of rotary positions it is {found[name]}"
        )
    return settings.whole(found | {name: found.get(name, outside)}, name, json.get("max_position_embeddings"))


def _attention_factor(found: Json, factor: float) -> float:
    """YaRN's 0.1 ln(factor) + 1; with two weights of the logarithm, the quotient of the two."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if found.get("mscale") and found.get("mscale_all_dim"):
        return growth(settings.number(found, "mscale")) / growth(settings.number(found, "mscale_all_dim"))
    return growth(1.0)


def written(config: ModelConfig, base: str = "rope_theta", fraction: str = "") -> Json:
    """Their settings: the newer form, and the older names for readers that know only those.

    ``base`` and ``fraction`` are the older names; a family without ``fraction`` turns whole heads.
    """
    turning: Json = {"rope_theta": config.rotary_base}
    older: Json = {base: config.rotary_base}
    if fraction:
        turning["partial_rotary_factor"] = older[fraction] = config.rotary_fraction
    scaling = _scaling_written(config.rotary_scaling)
    if config.rotary_scaling is not None:
        older["rope_scaling"] = scaling
    return older | {"rope_parameters": scaling | turning}


def _scaling_written(scaling: RotaryScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    found: dict[str, Any] = {"rope_type": scaling.rule, "factor": scaling.factor}
    if scaling.rule == "linear":
        return found
    slow, fast = (
        ("low_freq_factor", "high_freq_factor") if scaling.rule == "llama3" else ("beta_slow", "beta_fast")
    )
    found |= {
        "original_max_position_embeddings": scaling.original_length,
        slow: scaling.slow_turns,
        fast: scaling.fast_turns,
    }
    if scaling.rule == "yarn":
        found |= {"attention_factor": scaling.attention_factor, "truncate": scaling.whole_pairs}
    return found
