"""What an apply that was killed has left: found, told, removed; nothing else ever."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import sweep
from scripts.bake.errors import Refused
from scripts.sweep import Resource, find_left, main, read_state, require_rest

SERVER = Resource("hcloud_server", 1, "mini-llm-a", ("203.0.113.5",))
OTHER = Resource("hcloud_server", 2, "mini-llm-b")
KEY = Resource("hcloud_ssh_key", 2, "mini-llm-me")
RECORD = Resource("hcloud_zone_rrset", "example.org/@/A", "@.example.org A")
ADDRESS = Resource("hcloud_floating_ip", 3, "mini-llm-ipv4", protected=True)
STATE = json.dumps(
    {
        "resources": [
            {
                "type": "hcloud_server",
                "instances": [{"attributes": {"id": "1"}}, {"deposed": "x", "attributes": {"id": "2"}}],
            },
            {
                "type": "hcloud_zone_rrset",
                "instances": [{"attributes": {"id": "@/AAAA", "zone": "example.org", "name": "@", "type": "AAAA"}}],
            },
            {"type": "terraform_data", "instances": [{"attributes": {"id": "no-number"}}]},
        ]
    }
)


def test_a_state_is_all_that_it_will_see_to() -> None:
    """What it only wants to delete as well; an empty one knows nothing, and what is none is refused."""
    assert read_state(STATE) == {
        ("hcloud_server", 1),
        ("hcloud_server", 2),
        ("hcloud_zone_rrset", "example.org/@/AAAA"),
    }
    assert read_state("") == set()
    for damaged in ("{", "[]", '{"resources": [{}]}'):
        with pytest.raises(Refused):
            read_state(damaged)


def test_what_stands_in_no_state_is_left() -> None:
    """By type and id."""
    assert find_left([SERVER, OTHER, KEY, ADDRESS], {("hcloud_server", 1)}) == [OTHER, KEY, ADDRESS]
    assert find_left([SERVER, OTHER], read_state(STATE)) == []


def test_what_serves_is_never_left() -> None:
    """A node that an address leads to is another state's, and then all of it may be."""
    with pytest.raises(Refused, match=r"mini-llm-a stands not in this state, but 203\.0\.113\.5 leads to it"):
        find_left([SERVER, OTHER, KEY], {("hcloud_server", 2)})


def test_while_an_apply_is_under_way_nothing_is_left(tmp_path: Path) -> None:
    """What it has made may stand in no state yet; any other reason why a plan fails is none."""

    def fail(reason: str) -> Any:
        def terraform(*words: object) -> list[str]:
            assert words[2] == "plan"
            raise Refused(reason, "x")

        return terraform

    with pytest.raises(Refused, match="an apply is under way"):
        require_rest("terraform", tmp_path, fail("terraform plan failed: Error: Error acquiring the state lock"))
    require_rest("terraform", tmp_path, fail("terraform plan failed: Error: Invalid value for variable"))


@pytest.mark.parametrize(("words", "removed", "code"), [([], [], 1), (["--yes"], [2, ("example.org", "@", "A")], 0)])
def test_it_tells_and_only_then_removes(
    words: list[str],
    removed: list[Any],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And says each by its name."""
    gone: list[Any] = []

    class Cloud:
        def __init__(self, access: Any) -> None:
            """Nothing is asked of it."""

        def delete_labelled(self, collection: str, number: int, name: str, end_s: float) -> None:
            assert collection == "ssh_keys"
            assert end_s > 1.7e9  # Unix time, as Cloud counts it
            gone.append(number)

        def delete_record(self, zone: str, name: str, of_type: str, end_s: float) -> None:
            gone.append((zone, name, of_type))

    monkeypatch.setattr(sweep, "Cloud", Cloud)
    monkeypatch.setattr(sweep, "find_access", lambda: None)
    monkeypatch.setattr(sweep, "list_resources", lambda cloud, deployment: [SERVER, OTHER, KEY, RECORD])
    monkeypatch.setattr(sweep, "run_terraform", lambda *words: STATE.splitlines())
    assert main(["--folder", str(tmp_path), *words]) == code
    assert gone == removed
    told = capsys.readouterr().out
    assert "ssh key mini-llm-me (2)" in told
    # What an apply was killed at and nobody may delete: the next one would fail at its name.
    monkeypatch.setattr(sweep, "list_resources", lambda cloud, deployment: [SERVER, ADDRESS])
    assert main(["--folder", str(tmp_path), *words]) == 1
    assert gone == removed
    assert "stays, for it is protected: floating ip mini-llm-ipv4 (3)" in capsys.readouterr().out
    assert "zone rrset @.example.org A (example.org/@/A)" in told
