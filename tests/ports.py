"""Owns which TCP port a test's own server listens at: one that no other test of this machine is given meanwhile."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Below the kernel's range for outgoing connections, of which one may take a port between its choice and its use.
_PORTS = range(20000, 32768)
_LAST = Path(tempfile.gettempdir()) / f"mini-llm-tests-port-{os.getuid()}"


def free_port() -> int:
    """One that nobody listens at on any address; some ten thousand calls pass before it is given again."""
    with _LAST.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        port = int(file.read() or random.choice(_PORTS))
        for _ in _PORTS:
            port = port + 1 if port + 1 in _PORTS else _PORTS.start
            try:
                socket.create_server(("", port)).close()
            except OSError:
                continue
            file.truncate(0)
            file.write(str(port))
            return port
    raise AssertionError("no port is free")
