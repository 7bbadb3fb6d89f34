#!/bin/sh
# The usual way to a model on a rented server, as somebody types it: packages, Docker, a virtual environment, pip, start,
# and Traefik with a certificate before it, Prometheus and Grafana beside it.
# Runs as root in the folder that was copied there; prints what each step took. Argument: the model's file.
#
# Kinder than reality: nothing is typed, looked up or got wrong; packages and images come from next door, Grafana's place is
# taken by a stand-in of some MB; the model is copied by who measures instead of being downloaded; there is no key, limit,
# dashboard or alert; the name leads there already.
set -eu

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq -y -o Dpkg::Use-Pty=0 install curl docker-cli docker-compose docker.io git python3-venv >/dev/null 2>&1
}

install_requirements() {
    python3 -m venv venv
    venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
}

start_service() {
    systemd-run --quiet --unit=usual-way --working-directory="$PWD" --setenv=MODEL="$MODEL" \
        venv/bin/uvicorn app:app --host 127.0.0.1 --port 8000
}

pull_images() {
    docker compose --progress quiet pull
}

start_containers() {
    docker compose --progress quiet up --detach
}

step() {
    begun_ms=$(date +%s%3N)
    "$1" >&2
    echo "$1 $(($(date +%s%3N) - begun_ms))"
}

MODEL=$1
step install_packages
step install_requirements
step start_service
step pull_images
step start_containers
