"""Between messages about corpora and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from headrace.extractor.v1 import corpus_service_pb2 as corpora_pb
from headrace_client import values as v
from headrace_client.errors import InvalidArgument
from headrace_client.rpc.convert.common import time_from_pb
from headrace_client.rpc.convert.enums import value_of

UPLOAD_PIECE_BYTES = 512 * 1024  # The server takes at most 1 MiB in one message.


def corpus_from_pb(pb: corpora_pb.Corpus, *, node_id: str = "") -> v.Corpus:
    """Reads a corpus of a node."""
    return v.Corpus(
        id=pb.id,
        digest=pb.digest,
        n_documents=pb.n_documents,
        size_bytes=pb.size_bytes,
        tokenized=pb.tokenized,
        origin=pb.origin,
        create_time=time_from_pb(pb, "create_time"),
        chat=pb.chat,
        node_id=node_id,
    )


def corpus_spec_to_pb(
    *,
    corpus_id: str,
    file_format: str = "",
    text_column: str = "",
    text_split: str = "",
    file_name: str = "",
    chat: bool = False,
) -> corpora_pb.CorpusSpec:
    """Builds a CorpusSpec; formats and splits are the contract's names in lower case, empty for the server's choice."""
    return corpora_pb.CorpusSpec(
        id=corpus_id,
        format=value_of(corpora_pb.CorpusFormat, "CORPUS_FORMAT_", file_format, "format"),
        text_column=text_column,
        text_split=value_of(corpora_pb.TextSplit, "TEXT_SPLIT_", text_split, "text_split"),
        file_name=file_name,
        chat=chat,
    )


def upload_parts(spec: corpora_pb.CorpusSpec, content: Iterable[bytes]) -> Iterator[corpora_pb.UploadCorpusRequest]:
    """Yields the messages of an upload: the spec, then the content in pieces of bounded size."""
    yield corpora_pb.UploadCorpusRequest(spec=spec)
    for block in content:
        for at in range(0, len(block), UPLOAD_PIECE_BYTES):
            yield corpora_pb.UploadCorpusRequest(content=block[at : at + UPLOAD_PIECE_BYTES])


def token_ids_to_pb(documents: Iterable[Sequence[int]]) -> corpora_pb.TokenIdsSource:
    """Builds a source of token ids."""
    try:
        return corpora_pb.TokenIdsSource(
            documents=[corpora_pb.TokenDocument(token_ids=[int(token) for token in document]) for document in documents]
        )
    except (TypeError, ValueError) as exc:
        raise InvalidArgument(f"token ids are integers of 32 bits: {exc}") from exc


def path_to_pb(path: str) -> corpora_pb.PathSource:
    """Builds a source on the node's disk."""
    return corpora_pb.PathSource(path=path)


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
