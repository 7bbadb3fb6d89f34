#!/bin/sh
# After the layers: forgets who baked, and leaves what a server's first boot expects. The snapshot is taken right after.
set -eu

forget_downloads() {
    apt-get clean
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /root/.cache
}

forget_extra_authority() {
    [ -e /usr/local/share/ca-certificates/bake.crt ] || return 0
    rm /usr/local/share/ca-certificates/bake.crt
    update-ca-certificates --fresh >/dev/null 2>&1
}

# Host keys, machine-id and cloud-init's memory are made anew by each server.
forget_identity() {
    rm -f /etc/ssh/ssh_host_* /root/.ssh/authorized_keys /root/.bash_history /root/.python_history /root/.lesshst
    # Stopped, it writes its seed now; at the end of this server it would write another one, after the look below.
    systemctl stop systemd-random-seed.service
    rm -f /etc/hostname /var/lib/docker/engine-id /var/lib/systemd/random-seed /var/lib/systemd/credential.secret /var/lib/dbus/machine-id
    cloud-init clean --logs --machine-id --seed --configs all
    rm -rf /root/.config /root/.docker /root/.netrc /var/lib/mini-llm-traefik/* /var/lib/mini-llm-node/* /etc/shadow-
    printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > /etc/hosts
    [ -L /etc/resolv.conf ] || : > /etc/resolv.conf
}

# Where the image below already served, as it does when a layer is baked on top of a whole image, this server has begun
# an audit log, counters and measurements of its own; every node would go on with them.
forget_state() {
    systemctl stop mini-llm.socket mini-llm.service mini-llm-monitoring.service mini-llm-stack.service 2>/dev/null || true
    rm -rf /var/lib/mini-llm/audit /var/lib/mini-llm/counters.sqlite3* /var/lib/mini-llm/revoked
    rm -rf /var/lib/mini-llm-prometheus/* /var/lib/mini-llm-alertmanager/*
}

forget_logs() {
    journalctl --quiet --relinquish-var # from here on it writes to memory
    rm -rf /var/log/journal/* /var/log/apt /var/log/unattended-upgrades
    find /var/log -type f -delete
    find /var/tmp -mindepth 1 -delete
}

# Otherwise the first boot builds caches again that were just built.
mark_caches_fresh() {
    for directory in /etc /var; do
        printf '# Caches are as new as /usr.\nTIMESTAMP_NSEC=%s\n' "$(date --reference=/usr +%s%N)" > "$directory/.updated"
        touch --reference=/usr "$directory/.updated"
    done
}

# At a first boot systemd enables what no preset names, and what Debian's name: a second manager of the network, say. What
# starts on a node was chosen in the bake.
enable_nothing_more() {
    mkdir -p /etc/systemd/system-preset
    echo 'disable *' > /etc/systemd/system-preset/00-mini-llm.preset
}

# What is free must be zero or unmapped, or the snapshot holds it; and all must be on the disk, for Hetzner copies it
# while this server still goes down.
give_blocks_back() {
    sync
    fstrim / 2>/dev/null || true # a container's disk has none to give back
    sync
}

forget_downloads
forget_extra_authority
forget_state
forget_identity
forget_logs
enable_nothing_more
mark_caches_fresh
give_blocks_back
