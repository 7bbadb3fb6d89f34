#!/bin/sh
# Layer base: Debian's packages, all of the newest, and nothing that upgrades them later: a new image is the update.
set -eu

upgrade() {
    apt-get -qq update
    apt-get -qq -y -o Dpkg::Use-Pty=0 dist-upgrade >/dev/null
}

install_packages() {
    apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends \
        ca-certificates \
        curl \
        docker-cli \
        docker-compose \
        docker.io \
        nftables \
        openssh-server \
        python3 \
        python3-jsonschema \
        python3-venv \
        python3-yaml \
        systemd-timesyncd >/dev/null
}

remove_what_changes_a_node() {
    apt-get -qq -y purge unattended-upgrades >/dev/null 2>&1 || true # not there on most bases
    systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer
}

boot_to_a_server() {
    systemctl set-default --quiet multi-user.target
}

lock_passwords() {
    passwd --quiet --lock root
}

upgrade
install_packages
remove_what_changes_a_node
boot_to_a_server
lock_passwords
