"""Owns the HTTP API of the local cloud, compatible with that of the Hetzner Cloud."""
