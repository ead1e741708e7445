"""Who asks, and for which tenant: API keys, and the key for everything that changes what is served.

Knows nothing of endpoints. Invariant: keys are compared in constant time, all of them, whichever fits; a key itself is
kept nowhere but in the configuration. A tenant that has keys of its own is named by those and by the admin's alone.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from blake3 import blake3

from rcllm.config import ServerConfig
from rcllm.errors import AccessError, ConfigError, ForbiddenError, TenantError


@dataclass(frozen=True, slots=True)
class Caller:
    name: str  # 8 hex digits of the key's hash; empty without keys
    is_admin: bool
    tenant: str = ""  # whose key it is; empty: of nobody in particular
    barred: frozenset[str] = frozenset()  # tenants that it may not name

    def tenant_of(self, named: str) -> str:
        """The tenant of a request that names one, or none. Raises TenantError."""
        if named in self.barred or (self.tenant and named not in ("", self.tenant)):
            raise TenantError("tenant: this key may not ask for the tenant that the request names")
        return self.tenant or named


class Keys:
    """The keys that a configuration names."""

    def __init__(self, config: ServerConfig) -> None:
        self._api = tuple(key.encode() for key in config.api_keys)
        self._of_tenants = tuple((key.encode(), name) for name, keys in config.tenant_keys.items() for key in keys)
        self._closed = frozenset(config.tenant_keys)
        self._admin = config.admin_key.encode()
        self._has_keys = config.has_keys

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """By `Authorization: Bearer KEY` or `X-API-Key: KEY`. Raises AccessError."""
        if not self._has_keys and not self._admin:
            return Caller("", is_admin=True)
        given = _given(headers)
        is_admin = bool(self._admin) and hmac.compare_digest(given, self._admin)
        fitting = [hmac.compare_digest(given, key) for key in self._api]
        tenants = [name for key, name in self._of_tenants if hmac.compare_digest(given, key)]
        known = is_admin or any(fitting) or bool(tenants)
        if not known and self._has_keys:
            raise AccessError("expected a key in the header Authorization (Bearer …) or X-API-Key, got none that fits")
        name, tenant = blake3(given).hexdigest()[:8] if known else "", tenants[0] if tenants else ""
        return Caller(name, is_admin, tenant, frozenset() if is_admin else self._closed - {tenant})


def check_admin(caller: Caller) -> None:
    """Raises ForbiddenError."""
    if not caller.is_admin:
        raise ForbiddenError(
            "this changes what is served: it needs the admin key (server.admin_key, RCLLM_SERVER_ADMIN_KEY)"
        )


def check_address(config: ServerConfig) -> None:
    """Raises ConfigError for an address that others reach, where nobody needs a key."""
    if config.insecure or config.has_keys or _is_loopback(config.host):
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
