"""Owns ``make pictures``: the README's drawings, from their data, and screenshots of the two pages, from what runs."""

import argparse
import base64
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hcloud.actions import BoundAction
from hcloud.images import Image
from hcloud.server_types import ServerType
from selenium import webdriver
from selenium.webdriver.common.by import By

from tests.local_cloud.harness import running_cloud
from tests.pictures.drawings import DRAWINGS
from tests.pictures.layout import to_svg
from tests.service.browser import NoBrowser, running_browser
from tests.service.harness import running_service

FOLDER = Path(__file__).parent
_WIDTH = 1000
_PATIENCE_S = 30.0


def draw(folder: Path) -> None:
    """Writes the drawings; nothing but this tree is needed."""
    for drawing in DRAWINGS:
        (folder / f"{drawing.name}.svg").write_text(to_svg(drawing), encoding="utf-8")


def take_service_page(folder: Path) -> None:
    """The service's page, once the starter model has answered."""
    with running_service(record=False) as service, running_browser() as browser:
        service.generate("Who made you?")  # the first answer after a start is slower than all others
        _open(browser, f"http://127.0.0.1:{service.port}/", 820)
        _wait(lambda: browser.find_element(By.ID, "example").is_displayed(), "the starter's question")
        browser.find_element(By.ID, "example").click()
        _wait(lambda: browser.find_element(By.ID, "progress").text == "Finished", "the answer's end")
        _take(browser, folder / "service.png")


def take_cloud_page(folder: Path) -> None:
    """The local cloud's page with two servers, of which one was made from a snapshot of the other; needs root."""
    with tempfile.TemporaryDirectory() as state, running_cloud(Path(state)) as cloud:
        client = cloud.client()
        first = client.servers.create("web-1", ServerType(name="cx23"), Image(name="debian-13"))
        _finish(first.action, *first.next_actions)
        snapshot = first.server.create_image("web-1, as it was", type="snapshot")
        _finish(snapshot.action)
        second = client.servers.create("web-2", ServerType(name="cx23"), snapshot.image)
        _finish(second.action, *second.next_actions)
        with running_browser() as browser:
            _open(browser, cloud.endpoint.removesuffix("v1"), 700)
            _take(browser, folder / "cloud.png")


def _finish(*actions: BoundAction) -> None:
    for action in actions:
        action.wait_until_finished()


def _open(browser: webdriver.Chrome, url: str, height: int) -> None:
    size = {"width": _WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    scheme = {"name": "prefers-color-scheme", "value": "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(url)


def _take(browser: webdriver.Chrome, path: Path) -> None:
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "optimizeForSpeed": False})
    path.write_bytes(base64.b64decode(shot["data"]))


def _wait(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            raise AssertionError(f"never came: {what}")
        time.sleep(0.05)


def main() -> int:
    """Makes what the arguments name, or all; what cannot be made here is said, and the old picture stays."""
    makers = {"drawings": draw, "service": take_service_page, "cloud": take_cloud_page}
    parser = argparse.ArgumentParser(prog="python -m tests.pictures", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "pictures", nargs="*", metavar="PICTURE", help=f"one of {', '.join(makers)}; all if none is named"
    )
    parser.add_argument("--into", type=Path, default=FOLDER, help="a folder that is there, in place of the README's")
    options = parser.parse_args()
    if unknown := set(options.pictures) - set(makers):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(makers)}")
    failed = False
    for name in options.pictures or makers:
        try:
            if name == "cloud" and os.geteuid() != 0:
                raise PermissionError("the local cloud needs root")
            makers[name](options.into)
        except (NoBrowser, PermissionError) as error:
            print(f"{name}: not made, {error}", file=sys.stderr)
            failed = True
        else:
            print(f"{name}: made")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
