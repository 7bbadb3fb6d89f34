#!/bin/sh
# Layer stack: what the containers would be, for the node's report.
set -eu

printf '%s\n' "$CONTAINERS" > /usr/share/mini-llm/containers.json
