"""Owns what belongs to a deployment at the cloud, by the labels that Terraform gives, and where its domain stands."""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hcloud.floating_ips import BoundFloatingIP
from hcloud.primary_ips import BoundPrimaryIP
from hcloud.servers import BoundServer
from hcloud.volumes import BoundVolume

from scripts.bake.cloud import Cloud
from scripts.bake.runs import read_json
from scripts.bake.snapshots import PRODUCT, Snapshot

DEFAULT_DEPLOYMENT = "mini-llm"
FOLDER = Path(__file__).resolve().parents[1] / "terraform"
_DOMAIN = re.compile(r'^\s*domain\s*=\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Deployment:
    """Everything of one deployment; the snapshots are the product's, and so those of other deployments, too."""

    name: str
    servers: list[BoundServer]
    floating_ips: list[BoundFloatingIP]
    primary_ips: list[BoundPrimaryIP]
    volumes: list[BoundVolume]
    snapshots: list[Snapshot]


def add_place(parser: argparse.ArgumentParser) -> None:
    """Adds ``--folder`` and ``--deployment``: whose files and state, and which deployment's resources."""
    parser.add_argument("--folder", type=_folder, default=FOLDER, help="where Terraform's files and state are")
    parser.add_argument("--deployment", default=DEFAULT_DEPLOYMENT, help="the name that it has in its variables")


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path.resolve()


def _is_own(labels: dict[str, str] | None, deployment: str) -> bool:
    told = labels or {}
    return told.get("product") == PRODUCT and told.get("deployment") == deployment


def own_servers(cloud: Cloud, deployment: str) -> list[BoundServer]:
    """The deployment's servers. Raises BakeError."""
    return [each for each in cloud.servers() if _is_own(each.labels, deployment)]


def read_deployment(cloud: Cloud, deployment: str) -> Deployment:
    """What the cloud has of it. Raises BakeError.

    A server's own addresses and volumes bear no labels of their own: what is attached to an own server counts.
    """
    servers = own_servers(cloud, deployment)
    numbers = {each.id for each in servers}
    return Deployment(
        deployment,
        servers,
        [each for each in cloud.floating_ips() if _is_own(each.labels, deployment)],
        [each for each in cloud.primary_ips() if each.assignee_id in numbers or _is_own(each.labels, deployment)],
        [
            each
            for each in cloud.volumes()
            if (each.server is not None and each.server.id in numbers) or _is_own(each.labels, deployment)
        ],
        cloud.snapshots(),
    )


def held_by(server: BoundServer, addresses: Iterable[BoundFloatingIP]) -> list[BoundFloatingIP]:
    """Those of the floating addresses that lead to the server."""
    return [each for each in addresses if each.server is not None and each.server.id == server.id]


def own_addresses(server: BoundServer) -> list[str]:
    """The addresses that a server was made with; of an IPv6 network the first, which the node answers at."""
    told = server.public_net
    ipv4 = [] if told is None or told.ipv4 is None else [told.ipv4.ip]
    ipv6 = [] if told is None or told.ipv6 is None else [told.ipv6.ip.partition("/")[0] + "1"]
    return [*ipv4, *ipv6]


def find_domain(folder: Path) -> str | None:
    """The domain in Terraform's variables, as far as they stand in files; the last file wins, as it does there."""
    found = None
    files = [folder / "terraform.tfvars", folder / "terraform.tfvars.json"]
    for path in [*files, *sorted((*folder.glob("*.auto.tfvars"), *folder.glob("*.auto.tfvars.json")))]:
        if path.suffix == ".json":
            found = (read_json(path) or {}).get("domain", found)
        elif path.is_file() and (told := _DOMAIN.search(path.read_text(errors="replace"))):
            found = told.group(1)
    return found
