import re
from pathlib import Path

import pytest

from fix_system import MODEL, TOKEN, texts

ROOT = Path(__file__).parents[2]


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def extraction(system):
    system.client.corpora.upload("pydoc-topics", documents=texts(300, seed=77))
    started = system.client.extractions.start(MODEL, "pydoc-topics", ["blocks.1.hook_resid_post"])
    return system.client.extractions.wait(started.id, deadline_s=50)


def test_the_readme_session_runs(system, extraction, capsys):
    [block] = python_blocks("README.md")
    for ours, theirs in {
        '"127.0.0.1:7470"': f'"{system.registry.address}", token="{TOKEN}"',
        "smollm2-135m": MODEL,
        "blocks.14.": "blocks.1.",
    }.items():
        assert ours in block
        block = block.replace(ours, theirs)

    exec(block, {})

    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(str(extraction.n_rows))


def test_the_reading_session_runs(system, extraction):
    [block] = python_blocks("docs/reading.md")
    for ours, theirs in {"blocks.14.": "blocks.1.", "batch_size=4096": "batch_size=64"}.items():
        assert ours in block
        block = block.replace(ours, theirs)
    steps = []
    names = {"client": system.client, "extraction": extraction, "rank": 0, "world": 1, "step": steps.append}

    exec(block, names)

    assert len(steps) == 3 * (extraction.n_rows // 64)
    assert names["checkpoint"]["epoch"] == 2


def test_the_session_about_recipes_runs(system):
    [block] = python_blocks("docs/recipes.md")
    for ours, theirs in {"smollm2-135m": MODEL, "blocks.14.": "blocks.1."}.items():
        assert ours in block
        block = block.replace(ours, theirs)
    names = {"client": system.client}

    exec(block, names)

    documents = system.client.corpora.get("both").n_documents
    assert system.client.extractions.wait(names["extraction"].id, deadline_s=50).n_rows == documents


def test_the_set_is_read_as_the_format_says(extraction):
    [block] = python_blocks("docs/format.md")
    assert "blocks.14.hook_resid_post" in block
    names = {"path_of_a_set": extraction.path}

    exec(block.replace("blocks.14.", "blocks.1."), names)

    assert len(names["rows"]["blocks.1.hook_resid_post"]) == names["segment"]["rows"]


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"),
        *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / page).read_text())

    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]

    assert missing == []


def test_the_session_about_trainers_runs(system, sae_lens, one_thread):
    [block] = python_blocks("docs/trainers.md")
    for ours, theirs in {"40_960": "640", "4096": "64"}.items():
        assert ours in block
        block = block.replace(ours, theirs)
    system.client.corpora.upload("for-trainers", documents=texts(60, seed=78))
    wanted = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]
    started = system.client.extractions.start(MODEL, "for-trainers", wanted)
    extraction = system.client.extractions.wait(started.id, deadline_s=50)
    names = {"client": system.client, "extraction": extraction, "names": extraction.hookpoints}

    exec(block, names)

    assert names["trainer"].n_training_samples == 640
    assert sorted(names["saes"]) == sorted(wanted)
    assert extraction.receipt.n_rows > 0
    assert extraction.receipt.worst.max_relative_error < 0.005
