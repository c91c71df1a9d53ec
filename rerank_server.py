#!/usr/bin/env python3
"""Rerank server: which of these passages answers the query?

The promise: `POST /rerank {"query": str, "passages": [str], "use_llm": bool}` answers a JSON array
of floats between 0 and 1, one for each passage in the order given, and each float is what the
model's own code would have computed, up to the error of the quantisation. What cannot be scored is
an error, never a number. Other clients' words are understood too (CONTRACTS), other endpoints are
in ENDPOINTS, and `python rerank_server.py --check FILE` says what the server thinks of a file.

One request, from socket to floats:

    HTTP thread        RerankHandler.handle_one_request -> RerankRequest.parse -> Application.rank
                       -> Queue.admit -> pairs_of (text to token ids) -> ScoreCache -> Queue.append
                       -> waits for its job, watching the client
    scheduler thread   Queue.next_batch (the next job's turn) -> Engine.score (one llama.cpp decode)
                       -> Queue.finish
    HTTP thread        score_of (sigmoid; NaN refused) -> the contract's writer -> JSON

Only a model's one scheduler thread touches its llama context, so no lock guards it. Tokenising is
safe from any thread (llama.h).

The file is in the order in which the data flows. Lengths are in tokens and times in seconds unless
a name says otherwise. For what a client does wrong a RequestError is raised, for a file a
ModelError, for a flag a SettingsError. Any thread may call anything, but an engine belongs to its
scheduler's thread.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import hmac
import http
import http.client
import http.server
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import os
import platform
import re
import resource
import select
import signal
import socket
import socketserver
import ssl
import string
import struct
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import prometheus_client

__version__ = "0.1.0"

log = logging.getLogger("rerank")
T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]
HERE = Path(__file__).resolve().parent

# ------------------------------
# Settings and the machine

MIN_MAX_LENGTH_TOKENS = 32  # below it the reference's 3/4 rule leaves the passage no room
MAX_MAX_LENGTH_TOKENS = 8192  # bge-reranker-v2-m3 and Gemma 1 were both built for 8,192
CPU_UBATCH_TOKENS = 256  # attention is computed over a whole ubatch: pairs pay for each other
GPU_UBATCH_TOKENS = 2048  # bench/results/gpu-nvidia-h200.md
AUTO, ON, OFF = "auto", "on", "off"
INT8, BF16 = "int8", "bf16"
MODEL_COMMANDS = {"m3": "make convert MODEL=m3", "gemma": "make convert MODEL=gemma"}


class SettingsError(Exception):
    """The message names the flag or the environment variable."""


def _setting(default: Any, help: str, *allowed: Any) -> Any:
    """allowed: the smallest and the largest number, or the words."""
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass(frozen=True)
class Settings:
    """Raises SettingsError for a value out of its range or a combination that cannot work."""

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", 0, 65535)
    m3: Path | None = _setting(None, "GGUF file for the m3 role; default: found in --models")
    gemma: Path | None = _setting(None, "GGUF file for the gemma role; default: found in --models")
    models: str = _setting(
        str(HERE / "models"),
        f"folders with GGUF files, with {os.pathsep} between them; earlier ones go first")
    max_length: int = _setting(
        1024, "longest pair in tokens; longer ones are truncated as the reference does",
        MIN_MAX_LENGTH_TOKENS, MAX_MAX_LENGTH_TOKENS)
    threads: int = _setting(
        0, "threads that compute; 0: one for each physical core that it may use", 0, 1024)
    ubatch: int = _setting(
        0, "tokens packed into one decode (a longer pair gets its own); 0: what suits the machine",
        0, 8192)
    accel: str = _setting(
        AUTO, "the engine that `make accel` builds. int8: fastest, a little less exact than the "
        "file; bf16: as exact as the file, half as fast; off: llama.cpp's own kernels; auto: int8 "
        "for weights of fewer than 8 bits, bf16 for others, where the CPU and the memory suit; "
        "on: int8", AUTO, INT8, BF16, OFF, ON)
    gpu_layers: int = _setting(
        0, "layers on the GPU, with a GPU build of llama-cpp-python; -1: all", -1, 1000)
    max_body_mb: int = _setting(32, "largest request body, in MB", 1, 1024)
    max_bodies_mb: int = _setting(
        128, "request bodies in memory at once, in MB; beyond it 503", 1, 65536)
    max_queue_tokens: int = _setting(
        1_000_000, "tokens that may wait for a model; beyond it 429. One request counts for at "
        "most half of it", 1000, 1_000_000_000)
    max_timeout_s: int = _setting(
        3600, "seconds that a request may take, unless it sets fewer; then 504", 1, 86400)
    max_connections: int = _setting(
        512, "connections at once, each with a thread; others wait", 1, 65536)
    header_timeout_s: int = _setting(
        10, "seconds in which a request's header must have arrived", 1, 3600)
    body_timeout_s: int = _setting(
        30, "seconds for a body to arrive, and 1 more for each 10 kB of it", 1, 3600)
    keep_alive_s: int = _setting(
        95, "seconds that a connection may be idle between two requests", 1, 3600)
    cache_mb: int = _setting(
        8, "memory for scores of pairs seen before, in MB; 0: none", 0, 65536)
    drain_s: int = _setting(
        30, "seconds that a stopping server gives to the requests in flight", 0, 3600)
    api_key: str = _setting(
        "", "clients must send it as `Authorization: Bearer KEY` (not for /health)")
    api_key_file: Path | None = _setting(
        None, "file with such keys, one a line; lines that begin with # are comments")
    cors_origins: str = _setting(
        "", "origins whose pages may ask, with commas between them; *: all; empty: none")
    tls_cert: Path | None = _setting(
        None, "PEM file with the certificate (and its chain): serves https")
    tls_key: Path | None = _setting(
        None, "PEM file with the certificate's private key, not encrypted")
    strict_model: bool = _setting(
        False, "answer 404 to an unknown model name instead of taking the default model")
    log_format: str = _setting(
        "text", "how the log is written: a line of text, or of JSON", "text", "json")
    log_texts: bool = _setting(False, "write each request's query and passages into the log")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_setting(field, getattr(self, field.name))
        if 0 < self.ubatch < 32:
            raise SettingsError("--ubatch must be 0 or at least 32")
        if self.max_bodies_mb < self.max_body_mb:
            raise SettingsError("--max-bodies-mb must have room for one --max-body-mb")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key go together")

    @property
    def model_folders(self) -> list[Path]:
        return [Path(folder) for folder in self.models.split(os.pathsep) if folder]

    @functools.cached_property
    def tuning(self) -> Tuning:
        return Tuning.of(self)


def _check_setting(field: dataclasses.Field[Any], value: Any) -> None:
    flag, allowed = flag_of(field.name), field.metadata["allowed"]
    if isinstance(value, Path) and not value.is_file():
        raise SettingsError(f"{flag}: there is no file {value}")
    if allowed and isinstance(field.default, int):
        low, high = allowed
        if not low <= value <= high:
            raise SettingsError(f"{flag} must be between {low} and {high}, not {value}")
    elif allowed and value not in allowed:
        raise SettingsError(f"{flag} must be {', '.join(allowed)}, not {value!r}")


def environment_variable_of(name: str) -> str:
    return "RERANK_" + name.upper()


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def settings_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerank_server.py",
        description="Serve GGUF rerankers: POST /rerank {query, passages, use_llm}.",
        epilog="A flag wins over its environment variable: --max-length is RERANK_MAX_LENGTH.")
    for field in dataclasses.fields(Settings):
        kind: dict[str, Any] = {"metavar": field.name.upper()}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        help = f"{field.metadata['help']} (default: {field.default})"
        parser.add_argument(flag_of(field.name), default=None, help=help, **kind)
    parser.add_argument(
        "--check", type=Path, metavar="FILE",
        help="check one GGUF file as the server would, and exit")
    parser.add_argument(
        "--pairs", metavar="JSONL",
        help="with --check: score its {query, passage} lines and show their tokens (-: stdin)")
    parser.add_argument("--version", action="version", version=f"rerank-server {__version__}")
    return parser


def read_settings(arguments: argparse.Namespace, environment: dict[str, str]) -> Settings:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        given, source = getattr(arguments, field.name), flag_of(field.name)
        if given is None:
            source = environment_variable_of(field.name)
            given = environment.get(source) or None
        if given is not None:
            values[field.name] = _parse_setting(field.default, given, source)
    return Settings(**values)


def _parse_setting(default: Any, given: str | bool, source: str) -> Any:
    if isinstance(given, bool):
        return given
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[given.lower()]
        if isinstance(default, int):
            return int(given)
    except (KeyError, ValueError):
        wanted = "true or false" if isinstance(default, bool) else "a whole number"
        raise SettingsError(f"{source} must be {wanted}, not {given!r}") from None
    return given if isinstance(default, str) else Path(given)


@dataclass(frozen=True)
class Tuning:
    """How this machine computes best, where a setting does not say (bench/results/settings.md)."""

    threads: int
    ubatch: int  # tokens
    repack: bool  # on x86 the tiled kernels beat the repacked ones, which also copy the weights
    accel_reason: str  # why the engine of accel/ is not used; empty: it is

    @staticmethod
    def of(settings: Settings) -> Tuning:
        """Loads llama.cpp. Raises SettingsError where --accel cannot be had as it is asked for."""
        on_gpu = settings.gpu_layers != 0 and llama().llama_supports_gpu_offload()
        is_arm = platform.machine().lower() in ("arm64", "aarch64")
        return Tuning(
            settings.threads or usable_cores(),
            settings.ubatch or (GPU_UBATCH_TOKENS if on_gpu else CPU_UBATCH_TOKENS),
            is_arm and not on_gpu, _why_no_accel(settings, on_gpu))

    def __str__(self) -> str:
        accel = f"off ({self.accel_reason})" if self.accel_reason else ON
        decodes = f"decodes of up to {self.ubatch} tokens"
        return f"{self.threads} threads, {decodes}, accel engine {accel}"


def _why_no_accel(settings: Settings, on_gpu: bool) -> str:
    if settings.accel == OFF:
        return "as --accel says"
    reason = "the GPU computes" if on_gpu else load_accel(ACCEL_LIBRARY)[1]
    if not reason and settings.accel == BF16 and not accel_has_bf16():
        reason = "this CPU does not multiply bfloat16"
    if reason and settings.accel != AUTO:
        raise SettingsError(f"--accel {settings.accel}: {reason}")
    return reason


def usable_cores() -> int:
    """Physical ones (two threads of one core share its multipliers), by affinity mask and the CPU
    quota of the cgroup (docker run --cpus)."""
    has_mask = hasattr(os, "sched_getaffinity")
    cpus = os.sched_getaffinity(0) if has_mask else range(os.cpu_count() or 1)
    cores = {_read(Path(f"{CPUS}{cpu}/topology/thread_siblings_list")) or cpu for cpu in cpus}
    return int(max(1, min(len(cores), _cgroup_cpus(CGROUPS))))


CPUS, CGROUPS = "/sys/devices/system/cpu/cpu", Path("/sys/fs/cgroup")


def _read(path: Path) -> str:
    """Empty where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _cgroup_folders(root: Path) -> list[Path]:
    """From this process's group up to the root (cgroup v2)."""
    group = _read(Path("/proc/self/cgroup")).rpartition("::")[2].strip("/")
    return [folder for folder in (root / group / "x").parents if folder.is_relative_to(root)]


def _cgroup_cpus(root: Path) -> float:
    quotas = [_read(folder / "cpu.max").split() for folder in _cgroup_folders(root)]
    given = [int(quota[0]) / int(quota[1]) for quota in quotas if quota and quota[0] != "max"]
    return max(1.0, min(given, default=math.inf))


def available_bytes() -> float:
    """Of the machine and within the cgroups' limits. Pages of files count as free: the kernel can
    drop them."""
    free = [_number_in(Path("/proc/meminfo"), "MemAvailable:") * 1024 or math.inf]
    for folder in _cgroup_folders(CGROUPS):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit() and used:
            pages = _number_in(folder / "memory.stat", "inactive_file")
            free.append(int(limit) - int(used) + pages)
    return min(free)


def _number_in(path: Path, name: str) -> int:
    """What stands behind a name; 0 where there is none."""
    found = re.search(rf"^{name}\s+(\d+)", _read(path), re.MULTILINE)
    return int(found[1]) if found else 0


def resident_bytes() -> int:
    return _number_in(Path("/proc/self/status"), "VmRSS:") * 1024


# ------------------------------
# Errors. RequestError is what a client is told; each type carries its status and error_type.


class RequestError(Exception):
    """One may answer several requests: nothing changes it. param: the field that is wrong."""

    status, error_type = 500, "internal_error"

    def __init__(
        self, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.headers = message, param, headers or {}

    def body(self, is_text: bool = False) -> dict[str, Any]:
        """For every family of clients: `error.message`, `message` (Cohere), `detail` (Jina).
        is_text: `error` is a string, as TEI's and Weaviate's clients need it."""
        text, kind = self.message, self.error_type
        error: dict[str, Any] = {"message": text, "type": kind, "code": self.status}
        if self.param is not None:
            error["param"] = self.param
        shown = text if is_text else error
        return {"error": shown, "error_type": kind, "message": text, "detail": text}


class BadRequestError(RequestError):
    status, error_type = 400, "invalid_request"


class ModelNotFoundError(RequestError):  # with --strict-model
    status, error_type = 404, "model_not_found"


class HttpError(RequestError):
    """What arrived is not HTTP/1.1, leaves a doubt, or is not allowed."""

    def __init__(
        self, message: str, status: int = 400, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message, headers=headers)
        self.status = status
        self.error_type = HTTP_ERROR_TYPES.get(status, "invalid_http")


HTTP_ERROR_TYPES = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed",
                    411: "length_required", 413: "payload_too_large"}


class OverloadedError(RequestError):
    status, error_type = 429, "overloaded"

    def __init__(self, n_tokens: int, retry_after_s: int) -> None:
        message = f"{n_tokens:,} tokens wait to be scored; try again in {retry_after_s} s"
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class ClientGoneError(RequestError):  # never sent
    status, error_type = 499, "client_gone"

    def __init__(self) -> None:
        super().__init__("the client has closed its connection")


class EngineError(RequestError):  # scoring failed: an exception, or a logit that is not a number
    status, error_type = 500, "engine_error"


class UnavailableError(RequestError):  # no model for this role, or the server is stopping
    status, error_type = 503, "model_unavailable"


class BusyError(RequestError):  # no room for another connection or body
    status, error_type = 503, "overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; try again later", headers={"Retry-After": "1"})


class DeadlineError(RequestError):
    status, error_type = 504, "deadline_exceeded"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the request was not done within its {timeout_s:,.3g} s")


class ModelError(Exception):
    """Of a GGUF file: one line that says what is wrong and how to get a right one."""


# ------------------------------
# Request: path and body become one frozen object here; nothing further in looks at JSON
# (docs/openapi.py makes web/openapi.json of ENDPOINTS, CONTRACTS and FIELDS)

MAX_NUMBER_CHARACTERS = 1000  # of JSON; reading a whole number takes time with the square of them
MAX_JSON_CONTAINERS = 1_000_000  # an empty list is 2 bytes of JSON and some 70 in memory
BYTES_PER_TOKEN = 3  # a guess; English has about 4, and no text has less than 1
TRUNCATE, ERROR, CHUNK = "truncate", "error", "chunk"
MANY = 2**31 - 1

# An endpoint -> the last segments of the paths that lead to it. Clients append their own path to
# whatever base URL their user typed, so nothing before it counts.
RERANK, SCORE = "/rerank", "/score"
ENDPOINTS = {
    RERANK: ("rerank", "reranks", "reranking", "ranking", "text-rerank"), SCORE: ("score",),
    "/health": ("health", "healthz", "live", "livez"), "/ready": ("ready", "readyz"),
    "/metrics": ("metrics",), "/info": ("info",), "/v1/models": ("models",),
    "/openapi.json": ("openapi.json",), "/docs": ("docs",),
}


@functools.lru_cache(256)
def endpoint_of(method: str, path: str) -> str | None:
    """The NAME in /v1/models/NAME may hold slashes."""
    segments = segments_of(path)
    if not segments:
        return RERANK if method == "POST" else "/"
    if method != "POST" and "models" in segments:
        return "/v1/models"
    return next((name for name, last in ENDPOINTS.items() if segments[-1] in last), None)


def segments_of(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]


@dataclass(frozen=True)
class Cut:
    """How texts are shortened; None: no limit of the request's own. keep_end: of a passage.
    max_windows, overlap: of CHUNK. instruction: for a prompt that has a place for it."""

    max_length: int | None = None
    max_query: int | None = None
    max_passage: int | None = None
    keep_end: bool = False
    max_windows: int | None = None
    overlap: int | None = None
    instruction: str = ""


