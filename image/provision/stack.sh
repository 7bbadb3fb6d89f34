#!/bin/sh
# Layer stack: the container images, fetched by digest and known to the compose file by local tags alone, and the engine
# with all that the service runs on, in an environment of its own.
set -eu

# Docker checks that what it fetched is what the digest says.
fetch_image() {
    docker pull --quiet "$2" || exit 75 # try again later: the registry did not answer
    docker tag "$2" "mini-llm/$1:baked"
}

# For the node's report.
list_containers() {
    install -d -m 0755 /usr/share/mini-llm
    printf '%s\n' "$CONTAINERS" > /usr/share/mini-llm/containers.json
}

make_environment() {
    venv=/opt/mini-llm/venv
    rm -rf "$venv"
    python3 -m venv "$venv"
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$venv/bin/pip" install --quiet --no-cache-dir \
        --disable-pip-version-check --no-compile --require-hashes --no-deps --only-binary :all: \
        -r "$UPLOADS/service/requirements.txt" || exit 75 # try again later: the index did not answer
    find "$venv" -path '*/gpt4all/*' -name '*cuda*' -delete # for graphics cards: 9 tenths of its size
    "$venv/bin/pip" uninstall --quiet --yes pip
    "$venv/bin/python" -m compileall -q "$venv/lib"
    sha256sum < "$UPLOADS/service/requirements.txt" > "$venv/requirements.sha256"
}

make_environment
list_containers
for pin in $IMAGES; do
    fetch_image "${pin%%=*}" "${pin#*=}"
done
