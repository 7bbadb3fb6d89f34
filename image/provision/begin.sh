#!/bin/sh
# Before the layers: what every layer needs while it is made, and seal.sh takes away again.
set -eu

# A network that inspects TLS has an authority of its own.
trust_extra_authority() {
    [ -n "$EXTRA_CA" ] || return 0
    install -D -m 0644 "$EXTRA_CA" /usr/local/share/ca-certificates/bake.crt
    update-ca-certificates >/dev/null 2>&1
}

# Packages ask the presets which of their units to enable.
enable_what_is_installed() {
    rm -f /etc/systemd/system-preset/00-mini-llm.preset
}

trust_extra_authority
enable_what_is_installed
