"""Converts corpora and their sources."""

from __future__ import annotations

from headrace.extractor.v1 import corpus_service_pb2
from headrace_extractor.corpora.ingest.mixing import Mix, MixPart
from headrace_extractor.corpora.spec import Corpus, CorpusFormat, CorpusSpec, DocumentKind, TextSplit
from headrace_extractor.errors import FieldInvalid
from headrace_extractor.hub.job import HubJob
from headrace_extractor.rpc.convert.common import timestamp


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


_FORMATS = {
    corpus_service_pb2.CORPUS_FORMAT_UNSPECIFIED: None,
    corpus_service_pb2.CORPUS_FORMAT_TXT: CorpusFormat.TXT,
    corpus_service_pb2.CORPUS_FORMAT_JSONL: CorpusFormat.JSONL,
    corpus_service_pb2.CORPUS_FORMAT_CSV: CorpusFormat.CSV,
    corpus_service_pb2.CORPUS_FORMAT_PARQUET: CorpusFormat.PARQUET,
    corpus_service_pb2.CORPUS_FORMAT_TOKEN_IDS: CorpusFormat.TOKEN_IDS,
}


_SPLITS = {
    corpus_service_pb2.TEXT_SPLIT_UNSPECIFIED: TextSplit.BLANK_LINES,
    corpus_service_pb2.TEXT_SPLIT_BLANK_LINES: TextSplit.BLANK_LINES,
    corpus_service_pb2.TEXT_SPLIT_LINES: TextSplit.LINES,
    corpus_service_pb2.TEXT_SPLIT_NONE: TextSplit.NONE,
    corpus_service_pb2.TEXT_SPLIT_FORM_FEEDS: TextSplit.FORM_FEEDS,
}


def corpus_spec_from_pb(message: corpus_service_pb2.CorpusSpec) -> CorpusSpec:
    """Raises FieldInvalid."""
    if message.format not in _FORMATS or message.text_split not in _SPLITS:
        raise FieldInvalid("spec.format or spec.text_split is a value this version does not know.", field="spec.format")
    return CorpusSpec(
        id=message.id,
        format=_FORMATS[message.format],
        text_column=message.text_column or "text",
        text_split=_SPLITS[message.text_split],
        file_name=message.file_name,
        chat=message.chat,
    )


def corpus_to_pb(corpus: Corpus) -> corpus_service_pb2.Corpus:
    """One corpus."""
    return corpus_service_pb2.Corpus(
        id=corpus.id,
        digest=corpus.digest,
        n_documents=corpus.n_documents,
        size_bytes=corpus.size_bytes,
        tokenized=corpus.tokenized,
        origin=corpus.origin,
        create_time=timestamp(corpus.create_time),
        chat=corpus.chat,
    )
