"""Flags with which XLA compiles soonest what tests run once: printed for the Makefile, and for tests' commands."""

import importlib.metadata
import sys

# Two workers fill two cores: to compile a program in parts, side by side, would only cost.
WHOLE = "--xla_cpu_parallel_codegen_split_count=1"
_VERSION = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
# XLA ends every process that sets a flag it does not know, and knows this one no longer.
LIGHTLY = WHOLE if _VERSION >= (0, 11) else f"--xla_cpu_use_fusion_emitters=false {WHOLE}"

if __name__ == "__main__":
    print({"lightly": LIGHTLY, "whole": WHOLE}[sys.argv[1]])
