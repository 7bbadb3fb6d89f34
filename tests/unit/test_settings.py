"""The environment: parsed once, every problem told together."""

from pathlib import Path

import pytest

from service.errors import SettingsInvalid
from service.settings import SETTINGS, Settings, check_folders, describe_settings, read_settings

HOME = {"HOME": "/home/x"}


def test_defaults_are_enough() -> None:
    """Without any variable there are whole settings: loopback, the starter model, folders below the home."""
    settings = read_settings(HOME)
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 8080, "starter")
    assert settings.cache_dir == Path("/home/x/.cache/mini-llm")
    assert settings.control_socket == Path("/home/x/.local/state/mini-llm/control-8080.sock")
    assert settings.threads_of_server > settings.queue_size + 8


def test_every_problem_is_told_at_once() -> None:
    """Several wrong variables are all named in one go, a misspelt one too."""
    wrong = {
        "LLM_HOST": "example.org",
        "LLM_AUTH": "no",
        "LLM_TRUSTED_PROXIES": "10.0.0.0/33",
        "LLM_ADDRESS_PARALLEL": "0",
        "LLM_AUDIT_BEGIN": "latest",
        "LLM_PORT": "80x",
        "LLM_MODEL_SHA256": "12",
        "LLM_QUEUE_SIZE": "-1",
        "LLM_PRICE_EUR_PER_HOUR": "nan",
        "LLM_STATE_DIR": "relative",
        "LLM_ANNOUNCE": "yes",
        "LLM_PROT": "8080",
        "LLM_DEFAULT_MAX_TOKENS": "5000",
    }
    with pytest.raises(SettingsInvalid) as caught:
        read_settings({**HOME, **wrong})
    assert len(caught.value.problems) == len(wrong)
    for variable in wrong:
        assert any(variable in problem for problem in caught.value.problems), variable


@pytest.mark.parametrize("host", ["example.org", "", "127.0.0.1.nip.io", "1.2.3"])
def test_host_is_an_address(host: str) -> None:
    """A name that somebody else resolves is no address to listen on."""
    with pytest.raises(SettingsInvalid):
        read_settings({**HOME, "LLM_HOST": host})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "2001:db8::1"])
def test_only_loopback_without_keys(host: str) -> None:
    """Authentication can be off on loopback alone; keys are the default everywhere."""
    assert read_settings({**HOME, "LLM_HOST": host}).keys_required
    with pytest.raises(SettingsInvalid, match="LLM_AUTH"):
        read_settings({**HOME, "LLM_HOST": host, "LLM_AUTH": "off"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_addresses(host: str) -> None:
    """Every loopback address will do, and keys are the default there too."""
    assert read_settings({**HOME, "LLM_HOST": host}).keys_required
    assert not read_settings({**HOME, "LLM_HOST": host, "LLM_AUTH": "off"}).keys_required


def test_trusted_proxies() -> None:
    """Proxies are named by addresses and networks, with or without blanks."""
    settings = read_settings({**HOME, "LLM_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8,fd00::/8"})
    assert [str(network) for network in settings.trusted_proxies] == ["127.0.0.1/32", "10.0.0.0/8", "fd00::/8"]
    assert any(line.startswith("LLM_TRUSTED_PROXIES=127.0.0.1/32,10") for line in describe_settings(settings))


def test_every_field_has_a_parser_and_a_line() -> None:
    """The table of settings and the record are the same list, and each is described."""
    assert set(SETTINGS) == set(Settings.__dataclass_fields__)
    lines = describe_settings(read_settings(HOME))
    assert len(lines) == len(SETTINGS)
    assert "LLM_PORT=8080    # port to listen on" in lines


def test_long_socket_path_is_told() -> None:
    """A control socket whose path the kernel would not take is refused when the settings are read."""
    with pytest.raises(SettingsInvalid, match="100 bytes"):
        read_settings({**HOME, "LLM_CONTROL_SOCKET": "/" + "x" * 120})


def test_folders_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    """Folders are made when they are missing; each that cannot be is named with its variable."""
    (tmp_path / "file").write_text("")
    wrong = {"LLM_STATE_DIR": str(tmp_path / "file" / "x"), "LLM_CONTROL_SOCKET": str(tmp_path / "file" / "y" / "s")}
    wrong["LLM_AUDIT_DIR"] = str(tmp_path / "audit")
    with pytest.raises(SettingsInvalid) as caught:
        check_folders(read_settings({**HOME, **wrong}))
    assert len(caught.value.problems) == 2
    right = {"LLM_STATE_DIR": str(tmp_path / "state"), "LLM_CONTROL_SOCKET": str(tmp_path / "run" / "s")}
    check_folders(read_settings({**HOME, **right}))
    assert (tmp_path / "run").is_dir()
