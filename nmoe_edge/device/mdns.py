"""Where the devices of a fleet are at present, by mDNS. The only importer of zeroconf, which comes with an extra.

Nothing but addresses is taken from it, and only for devices that fleet.toml names: who a device is, its key says.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import ifaddr
from zeroconf import InterfaceChoice, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

_TYPE = "_nmoe._tcp.local."
_ANSWER_MS = 1000


class Discovery:
    """Says where this device is, and hears where others are."""

    def __init__(self, device: str, trunk: str, listening: str, found: Callable[[str, str], None]) -> None:
        """listening: tcp://HOST:PORT; found: told a device's name and address, in a thread of zeroconf's."""
        host, _, port = listening.removeprefix("tcp://").rpartition(":")
        alone = host.startswith("127.")
        self._zeroconf = Zeroconf(interfaces=["127.0.0.1"] if alone else InterfaceChoice.All)
        addresses = ["127.0.0.1"] if alone else _addresses()
        info = ServiceInfo(
            _TYPE,
            f"{device}.{_TYPE}",
            port=int(port),
            addresses=[ipaddress.ip_address(address).packed for address in addresses],
            properties={"trunk": trunk},
            server=f"{device}-nmoe.local.",
        )
        self._zeroconf.register_service(info, allow_name_change=False, cooperating_responders=True)
        self._browser = ServiceBrowser(self._zeroconf, _TYPE, listener=_Listener(device, trunk, found))

    def close(self) -> None:
        """Say goodbye."""
        self._zeroconf.close()


def _addresses() -> list[str]:
    """Where this machine is reached from others."""
    every = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips]
    return [address for address in every if isinstance(address, str) and not address.startswith("127.")]


class _Listener(ServiceListener):
    """What zeroconf tells."""

    def __init__(self, device: str, trunk: str, found: Callable[[str, str], None]) -> None:
        self._device, self._trunk, self._found = device, trunk, found

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Somebody is there."""
        info = zc.get_service_info(type_, name, _ANSWER_MS)
        device = name.removesuffix(f".{_TYPE}")
        if info is None or device == self._device or info.properties.get(b"trunk") != self._trunk.encode():
            return
        for address in info.parsed_addresses():
            self._found(device, f"tcp://[{address}]:{info.port}" if ":" in address else f"tcp://{address}:{info.port}")
            return

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """It has moved."""
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """It has gone: its silence will say so."""
