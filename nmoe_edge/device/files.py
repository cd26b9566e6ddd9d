"""The files that a device serves from: its bundle, fleet.toml and its key.

Reads and checks them, notices when they change, and reads them again while the device serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nmoe_edge.common.folders import file_stamps
from nmoe_edge.common.log import Log
from nmoe_edge.device.membership import Membership, find_membership
from nmoe_edge.device.rules import ResolvedRules, Rules
from nmoe_edge.errors import BundleError, EdgeError, FleetError
from nmoe_edge.models import Models, open_bundle


@dataclass(frozen=True, slots=True)
class Served:
    """What was read from the files, checked and ready to serve."""

    models: Models
    rules: ResolvedRules
    membership: Membership


class ServedFiles:
    """The bundle's folder, fleet.toml and the key file of one device."""

    def __init__(
        self,
        folder: Path | str,
        fleet_file: Path | str | None,
        key: Path | str | None,
        rules: Rules,
        *,
        provider: str,
        threads: int,
        force: bool,
        log: Log,
    ) -> None:
        """The arguments are those of Node."""
        self.folder = Path(folder)
        self.fleet_file = None if fleet_file is None else Path(fleet_file)
        self.threads = threads
        self._key = None if key is None else Path(key)
        self._rules = rules
        self._provider = provider
        self._force = force
        self._log = log
        self._read_stamp = self._seen_stamp = file_stamps(self.folder, self.fleet_file)

    def read(self) -> Served:
        """Read and check everything, and replay the bundle's self-test. An EdgeError says what does not fit."""
        models = open_bundle(self.folder, self.threads, self._provider, self._force, self._log_failed_selftest)
        rules = self._rules.resolve(models.manifest)
        membership = find_membership(self.fleet_file, models.manifest, self._key)
        return Served(models, rules, membership)

    def read_again(self, device: str, has_keys: bool) -> Served:
        """Like `read`, for a device that serves already; an EdgeError also for a change that needs a restart.

        device: its name; has_keys: whether it was started with keys.
        """
        served = self.read()
        if served.models.manifest.device != device:
            raise BundleError(
                f"{self.folder} is now the bundle of {served.models.manifest.device}; that needs a restart"
            )
        if (served.membership.keys is not None) != has_keys:
            raise FleetError(f"{self.fleet_file}: keys were added or removed; that needs a restart")
        return served

    def changed(self) -> bool:
        """Whether the files have changed since this last said so, or since the start.

        True only if two calls in a row see the same files, so that a copy in progress is not read.
        """
        stamp = file_stamps(self.folder, self.fleet_file)
        is_stable = stamp == self._seen_stamp
        self._seen_stamp = stamp
        if stamp == self._read_stamp or not is_stable:
            return False
        self._read_stamp = stamp
        return True

    def _log_failed_selftest(self, text: str) -> None:
        self._log("selftest_failed", text)


class Reloader:
    """Reads the files again in a thread of its own, one reload at a time."""

    def __init__(
        self,
        read: Callable[[], Served],
        accepted: Callable[[Served], None],
        refused: Callable[[str], None],
        ended: threading.Event,
    ) -> None:
        """read: reads and checks, or raises an EdgeError. accepted or refused is then called, in the same thread.

        ended: once it is set, nothing is read any more.
        """
        self._read = read
        self._accepted = accepted
        self._refused = refused
        self._ended = ended
        self._wanted = threading.Event()
        self._lock = threading.Lock()

    def request(self) -> None:
        """Start a reload and return at once. Requests made before it begins share one reload."""
        self._wanted.set()
        threading.Thread(target=self._run, name="reload", daemon=True).start()

    def _run(self) -> None:
        with self._lock:
            if not self._wanted.is_set() or self._ended.is_set():
                return
            self._wanted.clear()
            try:
                served = self._read()
            except EdgeError as error:
                self._refused(str(error))
            else:
                self._accepted(served)
