"""The request router that Ray Serve calls: it asks the envelope's own aim.

Knows nothing of policies: `aim.py` calls them. Invariant: it decides by what replicas published and by nothing else,
and where a replica has published nothing yet, by the node that it said when it came up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from rcllm.on_ray.aim import REPORT
from rcllm.on_ray.envelope import Envelope

NODE = "node"  # under which a replica says its number when it comes up


class PolicyRouter(RequestRouter):  # type: ignore[misc]
    """See `ray.serve.request_router.RequestRouter`."""

    def initialize_state(self, **kwargs: Any) -> None:
        pass

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        envelope = _envelope(pending_request)
        if envelope is None or envelope.aim is None or not candidate_replicas:
            return [candidate_replicas]
        assert pending_request is not None
        pending_request.routing_context.should_backoff = True  # where none of these takes it, and not at once again
        by_node = {_node_of(replica): replica for replica in candidate_replicas}
        living: dict[int, Mapping[str, Any]] = {node: replica.routing_stats for node, replica in by_node.items()}
        return [[by_node[node]] for node in envelope.aim.choose(living)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        envelope = _envelope(pending_request)
        replica = self.curr_replicas.get(replica_id)
        if envelope is not None and envelope.aim is not None and replica is not None:
            envelope.aim.routed(_node_of(replica))


def _envelope(pending: PendingRequest | None) -> Envelope | None:
    found = pending.args[0] if pending is not None and pending.args else None
    return found if isinstance(found, Envelope) else None


def _node_of(replica: RunningReplica) -> int:
    """Its number: of its latest report, for numbers may change where Serve takes replicas away."""
    report = replica.routing_stats.get(REPORT)
    return int(report["node"] if report is not None else replica.replica_metadata.get(NODE, 0))
