#!/bin/sh
# Layer model: the one GGUF file that the image serves, whole and verified, at /opt/mini-llm/models.
set -eu

cd "$UPLOADS"
python3 provision/place_model.py "$MODEL" "$MODEL_NAME" /opt/mini-llm/models
