#!/bin/sh
# Layer service: the service, the host's configuration, and what starts at boot.
set -eu

HOME_OF_ALL=/opt/mini-llm
STATE=/var/lib/mini-llm

copy_rootfs() {
    install -D -m 0644 "$UPLOADS/cloud-init/facts.schema.json" /usr/share/mini-llm/facts.schema.json
    find "$UPLOADS/rootfs" -type d -exec chmod 0755 {} +
    find "$UPLOADS/rootfs" -type f -exec chmod u=rwX,go=rX {} +
    cp -R --no-preserve=ownership "$UPLOADS/rootfs/." /
    systemd-sysusers
    systemd-tmpfiles --create mini-llm.conf
}

# It is of the layer below, which must have been made for just these requirements.
check_environment() {
    wanted=$(sha256sum < "$UPLOADS/service/requirements.txt")
    [ "$(cat "$HOME_OF_ALL/venv/requirements.sha256" 2>/dev/null)" = "$wanted" ] && return 0
    echo "error: the layer stack below has another environment than service/requirements.txt asks for; bake that layer too" >&2
    return 1
}

copy_service() {
    rm -rf "$HOME_OF_ALL/service"
    cp -R --no-preserve=ownership "$UPLOADS/service" "$HOME_OF_ALL/service"
    find "$HOME_OF_ALL/service" -name __pycache__ -prune -exec rm -rf {} +
    rm -rf "$HOME_OF_ALL/service/starter/text" "$HOME_OF_ALL/service/starter/starter.gguf" # one model, in one place
    chmod -R u=rwX,go=rX "$HOME_OF_ALL/service"
    "$HOME_OF_ALL/venv/bin/python" -m compileall -q "$HOME_OF_ALL/service"
}

# Settings that only the bake knows; the rest stands in the unit.
write_settings() {
    "$HOME_OF_ALL/venv/bin/python" "$UPLOADS/provision/write_settings.py" "$IMAGE_VERSION"
}

# With what its readiness is checked by at each start; for a model that comes without one this loads it, once.
record_golden_answer() {
    install -d -o mini-llm -g mini-llm -m 0700 "$STATE"
    cd "$HOME_OF_ALL"
    settings=$(cat /etc/mini-llm/service.env)
    # shellcheck disable=SC2086 # one variable a line, none with blanks
    setpriv --reuid mini-llm --regid mini-llm --clear-groups env -i PATH="$PATH" $settings \
        venv/bin/python -m service record
}

enable_units() {
    systemctl enable --quiet nftables.service mini-llm.socket mini-llm.service mini-llm-facts.service \
        mini-llm-model.service mini-llm-audit.service mini-llm-boot.service mini-llm-stack.service \
        mini-llm-monitoring.service mini-llm-first-certificate.service mini-llm-certificate.service \
        mini-llm-report.socket \
        mini-llm-addresses.service mini-llm-private-network.service mini-llm-mend.timer \
        mini-llm-takeover.service mini-llm-handover.socket mini-llm-rollout.socket
}

# For the node's report, and so for the list of what an image is made of.
list_parts() {
    dpkg-query --show --showformat '${Package} ${Version}\n' > /usr/share/mini-llm/packages.txt
    "$HOME_OF_ALL/venv/bin/python" -c 'from importlib.metadata import distributions
for each in distributions(): print(each.name, each.version)' | sort -f > /usr/share/mini-llm/python.txt
}

# What makes up the image's size, in bytes; the system is all that is not one of the others.
list_sizes() {
    size_of() { du -sxB1 "$@" 2>/dev/null | cut -f1; }
    models=$(size_of "$HOME_OF_ALL/models") venv=$(size_of "$HOME_OF_ALL/venv") service=$(size_of "$HOME_OF_ALL/service")
    containers=$(size_of /var/lib/docker)
    system=$(($(size_of /usr) + $(size_of /var) + $(size_of /boot) + $(size_of /etc) - containers))
    printf '{"model": %s, "venv": %s, "service": %s, "containers": %s, "system": %s}\n' \
        "$models" "$venv" "$service" "$containers" "$system" > /usr/share/mini-llm/sizes.json
}

copy_rootfs
check_environment
copy_service
write_settings
record_golden_answer
enable_units
list_parts
list_sizes
