# SPDX-License-Identifier: Apache-2.0
"""A provider of sign-ins on loopback: OpenID Connect and GitHub's own protocol, with switches for what goes wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey


class Provider:
    """A provider that signs everybody in as `claims` say.

    Switches: `wrong` is the name of a claim that it gets wrong, or "key" or "alg" for a wrong signature.
    """

    def __init__(self) -> None:
        self.keys = [RSAKey.generate_key(2048, {"kid": "one"})]
        self.claims: dict[str, Any] = {"sub": "person-1", "preferred_username": "Ada.Lovelace", "name": "Ada"}
        self.github: dict[str, Any] = {"id": 4711, "login": "Grace-H", "name": "Grace"}
        self.wrong = ""
        self.codes: dict[str, dict[str, str]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, value: Any, status: int = 200) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                if path == "/.well-known/openid-configuration":
                    self._answer(provider.description())
                elif path == "/keys":
                    self._answer({"keys": [key.as_dict(private=False) for key in provider.keys]})
                elif path in ("/authorize", "/login/oauth/authorize"):
                    asked = dict(urllib.parse.parse_qsl(query))
                    code = f"code-{len(provider.codes)}"
                    provider.codes[code] = asked
                    back = urllib.parse.urlencode({"code": code, "state": asked["state"]})
                    self.send_response(302)
                    self.send_header("Location", f"{asked['redirect_uri']}?{back}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif path == "/api/v3/user" and self.headers["Authorization"] == "Bearer secret-access":
                    self._answer(provider.github)
                else:
                    self._answer({}, 404)

            def do_POST(self) -> None:
                form = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                asked = provider.codes.pop(form.get("code", ""), None)
                challenge = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
                proved = base64.urlsafe_b64encode(challenge).rstrip(b"=").decode()
                known = base64.b64encode(b"hub-id:hub-secret").decode()
                if asked is None or asked["code_challenge"] != proved:
                    self._answer({"error": "invalid_grant"}, 400)
                elif self.headers["Authorization"] != f"Basic {known}":
                    self._answer({"error": "invalid_client"}, 401)
                elif self.path == "/login/oauth/access_token":
                    self._answer({"access_token": "secret-access", "token_type": "bearer"})
                else:
                    self._answer(
                        {
                            "access_token": "a",
                            "token_type": "Bearer",
                            "id_token": provider.proof(asked.get("nonce", "")),
                        }
                    )

        return Handler

    def description(self) -> dict[str, Any]:
        issuer = "http://elsewhere.example" if self.wrong == "description" else self.url
        return {
            "issuer": issuer,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
        }

    def proof(self, nonce: str) -> str:
        claims = {"iss": self.url, "aud": "hub-id", "exp": int(time.time()) + 60, "nonce": nonce, **self.claims}
        if self.wrong in ("iss", "aud", "nonce"):
            claims[self.wrong] = "wrong"
        if self.wrong == "exp":
            claims["exp"] = int(time.time()) - 3600
        if self.wrong == "sub":
            del claims["sub"]
        if self.wrong == "alg":  # the public key taken for a shared secret: the classic mistake
            return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(self.keys[0].as_pem(private=False)))
        key = RSAKey.generate_key(2048, {"kid": "one"}) if self.wrong == "key" else self.keys[-1]
        return jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)
