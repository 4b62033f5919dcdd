"""The page of a walk: one self-contained file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plotly.offline import get_plotlyjs

from minitf import __version__
from minitf.analysis import page_parts
from minitf.parameters import count
from minitf.pretrained import Pretrained

if TYPE_CHECKING:
    from minitf.analysis.walk_report.job import WalkConfig

HERE = Path(__file__).parent


def as_json(data: Mapping[str, Any]) -> str:
    """The numbers of the page, for other programs."""
    return json.dumps(json.loads(page_parts.script_json(data)), indent=1)


def page(data: Mapping[str, Any], config: "WalkConfig", model: Pretrained) -> str:
    """The whole report as HTML text."""
    scripts = {
        "report": page_parts.script((HERE / "walk.js").read_text(encoding="utf-8")),
        "plotly": page_parts.script(get_plotlyjs()),
    }
    return page_parts.render(
        HERE / "walk.html.j2",
        scripts,
        data,
        family=model.family,
        name=config.model,
        model=model.config,
        parameters=f"{count(model.config):,}",
        tokens=data["tokens"],
        prompt=data["prompt"],
        edits=[
            *(f"head {h} left out" for h in config.ablate),
            *([f"steered {config.steer}"] if config.steer else []),
        ],
        settings=[(key, value) for key, value in vars(config).items() if key != "model" and value not in ("", ())],
        version=__version__,
    )
