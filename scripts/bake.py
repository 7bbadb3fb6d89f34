#!/usr/bin/env python3
"""From this repository to a verified, promoted snapshot: `bake.py build --promote`; `--help` shows all verbs."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # this folder holds the package bake, which is to be scripts.bake

try:
    from scripts.bake.command import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: the Python module {error.name} is not here\n"
        f"  run `make bake`, which sets up .venv; then: {ROOT / '.venv/bin/python'} {Path(__file__)} …"
    )

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
