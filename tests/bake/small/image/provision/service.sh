#!/bin/sh
# Layer service: the stand-in, started at boot, and what was baked.
set -eu

install -m 0644 "$UPLOADS"/service/stand_in_node.py /opt/stand-in/
if [ -e "$UPLOADS/service/misbehave" ]; then
    install -m 0644 "$UPLOADS/service/misbehave" /opt/stand-in/
fi
cp -R --no-preserve=ownership "$UPLOADS/rootfs/." /
systemctl enable --quiet stand-in-node.service
python3 /opt/stand-in/stand_in_node.py describe "$IMAGE_VERSION" > /usr/share/mini-llm/image.json
