"""minitf: transformers as filters and aggregates, whose forward pass returns the walk."""

from minitf.changes import change, compose, identity_edit
from minitf.config import ModelConfig, token_tables
from minitf.declaration import count, initialize
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.walk import Change, Edit, LayerWalk, Walk, describe

__version__ = "0.1.0"

__all__ = [
    "Change",
    "Edit",
    "LayerWalk",
    "ModelConfig",
    "Parameters",
    "Walk",
    "change",
    "compose",
    "count",
    "describe",
    "identity_edit",
    "initialize",
    "token_tables",
    "walk",
]
