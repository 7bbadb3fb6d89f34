"""The page at ``/`` in a real browser, Debian's Chromium, against the real service."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.absent import did_not_run
from tests.service.browser import NoBrowser, running_browser
from tests.service.harness import FAKE, Service, running_service

pytestmark = pytest.mark.timeout(90)

_KEY = "mllm_only-for-this-test"

# Runs in every document before its own scripts: what the policy stopped, and what is spoken.
_RECORDER = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
window.spoken = [];
document.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("spoken");
  if (place) new MutationObserver(() => spoken.push(place.textContent)).observe(place, { childList: true });
});
"""


class Page:
    """The page in the browser, with the few gestures that the tests need."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, url: str) -> None:
        """Loads the page and waits until it has asked the service for its state."""
        self.driver.get(url)
        self.wait(lambda: self.text("version") != "", "the service's version")

    def find(self, identity: str) -> WebElement:
        return self.driver.find_element(By.ID, identity)

    def text(self, identity: str) -> str:
        """The whole text of an element, shown or not."""
        return str(self.find(identity).get_property("textContent"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, parameters)

    def fill(self, identity: str, text: str) -> None:
        """Sets a field as pasting does, at once."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.run(script, self.find(identity), text)

    def press(self, *keys: str) -> None:
        """Presses keys wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        """Id of the element that has the focus, or its text."""
        return str(self.run("return document.activeElement.id || document.activeElement.innerText"))

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 10.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end_s:
                raise AssertionError(f"never came: {what}; the page shows:\n{self.find('state').text}\n{self.shown()}")
            time.sleep(0.02)

    def shown(self) -> str:
        return self.driver.find_element(By.TAG_NAME, "main").text

    def wait_progress(self, word: str) -> None:
        self.wait(lambda: self.text("progress") == word, word)

    def ask(self, prompt: str) -> str:
        """Sends a prompt and waits for the whole answer."""
        self.fill("prompt", prompt)
        self.find("send").click()
        self.wait_progress("Finished")
        return self.text("answer")

    def ask_in_vain(self, prompt: str) -> str:
        """Sends a prompt that will not be answered and waits for the error."""
        self.fill("prompt", prompt)
        self.find("send").click()
        self.wait(lambda: self.find("error").is_displayed() and self.find("send").is_enabled(), "an error")
        return self.text("error")

    def console(self) -> list[str]:
        """What the browser complained of since it was last asked."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]  # selenium has no annotation
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def violations(self) -> list[str]:
        """Directives of the policy that stopped something in this document."""
        return list(self.run("return window.violations"))


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    """One browser for all tests, with a profile of its own that is deleted afterwards."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(running_browser())
        except NoBrowser as missing:
            did_not_run(missing)
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _RECORDER})
        yield browser


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """The fake engine, whose prompts are orders."""
    with running_service(engine_adapter=FAKE, queue_size=3) as service:
        yield service


@pytest.fixture
def browser(driver: webdriver.Chrome) -> Iterator[Page]:
    """The browser as a desktop's; afterwards it is empty again, whatever the test has done."""
    page = Page(driver)
    driver.get("about:blank")
    page.console()
    yield page
    driver.get("about:blank")  # ends what still streams
    page.cdp("Emulation.clearDeviceMetricsOverride")
    page.cdp("Emulation.setTouchEmulationEnabled", enabled=False)
    page.cdp("Emulation.setEmulatedMedia", features=[])


@pytest.fixture
def page(browser: Page, service: Service) -> Iterator[Page]:
    """The page of the shared service; whatever a test does with it, the policy stops nothing of the page's own."""
    browser.open(address(service))
    yield browser
    assert browser.violations() == []
    service.wait_idle()


def address(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}/"


