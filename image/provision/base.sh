#!/bin/sh
# Layer base: Debian's packages, all of the newest, and nothing that upgrades them later: a new image is the update.
set -eu

# A fresh server of Hetzner's may be at an upgrade of its own, which holds the lock.
wait_for_nobody() {
    systemctl stop apt-daily.timer apt-daily-upgrade.timer apt-daily.service apt-daily-upgrade.service
}

# What an earlier bake has configured stays, where Debian has another default now.
apt_get() {
    apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold "$@" >/dev/null
}

# Fetched first: where only that fails, it was the mirror, and 75 says to try again later.
fetch_and() {
    apt_get --download-only "$@" || exit 75
    apt_get "$@"
}

upgrade() {
    apt_get -o APT::Update::Error-Mode=any update || exit 75
    fetch_and dist-upgrade
}

install_packages() {
    fetch_and install --no-install-recommends \
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
        systemd-timesyncd
}

remove_what_changes_a_node() {
    apt-get -qq -y purge unattended-upgrades >/dev/null 2>&1 || true # not there on most bases
    systemctl mask --quiet apt-daily.timer apt-daily-upgrade.timer
    # It would wait at the console for somebody to choose a locale, at each first boot.
    systemctl mask --quiet systemd-firstboot.service
}

boot_to_a_server() {
    systemctl set-default --quiet multi-user.target
}

lock_passwords() {
    usermod --password '!*' root # not only locked: an old password's hash would stay behind the lock
}

wait_for_nobody
upgrade
install_packages
remove_what_changes_a_node
boot_to_a_server
lock_passwords
