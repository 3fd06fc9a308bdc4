"""JSON objects of a repo, read into memory: they decide which files are fetched."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import httpx2
from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status

from headrace_models.errors import JsonInvalid
from headrace_models.folder import CONFIG
from headrace_models.json_files import MAX_CONFIG_BYTES, MAX_JSON_BYTES, object_of
from headrace_registry.hub.events import Job
from headrace_registry.hub.faults import Cut, Unusable
from headrace_registry.hub.listing import RemoteFile

_CONNECT_S = 15.0


def headers_of(job: Job) -> dict[str, str]:
    """Returns the headers of requests: the job's token, else the token of this machine."""
    token = job.token or get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def url_of(job: Job, name: str, commit_sha: str) -> str:
    """Returns the address of a file of a commit."""
    return hf_hub_url(job.repo_id, name, revision=commit_sha, endpoint=os.environ.get("HF_ENDPOINT") or None)


def read_object(job: Job, file: RemoteFile, commit_sha: str) -> Mapping[str, Any]:
    """Reads a file that holds one JSON object.

    Raises Cut for bytes that are not the hub's, which another try may mend, Unusable and the hub's errors.
    """
    timeout = httpx2.Timeout(job.stall_s, connect=min(_CONNECT_S, job.stall_s))
    headers = {**headers_of(job), "Accept-Encoding": "identity"}
    url = url_of(job, file.name, commit_sha)
    max_bytes = MAX_CONFIG_BYTES if file.name == CONFIG else MAX_JSON_BYTES
    raw = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            raw += block
            if len(raw) > max_bytes:
                raise Unusable(f"{file.name} of {job.repo_id} is larger than {max_bytes} bytes; use another repo")
    blob = b"blob %d\0" % len(raw) + raw
    digest = hashlib.sha256(raw) if file.sha256 else hashlib.sha1(blob, usedforsecurity=False)
    wanted = file.sha256 or file.git_sha1
    if file.size not in (None, len(raw)) or wanted not in ("", digest.hexdigest()):
        raise Cut(f"{file.name} came with other bytes than the hub names")
    try:
        return object_of(bytes(raw), file.name)
    except JsonInvalid as exc:
        raise Unusable(f"{exc} in {job.repo_id}; use another revision") from exc
