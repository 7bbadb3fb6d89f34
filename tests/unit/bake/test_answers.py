"""What is missing in an answer of the cloud is told as the cloud's failure, not as one of this program's own."""

import pytest
from hcloud import Client
from hcloud.images import BoundImage

from scripts.bake.answers import given
from scripts.bake.errors import CloudFailed
from scripts.bake.snapshots import read_snapshot


def test_what_is_there_is_returned() -> None:
    """Also what counts as false."""
    assert (given(0), given(""), given("a")) == (0, "", "a")


def test_an_image_without_an_id_is_no_answer_of_this_cloud() -> None:
    """A proxy that makes up answers, or another API, is told from a bug."""
    with pytest.raises(CloudFailed, match="lacks"):
        read_snapshot(BoundImage(Client("nobody's").images, {"status": "available"}))
