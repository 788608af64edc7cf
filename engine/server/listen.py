"""The listening socket, bound before any weight is read: a taken address is known in the first second."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from ...plugins.errors import PortInUseError, UsageError
from .args import ServerArgs

BACKLOG = 2048


@contextlib.contextmanager
def listening(args: ServerArgs) -> Iterator[socket.socket]:
    """`bind`, and what it made is gone at the end: of a Unix socket, the file too, unless it is another's now."""
    with bind(args) as sock:
        path = None if args.uds is None else Path(args.uds)
        ours = None if path is None else path.stat()
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path is not None and ours is not None and os.path.samestat(ours, path.stat()):
                    path.unlink()


def bind(args: ServerArgs) -> socket.socket:
    """A listening socket for `args`. Raises PortInUseError (naming the owner) or UsageError."""
    sock = _bind_path(Path(args.uds)) if args.uds is not None else _bind_port(args.host, args.port)
    # Listening is what claims the address: with SO_REUSEADDR two sockets may be bound to one port.
    try:
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise _refusal(args, exc) from None
    return sock


def url(args: ServerArgs, sock: socket.socket) -> str:
    """Where clients reach the socket."""
    if args.uds is not None:
        return f"unix:{args.uds}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind_port(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as exc:
        raise UsageError(f"cannot listen on host {host!r}, port {port}", found=exc) from None
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except (OSError, OverflowError) as exc:
        sock.close()
        raise _refusal(ServerArgs(host=host, port=port), exc) from None
    return sock


def _bind_path(path: Path) -> socket.socket:
    """A Unix socket only its owner may open; a socket left by a dead server is replaced, no other file."""
    if os.path.lexists(path) and not path.is_socket():
        raise UsageError(
            f"cannot listen on {path}: it is not a socket",
            found="a folder" if path.is_dir() else "a file",
            fix="choose another --uds, or move what is there",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            if sock.connect_ex(str(path)) == 0:
                raise OSError(errno.EADDRINUSE, "another process listens on it")
            path.unlink()
            sock.close()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        path.chmod(0o600)
    except OSError as exc:
        sock.close()
        raise _refusal(ServerArgs(uds=str(path)), exc) from None
    return sock


def _refusal(args: ServerArgs, exc: Exception) -> UsageError | PortInUseError:
    where = args.uds if args.uds is not None else f"{args.host}:{args.port}"
    if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"{where} is taken",
            found=_owner(args.port) if args.uds is None else None,
            fix=f"stop that process, or choose another --{'port' if args.uds is None else 'uds'}",
        )
    return UsageError(f"cannot listen on {where}", found=exc)


def _owner(port: int) -> str | None:
    """The process that listens on a TCP port, where the system lets us see it."""
    try:
        connections = psutil.net_connections(kind="tcp")
        pids = {
            c.pid for c in connections if c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN
        }
        pid = next((pid for pid in pids if pid is not None), None)
        return None if pid is None else f"pid {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return None
