#!/bin/sh
# Layer stack: the container images, fetched by digest and known to the compose file by local tags alone.
set -eu

# Docker checks that what it fetched is what the digest says.
fetch_image() {
    docker pull --quiet "$2"
    docker tag "$2" "mini-llm/$1:baked"
}

for pin in $IMAGES; do
    fetch_image "${pin%%=*}" "${pin#*=}"
done
