"""Owns the machines of the local cloud: Debian servers as system containers of this host."""
