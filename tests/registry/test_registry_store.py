"""The model store: files out of use are evicted, least recently used first; names from outside stay inside."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fix_hub import SHA, Hub
from fix_postgres import RegistryStubs, running_registry
from fix_registry import FakeNode, acquire, cpu, until, until_state
from headrace.registry.v1 import model_pb2
from headrace.registry.v1 import model_service_pb2 as pb
from headrace_registry.errors import DiskFull
from headrace_registry.inputs import unsafe_name
from headrace_registry.models.eviction import StoredFolder, plan_eviction
from headrace_registry.models.folders import ModelFolders


def plan(folders: list[StoredFolder], sizes: dict[str, int], total: int, **limits: int) -> list[str]:
    limits = {"quota_bytes": 100, "free_bytes": 1000, **limits}
    return [each.path for each in plan_eviction(folders, sizes, target="new", total_bytes=total, **limits)]


def test_nothing_goes_while_there_is_room():
    assert plan([StoredFolder(path="a", models=("a",))], {"a": 60}, 40) == []


def test_the_least_recently_used_goes_first_and_no_more_than_needed():
    folders = [StoredFolder(path=name, models=(name,), last_used=at) for name, at in (("a", 3), ("b", 1), ("c", 2))]

    assert plan(folders, {"a": 30, "b": 30, "c": 30}, 20) == ["b"]
    assert plan(folders, {"a": 30, "b": 30, "c": 30}, 45) == ["b", "c"]


def test_what_nobody_can_load_goes_before_what_somebody_can():
    folders = [StoredFolder(path="a", models=("a",), last_used=1), StoredFolder(path="partial", last_used=9)]

    assert plan(folders, {"a": 50, "partial": 50}, 10) == ["partial"]


def test_what_is_in_use_never_goes_and_the_refusal_names_bytes():
    folders = [
        StoredFolder(path="a", models=("a",), in_use=True),
        StoredFolder(path="b", models=("b",)),
    ]
    with pytest.raises(DiskFull) as caught:
        plan(folders, {"a": 60, "b": 40}, 50)

    assert caught.value.metadata == {"required_bytes": "50", "free_bytes": "40"}
    assert "--models-quota-bytes" in caught.value.message


def test_bytes_that_came_already_and_bytes_promised_to_others_count():
    promised = StoredFolder(path="other", reserved_bytes=70, in_use=True)
    sizes = {"new": 25, "other": 30}

    assert plan([promised], sizes, 30) == []
    with pytest.raises(DiskFull, match="31 more bytes"):
        plan([promised], sizes, 56)


def test_the_disk_itself_is_a_limit():
    folders = [StoredFolder(path="a", models=("a",))]

    assert plan(folders, {"a": 30}, 60, free_bytes=40) == ["a"]
    with pytest.raises(DiskFull, match="free on the disk"):
        plan(folders, {"a": 30}, 69, free_bytes=30)


def test_files_that_are_complete_need_nothing_even_over_quota():
    assert plan([StoredFolder(path="a", models=("a",))], {"a": 90, "new": 40}, 40) == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans(), st.floats(0, 9)), max_size=8),
    st.integers(1, 150),
    st.integers(0, 200),
)
def test_a_plan_fits_takes_nothing_in_use_and_nothing_needless(stored, total, free):
    folders = [
        StoredFolder(path=str(i), models=(str(i),), in_use=used, last_used=at) for i, (_, used, at) in enumerate(stored)
    ]
    sizes = {str(i): size for i, (size, _, _) in enumerate(stored)}
    idle = sum(size for size, used, _ in stored if not used)
    needed = max(sum(sizes.values()) + total - 100, total - free)
    try:
        victims = plan(folders, sizes, total, free_bytes=free)
    except DiskFull:
        assert needed > idle
        return
    freed = [sizes[path] for path in victims]
    assert all(not folders[int(path)].in_use for path in victims)
    assert sum(freed) >= needed
    assert not freed or sum(freed[:-1]) < needed


NAME_PARTS = st.one_of(
    st.sampled_from(["..", ".", "", "con", "NUL.json", "a\\b", "C:", "x" * 300, "\x00", "model.safetensors", ".part"]),
    st.text(max_size=20),
)


@given(st.lists(NAME_PARTS, min_size=1, max_size=5).map("/".join))
def test_a_name_that_passes_stays_in_its_folder_and_can_be_made(name):
    if unsafe_name(name):
        return
    root = Path("/store/tiny-0123456789ab")
    joined = os.path.normpath(os.path.join(root, name))  # noqa: PTH118 - as systems join, not as pathlib does.

    assert joined.startswith(f"{root}/")
    assert Path(joined).relative_to(root).as_posix() == name
    assert all(len(f".{part}.part".encode()) <= 255 for part in name.split("/"))


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "onnx/model.onnx", "a b+c.txt"])
def test_ordinary_names_pass(name):
    assert unsafe_name(name) == ""


@pytest.mark.parametrize("name", [None, "", "/etc/passwd", "a/", "../a", "a/../b", "aux.txt", "a:b", "a\nb", "\ud800"])
def test_others_do_not(name):
    assert unsafe_name(name)


def test_a_store_owns_only_folders_right_below_it(tmp_path):
    folders = ModelFolders(tmp_path)
    inside = str(folders.root / f"tiny-{SHA[:12]}")

    assert folders.owns(inside)
    for path in (
        str(folders.root),
        "/etc",
        f"{inside}/config.json",
        f"{folders.root}/../tiny-{SHA[:12]}",
        f"{inside}/",
        f"{folders.root}/my-own-models",
        f"{folders.root}/.tiny-{SHA[:12]}.partial",
        "",
    ):
        assert not folders.owns(path)


def test_a_link_in_the_store_is_neither_filled_nor_followed(tmp_path):
    folders = ModelFolders(tmp_path / "store")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x" * 1000)
    path = folders.root / f"tiny-{SHA[:12]}"
    folders.root.mkdir()
    path.symlink_to(outside)

    with pytest.raises(OSError, match="link"):
        folders.make(str(path))
    assert folders.sizes()[str(path)] == 0
    folders.discard(str(path))
    assert folders.empty_trash() == 1
    assert (outside / "precious").exists()
    assert not path.is_symlink()


def partial_of(path: Path, attempt: str) -> Path:
    """Makes the partial folder of an old attempt to make `path`."""
    left = path.with_name(f".{path.name}.{attempt}.partial")
    files = left / path.name
    files.mkdir(parents=True)
    (files / "model.safetensors").write_bytes(bytes(100))
    for each in (files / "model.safetensors", files, left):
        os.utime(each, (0, 0))
    return left


def test_what_all_attempts_left_of_a_folder_goes_with_it(tmp_path):
    folders = ModelFolders(tmp_path)
    path, other = folders.root / f"tiny-{SHA[:12]}", folders.root / f"tiny-{SHA[:12]}-int8"
    partial_of(path, "01234567")
    partial_of(path, "89abcdef")
    kept = partial_of(other, "01234567")
    folders.discard(str(path))

    assert folders.empty_trash() == 2
    assert list(tmp_path.iterdir()) == [kept]


def test_leftovers_go_when_nobody_wants_their_folder_and_nothing_was_written_for_long(tmp_path):
    folders = ModelFolders(tmp_path)
    path, wanted = folders.root / f"tiny-{SHA[:12]}", folders.root / f"tiny-{SHA[:12]}-int8"
    partial_of(path, "01234567")
    at_work, in_line = partial_of(path, "89abcdef"), partial_of(wanted, "01234567")
    now = time.time()
    os.utime(at_work / path.name / "model.safetensors", (now, now))
    (tmp_path / ".notes.partial").mkdir()
    os.utime(tmp_path / ".notes.partial", (0, 0))
    folders.discard_leftovers([str(wanted)], untouched_s=3600)

    assert folders.empty_trash() == 1
    assert set(tmp_path.iterdir()) == {at_work, in_line, tmp_path / ".notes.partial"}


async def test_the_registry_removes_what_killed_builds_left(database_url, tmp_path):
    root = tmp_path / "data" / "models"
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    async with running_registry(database_url, tmp_path / "data", roots=(tmp_path,)) as registry:
        source = model_pb2.ModelSource(gguf=model_pb2.GgufSource(path=str(gguf)))
        model = model_pb2.Model(id="m", source=source)
        await registry.stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)
        await registry.stubs.models.PrepareModel(pb.PrepareModelRequest(model_id="m"), timeout=20)
        watch = registry.stubs.models.WatchModel(pb.WatchModelRequest(model_id="m", after_seq=1), timeout=20)
        event = await anext(event async for event in watch if event.message.startswith("waits for a node"))
        watch.cancel()
    wanted = partial_of(root / f"m-{event.model.commit_sha[7:19]}", "01234567")
    partial_of(root / f"gone-{SHA[:12]}", "01234567")
    async with running_registry(database_url, tmp_path / "data", roots=(tmp_path,)):
        await until(lambda: folder_names(tmp_path / "data") == {wanted.name})


async def prepared(stubs: RegistryStubs, model_id: str, *, revision: str = "main") -> model_pb2.Model:
    await register(stubs, model_id, revision=revision)
    await stubs.models.PrepareModel(pb.PrepareModelRequest(model_id=model_id), timeout=20)
    return await until_state(stubs, model_id, model_pb2.MODEL_STATE_READY, timeout_s=40)


async def register(stubs: RegistryStubs, model_id: str, *, revision: str = "main") -> model_pb2.Model:
    source = model_pb2.ModelSource(hub=model_pb2.HubSource(repo_id="owner/tiny", revision=revision))
    model = model_pb2.Model(id=model_id, source=source)
    return (await stubs.models.RegisterModel(pb.RegisterModelRequest(model=model), timeout=20)).model


async def get(stubs: RegistryStubs, model_id: str) -> model_pb2.Model:
    return (await stubs.models.GetModel(pb.GetModelRequest(model_id=model_id), timeout=20)).model


async def failed(stubs: RegistryStubs, model_id: str) -> model_pb2.Failure:
    await stubs.models.PrepareModel(pb.PrepareModelRequest(model_id=model_id), timeout=20)
    async for event in stubs.models.WatchModel(pb.WatchModelRequest(model_id=model_id), timeout=40):
        if event.model.state == model_pb2.MODEL_STATE_FAILED:
            return event.model.failure
    raise AssertionError("the watch ended")


def folder_names(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "models").iterdir()}


async def test_the_quota_takes_the_least_recently_used_and_says_so(hub: Hub, database_url, tmp_path):
    data_dir = tmp_path / "data"
    async with running_registry(
        database_url, data_dir, environment=hub.environment, models_quota_bytes=450_000
    ) as registry:
        stubs = registry.stubs
        first = await prepared(stubs, "first")
        await prepared(stubs, "second")
        await prepared(stubs, "third")
        gone, kept = await get(stubs, "first"), await get(stubs, "second")
        events = [event.message async for event in first_events(stubs, "first") if "room" in event.message]
        names = folder_names(data_dir)
        again = await prepared_again(stubs, "first")

    assert first.store_bytes == sum(f.stat().st_size for f in hub.folder.iterdir() if f.suffix != ".md")
    assert first.HasField("last_used_time")
    assert (gone.state, gone.files_path, gone.store_bytes) == (model_pb2.MODEL_STATE_REGISTERED, "", 0)
    assert gone.commit_sha == SHA
    assert events == ["files removed to make room for third"]
    assert kept.state == model_pb2.MODEL_STATE_READY
    assert names == {f"second-{SHA[:12]}", f"third-{SHA[:12]}"}
    assert again.files_path == first.files_path


async def first_events(stubs: RegistryStubs, model_id: str):
    call = stubs.models.WatchModel(pb.WatchModelRequest(model_id=model_id, after_seq=1), timeout=20)
    last = (await get(stubs, model_id)).update_time
    async for event in call:
        yield event
        if event.time == last and not event.snapshot:
            call.cancel()
            return


async def prepared_again(stubs: RegistryStubs, model_id: str) -> model_pb2.Model:
    await stubs.models.PrepareModel(pb.PrepareModelRequest(model_id=model_id), timeout=20)
    return await until_state(stubs, model_id, model_pb2.MODEL_STATE_READY, timeout_s=40)


async def test_a_model_in_use_is_never_taken(hub: Hub, database_url, tmp_path):
    async with running_registry(
        database_url, tmp_path / "data", environment=hub.environment, models_quota_bytes=450_000
    ) as registry:
        stubs = registry.stubs
        node = FakeNode(stubs, "node-a", [cpu()])
        node.load_gate.set()
        await node.start()
        await prepared(stubs, "used")
        await acquire(stubs, "used")
        await prepared(stubs, "idle")
        await prepared(stubs, "third")
        used, idle = await get(stubs, "used"), await get(stubs, "idle")
        await acquire(stubs, "third")
        await register(stubs, "fourth")
        refusal = await failed(stubs, "fourth")
        await until(lambda: last_use_is_noted(stubs))
        await node.stop()

    assert used.state == model_pb2.MODEL_STATE_READY
    assert idle.state == model_pb2.MODEL_STATE_REGISTERED
    assert refusal.reason == "DISK_FULL"
    assert "quota of 450000 bytes" in refusal.message


async def last_use_is_noted(stubs: RegistryStubs) -> bool:
    model = await get(stubs, "third")
    return model.last_used_time.ToNanoseconds() > model.update_time.ToNanoseconds()


async def test_deleting_removes_the_files_in_the_store_and_no_others(hub: Hub, database_url, tmp_path):
    data_dir = tmp_path / "data"
    async with running_registry(database_url, data_dir, roots=(tmp_path,), environment=hub.environment) as registry:
        stubs = registry.stubs
        await prepared(stubs, "hubbed")
        source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path=str(hub.folder)))
        local = model_pb2.Model(id="local", source=source)
        await stubs.models.RegisterModel(pb.RegisterModelRequest(model=local), timeout=20)
        in_place = await prepared_again(stubs, "local")
        (data_dir / "models" / "notes-of-a-person").mkdir()
        for model_id in ("hubbed", "local"):
            await stubs.models.DeleteModel(pb.DeleteModelRequest(model_id=model_id), timeout=20)
        await until(lambda: folder_names(data_dir) == {"notes-of-a-person"})

    assert in_place.store_bytes == 0
    assert (hub.folder / "model.safetensors").exists()


async def test_files_another_model_loads_from_stay(hub: Hub, database_url, tmp_path):
    data_dir = tmp_path / "data"
    async with running_registry(database_url, data_dir, roots=(data_dir,), environment=hub.environment) as registry:
        stubs = registry.stubs
        owner = await prepared(stubs, "owner")
        source = model_pb2.ModelSource(folder=model_pb2.FolderSource(path=owner.files_path))
        await stubs.models.RegisterModel(
            pb.RegisterModelRequest(model=model_pb2.Model(id="guest", source=source)), timeout=20
        )
        guest = await prepared_again(stubs, "guest")
        await stubs.models.DeleteModel(pb.DeleteModelRequest(model_id="owner"), timeout=20)
        await prepared(stubs, "other")  # The files are removed before this preparation ends.
        names = folder_names(data_dir)
        await stubs.models.DeleteModel(pb.DeleteModelRequest(model_id="guest"), timeout=20)
        await until(lambda: folder_names(data_dir) == {f"other-{SHA[:12]}"})

    assert guest.files_path == owner.files_path
    assert names == {f"owner-{SHA[:12]}", f"other-{SHA[:12]}"}
