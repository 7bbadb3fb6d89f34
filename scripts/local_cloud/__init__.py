"""A Hetzner-compatible cloud on one's own machine: the API on loopback, with real Debian servers behind it."""
