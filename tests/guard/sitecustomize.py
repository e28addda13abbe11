"""On the PYTHONPATH of the tests' kernels: a connection to anything but this machine is refused, and says so."""

import ipaddress
import socket

_connect, _connect_ex, _lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
MESSAGE = "the tests run without a network: a connection to {} was blocked; use bundled data or a local server"


def is_local(host) -> bool:
    try:
        return host in (None, "", "localhost", b"localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == socket.gethostname()


def _check(family, address):
    if family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
        raise PermissionError(MESSAGE.format(address[0]))


def connect(self, address):
    _check(self.family, address)
    return _connect(self, address)


def connect_ex(self, address):
    _check(self.family, address)
    return _connect_ex(self, address)


def getaddrinfo(host, *args, **kwargs):
    if not is_local(host) and host not in ("0.0.0.0", "::"):
        raise PermissionError(MESSAGE.format(host))
    return _lookup(host, *args, **kwargs)


socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect, connect_ex, getaddrinfo
