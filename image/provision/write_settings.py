"""Writes what only the bake knows: python write_settings.py IMAGE_VERSION.

``/etc/mini-llm/service.env`` are settings of the service, ``/usr/share/mini-llm/image.json`` says what was baked, and a
drop-in reserves the memory that the model's pages take.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

_MODELS = Path("/opt/mini-llm/models")
_SETTINGS = Path("/etc/mini-llm/service.env")
_IMAGE = Path("/usr/share/mini-llm/image.json")
_MEMORY = Path("/etc/systemd/system/model.slice.d/memory.conf")


def main(image_version: str) -> None:
    """Reads the model's description and writes the three files."""
    model = json.loads((_MODELS / "model.json").read_text())
    settings = {
        "LLM_MODEL": str(_MODELS / model["file"]),
        "LLM_MODEL_SHA256": model["sha256"],
        "LLM_MODEL_NAME": model["name"],
        "LLM_STATE_DIR": "/var/lib/mini-llm",
        "LLM_KEYS_FILE": "/run/mini-llm/keys.json",
    }
    if model["name"] == "starter":  # also of a file whose name nobody gave
        del settings["LLM_MODEL_NAME"]  # the file says itself that it is the starter
    image = {"version": image_version, "baked": datetime.now(UTC).isoformat(timespec="seconds"), "model": model}
    files = {
        _SETTINGS: "".join(f"{name}={value}\n" for name, value in settings.items()),
        _IMAGE: json.dumps(image, indent=1) + "\n",
        _MEMORY: f"[Slice]\nMemoryMin={model['size_bytes']}\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
