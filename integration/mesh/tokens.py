"""JSON Web Tokens, good ones and all kinds of bad ones."""

import base64
import hashlib
import hmac
import json
import time

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

ISSUER, AUDIENCE = "https://issuer.example", "shop"
HOUR = 3600


def b64(data):
    return base64.urlsafe_b64encode(data if isinstance(data, bytes) else json.dumps(data).encode()).rstrip(b"=").decode()


class Issuer:
    """Signs tokens with an RSA key that its key set names `main`."""

    def __init__(self):
        self._key = rsa.generate_private_key(65537, 2048)
        self._stranger = rsa.generate_private_key(65537, 2048)

    def key_set(self):
        numbers = self._key.public_key().public_numbers()
        n, e = (b64(number.to_bytes((number.bit_length() + 7) // 8, "big")) for number in (numbers.n, numbers.e))
        return {"keys": [{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "main", "n": n, "e": e}]}

    def key_set_base64(self):
        return base64.b64encode(json.dumps(self.key_set()).encode()).decode()

    def sign(self, claims, header=None, key=None):
        header = {"alg": "RS256", "kid": "main", "typ": "JWT", **(header or {})}
        signed = f"{b64(header)}.{b64(claims)}"
        return f"{signed}.{b64((key or self._key).sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    def token(self, kind):
        """A token of a kind that rules speak of."""
        now = int(time.time())
        good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "somebody", "iat": now, "exp": now + HOUR, "role": "user",
                "groups": ["staff", "buyers"], "org": {"unit": "sales"}}
        if kind == "valid":
            return self.sign(good)
        if kind == "admin":
            return self.sign({**good, "role": "admin"})
        if kind == "expired":
            return self.sign({**good, "exp": now - HOUR})
        if kind == "early":
            return self.sign({**good, "nbf": now + HOUR})
        if kind == "other-audience":
            return self.sign({**good, "aud": ["bank", "post"]})
        if kind == "several-audiences":
            return self.sign({**good, "aud": ["bank", AUDIENCE]})
        if kind == "other-issuer":
            return self.sign({**good, "iss": ISSUER + ".evil"})
        if kind == "unknown-key":
            return self.sign(good, {"kid": "other"}, self._stranger)
        if kind == "strangers-key":
            return self.sign(good, key=self._stranger)
        if kind == "changed":
            head, _, signature = self.sign(good).split(".")
            return f"{head}.{b64({**good, 'role': 'admin'})}.{signature}"
        if kind == "alg-none":
            return f"{b64({'alg': 'none', 'kid': 'main'})}.{b64(good)}."
        if kind == "hs256-of-the-public-key":
            secret = self._key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            signed = f"{b64({'alg': 'HS256', 'kid': 'main'})}.{b64(good)}"
            return f"{signed}.{b64(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"
        if kind == "rubbish":
            return "not.a.token"
        raise ValueError(kind)
