"""Who calls: keys are known by their SHA-256 only and compared in constant time."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.config import Key
from proxy.errors import Forbidden


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is the key's, None without keys; an admin sees everybody's figures, others their own."""

    name: str | None
    admin: bool


_ANYONE = Caller(None, admin=True)
_STRANGER = Caller(None, admin=False)


def may_see(scope: Mapping[str, Any], owner: str | None) -> bool:
    """Whether the caller of an admitted request may see what belongs to the key `owner`."""
    return bool(scope.get("joulegate.admin")) or scope.get("joulegate.key") == owner


class Authenticator:
    """Decides by `Authorization: Bearer` or `x-api-key`. Without `required`, anyone may call."""

    def __init__(self, keys: Sequence[Key], *, required: bool) -> None:
        self._keys = [(bytes.fromhex(key.sha256), Caller(key.name, key.admin)) for key in keys]
        self._required = required

    def identify(self, authorization: bytes | None, api_key: bytes | None) -> Caller:
        """The caller; raises Forbidden (401) where a key is required and none that we know was given."""
        if not self._keys:
            return _ANYONE
        given = _bearer(authorization) or api_key
        caller = self._find(given) if given else None
        if caller is not None:
            return caller
        if self._required:
            message = "Incorrect API key provided." if given else "You didn't provide an API key."
            headers = {"WWW-Authenticate": "Bearer"}
            raise Forbidden(message, status=401, code="invalid_api_key", headers=headers)
        return _STRANGER

    def _find(self, given: bytes) -> Caller | None:
        digest = hashlib.sha256(given).digest()
        found = None
        for known, caller in self._keys:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def _bearer(authorization: bytes | None) -> bytes | None:
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None
