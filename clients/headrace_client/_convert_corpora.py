"""Sources of corpora as messages."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb

from headrace_client.errors import InvalidArgument


def hub_to_pb(
    repo_id: str, *, revision: str, config: str, split: str, max_documents: int, hub_token: str
) -> corpora_pb.HubDatasetSource:
    """Builds a source on the hub."""
    try:
        return corpora_pb.HubDatasetSource(
            repo_id=repo_id,
            revision=revision,
            config=config,
            split=split,
            max_documents=max_documents,
            hub_token=hub_token,
        )
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"the dataset can't be put on the wire: {exc}") from exc


def mix_to_pb(weights: Mapping[str, float], seed: int, max_documents: int) -> corpora_pb.MixSource:
    """Builds a mixture."""
    try:
        parts = [corpora_pb.MixPart(corpus_id=name, weight=weight) for name, weight in weights.items()]
        return corpora_pb.MixSource(parts=parts, seed=seed, max_documents=max_documents)
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"the mixture can't be put on the wire: {exc}") from exc
