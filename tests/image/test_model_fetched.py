"""A model of the catalogue, which the baking server fetches: the README's commands, with a small file at a hub of ours.

What they name is 4.66 GB on a model hub; the file that stands for it has another address, size and MD5, and no more.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.absent import did_not_run
from tests.commands import find_command
from tests.image.bakery import Bakery, git, running_bakery
from tests.image.harness import disk_of
from tests.image.registry import make_certificate
from tests.model_hub import point_entry, running_hub
from tests.programs import ProgramMissing
from tests.service.harness import write_small_model
from tests.typed import type_command

_BAKE_S = 600


@dataclass(frozen=True)
class Fetched:
    """A bakery whose catalogue names a model at the hub, and the model's SHA-256, which nothing says beforehand."""

    bakery: Bakery
    sha256: str


@pytest.fixture(scope="module")
def fetched(host: None, tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetched]:
    """The cloud's servers reach the hub, and trust it while they bake."""
    folder, served = tmp_path_factory.mktemp("bakery"), tmp_path_factory.mktemp("hub")
    content = write_small_model(served).read_bytes()
    try:
        with running_bakery(folder) as bakery:
            address, _ = transfer_addresses(tag_of(bakery.cloud.state))
            certificate, key = make_certificate(folder, f"IP:{address}")
            with Path(bakery.more[3]).open("a") as authorities:
                authorities.write(certificate.read_text())
            with running_hub(served, address, certificate, key) as hub:
                catalogue = bakery.tree / "service" / "models.json"
                entries = json.loads(catalogue.read_text())
                point_entry(entries, "llama-3-8b-instruct", f"{hub}/small.gguf", content)
                catalogue.write_text(json.dumps(entries))
                git(bakery.tree, "commit", "-qam", "a small file stands for the model")
                yield Fetched(bakery, sha256(content).hexdigest())
    except ProgramMissing as error:
        did_not_run(error)


def test_packer_alone(fetched: Fetched) -> None:
    """Of the layers the model's: a snapshot that holds the file, and what it is."""
    bakery = fetched.bakery
    command = find_command("packer build ").removesuffix(" image")
    options = f"-var last_layer=model -var extra_ca_file={bakery.more[3]}"
    type_command(f"{command} {options} image", _BAKE_S, cwd=bakery.tree, environment=bakery.environment)
    [made] = bakery.cloud.client().images.get_all(type=["snapshot"])
    placed = json.loads((disk_of(bakery.cloud, made) / "opt/mini-llm/models/model.json").read_text())
    assert (placed["name"], placed["sha256"]) == ("llama-3-8b-instruct", fetched.sha256)
    made.delete()


def test_make_bake(fetched: Fetched) -> None:
    """All of it: verified by a server that answers with the fetched model, and promoted."""
    bakery = fetched.bakery
    command = find_command("make bake BAKE=").removesuffix('"')
    options = " ".join(["--tree", str(bakery.tree), *bakery.more])
    said = type_command(f'{command} {options}"', _BAKE_S, environment=bakery.environment)
    [image] = [each for each in bakery.tell("list")["images"] if each["layer"] == "service"]
    assert image["channels"] == {"stable": 1}, said
    parts = bakery.tell("show", str(image["id"]))["sbom"]["components"]
    assert [each["hashes"] for each in parts if each["name"] == "llama-3-8b-instruct"] == [
        [{"alg": "SHA-256", "content": fetched.sha256}]
    ]
    assert bakery.leftovers() == []
