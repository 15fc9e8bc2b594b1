"""Addresses that a download may connect to: public ones, judged by the address that a socket is opened to, not by a name."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


class AddressRefused(OSError):
    """A host is, or resolves to, an address that is not public."""


def refusal(address: str) -> str | None:
    """Why ``address`` must not be connected to, or None: it is public.

    Loopback, private, link-local (the metadata services of clouds are there), shared, multicast, reserved and unspecified addresses are refused, also where an
    IPv6 address carries them: mapped, compatible, 6to4, Teredo, NAT64.

    Args:
        address: IPv4 or IPv6 as a resolver writes it, with or without a zone.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return f"{address} is not an address"
    carried = _carried(parsed)
    # A translator's own prefix is reserved; networks without IPv4 reach every IPv4 host by it.
    for candidate in carried if parsed in _TRANSLATED else (parsed, *carried):
        if not candidate.is_global or candidate.is_multicast or candidate.is_reserved or candidate.is_unspecified or candidate.is_loopback:
            return f"{address} is not a public address"
        if isinstance(candidate, ipaddress.IPv6Address) and candidate.is_site_local:
            return f"{address} is not a public address"
    return None


def open_socket(info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
    """A socket for the address that is about to be connected to. No name is resolved after this: it is the last word, whoever resolved it.

    Raises:
        AddressRefused: the address is not public.
    """
    family, kind, protocol, _, address = info
    if reason := refusal(str(address[0])):
        raise AddressRefused(reason)
    return socket.socket(family, kind, protocol)


def _carried(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _TRANSLATED or int(address) >> 32 == 0:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [inner for inner in found if inner is not None]
