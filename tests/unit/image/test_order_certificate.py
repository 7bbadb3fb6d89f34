"""The certificate's order is repeated until it was served, and not more often than the authority bears."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.image.scripts import load_script

order_certificate = load_script("rootfs/usr/lib/mini-llm/order_certificate.py")


@pytest.fixture
def traefik(tmp_path: Path) -> Path:
    """Traefik's folder with an order for one domain."""
    (tmp_path / "dynamic").mkdir()
    (tmp_path / "ordered").write_text("llm.example.org\n")
    return tmp_path


def served(domain: str) -> str:
    """Traefik's store with a certificate."""
    return json.dumps({"acme": {"Account": {}, "Certificates": [{"domain": {"main": domain}, "key": "x"}]}})


def test_a_time_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Who reads it meanwhile has the old one: it is replaced, not emptied and filled."""
    path = tmp_path / "certificate"
    path.write_text("1.00\n")
    with path.open() as reading:
        order_certificate._note(path)
        assert reading.read() == "1.00\n"
    assert float(path.read_text()) > 1
    assert list(tmp_path.iterdir()) == [path]


def delivered(metrics: str) -> list[str]:
    """What is told of each name."""
    return [line.split()[-1] for line in metrics.splitlines() if line.startswith("mini_llm_certificate_delivered{")]


def test_an_order_that_failed_is_made_again_with_pauses(traefik: Path) -> None:
    """Each time with another configuration, and ever more rarely; four an hour at most in the long run."""
    acme, waited, seen = traefik / "acme.json", [], set()

    def wait(pause_s: float) -> None:
        waited.append(pause_s)
        again = traefik / "dynamic" / "again.yaml"
        seen.add(again.read_text() if again.exists() else "")
        acme.write_text(served("llm.example.org" if sum(waited) == 3000 else "other.example.org"))

    assert (
        order_certificate.main(traefik, acme, traefik / "arrived", traefik / "note", traefik / "certificate.prom", wait)
        == 0
    )
    assert set(waited) == {1}  # it looks each second
    assert len(seen) == 6  # at the begin, and orders after 15, 75, 375, 1275 and 2175 seconds
    assert float((traefik / "note").read_text()) > 0


@pytest.mark.parametrize(("arrival", "orders_at_s"), [("told\n", [900, 1000, 1015, 1075]), ("untold\n", [15, 75, 375])])
def test_it_is_ordered_as_the_addresses_arrive(traefik: Path, arrival: str, orders_at_s: list[int]) -> None:
    """Where somebody tells of that, and then at once; seldom before: such orders fail, and are counted."""
    acme, arrived, waited, seen = traefik / "acme.json", traefik / "arrived", [], [""]
    (traefik / "arrival").write_text(arrival)

    def wait(pause_s: float) -> None:
        again = traefik / "dynamic" / "again.yaml"
        seen.append(again.read_text() if again.exists() else "")
        waited.append(pause_s)
        if sum(waited) == 1000:
            arrived.touch()
        if sum(waited) == 1100:
            acme.write_text(served("llm.example.org"))

    paths = (traefik, acme, arrived, traefik / "note", traefik / "certificate.prom")
    assert order_certificate.main(*paths, wait) == 0
    changes = [time_s for time_s, (before, after) in enumerate(pairwise(seen)) if before != after]
    assert changes == orders_at_s


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "{", "[]", "{}", '{"a": "x"}', '{"acme": null}', '{"acme": {"Certificates": null}}'),
        *('{"acme": {"Certificates": [1]}}', '{"acme": {"Certificates": [{"domain": 1}]}}', "[" * 100_000),
    ],
)
def test_a_store_without_the_certificate_is_none(tmp_path: Path, content: str | None) -> None:
    """Whatever state it is in."""
    if content is not None:
        (tmp_path / "acme.json").write_text(content)
    assert not order_certificate.is_there(tmp_path / "acme.json", "llm.example.org")


def test_a_certificate_at_hand_is_not_ordered(tmp_path: Path) -> None:
    """There is nothing to wait for."""
    paths = (tmp_path, tmp_path / "acme.json", tmp_path / "arrived", tmp_path / "note", tmp_path / "certificate.prom")
    assert order_certificate.main(*paths, lambda pause_s: pytest.fail("it waited")) == 0
    assert (tmp_path / "note").exists()
    assert " 0\n" not in (tmp_path / "certificate.prom").read_text()  # nor is anything missed


def test_the_domain_does_not_wait_for_the_name_of_the_monitoring(traefik: Path) -> None:
    """Its certificate is noted when it is there; the other is ordered on."""
    (traefik / "ordered").write_text("llm.example.org\nmonitoring.llm.example.org\n")
    acme, looks, seen = traefik / "acme.json", [], []
    acme.write_text(served("llm.example.org"))

    def wait(pause_s: float) -> None:
        looks.append((traefik / "note").exists())
        seen.append(delivered((traefik / "certificate.prom").read_text()))
        if len(looks) == 40:
            acme.write_text(served("monitoring.llm.example.org"))

    assert (
        order_certificate.main(traefik, acme, traefik / "arrived", traefik / "note", traefik / "certificate.prom", wait)
        == 0
    )
    assert looks == 40 * [True]
    assert seen == 40 * [["1", "0"]]
    assert delivered((traefik / "certificate.prom").read_text()) == ["1", "1"]
    assert (traefik / "dynamic" / "again.yaml").exists()


def test_metrics_that_cannot_be_written_cost_no_order(traefik: Path) -> None:
    """A full disk is a reason to be told of, not to be without a certificate."""
    (traefik / "acme.json").write_text(served("llm.example.org"))
    paths = (
        traefik,
        traefik / "acme.json",
        traefik / "arrived",
        traefik / "note",
        traefik / "nowhere" / "certificate.prom",
    )
    assert order_certificate.main(*paths, lambda pause_s: None) == 0
    assert (traefik / "note").exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_store_that_is_no_file_is_none(tmp_path: Path, kind: str) -> None:
    """Traefik's user may make anything of it; root must neither wait for it nor read without end."""
    store = tmp_path / "acme.json"
    if kind == "pipe":
        os.mkfifo(store)
    elif kind == "link":
        store.symlink_to("/dev/zero")
    else:
        store.mkdir()
    assert not order_certificate.is_there(store, "llm.example.org")
