#!/bin/sh
# Makes a fresh Debian tree, $1, into the image of a server that has never booted.
set -eu

enable_network() {
    systemctl --root="$1" enable systemd-networkd.service ssh.service
}

# It would wait at the console for somebody to choose a locale.
forbid_questions() {
    systemctl --root="$1" mask systemd-firstboot.service
}

# Both are made by a server's first boot.
forget_identity() {
    rm -f "$1"/etc/ssh/ssh_host_*
    echo uninitialized > "$1/etc/machine-id"
    rm -f "$1/var/lib/dbus/machine-id" "$1/etc/hostname"
}

# The local cloud writes it at each start.
leave_resolver_empty() {
    rm -f "$1/etc/resolv.conf"
    : > "$1/etc/resolv.conf"
}

# Downloaded lists are a tenth of the image, and old by the time that they are used.
drop_downloads() {
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin "$1"/var/log/apt "$1"/var/log/*.log
}

# Otherwise the first boot builds caches again that the packages have just built.
mark_caches_fresh() {
    for directory in etc var; do
        printf '# Caches are as new as /usr.\nTIMESTAMP_NSEC=%s\n' "$(date --reference="$1/usr" +%s%N)" > "$1/$directory/.updated"
        touch --reference="$1/usr" "$1/$directory/.updated"
    done
}

enable_network "$1"
forbid_questions "$1"
forget_identity "$1"
leave_resolver_empty "$1"
drop_downloads "$1"
mark_caches_fresh "$1"
