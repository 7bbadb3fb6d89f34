#!/bin/sh
# Layer model: only what the model would be; the stand-in has its one answer from the same file.
set -eu

install -D -m 0644 "$UPLOADS/service/starter/starter.json" /opt/stand-in/starter.json
