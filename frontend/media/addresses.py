"""Which hosts and addresses a request may have this server connect to: public ones, and those that the operator lists.

A name says nothing about where it leads, so the decision falls on the addresses it resolves to. Forms that hide an IPv4
address inside an IPv6 one are refused as such instead of being taken apart.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from shared.errors import BadConfig

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.(?!-)[a-z0-9_-]{1,63})*\.?", re.ASCII)
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+", re.ASCII)

# Cloud providers' instance metadata at addresses that are public by number; the others are link-local or private.
_METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})
_REFUSED_V4 = tuple(ipaddress.ip_network(n) for n in ("192.88.99.0/24", "192.0.0.0/24", "100.64.0.0/10"))
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # NAT64 (64:ff9b::), mapped (::ffff:) and compatible (::) lie outside
# Teredo and other protocol assignments, documentation, 6to4.
_REFUSED_V6 = tuple(ipaddress.ip_network(n) for n in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})  # bits 32..63 of an address that ends in an IPv4 one (RFC 5214)


class ForbiddenHost(Exception):
    """A host that requests may not have this server connect to; `fetch` turns it into a 400."""


@dataclass(frozen=True)
class Allowed:
    """Args:
    is_public_allowed: public addresses, on the scheme's own port.
    names: hosts that may be anywhere.
    networks: addresses that may be used though they are private.
    """

    is_public_allowed: bool
    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @property
    def is_nothing(self) -> bool:
        return not (self.is_public_allowed or self.names or self.networks)

    def check(self, host: str, addresses: Iterable[str], is_usual_port: bool) -> str:
        """The one address to connect to, given all that `host` resolved to.

        One that is forbidden refuses them all: a name that leads to both kinds is no accident.

        Raises:
            ForbiddenHost: an address may not be used, or there is none.
        """
        found = [ipaddress.ip_address(a) for a in addresses]
        if not found:
            raise ForbiddenHost("the host has no address")
        if host not in self.names:
            for address in found:
                is_listed = any(address in network for network in self.networks)
                if not is_listed and not (self.is_public_allowed and is_usual_port and is_public(address)):
                    raise ForbiddenHost("the host or its port is not one that this server may connect to")
        return str(found[0])


def parse_allowed(is_public_allowed: bool, hosts: str) -> Allowed:
    """Args:
        hosts: comma-separated names, addresses and networks.
    Raises:
        BadConfig: an entry is none of these.
    """
    names: set[str] = set()
    networks: list[Network] = []
    for entry in (e.strip().lower() for e in hosts.split(",")):
        if not entry:
            continue
        try:
            networks.append(ipaddress.ip_network(entry))
        except ValueError as error:
            if not is_host_name(entry):
                raise BadConfig(f"TANDEM_MEDIA_HOSTS: {entry!r} is not a host, address or network") from error
            names.add(entry.rstrip("."))
    return Allowed(is_public_allowed, frozenset(names), tuple(networks))


def is_public(address: Address) -> bool:
    """Whether an address is an ordinary one of the public internet."""
    if address in _METADATA or address.is_multicast or address.is_reserved or not address.is_global:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    if address not in _GLOBAL_V6 or address.scope_id is not None or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return False
    return not any(address in network for network in _REFUSED_V6)


def is_host_name(host: str) -> bool:
    """A name in ASCII whose last label is not a number: `0x7f.1`, `2130706433` and `017700000001` are none.

    Those are IPv4 addresses to some resolvers; the one spelling that all read alike is four plain decimal numbers.
    """
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        return False
    return _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]) is None


def literal(host: str) -> str | None:
    """`host` if it is an IPv4 address in its usual spelling, or an IPv6 address without a zone."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return None if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None else str(address)
