"""Waits that poll and have a bound."""

import http.client
import time

# Long enough for a busy machine, short enough to notice. Scenarios give their own where the bound is what they are about.
TEST_TIMEOUT = 20.0


class NotInTime(AssertionError):
    """A condition did not hold within its bound."""


def eventually(condition, within=TEST_TIMEOUT, what=None, every=0.02):
    """Calls `condition` until it is true, and returns what it returned.

    A condition that raises `OSError`, `AssertionError` or `HTTPException` (an answer that is cut, as by a deny that comes meanwhile) counts
    as not yet true; the last such error is in the message.
    """
    deadline = time.monotonic() + within
    while True:
        last = None
        try:
            if value := condition():
                return value
        except (OSError, AssertionError, http.client.HTTPException) as error:
            last = error
        if time.monotonic() > deadline:
            raise NotInTime(f"not within {within:g} s: {what or condition.__name__}" + (f" ({last!r})" if last else ""))
        time.sleep(every)


def stays(condition, during, what=None, every=0.05):
    """Asserts that `condition` is true now and at every look for `during` seconds."""
    deadline = time.monotonic() + during
    while True:
        assert condition(), f"did not stay so: {what or condition.__name__}"
        if time.monotonic() > deadline:
            return
        time.sleep(every)