@dataclass(frozen=True)
class RerankRequest:
    """queries: one for all passages or one for each. texts: the client's word for the passages.
    documents: as they were sent."""

    queries: tuple[str, ...]
    passages: tuple[str, ...]
    use_llm: bool = False
    model: str | None = None
    llm_top_n: int | None = None
    top_n: int | None = None
    return_documents: bool = False
    raw_scores: bool = False
    min_score: float = -math.inf
    ids: tuple[Any, ...] | None = None
    cut: Cut = Cut()
    on_overflow: str = TRUNCATE
    timeout_s: float = math.inf
    texts: str = "passages"
    documents: tuple[Any, ...] = ()

    @staticmethod
    def parse(raw: bytes, path: str = RERANK) -> tuple[RerankRequest, str]:
        """The request, and the name of its contract."""
        try:
            body, wrapper = _unwrapped(parse_json_object(raw))
            contract = contract_of(body, path, wrapper)
            values = _read_texts(body, contract)
        except RecursionError:
            raise BadRequestError("the body is nested too deeply") from None
        cut: dict[str, Any] = {}
        for field in FIELDS:
            value = body.get(field.name)
            if value is None or (field.contracts and contract not in field.contracts):
                continue
            read = field.read(value, field.name)
            if read is not None:
                target = field.target or field.name
                (cut if target in Cut.__dataclass_fields__ else values)[target] = read
        if "max_windows" in cut or "overlap" in cut:
            values.setdefault("on_overflow", CHUNK)
        request, n = RerankRequest(**values, cut=Cut(**cut)), len(values["passages"])
        if request.ids is not None and len(request.ids) != n:
            message = f"'ids' has {len(request.ids)} entries for {n} {request.texts}"
            raise BadRequestError(message, "ids")
        if request.top_n == 0 and n:  # clients that send a list's length send 0 for none
            name = _key_of(body, ("top_n", "top_k", "k"))
            raise BadRequestError(f"'{name}' must be at least 1", name)
        return request, contract

    def query_of(self, index: int) -> str:
        return self.queries[index % len(self.queries)]

    def estimate_tokens(self, longest: int, n: int | None = None) -> int:
        """Of the n longest pairs (default: all), for each of which at most `longest` are kept."""
        most = math.inf if self.on_overflow == CHUNK else longest
        queries = itertools.cycle([len(query.encode()) for query in self.queries])
        sizes = [
            min(most, (next(queries) + len(text.encode())) // BYTES_PER_TOKEN + 1)
            for text in self.passages
        ]
        return int(sum(sorted(sizes, reverse=True)[:n]))


# -- Contracts: whose words a body speaks

PASSAGE_KEYS = ("passages", "texts", "documents", "docs", "items", "data_2", "text_2")
QUERY_KEYS = ("query", "queries", "data_1", "text_1")
TEXT_KEYS = ("text", "content", "page_content", "body")  # of an object that stands for a text
ERRORS_AS_TEXT = re.compile(rb'"(?:texts|property)"[ \t\r\n]*:')  # TEI's and Weaviate's bodies


def _unwrapped(body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """huggingface.js and khoj wrap a body in inputs, DashScope in input with parameters beside it.
    It becomes flat; and the wrapper's name."""
    parameters = body.get("parameters")
    for name in ("inputs", "input"):
        inner = body.get(name)
        if isinstance(inner, dict) and not _key_of(body, PASSAGE_KEYS):
            outer = parameters if isinstance(parameters, dict) else {}
            return {**body, **outer, **inner}, name
    return body, ""


def _key_of(body: dict[str, Any], names: Sequence[str], default: str = "") -> str:
    """The first of the names that a body has; one that is null counts where there is no other."""
    present = [name for name in names if name in body] or [default]
    return min(present, key=lambda name: body.get(name) is None)


def contract_of(body: dict[str, Any], path: str, wrapper: str = "") -> str:
    texts, segments = _key_of(body, PASSAGE_KEYS), segments_of(path)
    if endpoint_of("POST", path) == SCORE:
        return "score"
    if wrapper == "input":
        return "dashscope"
    if texts == "texts":
        return "tei"
    if texts == "passages" and wrapper:
        return "khoj"
    if texts == "passages" and (isinstance(body.get("query"), dict) or "ranking" in segments):
        return "nvidia"
    if texts == "passages" or (not texts and segments in ([], ["rerank"])):
        return "native"
    if "property" in body:
        return "weaviate"
    # LightRAG and SGLang send top_k as well, and read Jina's `results`: Voyage's answer has both.
    is_voyage = "top_n" not in body and ("top_k" in body or "truncation" in body)
    return "voyage" if is_voyage else "jina"


def _read_texts(body: dict[str, Any], contract: str) -> dict[str, Any]:
    """/score takes one text for a list, and several queries, pair by pair."""
    defaults = {"native": ("query", "passages"), "score": ("text_1", "text_2")}
    query_key, texts_key = defaults.get(contract, ("query", "documents"))
    query_key = _key_of(body, QUERY_KEYS, query_key)
    texts_key = _key_of(body, PASSAGE_KEYS, texts_key)
    queries, documents = body.get(query_key), body.get(texts_key)
    if contract == "score" and isinstance(documents, str):
        documents = [documents]
    if contract != "score" or not isinstance(queries, list):
        queries = [queries]
    if not isinstance(documents, list):
        raise _wrong(texts_key, "a list of strings", body, PASSAGE_KEYS)
    if query_key not in body:
        raise _wrong(query_key, "a string", body, QUERY_KEYS)
    if len(queries) not in (1, len(documents)):
        message = f"'{query_key}' must be one text or as many as '{texts_key}' ({len(documents)})"
        raise BadRequestError(message, query_key)
    fields = body.get("rank_fields") or []  # Cohere v1: those that count, joined by line ends
    if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
        raise BadRequestError("'rank_fields' must be a list of strings", "rank_fields")
    ids = tuple(item.get("id") if isinstance(item, dict) else None for item in documents)
    has_ids = any(item is not None for item in ids)
    return {
        "queries": tuple(_text_of(item, query_key) for item in queries),
        "passages": tuple(
            _text_of(item, f"{texts_key}[{n}]", fields) for n, item in enumerate(documents)),
        "texts": texts_key, "documents": tuple(documents), "ids": ids if has_ids else None,
    }


def _text_of(value: Any, name: str, rank_fields: Sequence[str] = ()) -> str:
    """A string, an object that holds a text, or a list of such objects (content parts)."""
    if isinstance(value, str):
        return _whole_characters(value)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return "\n".join(_text_of(part, f"{name}[{n}]") for n, part in enumerate(value))
    if not isinstance(value, dict):
        raise _wrong(name, "a string", {name: value})
    keys = rank_fields or [key for key in TEXT_KEYS if value.get(key) is not None][:1]
    texts = [_text_of(value[key], f"{name}.{key}") for key in keys if value.get(key) is not None]
    if not texts:
        expected = f"a string, or have a {' or '.join(rank_fields or TEXT_KEYS)}"
        raise _wrong(name, expected, {name: value})
    return "\n".join(texts)


def _whole_characters(text: str) -> str:
    """Clients cut texts in the middle of an emoji, and JSON carries half of it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _wrong(
    name: str, expected: str, body: dict[str, Any], others: Sequence[str] = ()
) -> BadRequestError:
    """others: the keys that would do as well."""
    if name in body:
        message = f"'{name}' must be {expected}, not {_json_type(body[name])}"
        return BadRequestError(message, name)
    would_do = ", ".join(other for other in others if other != name)
    also = f" ({would_do} would do, too)" if would_do else ""
    return BadRequestError(f"'{name}' is missing: it must be {expected}{also}", name)


def _json_type(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string",
                              bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# -- Fields: what else a body may hold


@dataclass(frozen=True)
class Field:
    """An optional key of a body. read: (value, name) to what is kept; None: it says nothing.
    target: of RerankRequest or Cut, where it has another name. contracts: those that know it; none:
    all."""

    name: str
    read: Callable[[Any, str], Any]
    target: str = ""
    contracts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Number:
    """Reads one, also from a string. unlimited: values that mean "no limit"."""

    low: float
    high: float = MANY
    unlimited: tuple[int, ...] = ()
    kind: type = int

    def __call__(self, value: Any, name: str) -> Any:
        number = math.nan
        with contextlib.suppress(ValueError, OverflowError):  # no number, or one of 400 digits
            if type(value) in (int, float, str):
                number = float(value)
        if number in self.unlimited:
            return None
        is_in_range = self.low <= number <= self.high  # which nan never is
        if not is_in_range or (self.kind is int and number % 1):
            what = "a whole number" if self.kind is int else "a number"
            limits = f"between {self.low:,.10g} and {self.high:,.10g}"
            raise BadRequestError(f"'{name}' must be {what} {limits}", name)
        return self.kind(number)


@dataclass(frozen=True)
class Choice:
    """Reads one of some words, in any case."""

    meanings: dict[str, Any]

    def __call__(self, value: Any, name: str) -> Any:
        word = str(value).lower() if isinstance(value, str | bool) else ""
        if word not in self.meanings:
            raise BadRequestError(f"'{name}' must be {' or '.join(self.meanings)}", name)
        return self.meanings[word]


def read_string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string", {name: value})
    if _whole_characters(value) is not value:
        raise BadRequestError(f"'{name}' has half a character (a lone surrogate)", name)
    return value


def read_ids(value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(name, "a list of strings or numbers", {name: value})
    for index, item in enumerate(value):
        is_text, at = isinstance(item, str) and _whole_characters(item) is item, f"{name}[{index}]"
        if not is_text and type(item) is not int:
            raise _wrong(at, "a string or a whole number", {at: item})
    return tuple(value)


_NO_LIMIT = (0, -1)
_COUNT, _TOP_N, _LIMIT = Number(1), Number(0), Number(1, unlimited=_NO_LIMIT)
_LENGTH = Number(MIN_MAX_LENGTH_TOKENS, MAX_MAX_LENGTH_TOKENS)
_LENGTH_OR_ALL = Number(MIN_MAX_LENGTH_TOKENS, MAX_MAX_LENGTH_TOKENS, _NO_LIMIT)
_FLOAT = Number(-sys.float_info.max, sys.float_info.max, kind=float)
_SECONDS = Number(0.001, sys.float_info.max, kind=float)
_BOOLEAN = Choice({"true": True, "false": False})
# true is what clients send without being asked: it does not overrule an on_overflow. END and NONE
# are NVIDIA NIM's words.
_MAY_CUT = Choice({"true": None, "false": ERROR, "end": None, "none": ERROR})
_OVERFLOW = Choice({word: word for word in (TRUNCATE, ERROR, CHUNK)})
_KEEP_END = Choice({"left": True, "right": False})
FIELDS = (  # what each does is said in docs/openapi.py
    Field("model", read_string),
    Field("use_llm", _BOOLEAN),
    Field("llm_top_n", _COUNT),
    Field("k", _TOP_N, "top_n"),
    Field("top_k", _TOP_N, "top_n"),
    Field("top_n", _TOP_N),
    Field("return_documents", _BOOLEAN),
    Field("return_text", _BOOLEAN, "return_documents", ("tei",)),
    Field("raw_scores", _BOOLEAN),
    Field("min_score", _FLOAT),
    Field("ids", read_ids),
    Field("instruction", _text_of),
    Field("truncate_prompt_tokens", _LENGTH_OR_ALL, "max_length"),
    Field("max_length", _LENGTH),
    Field("max_tokens_per_query", _LIMIT, "max_query"),
    Field("max_tokens_per_doc", _LIMIT, "max_passage"),
    Field("max_chunks_per_doc", _LIMIT, "max_windows"),
    Field("overlap_tokens", Number(0, MAX_MAX_LENGTH_TOKENS), "overlap"),
    Field("truncate", _MAY_CUT, "on_overflow", ("tei", "nvidia")),
    Field("truncation", _MAY_CUT, "on_overflow", ("voyage",)),
    Field("on_overflow", _OVERFLOW),
    Field("truncation_direction", _KEEP_END, "keep_end", ("tei",)),
    Field("truncation_side", _KEEP_END, "keep_end"),
    Field("timeout", _SECONDS, "timeout_s"),
)

# -- JSON, stricter than Python's: names are unique (readers differ in which of two they take: RFC
#    8259, 4), NaN and Infinity are no JSON, and the memory that a body grows into is bounded.


def parse_json_object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # Windows' byte order mark
        if raw.count(b"[") + raw.count(b"{") > MAX_JSON_CONTAINERS:
            bare = re.sub(r'"[^"]*"', "", re.sub(r"\\.", "", text))  # strings may hold brackets
            if bare.count("[") + bare.count("{") > MAX_JSON_CONTAINERS:
                limit = f"{MAX_JSON_CONTAINERS:,} lists and objects"
                raise BadRequestError(f"the body holds more than {limit}")
        body = _JSON.decode(text)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not valid UTF-8: byte {error.start}") from None
    except RecursionError:
        raise BadRequestError("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, not {_json_type(body)}")
    return body


def _json_object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        ((name, _),) = Counter(name[:100] for name, _ in items).most_common(1)
        raise BadRequestError(f"the name {name!r} is in an object of the body twice", name)
    return found


def _json_whole(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise ValueError(f"a number has {len(text):,} characters")
    return int(text)


def _json_float(text: str) -> float:
    if len(text) > MAX_NUMBER_CHARACTERS or math.isinf(float(text)):
        raise ValueError(f"the number {text[:40]} is more than a float can hold")
    return float(text)


def _json_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


_JSON = json.JSONDecoder(
    object_pairs_hook=_json_object, parse_int=_json_whole, parse_float=_json_float,
    parse_constant=_json_constant)


# ------------------------------
# Pairs: text to token ids and truncation, nothing else

Tokenizer = Callable[[str], list[int]]  # without specials; a special token's string stays text


@dataclass(frozen=True)
class Pair:
    """n_dropped: tokens of both texts that were cut. query_ids: a bi-encoder's query (ids is then
    the passage alone). n_shared: leading ids that a decoder computes once for all of a query."""

    ids: Sequence[int]
    passage_start: int
    n_dropped: int
    query_ids: Sequence[int] = ()
    n_shared: int = 0

    @property
    def truncated(self) -> bool:
        return self.n_dropped > 0

    @property
    def n_new(self) -> int:
        return len(self.ids) - self.n_shared

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        return tuple(self.ids[: self.n_shared])

    @functools.cached_property
    def key(self) -> bytes:
        """Equal for pairs that the model cannot tell apart."""
        ids = array.array("i", (*self.ids, -1, *self.query_ids))
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


FLAG, MXBAI, WHOLE = "flag", "mxbai", "whole"


@dataclass(frozen=True)
class PromptParts:
    """What a language model is asked (convert/recipe.py). The defaults are what gemma was trained
    with (FlagEmbedding 1.4.2, FlagLLMReranker). tail: in place of separator and prompt. truncation:
    what max_length does not count: the tail (FLAG), the head (MXBAI), nothing (WHOLE: query and
    passage are one text, cut from its end)."""

    query_prefix: str = "A: "
    passage_prefix: str = "B: "
    separator: str = "\n"
    prompt: str = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the "
        "query by providing a prediction of either 'Yes' or 'No'."
    )
    head: str = ""
    instructed_query_prefix: str = ""
    query_suffix: str = ""
    tail: str = ""
    truncation: str = FLAG
    strip: bool = False


NO_PARTS = PromptParts("", "", "", "", truncation="")


class Pairs:
    """`start | query | separator | passage | tail`, such as `<s> q </s></s> p </s>` (XLM-R). The
    query is cut to 3/4 of max_length, then the passage until the pair fits (FlagEmbedding 1.4.2,
    BaseReranker.compute_score_single_gpu)."""

    is_apart = False  # the query is a sequence of its own
    is_shared = False  # what stands before the passages is computed once

    def __init__(
        self, tokenize: Tokenizer, start: Sequence[int], tail: Sequence[int], max_length: int,
        separator: Sequence[int] = (), parts: PromptParts = NO_PARTS,
    ) -> None:
        self._tokenize, self._max_length, self._parts = tokenize, max_length, parts
        self._clean: Callable[[str], str] = str.strip if parts.strip else str
        self._start, self._separator, self._tail = start, separator, tail
        # Its space belongs to the passage's first word.
        self._prefix_ids = tokenize(parts.passage_prefix.rstrip(" "))
        self._suffix_ids = tokenize(parts.query_suffix)
        self._free = {FLAG: len(tail), MXBAI: len(start)}.get(parts.truncation, -len(tail))
        self.longest = max(0, max_length + self._free) + len(tail)

    def make(self, query: str, passages: Sequence[str], cut: Cut = Cut()) -> list[Pair]:
        head, room = self._head(query, cut)
        room = max(0, min(room, cut.max_passage or MANY))
        pairs = []
        for passage in passages:
            ids = self._passage_ids(passage)
            kept = ids[:room]
            if cut.keep_end:
                n = self._n_prefix(ids)
                kept = ids[:n] + ids[n + max(0, len(ids) - room) :]
            pairs.append(self._whole(head, kept, len(ids) - len(kept)))
        return pairs

    def windows(self, query: str, passage: str, cut: Cut = Cut()) -> list[Pair]:
        """With all parts of the passage, which overlap (by a quarter, unless the cut says more)."""
        head, room = self._head(query, cut)
        ids = self._passage_ids(passage)
        read = ids[: cut.max_passage]
        n = self._n_prefix(read)
        size = max(1, room - n)
        overlap = min(size - 1, size // 4 if cut.overlap is None else cut.overlap)
        starts = range(n, max(n + 1, len(read) - overlap), size - overlap)[: cut.max_windows]
        n_dropped = len(ids) - min(len(read), starts[-1] + size)
        return [self._whole(head, read[:n] + read[at : at + size], n_dropped) for at in starts]

    def _passage_ids(self, passage: str) -> list[int]:
        return self._tokenize(self._parts.passage_prefix + self._clean(passage))

    def _n_prefix(self, ids: list[int]) -> int:
        """Every window begins with them."""
        n = len(self._prefix_ids)
        return n if ids[:n] == self._prefix_ids else 0

    def _head(self, query: str, cut: Cut) -> tuple[Pair, int]:
        """A pair up to its passage, and the tokens that the passage may have."""
        parts, max_length = self._parts, min(cut.max_length or MANY, self._max_length)
        prefix = parts.query_prefix
        if cut.instruction:
            prefix = parts.instructed_query_prefix.replace("{instruction}", cut.instruction)
        given = self._tokenize(prefix + self._clean(query) + parts.query_suffix)
        ids, most = given, MANY
        if cut.max_query:
            most = cut.max_query + len(self._tokenize(prefix))
        if len(ids) > most + len(self._suffix_ids):
            ids = ids[:most] + self._suffix_ids
        limit = max(0, max_length + self._free)  # of head and passage
        is_whole = self.is_apart or parts.truncation == WHOLE
        ids = ids[: max(0, limit - len(self._start)) if is_whole else max_length * 3 // 4]
        head = [*self._start, *ids, *self._separator][:limit]
        query_ids: list[int] = []
        if self.is_apart:
            head, query_ids = [*self._start], [*head, *self._tail]
        n_shared = len(head) if self.is_shared else 0
        pair = Pair(head, len(head), len(given) - len(ids), query_ids, n_shared)
        return pair, min(max_length, limit - len(head))

    def _whole(self, head: Pair, passage: list[int], n_dropped: int) -> Pair:
        ids = array.array("i", (*head.ids, *passage, *self._tail))  # four bytes each
        return dataclasses.replace(head, ids=ids, n_dropped=head.n_dropped + n_dropped)


class TextPairs(Pairs):
    """Each text as `[CLS] text [SEP]` (sentence-transformers)."""

    is_apart = True


class PromptPairs(Pairs):
    """template: reads special tokens, which nothing that a user writes may become."""

    is_shared = True

    def __init__(
        self, tokenize: Tokenizer, template: Tokenizer, bos: Sequence[int], parts: PromptParts,
        max_length: int,
    ) -> None:
        start, separator = [*bos, *template(parts.head)], template(parts.separator)
        tail = template(parts.tail) or separator + template(parts.prompt)
        super().__init__(tokenize, start, tail, max_length, separator, parts)


def pairs_of(request: RerankRequest, pairs: Pairs, indices: Sequence[int]) -> list[list[Pair]]:
    """For each passage its pair, or its windows."""
    made: list[list[Pair]] = []
    for query, own in itertools.groupby(indices, request.query_of):
        passages = [request.passages[index] for index in own]
        if request.on_overflow == CHUNK:
            made += [pairs.windows(query, passage, request.cut) for passage in passages]
        else:
            made += [[pair] for pair in pairs.make(query, passages, request.cut)]
    for index, (pair, *_) in zip(indices, made, strict=True):
        if request.on_overflow == ERROR and pair.truncated:
            name = f"{request.texts}[{index}]"
            message = f"'{name}' is {pair.n_dropped} tokens too long for one pair with its query"
            raise BadRequestError(message, name)
    return made


@dataclass(frozen=True)
class VocabTokenizer:
    """llama.cpp's own: exact for unigram and BPE, but for a normalisation that it leaves out
    (is_nfc). reads_special: `</s>` in a text is not text."""

    vocab: Any
    is_nfc: bool = False
    reads_special: bool = False

    def __call__(self, text: str) -> list[int]:
        raw = (unicodedata.normalize("NFC", text) if self.is_nfc else text).encode()
        count = -len(raw) - 16  # about an id for each byte at most; else it says how many
        while count < 0:
            buffer = (ctypes.c_int32 * -count)()
            count = llama().llama_tokenize(
                self.vocab, raw, len(raw), buffer, -count, False, self.reads_special)
        return buffer[:count]


class XlmRobertaTokenizer(VocabTokenizer):
    def __call__(self, text: str) -> list[int]:
        """At NEXT LINE, of all characters, the reference splits and llama.cpp does not."""
        return super().__call__(text.replace("\x85", " "))


WORDS_KEPT = 16384  # 25 MB if all are of the longest kind; as many characters: 3 MB
MAX_WORD_CHARACTERS = 100
_IDEOGRAPH = re.compile(  # the CJK blocks that BERT's _is_chinese_char names
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f]")


class WordPieceTokenizer:
    """BERT's (tokenization.py of google-research/bert). llama.cpp's has no [UNK] for long words,
    and drops spacing combining marks (Devanagari vowel signs)."""

    def __init__(
        self, pieces: Sequence[str], unknown: int, lowercase: bool, strip_accents: bool
    ) -> None:
        """pieces: the GGUF's, where BERT's `piece` is "▁piece", and its `##piece` is "piece"."""
        self._ids = {f"##{piece}".removeprefix("##▁"): n for n, piece in enumerate(pieces)}
        self._unknown, self._lowercase, self._strip_accents = unknown, lowercase, strip_accents
        self._word = functools.lru_cache(WORDS_KEPT)(self._split_word)
        self._spaced = functools.lru_cache(WORDS_KEPT)(self._space_character)

    def __call__(self, text: str) -> list[int]:
        if self._strip_accents:
            text = unicodedata.normalize("NFD", text)
        ids: list[int] = []
        for word in "".join(map(self._spaced, text)).split():
            ids += [self._unknown] if len(word) > MAX_WORD_CHARACTERS else self._word(word)
        return ids

    def _space_character(self, character: str) -> str:
        category = unicodedata.category(character)
        if character in "\t\n\r" or category.startswith("Z"):
            return " "
        # Not Cn: an emoji may be newer than Python's tables.
        is_unseen = character == "\ufffd" or category in ("Cc", "Cf", "Co", "Cs")
        if is_unseen or (category == "Mn" and self._strip_accents):
            return ""
        is_symbol = category.startswith("P") or character in string.punctuation
        if is_symbol or _IDEOGRAPH.match(character):
            return f" {character} "
        # One by one: no final sigma, as the reference.
        return character.lower() if self._lowercase else character

    def _split_word(self, word: str) -> list[int]:
        ids: list[int] = []
        rest, mark = word, ""
        while rest:
            pieces = (mark + rest[:end] for end in range(len(rest), 0, -1))
            piece = next(filter(self._ids.__contains__, pieces), None)
            if piece is None:
                return [self._unknown]
            ids.append(self._ids[piece])
            rest, mark = rest[len(piece) - len(mark) :], "##"
        return ids


# ------------------------------
# Call and metrics

HANG_UP_POLL_S = 0.25
TIMES = ("queue", "tokenise", "inference")  # waiting for its turn; in decodes with a pair of it


@dataclass
class Call:
    """One request under way. Its own thread alone uses it."""

    is_gone: Callable[[], bool] = lambda: False
    is_cut_off: Callable[[], bool] = lambda: False  # the server stops and waits no longer
    timeout_s: float = math.inf
    accept: str = ""  # the Accept header
    path: str = ""
    started: float = dataclasses.field(default_factory=time.monotonic)
    request: RerankRequest | None = None
    times: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(TIMES, 0.0))
    n_pairs: int = 0
    n_tokens: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def check(self) -> None:
        if self.seconds >= self.timeout_s:
            raise DeadlineError(self.timeout_s)
        if self.is_cut_off():
            raise UnavailableError("the server stopped before the request was done")
        if self.is_gone():
            raise ClientGoneError()

    def result(self, future: Future[T]) -> T:
        while not future.done():
            self.check()
            wait([future], min(self.timeout_s - self.seconds, HANG_UP_POLL_S))
        return future.result()


_COUNTER, _GAUGE, _INFO = prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Info
_DURATION = functools.partial(prometheus_client.Histogram, buckets=(
    .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300))
_PART = functools.partial(prometheus_client.Histogram, buckets=[n / 10 for n in range(1, 11)])
_METRICS: tuple[tuple[Any, str, str], ...] = (  # kind, labels, names
    (_COUNTER, "route status", "requests"),
    (_DURATION, "route", "request_seconds"),
    (_DURATION, "role", "queue_seconds tokenise_seconds inference_seconds"),
    (_PART, "role", "batch_fill_ratio"),
    (_COUNTER, "role", "pairs tokens cache_hits failed_batches truncated_passages"),
    (_GAUGE, "role", "queue_tokens queue_requests model_loaded"),
    (_GAUGE, "", "accel_bytes resident_bytes"),
    (_INFO, "role", "model"),
    (_INFO, "", "build"),
)


class Metrics:
    """What GET /metrics shows, in a registry of its own: a process can hold several."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._named: dict[str, Any] = {}
        for kind, labels, names in _METRICS:
            for name in names.split():
                self._named[name] = kind(
                    name, "see docs/operating.md", labels.split(), namespace="rerank",
                    registry=self.registry)
        self._named["accel_bytes"].set_function(accel_bytes)
        self._named["resident_bytes"].set_function(resident_bytes)
        versions = {"version": __version__, "llama_cpp_python": llama_version()}
        self._named["build"].info(versions)

    def add(self, name: str, amount: float, *labels: str) -> None:
        metric = self._named[name].labels(*labels)
        add = metric.inc if isinstance(metric, prometheus_client.Counter) else metric.observe
        add(amount)

    def add_role(self, role: Role) -> None:
        model, queue = role.description, role.queue
        about = {"file": model.path.name, "kind": model.kind, "quantization": model.quantization}
        self._named["model"].labels(role.name).info(about)
        shown = {"queue_tokens": queue.n_tokens, "queue_requests": queue.n_requests}
        for name, value in {**shown, "model_loaded": role.is_loaded}.items():
            self._named[name].labels(role.name).set_function(value)


# ------------------------------
# Queue: what waits for a model, and whose turn it is

MAX_SEQUENCES = 64  # pairs in one decode; llama.cpp's own limit is 256 (LLAMA_MAX_SEQ)
MAX_RETRY_AFTER_S = 600


def take_batch(
    waiting: list[T], n_tokens: Callable[[T], float], room: float, most: int, n_beside: int = 0
) -> list[T]:
    """Takes those of `waiting` that fit `room` tokens, and the first whatever its length, unless
    the decode has others already (n_beside). At most MAX_SEQUENCES are passed over."""
    taken: list[T] = []
    passed: list[T] = []
    for candidate in waiting:
        n_taken = len(taken) + n_beside
        if n_taken >= most or len(passed) >= MAX_SEQUENCES:
            break
        size = n_tokens(candidate)
        if size <= room or not n_taken:
            taken.append(candidate)
            room -= size
        else:
            passed.append(candidate)
    waiting[: len(taken) + len(passed)] = passed
    return taken


class Entry(NamedTuple):
    pair: Pair
    job: Job


def n_new(batch: Iterable[Entry]) -> int:
    return sum(entry.pair.n_new for entry in batch)


def prefix_then_longest(pair: Pair) -> tuple[tuple[int, ...], int]:
    """The engine computes a prefix once. Short pairs fill the decodes."""
    return pair.prefix, -pair.n_new


class Job:
    """A request's pairs. The queue's lock guards it, but for its request's own keys."""

    def __init__(self, n_estimated: int) -> None:
        self.n_estimated = n_estimated  # of the whole request
        self.left = 1.0  # the part of it that is still text; 0: no more pairs will come
        self.waiting: list[Pair] = []
        self.n_waiting = 0  # tokens
        self.n_pending = 0  # pairs that wait or are being scored
        self.keys: set[bytes] = set()  # of every pair so far
        self.logits: dict[bytes, float] = {}
        self.scored: Future[dict[bytes, float]] = Future()  # all logits, or what went wrong
        self.inference_s = 0.0

    @property
    def n_tokens(self) -> int:
        return self.n_waiting + int(self.n_estimated * self.left)

    def take(
        self, prefix: tuple[int, ...], room: float, most: int, n_beside: int = 0
    ) -> list[Entry]:
        def size(pair: Pair) -> float:
            return pair.n_new if pair.prefix == prefix else math.inf

        pairs = take_batch(self.waiting, size, room, most, n_beside)
        batch = [Entry(pair, self) for pair in pairs]
        self.n_waiting -= n_new(batch)
        return batch


class Queue:
    """Jobs take turns: each decode is the next one's, so a short request waits for one decode of a
    long one and not for all of it. Any thread appends; one takes."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._jobs: list[Job] = []  # all that were admitted and have not ended, in their turns
        self._served: Job | None = None  # whose turn the running decode is
        self._tokens_per_s = 0.0  # smoothed over some ten batches; 0: nothing was measured yet
        self._closed = False
        self._changed = threading.Condition()  # its lock guards all of the above, and the jobs

    @contextlib.contextmanager
    def admit(self, n_estimated: int) -> Iterator[Job]:
        """A job, whose pairs are dropped when the `with` ends. It counts for at most half of what
        may wait: a list of any length is accepted, and leaves room for others."""
        job, half = Job(n_estimated), self._max_tokens // 2
        with self._changed:
            if self._closed:
                raise UnavailableError("the server is stopping")
            waiting = sum(min(other.n_tokens, half) for other in (*self._jobs, job))
            excess = waiting - self._max_tokens
            if excess > 0:
                seconds = math.ceil(excess / (self._tokens_per_s or excess))
                raise OverloadedError(self.n_tokens(), min(MAX_RETRY_AFTER_S, seconds))
            self._jobs.append(job)
        try:
            yield job
        finally:
            self.end(ClientGoneError(), [job])

    def n_tokens(self) -> int:
        return sum(job.n_tokens for job in tuple(self._jobs))

    def n_requests(self) -> int:
        return len(self._jobs)

    def wait_for_room(self, job: Job, max_waiting: int, call: Call) -> None:
        """A long list is tokenised only a little ahead of the engine."""

        def has_room() -> bool:
            return job.n_waiting <= max_waiting or job.scored.done()

        while True:
            call.check()
            with self._changed:
                if self._changed.wait_for(has_room, HANG_UP_POLL_S):
                    return

    def append(self, job: Job, pairs: Sequence[Pair], left: float) -> None:
        with self._changed:
            job.left = left
            job.n_pending += len(pairs)
            job.n_waiting += sum(pair.n_new for pair in pairs)
            job.waiting = sorted([*job.waiting, *pairs], key=prefix_then_longest)
            self._settle(job)
            self._changed.notify_all()

    def next_batch(self, max_batch_tokens: int, max_sequences: int) -> list[Entry]:
        """The next job's turn, all of one prefix. Empty: closed, and all was taken.

        What is left of the decode goes to the jobs behind that need no more than one decode, but
        only as much as it has itself: so a short request takes at most twice its time.
        """
        with self._changed:
            if self._served in self._jobs:  # it goes behind those that came meanwhile
                self._jobs.remove(self._served)
                self._jobs.append(self._served)
            while not (ready := [job for job in self._jobs if job.waiting]):
                if self._closed and not self._jobs:
                    return []
                self._changed.wait()
            self._served, prefix = ready[0], ready[0].waiting[0].prefix
            batch = ready[0].take(prefix, max_batch_tokens, max_sequences)
            n_tokens = n_new(batch)
            room = min(max_batch_tokens - n_tokens, n_tokens)
            for job in ready[1:]:
                if room > 0 and job.n_tokens <= max_batch_tokens:
                    shared = job.take(prefix, room, max_sequences, len(batch))
                    room -= n_new(shared)
                    batch += shared
            self._changed.notify_all()
            return batch

    def finish(self, batch: Sequence[Entry], logits: Sequence[float], seconds: float) -> None:
        """A logit that is no number fails its own job, not the others."""
        with self._changed:
            rate = n_new(batch) / max(seconds, 1e-6)
            weight = 0.1 if self._tokens_per_s else 1
            self._tokens_per_s += (rate - self._tokens_per_s) * weight
            for (pair, job), logit in zip(batch, logits, strict=True):
                job.logits[pair.key] = logit
                job.n_pending -= 1
                if not math.isfinite(logit):
                    self.end(EngineError(f"the model gave {logit} in place of a score"), [job])
            for job in {job for _, job in batch}:
                job.inference_s += seconds
                self._settle(job)

    def end(self, error: RequestError, jobs: Iterable[Job] = ()) -> None:
        """Nothing more of these jobs (default: all) is scored; who waits for one gets the error."""
        with self._changed:
            for job in tuple(jobs or self._jobs):
                if not job.scored.done():
                    job.scored.set_exception(error)
                if job in self._jobs:
                    self._jobs.remove(job)
            self._changed.notify_all()

    def _settle(self, job: Job) -> None:
        if not (job.left or job.n_pending or job.scored.done()):
            job.scored.set_result(job.logits)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


# ------------------------------
# Model file: its header is read here, with bounds, before llama.cpp loads it, so that a wrong one
# is refused in one line (ggml/docs/gguf.md). Only what `python -m convert` verified is served.

CROSS_ENCODER, YES_LOGIT, BI_ENCODER = "cross-encoder", "yes-logit", "bi-encoder"
_ARCHITECTURES = {CROSS_ENCODER: ("bert", "modern-bert"), BI_ENCODER: ("bert",),
                  YES_LOGIT: ("gemma", "qwen2", "qwen3")}
_GGUF_SCALARS = {  # enum gguf_type -> the struct code of a value
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_LONG_ARRAY = 4096  # longer ones (vocabularies) are left to llama.cpp
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # rows first, as numpy has it
    type_id: int  # enum ggml_type
    offset: int  # bytes from the start of the file


class GgufReader:
    """Reads values one after the other. Raises struct.error or ValueError at the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        values = struct.unpack_from("<" + code, self._data, self.at)
        self.at += struct.calcsize("<" + code)
        return values[0]

    def bytes(self, n_bytes: int) -> bytes:
        if not 0 <= n_bytes <= len(self._data) - self.at:
            raise ValueError(f"{n_bytes} bytes at {self.at}")
        self.at += n_bytes
        return self._data[self.at - n_bytes : self.at]

    def string(self) -> str:
        return self.bytes(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _GGUF_STRING:
            return self.string()
        if kind == _GGUF_ARRAY:
            return self._array(self.scalar("I"), self.scalar("Q"))
        if kind not in _GGUF_SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.scalar(_GGUF_SCALARS[kind])

    def _array(self, kind: int, count: int) -> Any:
        """None: texts, or too long."""
        if kind == _GGUF_STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self._data, self.at)[0]
            return None
        code = _GGUF_SCALARS.get(kind)
        if code is None:
            raise ValueError(f"an array of type {kind}")
        raw = self.bytes(count * struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", raw)) if count <= _LONG_ARRAY else None

    def tensor(self) -> tuple[str, TensorInfo]:
        """Its offset: from the start of the tensors' data."""
        name, n_dimensions = self.string(), self.scalar("I")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {n_dimensions} dimensions")
        shape = [self.scalar("Q") for _ in range(n_dimensions)]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        return name, TensorInfo(tuple(reversed(shape)), self.scalar("I"), self.scalar("Q"))


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: scalar and short-array metadata, and where each tensor lies."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @staticmethod
    def open(path: Path) -> GgufFile:
        hint = ""
        try:
            with path.open("rb") as file:
                start = file.read(200).lstrip()
                if start.startswith(b"version https://git-lfs"):
                    hint = ": only git-lfs's pointer to one (git lfs pull)"
                elif start.startswith(b"<"):
                    hint = ": a web page in place of one (download it again)"
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return GgufFile(path, *_read_header(GgufReader(data)))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        except (struct.error, ValueError, OverflowError, MemoryError):
            raise ModelError(f"{path}: not a readable GGUF file{hint}") from None

    def header_is_intact(self) -> bool:
        """Whether everything before the tensor data is what the converter wrote and verified
        (rerank.header_sha256: the header's SHA-256 with zeroes in the place of the digest)."""
        digest = self.metadata.get("rerank.header_sha256")
        if not isinstance(digest, str) or len(digest) != 64 or not self.tensors:
            return False
        with self.path.open("rb") as file:
            header = file.read(min(tensor.offset for tensor in self.tensors.values()))
        zeroed = header.replace(digest.encode(), b"0" * 64)
        return hashlib.sha256(zeroed).hexdigest() == digest

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Raises ModelError for a value of another type, or where there is no default, for none."""
        value: Any = self.metadata.get(key, default)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.refusal(f"its metadata has no usable {key} ({str(value)[:40]})")
        return value

    def refusal(self, what: str) -> ModelError:
        """One line: what is wrong, and how to get a right one."""
        return ModelError(f"{self.path}: {what}; make a right one with: python -m convert SOURCE")


def _read_header(reader: GgufReader) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    if reader.bytes(4) != b"GGUF" or reader.scalar("I") not in (2, 3):
        raise ValueError("no GGUF of version 2 or 3")
    n_tensors, n_values = reader.scalar("Q"), reader.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key, kind = reader.string(), reader.scalar("I")
        metadata[key] = reader.value(kind)
    found = [reader.tensor() for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16:
        raise ValueError(f"an alignment of {alignment}")
    start = -(-reader.at // alignment) * alignment
    return metadata, {
        name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in found
    }


@dataclass(frozen=True)
class ModelDescription:
    """What a role must know of a file. The engine reads what scoring needs."""

    path: Path
    kind: str
    architecture: str
    quantization: str
    file_bytes: int
    max_tokens: int
    source: str = ""
    prompt: PromptParts = NO_PARTS
    calibration_scale: float = 1.0  # of bench.calibrate: score = sigmoid(scale * logit + bias)
    calibration_bias: float = 0.0

    @property
    def name(self) -> str:
        return self.path.stem

    def max_length(self, settings: Settings) -> int:
        """Tokens of the longest pair: what is asked for, as far as the model takes it."""
        return min(self.max_tokens, settings.max_length)


def describe(gguf: GgufFile) -> ModelDescription:
    if "rerank.kind" not in gguf.metadata:
        what = f"not made by this project's converter; adopt it: python -m convert {gguf.path}"
        raise ModelError(f"{gguf.path}: {what}")
    if not gguf.header_is_intact():
        raise gguf.refusal("its header is not the one that the converter verified")
    kind = gguf.get("rerank.kind", str)
    architecture = gguf.get("general.architecture", str)
    if architecture not in _ARCHITECTURES.get(kind, ()):
        what = f"{kind!r} with architecture {architecture!r}"
        raise gguf.refusal(f"rerank.kind is {what}, which this version does not know")
    context = gguf.get(f"{architecture}.context_length", int)
    max_tokens = gguf.get("rerank.max_tokens", int, context)
    if not MIN_MAX_LENGTH_TOKENS <= max_tokens <= max(context, MIN_MAX_LENGTH_TOKENS):
        raise gguf.refusal(f"its rerank.max_tokens is {max_tokens}")
    scale = gguf.get("rerank.calibration_scale", float, 1.0)
    if scale <= 0:
        raise gguf.refusal("its rerank.calibration_scale is not above 0")
    parts = dataclasses.asdict(PromptParts() if architecture == "gemma" else NO_PARTS)
    for name, default in parts.items():
        parts[name] = gguf.get(f"rerank.{name}", type(default), default)
    return ModelDescription(
        gguf.path, kind, architecture, gguf.get("rerank.quantization", str),
        gguf.path.stat().st_size, max_tokens, gguf.get("rerank.source", str, ""),
        PromptParts(**parts), scale, gguf.get("rerank.calibration_bias", float, 0.0))


# ------------------------------
# llama.cpp, through llama-cpp-python's low-level API, loaded with the first engine

ACCEL_LIBRARY = HERE / "accel" / "lib" / "librerank_accel.so"
_Q8_0 = 8  # enum ggml_type
_EXACT_TYPES = {0, 1, 30, _Q8_0}  # with F32, F16, BF16
ACCEL_SPARE_BYTES = 200_000_000  # that must stay free beside its copy of the weights


@functools.cache
def llama() -> Any:
    """The module llama_cpp.llama_cpp. What it reads from the environment is set before."""
    for name, value in (
        # OpenMP's threads otherwise spin while they wait for each other, and a second busy process
        # makes each barrier wait for a time slice: 11.8 s became 4.1 s on two shared cores. A few
        # microseconds are 8 % faster, and no slower beside a busy process.
        ("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "2000"),
        ("GGML_NO_BACKTRACE", "1"),  # no debugger is started for an abort
        # On a GPU (bench/results/gpu-nvidia-h200.md): a quarter of the error in F16 files at no
        # cost, and 2 GB of logits that an encoder never computes are not pinned in the memory.
        ("GGML_CUDA_CUBLAS_COMPUTE_TYPE", "f32"), ("GGML_CUDA_NO_PINNED", "1"),
    ):
        os.environ.setdefault(name, value)
    import llama_cpp.llama_cpp as library

    _native_log.callback = library.llama_log_callback(_native_log.add)  # or it would be freed
    library.llama_log_set(_native_log.callback, ctypes.c_void_p(0))
    # A portable build of llama.cpp (GGML_BACKEND_DL) has a CPU library for each instruction set and
    # loads none; the best for this CPU is taken here, as llama-cpp-python does not.
    if _native("ggml_backend_reg_count", ctypes.c_size_t, library=library)() == 0:
        load = _native("ggml_backend_load_all_from_path", None, ctypes.c_char_p, library=library)
        load(os.fsencode(Path(library.__file__).parent / "lib"))
    return library


@functools.cache
def llama_version() -> str:
    """From its source: importing it would load llama.cpp, and an image may have no metadata."""
    spec = importlib.util.find_spec("llama_cpp")
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    found = re.search(r'__version__ = "([^"]+)"', source)
    return found[1] if found else "unknown"


def _native(name: str, result: Any, *arguments: Any, library: Any = None) -> Any:
    """A function of ggml's C API that llama-cpp-python does not bind. libllama links ggml."""
    function = getattr((library or llama())._lib, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


class NativeLog:
    """What llama.cpp said last, at warning level and above; its first error is the reason of a
    failed load."""

    def __init__(self) -> None:
        self.callback: Any = None
        self._lines: deque[str] = deque(maxlen=100)

    def add(self, level: int, text: bytes, user_data: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level >= 3 and line:  # GGML_LOG_LEVEL_WARN is 3, ERROR 4 (ggml.h)
            self._lines.append(line)
            log.debug("llama.cpp: %s", line)

    def clear(self) -> None:
        self._lines.clear()

    def reason(self, default: str) -> str:
        """The first line since clear, without the name of the function that said it."""
        return re.sub(r"^\w+: ", "", self._lines[0]) if self._lines else default


_native_log = NativeLog()


# -- The engine of accel/: a library that takes the products of the layers from llama.cpp


@functools.cache
def load_accel(path: Path) -> tuple[Any, str]:
    """The library, once per process, or why it cannot be used. ggml offers operations to it from
    then on."""
    if not path.is_file():
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        return None, "not built: make accel" if is_x86 else "for x86 only"
    try:
        library = ctypes.CDLL(str(path))
        library.rerank_accel_built_for.restype = ctypes.c_char_p
        library.rerank_accel_copied_bytes.restype = ctypes.c_size_t
        for name in ("is_fast_here", "has_bf16"):
            getattr(library, f"rerank_accel_{name}").restype = ctypes.c_bool
        library.rerank_accel_configure.argtypes = [ctypes.c_bool] * 3
        built_for = library.rerank_accel_built_for().decode()
    except (OSError, AttributeError) as error:
        return None, f"{path} does not fit this llama-cpp-python ({error}): make accel"
    if built_for != llama_version():  # ggml's structures change from version to version
        built = f"{path} is built for llama-cpp-python {built_for}"
        return None, f"{built}, not {llama_version()}: make accel"
    if not library.rerank_accel_is_fast_here():
        return None, "this CPU has no int8 dot products"
    if not _native("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)(os.fsencode(path)):
        return None, f"ggml refuses {path}: make accel"
    return library, ""


def _loaded_accel() -> Any:
    """None as long as nobody asked for it."""
    return load_accel(ACCEL_LIBRARY)[0] if load_accel.cache_info().currsize else None


def accel_has_bf16() -> bool:
    library = _loaded_accel()
    return bool(library and library.rerank_accel_has_bf16())


def accel_bytes() -> int:
    """What the engine of accel/ holds of weights now."""
    library = _loaded_accel()
    return library.rerank_accel_copied_bytes() if library else 0


# -- One model and one context


class LlamaModel:
    """Owns one llama_model and one llama_context, and frees each once. One thread's, but for vocab
    and piece. accel: INT8, BF16 or OFF."""

    def __init__(
        self, gguf: GgufFile, description: ModelDescription, settings: Settings, is_alone: bool
    ) -> None:
        """Loads the weights, memory-mapped."""
        self._natives, self._api = contextlib.ExitStack(), llama()
        self.gguf, self.description, self.is_alone = gguf, description, is_alone
        self.tuning = settings.tuning
        self.limit = description.max_length(settings)  # tokens of the longest pair
        self.context: Any = None
        api, parameters = self._api, self._api.llama_model_default_params()
        parameters.n_gpu_layers = settings.gpu_layers if settings.gpu_layers >= 0 else 1000
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP
        parameters.use_extra_bufts = self.tuning.repack
        _native_log.clear()
        self.model = api.llama_model_load_from_file(os.fsencode(gguf.path), parameters)
        if not self.model:
            reason = _native_log.reason("no reason given")
            raise ModelError(f"{gguf.path}: llama.cpp cannot load it ({reason})")
        self._natives.callback(api.llama_model_free, self.model)
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)
        self.n_embd = api.llama_model_n_embd(self.model)
        self.accel = OFF if self.tuning.accel_reason else self._accel_for(settings.accel)

    def _accel_for(self, wanted: str) -> str:
        """Left to itself: whoever chose weights of 8 bits or more chose their exactness, which
        bfloat16 keeps and int8 halves (bench/results/drift-*.md); weights of fewer bits drift
        further than int8 does, which is twice as fast. And the copy of the layers must fit the
        memory."""
        if wanted != AUTO:
            return BF16 if wanted == BF16 else INT8
        layers = [one for name, one in self.gguf.tensors.items() if name.startswith("blk.")]
        types, mode = {layer.type_id for layer in layers if len(layer.shape) > 1}, INT8
        if types <= _EXACT_TYPES and accel_has_bf16():
            mode = BF16
        elif types & (_EXACT_TYPES - {_Q8_0}):
            return OFF
        n_weights = self._api.llama_model_n_params(self.model) - self.n_vocab * self.n_embd
        needed, free = n_weights * (2 if mode == BF16 else 1), available_bytes()
        if needed + ACCEL_SPARE_BYTES < free:
            return mode
        log.warning("accel/ is not used: its copy of the weights takes %.0f MB, and %.0f MB are "
                    "free (--accel %s: try nevertheless)", needed / 1e6, free / 1e6, mode)
        return OFF

    @property
    def arithmetic(self) -> str:
        """What multiplies: the engine of accel/, or llama.cpp's kernels for the file's types."""
        own = f"llama.cpp, {self.description.quantization}"
        return own if self.accel == OFF else f"{self.accel} engine"

    def open_context(self, n_ubatch: int, n_ctx: int, n_sequences: int, pooling: int) -> None:
        """n_sequences: in one decode, each with one result."""
        api, parameters = self._api, self._api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = n_ctx, n_ctx, n_ubatch
        is_encoder = pooling != api.LLAMA_POOLING_TYPE_UNSPECIFIED
        parameters.n_seq_max = n_sequences
        parameters.n_outputs_max = 0 if is_encoder else n_sequences  # 0: every token, for pooling
        parameters.n_threads = parameters.n_threads_batch = self.tuning.threads
        parameters.embeddings, parameters.pooling_type = is_encoder, pooling
        # Faster at every size, and no matrix of scores in memory.
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.kv_unified = True  # pairs of unequal length share a cache; streams are slower
        if library := _loaded_accel():  # pages of the mapped file go once their weights are copied
            library.rerank_accel_configure(self.accel != OFF, self.accel == BF16, True)
        _native_log.clear()
        self.context = api.llama_init_from_model(self.model, parameters)
        if not self.context:
            reason = _native_log.reason("out of memory?")
            raise ModelError(f"{self.gguf.path}: no context of {n_ctx} tokens ({reason})")
        self._natives.callback(api.llama_free, self.context)

    def piece(self, token_id: int) -> str:
        text: bytes = self._api.llama_vocab_get_text(self.vocab, token_id)
        return text.decode("utf-8", "replace")

    def special(self, name: str) -> int:
        """The id of bos, eos or sep."""
        return int(getattr(self._api, f"llama_vocab_{name}")(self.vocab))

    def close(self) -> None:
        """May be called twice."""
        self._natives.close()


class Batch:
    """The arrays of one llama_batch. One token belongs to one sequence; sequences are numbered from
    first_sequence, and the positions in each count from first_position."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], first_position: int = 0, first_sequence: int = 0
    ) -> None:
        lengths, int32 = [len(sequence) for sequence in sequences], np.int32
        self.n_tokens = sum(lengths)
        self.ends = np.cumsum(lengths) - 1  # index of the last token of each sequence
        self._token = np.concatenate([np.asarray(ids, dtype=int32) for ids in sequences])
        positions = [np.arange(length, dtype=int32) for length in lengths]
        self._position = np.concatenate(positions) + int32(first_position)
        self._n_sequences = np.ones(self.n_tokens, dtype=int32)
        numbers = np.arange(len(lengths), dtype=int32) + int32(first_sequence)
        self._sequence = np.repeat(numbers, lengths)
        places = 4 * np.arange(self.n_tokens, dtype=np.uint64)
        self._sequence_pointers = places + np.uint64(self._sequence.ctypes.data)
        self._output = np.zeros(self.n_tokens, dtype=np.int8)

    def native(
        self, output: slice | npt.NDArray[np.int64], embeddings: FloatArray | None = None
    ) -> Any:
        """llama_batch that points into this object's arrays (keep it alive). output: tokens that
        get an output row. embeddings: [n_tokens, n_embd], in place of the ids."""
        self._output[output] = 1
        self._embeddings, int32 = embeddings, ctypes.c_int32
        return llama().llama_batch(
            self.n_tokens, _pointer(self._token, int32) if embeddings is None else None,
            None if embeddings is None else _pointer(embeddings, ctypes.c_float),
            _pointer(self._position, int32), _pointer(self._n_sequences, int32),
            _pointer(self._sequence_pointers, ctypes.POINTER(int32)),
            _pointer(self._output, ctypes.c_int8))


def _pointer(values: npt.NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))


class EncoderContext:
    """Encodes sequences with a BERT-type model and reads one pooled vector for each."""

    def __init__(self, model: LlamaModel, pooling: int) -> None:
        # A whole sequence must fit one ubatch, and a token for each, or llama.cpp aborts.
        self.n_ubatch = max(model.limit, model.tuning.ubatch, MAX_SEQUENCES)
        model.open_context(self.n_ubatch, self.n_ubatch, MAX_SEQUENCES, pooling)
        self._context = model.context
        self._reserve_outputs(self.n_ubatch * model.n_vocab * 4, model.is_alone)

    def encode(
        self, batch: Batch, n_values: int, embeddings: FloatArray | None = None
    ) -> FloatArray:
        """[len(batch), n_values] float32. Raises EngineError."""
        api, n_sequences = llama(), len(batch.ends)
        what = f"{batch.n_tokens} tokens in {n_sequences} sequences"
        if not 0 < batch.n_tokens <= self.n_ubatch or n_sequences > MAX_SEQUENCES:
            raise EngineError(f"{what} cannot be encoded")
        status = api.llama_encode(self._context, batch.native(slice(None), embeddings))
        if status != 0:
            raise EngineError(f"llama.cpp failed to encode {what} (status {status})")
        rows = np.empty((n_sequences, n_values), dtype=np.float32)
        for index in range(n_sequences):
            values = api.llama_get_embeddings_seq(self._context, index)
            if not values:
                raise EngineError("llama.cpp returned no pooled output")
            rows[index] = values[:n_values]
        return rows

    def _reserve_outputs(self, n_bytes: int, is_alone: bool) -> None:
        """llama.cpp allocates and clears tokens x n_vocab floats of logits that an encoder never
        computes: 1 MB for each token of m3, anew whenever a batch is larger than all before. So the
        largest batch comes first, stopped before its first operation, and the pages of its logits
        are given back; where nothing else runs, already while they are cleared."""
        api, batch = llama(), Batch([[0] * self.n_ubatch])
        stop = api.ggml_abort_callback(lambda user_data: True)
        api.llama_set_abort_callback(self._context, stop, None)
        with _given_back_while_written(n_bytes) if is_alone else contextlib.nullcontext():
            api.llama_encode(self._context, batch.native(slice(None)))
        api.llama_set_abort_callback(self._context, api.ggml_abort_callback(), None)
        logits = ctypes.cast(api.llama_get_logits(self._context), ctypes.c_void_p).value
        if logits:
            _give_back_pages(logits, n_bytes)


def _give_back_pages(address: int, n_bytes: int) -> None:
    """The whole pages inside the range become zeroes that cost nothing until they are written."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + n_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and sys.platform.startswith("linux"):
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _given_back_while_written(n_bytes: int) -> Iterator[None]:
    """A block of n_bytes that is allocated and cleared meanwhile never is in memory as a whole: a
    gigabyte for a moment is what a small container dies of.

    The block is known by its size alone, so this is only for a process in which nothing else runs:
    other memory of that size would become zeroes, and the scores that follow silently wrong.
    """
    before, is_done = _anonymous_ranges(), threading.Event()

    def watch() -> None:
        while not is_done.wait(_WATCH_S):
            for start, end in _new_ranges(before):
                if n_bytes <= end - start <= n_bytes * 1.05:  # the vectors lie behind the logits
                    # The first page holds malloc's header.
                    _give_back_pages(start + mmap.PAGESIZE, n_bytes - mmap.PAGESIZE)

    watcher = threading.Thread(target=watch, name="memory", daemon=True)
    if n_bytes >= _WORTH_WATCHING_BYTES:
        watcher.start()
    try:
        yield
    finally:
        is_done.set()
        if watcher.is_alive():
            watcher.join()


_WORTH_WATCHING_BYTES = 64 << 20
_WATCH_S = 0.002


def _new_ranges(before: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is mapped now and was not before. The kernel joins a new block with its neighbours."""
    for start, end in _anonymous_ranges():
        for low, high in before:  # in ascending order
            if low < end and high > start:
                yield start, low
                start = high
        yield start, end


def _anonymous_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process's memory that no file and no name stands behind."""
    ranges = []
    for line in _read(Path("/proc/self/maps")).splitlines():
        fields = line.split()
        if fields[4] == "0" and len(fields) == 5:
            start, end = fields[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


# ------------------------------
# Engines: one decode's pairs in, their logits out

QUERY_VECTORS_KEPT = 256  # bi-encoder only: a query is embedded once, not once per batch
CHECK_MAX_LENGTH_TOKENS = 512  # rerank.check_ids were made at this max_length


class Engine:
    """Scores pairs. Owned by its scheduler's thread; `pairs` and `pieces`: any thread."""

    pairs: Pairs

    def __init__(self, model: LlamaModel) -> None:
        self.description, self.arithmetic, self._model = model.description, model.arithmetic, model
        self.max_batch_tokens = model.tuning.ubatch  # what one decode should hold
        self.max_sequences = MAX_SEQUENCES  # pairs in one decode

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """One decode: the raw logit of each pair, in order. They have one prefix, and more tokens
        than max_batch_tokens only where it is one pair. Raises EngineError."""
        raise NotImplementedError

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's text of each id."""
        return [self._model.piece(index) for index in ids]

    def close(self) -> None:
        """Frees the native memory. May be called twice."""
        self._model.close()


def score_all(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
    """The raw logits of any number of pairs, in order, by as many decodes as they need. Only in the
    thread that owns the engine."""
    logits = [math.nan] * len(pairs)
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prefix.setdefault(pair.prefix, []).append(index)
    for waiting in by_prefix.values():
        while waiting:
            batch = take_batch(
                waiting, lambda index: pairs[index].n_new, engine.max_batch_tokens,
                engine.max_sequences)
            scored = engine.score([pairs[index] for index in batch])
            for index, logit in zip(batch, scored, strict=True):
                logits[index] = logit
    return logits


def tokenizer_of(model: LlamaModel) -> Tokenizer:
    kind, gguf = model.gguf.get("tokenizer.ggml.model", str), model.gguf
    if kind == "t5":
        return XlmRobertaTokenizer(model.vocab)
    if kind != "bert":
        return VocabTokenizer(model.vocab, is_nfc=kind == "gpt2")
    pieces = [model.piece(index) for index in range(model.n_vocab)]
    lowercase = gguf.get("tokenizer.ggml.normalizer.lowercase", bool, True)
    # BERT strips accents where it lowercases.
    strip_accents = gguf.get("tokenizer.ggml.normalizer.strip_accents", bool, lowercase)
    return WordPieceTokenizer(pieces, pieces.index("[UNK]"), lowercase, strip_accents)


class RankPoolingEngine(Engine):
    """Cross-encoders: the logit of the classification head (llama.cpp's RANK pooling), one float
    for each pair."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__(model)
        tokenize, first, last = tokenizer_of(model), model.special("bos"), model.special("sep")
        separators = [last]
        if isinstance(tokenize, XlmRobertaTokenizer):
            last = model.special("eos")
            separators = [last, last]
        self.pairs = Pairs(tokenize, [first], [last], model.limit, separators)
        types = model.gguf.tensors.get("token_types.weight")
        has_types = types is not None and len(types.shape) > 1
        self._token_types = TokenTypeEmbeddings(model.gguf) if has_types else None
        self._encoder = EncoderContext(model, llama().LLAMA_POOLING_TYPE_RANK)

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        embeddings = self._token_types(pairs) if self._token_types else None
        rows = self._encoder.encode(Batch([pair.ids for pair in pairs]), 1, embeddings)
        return [float(row[0]) for row in rows]


class TokenTypeEmbeddings:
    """BERT's second token type, without which its scores are wrong without a word. llama.cpp adds
    token_types[0] to every token, so it is given embeddings in place of ids: token_embd[id], plus
    token_types[1] - token_types[0] from where the passage begins."""

    def __init__(self, gguf: GgufFile) -> None:
        first, second = Rows(gguf, "token_types.weight")(np.array([0, 1]))
        self._difference, self._rows = second - first, Rows(gguf, "token_embd.weight")

    def __call__(self, pairs: Sequence[Pair]) -> FloatArray:
        """[n_tokens, n_embd] float32 for the pairs, one after the other."""
        rows = self._rows(np.concatenate([np.asarray(pair.ids) for pair in pairs]))
        start = 0
        for pair in pairs:
            rows[start + pair.passage_start : start + len(pair.ids)] += self._difference
            start += len(pair.ids)
        return rows


class _TypeTraits(ctypes.Structure):  # struct ggml_type_traits, ggml.h
    _fields_ = (("type_name", ctypes.c_char_p), ("block", ctypes.c_int64),
                ("block_interleave", ctypes.c_int64), ("block_bytes", ctypes.c_size_t),
                ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p))


class Rows:
    """A tensor of the file, memory-mapped: the rows that are asked for, in float32."""

    def __init__(self, gguf: GgufFile, name: str) -> None:
        info = gguf.tensors[name]
        n_rows, self._n_columns = info.shape
        traits = _native("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int)
        self._traits = traits(info.type_id).contents
        shape = (n_rows, self._n_columns // self._traits.block * self._traits.block_bytes)
        self._table = np.memmap(gguf.path, np.uint8, "r", info.offset, shape)

    def __call__(self, indices: npt.NDArray[Any]) -> FloatArray:
        raw = np.ascontiguousarray(self._table[indices])
        if not self._traits.to_float:  # GGML_TYPE_F32
            return raw.view(np.float32)
        rows: FloatArray = np.empty((len(raw), self._n_columns), dtype=np.float32)
        kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        dequantize = ctypes.CFUNCTYPE(None, *kinds)(self._traits.to_float)
        dequantize(raw.ctypes.data, rows.ctypes.data, rows.size)
        return rows


class YesLogitEngine(Engine):
    """A language model that is asked whether the passage answers the query: the logit of its word
    for yes after the prompt, less that of its word for no where that counts."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__(model)
        gguf, ubatch = model.gguf, model.tuning.ubatch
        template = VocabTokenizer(model.vocab, reads_special=True)
        bos = [model.special("bos")] if self.description.architecture == "gemma" else []
        self.pairs = PromptPairs(
            tokenizer_of(model), template, bos, self.description.prompt, model.limit)
        keys = ["rerank.yes_token_id", *({"rerank.no_token_id"} & gguf.metadata.keys())]
        self.words = [gguf.get(key, int) for key in keys]
        self._scale = gguf.get("rerank.logit_scale", float, 1.0)
        # No pair is shorter than its prompt: fewer sequences, fewer logits kept.
        (shortest,) = self.pairs.make("", [""])
        self.max_sequences = min(MAX_SEQUENCES, max(1, ubatch // shortest.n_new))
        self._n_ctx = self.pairs.longest + ubatch  # the prefix, and a batch of what follows it
        unspecified = llama().LLAMA_POOLING_TYPE_UNSPECIFIED
        model.open_context(ubatch, self._n_ctx, self.max_sequences + 1, unspecified)
        self._memory = llama().llama_get_memory(model.context)
        self._prefix: tuple[int, ...] = ()  # what sequence 0 of the KV cache holds

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """What comes before the passage is computed once for all decodes in a row that begin with
        it."""
        if len(pairs) > self.max_sequences or len({pair.prefix for pair in pairs}) != 1:
            raise EngineError(f"{len(pairs)} pairs cannot be decoded together")
        self._hold(pairs[0].prefix)
        api, start = llama(), len(self._prefix)
        new_ids = [pair.ids[pair.n_shared :] for pair in pairs]
        sequences = range(1, len(pairs) + 1)
        for sequence in sequences:  # marks the prefix's cells, copies nothing
            api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        try:
            # Attention of fewer than 64 tokens is summed in float16: a long pair ends in one piece.
            if (early := len(new_ids[0]) - self.max_batch_tokens) > 0:
                self._decode(Batch([new_ids[0][:early]], start, 1), slice(0))
                new_ids, start = [new_ids[0][early:]], start + early
            batch = Batch(new_ids, start, first_sequence=1)
            self._decode(batch, batch.ends)
            return [self._logit(end) for end in batch.ends.tolist()]
        finally:
            for sequence in sequences:
                api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def _hold(self, prefix: tuple[int, ...]) -> None:
        if prefix == self._prefix:
            return
        self._prefix = ()
        llama().llama_memory_clear(self._memory, False)
        if prefix:
            self._decode(Batch([prefix]), slice(0))
        self._prefix = prefix

    def _decode(self, batch: Batch, output: slice | npt.NDArray[np.int64]) -> None:
        what = f"a batch of {batch.n_tokens} tokens cannot be decoded"
        if not 0 < batch.n_tokens <= self._n_ctx - len(self._prefix):
            raise EngineError(what)
        status = llama().llama_decode(self._model.context, batch.native(output))
        if status != 0:
            raise EngineError(f"{what} (status {status} of llama.cpp)")

    def _logit(self, end: int) -> float:
        """end: the pair's last token in its batch."""
        logits = llama().llama_get_logits_ith(self._model.context, end)
        if not logits:
            raise EngineError("llama.cpp returned no logits")
        yes, *no = [logits[word] for word in self.words]
        return float(self._scale * (yes - sum(no)))


class EmbeddingEngine(Engine):
    """The mini model: a fitted line from the cosine of query's and passage's embeddings (mean of
    the last layer's states), and from how much of the query's words the passage holds, to a
    logit."""

    def __init__(self, model: LlamaModel) -> None:
        super().__init__(model)
        first, last, gguf = model.special("bos"), model.special("sep"), model.gguf
        self.pairs = TextPairs(tokenizer_of(model), [first], [last], model.limit)
        self.cosine_scale = gguf.get("rerank.cosine_scale", float)
        self.cosine_bias = gguf.get("rerank.cosine_bias", float)
        self.overlap_scale = gguf.get("rerank.overlap_scale", float, 0.0)
        self.first_piece_id = gguf.get("rerank.first_piece_id", int, 0)  # the most frequent one
        self._encoder = EncoderContext(model, llama().LLAMA_POOLING_TYPE_MEAN)
        self._query_vectors: OrderedDict[tuple[int, ...], FloatArray] = OrderedDict()

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """Queries that are not known yet take decodes of their own."""
        known = self._query_vectors
        queries = dict.fromkeys(tuple(pair.query_ids) for pair in pairs)
        missing = [ids for ids in queries if ids not in known]
        while missing:
            batch = take_batch(missing, len, self.max_batch_tokens, self.max_sequences)
            known.update(zip(batch, self.embed(batch), strict=True))
        passages = self.embed([pair.ids for pair in pairs])
        logits = [
            self.logit(pair, known[tuple(pair.query_ids)], passage)
            for pair, passage in zip(pairs, passages, strict=True)
        ]
        while len(known) > QUERY_VECTORS_KEPT:
            known.popitem(last=False)
        return logits

    def logit(self, pair: Pair, query: FloatArray, passage: FloatArray) -> float:
        """query, passage: the pair's unit vectors. Any thread."""
        logit = self.cosine_scale * float(query @ passage) + self.cosine_bias
        if self.overlap_scale:
            inside = slice(1, -1)  # between [CLS] and [SEP]
            held = overlap(pair.query_ids[inside], pair.ids[inside], self.first_piece_id)
            logit += self.overlap_scale * held
        return logit

    def embed(self, texts: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Unit vectors of one decode's sequences of ids."""
        rows = self._encoder.encode(Batch(texts), self._model.n_embd)
        return list(rows / np.linalg.norm(rows, axis=1, keepdims=True))


ZIPF_OFFSET = 10  # the piece of rank r counts ln(1 + r / 10): the first few hardly count


def overlap(
    query_ids: Sequence[int], passage_ids: Sequence[int], first_piece_id: int
) -> float:
    """The part of the query's pieces that the passage holds, each counted by how rare it is: 0
    none, 1 all.

    BERT's pieces stand roughly in the order of their frequency: by Zipf's law that of rank r has a
    frequency in proportion to 1 / r, and what search engines weigh words by (inverse document
    frequency; Robertson and Zaragoza 2009) is the logarithm of its inverse.
    """
    ranks = {token: max(0, token - first_piece_id) for token in query_ids}
    weights = {token: math.log1p(rank / ZIPF_OFFSET) for token, rank in ranks.items()}
    held = math.fsum(weights[token] for token in weights.keys() & set(passage_ids))
    total = math.fsum(weights.values())
    return held / total if total else 0.0


_ENGINES: dict[str, Callable[[LlamaModel], Engine]] = {
    CROSS_ENCODER: RankPoolingEngine, YES_LOGIT: YesLogitEngine, BI_ENCODER: EmbeddingEngine,
}


def load_engine(path: Path, settings: Settings, is_alone: bool = False) -> Engine:
    """Opens a GGUF file, checks it, and decides from its metadata which engine scores with it.
    is_alone: nothing else runs in this process (see _given_back_while_written)."""
    gguf = GgufFile.open(path)
    description = describe(gguf)
    model = LlamaModel(gguf, description, settings, is_alone)
    try:
        engine = _ENGINES[description.kind](model)
        _check_known_pair(gguf, engine)
        if model.accel != OFF:  # copies the weights and makes the kernels
            engine.score(engine.pairs.make("warm", ["up"]))
    except BaseException:  # a refused file is asked for again with the next request: free it now
        model.close()
        raise
    return engine


def _check_known_pair(gguf: GgufFile, engine: Engine) -> None:
    """The file carries the ids of one pair as the reference builds it; this build must make the
    same ones."""
    expected = gguf.metadata.get("rerank.check_ids")
    if not expected:
        return
    query, passage = (gguf.get(f"rerank.check_{name}", str) for name in ("query", "passage"))
    (pair,) = engine.pairs.make(query, [passage], Cut(max_length=CHECK_MAX_LENGTH_TOKENS))
    ids = list(pair.ids)
    if not pair.truncated and ids != expected:
        what = "its tokenizer makes other ids than the reference of a known pair"
        raise gguf.refusal(f"{what} ({ids[:12]}..., not {str(expected)[:60]})")


# ------------------------------
# Scores: logits become what a client reads


def score_of(model: ModelDescription, logit: float) -> float:
    """Its sigmoid."""
    value = model.calibration_scale * logit + model.calibration_bias
    if not math.isfinite(value):
        raise EngineError(f"the model gave {logit} in place of a score")
    exponential = math.exp(-abs(value))  # with the other sign it may overflow
    return (exponential if value < 0 else 1.0) / (1.0 + exponential)


@dataclass(frozen=True, slots=True)
class Scored:
    index: int
    logit: float
    score: float
    model: str
    n_tokens: int
    truncated: bool

    def value(self, request: RerankRequest) -> float:
        return self.logit if request.raw_scores else self.score


def best_first(results: Iterable[Scored]) -> list[Scored]:
    """By logit: scores saturate at 1.0."""
    return sorted(results, key=lambda result: (-result.logit, result.index))


@dataclass(frozen=True)
class Ranking:
    """results: best first. rescored: by the first stage, of what the second put first."""

    request: RerankRequest
    path: str
    file: str
    results: Sequence[Scored]
    rescored: Sequence[Scored] = ()

    def shown(self) -> list[Scored]:
        low, top_n = self.request.min_score, self.request.top_n
        return [one for one in self.results if one.value(self.request) >= low][:top_n]

    @property
    def n_tokens(self) -> int:
        return sum(result.n_tokens for result in (*self.results, *self.rescored))


# ------------------------------
# Roles: which file serves use_llm false (m3) and true (gemma)

SLICE_PASSAGES = 128  # tokenised at once: the first decode starts while the rest is still text
AHEAD_DECODES = 8  # of a long list's pairs wait, and no more are made


class ScoreCache:
    """Logits of pairs seen before, the least recently used dropped first."""

    ENTRY_BYTES = 256  # measured: key, float, and the ordered dictionary's share

    def __init__(self, max_bytes: int) -> None:
        self._max_entries = max_bytes // self.ENTRY_BYTES
        self._logits: OrderedDict[bytes, float] = OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.Lock()  # guards all of the above

    def take(self, keys: Collection[bytes]) -> dict[bytes, float]:
        """The known ones among `keys`."""
        with self._lock:
            known = {key: self._logits.pop(key) for key in keys if key in self._logits}
            self._logits.update(known)  # at the end
            self._hits += len(known)
            self._misses += len(keys) - len(known)
            return known

    def put(self, logits: dict[bytes, float]) -> None:
        with self._lock:
            self._logits.update(logits)
            while len(self._logits) > self._max_entries:
                self._logits.popitem(last=False)

    def state(self) -> dict[str, int]:
        return {"entries": len(self._logits), "hits": self._hits, "misses": self._misses}


Window = tuple[bytes, int, bool]  # a pair's key, number of tokens, and whether it was cut


class Role:
    """A model that scores requests: a queue, and the one thread that owns the engine."""

    def __init__(
        self, name: str, description: ModelDescription, settings: Settings,
        load: Callable[[Path, Settings, bool], Engine] = load_engine,
    ) -> None:
        self.name, self.description = name, description
        self._settings, self._load = settings, load
        self.metrics = Metrics()  # until Roles gives it another
        self.queue = Queue(settings.max_queue_tokens)
        self.cache = ScoreCache(settings.cache_mb * 1_000_000)
        self._lock = threading.Lock()  # guards the start of the thread
        self._thread: threading.Thread | None = None
        self._loading: Future[Engine] | None = None  # None: the next request starts a thread
        self._engine: Engine | None = None  # once it is loaded

    def is_loaded(self) -> bool:
        return self._engine is not None

    def state(self) -> dict[str, Any]:
        """For GET /health. arithmetic: what multiplies."""
        engine = self._engine
        return {"arithmetic": engine and engine.arithmetic, "cache": self.cache.state()}

    def start(self, is_alone: bool = False) -> Future[Engine]:
        """Loads in the scheduler's thread, if nothing has. is_alone: see load_engine."""
        with self._lock:
            loading = self._loading
            if loading is None:
                loading = self._loading = Future()
                self._thread = threading.Thread(
                    target=self._run, args=(loading, is_alone), name=f"scheduler-{self.name}",
                    daemon=True)
                self._thread.start()
            return loading

    def _run(self, loading: Future[Engine], is_alone: bool) -> None:
        started, path = time.perf_counter(), self.description.path
        log.info("%s: loading %s", self.name, path.name)
        try:
            self._engine = engine = self._load(path, self._settings, is_alone)
        except BaseException as error:
            self._loading = None
            loading.set_exception(error)
            return
        log.info("%s: loaded in %.1f s", self.name, time.perf_counter() - started)
        loading.set_result(engine)
        try:
            while batch := self.queue.next_batch(engine.max_batch_tokens, engine.max_sequences):
                self._decode(engine, batch)
        except BaseException:
            log.exception("%s: the scheduler's thread ends", self.name)
            self._loading = self._engine = None
            self.queue.end(EngineError("the engine has stopped; see the server's log"))
        engine.close()

    def _decode(self, engine: Engine, batch: list[Entry]) -> None:
        n_tokens, started = n_new(batch), time.monotonic()
        self.metrics.add("batch_fill_ratio", n_tokens / engine.max_batch_tokens, self.name)
        try:
            logits = engine.score([entry.pair for entry in batch])
            self.metrics.add("pairs", len(batch), self.name)
            self.metrics.add("tokens", n_tokens, self.name)
            self.queue.finish(batch, logits, time.monotonic() - started)
        except Exception as error:
            known = error if isinstance(error, RequestError) else None
            log.error("a batch of %d pairs failed: %s", len(batch), error, exc_info=not known)
            self.metrics.add("failed_batches", 1, self.name)
            told = known or EngineError("scoring failed; see the server's log")
            self.queue.end(told, [entry.job for entry in batch])

    def admit(self, request: RerankRequest, n: int) -> contextlib.AbstractContextManager[Job]:
        """Room for the n longest of a request's pairs, before anything is tokenised."""
        longest = self.description.max_length(self._settings)
        return self.queue.admit(request.estimate_tokens(longest, n))

    def score(
        self, request: RerankRequest, indices: Sequence[int], call: Call, job: Job | None = None
    ) -> list[Scored]:
        """The passages of `indices`, in that order. job: from admit."""
        if not indices:
            return []
        if job is None:
            with self.admit(request, len(indices)) as job:
                return self.score(request, indices, call, job)
        engine = call.result(self.start())
        before, started = dict(call.times), time.monotonic()
        asked: list[list[Window]] = []
        for start in range(0, len(indices), SLICE_PASSAGES):
            self.queue.wait_for_room(job, AHEAD_DECODES * engine.max_batch_tokens, call)
            part = indices[start : start + SLICE_PASSAGES]
            left = 1 - (start + len(part)) / len(indices)
            asked += self._submit(request, engine.pairs, part, call, job, left)
        logits = call.result(job.scored)
        self.cache.put(logits)
        call.times["inference"] += job.inference_s
        busy_s = job.inference_s + call.times["tokenise"] - before["tokenise"]
        call.times["queue"] += max(0.0, time.monotonic() - started - busy_s)
        for name, seconds in call.times.items():
            self.metrics.add(f"{name}_seconds", seconds - before[name], self.name)
        results = [
            self._scored(index, windows, logits)
            for index, windows in zip(indices, asked, strict=True)
        ]
        self.metrics.add("truncated_passages", sum(one.truncated for one in results), self.name)
        return results

    def _submit(
        self, request: RerankRequest, pairs: Pairs, indices: Sequence[int], call: Call, job: Job,
        left: float,
    ) -> list[list[Window]]:
        """Tokenises some passages. Equal pairs are scored once, known ones not at all."""
        started = time.monotonic()
        made = pairs_of(request, pairs, indices)
        call.times["tokenise"] += time.monotonic() - started
        new = {pair.key: pair for pair in itertools.chain(*made) if pair.key not in job.keys}
        job.keys |= new.keys()
        known = self.cache.take(new)
        job.logits |= known
        missing = [pair for key, pair in new.items() if key not in known]
        self.queue.append(job, missing, left)
        call.n_tokens += sum(len(pair.ids) for pair in missing)
        call.n_pairs += sum(map(len, made))
        self.metrics.add("cache_hits", len(known), self.name)
        return [
            [(pair.key, len(pair.ids) + len(pair.query_ids), pair.truncated) for pair in windows]
            for windows in made
        ]

    def _scored(
        self, index: int, windows: Sequence[Window], logits: dict[bytes, float]
    ) -> Scored:
        keys, lengths, cuts = zip(*windows, strict=True)
        logit = max(logits[key] for key in keys)  # of windows the best counts
        score, name = score_of(self.description, logit), self.description.name
        return Scored(index, logit, score, name, sum(lengths), any(cuts))

    def close(self, timeout_s: float | None = None) -> bool:
        """Answers what was submitted, then frees the model. False: it took longer."""
        self.queue.close()
        if self._thread:
            self._thread.join(timeout_s)
        return not (self._thread and self._thread.is_alive())


def find_roles(settings: Settings) -> list[Role]:
    """m3, and gemma if there is one: files that flags name, else of the models folders."""
    named = {"m3": settings.m3, "gemma": settings.gemma}
    found = [] if all(named.values()) else servable_files(settings.model_folders)
    roles = []
    for name, path in named.items():
        kinds = (YES_LOGIT,) if name == "gemma" else (CROSS_ENCODER, BI_ENCODER)
        models = [describe(GgufFile.open(path))] if path else found
        model = next((model for model in models if model.kind in kinds), None)
        if model:
            roles.append(Role(name, model, settings))
        elif path:
            raise ModelError(f"{path}: a {models[0].kind} model cannot serve the {name} role")
        elif name == "m3":
            folders = " or ".join(map(str, settings.model_folders))
            raise ModelError(
                f"no model in {folders}: run `{MODEL_COMMANDS['m3']}`, or `make mini` for a small "
                "one that needs no Hub")
    return roles


def servable_files(folders: Sequence[Path]) -> list[ModelDescription]:
    """The real m3 and gemma, then others, then bi-encoders; folder by folder, newest first. A file
    that takes no role is named in the log."""

    def rank(model: ModelDescription) -> tuple[Any, ...]:
        kind = model.kind == BI_ENCODER, "reranker-v2-" not in model.name
        path = model.path
        return *kind, folders.index(path.parent), -path.stat().st_mtime_ns, path.name

    found = []
    for path in itertools.chain.from_iterable(folder.glob("*.gguf") for folder in folders):
        try:
            found.append(describe(GgufFile.open(path)))
        except (ModelError, OSError) as error:
            log.warning("not served: %s", error)
    return sorted(found, key=rank)


class Roles:
    """The m3 role (always there) and the gemma role (perhaps)."""

    def __init__(self, m3: Role, gemma: Role | None = None) -> None:
        self.m3, self.gemma, self.metrics = m3, gemma, Metrics()
        self.is_fallback = m3.description.kind == BI_ENCODER
        self._named: dict[str, Role | None] = {}  # by family, file, and what that was made of
        for family, role in (("mini" if self.is_fallback else "m3", m3), ("gemma", gemma)):
            names = {family, f"bge-reranker-v2-{family}"}
            if role:
                names |= {role.description.name, role.description.source.rpartition("/")[2]}
                role.metrics = self.metrics
                self.metrics.add_role(role)
            self._named |= {name.lower(): role for name in names}
        self._named[""] = m3

    def select(self, request: RerankRequest, strict: bool) -> Role:
        """By use_llm, else by the model's name."""
        name = (request.model or "").rpartition("/")[2].lower()
        if strict and name not in self._named:
            message = f"there is no model {request.model!r} here; see GET /v1/models"
            raise ModelNotFoundError(message, "model")
        role = self.gemma if request.use_llm else self._named.get(name, self.m3)
        if role is None:
            param = "use_llm" if request.use_llm else "model"
            raise UnavailableError(
                f"no gemma model is here, as '{param}' asks for; on the server run: "
                f"{MODEL_COMMANDS['gemma']}", param)
        return role

    def all(self) -> list[Role]:
        return [role for role in (self.m3, self.gemma) if role is not None]


# ------------------------------
# Answers: one writer for each contract. Each holds the union of what its clients read, and nothing
# that a strict one refuses.


def write_native(ranking: Ranking) -> list[float]:
    """A float for each passage, in its order. After two stages the floats of the rest are
    multiplied by the lowest of the second stage, so that the array ranks as the stages do."""
    request, results, n = ranking.request, ranking.results, len(ranking.rescored)
    scores = {result.index: result.value(request) for result in results}
    if n and not request.raw_scores:
        lowest = min(result.score for result in results[:n])
        scores |= {result.index: lowest * result.score for result in results[n:]}
    return [scores[index] for index in range(len(scores))]


def _written(
    ranking: Ranking, results: Iterable[Scored], key: str, as_sent: bool = False
) -> list[dict[str, Any]]:
    """as_sent: a passage that is asked back is an object, with what else the client's held."""
    request, written = ranking.request, []
    for result in results:
        index, document = result.index, request.passages[result.index]
        entry: dict[str, Any] = {"index": index, key: result.value(request)}
        if request.return_documents:
            entry["document"] = {**_sent(request, index), "text": document} if as_sent else document
        entry["model"] = result.model
        if request.ids and request.ids[index] is not None:
            entry["id"] = request.ids[index]
        if result.truncated:
            entry["truncated"] = True
        written.append(entry)
    return written


def _sent(request: RerankRequest, index: int) -> dict[str, Any]:
    sent = request.documents[index] if request.documents else None
    return sent if isinstance(sent, dict) else {}


def write_tei(ranking: Ranking) -> list[dict[str, Any]]:
    """Elastic's parser refuses any other key."""
    names = {"index": "index", "score": "score", "document": "text"}
    written = _written(ranking, ranking.shown(), "score")
    return [{names[key]: one[key] for key in names if key in one} for one in written]


def write_jina(ranking: Ranking) -> dict[str, Any]:
    """Jina's, Cohere's and their kin's; RAGFlow's Xinference form reads meta.tokens."""
    meta = {
        "api_version": {"version": "2" if "v2" in segments_of(ranking.path) else "1"},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": ranking.n_tokens, "output_tokens": 0},
    }
    results = _written(ranking, ranking.shown(), "relevance_score", as_sent=True)
    return {**_envelope(ranking, "rerank"), "results": results, "meta": meta}


def write_voyage(ranking: Ranking) -> dict[str, Any]:
    """Voyage's client reads `data`; LightRAG and SGLang, which send top_k as well, `results`."""
    data = _written(ranking, ranking.shown(), "relevance_score")
    return {**write_jina(ranking), "object": "list", "data": data}


def write_dashscope(ranking: Ranking) -> dict[str, Any]:
    jina = write_jina(ranking)
    output = {"results": jina["results"]}
    return {"output": output, "usage": jina["usage"], "request_id": jina["id"]}


def write_nvidia(ranking: Ranking) -> dict[str, Any]:
    shown = ranking.shown()
    return {"rankings": [{"index": result.index, "logit": result.logit} for result in shown]}


def write_khoj(ranking: Ranking) -> dict[str, Any]:
    return {"scores": write_native(ranking)}


def write_weaviate(ranking: Ranking) -> dict[str, Any]:
    scores = zip(ranking.request.passages, write_native(ranking), strict=True)
    return {"scores": [{"document": text, "score": score} for text, score in scores]}


def write_score(ranking: Ranking) -> dict[str, Any]:
    """In the order of the texts."""
    in_order = sorted(ranking.results, key=lambda result: result.index)
    data = [{"object": "score", **entry} for entry in _written(ranking, in_order, "score")]
    return {**_envelope(ranking, "list"), "data": data}


def _envelope(ranking: Ranking, kind: str) -> dict[str, Any]:
    """kind: infinity's client knows no other `object` than "rerank" for a ranking."""
    usage = {"prompt_tokens": ranking.n_tokens, "total_tokens": ranking.n_tokens}
    name, model = f"rerank-{uuid.uuid4().hex}", ranking.request.model or ranking.file
    return {"id": name, "object": kind, "model": model, "usage": usage}


CONTRACTS: dict[str, Callable[[Ranking], Any]] = {  # contract_of's names
    "native": write_native, "jina": write_jina, "tei": write_tei, "voyage": write_voyage,
    "score": write_score, "nvidia": write_nvidia, "weaviate": write_weaviate,
    "dashscope": write_dashscope, "khoj": write_khoj,
}

# ------------------------------
# Application: what each endpoint does, without HTTP

MAX_CLIENT_BATCH_SIZE = 10_000  # for TEI's clients, which split longer lists; any length is taken
MAX_INDEX_HEADER_CHARACTERS = 1000  # proxies have 4 kB or more for all headers of an answer
WEB = HERE / "web"
OPEN_ENDPOINTS = ("/", "/health", "/ready")  # without a key: a browser opens a page, probes ask
PAGE_HEADERS = {  # beside the policy in the page itself, which docs/openapi.py writes
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Response:
    """body: JSON, or a str of page_type."""

    status: int
    body: Any
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    page_type: str = "text/html; charset=utf-8"


Handler = Callable[[bytes, Call], Response]


def index_header(indices: Sequence[int]) -> str:
    """0-4,9,12; where that is too long for a header, only how many: count=14000."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    named = ",".join("-".join(map(str, run)) for run in runs)
    return named if len(named) <= MAX_INDEX_HEADER_CHARACTERS else f"count={len(indices)}"


class Application:
    """Raw body in, Response out."""

    def __init__(self, roles: Roles, settings: Settings, web: Path = WEB) -> None:
        self._roles, self._settings, self._web = roles, settings, web
        self.metrics = roles.metrics
        self.is_stopping = False
        self.routes: dict[str, dict[str, Handler]] = {
            RERANK: {"POST": self.rerank}, SCORE: {"POST": self.rerank}, "/": {"GET": self.page},
            "/health": {"GET": self.health}, "/ready": {"GET": self.ready},
            "/metrics": {"GET": self.metrics_page}, "/info": {"GET": self.info},
            "/v1/models": {"GET": self.models}, "/openapi.json": {"GET": self.openapi},
            "/docs": {"GET": self.docs},
        }

    def rerank(self, raw: bytes, call: Call) -> Response:
        request, contract = RerankRequest.parse(raw, call.path)
        ranking = self.rank(request, call)
        files = dict.fromkeys((ranking.file, *(result.model for result in ranking.results)))
        # A header holds no other alphabet.
        headers = {"X-Rerank-Model": ",".join(map(urllib.parse.quote, files))}
        truncated = sorted(result.index for result in ranking.results if result.truncated)
        if truncated:
            headers["X-Rerank-Truncated"] = index_header(truncated)
        return Response(200, CONTRACTS[contract](ranking), headers)

    def rank(self, request: RerankRequest, call: Call) -> Ranking:
        """Two stages: m3 scores everything, gemma the best llm_top_n, and those come first."""
        call.request = request
        call.timeout_s = min(call.timeout_s, request.timeout_s, self._settings.max_timeout_s)
        role = self._roles.select(request, self._settings.strict_model)
        if request.cut.instruction and not role.description.prompt.instructed_query_prefix:
            message = f"{role.description.name} takes no 'instruction'"
            raise BadRequestError(message, "instruction")
        ranking = functools.partial(Ranking, request, call.path, role.description.name)
        m3, n, everything = self._roles.m3, request.llm_top_n, range(len(request.passages))
        if role is m3 or n is None:
            return ranking(best_first(role.score(request, everything, call)))
        with role.admit(request, n) as job:  # now: not a refusal when the first stage is done
            first = best_first(m3.score(request, everything, call))
            best = [result.index for result in first[:n]]
            second = best_first(role.score(request, best, call, job))
        return ranking([*second, *first[n:]], first[:n])

    def page(self, raw: bytes, call: Call) -> Response:
        """For people; for a client that asks for JSON, and where there is no page, the
        endpoints."""
        wants_json = "application/json" in call.accept and "text/html" not in call.accept
        if not wants_json and (self._web / "index.html").is_file():
            return self._file("index.html")
        ways = [f"{method} {path}" for path, methods in self.routes.items() for method in methods]
        about = {"name": "rerank-server", "version": __version__, "endpoints": ways}
        return Response(200, about)

    def docs(self, raw: bytes, call: Call) -> Response:
        return self._file("docs.html")

    def openapi(self, raw: bytes, call: Call) -> Response:
        return dataclasses.replace(self._file("openapi.json"), page_type="application/json")

    def _file(self, name: str) -> Response:
        try:
            return Response(200, (self._web / name).read_text(encoding="utf-8"), PAGE_HEADERS)
        except OSError:  # rerank_server.py was copied alone
            raise HttpError(f"there is no web/{name} beside rerank_server.py", 404) from None

    def ready(self, raw: bytes, call: Call) -> Response:
        """Whether a load balancer should send requests."""
        if self.is_stopping or not self._roles.m3.is_loaded():
            raise UnavailableError("the server is stopping, or its model is not loaded")
        return Response(200, {"status": "ready"})

    def metrics_page(self, raw: bytes, call: Call) -> Response:
        text = prometheus_client.generate_latest(self.metrics.registry).decode()
        return Response(200, text, page_type=prometheus_client.CONTENT_TYPE_LATEST)

    def health(self, raw: bytes, call: Call) -> Response:
        models: dict[str, Any] = {"m3": None, "gemma": None}
        models |= {role.name: self._state_of(role) for role in self._roles.all()}
        reason = self._settings.tuning.accel_reason
        accel = {"used": not reason, "reason": reason, "bytes": accel_bytes()}
        about = {"status": "ok", "version": __version__, "models": models, "accel": accel}
        return Response(200, about)

    def models(self, raw: bytes, call: Call) -> Response:
        """OpenAI's list of models, one for each role that has a file; /v1/models/NAME: the one that
        serves this name."""
        _, _, name = call.path.strip("/").partition("models/")
        if not name:
            listed = [self._listed(role, role.description.name) for role in self._roles.all()]
            return Response(200, {"object": "list", "data": listed})
        asked = RerankRequest((), (), model=urllib.parse.unquote(name))
        role = self._roles.select(asked, self._settings.strict_model)
        return Response(200, self._listed(role, asked.model))

    def _listed(self, role: Role, name: str | None) -> dict[str, Any]:
        """model_type: what Xinference's clients look at."""
        return {
            "id": name, "object": "model", "created": 0, "owned_by": role.description.source,
            "model_type": "rerank", "role": role.name, **self._state_of(role),
        }

    def _state_of(self, role: Role) -> dict[str, Any]:
        model = role.description
        names = ("source", "kind", "architecture", "quantization", "file_bytes")
        return {
            "file": model.path.name, **{name: getattr(model, name) for name in names},
            "max_length": model.max_length(self._settings),
            "is_fallback": role is self._roles.m3 and self._roles.is_fallback,
            "loaded": role.is_loaded(), **role.state(),
        }

    def info(self, raw: bytes, call: Call) -> Response:
        """TEI's GET /info, which its clients ask first, and every limit of this server."""
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        model, settings = self._roles.m3.description, self._settings
        return Response(200, {
            "model_id": model.source or model.name, "model_sha": None,
            "model_dtype": model.quantization, "model_type": {"reranker": labels},
            "max_concurrent_requests": MANY, "max_input_length": model.max_length(settings),
            "max_batch_tokens": settings.tuning.ubatch,
            "max_client_batch_size": MAX_CLIENT_BATCH_SIZE, "auto_truncate": True,
            "max_body_bytes": settings.max_body_mb * 1_000_000,
            "tokenization_workers": settings.tuning.threads, "version": __version__,
        })


# ------------------------------
# HTTP, on the standard library's http.server. What is overridden says what it prevents.

MAX_REQUEST_LINE_BYTES = 8192  # RFC 9112, 3 asks for at least 8,000
MAX_HEADER_BYTES = 32768
MAX_HEADERS = 100
MAX_CHUNK_LINE_BYTES = 256
MIN_BODY_BYTES_PER_S = 10_000  # a client that sends or reads more slowly is given up
MAX_UNAUTHORIZED_BODY_BYTES = 65_536  # more is not read from a client without the key
RECEIVE_BYTES = 1 << 16
SEND_TIMEOUT_S = 30  # for a client that does not read its answer
LINGER_S = 2.0  # after an early refusal: how long the rest of the body is read and thrown away
CUT_OFF_S = 1.0  # after --drain-s: for those who are told that their request will not be done
ACCEPT_PAUSE_S = 0.05  # when the system gives no more file descriptors
MAX_LEAVING = 64  # connections that were told to make room and have not ended yet
PREFLIGHT_AGE_S = 600  # a browser asks again after it

# -- What the server is given at its start


def api_key_digests(settings: Settings) -> list[bytes]:
    """Empty: no key is asked for. Digests, since comparing strings of different lengths tells the
    length."""
    path, keys = settings.api_key_file, {"--api-key": settings.api_key}
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"--api-key-file: {path} cannot be read: {error}") from None
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line.startswith("#"):
                keys[f"--api-key-file: {path}, line {number}"] = line
        if not any(keys.values()):
            raise SettingsError(f"--api-key-file: {path} holds no key")
    for source, key in keys.items():
        if not re.fullmatch(r"[!-~]*", key):
            raise SettingsError(f"{source}: a key holds visible ASCII characters only, no spaces")
    return [hashlib.sha256(key.encode()).digest() for key in keys.values() if key]


def allowed_origins(settings: Settings) -> frozenset[str]:
    given = {origin.strip() for origin in settings.cors_origins.split(",")} - {""}
    for origin in given:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", origin):
            example = "https://app.example.com"
            raise SettingsError(f"--cors-origins: {origin!r} is no origin, as {example} is")
    return frozenset(given)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that hangs up without TLS's goodbye needs no alert: lengths say what was cut off.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # OpenSSL 3
    context.set_alpn_protocols(["http/1.1"])
    try:  # without a password OpenSSL would ask for one on the terminal
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        files = f"--tls-cert {settings.tls_cert}, --tls-key {settings.tls_key}"
        wrong = f"{files}: no PEM certificate with its unencrypted key: {error}"
        raise SettingsError(wrong) from None
    return context


# -- Connections: who is let in, who makes room, how all of it stops


class RerankServer(http.server.ThreadingHTTPServer):
    """A thread for each connection, and at most --max-connections of them. It knows which are idle,
    that is, have no whole header: the longest idle one makes room for a new client. While there is
    none, new clients wait in the kernel."""

    request_queue_size = 256  # prevents: a burst of clients is refused (the library has room for 5)

    def __init__(self, application: Application, settings: Settings) -> None:
        self.application, self.settings = application, settings
        self.api_key_digests = api_key_digests(settings)
        self.allowed_origins = allowed_origins(settings)
        self.tls_context = tls_context(settings)
        self.bodies = ByteBudget(settings.max_bodies_mb * 1_000_000)
        self.draining = self.is_cut_off = False
        self._changed = threading.Condition()  # guards _idle, _open and draining
        self._idle: dict[RerankHandler, None] = {}  # the longest idle first
        self._open = 0  # connections
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), RerankHandler)
        if self.tls_context is not None:  # each connection's own thread shakes hands
            self.socket = self.tls_context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        """Prevents: looking up this host's name, which takes seconds where DNS is slow."""
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[Any, Any]:
        """Prevents: a loop that spins while no file descriptor is free."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(ACCEPT_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Prevents: any number of threads."""
        with self._changed:
            self._changed.wait_for(self._has_room)
            if self._open >= self.settings.max_connections and self._idle:
                longest = next(iter(self._idle))
                del self._idle[longest]
                longest.stop_reading()
            self._open += 1
        super().process_request(request, client_address)

    def _has_room(self) -> bool:
        n_too_many = self._open - self.settings.max_connections
        can_make_room = bool(self._idle) and n_too_many < MAX_LEAVING
        return n_too_many < 0 or can_make_room or self.draining

    def shutdown_request(self, request: Any) -> None:
        """The end of each connection that was admitted, also where no thread could be started."""
        super().shutdown_request(request)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def becomes_idle(self, handler: RerankHandler) -> None:
        """Until becomes_busy. While the server stops, only what has arrived is still read."""
        with self._changed:
            self._idle[handler] = None
            self._changed.notify_all()
            if self.draining:
                handler.stop_reading()

    def becomes_busy(self, handler: RerankHandler) -> None:
        with self._changed:
            self._idle.pop(handler, None)

    def drain(self, timeout_s: float) -> bool:
        """Stops accepting, answers what has arrived, closes. False: some request was not done in
        time, and got 503."""
        with self._changed:
            self.draining = self.application.is_stopping = True
            self._changed.notify_all()
        self.shutdown()
        while select.select([self.socket], [], [], 0)[0]:  # closing would reset what waits there
            self.handle_request()
        self.server_close()
        with self._changed:
            for handler in self._idle:
                if handler.is_silent:
                    handler.stop_reading()
            is_done = self._changed.wait_for(self._is_empty, timeout_s)
            self.is_cut_off = not is_done
            self._changed.wait_for(self._is_empty, CUT_OFF_S)
        return is_done

    def _is_empty(self) -> bool:
        return self._open == 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prevents: a traceback printed beside the log."""
        log.error("connection failed: %s", traceback.format_exc())


class ByteBudget:
    """Bytes of request bodies in memory, over all connections."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._lock = threading.Lock()  # guards _taken

    def take(self, n_bytes: int) -> None:
        with self._lock:
            if self._taken + n_bytes > self._limit:
                raise BusyError("the server holds as many request bodies as it may")
            self._taken += n_bytes

    def give_back(self, n_bytes: int) -> None:
        with self._lock:
            self._taken -= n_bytes


# -- HTTP/1.1 as it arrives (RFC 9112). What leaves a doubt about where a request ends is refused,
#    and the connection closes: requests are smuggled where two servers read bytes differently.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
_FIELD_LINE = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)" % _TOKEN)  # no space before the colon
_TARGET = re.compile(r"(?:(?i:https?)://[^/?#@]+|(?=/))(/[^?#]*)?(?:\?[^#]*)?")  # a path or a URL
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_ONCE = ("host", "content-length", "transfer-encoding")  # RFC 9110, 8.6 and RFC 9112, 3.2
_POLL_FIN = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere only a reset is seen


class DeadlineStream(io.RawIOBase):
    """A connection's bytes, until a deadline. A socket's own time-out is for each read, and a
    client that sends a byte now and then never meets it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def allow(self, seconds: float, bytes_per_s: float = math.inf) -> None:
        """From now on; and more for what arrives: a large body may take longer, not a slow one."""
        self._deadline, self._bytes_per_s = time.monotonic() + seconds, bytes_per_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """io.BufferedReader's hook."""
        left_s = self._deadline - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)
            n_bytes = self._connection.recv_into(buffer)
        except TimeoutError:
            raise HttpError("the request took too long to arrive", 408) from None
        except OSError:
            raise ClientGoneError() from None
        self._deadline += n_bytes / self._bytes_per_s
        return n_bytes


class RerankHandler(http.server.BaseHTTPRequestHandler):
    """Reads one request after the other from a connection and writes exactly one answer to each.
    From http.server come the loop (handle), the names (command, path, headers, close_connection)
    and the writing of heads (send_response, send_header). The reading is replaced."""

    server: RerankServer
    rfile: io.BufferedReader
    wfile: io.BytesIO
    headers: dict[str, str]  # type: ignore[assignment]  # by their names in lower case
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.is_silent, self.is_stopped = True, False  # sends nothing yet; is told to close
        self._stream = DeadlineStream(self.connection)
        self.rfile = io.BufferedReader(self._stream)
        self._idle_s: float = self.server.settings.header_timeout_s  # for the first request
        self._n_counted = 0  # bytes of the body in the server's budget
        self._begin(Call())

    def stop_reading(self) -> None:
        """What has arrived is still read."""
        self.is_stopped = True
        with contextlib.suppress(OSError):  # SSLSocket's own shutdown would end the sending, too
            socket.socket.shutdown(self.connection, socket.SHUT_RD)

    def handle(self) -> None:
        """Prevents: one client's TLS handshake holds up all; a traceback when a client is gone."""
        with contextlib.suppress(OSError, ClientGoneError):
            if isinstance(self.connection, ssl.SSLSocket):
                self.server.becomes_idle(self)
                self.connection.settimeout(self.server.settings.header_timeout_s)
                self.connection.do_handshake()
            super().handle()

    def finish(self) -> None:
        self.server.becomes_busy(self)
        super().finish()
        if isinstance(self.connection, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.connection.settimeout(LINGER_S)
                self.connection.unwrap()  # tells the client that nothing was cut off

    # -- One request

    def handle_one_request(self) -> None:
        """Prevents: errors in HTML, 501 where 405 is meant, idle connections that hold requests."""
        self.close_connection = True
        if not self._arrives():
            return
        try:
            self._begin(Call(is_gone=self._is_gone, is_cut_off=self._is_cut_off))
            answer = self._answer()
        finally:
            self._begin(Call())
        self._write(answer)
        if self._is_unread:
            self._linger()

    def _arrives(self) -> bool:
        """Until a request begins. False: the client has closed, or was silent for too long."""
        self.is_silent = True
        self.server.becomes_idle(self)
        self._stream.allow(self._idle_s)
        self._idle_s = self.server.settings.keep_alive_s
        try:
            if self.rfile.peek(1) == b"\r\n":  # some end a body with a line too many: RFC 9112, 2.2
                self.rfile.read(2)
            self.is_silent = self.rfile.peek(1) == b""
        except HttpError:
            return False
        return not self.is_silent

    def _begin(self, call: Call) -> None:
        """Forgets the last request, so that an idle connection holds nothing of it."""
        self.server.bodies.give_back(self._n_counted)
        self.command, self.path, self.request_version = "", "", "HTTP/1.1"
        self.headers, self.wfile = {}, io.BytesIO()
        self._call, self._body, self._n_counted = call, b"", 0
        self._length: int | None = None  # of the body in bytes; None: not given
        self._is_chunked = False

    def _is_gone(self) -> bool:
        """A FIN counts, as nginx and uvicorn count it; not the end that stop_reading makes."""
        poll = select.poll()
        poll.register(self.connection, _POLL_FIN)
        return not self.is_stopped and poll.poll(0) != []

    def _is_cut_off(self) -> bool:
        return self.server.is_cut_off

    def _answer(self) -> bytes:
        """Whatever the application raises is answered: what befalls the connection itself is a
        ClientGoneError."""
        self._is_unread = True
        try:
            response = self._respond()
        except ClientGoneError as error:
            self.log_request(error.status)
            raise
        except Exception as error:
            response = self._refusal(error)
        return self._message(response)

    def _respond(self) -> Response:
        self._stream.allow(self.server.settings.header_timeout_s)
        self.parse_request()
        self.server.becomes_busy(self)
        handler, has_key = self._handler(), self._has_key()
        is_announced = self._is_chunked or self._expects_continue()
        if has_key or not (is_announced or (self._length or 0) > MAX_UNAUTHORIZED_BODY_BYTES):
            self._body = b"".join(self._parts(is_counted=has_key))
            self._is_unread = False
        is_open = endpoint_of(self.command, self.path) in OPEN_ENDPOINTS and not self._is_unread
        if not (has_key or is_open or self.command == "OPTIONS"):
            # Only now: the shape of the answer depends on the body.
            must = "the Authorization header must be: Bearer KEY, with a key of this server"
            raise HttpError(must, 401, {"WWW-Authenticate": "Bearer"})
        self._call.path, self._call.accept = self.path, self._field("accept")
        return handler(self._body, self._call)

    def _handler(self) -> Handler:
        routes, takes = self.server.application.routes, dict[str, Handler]()
        for method in ("GET", "POST"):
            handler = routes.get(endpoint_of(method, self.path) or "", {}).get(method)
            takes |= {method: handler} if handler else {}
        if not takes and self.path != "*":
            url = f"http://{self._field('host') or 'HOST:PORT'}"
            message = f"there is no {self.path[:200]!r} here; a base URL is {url} or {url}/v1"
            raise HttpError(message, 404)
        if "GET" in takes:
            takes["HEAD"] = takes["GET"]
        allowed = ", ".join([*takes, "OPTIONS"])
        takes["OPTIONS"] = functools.partial(_answer_options, allowed)
        if self.command not in takes:
            message = f"{self.path} takes {allowed}, not {self.command[:20]}"
            raise HttpError(message, 405, {"Allow": allowed})
        return takes[self.command]

    def _has_key(self) -> bool:
        """True where none is asked for. Compares with every key, so that the time does not tell
        which one was near."""
        scheme, _, given = self._field("authorization").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        keys = self.server.api_key_digests
        is_one_of_them = sum(hmac.compare_digest(digest, key) for key in keys) > 0
        return not keys or (is_one_of_them and scheme.lower() == "bearer")

    def _refusal(self, error: Exception) -> Response:
        if isinstance(error, ModelError):
            log.error("%s", error)
            error = UnavailableError(f"the model could not be loaded: {error}")
        if not isinstance(error, RequestError):
            log.error("%s %s failed", self.command, self.path[:200], exc_info=error)
            error = EngineError("internal error; see the server's log")
        is_text = ERRORS_AS_TEXT.search(self._body) is not None
        return Response(error.status, error.body(is_text), error.headers)

    # -- Reading

    def parse_request(self) -> bool:
        """The head, by RFC 9112. Prevents: HTTP/0.9, bare LFs, folded and broken header lines, two
        lengths, an ignored Transfer-Encoding, 6 MB of headers."""
        line = self._line(MAX_REQUEST_LINE_BYTES, 414) or self._line(MAX_REQUEST_LINE_BYTES, 414)
        parts = _REQUEST_LINE.fullmatch(line)
        if parts is None:
            raise HttpError("the request line must be: METHOD TARGET HTTP/1.1")
        self.command, target, major, minor = (part.decode() for part in parts.groups())
        if major != "1":
            raise HttpError(f"HTTP/{major}.{minor} is not spoken here; HTTP/1.1 is", 505)
        self.request_version = f"HTTP/1.{minor}"
        self.headers = self._fields()
        is_missing = "host" not in self.headers and minor != "0"
        if is_missing or not _HOST.fullmatch(self._field("host")):
            raise HttpError("a request needs one Host header, with a host in it")
        place = _TARGET.fullmatch(target)
        if place is None and (target != "*" or self.command != "OPTIONS"):
            shown = repr(target[:40])
            raise HttpError(f"the request target must be a path or an http URL, not {shown}")
        self.path = (place[1] or "/") if place else target  # without the query
        self._find_length()
        wishes = [wish.strip() for wish in self._field("connection").lower().split(",")]
        self.close_connection = "close" in wishes or (minor == "0" and "keep-alive" not in wishes)
        return True

    def _find_length(self) -> None:
        """By RFC 9112, 6.1 to 6.3."""
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if coding is not None:
            if length is not None or self.request_version == "HTTP/1.0":
                raise HttpError("Transfer-Encoding takes no Content-Length beside it, and HTTP/1.1")
            if coding.lower() != "chunked":
                raise HttpError("the only transfer coding here is chunked", 501)
            self._is_chunked = True
        elif length is not None:
            if not re.fullmatch(r"[0-9]{1,15}", length):
                raise HttpError("the Content-Length header must be one number")
            self._length = int(length)
        # A POST without a length is refused, but its client may send a body.
        may_have_body = self._is_chunked or self.command in ("POST", "PUT", "PATCH")
        self._is_unread = may_have_body if self._length is None else self._length > 0

    def _fields(self) -> dict[str, str]:
        """Header or trailer fields, up to the empty line; repeated ones are joined (RFC 9110,
        5.3)."""
        fields, room, n_lines = dict[str, str](), MAX_HEADER_BYTES, 0
        while line := self._line(room, 431):
            room, n_lines = room - len(line) - 2, n_lines + 1
            parts = _FIELD_LINE.fullmatch(line)
            if parts is None:
                must = "a header line must be one line, NAME: VALUE, without control characters"
                raise HttpError(f"{must}, not {line[:40].decode('latin-1')!r}")
            name, value = parts[1].decode().lower(), parts[2].decode("latin-1").strip(" \t")
            if name in fields:
                if name in _ONCE:
                    raise HttpError(f"the {name} header is there twice")
                value = f"{fields[name]}, {value}"
            fields[name] = value
            if n_lines > MAX_HEADERS:
                raise HttpError(f"there are more than {MAX_HEADERS} header lines", 431)
        return fields

    def _field(self, name: str) -> str:
        """Empty where there is none. name: in lower case."""
        return self.headers.get(name, "")

    def _line(self, limit: int, status: int = 400) -> bytes:
        """One line of at most limit bytes, without its CRLF. Some servers take a bare LF or CR for
        the end of a line and others do not, so neither is taken here."""
        line = self.rfile.readline(limit + 3)
        if len(line) > limit + 2:
            raise HttpError(f"a line of the request is longer than {limit:,} bytes", status)
        if not line.endswith(b"\n"):
            raise self._end()
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise HttpError("a line must end with CR LF, and have neither inside")
        return line[:-2]

    def _end(self) -> RequestError:
        """Why there is no more of a request."""
        if self.is_stopped:
            return BusyError("the server closes this connection to make room, or because it stops")
        return HttpError("the connection ended in the middle of a request")

    def _expects_continue(self) -> bool:
        expected = self._field("expect").lower()
        if self.request_version == "HTTP/1.0" or not expected:
            return False
        if expected != "100-continue":
            raise HttpError("the only expectation that can be met is 100-continue", 417)
        return self._is_chunked or bool(self._length)

    def _parts(self, is_counted: bool) -> Iterator[bytes]:
        """The body. is_counted: in the budget for bodies."""
        limit = self.server.settings.max_body_mb * 1_000_000
        self._check_body(limit)
        self._stream.allow(self.server.settings.body_timeout_s, MIN_BODY_BYTES_PER_S)
        if self._expects_continue():  # prevents: a body is invited, and then refused
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        for part in self._chunks(limit) if self._is_chunked else self._read(self._length or 0):
            if is_counted:
                self.server.bodies.take(len(part))
                self._n_counted += len(part)
            yield part

    def _check_body(self, limit: int) -> None:
        """What is known before it arrives."""
        if self.command == "POST" and self._length is None and not self._is_chunked:
            raise HttpError("the request needs a Content-Length header, or a chunked body", 411)
        coding = self._field("content-encoding").lower()
        if coding not in ("identity", ""):
            must = "bodies are read as they are, not with Content-Encoding"
            identity = {"Accept-Encoding": "identity"}  # RFC 9110, 15.5.16
            raise HttpError(f"{must} {coding[:40]!r}: send the JSON itself", 415, identity)
        if self._length is not None and self._length > limit:
            found = f"the body has {self._length:,} bytes"
            raise HttpError(f"{found}; at most {limit:,} are accepted", 413)

    def _chunks(self, limit: int) -> Iterator[bytes]:
        """RFC 9112, 7.1. Extensions and trailers are checked and ignored."""
        n_bytes, size = 0, 1
        while size:
            parts = _CHUNK_LINE.fullmatch(self._line(MAX_CHUNK_LINE_BYTES))
            if parts is None:
                raise HttpError("a chunk must begin with its size in hexadecimal digits")
            size = int(parts[1], 16)
            n_bytes += size
            if n_bytes > limit:
                raise HttpError(f"the body has more than the {limit:,} bytes accepted", 413)
            yield from self._read(size)
            if size and self._line(MAX_CHUNK_LINE_BYTES):
                raise HttpError("a chunk is longer than its size says")
        if not self._fields().keys().isdisjoint(_ONCE):
            raise HttpError("a trailer must not say how long the request is, or whom it is for")

    def _read(self, n_bytes: int) -> Iterator[bytes]:
        """In parts, so that each is counted before the next one is read."""
        while n_bytes:
            part = self.rfile.read1(min(n_bytes, RECEIVE_BYTES))
            if not part:
                raise self._end()
            n_bytes -= len(part)
            yield part

    # -- Writing

    def _message(self, response: Response) -> bytes:
        """Head and body, to leave in one write. Prevents: 40 ms until the first one is
        acknowledged. The response's headers may be another request's, too: they are copied."""
        payload = _payload(response)
        headers = {**response.headers, "X-Request-Id": self._request_id()}
        times = [f"{name};dur={value:.1f}" for name, value in self._milliseconds().items()]
        headers["Server-Timing"] = ", ".join(times)  # W3C's, in milliseconds
        headers |= self._cross_origin_headers(headers)
        if payload:  # 204 takes no length: RFC 9110, 8.6
            is_page = isinstance(response.body, str)
            headers["Content-Type"] = response.page_type if is_page else "application/json"
            headers["Content-Length"] = str(len(payload))
        must_close = self._is_unread or self.is_stopped or self.server.draining
        if self.close_connection or must_close:
            headers["Connection"] = "close"
        else:  # a pool that knows the time does not reuse a connection that is about to close
            headers["Connection"] = "keep-alive"
            headers["Keep-Alive"] = f"timeout={self.server.settings.keep_alive_s}"
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        return self.wfile.getvalue() + (b"" if self.command == "HEAD" else payload)

    def _write(self, data: bytes) -> None:
        """Prevents: a client that does not read its answer holds a thread."""
        try:
            self.connection.settimeout(SEND_TIMEOUT_S + len(data) / MIN_BODY_BYTES_PER_S)
            self.connection.sendall(data)
        except OSError:
            raise ClientGoneError() from None

    def _linger(self) -> None:
        """Prevents: an answer is lost, since closing with unread data resets the connection."""
        if not isinstance(self.connection, ssl.SSLSocket):
            self.connection.shutdown(socket.SHUT_WR)
        self._stream.allow(LINGER_S)
        with contextlib.suppress(HttpError):
            while self._stream.read(RECEIVE_BYTES):
                pass

    def version_string(self) -> str:
        """Prevents: the Server header tells Python's version."""
        return f"rerank-server/{__version__}"

    def _cross_origin_headers(self, headers: dict[str, str]) -> dict[str, str]:
        """What tells a browser that a page of an allowed origin may ask, and read the answer
        (Fetch standard, 3.3)."""
        allowed, origin = self.server.allowed_origins, self._field("origin")
        own = {"Vary": "Origin"} if allowed else {}
        if origin and not allowed.isdisjoint((origin, "*")):
            own["Access-Control-Allow-Origin"] = origin
            own["Access-Control-Expose-Headers"] = ", ".join(headers)
            if self.command == "OPTIONS":
                asked = self._field("access-control-request-headers")
                own["Access-Control-Allow-Methods"] = headers.get("Allow", "")
                own["Access-Control-Allow-Headers"] = asked or "Authorization, Content-Type"
                own["Access-Control-Max-Age"] = str(PREFLIGHT_AGE_S)
                private = "private-network"  # which a page from outside asks for
                if self._field(f"access-control-request-{private}") == "true":
                    own[f"access-control-allow-{private}"] = "true"
        return own

    def _request_id(self) -> str:
        """The client's, if it is printable and short."""
        if not _REQUEST_ID.fullmatch(self._field("x-request-id")):
            self.headers["x-request-id"] = uuid.uuid4().hex
        return self._field("x-request-id")

    def _milliseconds(self) -> dict[str, float]:
        seconds = {**self._call.times, "total": self._call.seconds}
        return {name: round(value * 1000, 1) for name, value in seconds.items()}

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """With each answer: one line in the log, and the metrics. Prevents: lines on stderr."""
        metrics, call, status = self.server.application.metrics, self._call, int(code)
        route = endpoint_of(self.command, self.path) or "other"
        metrics.add("requests", 1, route, str(status))
        metrics.add("request_seconds", call.seconds, route)
        fields: dict[str, Any] = {
            "id": self._request_id(), "method": self.command or "?", "path": self.path[:200],
            "status": status, "pairs": call.n_pairs, "tokens": call.n_tokens,
        }
        fields |= {f"{name}_ms": value for name, value in self._milliseconds().items()}
        if self.server.settings.log_texts and call.request is not None:
            fields |= {"queries": call.request.queries, "passages": call.request.passages}
        shown = f"{fields['method']} {fields['path']} {status}"
        log.info("%s", shown, extra={"fields": fields})


def _answer_options(allowed: str, raw: bytes, call: Call) -> Response:
    return Response(204, None, {"Allow": allowed})


def _payload(response: Response) -> bytes:
    if response.status == http.HTTPStatus.NO_CONTENT:
        return b""
    if isinstance(response.body, str):
        return response.body.encode("utf-8", "replace")
    return (json.dumps(response.body, ensure_ascii=False) + "\n").encode("utf-8", "replace")


# ------------------------------
# Start, check, stop

MAX_POINTER_BYTES = 1000  # of a file that stands for one in git-lfs
LOADED = b"\0"  # no signal has this number
HUNG_ENGINE_S = 5.0  # a stopping server waits so long for a decode that nobody waits for
SAMPLE = "capital of France?", ["Paris is the capital of France.", "I like cheese."]


def start_report(roles: Roles, settings: Settings, address: str) -> str:
    """What a person wants to know before the first request."""
    lines = [f"rerank-server {__version__} (llama-cpp-python {llama_version()})", ""]
    lines += _role_lines("use_llm false", roles.m3, settings)
    if roles.is_fallback:
        lines.append("    no m3 file found, so the small English model serves this role")
        lines.append(f"    to get m3: {MODEL_COMMANDS['m3']}")
    if roles.gemma:
        lines += [*_role_lines("use_llm true ", roles.gemma, settings), "    loaded on first use"]
    else:
        lines.append("  use_llm true   no model: answers 503")
        lines.append(f"    to get gemma: {MODEL_COMMANDS['gemma']}")
    lines += unconverted(settings.model_folders)
    if not WEB.is_dir():
        lines.append("  no web/ beside rerank_server.py: no page, no /docs")
    example = json.dumps(dict(zip(("query", "passages"), SAMPLE, strict=True)))
    limits = f"{settings.max_length} tokens, bodies of at most {settings.max_body_mb} MB"
    return "\n".join([
        *lines, "", f"  {settings.tuning}", f"  pairs of at most {limits}",
        f"  listening on {address}", "", "  open it in a browser, or try it here:",
        f"  curl -s {address}/rerank -H 'Content-Type: application/json' -d '{example}'", "",
    ])


def _role_lines(title: str, role: Role, settings: Settings) -> Iterator[str]:
    model = role.description
    yield f"  {title}  {os.path.relpath(model.path)}"
    about = _model_lines(model, model.max_length(settings), role.state().get("arithmetic"))
    yield from (f"    {line}" for line in about)


def _model_lines(model: ModelDescription, n_tokens: int, arithmetic: str | None) -> Iterator[str]:
    size = f"{model.file_bytes / 1e6:,.0f} MB, at most {n_tokens:,} tokens"
    yield f"{model.kind}, {model.architecture}, {model.quantization}, {size}"
    if arithmetic:
        yield f"computed by: {arithmetic}"
    if model.source:
        yield f"made of {model.source}"
    if (model.calibration_scale, model.calibration_bias) != (1, 0):
        line = f"{model.calibration_scale:.4g} x logit {model.calibration_bias:+.4g}"
        yield f"calibrated: sigmoid({line})"


def unconverted(folders: Iterable[Path]) -> Iterator[str]:
    """A line with the command for each reranker's checkpoint that no GGUF file was made of yet."""
    for config in [config for folder in folders for config in sorted(folder.glob("*/config.json"))]:
        checkpoint = config.parent
        is_reranker = "rerank" in checkpoint.name or "ForSequenceClassification" in _read(config)
        if not is_reranker or any(checkpoint.parent.glob(f"{checkpoint.name}-*.gguf")):
            continue
        where, weights = os.path.relpath(checkpoint), checkpoint.glob("*.safetensors")
        if any(file.stat().st_size < MAX_POINTER_BYTES for file in weights):
            yield f"  {where} holds git-lfs pointers: cd {where} && git lfs pull"
        else:
            yield f"  {where} is not converted yet: .venv/bin/python -m convert {where}"


def address_of(server: RerankServer, settings: Settings) -> str:
    """The URL for a client on this machine."""
    host, port = server.server_address[:2]
    named = {"0.0.0.0": "127.0.0.1"}.get(str(host), str(host))
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{named}]' if ':' in named else named}:{port}"


def serve(settings: Settings) -> None:
    """Runs until SIGTERM or Ctrl-C."""
    events, told = _stop_events()
    _allow_files()
    _bound_heaps()
    local = find_roles(settings)
    roles = Roles(*local)
    try:
        server = RerankServer(Application(roles, settings), settings)
    except OSError as error:
        place = f"{settings.host}:{settings.port}"
        raise SettingsError(f"cannot listen on {place}: {error.strerror}") from None
    # m3 is loaded before anything is read from a client: while it is, nothing else may run in this
    # process (see _given_back_while_written). Connections wait in the kernel.
    loading = local[0].start(is_alone=True)
    loading.add_done_callback(lambda _: told.send(LOADED))
    if events.recv(1) != LOADED:
        os._exit(0)  # nobody was served yet, and who loads cannot be stopped
    loading.result()
    accept = functools.partial(server.serve_forever, poll_interval=0.1)
    threading.Thread(target=accept, name="accept", daemon=True).start()
    print(start_report(roles, settings, address_of(server, settings)), flush=True)
    events.recv(1)
    log.info("stopping: requests in flight are answered first (at most %d s)", settings.drain_s)
    if not server.drain(settings.drain_s):
        log.warning("some requests were not done within %d s", settings.drain_s)
        os._exit(0)  # their threads hold the models
    if not all(role.close(HUNG_ENGINE_S) for role in local):
        os._exit(0)  # an engine that does not come back
    log.info("stopped")


def _stop_events() -> tuple[socket.socket, socket.socket]:
    """Where the main thread reads a byte for each SIGTERM and SIGINT, and where others may send
    one. The kernel may give a signal to any thread, and that wakes no main thread that waits for a
    lock: so what it reads is what the C handler writes, and Python's handler does nothing."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # set_wakeup_fd asks for it
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # or they would end the process
    return reader, writer


def _allow_files() -> None:
    """A connection is an open file."""
    with contextlib.suppress(ValueError):  # macOS has no largest number
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _bound_heaps() -> None:
    """glibc gives threads up to eight heaps for each core, and what was freed in one is of no use
    to another: under 64 clients 110 MB became 174 in 80 s, and with two heaps 117."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


_M_ARENA_MAX = -8  # malloc.h


def check(path: Path, pairs: str | None, settings: Settings) -> None:
    """--check: opens a file as the server would and says what it is; with pairs, scores them (one
    JSON line each)."""
    with contextlib.closing(load_engine(path, settings, is_alone=True)) as engine:
        if pairs is None:
            print(f"{path}: good", *_check_lines(engine), sep="\n  ")
            return
        with Path("/dev/stdin" if pairs == "-" else pairs).open(encoding="utf-8") as lines:
            _score_lines(engine, lines)


def _check_lines(engine: Engine) -> Iterator[str]:
    model, (query, passages) = engine.description, SAMPLE
    yield from _model_lines(model, model.max_tokens, engine.arithmetic)
    if model.kind == YES_LOGIT:
        for name, text in dataclasses.asdict(model.prompt).items():
            yield f"{name} {text!r}"
    logits = score_all(engine, engine.pairs.make(query, passages))
    for passage, logit in zip(passages, logits, strict=True):
        yield f"{query!r} / {passage!r}: {score_of(model, logit):.4f}"


def _score_lines(engine: Engine, lines: Iterable[str]) -> None:
    pairs: list[Pair] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                pairs += _line_pairs(engine, line)
        except BadRequestError as error:
            raise ModelError(f"--pairs, line {number}: {error.message}") from None
    started = time.perf_counter()
    logits = score_all(engine, pairs)
    seconds = time.perf_counter() - started
    for pair, logit in zip(pairs, logits, strict=True):
        shown = {**dataclasses.asdict(pair), "truncated": pair.truncated}
        shown |= {"ids": list(pair.ids), "query_ids": list(pair.query_ids)}
        shown |= {"pieces": engine.pieces(pair.ids), "query_pieces": engine.pieces(pair.query_ids)}
        print(json.dumps({**shown, "logit": logit, "score": score_of(engine.description, logit)}))
    print(json.dumps({"summary": {
        "arithmetic": engine.arithmetic, "n_pairs": len(pairs), "seconds": seconds,
        "n_tokens": sum(len(pair.ids) for pair in pairs), "rss_bytes": resident_bytes(),
    }}))


def _line_pairs(engine: Engine, line: str) -> list[Pair]:
    """A line is read as a request with one passage, which may set max_length, too."""
    body = parse_json_object(line.encode("utf-8", "surrogatepass"))
    passage = body.pop("passage", None)
    request, _ = RerankRequest.parse(json.dumps({**body, "passages": [passage]}).encode())
    return engine.pairs.make(request.queries[0], request.passages, request.cut)


class LogFormatter(logging.Formatter):
    """A record, and the `fields` that it brings, in one line: text (name=value) or JSON."""

    IN_MESSAGE = ("method", "path", "status")

    def __init__(self, kind: str) -> None:
        self._is_json = kind == "json"
        super().__init__("%(message)s" if self._is_json else "%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text, fields = super().format(record), getattr(record, "fields", {})
        if self._is_json:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            named = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
            return json.dumps({**named, "message": text, **fields})
        for name, value in fields.items():
            if name not in self.IN_MESSAGE:
                is_list = isinstance(value, tuple)
                shown = json.dumps(value, ensure_ascii=False) if is_list else value
                text += f" {name}={shown}"
        return text


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 stopped as asked, 1 a model cannot be served, 2 a setting is wrong."""
    arguments = settings_parser().parse_args(argv)
    try:
        settings = read_settings(arguments, dict(os.environ))
        handler = logging.StreamHandler()
        handler.setFormatter(LogFormatter(settings.log_format))
        logging.basicConfig(level=logging.INFO, handlers=[handler])
        if arguments.check:
            check(arguments.check, arguments.pairs, settings)
        else:
            serve(settings)
        return 0
    except (SettingsError, ModelError, EngineError, OSError) as error:
        print(f"rerank_server.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
