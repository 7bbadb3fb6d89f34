#!/usr/bin/env python3
"""Makes what the nodes of a deployment know each other by, once: a key and its certificate, in a file for Terraform."""

import argparse
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

try:
    from scripts.bake.certificates import sign_own
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make handover-key`, which sets up .venv")

FILE = ROOT / "terraform" / "handover.auto.tfvars.json"
# A node's clock may be behind at its first boot; and it is trusted by itself alone, so that no end protects anybody.
_BEFORE, _AFTER = timedelta(days=365), timedelta(days=365 * 50)


def make_pair(now: datetime) -> dict[str, str]:
    """Certificate and key as PEM; the certificate is its own authority."""
    certificate, key = sign_own("mini-llm handover", now - _BEFORE, now + _AFTER)
    return {"certificate": certificate, "key": key}


def main(words: list[str]) -> int:
    """Writes the file, for its owner alone; what is there stays."""
    parser = argparse.ArgumentParser(prog="handover_key.py", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=FILE, help="terraform/handover.auto.tfvars.json")
    path = parser.parse_args(words).file
    # Made before there is a file: an empty one would be taken for a key.
    text = json.dumps({"handover": make_pair(datetime.now(UTC))}, indent=1) + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        print(f"{path} is there already; running nodes know each other by it, so it stays")
        return 0
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    except OSError as error:
        path.unlink()  # half a file would be taken for a key the next time
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{path} is made; keep it, and keep it secret")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
