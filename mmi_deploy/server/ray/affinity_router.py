"""Router of Ray Serve that sends documents with the same beginning to the same replica.

Replicas are ranked by a hash of the beginning and the replica (rendezvous hashing): when a replica
comes or goes, only its own documents move. One that has all it can take is passed over.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mmi_deploy.server.engine.affinity import weight


class AffinityRouter(RequestRouter):
    """Ranks replicas for the first argument of a request, its affinity."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are tried, each a rank of its own."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        # These are all replicas: while none takes the request, ask them less and less often.
        pending_request.routing_context.should_backoff = True
        affinity = pending_request.args[0]
        return [
            [replica]
            for replica in sorted(
                candidate_replicas, key=lambda one: weight(affinity, one.replica_id.unique_id)
            )
        ]
