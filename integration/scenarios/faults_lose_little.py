"""One of two instances fails under a load, in the ways of scripts/faults: who is in the middle of something may lose it, and nobody else."""

import pytest

import faults

# Each of the threads may be in the middle of a request when the fault begins, and again when connections that hung are reset at its end.
IN_FLIGHT = 2 * faults.THREADS
# Answers that eject an instance whose sidecar says that its app is not there.
EJECTING = 5


@pytest.mark.parametrize("protocol", ["tcp", "http", "grpc"])
@pytest.mark.parametrize("fault", [*faults.FAULTS])
def test_a_fault_of_one_instance_loses_little(mesh, fault, protocol):
    ejection = {"passive_health_check": {"base_ejection_time": "2s", "interval": "1s"}}
    pair = faults.Pair(mesh, protocol, "lictor", upstream={"Config": ejection})
    noticed = faults.watch(pair, fault, lasting=3)
    allowed = IN_FLIGHT + (EJECTING if fault == "app killed" and protocol != "tcp" else 0)
    assert noticed.failed <= allowed and noticed.requests > 4 * allowed, noticed
    assert noticed.used_again is not None and noticed.used_again < 15, noticed
