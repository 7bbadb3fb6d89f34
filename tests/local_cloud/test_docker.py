"""Docker inside a server: an image from a file, behind a compose file, as the baked image will do it."""

from pathlib import Path

from hcloud.images import Image
from hcloud.server_types import ServerType

from tests.local_cloud.harness import LocalCloud, address_of, ssh

# Everything from Debian's packages: the engine, and a program that needs no library for the image.
INSTALL = """
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends docker.io docker-cli docker-compose busybox-static >/dev/null 2>&1
systemctl is-active docker
"""
# An image that comes as a file, like those of a bake.
MAKE_IMAGE = """
set -e
mkdir -p /srv/image/bin /srv/image/www && cp /bin/busybox /srv/image/bin/busybox
echo served-from-a-container > /srv/image/www/index.html
tar -C /srv/image -c . | docker import - local/web:1 >/dev/null
docker save local/web:1 -o /srv/web.tar && docker rmi local/web:1 >/dev/null
docker load -i /srv/web.tar
"""
COMPOSE = """
services:
  web:
    image: local/web:1
    command: [/bin/busybox, httpd, -f, -p, "8000", -h, /www]
    restart: always
    ports: ["80:8000"]
"""


def test_compose_in_a_server(cloud: LocalCloud, key: Path) -> None:
    """The container answers under the server's own address, and again after a reboot."""
    client = cloud.client()
    known = client.ssh_keys.create("docker", key.with_suffix(".pub").read_text())
    made = client.servers.create("docker", ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known])
    try:
        address = address_of(made.server)
        assert ssh(key, address, INSTALL).strip() == "active"
        assert "local/web:1" in ssh(key, address, MAKE_IMAGE)
        ssh(key, address, f"mkdir -p /srv/web && cat > /srv/web/compose.yaml <<'END'{COMPOSE}END")
        ssh(key, address, "cd /srv/web && docker compose up -d --wait 2>&1")
        ask = "for i in $(seq 100); do curl -sf http://localhost/ && break; sleep 0.1; done"
        assert ssh(key, address, ask).strip() == "served-from-a-container"
        made.server.reboot().wait_until_finished()
        assert ssh(key, address, ask).strip() == "served-from-a-container"
    finally:
        made.server.delete().wait_until_finished()
        known.delete()
