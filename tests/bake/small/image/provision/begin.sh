#!/bin/sh
# Before the layers: a stand-in needs nothing.
set -eu

[ -d "$UPLOADS/provision" ]
