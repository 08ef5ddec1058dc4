"""An address → a connection to a Ray cluster while a block lasts; `local` is one of this machine alone."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterator

from edge_runtime.errors import BackendUnavailable, MessageError

LOCAL = "local"
CONNECT_S = 5.0
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's variable for systems whose firewall asks: "0" opens every port on 127.0.0.1 alone. Read at its import."""
REPORTS = "RAY_USAGE_STATS_ENABLED"
"""Whether a cluster that we start tells Ray's makers of its use."""
BACKEND_LOG = "RAY_BACKEND_LOG_LEVEL"
"""What Ray prints into this process's stderr: a node that dies is no error here."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster while the block lasts; one that was started here ends with it.

    Parameters
    ----------
    address : `local`, `auto` for the cluster that this machine belongs to, or HOST:PORT of a cluster's head.

    Raises
    ------
    MessageError
        When this is no address.
    BackendUnavailable
        When Ray is not installed, or the cluster cannot be reached.
    """
    if importlib.util.find_spec("ray") is None:
        raise BackendUnavailable("--ray needs Ray, which is not installed; run: pip install 'edge-runtime[ray]'")
    if address.startswith("ray://"):
        raise MessageError(
            f"{address} is an address of Ray's client; expected HOST:PORT of the cluster's head, on a machine that "
            "has joined it with 'ray start --address HOST:PORT'."
        )
    host, _, port = address.rpartition(":")
    if address not in (LOCAL, "auto") and not (host and port.isascii() and port.isdigit()):
        raise MessageError(f"--ray was given {address!r}; expected local, auto or HOST:PORT of a cluster's head.")
    if address == LOCAL:
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    os.environ.setdefault(REPORTS, "0")
    os.environ.setdefault(BACKEND_LOG, "fatal")
    import ray

    try:
        if host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        if address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendUnavailable(
            f"No Ray cluster answers at {address}: {reason}; start one with 'ray start --head', let this machine "
            "join it with 'ray start --address HOST:PORT', or use --ray local."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
