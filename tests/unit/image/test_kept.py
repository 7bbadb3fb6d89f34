"""Of the images that runs of the tests share, a few are kept."""

import os
from pathlib import Path

from tests.image.kept import _KEPT, _forget_old_ones


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """By their time, whatever their names; locks and other programs stay."""
    for number in range(_KEPT + 2):
        tar = tmp_path / f"image-{9 - number}.tar"
        tar.touch()
        os.utime(tar, (number, number))
        tar.with_name(f"{tar.name}.lock").touch()
    (tmp_path / "traefik-3").touch()
    _forget_old_ones(tar)
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock"))
    assert left == [f"image-{9 - number}.tar" for number in reversed(range(2, _KEPT + 2))] + ["traefik-3"]
    assert len(list(tmp_path.glob("*.lock"))) == _KEPT + 2
