"""Owns what a server is told about itself at boot: the NoCloud seed and the settings that go with it on its disk."""

import errno
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineFailed, MachineSpec
from scripts.local_cloud.machines.network import GATEWAY_IPV4, GATEWAY_IPV6, mac_address

_SEED = "var/lib/cloud/seed/nocloud"
_PASSWORD_LOGIN = "etc/ssh/sshd_config.d/05-root-password.conf"  # noqa: S105 - a file's name
_READ_AT_MOST_BYTES = 4096
_RESOLVER_HEAD = "# Written at each start of the server.\n"


def write(disk: Path, spec: MachineSpec, resolvers: Sequence[str]) -> None:
    """Tells a server's disk all that it needs before power-on; raises MachineFailed."""
    for name, text in documents(spec, resolvers).items():
        write_inside(disk, f"{_SEED}/{name}", text, mode=0o600)
    write_inside(disk, _PASSWORD_LOGIN, "PermitRootLogin yes\n" if spec.root_password else "", mode=0o644)
    if _is_ours(disk / "etc/resolv.conf"):
        text = _RESOLVER_HEAD + "".join(f"nameserver {address}\n" for address in resolvers)
        write_inside(disk, "etc/resolv.conf", text, mode=0o644)


def documents(spec: MachineSpec, resolvers: Sequence[str]) -> dict[str, str]:
    """The files of the NoCloud seed by name."""
    return {
        "meta-data": _yaml(
            {
                "instance-id": str(spec.server_id),
                "local-hostname": spec.name,
                "public-keys": list(spec.public_keys),
            }
        ),
        "user-data": spec.user_data or "#cloud-config\n{}\n",
        "vendor-data": vendor_data(spec),
        "network-config": _yaml(network_config(spec, resolvers)),
    }


def vendor_data(spec: MachineSpec) -> str:
    """What the cloud itself asks of cloud-init; user-data may say otherwise."""
    settings: dict[str, object] = {"ssh_pwauth": False, "disable_root": False}
    if spec.root_password:
        root = {"name": "root", "password": spec.root_password, "type": "text"}
        settings |= {"ssh_pwauth": True, "chpasswd": {"expire": True, "users": [root]}}
    return f"#cloud-config\n{_yaml(settings)}"


def network_config(spec: MachineSpec, resolvers: Sequence[str]) -> dict[str, object]:
    """The public interface, in version 1, as in the real metadata: version 2 has no gateway outside the subnet."""
    subnets: list[dict[str, object]] = []
    if spec.ipv4:
        subnets.append({"type": "static", "address": f"{spec.ipv4}/32", "gateway": GATEWAY_IPV4})
    if spec.ipv6_network:
        subnets.append({"type": "static6", "address": ipv6_address(spec.ipv6_network), "gateway": GATEWAY_IPV6})
    interface = {"type": "physical", "name": "eth0", "mac_address": mac_address(spec.server_id), "subnets": subnets}
    resolver = [{"type": "nameserver", "address": list(resolvers)}] if resolvers else []
    return {"version": 1, "config": [interface, *resolver]}


def ipv6_address(network: str) -> str:
    """A server's own address in its network, with the length of the prefix."""
    address, _, length = network.partition("/")
    return f"{address.removesuffix('::')}::1/{length or '64'}"


def write_inside(root: Path, relative: str, text: str, mode: int) -> None:
    """Writes a file below ``root`` without following links, which a server could have laid to the host's own files.

    An empty text removes the file. Raises MachineFailed.
    """
    *directories, name = Path(relative).parts
    handle = os.open(root, os.O_DIRECTORY | os.O_RDONLY)
    try:
        for directory in directories:
            handle = _step_into(handle, directory)
        try:
            os.unlink(name, dir_fd=handle)
        except FileNotFoundError:
            pass  # the first start
        if text:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=handle)
            with os.fdopen(file, "w", encoding="utf-8") as stream:
                stream.write(text)
                os.fchmod(stream.fileno(), mode)
    except OSError as error:
        raise MachineFailed(f"{root / relative}: {error.strerror}") from error
    finally:
        os.close(handle)


def _step_into(handle: int, directory: str) -> int:
    try:
        try:
            os.mkdir(directory, 0o755, dir_fd=handle)
        except FileExistsError:
            pass  # nearly always
        inner = os.open(directory, os.O_DIRECTORY | os.O_RDONLY | os.O_NOFOLLOW, dir_fd=handle)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            error.strerror = f"{directory} is no directory of the server's own"
        raise
    os.close(handle)
    return inner


def _is_ours(resolver_file: Path) -> bool:
    """Whether a server left the file to the cloud. It may have made anything of it: a link, a pipe, a terabyte."""
    try:
        handle = os.open(resolver_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return False
        head = os.read(handle, _READ_AT_MOST_BYTES).decode(errors="replace")
    finally:
        os.close(handle)
    return not head.strip() or head.startswith(_RESOLVER_HEAD)


def _yaml(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"  # JSON is YAML
