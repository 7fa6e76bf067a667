"""Building blocks of the scenarios: agents, sidecars, apps and identities that are real, and waits that have a bound."""

from .agent import Agent, ApiError
from .apps import Blackhole, Conn, Echo, HalfCloser, Resetter, Silent, dial
from .collector import Collector, GrpcCollector
from .envoy import Envoy
from .gate import Gate
from .identity import Authority, Identity, mtls_connect, mtls_server
from .load import Churn, rotate_root_under
from .process import Process
from .rpc import Caller, Rpc
from .service import Mesh, Service, Upstream
from .web import Answer, Browser, Web, ask, who
from .wait import eventually, stays, NotInTime

__all__ = [
    "Agent", "Answer", "ApiError", "Authority", "Blackhole", "Browser", "Caller", "Churn", "Collector", "Conn", "Echo", "Envoy", "Gate", "GrpcCollector", "HalfCloser", "Identity", "Mesh",
    "NotInTime", "Process", "Resetter", "Rpc", "Service", "Silent", "Upstream", "Web", "ask", "dial", "eventually", "mtls_connect",
    "mtls_server", "rotate_root_under", "stays", "who",
]
