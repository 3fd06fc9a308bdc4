"""Reads a dataset of the hub as a stream, without keeping files on this disk.

Only files of five data formats in the dataset's own repo are read. A dataset may name files elsewhere, or need code
from its repo to be read: both are refused.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import httpx2
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headrace_extractor.corpora.files.contents import content_of, malformed, value_at
from headrace_extractor.corpora.spec import DocumentKind
from headrace_extractor.errors import ExtractorError, FieldInvalid, HubGated, HubNotFound, HubUnavailable
from headrace_extractor.hub.job import DOCUMENT, RESOLVED, WAITING, HubJob

Send = Callable[..., None]

_FORMATS = ("parquet", "json", "csv", "text", "arrow")
_TRIES = 3  # in a row without a new document
_RESOLVE_S = 30.0
_RETRY_AFTER_S = 30.0


def read_dataset(job: HubJob, send: Send) -> None:
    """Sends the commit, then every document; tries again after transient errors. Raises ExtractorError."""
    datasets.disable_progress_bars()
    n_sent, tries = 0, 0
    commit_sha = ""
    while True:
        before = n_sent
        try:
            if not commit_sha:
                commit_sha = _resolve(job)
                send(RESOLVED, json.dumps({"commit_sha": commit_sha}).encode(), now=True)
            for document in _documents(job, commit_sha, n_sent):
                send(DOCUMENT, document)
                n_sent += 1
        except ExtractorError:
            raise
        except Exception as exc:
            tries = 1 if n_sent > before else tries + 1
            if not _is_transient(exc) or tries >= _TRIES:
                raise _typed(exc, job) from exc
            wait_s = job.backoff_s * 2 ** (tries - 1) * random.uniform(1.0, 1.5)  # noqa: S311 -- nothing secret
            send(WAITING, f"tries again in {wait_s:.0f} s: {type(exc).__name__}".encode(), now=True)
            time.sleep(wait_s)
        else:
            return


def _resolve(job: HubJob) -> str:
    info = HfApi(token=job.token or None).dataset_info(job.repo_id, revision=job.revision or None, timeout=_RESOLVE_S)
    if not info.sha:
        raise HubNotFound(f"The hub names no commit for {job.repo_id}@{job.revision or 'main'}; check the revision.")
    return info.sha


def _documents(job: HubJob, commit_sha: str, n_done: int) -> Iterator[bytes]:
    """Yields documents from number `n_done` on."""
    rows = _open(job, commit_sha)
    content = content_of(DocumentKind(job.kind))
    if n_done:
        rows = rows.skip(n_done)
    for number, row in enumerate(rows, n_done):
        if job.max_documents and number >= job.max_documents:
            return
        place = ("row", number)
        yield content(value_at(row, job.column, place), job.column, place)


def _open(job: HubJob, commit_sha: str) -> Any:
    """Returns the rows of the split as a stream, with the one top-level column that the job needs if it is known."""
    builder = datasets.load_dataset_builder(
        job.repo_id, job.config or None, revision=commit_sha, token=job.token or None
    )
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _FORMATS:
        raise malformed(f"{job.repo_id} holds files of the kind {kind}; only {', '.join(_FORMATS)} become corpora.")
    own = f"hf://datasets/{job.repo_id}@"
    files = (file for listed in (builder.config.data_files or {}).values() for file in listed)
    if not all(str(file).startswith(own) for file in files):
        raise malformed(f"{job.repo_id} names a file outside its repo; only its own files are read.")
    splits = builder.as_streaming_dataset()
    if job.split not in splits and (job.split or len(splits) != 1):
        raise FieldInvalid(
            f"{job.repo_id} has the splits {', '.join(splits)}; set hub.split to one of them.", field="hub.split"
        )
    rows = splits[job.split or next(iter(splits))]
    columns = rows.column_names
    top = job.column if columns and job.column in columns else job.column.split(".")[0]
    return rows.select_columns([top]) if columns and top in columns else rows


def _is_transient(exc: BaseException) -> bool:
    """Returns whether an error may pass by itself, judged by the first network or hub error in its chain of causes."""
    for each in _chain(exc):
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code if each.response is not None else 0
            return status in (0, 408, 429) or status >= 500
        if isinstance(each, httpx2.TransportError | ConnectionError | TimeoutError):
            return True
    return False


def _typed(exc: Exception, job: HubJob) -> ExtractorError:
    where = f"{job.repo_id}@{job.revision or 'main'}"
    if refusal := _refusal(exc, where):
        return refusal
    if isinstance(exc, OfflineModeIsEnabled):
        return HubUnavailable("This extractor runs with HF_HUB_OFFLINE; unset it, or upload files.")
    if _is_transient(exc):
        return HubUnavailable(
            f"The hub can't be reached for {where} ({type(exc).__name__}); try again later.",
            retry_after_s=_RETRY_AFTER_S,
        )
    if isinstance(exc, DataFilesNotFoundError):
        return malformed(f"{where} holds no files that become corpora ({', '.join(_FORMATS)}); take another.")
    # The library's own type for a wrong config is plain ValueError.
    if isinstance(exc, ValueError) and str(exc).startswith(("BuilderConfig", "Config name")):
        return FieldInvalid(f"hub.config: {_short(exc)}", field="hub.config")
    cause = exc.__cause__ if isinstance(exc, DatasetsError) and exc.__cause__ else exc
    return malformed(
        f"{where} can't be read ({type(cause).__name__}: {_short(cause)}); mend its files, or take another."
    )


def _refusal(exc: Exception, where: str) -> ExtractorError | None:
    """Returns the error for a dataset that is gated or not found; None if the hub did not refuse it."""
    gated = HubGated(f"{where} is gated; accept its terms on the hub, then give a token of that account.")
    missing = HubNotFound(f"The hub has no dataset {where}, or hides it from this token; check the spelling.")
    for each in _chain(exc):
        if isinstance(each, GatedRepoError):
            return gated
        if isinstance(each, RepositoryNotFoundError | RevisionNotFoundError):
            return missing
    if isinstance(exc, DatasetNotFoundError):  # `datasets` may leave out the hub's own error.
        return gated if "gated" in str(exc) else missing
    return None


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception, its cause, and so on."""
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__


def _short(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]
