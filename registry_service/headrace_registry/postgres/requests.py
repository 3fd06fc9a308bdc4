"""Remembers the answer to each request_id, so that repeating a call repeats its answer and not its effect."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from headrace_registry.errors import FieldInvalid
from headrace_registry.postgres import statements
from headrace_registry.postgres.server.pool import Connection

REQUEST_READ = "SELECT arguments, response FROM requests WHERE request_id = %(request_id)s AND method = %(method)s"
REQUEST_WRITE = """
INSERT INTO requests (request_id, method, arguments, response)
VALUES (%(request_id)s, %(method)s, %(arguments)s, %(response)s)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One mutating call. `request_id` is a checked UUID4; empty for work that is not remembered.

    By the `arguments` a repeated call is told from another call that uses the same id by mistake.
    """

    request_id: str
    method: str
    arguments: tuple[Any, ...]

    @classmethod
    def of_call(cls, request_id: str, method: str, *arguments: Any) -> Request:
        """Makes the request of one call, with an id of its own if the caller sent none.

        A transaction that is run again, since its connection was lost while it committed, then finds its own answer.
        """
        return cls(request_id=request_id or str(uuid.uuid4()), method=method, arguments=arguments)

    @property
    def digest(self) -> str:
        """SHA-256 of the arguments, hex."""
        return hashlib.sha256(json.dumps(self.arguments, sort_keys=True, default=str).encode()).hexdigest()


async def recall(conn: Connection, request: Request) -> str | None:
    """Returns the answer of the first call with this id, or None. Holds the id until the transaction ends.

    Raises FieldInvalid if that call had other arguments.
    """
    if not request.request_id:
        return None
    parameters = {"request_id": request.request_id, "method": request.method}
    await conn.execute(statements.REQUEST_LOCK, parameters)
    row = await (await conn.execute(REQUEST_READ, parameters)).fetchone()
    if row is None:
        return None
    if row["arguments"] != request.digest:
        raise FieldInvalid("request_id", "was used for a call with other arguments; send a fresh UUID4")
    return str(row["response"])


async def remember(conn: Connection, request: Request, response: str) -> None:
    """Stores the answer in the same transaction as its effect."""
    if request.request_id:
        parameters = {"request_id": request.request_id, "method": request.method}
        await conn.execute(REQUEST_WRITE, {**parameters, "arguments": request.digest, "response": response})
