"""The shared tier on a real server: what lies there, what is erased, and what a full or absent server does."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import valkey

from rcllm.core.ranking import ContentKey
from rcllm.errors import ConfigError
from rcllm.store import valkey as product
from rcllm.store.contract import Store, Stored
from rcllm.store.tiered import Tiered
from rcllm.store.valkey import PASSWORD_VARIABLE, ValkeyStore
from tests.contracts.keepers import BLOCK_BYTES, block, key
from tests.valkey_server import serving

SECRET = "p:ss/w@rd%20"
ESCAPED = "p%3Ass%2Fw%40rd%2520"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as number:
        yield number


@pytest.fixture
def server(port: int) -> Iterator[valkey.Valkey]:
    """A client of its own, as an administrator has; the server is as it was afterwards."""
    with valkey.Valkey(port=port) as client:
        yield client
        client.flushall()
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")


@pytest.fixture
def store(server: valkey.Valkey, port: int) -> Iterator[ValkeyStore]:
    made = ValkeyStore(f"redis://127.0.0.1:{port}/0", read_s=10.0)
    yield made
    made.close()


def put(store: Store, *numbers: int, owner: str | None = "ann") -> None:
    store.put_many({key(n): block(n, owner) for n in numbers})


def numbers(store: Store, *wanted: int) -> set[int]:
    return {int.from_bytes(found, "big") for found in store.get_many(map(key, wanted))}


# ---- what lies there ----


def test_a_block_comes_back_as_it_was(store: ValkeyStore) -> None:
    kept = Stored(block(1).data, 1e18 + 0.5, None, "space")
    store.put_many({key(1): kept})
    assert store.get_many([key(1)]) == {key(1): kept}


def test_many_blocks_in_one_call(store: ValkeyStore) -> None:
    put(store, *range(100))
    assert numbers(store, *range(200)) == set(range(100))
    assert store.lookup_many(map(key, range(200))).keys() == set(map(key, range(100)))
    assert store.delete_owner("ann") == 100


def test_services_under_other_prefixes_do_not_meet(store: ValkeyStore, port: int) -> None:
    other = ValkeyStore(f"valkey://127.0.0.1:{port}", prefix="other:")
    put(store, 1)
    put(other, 2)
    assert numbers(store, 1, 2) == {1}
    assert [each.stats()[0].num_blocks for each in (store, other)] == [1, 1]
    other.delete_owner("ann")
    assert numbers(store, 1) == {1}
    other.close()


def test_a_prefix_that_a_pattern_would_read_otherwise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"letters, digits .* not 'a\*'"):
        ValkeyStore("valkey://localhost", prefix="a*")


def test_a_database_of_the_address_is_used(server: valkey.Valkey, port: int) -> None:
    third = ValkeyStore(f"valkey://127.0.0.1:{port}/3")
    put(third, 1)
    assert server.dbsize() == 0
    assert server.info("keyspace")["db3"]["keys"] == 2
    third.close()


def test_blocks_live_as_long_as_they_are_given_and_sets_of_owners_stay(server: valkey.Valkey, port: int) -> None:
    store = ValkeyStore(f"valkey://127.0.0.1:{port}", ttl_s=1000)
    put(store, 1)
    assert 990 < server.ttl(b"rcllm:b:" + key(1)) <= 1000
    assert server.ttl("rcllm:o:ann") == -1
    store.close()


# ---- what is erased ----


def test_nothing_of_an_owner_is_left(store: ValkeyStore, server: valkey.Valkey) -> None:
    put(store, 1, 2, 3)
    assert store.delete_owner("ann") == 3
    assert server.keys() == []


def test_a_block_whose_owners_set_was_lost_is_erased(store: ValkeyStore, server: valkey.Valkey) -> None:
    put(store, 1, 2)
    put(store, 3, owner="bob")
    server.delete("rcllm:o:ann")
    assert store.delete_owner("ann") == 2
    assert numbers(store, 1, 2, 3) == {3}


def test_where_the_server_may_evict_sets_every_block_is_looked_at(store: ValkeyStore, server: valkey.Valkey) -> None:
    put(store, *range(40))
    server.delete("rcllm:o:ann")  # as an eviction does
    put(store, 50)  # the set is there again, and names one block
    server.config_set("maxmemory-policy", "allkeys-lru")
    assert store.delete_owner("ann") == 41
    assert server.keys() == []


def test_a_block_that_changed_hands_is_its_new_owners(store: ValkeyStore) -> None:
    put(store, 1, owner="ann")
    put(store, 1, owner="bob")
    assert store.delete_owner("ann") == 0
    assert numbers(store, 1) == {1}
    assert store.delete_owner("bob") == 1
    assert numbers(store, 1) == set()


def test_stale_members_of_a_set_are_forgotten(store: ValkeyStore, server: valkey.Valkey) -> None:
    put(store, 1, 2)
    server.delete(b"rcllm:b:" + key(1))  # as an eviction does
    assert store.delete_owner("ann") == 1
    assert server.keys() == []


# ---- a full server ----


def test_a_full_server_drops_what_it_is_given_and_counts(store: ValkeyStore, server: valkey.Valkey) -> None:
    put(store, 1)
    server.config_set("maxmemory", 1000)
    put(store, 2, 3)
    (stats,) = store.stats()
    assert (stats.dropped, stats.num_blocks, stats.budget_bytes) == (2, 1, 1000)
    assert numbers(store, 1, 2, 3) == {1}


def test_evictions_of_the_server_are_told(store: ValkeyStore, server: valkey.Valkey) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    server.config_set("maxmemory", 4 << 20)
    large = replace(block(1), data=memoryview(bytes(400_000)))
    for n in range(40):
        store.put_many({key(n): large})
    (stats,) = store.stats()
    assert stats.evictions > 0
    assert 0 < stats.num_blocks < 40
    assert stats.num_bytes <= stats.budget_bytes == 4 << 20
    store.delete_owner("ann")


def test_without_a_bound_the_budget_is_the_machines_memory(store: ValkeyStore) -> None:
    assert store.stats()[0].budget_bytes > 1e8


def test_a_block_longer_than_a_server_takes_is_refused(store: ValkeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "MAX_BLOCK_BYTES", BLOCK_BYTES)
    store.put_many({key(1): block(1), key(2): replace(block(2), data=memoryview(bytes(BLOCK_BYTES + 1)))})
    assert numbers(store, 1, 2) == {1}
    assert store.stats()[0].dropped == 1


# ---- a server that is not there ----


def test_a_server_that_is_not_there_is_said_at_once_by_the_first_call() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        store = ValkeyStore(f"valkey://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(valkey.ConnectionError):
            store.get_many([key(1)])
    store.close()


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = ValkeyStore(f"valkey://127.0.0.1:{silent.getsockname()[1]}", read_s=0.1)
        started = time.monotonic()
        with pytest.raises(valkey.TimeoutError):
            store.get_many([key(1)])
        assert time.monotonic() - started < 2
    store.close()


def test_tiers_go_on_while_the_server_is_away_and_use_it_when_it_is_back() -> None:
    with serving() as port:
        shared = ValkeyStore(f"valkey://127.0.0.1:{port}", read_s=10.0)
        now = [0.0]
        tiered = Tiered(
            {"shared": shared}, memory_bytes=BLOCK_BYTES, queue_bytes=BLOCK_BYTES * 10, clock=lambda: now[0]
        )
        put(tiered, 1, 2)
        tiered.flush()
        assert numbers(tiered, 1, 2) == {1, 2}
    put(tiered, 3)
    tiered.flush()
    assert numbers(tiered, 1, 2, 3) == {3}
    assert tiered.stats()[1].errors > 0
    tiered.close()


# ---- addresses and passwords ----


def test_a_password_of_the_address_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("--requirepass", SECRET) as port:
        given = ValkeyStore(f"valkey://:{ESCAPED}@127.0.0.1:{port}/0")
        put(given, 1)
        without = ValkeyStore(f"valkey://127.0.0.1:{port}/0")
        with pytest.raises(valkey.AuthenticationError) as refused:
            put(without, 1)
        assert SECRET not in str(refused.value)
        monkeypatch.setenv(PASSWORD_VARIABLE, SECRET)
        found = ValkeyStore(f"valkey://127.0.0.1:{port}/0")
        assert numbers(found, 1) == {1}
        for store in (given, without, found):
            assert SECRET not in repr(store)
            store.close()


@pytest.mark.parametrize("address", [f"http://:{SECRET}@host", f"valkey://:{SECRET}@host:1/0", f"{SECRET}", ""])
def test_an_address_that_is_none_is_refused_without_telling_it(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected valkey://host:port/db") as refused:
        ValkeyStore(address)
    assert "ss/w" not in str(refused.value)
    assert not re.search("ss/w", repr(refused.value.__cause__))


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkey", None)
    with pytest.raises(ConfigError, match=r"pip install 'rcllm\[shared\]'"):
        ValkeyStore("valkey://localhost")


def test_nothing_is_sent_before_the_first_call() -> None:
    ValkeyStore("valkey://nowhere.invalid:1/0").close()


def test_a_key_is_kept_as_bytes_of_any_value(store: ValkeyStore) -> None:
    odd = [ContentKey(bytes([n]) * 32) for n in (0, 10, 13, 42, 255)]
    store.put_many({each: block(1, "ann") for each in odd})
    assert store.lookup_many(odd).keys() == set(odd)
    assert store.stats()[0].num_blocks == len(odd)
    assert store.delete_owner("ann") == len(odd)
