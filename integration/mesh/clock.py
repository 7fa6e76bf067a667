"""A clock of its own for one program, which libfaketime sets: the system's and everybody else's stays as it is."""

import pathlib

import pytest

LIBRARY = pathlib.Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class Clock:
    """`env` is for the program that is to have it. `set` moves its clock while it runs; timers go on as they did."""

    def __init__(self, directory, offset="+0"):
        if not LIBRARY.exists():
            pytest.skip("SKIPPED because libfaketime, which moves a sidecar's clock, is not installed (apt-get install libfaketime)")
        self._file = directory / f"clock-{id(self)}"
        self.set(offset)
        self.env = {
            "LD_PRELOAD": LIBRARY, "FAKETIME_TIMESTAMP_FILE": self._file, "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset):
        """Moves the clock by as much as `offset` says: +8d, -1h."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset}\n")
        new.rename(self._file)
