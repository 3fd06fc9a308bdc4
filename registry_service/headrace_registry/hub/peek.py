"""The child that reads headers, `python -m headrace_registry.hub.peek`: job on standard input, answer on output.

Reads `config.json` and the headers of the safetensors files by range requests, kilobytes of gigabytes, and answers with
the profile that they give.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils.tqdm import disable_progress_bars

from headrace_chassis.confined.limits import Limits, allow_cpu, limit_memory
from headrace_models.errors import HeaderInvalid, TooManyTensors
from headrace_models.json_files import MAX_CONFIG_BYTES
from headrace_models.safetensors import entries_from
from headrace_registry.errors import ModelUnsupported
from headrace_registry.hub.events import Job, exit_when_orphaned
from headrace_registry.hub.faults import failure_of
from headrace_registry.sizing.headers import Headers, profile_to_json, tensors_from

_TIMEOUT_S = 10.0
# The libraries alone take 100 MB.
_LIMITS = Limits(memory_bytes=768 * 1024 * 1024, cpu_s=25)


def main() -> int:
    """Answers with `profile`, or with `reason` and `message`."""
    limit_memory(_LIMITS)
    allow_cpu(_LIMITS)
    job = Job(**json.loads(sys.stdin.readline()))
    exit_when_orphaned()
    disable_progress_bars()
    sys.stdout.write(json.dumps(answer(job)) + "\n")
    sys.stdout.flush()
    return 0


def answer(job: Job) -> dict[str, Any]:
    """Returns the answer to the parent, also after an error."""
    try:
        url = hf_hub_url(job.repo_id, "config.json", revision=job.revision)
        headers = build_hf_headers(token=job.token or None)
        response = get_session().get(url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True)
        hf_raise_for_status(response)
        found = HfApi().get_safetensors_metadata(
            job.repo_id, revision=job.revision, token=job.token or None, timeout=_TIMEOUT_S
        )
        tensors = {
            name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
            for file in found.files_metadata.values()
            for name, tensor in file.tensors.items()
        }
        entries = entries_from(tensors, source=job.repo_id)
        read = Headers(config=_config(response.content, job.repo_id), tensors=tuple(tensors_from(entries)))
        return {"profile": profile_to_json(read.profile())}
    except (NotASafetensorsRepoError, SafetensorsParsingError) as exc:
        message = f"{job.repo_id} has no safetensors headers to read ({type(exc).__name__}); PrepareModel it first"
        return _unsupported(message)
    except ModelUnsupported as exc:
        return _unsupported(exc.message)
    except (HeaderInvalid, TooManyTensors, MemoryError, RecursionError) as exc:
        return _unsupported(f"the config or a header of {job.repo_id} can't be read ({exc or 'too large'})")
    except Exception as exc:  # noqa: BLE001 - the parent must hear of every failure.
        event = failure_of(exc, job)
        return {"reason": event.reason, "message": event.message, "retry_after_s": event.retry_after_s}


def _config(content: bytes, repo_id: str) -> dict[str, Any]:
    if len(content) > MAX_CONFIG_BYTES:
        raise ModelUnsupported(f"config.json of {repo_id} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise ModelUnsupported(f"config.json of {repo_id} is no JSON") from exc
    return config if isinstance(config, dict) else {}


def _unsupported(message: str) -> dict[str, Any]:
    return {"reason": "MODEL_UNSUPPORTED", "message": message, "retry_after_s": 0.0}


if __name__ == "__main__":
    sys.exit(main())
