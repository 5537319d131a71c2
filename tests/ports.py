"""Ports for the processes that tests start, which must know their address before they listen."""

from __future__ import annotations

import random
import socket

PORTS = range(20000, 30000)
"""Below the ports that systems give to whoever asks for any, and to outgoing connections: nobody gets one of these by
chance between the moment it is found free and the moment its process listens."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens at; two tests that run at a time hardly get the same one."""
    system = random.SystemRandom()
    for _ in range(100):
        port = system.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port of {PORTS} is free at {host}")
