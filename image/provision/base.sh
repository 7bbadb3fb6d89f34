#!/bin/sh
# Layer base: Debian's packages, all of the newest, and nothing that upgrades them later: a new image is the update.
set -eu

upgrade() {
    apt-get -qq -o APT::Update::Error-Mode=any update || exit 75 # try again later: the mirror did not answer
    # What an earlier bake has configured stays, where Debian has another default now.
    apt-get -qq -y -o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold dist-upgrade >/dev/null
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
    # It would wait at the console for somebody to choose a locale, at each first boot.
    systemctl mask --quiet systemd-firstboot.service
}

boot_to_a_server() {
    systemctl set-default --quiet multi-user.target
}

lock_passwords() {
    usermod --password '!*' root # not only locked: an old password's hash would stay behind the lock
}

upgrade
install_packages
remove_what_changes_a_node
boot_to_a_server
lock_passwords
