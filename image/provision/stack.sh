#!/bin/sh
# Layer stack: the container images, fetched by digest and known to the compose file by local tags alone.
set -eu

# Docker checks that what it fetched is what the digest says.
fetch_image() {
    docker pull --quiet "$2"
    docker tag "$2" "mini-llm/$1:baked"
}

# For the node's report.
list_containers() {
    install -d -m 0755 /usr/share/mini-llm
    printf '%s\n' "$CONTAINERS" > /usr/share/mini-llm/containers.json
}

list_containers
for pin in $IMAGES; do
    fetch_image "${pin%%=*}" "${pin#*=}"
done
