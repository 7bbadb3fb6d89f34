#!/bin/sh
# The usual way to a model on a rented server, as somebody types it: packages, Docker, a virtual environment, pip, start.
# Runs as root in the folder that was copied there; prints what each step took. Argument: the model's file.
#
# Kinder than reality: nothing is typed, looked up or got wrong; packages come from a near mirror; the model is copied by
# who measures instead of being downloaded; Docker is installed but no image fetched; there is no name, TLS, key or limit.
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
        venv/bin/uvicorn app:app --host 0.0.0.0 --port 8000
}

step() {
    begun_ms=$(date +%s%3N)
    "$1"
    echo "$1 $(($(date +%s%3N) - begun_ms))"
}

MODEL=$1
step install_packages
step install_requirements
step start_service
