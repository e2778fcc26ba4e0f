"""The address of a server, taken before anything heavy is imported."""

from __future__ import annotations

import socket

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        OSError: says which address cannot be listened on, and why.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host}, port {port}: {cause}; choose others with --host, --port") from error
