"""Certificates: those that the agent issues, those that a foreign or a known authority issues, and TLS with them."""

import datetime
import socket
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .apps import Conn, Echo
from .wait import TEST_TIMEOUT

DAY = datetime.timedelta(days=1)


class Identity:
    """A certificate (with what chains it to its root) and its key, as PEM."""

    def __init__(self, cert_pem, key_pem):
        self.cert_pem, self.key_pem = cert_pem, key_pem

    @property
    def uri(self):
        names = x509.load_pem_x509_certificate(self.cert_pem.encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return names.value.get_values_for_type(x509.UniformResourceIdentifier)[0]

    def load_into(self, context):
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(f"{self.cert_pem.strip()}\n{self.key_pem}")
            file.flush()
            context.load_cert_chain(file.name)


class Authority:
    """A certificate authority whose key the scenario holds; with a trust domain it can be the mesh's own root."""

    def __init__(self, trust_domain, name="Scenario CA", key=None, extensions=(), by=None):
        """`extensions` are more of them, each with whether it is critical. With `by` it is an authority below another."""
        self._key, self._domain = key or ec.generate_private_key(ec.SECP256R1()), trust_domain
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = by or self
        builder = (
            issuer._builder(self._name, self._key.public_key(), -DAY, 3650 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(key_usage(key_cert_sign=True, crl_sign=True, digital_signature=True), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        self._cert = issuer._sign(builder)
        self.cert_pem, self.key_pem = pem(self._cert), pem_key(self._key)
        # The intermediate certificates of its leaves.
        self.chain_pem = self.cert_pem + by.chain_pem if by else ""

    def below(self, name, key=None, extensions=()):
        """An authority that this one signs for."""
        return Authority(self._domain, name, key, extensions, by=self)

    def issue(self, *uris, starts=-DAY, ends=DAY, purposes=("client", "server"), key="ec", dns=()):
        """A leaf with these URIs (and DNS names), valid from now + `starts` to now + `ends`."""
        key = ec.generate_private_key(ec.SECP256R1()) if key == "ec" else rsa.generate_private_key(65537, 2048)
        usages = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
        names = [x509.UniformResourceIdentifier(uri) for uri in uris] + [x509.DNSName(name) for name in dns]
        builder = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")]), key.public_key(), starts, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(digital_signature=True, key_encipherment=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usages[purpose] for purpose in purposes]), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return Identity(pem(self._sign(builder)) + self.chain_pem, pem_key(key))

    def _sign(self, builder):
        return builder.sign(self._key, None if isinstance(self._key, ed25519.Ed25519PrivateKey) else hashes.SHA256())

    def _builder(self, subject, public_key, starts, ends):
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
            .serial_number(x509.random_serial_number()).not_valid_before(now + starts).not_valid_after(now + ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def key_usage(**set_true):
    every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: set_true.get(name, False) for name in every})


def pem(cert):
    return cert.public_bytes(serialization.Encoding.PEM).decode()


def pem_key(key):
    return key.private_bytes(serialization.Encoding.PEM, private_format(key), serialization.NoEncryption()).decode()


def private_format(key):
    is_ed25519 = isinstance(key, ed25519.Ed25519PrivateKey)
    return serialization.PrivateFormat.PKCS8 if is_ed25519 else serialization.PrivateFormat.TraditionalOpenSSL


def client_context(trust, identity=None, version=None):
    """A TLS client that checks the chain to `trust` (PEM), and shows `identity` when it has one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=trust)
    if identity:
        identity.load_into(context)
    if version:
        context.minimum_version = context.maximum_version = version
    return context


def mtls_connect(port, trust, identity=None, sni=None, version=None, context=None, session=None, within=TEST_TIMEOUT):
    """A TLS connection to a public listener. What the server refuses under TLS 1.3 shows only at the first read."""
    context = context or client_context(trust, identity, version)
    raw = socket.create_connection(("127.0.0.1", port), within)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        return Conn(context.wrap_socket(raw, server_hostname=sni, session=session), within)
    except BaseException:
        raw.close()
        raise


def server_context(trust, identity, alpn=()):
    """A TLS server that requires a certificate, as a public listener does, and agrees on one of these protocols."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=trust)
    identity.load_into(context)
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


class mtls_server(Echo):
    """A sidecar that the scenario plays: requires a client certificate, then echoes after its greeting.

    `failures` has the TLS errors, `server_names` the SNI of each handshake, `ran` counts those that completed.
    """

    def __init__(self, port, trust, identity, greeting=b"", version=None):
        self._context = server_context(trust, identity)
        if version:
            self._context.minimum_version = self._context.maximum_version = version
        self._context.sni_callback = lambda sock, name, context: self.server_names.append(name)
        self.failures, self.server_names, self.received, self.ran, self.resumed = [], [], b"", 0, 0
        super().__init__(port, greeting)

    def serve(self, conn):
        try:
            secure = self._context.wrap_socket(conn.sock, server_side=True)
        except (ssl.SSLError, OSError) as error:
            self.failures.append(error)
            return
        self.ran += 1
        self.resumed += bool(secure.session_reused)
        try:
            if self.greeting:
                secure.sendall(self.greeting)
            while data := secure.recv(65536):
                self.received += data
                secure.sendall(data)
            self.ends.append("fin")
            secure.unwrap()
        except OSError:
            self.ends.append("reset")
        finally:
            secure.close()
