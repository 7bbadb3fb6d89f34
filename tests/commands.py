"""Owns which commands README.md and OPERATING.md tell a reader to type, and which test runs each of them.

A value is a test as ``path::name``, which runs that program with that verb and these options, or ``by hand: `` and the
reason why no test does. Where tests have files and addresses of their own, their places and ports differ; what takes
long is told by options of its own to do each thing once, or a part.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "OPERATING.md")
BY_HAND = "by hand: "

_NEWCOMER = "tests/service/test_readme.py::"
_BAKE = "tests/image/test_bake.py::"
_BAKE_VERBS = "tests/unit/bake/test_command.py::"
_LAUNCH = "tests/image/test_launch.py::"
_VIEWS = "tests/image/test_views.py::"
_CLIENTS = "tests/local_cloud/test_clients.py::"
_NIX = f"{BY_HAND}nixpkgs is too large to be had here; tests/nix"

COMMANDS = {
    "sudo make demo": "tests/image/test_demo.py::test_the_demo",
    # The service
    "make serve": f"{_NEWCOMER}test_a_fresh_clone_serves",
    "curl -sS http://127.0.0.1:8080/generate -H 'Content-Type: application/json' -d "
    '\'{"prompt": "What is mini-llm?"}\'': f"{_NEWCOMER}test_the_first_request",
    "make serve MODEL=llama-3.2-1b-instruct": f"{_NEWCOMER}test_a_model_of_the_catalogue",
    "make serve MODEL=/models/my-model.gguf PORT=9000": f"{_NEWCOMER}test_a_model_of_ones_own",
    "make serve HOST=0.0.0.0": f"{_NEWCOMER}test_keys_on_a_network",
    ".venv/bin/python -m service keys add alice --requests-per-minute 60 --tokens-per-day 100000 --parallel 2 "
    "--expires 90d": f"{_NEWCOMER}test_keys_on_a_network",
    ".venv/bin/python -m service keys list": f"{_NEWCOMER}test_keys_on_a_network",
    ".venv/bin/python -m service keys revoke alice": f"{_NEWCOMER}test_keys_on_a_network",
    "curl -u alice:KEY": f"{_NEWCOMER}test_keys_on_a_network",
    "python -m service audit verify": f"{_NEWCOMER}test_keys_on_a_network",
    "audit head": f"{_NEWCOMER}test_keys_on_a_network",
    "verify --after": f"{_NEWCOMER}test_keys_on_a_network",
    "python -m service check": f"{_NEWCOMER}test_running_it_by_hand",
    "python -m service serve": "tests/service/test_serve.py::test_printed_curl_line_works_as_printed",
    "gunicorn -c service/gunicorn.conf.py": f"{_NEWCOMER}test_running_it_by_hand",
    "python -m service drain": f"{_NEWCOMER}test_running_it_by_hand",
    "nix run .#serve": f"{_NIX} evaluate it and run its script",
    "nix develop": f"{_NIX} evaluate it",
    # The local cloud
    "sudo apt-get install --no-install-recommends systemd-container mmdebstrap arch-test debian-archive-keyring "
    "btrfs-progs nftables iproute2 openssh-client hcloud-cli": (f"{_CLIENTS}test_what_the_readme_installs"),
    "sudo make cloud": f"{_CLIENTS}test_export_lines_are_the_ones_that_hold",
    "sudo make cloud CLOUD=--old-clients": f"{_CLIENTS}test_packer_bakes_a_snapshot_that_boots",
    "sudo make cloud-clean": "tests/local_cloud/test_life.py::test_a_start_that_is_interrupted_leaves_nothing",
    "export HCLOUD_ENDPOINT=http://127.0.0.1:8899/v1": f"{_CLIENTS}test_the_lines_of_the_readme",
    "export HCLOUD_TOKEN=local": f"{_CLIENTS}test_the_lines_of_the_readme",
    'ssh-keygen -q -t ed25519 -N "" -f ./cloud_key': f"{_CLIENTS}test_the_lines_of_the_readme",
    "hcloud ssh-key create --name me --public-key-from-file ./cloud_key.pub": f"{_CLIENTS}test_the_lines_of_the_readme",
    "hcloud server create --name web-1 --type cx23 --image debian-13 --ssh-key me": (
        f"{_CLIENTS}test_the_lines_of_the_readme"
    ),
    "ssh -i ./cloud_key -o ConnectionAttempts=20 -o StrictHostKeyChecking=accept-new "
    "-o UserKnownHostsFile=./cloud_hosts root@$(hcloud server ip web-1)": f"{_CLIENTS}test_the_lines_of_the_readme",
    # Baking
    "export HCLOUD_TOKEN=…": f"{_BAKE}test_from_nothing_to_promoted",
    'make bake BAKE="--model llama-3-8b-instruct"': f"{_BAKE}test_nothing_has_changed",
    'make bake BAKE="--model llama-3-8b-instruct --again base"': (
        "tests/bake/test_checks.py::test_a_layer_is_baked_anew"
    ),
    "make bake": f"{_BAKE}test_from_nothing_to_promoted",
    ".venv/bin/python scripts/bake.py VERB": f"{_BAKE}test_from_nothing_to_promoted",
    "build --promote": f"{_BAKE}test_from_nothing_to_promoted",
    "bake.py build": f"{_BAKE}test_a_change_of_the_service_on_a_bad_day",
    "bake.py verify ID": "tests/bake/test_checks.py::test_an_image_is_verified_again",
    "bake.py promote": f"{_BAKE}test_a_change_of_the_service_on_a_bad_day",
    "bake.py promote ID": f"{_BAKE}test_a_change_of_the_service_on_a_bad_day",
    "bake.py rollback": f"{_BAKE}test_a_change_of_the_service_on_a_bad_day",
    ".venv/bin/python scripts/bake.py rollback": f"{_BAKE}test_a_change_of_the_service_on_a_bad_day",
    "bake.py list": f"{_BAKE}test_from_nothing_to_promoted",
    "bake.py show ID": f"{_BAKE}test_its_report",
    "bake.py prune": f"{_BAKE_VERBS}test_nothing_is_deleted_without_a_yes",
    "bake.py prune --keep 0": f"{_BAKE_VERBS}test_nothing_is_deleted_without_a_yes",
    "bake.py sweep": f"{_BAKE}test_the_cloud_says_no_to_the_probe",
    "bake.py pins": f"{_BAKE_VERBS}test_pins_of_this_tree",
    "bake.py cost": f"{_BAKE_VERBS}test_cost_counts_snapshots_and_the_servers_that_run_them",
    "packer init image": "tests/image/test_packer_init.py::test_the_plugin_is_fetched",
    "packer build -var image_version=1 -var model=llama-3-8b-instruct -var server_type=cx43 image": (
        f"{_BAKE}test_packer_alone"
    ),
    # Launching
    "cp terraform/examples/llm.tfvars terraform/terraform.tfvars": f"{_NEWCOMER}test_a_deployment_begins",
    "make handover-key": f"{_NEWCOMER}test_a_deployment_begins",
    "terraform -chdir=terraform init": f"{_LAUNCH}test_the_files_are_formatted_and_valid",
    "terraform -chdir=terraform apply -target=hcloud_floating_ip.service": f"{_LAUNCH}test_with_an_ordered_certificate",
    "terraform apply": f"{_LAUNCH}test_from_nothing",
    "terraform -chdir=terraform apply": f"{_LAUNCH}test_from_nothing",
    "terraform -chdir=terraform plan": f"{_LAUNCH}test_other_keys_are_another_node",
    "terraform output": f"{_LAUNCH}test_from_nothing",
    "terraform -chdir=terraform output -raw try": f"{_LAUNCH}test_from_nothing",
    "terraform -chdir=terraform apply -replace=terraform_data.node": f"{_LAUNCH}test_a_node_is_replaced_by_name",
    "terraform -chdir=terraform destroy": f"{_LAUNCH}test_destroy_leaves_the_protected_addresses_alone",
    "apply -var protect_address=false -target=hcloud_floating_ip.service": (
        f"{_LAUNCH}test_destroy_leaves_the_protected_addresses_alone"
    ),
    "plan -out=": f"{_LAUNCH}test_records_are_named_as_the_zone_names_them",
    "hcloud server list -l deployment=mini-llm": f"{_CLIENTS}test_hcloud_cli",
    "hcloud floating-ip list": f"{_CLIENTS}test_hcloud_cli",
    ".venv/bin/python scripts/sweep.py": "tests/unit/test_sweep.py::test_it_tells_and_only_then_removes",
    ".venv/bin/python scripts/sweep.py --yes": (
        "tests/image/test_rollout.py::test_what_goes_wrong_leaves_the_old_node_serving"
    ),
    ".venv/bin/python scripts/drift.py": f"{_LAUNCH}test_drift_is_told",
    ".venv/bin/python scripts/status.py": f"{_VIEWS}test_status_of_a_node",
    ".venv/bin/python scripts/cost.py": f"{_VIEWS}test_cost_of_a_node",
    # Operating
    "git pull": f"{_NEWCOMER}test_an_upgrade_begins",
    "cd /opt/mini-llm && env $(cat /etc/mini-llm/service.env) venv/bin/python -m service keys revoke NAME": (
        "tests/image/test_rollout.py::test_rollouts_under_load"
    ),
    # Tests and measurements
    "make test": "tests/service/test_make.py::test_make_test",
    "make unit": "tests/service/test_make.py::test_make_unit",
    "make test-faults": "tests/bake/test_fault_plan.py::test_a_sample_of_the_plan",
    "make test-launch-faults": "tests/bake/test_launch_faults.py::test_a_sample_of_the_plan",
    "make bench": "tests/service/test_benches.py::test_one_round",
    "make bench-servers": "tests/service/test_benches.py::test_one_life_of_the_server",
    "sudo make bench-cloud": "tests/local_cloud/test_bench_cloud.py::test_one_round",
    "sudo make bench-image": "tests/image/test_bench_image.py::test_one_round",
    "sudo make bench-bake": "tests/image/test_bench_bake.py::test_a_bake_and_what_is_spared",
    "sudo make bench-rollout": "tests/image/test_bench_rollout.py::test_where_the_time_goes",
    "sudo make pictures": "tests/local_cloud/test_pictures.py::test_all_of_them",
}

# What commands in the text begin with; words alone after them are files or programs.
_PROGRAMS = r"(?:\.venv/bin/)?python|cd|curl|gunicorn|hcloud|make|nix|packer|sudo|terraform"
_VERBS = r"apply|audit|bake\.py|build|plan|verify(?=\s--)"  # of a program that was named before
_INLINE = re.compile(rf"`((?:{_PROGRAMS}|{_VERBS})\s[^`]+)`")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [content for name, content in _FENCED.findall(text) if name == language]


def split_shell(script: str) -> list[str]:
    """A script's commands: lines that go on are joined, comments dropped, blanks outside of quotes made one."""
    commands: list[str] = []
    words, quote, before = "", "", "\n"
    rest = iter(script.replace("\\\n", " ") + "\n")
    for character in rest:
        if quote:
            words += character
            quote = "" if character == quote else quote
        elif character == "#" and before.isspace():
            for character in rest:
                if character == "\n":
                    break
            commands, words = [*commands, words], ""
        elif character in "\n;":
            commands, words = [*commands, words], ""
        else:
            quote = character if character in "'\"" else ""
            if not character.isspace():
                words += character
            elif not before.isspace():
                words += " "
        before = character
    return [command.strip() for command in commands if command.strip()]


def list_commands(text: str) -> list[str]:
    """Each command of a document, in its order; those of ``sh`` blocks first, then those within the text."""
    found = [command for block in blocks(text, "sh") for command in split_shell(block)]
    prose = _FENCED.sub("", text)
    for command in _INLINE.findall(prose):
        found.append(" ".join(command.split()))
    # Verbs in the first column of the table of bake.py's.
    table = prose.partition("| `bake.py …` |")[2].partition("\n\n")[0]
    for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        found += [f"bake.py {verb}" for verb in re.findall(r"`([^`]+)`", cell)]
    return list(dict.fromkeys(command for command in found if not command.endswith(" …")))


def find_command(begins: str) -> str:
    """The command of the README that is this, or the one that begins so."""
    every = list_commands((ROOT / "README.md").read_text())
    [found] = [begins] if begins in every else [each for each in every if each.startswith(begins)]
    return found