def test_files_come_through_the_service(service: Service) -> None:
    """The service's own middleware leaves the page's caching alone, and answers HEAD and 304 over HTTP."""
    got = service.get("/")
    assert got.headers["cache-control"] == "no-cache"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert service.request("HEAD", "/").headers["content-length"] == str(len(got.body))
    again = service.request("GET", "/", If_None_Match=got.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert service.get("/version").headers["cache-control"] == "no-store"


def test_answer_streams(page: Page) -> None:
    """The answer appears piece by piece with a speed, and the service's own figures stand there at the end."""
    words = [f"word{number}" for number in range(20)]
    page.fill("prompt", f"pause 0.06 say {' '.join(words)}")
    page.find("send").click()
    # One look at all of it, since it changes meanwhile.
    look = "return ['progress', 'answer', 'facts-speed'].map((id) => document.getElementById(id).textContent).concat("
    look += "document.getElementById('answer').ariaBusy)"
    seen, estimates, progress, end_s = [""], [""], "", time.monotonic() + 10
    while progress != "Finished":
        assert time.monotonic() < end_s, page.shown()
        progress, text, estimate, busy = page.run(look)
        assert busy == ("false" if progress == "Finished" else "true")
        seen.append(text)
        estimates.append(estimate)
    assert len(set(seen)) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert page.text("answer") == " ".join(words)
    live = [float(text.removeprefix("≈ ")) for text in estimates if text.startswith("≈")]
    assert 5 < live[-1] < 20  # a token in 60 ms is 16.7 a second
    assert 5 < float(page.text("facts-speed")) < 17
    assert page.text("facts-made") == "20"
    assert page.text("facts-end") == "the model (stop)"
    assert page.console() == []


def test_a_piece_cut_between_bytes_is_whole(page: Page) -> None:
    """Characters of several bytes, white space and right-to-left text arrive as they are."""
    assert page.ask("say 🦙 žluťoučký שלום 中文") == "🦙 žluťoučký שלום 中文"


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop(page: Page, service: Service, way: str) -> None:
    """Stop ends the answer where it is, the service stops working, and the next prompt is answered."""
    cancelled = service.metric("llm_cancelled_total", reason="client")
    page.fill("prompt", "pause 0.1")
    page.find("send").click()
    page.wait(lambda: page.text("answer").count("word") > 2, "some words")
    assert page.find("stop").is_enabled()
    assert not page.find("send").is_enabled()
    if way == "button":
        page.find("stop").click()
    else:
        page.press(Keys.ESCAPE)
    page.wait_progress("Stopped")
    text = page.text("answer")
    assert service.wait_idle() < 2
    assert service.metric("llm_cancelled_total", reason="client") == cancelled + 1
    assert page.text("answer") == text
    assert not page.find("error").is_displayed()
    assert page.ask("say again") == "again"


def test_stop_while_waiting(page: Page, service: Service) -> None:
    """A request that waits behind another one can be stopped, and the page shows both in the queue."""
    with closing(service.open_generate("pause 0.1", max_tokens=200, stream=True)):
        service.wait_running(1)
        page.fill("prompt", "say never")
        page.find("send").click()
        page.wait(lambda: (page.text("load-running"), page.text("load-waiting")) == ("1", "1"), "1 running, 1 waiting")
        assert page.text("progress") == "Waiting for the first token…"
        page.press(Keys.ESCAPE)
        page.wait_progress("Stopped")
        service.wait_running(1, 0)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("fail", "the engine failed on this request"),
        ("x " * 3000, "but the context holds 2048 tokens"),
        ("", "Write a prompt first."),
    ],
)
def test_errors_are_told(page: Page, prompt: str, words: str) -> None:
    """A failure on the way, a refusal and a missing prompt are told in the words of whoever found them."""
    assert words in page.ask_in_vain(prompt)
    assert page.find("error").get_attribute("role") == "alert"
    assert page.ask("say fine") == "fine"
    assert not page.find("error").is_displayed()


