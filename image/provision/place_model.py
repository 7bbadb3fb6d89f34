"""Places the model in the image: python3 place_model.py MODEL NAME FOLDER, run where the service's code was uploaded.

MODEL is ``starter``, a name of the service's catalogue, or the path of a file; NAME is reported. FOLDER then holds that
file alone, and ``model.json`` beside it, which says what it is: file, sha256, size_bytes, name. Plain Python, for no
layer that would bring more is there yet.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

from service.errors import FetchGaveUp, ServiceError
from service.models import fetch, open_verified, resolve


def place(model: str, name: str, folder: Path) -> None:
    """Brings the file, verifies it and describes it. Raises ServiceError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    found = resolve(model, folder)
    if found.entry is not None:
        fetch(found.entry, folder, sys.stderr)
        found = resolve(model, folder)
    target = folder / found.path.name
    if found.path != target:
        shutil.copyfile(found.path, target)
    os.chown(target, 0, 0)
    target.chmod(0o444)
    verified = open_verified(target, found.sha256, folder)
    verified.file.close()
    known = {"file": target.name, "sha256": verified.sha256, "size_bytes": verified.size_bytes, "name": name}
    for other in folder.iterdir():
        if other != target:
            other.unlink()
    (folder / "model.json").write_text(json.dumps(known, indent=1) + "\n")
    print(f"{target}: {known['size_bytes']} bytes, SHA-256 {known['sha256']}")


def main(words: list[str]) -> int:
    """Places it; 75 where it may work later: it was the hub, or the way to it."""
    try:
        place(words[0], words[1], Path(words[2]))
    except (ServiceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 75 if isinstance(error, FetchGaveUp) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
