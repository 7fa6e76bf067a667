"""The mesh's root is replaced while connections are made all the time."""

from mesh import Churn, mtls_connect, rotate_root_under


def chains_to(port, root, identity):
    """Whether what the public listener shows chains to this root alone, as a peer with new roots only would check."""
    with mtls_connect(port, root, identity) as conn:
        return conn.ask(b"hello") == b"hello"


def test_a_new_root_under_load(own_mesh):
    mesh = own_mesh()
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    old_identity = mesh.agent.leaf(mesh.name("old"))
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        load = Churn(client)
        failures = rotate_root_under(load, mesh, lambda root, identity: chains_to(server.public, root, identity), more=20)
        assert failures == [] and load.made > 50
        assert untouched.ask(b"after") == b"after"
    # The old roots are listed for as long as leaves of theirs may be about.
    assert chains_to(server.public, mesh.agent.roots(), old_identity)
