"""Announces this device by mDNS and finds its peers. The only importer of zeroconf, which comes with an extra.

Only addresses are used, and only for devices that fleet.toml names. A device's key proves who it is, not mDNS.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import ifaddr
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

_TYPE = "_nmoe._tcp.local."
_QUERY_MS = 1000


class Discovery:
    """Announces one device and reports the addresses of others until it is closed."""

    def __init__(self, device: str, trunk: str, listening: str, discovered: Callable[[str, str], None]) -> None:
        """listening: where the device listens, tcp://HOST:PORT.

        discovered: called with the name and the address of another device with this trunk, in a thread of zeroconf.
        """
        host, _, port = listening.removeprefix("tcp://").rpartition(":")
        is_local = host.startswith("127.")
        self._zeroconf = Zeroconf(interfaces=["127.0.0.1"] if is_local else InterfaceChoice.All)
        addresses = ["127.0.0.1"] if is_local else _own_addresses()
        info = ServiceInfo(
            _TYPE,
            f"{device}.{_TYPE}",
            port=int(port),
            addresses=[ipaddress.ip_address(address).packed for address in addresses],
            properties={"trunk": trunk},
            server=f"{device}-nmoe.local.",
        )
        self._zeroconf.register_service(info, allow_name_change=False, cooperating_responders=True)
        self._browser = ServiceBrowser(self._zeroconf, _TYPE, listener=_Listener(device, trunk, discovered))

    def close(self) -> None:
        """Withdraw the announcement and stop."""
        self._zeroconf.close()


def _own_addresses() -> list[str]:
    """The IPv4 addresses under which other machines reach this one."""
    every = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    return [address for address in every if isinstance(address, str) and not address.startswith("127.")]


class _Listener(ServiceListener):
    """Receives what zeroconf finds."""

    def __init__(self, device: str, trunk: str, discovered: Callable[[str, str], None]) -> None:
        self._device = device
        self._trunk = trunk
        self._discovered = discovered

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        info = zc.get_service_info(type_, name, _QUERY_MS)
        device = name.removesuffix(f".{_TYPE}")
        if info is None or device == self._device or info.properties.get(b"trunk") != self._trunk.encode():
            return
        for address in info.parsed_addresses()[:1]:
            host = f"[{address}]" if ":" in address else address
            self._discovered(device, f"tcp://{host}:{info.port}")

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Ignored: a peer that has gone is found to be silent."""
