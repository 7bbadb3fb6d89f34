#!/bin/sh
# Layer service: the service in an environment of its own, the host's configuration, and what starts at boot.
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

# An environment that holds what the requirements say is kept: a change of the service alone is a matter of seconds.
make_environment() {
    wanted=$(sha256sum < "$UPLOADS/service/requirements.txt")
    [ "$(cat "$HOME_OF_ALL/venv/requirements.sha256" 2>/dev/null)" = "$wanted" ] && return 0
    rm -rf "$HOME_OF_ALL/venv"
    python3 -m venv "$HOME_OF_ALL/venv"
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$HOME_OF_ALL/venv/bin/pip" install --quiet --no-cache-dir \
        --disable-pip-version-check --no-compile --require-hashes --no-deps --only-binary :all: \
        -r "$UPLOADS/service/requirements.txt"
    find "$HOME_OF_ALL/venv" -path '*/gpt4all/*' -name '*cuda*' -delete # for graphics cards: 9 tenths of its size
    "$HOME_OF_ALL/venv/bin/pip" uninstall --quiet --yes pip
    "$HOME_OF_ALL/venv/bin/python" -m compileall -q "$HOME_OF_ALL/venv/lib"
    echo "$wanted" > "$HOME_OF_ALL/venv/requirements.sha256"
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
        mini-llm-monitoring.service mini-llm-certificate.service mini-llm-report.socket
}

list_packages() {
    dpkg-query --show --showformat '${Package} ${Version}\n' > /usr/share/mini-llm/packages.txt
}

copy_rootfs
make_environment
copy_service
write_settings
record_golden_answer
enable_units
list_packages
