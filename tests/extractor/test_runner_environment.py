"""The environment variables of a runner's process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace_extractor.node.runner_process import RunnerProcess


@pytest.mark.parametrize(
    ("set_by_the_user", "given"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
async def test_a_runner_asks_for_large_pages_unless_the_environment_has_a_say(
    set_by_the_user: str | None, given: str, tmp_path: Path
) -> None:
    environment = {"FOUND": str(tmp_path / "found")} | ({"GLIBC_TUNABLES": set_by_the_user} if set_by_the_user else {})

    runner = await RunnerProcess.start(
        environment=environment, command=("/bin/sh", "-c", 'printf %s "$GLIBC_TUNABLES" >"$FOUND"')
    )
    async with asyncio.timeout(30):
        await runner.wait()
    await runner.kill()

    assert (tmp_path / "found").read_text() == given
