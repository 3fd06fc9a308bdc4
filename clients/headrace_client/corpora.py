"""`client.corpora`: sources of documents, each on one node."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from headrace_client.errors import InvalidArgument
from headrace_client.rpc.convert.corpora import (
    UPLOAD_PIECE_BYTES,
    corpus_from_pb,
    corpus_spec_to_pb,
    hub_to_pb,
    mix_to_pb,
    path_to_pb,
    token_ids_to_pb,
    upload_parts,
)
from headrace_client.rpc.endpoint import Endpoint, new_request_id
from headrace_client.rpc.nodes import Nodes, pages
from headrace_client.values import Corpus, Listing

UPLOAD_DEADLINE_S = 3600.0
_BLOCK_BYTES = 4 * 1024 * 1024  # Read at once from a file; messages are pieces of it.


class Corpora:
    """Corpora on the extractors. `node` names an extractor; without it, the first alive is taken for a new corpus."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def upload(
        self,
        id: str,  # noqa: A002 - the resource's own word.
        path: str | Path | None = None,
        documents: Iterable[str | Sequence[Mapping[str, Any]]] | None = None,
        *,
        format: str = "",  # noqa: A002 - the contract's word.
        text_column: str = "",
        text_split: str = "",
        chat: bool = False,
        node: str = "",
        deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> Corpus:
        """Sends a local file (text, JSON, CSV, Parquet, `.npy`) or texts. Sending it twice is no error.

        With `chat`, documents are conversations: `text_column` holds lists of messages with `role` and `content`.
        """
        if isinstance(documents, str):
            raise InvalidArgument("documents is a sequence of texts, not one text", fields={"documents": "not a str"})
        if (path is None) == (documents is None):
            raise InvalidArgument("give either a path or documents", fields={"path": "exactly one of path, documents"})
        file = None if path is None else Path(path)
        if file is not None and not file.is_file():
            raise InvalidArgument(f"{file} is no file", fields={"path": str(file)})
        spec = corpus_spec_to_pb(
            corpus_id=id,
            file_format=format if file else "jsonl",
            text_column=text_column if file else "text",
            text_split=text_split,
            file_name=file.name if file else f"{id}.jsonl",
            chat=chat,
        )
        messages = upload_parts(spec, _blocks(file, documents or ()))
        extractor = self._nodes.pick(node_id=node)
        endpoint = self._nodes.endpoint(extractor)
        answer = endpoint.upload("CorpusService.UploadCorpus", messages, deadline_s=deadline_s)
        return corpus_from_pb(answer.corpus, node_id=extractor.node_id)

    def register_path(
        self,
        id: str,  # noqa: A002
        path: str | Path,
        *,
        format: str = "",  # noqa: A002
        text_column: str = "",
        text_split: str = "",
        chat: bool = False,
        node: str = "",
        deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> Corpus:
        """Takes a file that lies on the node, under one of its corpus roots. Its content is copied."""
        spec = corpus_spec_to_pb(
            corpus_id=id,
            file_format=format,
            text_column=text_column,
            text_split=text_split,
            file_name=Path(path).name,
            chat=chat,
        )
        return self._register(node, deadline_s, spec=spec, path=path_to_pb(str(path)))

    def register_token_ids(
        self,
        id: str,  # noqa: A002
        documents: Iterable[Sequence[int]],
        *,
        node: str = "",
        deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> Corpus:
        """Takes documents as token ids, in one message: the server's limit (4 MiB by default) holds for all of them."""
        spec = corpus_spec_to_pb(corpus_id=id)
        return self._register(node, deadline_s, spec=spec, token_ids=token_ids_to_pb(documents))

    def register_hub(
        self,
        id: str,  # noqa: A002
        repo_id: str,
        *,
        revision: str = "",
        config: str = "",
        split: str = "",
        text_column: str = "",
        token_ids: bool = False,
        chat: bool = False,
        max_documents: int = 0,
        hub_token: str = "",
        node: str = "",
        deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> Corpus:
        """Reads a dataset of the hub on the node, which needs headrace[datasets]; `origin` tells the commit.

        `max_documents` stops earlier. `hub_token` is neither stored nor logged; without it the node uses its own.
        """
        spec = corpus_spec_to_pb(
            corpus_id=id, file_format="token_ids" if token_ids else "", text_column=text_column, chat=chat
        )
        source = hub_to_pb(
            repo_id, revision=revision, config=config, split=split, max_documents=max_documents, hub_token=hub_token
        )
        return self._register(node, deadline_s, spec=spec, hub=source)

    def register_mix(
        self,
        id: str,  # noqa: A002
        weights: Mapping[str, float],
        *,
        seed: int = 0,
        max_documents: int = 0,
        node: str = "",
        deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> Corpus:
        """Mixes corpora of one node into a new one, drawing each document's corpus by weight.

        Documents of one corpus keep their order; the mixture ends when a drawn corpus has none left, or at
        `max_documents`.
        """
        spec = corpus_spec_to_pb(corpus_id=id)
        return self._register(node, deadline_s, spec=spec, mix=mix_to_pb(weights, seed, max_documents))

    def get(self, corpus_id: str) -> Corpus:
        """Reads one corpus, from the first node that holds it."""
        extractor, answer = self._nodes.find(
            lambda endpoint: endpoint.unary("CorpusService.GetCorpus", corpus_id=corpus_id)
        )
        return corpus_from_pb(answer.corpus, node_id=extractor.node_id)

    def list(self, *, node: str = "") -> Listing[Corpus]:
        """Lists the corpora of one node, or of all living nodes, node by node."""
        found: Listing[Corpus] = Listing()
        for extractor in (self._nodes.pick(node_id=node),) if node else self._nodes.alive():
            endpoint = self._nodes.endpoint(extractor)
            read = partial(corpus_from_pb, node_id=extractor.node_id)
            found += pages(endpoint, "CorpusService.ListCorpora", "corpora", read)
        return found

    def delete(self, corpus_id: str, *, node: str = "") -> tuple[str, ...]:
        """Deletes a corpus from one node, or from all; sets made from it stay. Returns the nodes that held it.

        Raises CorpusNotFound if none did, and the error of a node that can't be asked, which may hold it still.
        """
        request_id = new_request_id()

        def delete(endpoint: Endpoint) -> None:
            endpoint.unary("CorpusService.GetCorpus", corpus_id=corpus_id)
            endpoint.unary("CorpusService.DeleteCorpus", request_id=request_id, corpus_id=corpus_id)

        return tuple(extractor.node_id for extractor in self._nodes.on_each(delete, node_id=node))

    def _register(self, node: str, deadline_s: float, **fields: object) -> Corpus:
        extractor = self._nodes.pick(node_id=node)
        answer = self._nodes.endpoint(extractor).unary(
            "CorpusService.RegisterCorpus", deadline_s=deadline_s, request_id=new_request_id(), **fields
        )
        return corpus_from_pb(answer.corpus, node_id=extractor.node_id)


def _blocks(file: Path | None, documents: Iterable[str | Sequence[Mapping[str, Any]]]) -> Iterator[bytes]:
    """The content of an upload: a file as it is, or documents as JSONL."""
    if file is not None:
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                yield block
        return
    lines: list[bytes] = []
    n_bytes = 0
    for document in documents:
        line = json.dumps({"text": document}).encode() + b"\n"
        lines.append(line)
        n_bytes += len(line)
        if n_bytes >= UPLOAD_PIECE_BYTES:  # Many small documents share a block, so that messages stay few.
            yield b"".join(lines)
            lines, n_bytes = [], 0
    yield b"".join(lines)
