"""`make pictures`: the README's drawings and the screenshots of both pages."""

import shutil
from pathlib import Path

from tests.absent import did_not_run
from tests.pictures.drawings import DRAWINGS
from tests.typed import type_command


def test_all_of_them(host: None, tmp_path: Path) -> None:
    """Into a folder that is not the README's."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        did_not_run("no browser (Debian: sudo apt-get install chromium chromium-driver)")
    type_command(f'sudo make pictures PICTURES="--into {tmp_path}"', 300)
    drawn = [f"{each.name}.svg" for each in DRAWINGS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cloud.png", "service.png", *drawn])
    for shot in tmp_path.glob("*.png"):
        assert shot.read_bytes().startswith(b"\x89PNG")