def test_a_value_out_of_bounds_leads_to_its_field(page: Page) -> None:
    """The service's refusal of a field opens the options and puts the focus there."""
    page.fill("temperature", "7")
    assert page.ask_in_vain("say x") == "temperature: must be a number from 0 to 2"
    assert page.focused() == "temperature"
    assert page.find("temperature").get_attribute("aria-invalid") == "true"
    page.fill("temperature", "0")
    page.fill("max_tokens", "2")
    page.fill("system", "be brief")
    assert page.ask("say a b c") == "a b"
    assert page.text("facts-end") == "max tokens (length)"
    assert page.find("temperature").get_attribute("aria-invalid") is None


def test_a_service_that_leaves_is_told(browser: Page) -> None:
    """Drained, the service's reason is shown; gone, that it cannot be reached."""
    with running_service(engine_adapter=FAKE) as service:
        browser.open(address(service))
        service.drain()
        assert "draining" in browser.ask_in_vain("say x")
        assert "try again in" in browser.text("error")
        browser.wait(lambda: browser.text("phase").startswith("Draining"), "the state")
        service.terminate()
        assert "cannot be reached" in browser.ask_in_vain("say x")
        browser.wait(lambda: browser.text("phase") == "The service cannot be reached", "the state")


def test_phone(page: Page) -> None:
    """At 360 pixels nothing is wider than the screen, long words included, and buttons suit a thumb."""
    page.cdp("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    page.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    long = "unbroken" * 100
    assert page.ask(f"say {long}") == long
    assert page.text("curl").count("unbroken") == 100
    page.ask_in_vain("fail " + "y" * 500)
    assert page.run("return document.documentElement.clientWidth") == 360
    assert page.run("return document.documentElement.scrollWidth") == 360
    outside = (
        "return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 360).length"
    )
    assert page.run(outside) == 0
    for identity in ("send", "stop", "prompt", "temperature", "key"):
        assert page.find(identity).size["height"] >= 44
    assert float(page.find("prompt").value_of_css_property("font-size").removesuffix("px")) >= 16  # else phones zoom


def test_keyboard_only(page: Page, service: Service) -> None:
    """Everything is reached by Tab in reading order with a focus that can be seen; Ctrl+Enter sends, Escape stops."""
    page.press(Keys.TAB)
    assert page.focused() == "prompt"
    page.press("pause 0.1 say a b c d e f g h i j k l m n o p", Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.text("answer") != "", "the first word")
    page.press(Keys.ESCAPE)
    page.wait_progress("Stopped")
    assert page.focused() == "prompt"
    order = []
    for _ in range(16):
        page.press(Keys.TAB)
        order.append(page.focused())
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") != "none", order
        if order[-1] in ("Options", "Key (this service needs none)"):
            page.press(Keys.ENTER)
        if order[-1] == "key":
            break
    fields = ["system", "max_tokens", "temperature", "top_p", "top_k"]
    assert order == ["send", "Options", *fields, "Key (this service needs none)", "key"]
    for expected in ("copy-answer", "answer", "curl"):
        page.press(Keys.TAB)
        assert page.focused() == expected


def test_the_focus_is_never_lost(page: Page) -> None:
    """Whoever presses Send by keyboard stands on Stop while it runs, and on Send again at the end."""
    page.fill("prompt", "pause 0.05 say a b c d e f g h")
    page.find("send").send_keys(Keys.ENTER)
    page.wait(lambda: page.focused() == "stop", "the focus on Stop")
    page.wait_progress("Finished")
    assert page.focused() == "send"


def test_names_and_announcements(page: Page) -> None:
    """Every control has a name, and a screen reader hears of an answer twice, not once a token."""
    for element in page.driver.find_elements(By.CSS_SELECTOR, "button, input, textarea, summary, [tabindex]"):
        if element.get_property("hidden") is False and element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")
    page.ask("pause 0.02 say a b c d e f g h i j")
    assert page.run("return window.spoken") == ["Sent.", "Finished, 10 tokens. a b c d e f g h i j"]
    assert page.find("answer").get_attribute("aria-live") is None


def test_text_stays_text(page: Page) -> None:
    """Markup in an answer, in a prompt and in an error is shown as it was written, and does nothing."""
    markup = "<img src=x onerror=alert(1)> <script>alert(1)</script> <b>bold</b>"
    assert page.ask(f"say {markup}") == markup
    assert markup in page.text("curl")
    assert page.run("return document.querySelectorAll('main img, main script, main b').length") == 0
    assert page.console() == []


def test_policy_blocks(browser: Page, service: Service) -> None:
    """What somebody might bring into the page does not run: scripts, handlers, markup out of text, other hosts."""
    browser.open(address(service))
    assert browser.violations() == []
    body = browser.cdp("DOM.querySelector", nodeId=browser.cdp("DOM.getDocument")["root"]["nodeId"], selector="footer")
    injected = (
        '<footer><button id="evil" onclick="window.ran = 1">x</button><b style="color: red" id="red">x</b></footer>'
    )
    browser.cdp("DOM.setOuterHTML", nodeId=body["nodeId"], outerHTML=injected)
    browser.find("evil").click()
    assert browser.run("return window.ran") is None
    assert browser.find("red").value_of_css_property("color") != "rgba(255, 0, 0, 1)"
    scripts = {
        "document.body.innerHTML = '<b>x</b>'": "require-trusted-types-for",
        "document.body.append(Object.assign(new Image(), {src: 'data:image/png;base64,AA'}))": "img-src",
        "fetch('http://localhost:9/').catch(() => 0)": "connect-src",
        "const f = document.createElement('form'); f.action = '/x'; document.body.append(f); f.submit()": "form-action",
        "document.body.append(Object.assign(document.createElement('iframe'), {src: '/'}))": "frame-src",
    }

    def blocked(directive: str) -> bool:
        return directive in browser.violations()

    for script, directive in scripts.items():
        browser.run(f"try {{ {script} }} catch {{}}")
        browser.wait(partial(blocked, directive), f"a block by {directive}")
    assert {"script-src-attr", "style-src-attr"} <= set(browser.violations())


def test_dark(page: Page) -> None:
    """The page follows the system's scheme, fields included."""
    grounds = {}
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        root = page.driver.find_element(By.TAG_NAME, "html")
        places = (root, page.find("prompt"))
        grounds[scheme] = [place.value_of_css_property("background-color") for place in places]
    assert grounds == {
        "light": ["rgba(246, 246, 243, 1)", "rgba(255, 255, 255, 1)"],
        "dark": ["rgba(20, 23, 27, 1)", "rgba(28, 32, 38, 1)"],
    }


def run_samples(page: Page, **environment: str) -> tuple[str, str]:
    """Runs the shown curl command and the shown Python program as a person would; gives the text each one got."""
    outputs = []
    for command in (["bash", "-c", page.text("curl")], [sys.executable, "-c", page.text("python")]):
        variables = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONUTF8": "1", **environment}
        done = subprocess.run(command, env=variables, capture_output=True, timeout=20)
        assert done.returncode == 0, done.stderr.decode()
        outputs.append(done.stdout.decode())
    events = [json.loads(line[6:]) for line in outputs[0].splitlines() if line.startswith("data: ")]
    assert events[-1]["done"] is True, outputs[0]
    return "".join(event["response"] for event in events), outputs[1].removesuffix("\n")


def test_samples_run_as_shown(page: Page) -> None:
    """The shown curl command and Python program send the same request, whatever characters stand in the prompt."""
    words = """it's "quoted" '' $HOME `id` $(id) \\n \\ % !x {a,b} 'end' 🦙 ü </pre> & ; | # @x"""
    page.fill("system", "isn't it\nnew 'line'")
    page.fill("temperature", "0.5")
    page.fill("max_tokens", "100")
    assert page.ask(f"say\n{words}") == words
    assert run_samples(page) == (words, words)
    sent = json.loads(page.text("curl").split(" -d '")[1].removesuffix("'").replace("'\\''", "'"))
    assert sent["system"] == "isn't it\nnew 'line'"
    assert (sent["temperature"], sent["max_tokens"], sent["stream"]) == (0.5, 100, True)
    assert "Authorization" not in page.text("curl") + page.text("python")


def test_key(browser: Page) -> None:
    """Without a key, or with a wrong one, the person is led to the field; the right one is used and kept nowhere."""
    with running_service(engine_adapter=FAKE, auth="keys") as service:
        key = service.keys("add", "somebody")
        browser.open(address(service))
        assert browser.text("key-need") == " (this service needs one)"
        assert browser.find("key").is_displayed()
        assert browser.find("key").get_property("type") == "password"
        assert browser.ask_in_vain("say x").startswith("This service needs a key")
        assert browser.focused() == "key"
        browser.press("wrong")
        assert browser.ask_in_vain("say x").startswith("the key is not valid here")
        assert browser.focused() == "key"
        assert browser.find("key").get_attribute("aria-invalid") == "true"
        browser.press("…")
        assert "no key can have" in browser.ask_in_vain("say x")
        browser.find("key").clear()
        browser.find("key").send_keys(key)
        assert browser.ask("say it's open") == "it's open"
        assert run_samples(browser, LLM_KEY=key) == ("it's open", "it's open")
        assert "$LLM_KEY" in browser.text("curl")
        assert 'os.environ["LLM_KEY"]' in browser.text("python")
        assert key not in browser.driver.page_source + browser.driver.current_url
        assert browser.run("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        browser.driver.refresh()
        assert browser.find("key").get_property("value") == ""
        assert key not in service.log_path.read_text()
        browser.driver.get("about:blank")


def test_live_state(browser: Page, service: Service) -> None:
    """The state line shows running, waiting, predicted wait and measured speed."""
    service.generate("pause 0.02", max_tokens=20)
    browser.open(address(service))
    assert browser.find("load").is_displayed()
    shown = [browser.text(f"load-{name}") for name in ("running", "waiting", "wait", "speed")]
    assert shown[:2] == ["0", "0"]
    assert float(shown[3]) == pytest.approx(service.get("/ready").json["tokens_per_second"], abs=0.1)
    browser.driver.get("about:blank")


def test_no_key_is_asked_for_where_none_is_needed(page: Page) -> None:
    """The field stays closed there; a key that is typed all the same shows up as a variable only."""
    assert not page.find("key").is_displayed()
    page.fill("key", _KEY)
    assert "$LLM_KEY" in page.text("curl")
    assert _KEY not in page.text("curl") + page.text("python")


def test_copy(page: Page) -> None:
    """The copy buttons put the answer and the samples on the clipboard, and say so."""
    page.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.ask("say some text")

    def says_so(name: str) -> bool:
        return page.find(f"copy-{name}").text == "Copied"

    for name in ("answer", "curl"):
        page.find(f"copy-{name}").click()
        page.wait(partial(says_so, name), "Copied")
        copied = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
        assert copied == page.text(name)


def test_nobody_is_asked_while_the_page_is_hidden(page: Page, service: Service) -> None:
    """Hidden, the page does not ask for the state; seen again, it does so at once."""

    def polls() -> int:
        return sum(line["endpoint"] == "/ready" for line in service.logs("request"))

    first = page.driver.current_window_handle
    seen = polls()
    page.wait(lambda: polls() > seen, "a poll while it can be seen")
    page.driver.switch_to.new_window("tab")
    try:
        time.sleep(0.2)
        hidden = polls()
        time.sleep(2.5)
        assert polls() == hidden
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)
    page.wait(lambda: polls() > hidden, "a poll at once", timeout_s=1.5)


def test_starter_model_end_to_end(browser: Page) -> None:
    """With the real engine the page says what the starter is, and one press gets an answer from it."""
    with running_service(record=False) as service:
        browser.open(address(service))
        assert "a starter that shows that the system works" in browser.find("starter").text
        assert browser.text("model").startswith("mini-llm starter · Q")
        browser.find("example").click()
        browser.wait_progress("Finished")
        assert "mini-llm" in browser.text("answer")
        assert float(browser.text("facts-speed")) > 0
        assert browser.console() == []
