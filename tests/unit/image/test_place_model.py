"""What a layer is told of a model that did not come: again later, or never."""

from pathlib import Path

import pytest

from service.errors import FetchFailed, FetchGaveUp, ModelRefused
from tests.image.scripts import load_script

place_model = load_script("provision/place_model.py")


@pytest.mark.parametrize(
    ("error", "code"),
    [(FetchGaveUp("cut"), 75), (FetchFailed("too large"), 1), (ModelRefused("no GGUF"), 1), (OSError("full"), 1)],
)
def test_only_what_may_pass_is_tried_again(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another server, which costs some minutes; the reason is told in any case."""

    def place(model: str, name: str, folder: Path) -> None:
        raise error

    monkeypatch.setattr(place_model, "place", place)
    assert place_model.main(["m", "m", "/nowhere"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"
