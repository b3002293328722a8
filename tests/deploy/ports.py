"""Ports for servers that tests start as processes of their own."""

import socket

RESERVED = []  # sockets


def free_port():
    """A port that nobody else gets while this process lives, but for a server that listens on it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    RESERVED.append(reserved)
    return reserved.getsockname()[1]
