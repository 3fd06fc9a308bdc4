"""Converts the sources of corpora."""

from __future__ import annotations

from headrace.extractor.v1 import corpus_service_pb2
from headrace_extractor.corpora.mixing import Mix, MixPart
from headrace_extractor.corpora.spec import CorpusFormat, CorpusSpec, DocumentKind
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.hub.job import HubJob


def mix_from_pb(message: corpus_service_pb2.MixSource) -> Mix:
    """Returns the mixture; raises FieldInvalid."""
    return Mix(
        parts=tuple(MixPart(corpus_id=part.corpus_id, weight=part.weight) for part in message.parts),
        seed=message.seed,
        max_documents=message.max_documents,
    )


def hub_job_from_pb(spec: CorpusSpec, message: corpus_service_pb2.HubDatasetSource) -> tuple[DocumentKind, HubJob]:
    """Returns the kind of the documents and the order to read them; raises FieldInvalid."""
    if spec.format not in (None, CorpusFormat.TOKEN_IDS):
        raise FieldInvalid(
            "spec.format says how a file is read, and a dataset says that itself; leave it out, or set TOKEN_IDS.",
            field="spec.format",
        )
    if spec.chat and spec.format:
        raise FieldInvalid("Documents are conversations or token ids, not both.", field="spec.chat")
    kind = DocumentKind.of(tokenized=spec.format == CorpusFormat.TOKEN_IDS, chat=spec.chat)
    job = HubJob(
        repo_id=message.repo_id,
        revision=message.revision,
        config=message.config,
        split=message.split,
        column=spec.text_column,
        kind=str(kind),
        max_documents=message.max_documents,
        token=message.hub_token,
    )
    return kind, job
