#!/bin/sh
# Layer base: Debian as it is; nothing is fetched, so that a bake takes seconds and needs nobody.
set -eu

install -d -m 0755 /usr/share/mini-llm
dpkg-query --show --showformat '${Package} ${Version}\n' > /usr/share/mini-llm/packages.txt
