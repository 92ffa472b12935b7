"""A port for those that cannot take port 0 and say what they got."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One below those that the system hands out by itself, so that nobody gets it until it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
