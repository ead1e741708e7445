"""Who asks: API keys, and the key for everything that changes what is served.

Knows nothing of endpoints. Invariant: keys are compared in constant time, all of them, whichever fits; a key itself is
kept nowhere but in the configuration.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from rcllm.config import ServerConfig
from rcllm.errors import AccessError, ConfigError, ForbiddenError


@dataclass(frozen=True, slots=True)
class Caller:
    name: str  # 8 hex digits of the key's hash; empty without keys
    is_admin: bool


class Keys:
    """The keys that a configuration names."""

    def __init__(self, config: ServerConfig) -> None:
        self._api = tuple(key.encode() for key in config.api_keys)
        self._admin = config.admin_key.encode()
        self._is_open = not self._api and not self._admin

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """By `Authorization: Bearer KEY` or `X-API-Key: KEY`. Raises AccessError."""
        if self._is_open:
            return Caller("", is_admin=True)
        given = _given(headers)
        is_admin = bool(self._admin) and hmac.compare_digest(given, self._admin)
        fitting = [hmac.compare_digest(given, key) for key in self._api]
        if not is_admin and not any(fitting) and self._api:
            raise AccessError("expected a key in the header Authorization (Bearer …) or X-API-Key, got none that fits")
        known = is_admin or any(fitting)
        return Caller(blake3(given).hexdigest()[:8] if known else "", is_admin)


def check_admin(caller: Caller) -> None:
    """Raises ForbiddenError."""
    if not caller.is_admin:
        raise ForbiddenError(
            "this changes what is served: it needs the admin key (server.admin_key, RCLLM_SERVER_ADMIN_KEY)"
        )


def check_address(config: ServerConfig) -> None:
    """Raises ConfigError for an address that others reach, where nobody needs a key."""
    if config.insecure or config.api_keys or _is_loopback(config.host):
        return
    raise ConfigError(
        f"--host {config.host} is reached by others, and nobody needs a key: set server.api_keys "
        "(RCLLM_SERVER_API_KEYS), or allow it with --insecure"
    )


def _given(headers: Mapping[str, str]) -> bytes:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return given.strip().encode("utf-8", "replace")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
