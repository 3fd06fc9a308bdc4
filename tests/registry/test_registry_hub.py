"""Hub downloads from a test hub on real HTTP: each fault ends in complete files or in the right reason."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from fix_hub import SHA, Fault, Hub
from fix_registry import until, write_safetensors
from headrace_chassis.errors import ServiceError
from headrace_registry.errors import DigestMismatch, HubGated, HubNotFound, HubUnavailable, ModelUnsupported, NotAllowed
from headrace_registry.hub.client import HubClient
from headrace_registry.hub.events import Event, Job
from headrace_registry.models.registration import Resolution

WEIGHTS = "model.safetensors"


def client_of(hub: Hub, **options: float) -> HubClient:
    return HubClient(hub.environment, **{"stall_s": 1.0, "backoff_s": 0.05, **options})


def job(tmp_path: Path, **fields: object) -> Job:
    values = {"repo_id": "owner/tiny", "revision": "main", "models_dir": str(tmp_path / "models"), "name": "tiny"}
    return Job(**{**values, **fields})


async def fetched(client: HubClient, wanted: Job) -> list[Event]:
    """Runs a job as the registry does: makes the folder once `resolved` names it."""
    events = []
    async with aclosing(client.fetch(wanted)) as stream:
        async for event in stream:
            if event.kind == "resolved":
                await asyncio.to_thread(Path(event.path).mkdir, parents=True, exist_ok=True)
            events.append(event)
    return events


def is_complete(hub: Hub, tmp_path: Path) -> bool:
    folder = tmp_path / "models" / f"tiny-{hub.commit[:12]}"
    names = {"config.json", "tokenizer.json", WEIGHTS}
    same = all((folder / name).read_bytes() == (hub.folder / name).read_bytes() for name in names)
    return same and {file.name for file in folder.iterdir()} == names


async def test_a_branch_is_resolved_to_a_commit_and_only_model_files_come(hub, tmp_path):
    events = await fetched(client_of(hub), job(tmp_path, token="hf_secret"))
    folder = Path(events[-1].path)

    assert [events[0].kind, events[-1].kind] == ["resolved", "done"]
    assert (events[-1].commit_sha, folder.name) == (SHA, f"tiny-{SHA[:12]}")
    assert events[-1].done_bytes == events[-1].total_bytes > 190_000
    assert is_complete(hub, tmp_path)
    assert {each.authorization for each in hub.seen} == {"Bearer hf_secret"}


async def test_a_renamed_repo_is_fetched_under_its_old_name(hub, tmp_path):
    paths = ["/api/models/{}/revision/main"]
    paths += [f"/{{}}/resolve/{SHA}/{name}" for name in ("config.json", "tokenizer.json", WEIGHTS)]
    for path in paths:
        location = {"Location": path.format("owner/tiny")}
        hub.faults.append(Fault(on=path.format("owner/old"), status=307, headers=location, times=20))
    resolved = await client_of(hub).resolve("owner/old", "main")
    events = await fetched(client_of(hub), job(tmp_path, repo_id="owner/old"))

    assert resolved == Resolution(commit_sha=SHA)
    assert events[-1].kind == "done"
    assert is_complete(hub, tmp_path)


async def test_a_commit_can_be_asked_for_alone(hub):
    assert await client_of(hub).resolve("owner/tiny", "main") == Resolution(commit_sha=SHA)
    assert await client_of(hub).resolve("owner/none", "main") == Resolution()
    offline = HubClient({**hub.environment, "HF_HUB_OFFLINE": "1"})
    assert await offline.resolve("owner/tiny", "main") == Resolution()
    assert not hub.requests(WEIGHTS)


TRANSIENT = {
    "a connection cut in the middle of the weights": Fault(on=WEIGHTS, cut_after=150_000),
    "a connection cut before the first byte": Fault(on=WEIGHTS, cut_after=0),
    "a body that is short, and says so": Fault(on=WEIGHTS, truncate_to=90_000),
    "a wrong digest of an LFS file, once": Fault(on=WEIGHTS, corrupt=True),
    "a wrong digest of a git blob, once": Fault(on="config.json", corrupt=True),
    "429 for a file": Fault(on=WEIGHTS, status=429, headers={"Retry-After": "0.1"}),
    "429 without Retry-After": Fault(on="tokenizer.json", status=429),
    "429 with a date": Fault(on=WEIGHTS, status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "429 for the listing": Fault(on="/revision/main", status=429, headers={"Retry-After": "0.1"}),
    "500 for a file": Fault(on=WEIGHTS, status=500, times=2),
    "503 for the listing": Fault(on="/revision/main", status=503, times=2),
    "408": Fault(on="config.json", status=408),
    "silence in the middle": Fault(on=WEIGHTS, stall_s=3.0),
    "416 for a range": Fault(on=WEIGHTS, status=416),
    "slow": Fault(on=WEIGHTS, drip_bytes=20_000),
}


@pytest.mark.parametrize("name", TRANSIENT)
async def test_what_passes_ends_in_complete_files(hub, tmp_path, name):
    hub.faults.append(TRANSIENT[name])
    await fetched(client_of(hub), job(tmp_path))

    assert not hub.faults
    assert is_complete(hub, tmp_path)


PERMANENT: dict[str, tuple[Fault, type[ServiceError], str, int]] = {
    "401 for the listing": (Fault(on="/revision/main", status=401, times=9), HubGated, "token", 1),
    "401 of a private repo": (
        Fault(on="/revision/main", status=401, headers={"X-Error-Code": "RepoNotFound"}, times=9),
        HubGated,
        "token",
        1,
    ),
    "403": (Fault(on=WEIGHTS, status=403, times=9), HubGated, "token", 1),
    "403 of a gated repo": (
        Fault(on=WEIGHTS, status=403, headers={"X-Error-Code": "GatedRepo"}, times=9),
        HubGated,
        "gated",
        1,
    ),
    "404 for the repo": (
        Fault(on="/revision/main", status=404, headers={"X-Error-Code": "RepoNotFound"}, times=9),
        HubNotFound,
        "owner/tiny",
        1,
    ),
    "404 for a file": (
        Fault(on=WEIGHTS, status=404, headers={"X-Error-Code": "EntryNotFound"}, times=9),
        HubNotFound,
        "check",
        1,
    ),
    "404 without a word": (Fault(on=WEIGHTS, status=404, times=9), HubNotFound, "check", 1),
    "a wrong digest each time": (Fault(on=WEIGHTS, corrupt=True, times=9), DigestMismatch, "safetensors", 2),
    "503 each time": (Fault(on=WEIGHTS, status=503, times=9), HubUnavailable, "503", 3),
    "500 for the listing each time": (Fault(on="/revision/main", status=500, times=9), HubUnavailable, "500", 3),
    "429 each time": (Fault(on=WEIGHTS, status=429, times=9), HubUnavailable, "429", 3),
    "429 for an hour": (
        Fault(on=WEIGHTS, status=429, headers={"Retry-After": "3600"}, times=9),
        HubUnavailable,
        "429",
        1,
    ),
    "cut each time before a byte": (Fault(on=WEIGHTS, cut_after=0, times=9), HubUnavailable, "again", 3),
    "silence each time": (Fault(on=WEIGHTS, stall_s=2.0, stall_after=0, times=9), HubUnavailable, "again", 3),
}


@pytest.mark.parametrize("name", PERMANENT)
async def test_what_does_not_pass_ends_with_its_reason_after_the_tries_it_deserves(hub, tmp_path, name):
    fault, error, match, n_tries = PERMANENT[name]
    hub.faults.append(fault)
    with pytest.raises(error, match=match) as caught:
        await fetched(client_of(hub, stall_s=0.5), job(tmp_path))

    assert len(hub.requests(fault.on)) == n_tries
    assert bool(caught.value.retry_after_s) == (error is HubUnavailable)
    if name == "429 for an hour":
        assert caught.value.retry_after_s == 3600


async def test_a_cut_download_goes_on_where_it_stopped(hub, tmp_path):
    size = (hub.folder / WEIGHTS).stat().st_size
    hub.faults += [Fault(on=WEIGHTS, cut_after=100_000), Fault(on=WEIGHTS, cut_after=60_000)]
    events = await fetched(client_of(hub), job(tmp_path))
    ranges = [each.range for each in hub.requests(WEIGHTS)]

    assert ranges == ["", "bytes=100000-", "bytes=160000-"]
    assert hub.served_bytes(WEIGHTS) == size
    assert [event.kind for event in events].count("waiting") == 2
    assert is_complete(hub, tmp_path)


async def test_tries_that_bring_bytes_do_not_count(hub, tmp_path):
    hub.faults.append(Fault(on=WEIGHTS, cut_after=20_000, times=8))
    await fetched(client_of(hub), job(tmp_path))

    assert len(hub.requests(WEIGHTS)) == 9
    assert is_complete(hub, tmp_path)


async def test_a_hub_without_ranges_or_etags_is_read_from_the_start(hub, tmp_path):
    hub.ranges = hub.etag = False
    hub.faults.append(Fault(on=WEIGHTS, cut_after=100_000))
    events = await fetched(client_of(hub), job(tmp_path))

    assert is_complete(hub, tmp_path)
    assert events[-1].done_bytes == events[-1].total_bytes


async def test_a_cdn_serves_the_bytes_and_never_sees_the_token(hub, tmp_path):
    hub.cdn = True
    hub.faults.append(Fault(on=f"/cdn/{WEIGHTS}", cut_after=100_000))
    await fetched(client_of(hub), job(tmp_path, token="hf_secret"))
    at_cdn = hub.requests(f"/cdn/{WEIGHTS}")

    assert is_complete(hub, tmp_path)
    assert [each.range for each in at_cdn] == ["", "bytes=100000-"]
    assert {each.authorization for each in at_cdn} == {""}
    assert {each.authorization for each in hub.requests(f"/{SHA}/{WEIGHTS}")} == {"Bearer hf_secret"}


async def test_a_gated_or_private_repo_comes_with_the_token_of_the_request_or_the_environment(hub, tmp_path):
    hub.token = "hf_right"
    with pytest.raises(HubGated, match="token"):
        await fetched(client_of(hub), job(tmp_path))
    with pytest.raises(HubGated, match="token"):
        await fetched(client_of(hub), job(tmp_path, token="hf_wrong"))
    await fetched(HubClient({**hub.environment, "HF_TOKEN": "hf_right"}), job(tmp_path))
    assert is_complete(hub, tmp_path)
    await fetched(client_of(hub), job(tmp_path, token="hf_right", name="other"))
    hub.gated = True
    with pytest.raises(HubGated, match="gated"):
        await fetched(client_of(hub), job(tmp_path, token="hf_right", name="third"))


async def test_a_killed_child_is_started_again_and_fetches_the_rest(hub, tmp_path):
    hub.held.set()
    task = asyncio.create_task(fetched(client_of(hub, stall_s=30.0), job(tmp_path)))
    await until(lambda: hub.served_bytes(WEIGHTS) == 500)
    part = tmp_path / "models" / f"tiny-{SHA[:12]}" / f".{WEIGHTS}.part"
    await until(lambda: part.exists() and part.stat().st_size == 500)
    for pid in download_children():
        os.kill(pid, signal.SIGKILL)
    hub.held.clear()
    await task

    assert [each.range for each in hub.requests(WEIGHTS)] == ["", "bytes=500-"]
    assert is_complete(hub, tmp_path)


async def test_a_child_that_hangs_is_ended_and_started_again(hub, tmp_path):
    hub.held.set()
    task = asyncio.create_task(fetched(client_of(hub, stall_s=30.0, silence_s=3.0), job(tmp_path)))
    await until(lambda: hub.served_bytes(WEIGHTS) == 500)
    hung = download_children()
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    hub.held.clear()
    await task

    assert not set(hung) & set(download_children())
    assert is_complete(hub, tmp_path)


async def test_a_child_that_dies_each_time_is_given_up(hub, tmp_path):
    broken = HubClient({**hub.environment, "PYTHONHOME": str(tmp_path)}, backoff_s=0.01)
    with pytest.raises(HubUnavailable, match="3 times") as caught:
        await fetched(broken, job(tmp_path))

    assert caught.value.retry_after_s


async def test_complete_files_are_not_fetched_again(hub, tmp_path):
    await fetched(client_of(hub), job(tmp_path))
    n_bytes = hub.served_bytes(WEIGHTS)
    events = await fetched(client_of(hub), job(tmp_path))

    assert hub.served_bytes(WEIGHTS) == n_bytes
    assert events[-1].kind == "done"


async def test_two_downloads_into_one_folder_do_not_mix(hub, tmp_path):
    hub.faults.append(Fault(on=WEIGHTS, drip_bytes=40_000))
    outcomes = await asyncio.gather(*(fetched(client_of(hub), job(tmp_path)) for _ in range(2)), return_exceptions=True)

    assert all(isinstance(outcome, list | HubUnavailable) for outcome in outcomes)
    assert any(isinstance(outcome, list) for outcome in outcomes)
    assert is_complete(hub, tmp_path)


async def test_a_link_in_the_place_of_an_unfinished_file_is_not_followed(hub, tmp_path):
    folder = tmp_path / "models" / f"tiny-{SHA[:12]}"
    folder.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / f".{WEIGHTS}.part").symlink_to(victim)
    with pytest.raises(HubUnavailable, match="can't be written"):
        await fetched(client_of(hub), job(tmp_path))

    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "a\\..\\b.json", "a/../../b.json", "nul.json", "x" * 300]
)
async def test_a_file_with_a_name_that_leads_elsewhere_is_not_fetched(hub, tmp_path, name):
    hub.extra.append(name)
    await fetched(client_of(hub), job(tmp_path))

    assert is_complete(hub, tmp_path)
    assert not hub.requests("evil.json")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("repo", "home")] == ["models"]


@pytest.mark.parametrize("name", ["runs/2024-01-01T12:00:00/events", "figure 12:30.png", "a\\..\\b.json", "\x07.txt"])
async def test_files_that_nobody_fetches_refuse_no_repo(hub, tmp_path, name):
    hub.extra.append(name)
    await fetched(client_of(hub), job(tmp_path))

    assert is_complete(hub, tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "nul.safetensors", "a:b.safetensors"])
async def test_an_index_of_weights_that_lead_elsewhere_is_refused(hub, tmp_path, name):
    (hub.folder / WEIGHTS).unlink()
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": name}}))
    hub.extra.append(name)
    with pytest.raises(ModelUnsupported, match="safetensors"):
        await fetched(client_of(hub), job(tmp_path))

    assert not (tmp_path / "models").exists()


async def test_a_quantized_repo_is_refused_before_any_weights_come(hub, tmp_path):
    config = hub.folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelUnsupported, match=r"fp8.*full weights"):
        await fetched(client_of(hub), job(tmp_path))

    assert not hub.requests(WEIGHTS)
    assert "fp8" in (await client_of(hub).resolve("owner/tiny", "main")).problem


@pytest.mark.parametrize(("weights", "match"), [(WEIGHTS, "no config.json"), ("m.gguf", "register that file")])
async def test_a_repo_without_a_config_is_refused_with_the_way_out_of_its_kind(hub, tmp_path, weights, match):
    (hub.folder / "config.json").unlink()
    (hub.folder / WEIGHTS).rename(hub.folder / weights)
    with pytest.raises(ModelUnsupported, match=match):
        await fetched(client_of(hub), job(tmp_path))

    assert not hub.requests(weights)


async def test_weights_beside_the_shards_come_along(hub, tmp_path):
    """As the prediction of further tokens, which some repos keep in a file of its own."""
    (hub.folder / WEIGHTS).rename(hub.folder / "model-00001-of-00001.safetensors")
    write_safetensors(hub.folder / "mtp.safetensors", {"mtp.weight": ("F32", (8,))})
    write_safetensors(hub.folder / "other.safetensors", {"other.weight": ("F32", (8,))})
    names = ("model-00001-of-00001.safetensors", "mtp.safetensors")
    index = {"weight_map": {"model.norm.weight": names[0], "mtp.weight": names[1]}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    events = await fetched(client_of(hub), job(tmp_path))

    found = await asyncio.to_thread(os.listdir, events[-1].path)
    assert set(found) == {*names, "model.safetensors.index.json", "config.json", "tokenizer.json"}


async def test_a_config_or_an_index_too_large_to_parse_is_refused(hub, tmp_path):
    (hub.folder / WEIGHTS).rename(hub.folder / "model-00001-of-00001.safetensors")
    # 30 MB that Python parses to more than 700 MB.
    (hub.folder / "model.safetensors.index.json").write_text('{"a": [' + "{}," * 10_400_000 + "{}]}")
    with pytest.raises(ModelUnsupported, match="memory"):
        await fetched(client_of(hub, stall_s=30.0), job(tmp_path))
    (hub.folder / "config.json").write_text(json.dumps({"padding": "x" * 5_000_000}))
    with pytest.raises(ModelUnsupported, match=r"config.json of owner/tiny is larger than 4194304 bytes"):
        await fetched(client_of(hub), job(tmp_path))


async def test_a_damaged_index_is_read_again(hub, tmp_path):
    (hub.folder / WEIGHTS).rename(hub.folder / "model-00001-of-00001.safetensors")
    index = hub.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}))
    hub.faults.append(Fault(on=index.name, corrupt=True))
    events = await fetched(client_of(hub), job(tmp_path))

    assert events[-1].kind == "done"


async def test_a_hub_that_names_no_commit_is_no_hub(hub, tmp_path):
    hub.commit = "../../../../etc/cron.d/evil"
    with pytest.raises(HubUnavailable, match="HF_ENDPOINT"):
        await fetched(client_of(hub), job(tmp_path))


async def test_an_answer_that_is_none_of_a_hub_is_not_told_as_a_hub_out_of_reach(hub, tmp_path):
    hub.faults.append(Fault(on="/revision/main", status=200))
    with pytest.raises(HubUnavailable, match=r"answer.*can't be read.*HF_ENDPOINT"):
        await fetched(client_of(hub), job(tmp_path))


async def test_an_unknown_revision_is_told_apart(hub, tmp_path):
    with pytest.raises(HubNotFound, match="nowhere"):
        await fetched(client_of(hub), job(tmp_path, revision="nowhere"))
    with pytest.raises(HubNotFound, match="owner/other"):
        await fetched(client_of(hub), job(tmp_path, repo_id="owner/other"))


async def test_a_hub_that_is_down_or_switched_off_is_unavailable(hub, tmp_path):
    down = {**hub.environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    with pytest.raises(HubUnavailable) as caught:
        await fetched(HubClient(down, backoff_s=0.05), job(tmp_path))
    assert caught.value.retry_after_s
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        await fetched(HubClient({**hub.environment, "HF_HUB_OFFLINE": "1"}), job(tmp_path))


async def test_only_safetensors_are_fetched_unless_an_operator_allows_pickles(hub, tmp_path):
    (hub.folder / "pytorch_model.bin").write_bytes(b"p" * 5000)
    events = await fetched(client_of(hub), job(tmp_path))
    assert not events[-1].pickled
    assert not hub.requests("pytorch_model.bin")
    (hub.folder / WEIGHTS).unlink()
    with pytest.raises(NotAllowed, match="--allow-pickle owner/tiny"):
        await fetched(client_of(hub), job(tmp_path, name="second"))
    assert not hub.requests("pytorch_model.bin")
    allowed = await fetched(client_of(hub), job(tmp_path, name="third", allow_pickle=True))
    assert allowed[-1].pickled
    assert (Path(allowed[-1].path) / "pytorch_model.bin").stat().st_size == 5000


async def test_a_repo_without_weights_is_unsupported_and_code_comes_only_when_trusted(hub, tmp_path):
    (hub.folder / "modeling_tiny.py").write_text("raise SystemExit")
    await fetched(client_of(hub), job(tmp_path))
    assert not hub.requests("modeling_tiny.py")
    await fetched(client_of(hub), job(tmp_path, name="other", with_code=True))
    assert hub.requests("modeling_tiny.py")
    (hub.folder / WEIGHTS).unlink()
    with pytest.raises(ModelUnsupported, match="save_pretrained"):
        await fetched(client_of(hub), job(tmp_path, name="third"))


async def test_one_copy_of_the_weights_is_enough(hub, tmp_path):
    for name in ("consolidated.safetensors", "model-00001-of-00002.safetensors"):
        (hub.folder / name).write_bytes(b"x" * 3000)
    await fetched(client_of(hub), job(tmp_path))

    assert is_complete(hub, tmp_path)


def download_children() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if c.status() != psutil.STATUS_ZOMBIE and "hub.download" in " ".join(c.cmdline())]
