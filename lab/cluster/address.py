"""Whether a Ray cluster can be joined at all, found out in a moment and without importing anything of weight."""

from __future__ import annotations

import socket
from importlib.util import find_spec

from lab.errors import UserError

LOCAL = "local"
CONNECT_SECONDS = 5


def require_reachable(address: str) -> None:
    """Refuse an address that leads nowhere: Ray itself would try for minutes, and then end the process.

    Args:
        address: `local` for a cluster of one's own; else what `ray.init` takes: `HOST:PORT`, `ray://HOST:PORT`, `auto`.

    Raises:
        UserError: Ray is not installed, that is no address, or nobody answers there.
    """
    if find_spec("ray") is None:
        raise UserError("--ray needs Ray, which is not installed; install it with pip install 'dl-findings[ray]'")
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise UserError(f"{address!r} is no address of a Ray cluster; give HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start one there with ray start --head"
        ) from error
