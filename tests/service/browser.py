"""Owns the browser in which pages are tried: Debian's Chromium, without a window, with a profile that is deleted."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.service import Service as DriverService

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


class NoBrowser(Exception):
    """Chromium or its driver is not installed; the message says how to get both."""


@contextmanager
def running_browser() -> Iterator[webdriver.Chrome]:
    """A browser; raises NoBrowser."""
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver_program is None:
        raise NoBrowser("no browser: apt-get install -y --no-install-recommends chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        # Both programs are named, so that selenium looks for none, and certainly not on the network.
        browser = webdriver.Chrome(options, DriverService(driver_program, env={**os.environ, "SE_OFFLINE": "true"}))
        try:
            browser.set_page_load_timeout(20)
            browser.set_script_timeout(20)
            yield browser
        finally:
            browser.quit()
