"""The Python client under the project's own name, beside the generated stubs `headrace.*.v1`.

`headrace.connect("127.0.0.1:7470")` is `HeadraceClient.connect`, `headrace.connect_async` the same for asyncio.
Importing `headrace` imports neither gRPC nor torch: the client is loaded at the first use of these names, so code that
only needs a stub stays light.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace_client import AsyncHeadraceClient, HeadraceClient

    connect = HeadraceClient.connect
    connect_async = AsyncHeadraceClient.connect
    __version__: str

__all__ = ["AsyncHeadraceClient", "HeadraceClient", "__version__", "connect", "connect_async"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return importlib.metadata.version("headrace")
    # By name, because this package lies below the client and may not depend on it.
    client = importlib.import_module("headrace_client")
    kind = client.AsyncHeadraceClient if name in ("AsyncHeadraceClient", "connect_async") else client.HeadraceClient
    return kind.connect if name in ("connect", "connect_async") else kind


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
