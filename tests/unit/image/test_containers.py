"""How the layers fetch what they are made of, and what a container may say: in place of a linter of Dockerfiles."""

import json
import re
from typing import Any

import pytest
import yaml

from tests.tree import list_files, read_texts

TEXTS = read_texts()
PINS: dict[str, Any] = json.loads(TEXTS["image/pins.json"])["images"]
SERVICES: dict[str, Any] = yaml.safe_load(TEXTS["image/rootfs/usr/share/mini-llm/stack/compose.yaml"])["services"]
USERS = dict(re.findall(r"^u mini-llm-(\S+) (\d+) ", TEXTS["image/rootfs/usr/lib/sysusers.d/mini-llm.conf"], re.M))
# What a service of the compose file may say; with anything else it could do more than it needs.
KNOWN = {
    *("image", "pull_policy", "user", "command", "environment", "volumes", "tmpfs", "network_mode", "restart"),
    *("read_only", "cap_drop", "security_opt", "pids_limit", "mem_limit", "stop_grace_period"),
}
# The usual way is measured as somebody would type it.
SCRIPTS = [name for name in TEXTS if (name.endswith(".sh") or name == ".ci/run") and "/usual_way/" not in name]


def commands(name: str) -> list[str]:
    """A script's commands, each as one line."""
    return re.sub(r"\\\n\s*", "", TEXTS[name]).splitlines()


def test_nothing_is_built_by_a_dockerfile() -> None:
    """Containers are fetched by digest as their makers built them; a Dockerfile would need rules that are not here."""
    assert [name for name in list_files() if re.search(r"(Docker|Container)file", name)] == []


@pytest.mark.parametrize("name", PINS)
def test_an_image_is_fetched_by_digest(name: str) -> None:
    """From a registry that is named, with the version that people know it by."""
    pin = PINS[name]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", pin["digest"])
    assert re.fullmatch(r"[a-z.]+\.[a-z]+/[a-z/-]+", pin["image"])
    assert re.fullmatch(r"v?\d+\.\d+\.\d+", pin["version"])
    assert '"${name}=${pin.image}@${pin.digest}"' in TEXTS["image/mini-llm.pkr.hcl"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_says_nothing_that_gives_it_more(name: str) -> None:
    """No privileges, devices, capabilities, other namespaces or ports: what is known is little."""
    assert SERVICES[name].keys() <= KNOWN


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_a_user_and_bounds_of_its_own(name: str) -> None:
    """A user of the image's that nobody else is, and so much memory and so many processes."""
    container = SERVICES[name]
    assert container["user"] == f"{USERS[name]}:{USERS[name]}"
    assert re.fullmatch(r"[1-9]\d*m", container["mem_limit"])
    assert 0 < container["pids_limit"] <= 256


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_stops_at_its_first_failure(name: str) -> None:
    """Also at a name that is not set."""
    assert re.search(r"^set -eu(o pipefail)?$", TEXTS[name], re.MULTILINE)


def find_faults(lines: list[str]) -> list[str]:
    """Commands that fetch what nobody has pinned or asked for, as hadolint would find them in a Dockerfile."""
    rules = {
        r"apt-get .*(?<=\s)install (?!.*--no-install-recommends)": "more packages than are named",
        r"\bpip\b.* install (?!.*--require-hashes)": "packages without hashes",
        r"\bpip\b.* install (?!.*--no-cache-dir)": "a cache in the image",
        r"\b(curl|wget)\b.*\|\s*(ba|da)?sh\b": "a program that nobody has looked at",
        r"\b(curl|wget)\b.*(--insecure| -k\b|--no-check-certificate)": "without a certificate",
        r"docker pull .*(?<!@)[a-z]+:[\w.]+(\s|$)": "an image by its tag",
        r"\bsudo\b": "root is who runs it",
        r"chmod .*\b0?777\b": "for everybody",
    }
    return [f"{why}: {line.strip()}" for line in lines for rule, why in rules.items() if re.search(rule, line)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_layers_fetch_only_what_is_named(name: str) -> None:
    """No recommended packages, no unhashed ones, nothing by a tag or past its certificate."""
    lines = [line for line in commands(name) if not line.lstrip().startswith("#")]
    assert find_faults(lines) == []


@pytest.mark.parametrize(
    "line",
    [
        "apt-get -qq -y install curl",
        "pip install --no-cache-dir falcon",
        "pip install --require-hashes -r requirements.txt",
        "curl -fsSL https://get.example.org | sh",
        "curl -k https://example.org",
        "docker pull docker.io/library/traefik:v3",
        "sudo rm -rf /",
        "chmod 0777 /srv",
    ],
)
def test_faults_are_found(line: str) -> None:
    """One of each kind."""
    assert len(find_faults([line])) == 1


def test_docker_itself_is_kept_tight() -> None:
    """No registry without a certificate, no socket on the network, nothing that gains privileges."""
    settings = json.loads(TEXTS["image/rootfs/etc/docker/daemon.json"])
    nets = {"bridge": "none", "iptables": False, "ip6tables": False, "ip-forward": False}
    assert settings.keys() == {"log-driver", "no-new-privileges", "metrics-addr", *nets}
    # All containers are on the host's network: rules of Docker's own would be for nobody.
    assert {name: settings[name] for name in nets} == nets
    assert settings["no-new-privileges"] is True
    assert settings["metrics-addr"].startswith("127.0.0.1:")
