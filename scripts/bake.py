#!/usr/bin/env python3
"""From this repository to a verified, promoted snapshot: `bake.py build --promote`; `--help` shows all verbs."""

import os
import signal
import sys
from pathlib import Path

# Until the command line takes over: nothing is made yet, so there is nothing to take back.
for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, lambda number, frame: os._exit(130))

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
