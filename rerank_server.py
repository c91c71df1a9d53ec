#!/usr/bin/env python3
"""Rerank server: which of these passages answers the query?

The promise: `POST /rerank {"query": str, "passages": [str], "use_llm": bool}` answers a JSON array of floats between
0 and 1, one for each passage in the order given, and each float is what the model's own code would have computed,
up to the error of the quantisation. What cannot be scored is an error, never a number.

    POST /rerank       the scores (use_llm false: the m3 role, true: the gemma role)
    POST /rerank, /v1/rerank, /v2/rerank, /score    the same in the words of other servers' clients (see CONTRACTS)
    GET  /             a page to try it in a browser (web/index.html)
    GET  /health       alive, and which file serves which role; /ready, /metrics, /info, /openapi.json, /docs
    POST /debug/pair   the token ids that the model sees for one pair (only with --debug)

A file is opened only after it was checked (`python rerank_server.py --check FILE` does just that): what scoring depends
on is in the GGUF's metadata, under `rerank.*` when this project converted it.

One request, from socket to floats:

    HTTP thread          RerankHandler._answer -> RerankRequest.parse -> Application.rank -> Queue.admit -> pairs_of
                         (text to token ids) -> ScoreCache -> Queue.append -> waits for its group, watching the client
    scheduler thread     Queue.next_batch (the next group's turn) -> Engine.score (one llama.cpp decode) -> Queue.finish
    HTTP thread          score (sigmoid; NaN refused) -> the contract's writer -> JSON

Each model has one scheduler thread, and only that thread touches the model's llama context; so no lock guards it.
Tokenising is safe from any thread (llama.h) and happens in the HTTP threads.

The file is in the order in which the data flows: settings, errors, request, pairs, queue and scheduler, GGUF metadata,
engines, scores, roles, response, HTTP, start.
"""

from __future__ import annotations

import argparse
import array
import base64
import bisect
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import hmac
import html
import http.client
import http.server
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
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

# OpenMP's threads otherwise spin while they wait for each other, and a second busy process on the machine makes each
# barrier wait for a whole time slice: 11.8 s became 4.1 s on two shared cores, and nothing changed on idle ones.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when libgomp is loaded, so before the import
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # a few microseconds: 8 % faster, and no slower beside a busy process
os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # no debugger is started when llama.cpp aborts

import llama_cpp
import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
import prometheus_client

__version__ = "0.1.0"

log = logging.getLogger("rerank")

# ---------------------------------------------------------------------------------------------------------------------
# Constants and settings
# ---------------------------------------------------------------------------------------------------------------------

MIN_MAX_LENGTH_TOKENS = 32  # below this the reference's 3/4 rule leaves no room for the passage beside the specials
MAX_MAX_LENGTH_TOKENS = 8192  # bge-reranker-v2-m3 and Gemma 1 were both built for 8,192
MIN_UBATCH_TOKENS = 32
CPU_UBATCH_TOKENS = 256  # attention is computed over a whole ubatch, masked: pairs packed together pay for each other
GPU_UBATCH_TOKENS = 2048  # not measured here: what llama.cpp's users take on a GPU
MAX_SEQUENCES = 64  # pairs in one decode; llama.cpp's own limit is 256 (LLAMA_MAX_SEQ)
QUERY_VECTORS_KEPT = 256  # bi-encoder only: a query is embedded once, not once per batch
MAX_REQUEST_LINE_BYTES = 8192  # RFC 9112, 3 asks for at least 8,000
MAX_HEADER_BYTES = 32768
MAX_HEADERS = 100
MAX_CHUNK_LINE_BYTES = 256
MIN_BODY_BYTES_PER_S = 10_000  # a client that sends or reads more slowly is given up
RECEIVE_BYTES = 1 << 16
BYTES_PER_TOKEN = 3  # of text, to know roughly what a request asks for before it is tokenised; English has about 4
SLICE_PASSAGES = 128  # tokenised at once: the first decode starts while the rest of a long list is still text
HANG_UP_POLL_S = 0.25
CUT_OFF_S = 1.0  # after --drain-s: for those who are told that their request will not be done
HUNG_ENGINE_S = 5.0  # a stopping server waits so long for a decode that nobody waits for any more
MAX_RETRY_AFTER_S = 600
MAX_NUMBER_CHARACTERS = 1000  # of JSON; reading a whole number takes time that grows with the square of its digits
MAX_JSON_CONTAINERS = 1_000_000  # an empty list is 2 bytes of JSON and some 70 in memory
MAX_UNAUTHORIZED_BODY_BYTES = 65_536  # more is not read from a client without the key; not counted
MAX_CLIENT_BATCH_SIZE = 10_000  # told to TEI's clients, which split longer lists; the server itself takes any length
PROGRESS_EVERY_S = 3.0
OPEN_ROUTES = ("/", "/health", "/ready")  # a browser opens a page without the key, and nothing secret is in it
PAGE_FILE = Path(__file__).resolve().parent / "web" / "index.html"
SEND_TIMEOUT_S = 30  # for a client that does not read its answer
LINGER_S = 2.0  # after an early refusal: how long the rest of the body is read and thrown away
PREFLIGHT_AGE_S = 600  # a browser asks again after it
ACCEPT_PAUSE_S = 0.05  # when the system gives no more file descriptors
SPARE_FILES = 128  # beside those of connections: models, logs, connections that are turned away
MAX_TRUNCATED_CHARACTERS = 1000  # of X-Rerank-Truncated
MAX_TURNED_AWAY = 64  # connections that read why they were not served
MODEL_COMMANDS = {"m3": "make convert MODEL=m3", "gemma": "make convert MODEL=gemma", "mini": "make run"}


def _setting(
    default: Any, help: str, low: int | None = None, high: int | None = None, choices: tuple[str, ...] = ()
) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


AUTO, ON, OFF = "auto", "on", "off"


@dataclass(frozen=True)
class Settings:
    """Every setting: its flag is --name-with-dashes, its environment variable RERANK_NAME. Checked when made.

    Raises SettingsError for a value out of its range or a combination that cannot work.
    """

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", 0, 65535)
    m3: Path | None = _setting(None, "GGUF file for the m3 role; default: found in --models")
    gemma: Path | None = _setting(None, "GGUF file for the gemma role; default: found in --models")
    models: str = _setting(
        str(Path(__file__).resolve().parent / "models"),
        f"folders in which GGUF files are looked for, with {os.pathsep} between them; earlier ones go first",
    )
    calibration: Path | None = _setting(None, "JSON file of bench.calibrate: scores are probabilities on judged data")
    max_length: int = _setting(
        1024, "longest pair in tokens; longer ones are truncated as the reference does",
        MIN_MAX_LENGTH_TOKENS, MAX_MAX_LENGTH_TOKENS,
    )  # fmt: skip
    threads: int = _setting(0, "threads that compute; 0: one for each physical core that this process may use", 0, 1024)
    ubatch: int = _setting(
        0, "tokens packed into one decode (a longer pair gets a decode of its own); 0: what suits the machine", 0, 8192
    )  # fmt: skip
    flash_attention: str = _setting(AUTO, "attention without its matrix in memory", choices=(AUTO, ON, OFF))
    repack: str = _setting(AUTO, "copy the weights into the layout of ggml's own kernels", choices=(AUTO, ON, OFF))
    accel: str = _setting(
        AUTO, "the int8 engine that `make accel` builds; auto: where it is built, fast and fits the memory",
        choices=(AUTO, ON, OFF),
    )  # fmt: skip
    accel_strict: bool = _setting(False, "the int8 engine with activations in two parts: more exact, slower")
    gpu_layers: int = _setting(0, "layers on the GPU, with a GPU build of llama-cpp-python; -1: all", -1, 1000)
    max_body_mb: int = _setting(32, "largest request body, in MB", 1, 1024)
    max_bodies_mb: int = _setting(128, "request bodies in memory at once, in MB; beyond it 503", 1, 65536)
    max_queue_tokens: int = _setting(
        1_000_000, "tokens that may wait for a model; beyond it 429. One request counts for at most half of it",
        1000, 1_000_000_000,
    )  # fmt: skip
    max_timeout_s: int = _setting(3600, "seconds that a request may take, unless it sets fewer; then 504", 1, 86400)
    max_connections: int = _setting(512, "connections at once, each with a thread; beyond it 503", 1, 65536)
    header_timeout_s: int = _setting(10, "seconds in which a request's header must have arrived", 1, 3600)
    body_timeout_s: int = _setting(30, "seconds for a body to arrive, and 1 more for each 10 kB of it", 1, 3600)
    keep_alive_s: int = _setting(95, "seconds that a connection may be idle between two requests", 1, 3600)
    cache_mb: int = _setting(8, "memory for scores of pairs seen before, in MB; 0: none", 0, 65536)
    unload_idle_s: int = _setting(
        0, "seconds without a request after which gemma's memory is freed until the next one; 0: never", 0, 10_000_000
    )  # fmt: skip
    drain_s: int = _setting(30, "seconds that a stopping server gives to the requests in flight", 0, 3600)
    api_key: str = _setting("", "clients must send it as `Authorization: Bearer KEY` (not for /health)")
    api_key_file: Path | None = _setting(None, "file with such keys, one a line; lines that begin with # are comments")
    cors_origins: str = _setting("", "origins whose pages may ask, with commas between them; *: all; empty: none")
    tls_cert: Path | None = _setting(None, "PEM file with the certificate (and its chain): serves https")
    tls_key: Path | None = _setting(None, "PEM file with the certificate's private key, not encrypted")
    strict_model: bool = _setting(False, "answer 404 to an unknown model name instead of taking the default model")
    log_format: str = _setting("text", "how the log is written: a line of text, or of JSON", choices=("text", "json"))
    log_texts: bool = _setting(False, "write each request's query and passages into the log")
    debug: bool = _setting(False, "serve POST /debug/pair, which shows the token ids of a pair")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            low, high, value = field.metadata["low"], field.metadata["high"], getattr(self, field.name)
            if low is not None and not low <= value <= high:
                raise SettingsError(f"{flag_of(field.name)} must be between {low} and {high}, not {value}")
            if (choices := field.metadata["choices"]) and value not in choices:
                raise SettingsError(f"{flag_of(field.name)} must be {', '.join(choices)}, not {value!r}")
        if 0 < self.ubatch < MIN_UBATCH_TOKENS:
            raise SettingsError(f"--ubatch must be 0 or at least {MIN_UBATCH_TOKENS}, not {self.ubatch}")
        if self.max_bodies_mb < self.max_body_mb:
            raise SettingsError(f"--max-bodies-mb must have room for one body of --max-body-mb ({self.max_body_mb})")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key go together")
        for name in ("m3", "gemma", "calibration", "api_key_file", "tls_cert", "tls_key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise SettingsError(f"{flag_of(name)}: there is no file {path}")
        _ = self.tuning  # which is made once, now

    @functools.cached_property
    def model_folders(self) -> list[Path]:
        return [Path(folder) for folder in self.models.split(os.pathsep) if folder]

    @functools.cached_property
    def tuning(self) -> Tuning:
        return Tuning.of(self)


class SettingsError(Exception):
    """A flag or an environment variable that cannot be used; the message names it."""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def environment_variable_of(name: str) -> str:
    return "RERANK_" + name.upper()


@dataclass(frozen=True)
class Tuning:
    """How this machine computes best, where a setting does not say. The figures behind the rules are those of
    `python -m bench.settings` (bench/results/settings.md)."""

    threads: int
    ubatch: int  # tokens
    flash_attention: bool
    repack: bool
    accel: bool
    accel_reason: str  # why not, or "strict"

    @staticmethod
    def of(settings: Settings) -> Tuning:
        """Raises SettingsError where --accel on cannot be had."""
        on_gpu = settings.gpu_layers != 0 and llama.llama_supports_gpu_offload()
        is_arm = platform.machine().lower() in ("arm64", "aarch64")
        return Tuning(
            threads=settings.threads or usable_cores(),
            ubatch=settings.ubatch or (GPU_UBATCH_TOKENS if on_gpu else CPU_UBATCH_TOKENS),
            flash_attention=settings.flash_attention != OFF,  # faster at every size, and no matrix of scores in memory
            # On x86 the tiled kernels beat the repacked ones, which also copy the weights out of the mapped file.
            repack=settings.repack == ON or (settings.repack == AUTO and is_arm and not on_gpu),
            accel=not (reason := _why_no_accel(settings, on_gpu)),
            accel_reason=reason or ("strict" if settings.accel_strict else ""),
        )

    def __str__(self) -> str:
        return (
            f"{self.threads} threads, decodes of up to {self.ubatch} tokens, flash attention "
            f"{ON if self.flash_attention else OFF}, weights {'' if self.repack else 'not '}repacked, "
            f"int8 engine {ON if self.accel else OFF}{f' ({self.accel_reason})' if self.accel_reason else ''}"
        )


def _why_no_accel(settings: Settings, on_gpu: bool) -> str:
    """Empty: the int8 engine is to be used. Raises SettingsError when it is asked for and cannot be."""
    if settings.accel == OFF:
        return "as --accel says"
    reason = "the GPU computes" if on_gpu else load_accel(ACCEL_LIBRARY)[1]
    if reason and settings.accel == ON:
        raise SettingsError(f"--accel on: {reason}")
    return reason


def usable_cores() -> int:
    """Physical cores that this process may use: two threads of one core share its multipliers. Bounded by the affinity
    mask and by the CPU quota of its cgroup (docker run --cpus)."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_core_of(cpu) for cpu in cpus})
    return int(max(1, min(cores, _cgroup_cpus(Path("/sys/fs/cgroup")))))


def _core_of(cpu: int) -> str:
    """The CPUs that share a core with this one, as the kernel lists them; itself where it does not."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_cpus(root: Path) -> float:
    """The smallest quota (cgroup v2, cpu.max) from this process's group up to the root; infinite without one."""
    return min(map(_cpu_quota, _cgroup_folders(root)), default=math.inf)


def _cgroup_folders(root: Path) -> list[Path]:
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    except OSError:
        return []
    return [folder for folder in [root / group, *(root / group).parents] if folder.is_relative_to(root)]


def _cpu_quota(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return max(1.0, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return math.inf


def settings_parser() -> argparse.ArgumentParser:
    """The command line, made from the table that Settings is."""
    parser = argparse.ArgumentParser(
        prog="rerank_server.py", description="Serve GGUF rerankers: POST /rerank {query, passages, use_llm}.",
        epilog="Each flag has an environment variable: --max-length is RERANK_MAX_LENGTH. A flag wins over it.",
    )  # fmt: skip
    for field in dataclasses.fields(Settings):
        kind: dict[str, Any] = {"metavar": field.name.upper()}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            flag_of(field.name), default=None, help=f"{field.metadata['help']} (default: {field.default})", **kind
        )
    parser.add_argument("--check", type=Path, metavar="FILE", help="check one GGUF file as the server would, and exit")
    parser.add_argument("--pairs", metavar="JSONL", help="with --check: score its {query, passage} lines (-: stdin)")
    parser.add_argument("--version", action="version", version=f"rerank-server {__version__}")
    return parser


def read_settings(arguments: argparse.Namespace, environment: dict[str, str]) -> Settings:
    """Settings from flags, else environment, else defaults. Raises SettingsError."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        given, source = getattr(arguments, field.name), flag_of(field.name)
        if given is None:
            source = environment_variable_of(field.name)
            given = environment.get(source) or None
        if given is not None:
            values[field.name] = _parse_setting(field, given, source)
    return Settings(**values)


def _parse_setting(field: dataclasses.Field[Any], given: str | bool, source: str) -> Any:
    if isinstance(given, bool):
        return given
    if isinstance(field.default, bool):
        truth = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(given.lower())
        if truth is None:
            raise SettingsError(f"{source} must be true or false, not {given!r}")
        return truth
    if isinstance(field.default, int):
        try:
            return int(given)
        except ValueError:
            raise SettingsError(f"{source} must be a whole number, not {given!r}") from None
    return given if isinstance(field.default, str) else Path(given)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
#
#   RequestError                what a client is told; each type carries its HTTP status and its error_type
#     BadRequestError   400
#     ModelNotFoundError 404    with --strict-model
#     HttpError 400             or 401, 404, 405, 408, 411, 413, 414, 415, 417, 431, 501, 505: what arrived is not
#                               served as HTTP; where it leaves a doubt about the request's end, the connection closes
#     OverloadedError   429     the queue is full
#     ClientGoneError   499     nobody waits for the answer; it is never sent
#     EngineError       500     scoring failed: an exception, or a logit that is not a number
#     UnavailableError  503     no model for this role, or the server is stopping
#     BusyError         503     no room for another connection or body
#     DeadlineError     504     the request's time is over
#   ModelError                  a GGUF file that cannot be served; ends the start, or becomes an UnavailableError
# ---------------------------------------------------------------------------------------------------------------------


class RequestError(Exception):
    """An answer that is not a success. `param` is the field of the body that is wrong, where there is one."""

    status: int = 500
    error_type: str = "internal_error"

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.headers = message, param, headers or {}

    def body(self, is_tei: bool = False) -> dict[str, Any]:
        """One body that every family of clients can read: `error.message`, `message` (Cohere), `detail` (Jina); TEI's
        clients need `error` to be a string."""
        error: dict[str, Any] = {"message": self.message, "type": self.error_type, "code": self.status}
        if self.param is not None:
            error["param"] = self.param
        shown = self.message if is_tei else error
        return {"error": shown, "error_type": self.error_type, "message": self.message, "detail": self.message}


class BadRequestError(RequestError):
    status, error_type = 400, "invalid_request"


class ModelNotFoundError(RequestError):
    status, error_type = 404, "model_not_found"


class HttpError(RequestError):
    """What arrived is not served as HTTP, whatever its body means."""

    def __init__(self, message: str, status: int = 400, headers: dict[str, str] | None = None) -> None:
        super().__init__(message, headers=headers)
        self.status = status
        self.error_type = HTTP_ERROR_TYPES.get(status, "invalid_http")


HTTP_ERROR_TYPES = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed",
                    411: "length_required", 413: "payload_too_large"}  # fmt: skip


class OverloadedError(RequestError):
    status, error_type = 429, "overloaded"

    def __init__(self, n_tokens: int, retry_after_s: int) -> None:
        message = f"{n_tokens:,} tokens wait to be scored, as many as may; try again in {retry_after_s} s"
        super().__init__(message, headers={"Retry-After": str(retry_after_s)})


class ClientGoneError(RequestError):
    status, error_type = 499, "client_gone"

    def __init__(self) -> None:
        super().__init__("the client has closed its connection")


class EngineError(RequestError):
    status, error_type = 500, "engine_error"


class UnavailableError(RequestError):
    status, error_type = 503, "model_unavailable"


class BusyError(RequestError):
    status, error_type = 503, "overloaded"

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; try again later", headers={"Retry-After": "1"})


class DeadlineError(RequestError):
    status, error_type = 504, "deadline_exceeded"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the request was not done within its {timeout_s:,.3g} s")


class ModelError(Exception):
    """A GGUF file that must not be served. One line that says what is wrong and how to get a right one."""


# ---------------------------------------------------------------------------------------------------------------------
# Request: the body becomes a frozen object here; nothing further in looks at JSON
#
# FIELDS is the one table of what a body may hold: it drives the parsing, the OpenAPI document and /docs.
# ---------------------------------------------------------------------------------------------------------------------

TRUNCATE, ERROR, CHUNK = "truncate", "error", "chunk"


@dataclass(frozen=True)
class RerankRequest:
    """What every contract becomes. queries: one for all passages or one for each. texts: the client's word for them."""

    queries: tuple[str, ...]
    passages: tuple[str, ...]
    use_llm: bool = False
    model: str | None = None
    llm_top_n: int | None = None
    top_n: int | None = None
    return_documents: bool = False
    raw_scores: bool = False
    min_score: float | None = None
    ids: tuple[str | int | None, ...] | None = None
    max_length: int | None = None
    max_passage: int | None = None
    on_overflow: str = TRUNCATE
    keep_end: bool = False
    return_characters_read: bool = False
    timeout_s: float = math.inf
    texts: str = "passages"

    @staticmethod
    def parse(raw: bytes, path: str = "/rerank") -> tuple[RerankRequest, Contract]:
        """The contract follows from the body's keys, and from the route where it must. Raises BadRequestError that
        names the field, and for a passage its index."""
        body = parse_json_object(raw)
        contract = next(contract for contract in CONTRACTS if contract.fits(body, path))
        values = contract.read_texts(body, contract)
        for field in FIELDS:
            if body.get(field.name) is not None and contract.name in (field.contracts or (contract.name,)):
                value = field.read(body[field.name], field.name)
                values |= {} if value is None else {field.target: value}
        request = RerankRequest(**values)
        n_passages = len(request.passages)
        if request.ids is not None and len(request.ids) != n_passages:
            raise BadRequestError(f"'ids' has {len(request.ids)} entries for {n_passages} {request.texts}", "ids")
        if request.top_n == 0 and n_passages:  # clients that send the length of their list send 0 for an empty one
            name = "top_n" if "top_n" in body else "top_k"
            raise BadRequestError(f"'{name}' must be at least 1", name)
        return request, contract

    def query_of(self, index: int) -> str:
        return self.queries[index] if len(self.queries) > 1 else self.queries[0]

    def estimate_tokens(self, longest: int, n: int | None = None) -> int:
        """What the n longest pairs (default: all) will be about, from the bytes of their texts: a token for each
        BYTES_PER_TOKEN. A byte is at most one token, so it is never more than BYTES_PER_TOKEN times this."""
        queries = [len(query.encode()) for query in self.queries]
        if len(queries) == 1:
            queries *= len(self.passages)
        most = math.inf if self.on_overflow == CHUNK else longest
        sizes = ((query + len(text.encode())) // BYTES_PER_TOKEN + 1
                 for query, text in zip(queries, self.passages, strict=True))  # fmt: skip
        return int(sum(sorted((min(most, size) for size in sizes), reverse=True)[:n]))


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """The body as a dict. Raises BadRequestError for invalid UTF-8, invalid JSON, and JSON that is not an object.

    Stricter than Python's json: names must be unique (readers differ in which of two they take: RFC 8259, 4), NaN and
    Infinity are no JSON, and the memory that a body grows into is bounded.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not valid UTF-8: byte {error.start} is wrong") from None
    if _n_containers(raw) > MAX_JSON_CONTAINERS:
        raise BadRequestError(f"the body holds more than {MAX_JSON_CONTAINERS:,} lists and objects")
    try:
        body = _JSON.decode(text)
    except RecursionError:
        raise BadRequestError("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, not {_json_type(body)}")
    return body


def _n_containers(raw: bytes) -> int:
    """Lists and objects of a JSON text. Brackets inside strings are told apart only where there are many."""
    if (n_brackets := raw.count(b"[") + raw.count(b"{")) <= MAX_JSON_CONTAINERS:
        return n_brackets
    bare = re.sub(rb'"[^"]*"', b"", re.sub(rb"\\.", b"", raw, flags=re.DOTALL))
    return bare.count(b"[") + bare.count(b"{")


def _json_object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        ((name, _),) = Counter(name for name, _ in items).most_common(1)
        raise BadRequestError(f"the name {name[:100]!r} is in an object of the body twice", name[:100])
    return found


def _json_integer(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARACTERS:
        n, limit = len(text), MAX_NUMBER_CHARACTERS
        raise BadRequestError(f"a number in the body has {n:,} characters; at most {limit:,} are read")
    return int(text)


def _json_float(text: str) -> float:
    if len(text) > MAX_NUMBER_CHARACTERS or not math.isfinite(value := float(text)):
        raise BadRequestError(f"the number {text[:40]} in the body is more than a float can hold")
    return value


def _json_constant(text: str) -> None:
    raise BadRequestError(f"the body is not valid JSON: {text} is no JSON number")


_JSON = json.JSONDecoder(
    object_pairs_hook=_json_object, parse_int=_json_integer, parse_float=_json_float, parse_constant=_json_constant
)  # fmt: skip


def _text(value: Any, name: str, body: dict[str, Any] | None = None) -> str:
    if not isinstance(value, str):
        raise BadRequestError(_expected(name, "a string", {name: value} if body is None else body), name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" alone is valid JSON but not text
        raise BadRequestError(f"'{name}' has a lone surrogate at character {error.start}", name) from None
    return value


def _boolean(value: Any, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):  # some clients send booleans as strings
        return value.lower() == "true"
    raise BadRequestError(_expected(name, "true or false", {name: value}), name)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        with contextlib.suppress(OverflowError):  # an integer of 400 digits
            if math.isfinite(float(value)):
                return float(value)
    raise BadRequestError(_expected(name, "a number that a float can hold", {name: value}), name)


def _count(low: int, high: int) -> Callable[[Any, str], int]:
    def read(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise BadRequestError(_expected(name, "a whole number", {name: value}), name)
        if not low <= value <= high:
            raise BadRequestError(f"'{name}' must be between {low} and {high:,}, not {value}", name)
        return int(value)

    return read


def _seconds(value: Any, name: str) -> float:
    if (seconds := _number(value, name)) <= 0:
        raise BadRequestError(f"'{name}' must be more than 0 seconds, not {seconds:g}", name)
    return seconds


def _choice(*choices: str) -> Callable[[Any, str], str]:
    def read(value: Any, name: str) -> str:
        if value not in choices:
            raise BadRequestError(f"'{name}' must be {' or '.join(map(repr, choices))}", name)
        return str(value)

    return read


def _ids(value: Any, name: str) -> tuple[str | int, ...]:
    if not isinstance(value, list):
        raise BadRequestError(_expected(name, "a list of strings or numbers", {name: value}), name)
    return tuple(_id(item, f"{name}[{index}]") for index, item in enumerate(value))


def _id(value: Any, name: str) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, name)
    raise BadRequestError(_expected(name, "a string or a whole number", {name: value}), name)


def _expected(name: str, expected: str, body: dict[str, Any]) -> str:
    if name not in body:
        return f"'{name}' is missing: it must be {expected}"
    return f"'{name}' must be {expected}, not {_json_type(body[name])}"


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


Schema = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """An optional key of a request body. contracts: those that know it; none: all of them."""

    name: str
    target: str  # field of RerankRequest
    read: Callable[[Any, str], Any]
    schema: Schema
    help: str
    contracts: tuple[str, ...] = ()


def _overflow(value: Any, name: str) -> str | None:
    """truncate: true is what clients send without being asked; it does not overrule an on_overflow."""
    return None if _boolean(value, name) else ERROR


_BOOLEAN, _POSITIVE = {"type": "boolean", "default": False}, {"type": "integer", "minimum": 1}
_MANY = 2**31 - 1
FIELDS = (
    Field("model", "model", _text, {"type": "string"}, "m3, gemma, mini or a Hub name; any other gets the default"),
    Field("use_llm", "use_llm", _boolean, _BOOLEAN, "score with bge-reranker-v2-gemma"),
    Field("llm_top_n", "llm_top_n", _count(1, _MANY), _POSITIVE,
          "with use_llm: m3 scores all, gemma only the best so many, which rank before the rest"),
    Field("top_n", "top_n", _count(0, _MANY), _POSITIVE, "how many results to return; all when it is larger"),
    Field("top_k", "top_n", _count(0, _MANY), _POSITIVE, "the same as top_n"),
    Field("return_documents", "return_documents", _boolean, _BOOLEAN, "put the text into each result"),
    Field("return_text", "return_documents", _boolean, _BOOLEAN, "put the text into each result", ("tei",)),
    Field("raw_scores", "raw_scores", _boolean, _BOOLEAN, "logits in place of scores between 0 and 1"),
    Field("min_score", "min_score", _number, {"type": "number"}, "leave out results below (a logit with raw_scores)"),
    Field("ids", "ids", _ids, {"type": "array", "items": {"type": ["string", "integer"]}},
          "an id for each document, returned with its result"),
    Field("max_length", "max_length", _count(MIN_MAX_LENGTH_TOKENS, MAX_MAX_LENGTH_TOKENS),
          {"type": "integer", "minimum": MIN_MAX_LENGTH_TOKENS, "maximum": MAX_MAX_LENGTH_TOKENS},
          "longest pair in tokens, at most the server's"),
    Field("max_tokens_per_doc", "max_passage", _count(1, _MANY), _POSITIVE, "tokens of each document that are read"),
    Field("truncate", "on_overflow", _overflow, _BOOLEAN | {"default": True}, "false: refuse long texts", ("tei",)),
    Field("truncation", "on_overflow", _overflow, _BOOLEAN | {"default": True}, "false: refuse long ones", ("voyage",)),
    Field("on_overflow", "on_overflow", _choice(TRUNCATE, ERROR, CHUNK),
          {"type": "string", "enum": [TRUNCATE, ERROR, CHUNK], "default": TRUNCATE},
          "a document that is too long is cut, refused, or scored in overlapping windows of which the best counts"),
    Field("truncation_direction", "keep_end", lambda value, name: _choice("Left", "Right")(value, name) == "Left",
          {"type": "string", "enum": ["Left", "Right"], "default": "Right"}, "the end that is cut", ("tei",)),
    Field("return_characters_read", "return_characters_read", _boolean, _BOOLEAN,
          "of a document that was cut, say how many characters were read, to within a word"),
    Field("timeout", "timeout_s", _seconds, {"type": "number", "exclusiveMinimum": 0},
          "seconds after which the answer is 504 and the rest is not scored; at most the server's"),
)  # fmt: skip


# -- Contracts: how each family of clients names the texts, and (further down) how it reads the answer -----------------


@dataclass(frozen=True)
class Contract:
    """A row of CONTRACTS. fits: whether a body on a route is meant for it; the last one takes what is left."""

    name: str
    routes: tuple[str, ...]
    texts: str  # the key that holds the passages
    fits: Callable[[dict[str, Any], str], bool]
    read_texts: Callable[[dict[str, Any], Contract], dict[str, Any]]
    write: Callable[[Ranking, RerankRequest, str], Any]
    help: str
    example: dict[str, Any]
    two_stages: dict[str, Any] | None = None  # a second example, which needs the gemma role

    def examples(self) -> dict[str, dict[str, Any]]:
        return {self.name: self.example, **({f"{self.name} two stages": self.two_stages} if self.two_stages else {})}


def _read_texts(body: dict[str, Any], contract: Contract) -> dict[str, Any]:
    """query and a list of passages: strings, or (not in the native contract) objects with a text and perhaps an id."""
    name = contract.texts
    items = body.get(name)
    if not isinstance(items, list):
        raise BadRequestError(_expected(name, "a list of strings", body), name)
    query = _text(body.get("query"), "query", body)
    if contract.name == "native":
        return {"queries": (query,), "passages": tuple(_text(item, f"{name}[{n}]") for n, item in enumerate(items))}
    fields = body.get("rank_fields") or ["text"]
    passages = tuple(_document(item, f"{name}[{n}]", fields) for n, item in enumerate(items))
    return {"queries": (query,), "passages": passages, "texts": name, "ids": _document_ids(items, name)}


def _document_ids(items: Any, name: str) -> tuple[str | int | None, ...] | None:
    """The `id` of each document that has one; None when none has."""
    if not isinstance(items, list) or not any(isinstance(item, dict) and "id" in item for item in items):
        return None
    given = [item.get("id") if isinstance(item, dict) else None for item in items]
    return tuple(None if value is None else _id(value, f"{name}[{index}].id") for index, value in enumerate(given))


def _document(item: Any, name: str, fields: Any) -> str:
    """A string, or an object: its `text`, or the rank_fields (Cohere v1) joined by line ends."""
    if not isinstance(item, dict):
        return _text(item, name)
    if not isinstance(fields, list):
        raise BadRequestError("'rank_fields' must be a list of strings", "rank_fields")
    fields = [_text(field, f"rank_fields[{index}]") for index, field in enumerate(fields)]
    texts = [_text(item[field], f"{name}.{field}") for field in fields if item.get(field) is not None]
    if not texts:
        raise BadRequestError(f"'{name}' has no {' or '.join(map(repr, fields))}: it must be a string or have it", name)
    return "\n".join(texts)


def _read_score_texts(body: dict[str, Any], contract: Contract) -> dict[str, Any]:
    """vLLM's /score: text_1 against text_2, or queries against documents; one against many, or pair by pair."""
    first, second = ("queries", "documents") if "queries" in body else ("text_1", "text_2")
    queries, passages = _text_list(body, first), _text_list(body, second)
    if len(queries) not in (1, len(passages)):
        raise BadRequestError(f"'{first}' must be one text or as many as '{second}' ({len(passages)})", first)
    return {"queries": queries, "passages": passages, "texts": second, "ids": _document_ids(body[second], second)}


def _text_list(body: dict[str, Any], name: str) -> tuple[str, ...]:
    value = body.get(name)
    if isinstance(value, list):
        return tuple(_document(item, f"{name}[{index}]", ["text"]) for index, item in enumerate(value))
    if isinstance(value, str):
        return (_text(value, name),)
    raise BadRequestError(_expected(name, "a string or a list of strings", body), name)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: text to token ids and truncation, nothing else
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One pair as the model sees it.

    ids: token ids with their specials. passage_start: index in ids at which the passage part begins.
    query_ids: bi-encoder only, the query's own sequence (ids is then the passage's).
    n_shared: how many leading ids are computed once for all pairs of a query (decoders only: a prefix stands alone).
    n_dropped: tokens of the query and the passage that were cut.
    """

    ids: tuple[int, ...]
    passage_start: int
    n_dropped: int
    query_ids: tuple[int, ...] = ()
    n_shared: int = 0

    @property
    def truncated(self) -> bool:
        return self.n_dropped > 0

    @property
    def n_new(self) -> int:
        """Tokens that this pair adds to a batch of its request."""
        return len(self.ids) - self.n_shared

    @property
    def prefix(self) -> tuple[int, ...]:
        """The leading ids that are computed once."""
        return self.ids[: self.n_shared]

    @property
    def key(self) -> bytes:
        """Equal for pairs that the model cannot tell apart (16 bytes of BLAKE2b over the ids)."""
        ids = array.array("i", (*self.ids, -1, *self.query_ids))
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


class Tokenizer(Protocol):
    """text -> token ids, without specials; a special token's string inside a text is text."""

    def __call__(self, text: str) -> list[int]: ...


class Pairs(Protocol):
    """Any thread."""

    longest: int  # tokens of the longest pair that is made

    def make(
        self, query: str, passages: Sequence[str], max_length: int | None = None, max_passage: int | None = None,
        keep_end: bool = False,
    ) -> list[Pair]:  # fmt: skip
        """One pair for each passage, cut to max_length and the passage to max_passage tokens, from its end or start."""

    def windows(
        self, query: str, passage: str, max_length: int | None = None, max_passage: int | None = None
    ) -> list[Pair]:
        """Pairs with overlapping windows of the passage (a quarter of each), which together hold all of it."""

    def room(self, query: str, max_length: int | None = None, max_passage: int | None = None) -> int:
        """Tokens that `make` leaves to a passage."""

    def n_characters(self, passage: str, n_tokens: int, keep_end: bool = False) -> int:
        """How much of the passage's start (or end) is no more than so many tokens, to within a word."""


@dataclass(frozen=True)
class Frame:
    """What surrounds the passage of a pair: head and tail are whole, the passage gets `room` tokens."""

    head: tuple[int, ...]
    tail: tuple[int, ...]
    room: int
    n_dropped: int  # tokens of the query that were cut
    query_ids: tuple[int, ...] = ()
    n_shared: int = 0

    def pair(self, ids: Sequence[int], n_dropped: int) -> Pair:
        ids = (*self.head, *ids, *self.tail)
        return Pair(ids, len(self.head), self.n_dropped + n_dropped, self.query_ids, self.n_shared)


class FramedPairs:
    """Implements Pairs; a subclass says how its model frames a passage."""

    passage_prefix = ""
    _prefix_ids: tuple[int, ...] = ()  # of passage_prefix, without a space that may belong to the passage's first token

    def __init__(self, tokenize: Tokenizer, max_length: int) -> None:
        self._tokenize, self._max_length = tokenize, max_length
        self.longest = max_length

    def make(
        self, query: str, passages: Sequence[str], max_length: int | None = None, max_passage: int | None = None,
        keep_end: bool = False,
    ) -> list[Pair]:  # fmt: skip
        """See Pairs.make."""
        frame = self._frame(query, min(max_length or self._max_length, self._max_length))
        room = min(frame.room, max_passage or frame.room)
        pairs = []
        for passage in passages:
            ids = self._tokenize(self.passage_prefix + passage)
            kept = ids[:room]
            if keep_end and len(ids) > room:
                prefix, rest = self._split_prefix(ids)
                kept = [*prefix, *rest[len(rest) - max(0, room - len(prefix)) :]]
            pairs.append(frame.pair(kept, len(ids) - len(kept)))
        return pairs

    def windows(
        self, query: str, passage: str, max_length: int | None = None, max_passage: int | None = None
    ) -> list[Pair]:
        """See Pairs.windows."""
        frame = self._frame(query, min(max_length or self._max_length, self._max_length))
        ids = self._tokenize(self.passage_prefix + passage)
        prefix, rest = self._split_prefix(ids[: max_passage or len(ids)])
        size = max(1, frame.room - len(prefix))
        overlap, n_dropped = size // 4, max(0, len(ids) - (max_passage or len(ids)))
        starts = range(0, max(1, len(rest) - overlap), size - overlap)
        return [frame.pair([*prefix, *rest[start : start + size]], n_dropped) for start in starts]

    def room(self, query: str, max_length: int | None = None, max_passage: int | None = None) -> int:
        """See Pairs.room."""
        frame = self._frame(query, min(max_length or self._max_length, self._max_length))
        return min(frame.room, max_passage or frame.room)

    def n_characters(self, passage: str, n_tokens: int, keep_end: bool = False) -> int:
        """See Pairs.n_characters. Searched for, since no tokenizer here says where in the text a token begins."""

        def n_tokens_of(n: int) -> int:
            return len(self._tokenize(self.passage_prefix + (passage[len(passage) - n :] if keep_end else passage[:n])))

        near = max(1, n_tokens)
        while near < len(passage) and n_tokens_of(near) <= n_tokens:  # a long rest is never tokenised
            near *= 2
        part = passage[-2 * near :] if keep_end else passage[: 2 * near]
        words = re.finditer(r"\S+", part)  # whole ones first: a torn one can have more tokens
        ends = sorted(len(part) - word.start() if keep_end else word.end() for word in words)
        n_whole = bisect.bisect_right(ends, n_tokens, key=n_tokens_of)
        low, high = [0, *ends][n_whole], [*ends, len(part)][n_whole]
        return max(low, bisect.bisect_right(range(high + 1), n_tokens, lo=low, key=n_tokens_of) - 1)

    def _split_prefix(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The passage's prefix, which every window keeps, and the rest."""
        n = len(self._prefix_ids) if tuple(ids[: len(self._prefix_ids)]) == self._prefix_ids else 0
        return ids[:n], ids[n:]

    def _frame(self, query: str, max_length: int) -> Frame:
        raise NotImplementedError


class CrossEncoderPairs(FramedPairs):
    """`<s> q </s> </s> p </s>` (XLM-R) or `[CLS] q [SEP] p [SEP]` (BERT), cut as FlagEmbedding's FlagReranker does.

    The query is cut to 3/4 of max_length, the passage to max_length, then only the passage is shortened until the pair
    fits, specials counted (FlagEmbedding 1.4.2, BaseReranker.compute_score_single_gpu).
    """

    def __init__(self, tokenize: Tokenizer, first: int, separators: Sequence[int], last: int, max_length: int) -> None:
        super().__init__(tokenize, max_length)
        self._first, self._separators, self._last = first, tuple(separators), last

    def _frame(self, query: str, max_length: int) -> Frame:
        ids, kept = self._tokenize(query), max_length * 3 // 4
        head = (self._first, *ids[:kept], *self._separators)
        return Frame(head, (self._last,), max(0, max_length - len(head) - 1), max(0, len(ids) - kept))


class PromptPairs(FramedPairs):
    """`<bos> "A: " query "\\n" "B: " passage "\\n" prompt`, each part tokenised on its own (FlagLLMReranker).

    The passage part is cut so that everything before the last separator fits max_length + len(separator) +
    len(prompt) tokens; the last separator and the prompt are appended after the cut and are always whole.
    """

    def __init__(self, tokenize: Tokenizer, bos: int, parts: PromptParts, max_length: int) -> None:
        super().__init__(tokenize, max_length)
        self._bos, self._parts, self.passage_prefix = bos, parts, parts.passage_prefix
        self._prefix_ids = tuple(tokenize(parts.passage_prefix.rstrip()))
        self._separator = tuple(tokenize(parts.separator))
        self._tail = self._separator + tuple(tokenize(parts.prompt))
        self.longest = max_length + 2 * len(self._tail)

    def _frame(self, query: str, max_length: int) -> Frame:
        ids, kept = self._tokenize(self._parts.query_prefix + query), max_length * 3 // 4
        head = (self._bos, *ids[:kept], *self._separator)
        room = min(max_length, max(0, max_length + len(self._tail) - len(head)))
        return Frame(head, self._tail, room, max(0, len(ids) - kept), n_shared=len(head))


class TextPairs(FramedPairs):
    """Bi-encoder: query and passage are each `[CLS] text [SEP]`, cut to max_length (sentence-transformers)."""

    def __init__(self, tokenize: Tokenizer, first: int, last: int, max_length: int) -> None:
        super().__init__(tokenize, max_length)
        self._first, self._last = first, last

    def _frame(self, query: str, max_length: int) -> Frame:
        ids, room = self._tokenize(query), max_length - 2
        query_ids = (self._first, *ids[:room], self._last)
        return Frame((self._first,), (self._last,), room, max(0, len(ids) - room), query_ids)


def pairs_of(request: RerankRequest, pairs: Pairs, indices: Sequence[int]) -> list[list[Pair]]:
    """For each passage of `indices` its pair, or its windows. Raises BadRequestError for one that may not be cut."""
    if request.on_overflow == CHUNK:
        return [
            pairs.windows(request.query_of(index), request.passages[index], request.max_length, request.max_passage)
            for index in indices
        ]  # fmt: skip
    by_query: dict[str, list[int]] = {}
    for index in indices:
        by_query.setdefault(request.query_of(index), []).append(index)
    made: dict[int, Pair] = {}
    for query, own in by_query.items():
        texts = [request.passages[index] for index in own]
        built = pairs.make(query, texts, request.max_length, request.max_passage, request.keep_end)
        made.update(zip(own, built, strict=True))
    for index, pair in made.items():
        if request.on_overflow == ERROR and pair.truncated:
            name = f"{request.texts}[{index}]"
            raise BadRequestError(f"'{name}' is {pair.n_dropped} tokens too long for one pair with its query", name)
    return [[made[index]] for index in indices]


def characters_read(request: RerankRequest, pairs: Pairs, index: int) -> int:
    """How much of a passage that was cut the model saw. All of it: then the query was cut."""
    passage, room = request.passages[index], request.max_passage
    if request.on_overflow != CHUNK:
        room = pairs.room(request.query_of(index), request.max_length, room)
    return len(passage) if room is None else pairs.n_characters(passage, room, request.keep_end)


class VocabTokenizer:
    """llama.cpp's own tokenizer of the opened file: XLM-R's unigram and Gemma's SentencePiece BPE are exact in it.

    add_special is false (the pairs bring their own) and parse_special is false (`</s>` inside a text is text).
    """

    def __init__(self, vocab: Any) -> None:
        self._vocab = vocab

    def __call__(self, text: str) -> list[int]:
        raw = text.encode("utf-8")
        if not raw:
            return []
        size = len(raw) + 16  # a byte gives at most one id, and a few for a prefix
        buffer = (llama.llama_token * size)()
        count = llama.llama_tokenize(self._vocab, raw, len(raw), buffer, size, False, False)
        if count < 0:
            size = -count
            buffer = (llama.llama_token * size)()
            count = llama.llama_tokenize(self._vocab, raw, len(raw), buffer, size, False, False)
        if count < 0:
            raise EngineError("the tokenizer failed")
        return list(buffer[:count])


class XlmRobertaTokenizer(VocabTokenizer):
    """U+0085 (NEXT LINE) is the one character at which transformers' tokenizer splits and llama.cpp's does not."""

    def __call__(self, text: str) -> list[int]:
        return super().__call__(text.replace("\x85", " "))


class WordPieceTokenizer:
    """BERT's tokenizer over the file's vocabulary (Devlin et al., 2018; tokenization.py of google-research/bert).

    Not llama.cpp's, which differs from the reference: it has no [UNK] for words of more than 100 characters, and drops
    spacing combining marks (Devanagari vowel signs) that BERT keeps.
    """

    MAX_WORD_CHARACTERS = 100

    def __init__(self, pieces: Sequence[str], unknown: int, lowercase: bool, strip_accents: bool) -> None:
        """pieces: the GGUF's token texts; a piece that begins a word is stored as "▁piece" there."""
        self._starts = {piece[1:]: index for index, piece in enumerate(pieces) if piece.startswith("▁")}
        self._continuations = {piece: index for index, piece in enumerate(pieces) if not piece.startswith("▁")}
        self._unknown, self._lowercase, self._strip_accents = unknown, lowercase, strip_accents
        self._word = functools.lru_cache(maxsize=65536)(self._split_word)
        self._fold = _CharacterTable(self._fold_character)

    def __call__(self, text: str) -> list[int]:
        return [index for word in self._words(text) for index in self._word(word)]

    def _words(self, text: str) -> list[str]:
        text = "".join(map(_CLEAN.__getitem__, text))
        if self._strip_accents:
            text = unicodedata.normalize("NFD", text)
        return "".join(map(self._fold.__getitem__, text)).split()

    def _fold_character(self, character: str) -> str:
        category = unicodedata.category(character)
        if self._strip_accents and category == "Mn":
            return ""
        is_ascii_symbol = "!" <= character <= "~" and not character.isalnum()
        if is_ascii_symbol or category.startswith("P"):
            return f" {character} "
        return character.lower() if self._lowercase else character  # one by one: no final sigma, as the reference

    def _split_word(self, word: str) -> tuple[int, ...]:
        if len(word) > self.MAX_WORD_CHARACTERS:
            return (self._unknown,)
        ids: list[int] = []
        start, pieces = 0, self._starts
        while start < len(word):
            end = len(word)
            while end > start and word[start:end] not in pieces:
                end -= 1
            if end == start:
                return (self._unknown,)
            ids.append(pieces[word[start:end]])
            start, pieces = end, self._continuations
        return tuple(ids)


class _CharacterTable(dict[str, str]):
    """What each character becomes, computed once per character."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, character: str) -> str:
        self[character] = result = self._rule(character)
        return result


def _clean_character(character: str) -> str:
    """BertNormalizer: control characters go, white space is a space, CJK ideographs stand alone."""
    category = unicodedata.category(character)
    if character in "\t\n\r" or category.startswith("Z"):
        return " "
    if character == "\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):  # not Cn: an emoji newer than Python's tables
        return ""
    code = ord(character)
    return f" {character} " if any(low <= code <= high for low, high in _CJK_RANGES) else character


# The CJK Unicode blocks that BERT's _is_chinese_char names.
_CJK_RANGES = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
               (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))  # fmt: skip
_CLEAN = _CharacterTable(_clean_character)


# ---------------------------------------------------------------------------------------------------------------------
# Call: one request under way
# ---------------------------------------------------------------------------------------------------------------------

T = TypeVar("T")


@dataclass
class Call:
    """What a request needs beside its texts: when it must be answered and whether its client still waits. And what is
    measured of it. Its own thread alone uses it."""

    is_gone: Callable[[], bool] = lambda: False
    is_cut_off: Callable[[], bool] = lambda: False  # the server stops and waits no longer
    timeout_s: float = math.inf
    accept: str = ""  # the Accept header
    started: float = dataclasses.field(default_factory=time.monotonic)
    request: RerankRequest | None = None
    tokenise_s: float = 0.0
    queue_s: float = 0.0  # while its pairs waited for their turn
    inference_s: float = 0.0  # of decodes with a pair of it
    n_pairs: int = 0
    n_tokens: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def check(self) -> None:
        """Raises DeadlineError, ClientGoneError and UnavailableError."""
        if self.seconds >= self.timeout_s:
            raise DeadlineError(self.timeout_s)
        if self.is_cut_off():
            raise UnavailableError("the server stopped before the request was done")
        if self.is_gone():
            raise ClientGoneError()

    def result(self, future: Future[T]) -> T:
        """Waits for it. Raises what it raises, and what check does."""
        while True:
            left_s = self.timeout_s - self.seconds
            if wait([future], max(0.0, min(left_s, HANG_UP_POLL_S))).done:
                return future.result()
            self.check()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: GET /metrics, in Prometheus' text format
# ---------------------------------------------------------------------------------------------------------------------

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TENTHS = tuple(tenths / 10 for tenths in range(1, 11))


@dataclass(frozen=True)
class Metric:
    """A row of METRICS. buckets: of a histogram."""

    name: str
    kind: Callable[..., Any]
    help: str
    labels: tuple[str, ...] = ("role",)
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("requests", prometheus_client.Counter, "answers; status 499: the client hung up", ("route", "status")),
    Metric("request_seconds", prometheus_client.Histogram, "from a request's arrival to its answer", ("route",),
           _SECONDS),
    Metric("queue_seconds", prometheus_client.Histogram, "while a request's pairs waited for their turn",
           buckets=_SECONDS),
    Metric("tokenise_seconds", prometheus_client.Histogram, "a request's tokenising", buckets=_SECONDS),
    Metric("inference_seconds", prometheus_client.Histogram, "decodes with a pair of the request", buckets=_SECONDS),
    Metric("batch_fill_ratio", prometheus_client.Histogram, "tokens of a decode, as a part of --ubatch",
           buckets=_TENTHS),
    Metric("pairs", prometheus_client.Counter, "pairs that were scored"),
    Metric("tokens", prometheus_client.Counter, "their tokens, without a prefix that they share"),
    Metric("failed_batches", prometheus_client.Counter, "decodes that failed, with all requests in them"),
    Metric("cache_hits", prometheus_client.Counter, "pairs whose score was known"),
    Metric("truncated_passages", prometheus_client.Counter, "passages that were cut"),
    Metric("queue_tokens", prometheus_client.Gauge, "tokens that wait"),
    Metric("queue_requests", prometheus_client.Gauge, "requests that wait or are being scored"),
    Metric("model_loaded", prometheus_client.Gauge, "1: in memory"),
    Metric("accel_bytes", prometheus_client.Gauge, "weights that the int8 engine holds; 0: it is not used", ()),
    Metric("resident_bytes", prometheus_client.Gauge, "resident memory of the process", ()),
    Metric("model", prometheus_client.Info, "the file of a role", ("role",)),
    Metric("build", prometheus_client.Info, "versions", ()),
)  # fmt: skip


class Metrics:
    """METRICS in a registry of their own, so that a process can hold several servers. Any thread."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._metrics = {
            metric.name: metric.kind(
                f"rerank_{metric.name}", metric.help, metric.labels, registry=self.registry,
                **({"buckets": metric.buckets} if metric.buckets else {}),
            )
            for metric in METRICS
        }  # fmt: skip
        self("resident_bytes").set_function(resident_bytes)
        self("accel_bytes").set_function(accel_bytes)
        self("build").info({"version": __version__, "llama_cpp_python": llama_cpp.__version__})

    def __call__(self, name: str, *labels: str) -> Any:
        """A metric of the prometheus-client library, with its labels' values."""
        return self._metrics[name].labels(*labels) if labels else self._metrics[name]

    def add_role(self, role: Role) -> None:
        name, description = role.name, role.description
        self("queue_tokens", name).set_function(lambda: role.queue.n_tokens)
        self("queue_requests", name).set_function(lambda: role.queue.n_requests)
        self("model_loaded", name).set_function(lambda: role.loaded)
        self("model", name).info({"file": description.path.name, "kind": description.kind,
                                  "quantization": description.quantization})  # fmt: skip

    def text(self) -> str:
        return prometheus_client.generate_latest(self.registry).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Queue and scheduler: one thread for each model; nobody else touches its llama context
# ---------------------------------------------------------------------------------------------------------------------


def take_batch(
    waiting: deque[T], n_tokens: Callable[[T], float], max_batch_tokens: int, max_sequences: int,
    is_shared: bool = False,
) -> list[T]:  # fmt: skip
    """Takes the first of `waiting` and, in order, those behind it that still fit the budget; the rest stay in order.

    The first is taken whatever its length, unless is_shared: a pair longer than the budget gets a decode of its own.
    """
    batch: list[T] = []
    skipped: list[T] = []
    room: float = max_batch_tokens
    while waiting and len(batch) < max_sequences and len(skipped) < MAX_SEQUENCES and (room > 0 or not batch):
        candidate = waiting.popleft()
        if n_tokens(candidate) <= room or not (batch or is_shared):
            batch.append(candidate)
            room -= n_tokens(candidate)
        else:
            skipped.append(candidate)
    waiting.extendleft(reversed(skipped))
    return batch


@dataclass(frozen=True)
class Entry:
    """A pair that waits, and the group that waits for it."""

    pair: Pair
    key: bytes
    group: Group
    prefix: tuple[int, ...]


class Group:
    """What one request asks of one model. The queue's lock guards it, except for the future."""

    def __init__(self, n_estimated: int) -> None:
        self.waiting: deque[Entry] = deque()  # the longest first, so that short ones fill the batches
        self.keys: set[bytes] = set()  # of every pair that was submitted
        self.logits: dict[bytes, float] = {}
        self.scored: Future[dict[bytes, float]] = Future()  # key -> logit of all pairs, once the group is complete
        self.is_complete = False  # nothing more will be submitted
        self.n_estimated = n_estimated  # tokens of what is not tokenised yet
        self.n_waiting = 0  # tokens
        self.submitted = math.inf  # time.monotonic() of the first pair
        self.queue_s = self.inference_s = 0.0

    @property
    def n_tokens(self) -> int:
        return self.n_estimated + self.n_waiting


class Queue:
    """The groups that wait for one engine. They take turns: each decode is the next group's, so a short request waits
    for one decode of a long one and not for all of it. Any thread appends; one scheduler takes."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._groups: set[Group] = set()  # every one that was admitted and has not ended
        self._turns: deque[Group] = deque()  # those with something to score; the next one is first
        self._served: Group | None = None  # whose turn the running decode is; behind those that arrive meanwhile
        self._tokens_per_s = 0.0  # smoothed over some ten batches; 0: nothing was measured yet
        self._closed = False
        self._changed = threading.Condition()  # guards all of it, and the groups

    @contextlib.contextmanager
    def admit(self, n_estimated: int) -> Iterator[Group]:
        """A group, whose pairs are dropped when the `with` ends. n_estimated: tokens, before anything is tokenised.

        Raises OverloadedError when as much waits as may. One group counts for at most half of that: a list of any
        length is accepted, and leaves room for others. Raises UnavailableError once the queue is closed.
        """
        group = Group(n_estimated)
        with self._changed:
            if self._closed:
                raise UnavailableError("the server is stopping")
            excess = self._n_charged() + self._charge(group) - self._max_tokens
            if excess > 0:
                raise OverloadedError(self.n_tokens, self._seconds_for(excess))
            self._groups.add(group)
        try:
            yield group
        finally:
            with self._changed:
                self._end(group)

    def _n_charged(self) -> int:
        return sum(self._charge(group) for group in self._groups)

    def _charge(self, group: Group) -> int:
        return min(group.n_tokens, self._max_tokens // 2)

    def _seconds_for(self, n_tokens: int) -> int:
        """Until the engine will have scored so many, by what it scored lately."""
        seconds = n_tokens / self._tokens_per_s if self._tokens_per_s else 1
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(seconds)))

    @property
    def n_tokens(self) -> int:
        """Tokens that wait, as far as they are known."""
        return sum(group.n_tokens for group in tuple(self._groups))

    @property
    def n_requests(self) -> int:
        return len(self._groups)

    def append(self, group: Group, pairs: dict[bytes, Pair], n_estimated: int) -> None:
        """Pairs by their keys, none of them submitted before. n_estimated: tokens of what is still to come."""
        entries = [Entry(pair, key, group, pair.prefix) for key, pair in pairs.items()]
        with self._changed:
            group.keys |= pairs.keys()
            group.n_estimated = n_estimated
            if not entries or group not in self._groups:
                return
            group.n_waiting += sum(entry.pair.n_new for entry in entries)
            # Pairs with one prefix stand together: the engine then computes it once.
            group.waiting = deque(
                sorted((*group.waiting, *entries), key=lambda entry: (entry.prefix, -entry.pair.n_new))
            )
            group.submitted = min(group.submitted, time.monotonic())
            if group not in self._turns and group is not self._served:
                self._turns.append(group)
            self._changed.notify()

    def complete(self, group: Group) -> Future[dict[bytes, float]]:
        """The group's logits by key, or the first thing that went wrong. Nothing may be appended after it."""
        with self._changed:
            group.is_complete, group.n_estimated = True, 0
            self._settle(group)
            return group.scored

    def next_batch(self, max_batch_tokens: int, max_sequences: int, idle_s: float | None = None) -> list[Entry] | None:
        """The next group's turn. Waits for one; an empty list: none came for idle_s. None: closed, and all was taken.

        What is left of the decode is shared with the groups behind that need no more than one decode, but only as many
        tokens as it has itself: a short request takes at most twice its time for other short ones, and none for a long
        one. A batch has one prefix, or the engine would need a decode for each.
        """
        with self._changed:
            if self._served is not None and self._served.waiting:
                self._turns.append(self._served)
            self._served = None
            self._changed.wait_for(lambda: self._turns or (self._closed and not self._groups), idle_s)
            if not self._turns:
                return None if self._closed and not self._groups else []
            group = self._served = self._turns.popleft()
            prefix = group.waiting[0].prefix

            def n_tokens(entry: Entry) -> float:
                return entry.pair.n_new if entry.prefix == prefix else math.inf

            batch = self._take(group, n_tokens, max_batch_tokens, max_sequences, is_shared=False)
            n_own = sum(entry.pair.n_new for entry in batch)
            room = min(max_batch_tokens - n_own, n_own)
            for other in self._turns:
                if room <= 0 or len(batch) >= max_sequences:
                    break
                if other.n_tokens > max_batch_tokens:
                    continue
                taken = self._take(other, n_tokens, room, max_sequences - len(batch), is_shared=True)
                room -= sum(entry.pair.n_new for entry in taken)
                batch += taken
            self._turns = deque(other for other in self._turns if other.waiting)
            return batch

    @staticmethod
    def _take(group: Group, n_tokens: Callable[[Entry], float], room: int, most: int, is_shared: bool) -> list[Entry]:
        batch = take_batch(group.waiting, n_tokens, room, most, is_shared)
        group.n_waiting -= sum(entry.pair.n_new for entry in batch)
        return batch

    def finish(self, batch: Sequence[Entry], logits: Sequence[float], seconds: float) -> None:
        """What the engine made of a batch. A logit that is no number fails its own group, not the others."""
        with self._changed:
            rate = sum(entry.pair.n_new for entry in batch) / max(seconds, 1e-6)
            self._tokens_per_s += (rate - self._tokens_per_s) * (0.1 if self._tokens_per_s else 1)
            for entry, logit in zip(batch, logits, strict=True):
                if math.isfinite(logit):
                    entry.group.logits[entry.key] = logit
                else:
                    self._fail(entry.group, EngineError(f"the model gave {logit} in place of a score"))
            self._end_batch(batch, seconds)

    def fail(self, batch: Sequence[Entry], error: RequestError, seconds: float) -> None:
        """Ends each group of the batch with the error; what else they wait for is dropped."""
        with self._changed:
            for group in {entry.group for entry in batch}:
                self._fail(group, error)
            self._end_batch(batch, seconds)

    def _end_batch(self, batch: Sequence[Entry], seconds: float) -> None:
        for group in {entry.group for entry in batch}:
            group.inference_s += seconds
            self._settle(group)

    def _settle(self, group: Group) -> None:
        if group.is_complete and not group.scored.done() and len(group.logits) == len(group.keys):
            if group.keys:
                group.queue_s = max(0.0, time.monotonic() - group.submitted - group.inference_s)
            group.scored.set_result(group.logits)

    def _fail(self, group: Group, error: RequestError) -> None:
        if not group.scored.done():
            group.scored.set_exception(error)
        self._end(group)

    def _end(self, group: Group) -> None:
        """Drops what the group still waits for."""
        self._groups.discard(group)
        group.waiting.clear()
        group.n_waiting = group.n_estimated = 0
        if group in self._turns:
            self._turns.remove(group)
        self._changed.notify()

    def close(self) -> None:
        """No more groups are admitted; those that wait are still served."""
        with self._changed:
            self._closed = True
            self._changed.notify()


class Scheduler:
    """The one thread that loads an engine, calls engine.score, and frees it. Every group that it is given ends, with
    logits or an exception."""

    def __init__(
        self, name: str, queue: Queue, load: Callable[[], Engine], idle_s: Callable[[Engine], float | None],
        metrics: Metrics,
    ) -> None:  # fmt: skip
        """idle_s: for how long the engine may be idle before it is asked again; None: it was given up and freed."""
        self._name, self._queue, self._load, self._idle_s, self._metrics = name, queue, load, idle_s, metrics
        self.engine: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, name=f"scheduler-{name}", daemon=True)
        self._thread.start()

    @property
    def is_loaded(self) -> bool:
        return self.engine.done() and self.engine.exception() is None

    @property
    def has_failed(self) -> bool:
        return self.engine.done() and self.engine.exception() is not None

    def join(self, timeout_s: float | None) -> bool:
        """Waits until the closed queue is empty and the engine freed. False: that took longer than timeout_s."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self.engine.set_exception(error)
            return
        self.engine.set_result(engine)
        while (idle_s := self._idle_s(engine)) is not None:
            batch = self._queue.next_batch(
                engine.max_batch_tokens, engine.max_sequences, idle_s if math.isfinite(idle_s) else None
            )
            if batch is None:
                engine.close()
                return
            if batch:
                self._score(engine, batch)

    def _score(self, engine: Engine, batch: list[Entry]) -> None:
        started, n_tokens = time.monotonic(), sum(entry.pair.n_new for entry in batch)
        self._metrics("batch_fill_ratio", self._name).observe(n_tokens / engine.max_batch_tokens)
        try:
            logits = engine.score([entry.pair for entry in batch])
            if len(logits) != len(batch):
                raise EngineError(f"the engine gave {len(logits)} scores for {len(batch)} pairs")
        except Exception as error:
            log.error("a batch of %d pairs failed: %s", len(batch), error, exc_info=not isinstance(error, RequestError))
            failure = error if isinstance(error, RequestError) else EngineError("scoring failed; see the server's log")
            self._metrics("failed_batches", self._name).inc()
            self._queue.fail(batch, failure, time.monotonic() - started)
            return
        self._metrics("pairs", self._name).inc(len(batch))
        self._metrics("tokens", self._name).inc(n_tokens)
        self._queue.finish(batch, logits, time.monotonic() - started)


# ---------------------------------------------------------------------------------------------------------------------
# GGUF metadata: read before llama.cpp loads the file, so that a wrong one is refused in one line
# ---------------------------------------------------------------------------------------------------------------------


def _native(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml's C API (gguf.h, ggml.h) that llama-cpp-python does not bind. libllama links ggml."""
    function = getattr(llama._lib, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


class _GgufInitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class _TypeTraits(ctypes.Structure):  # struct ggml_type_traits, ggml.h
    _fields_ = (
        ("type_name", ctypes.c_char_p), ("blck_size", ctypes.c_int64), ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )  # fmt: skip


_C, _I, _P, _S = ctypes.c_char_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t
gguf_init_from_file = _native("gguf_init_from_file", _P, _C, _GgufInitParams)
gguf_free = _native("gguf_free", None, _P)
gguf_get_n_kv = _native("gguf_get_n_kv", _I, _P)
gguf_get_key = _native("gguf_get_key", _C, _P, _I)
gguf_get_kv_type = _native("gguf_get_kv_type", ctypes.c_int, _P, _I)
gguf_get_arr_type = _native("gguf_get_arr_type", ctypes.c_int, _P, _I)
gguf_get_arr_n = _native("gguf_get_arr_n", _S, _P, _I)
gguf_get_arr_data = _native("gguf_get_arr_data", _P, _P, _I)
gguf_get_val_data = _native("gguf_get_val_data", _P, _P, _I)
gguf_get_val_str = _native("gguf_get_val_str", _C, _P, _I)
gguf_get_data_offset = _native("gguf_get_data_offset", _S, _P)
gguf_get_n_tensors = _native("gguf_get_n_tensors", _I, _P)
gguf_get_tensor_name = _native("gguf_get_tensor_name", _C, _P, _I)
gguf_get_tensor_offset = _native("gguf_get_tensor_offset", _S, _P, _I)
gguf_get_tensor_type = _native("gguf_get_tensor_type", ctypes.c_int, _P, _I)
gguf_get_tensor_size = _native("gguf_get_tensor_size", _S, _P, _I)
gguf_get_tensor_ne = _native("gguf_get_tensor_ne", ctypes.POINTER(ctypes.c_int64), _P, _I)
ggml_get_type_traits = _native("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), ctypes.c_int)

# gguf.h, enum gguf_type -> the C type of a value
_GGUF_SCALARS: dict[int, Any] = {
    0: ctypes.c_uint8, 1: ctypes.c_int8, 2: ctypes.c_uint16, 3: ctypes.c_int16, 4: ctypes.c_uint32, 5: ctypes.c_int32,
    6: ctypes.c_float, 7: ctypes.c_bool, 10: ctypes.c_uint64, 11: ctypes.c_int64, 12: ctypes.c_double,
}  # fmt: skip
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_LONG_ARRAY = 4096  # longer ones (vocabularies) are left to llama.cpp


@dataclass(frozen=True)
class LongArray:
    """Stands for a metadata array that is not read here: a vocabulary, a normalisation table."""

    length: int


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # rows first, as numpy has it
    type_id: int  # enum ggml_type
    offset: int  # bytes from the start of the file
    n_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file: scalar and short-array metadata, and where each tensor lies."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Raises ModelError for what is no GGUF file, or a truncated one."""
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file")
        with _captured_native_log() as lines:
            header = gguf_init_from_file(os.fsencode(path), _GgufInitParams(True, None))
        if not header:
            raise ModelError(f"{path}: not a readable GGUF file ({lines.reason('its header is damaged')}); {_MAKE}")
        try:
            metadata = dict(_metadata_items(header))
            tensors = dict(_tensor_items(header))
        finally:
            gguf_free(header)
        end = max((tensor.offset + tensor.n_bytes for tensor in tensors.values()), default=0)
        if path.stat().st_size < end:
            raise ModelError(f"{path}: truncated, {path.stat().st_size:,} of {end:,} bytes are there; {_MAKE}")
        return GgufFile(path, metadata, tensors)

    def header_is_intact(self) -> bool:
        """Whether everything before the tensor data is what the converter wrote and verified (rerank.header_sha256:
        the header's SHA-256 with zeroes in the place of the digest itself)."""
        digest = self.metadata.get("rerank.header_sha256")
        if not isinstance(digest, str) or len(digest) != 64 or not self.tensors:
            return False
        with self.path.open("rb") as file:
            header = file.read(min(tensor.offset for tensor in self.tensors.values()))
        return hashlib.sha256(header.replace(digest.encode(), b"0" * 64)).hexdigest() == digest

    def require(self, key: str, kind: type[T]) -> T:
        value = self.metadata.get(key)
        if not isinstance(value, kind):
            raise ModelError(f"{self.path}: its metadata has no usable {key}; {_MAKE}")
        return value


_MAKE = "make a right one with: python -m convert"


def _metadata_items(header: int) -> Iterator[tuple[str, Any]]:
    for index in range(gguf_get_n_kv(header)):
        key, kind = gguf_get_key(header, index).decode("utf-8", "replace"), gguf_get_kv_type(header, index)
        if kind == _GGUF_STRING:
            yield key, gguf_get_val_str(header, index).decode("utf-8", "replace")
        elif kind == _GGUF_ARRAY:
            element, count = gguf_get_arr_type(header, index), gguf_get_arr_n(header, index)
            if element in _GGUF_SCALARS and count <= _LONG_ARRAY:
                data = gguf_get_arr_data(header, index)
                yield key, list((_GGUF_SCALARS[element] * count).from_address(data)) if count else []
            else:
                yield key, LongArray(count)
        elif kind in _GGUF_SCALARS:
            yield key, _GGUF_SCALARS[kind].from_address(gguf_get_val_data(header, index)).value


def _tensor_items(header: int) -> Iterator[tuple[str, TensorInfo]]:
    start = gguf_get_data_offset(header)
    for index in range(gguf_get_n_tensors(header)):
        shape = gguf_get_tensor_ne(header, index)[:4]
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        yield gguf_get_tensor_name(header, index).decode("utf-8", "replace"), TensorInfo(
            tuple(reversed(shape)), gguf_get_tensor_type(header, index),
            start + gguf_get_tensor_offset(header, index), gguf_get_tensor_size(header, index),
        )  # fmt: skip


class _NativeLog:
    """What llama.cpp said, at warning level and above; its last error is the reason of a failed load."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, level: int, text: bytes) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level >= 3 and line:  # GGML_LOG_LEVEL_WARN is 3, ERROR 4 (ggml.h)
            self.lines.append(line)
            log.debug("llama.cpp: %s", line)

    def reason(self, default: str) -> str:
        """The first line said, without the name of the function that said it."""
        return re.sub(r"^\w+: ", "", self.lines[0]) if self.lines else default


_native_log = _NativeLog()


@contextlib.contextmanager
def _captured_native_log() -> Iterator[_NativeLog]:
    _native_log.lines.clear()
    yield _native_log
    _native_log.lines.clear()


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _on_native_log(level: int, text: bytes, user_data: Any) -> None:
    _native_log.add(level, text)


llama.llama_log_set(_on_native_log, ctypes.c_void_p(0))

ggml_backend_reg_count = _native("ggml_backend_reg_count", _S)
ggml_backend_load_all_from_path = _native("ggml_backend_load_all_from_path", None, _C)


def load_backends() -> None:
    """A portable build of llama.cpp (GGML_BACKEND_DL) has one CPU library for each instruction set, and none is loaded
    at first: the best for this CPU is taken here, since llama-cpp-python does not. Nothing to do in any other build."""
    if ggml_backend_reg_count() == 0:
        ggml_backend_load_all_from_path(os.fsencode(Path(llama_cpp.__file__).parent / "lib"))


load_backends()


# ---------------------------------------------------------------------------------------------------------------------
# The int8 engine (accel/): a library that takes the matrix products of the layers from llama.cpp, where it is built
# ---------------------------------------------------------------------------------------------------------------------

ACCEL_LIBRARY = Path(__file__).resolve().parent / "accel" / "lib" / "librerank_accel.so"
ACCEL_SPARE_BYTES = 200_000_000  # that must stay free beside its copy of the weights
ggml_backend_load = _native("ggml_backend_load", _P, _C)


@functools.cache
def load_accel(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, once per process, or why it cannot be used. ggml offers operations to it from then on."""
    if not path.is_file():
        return None, "not built: make accel" if platform.machine().lower() in ("x86_64", "amd64") else "for x86 only"
    try:
        library = ctypes.CDLL(str(path))
        library.rerank_accel_built_for.restype = ctypes.c_char_p
        library.rerank_accel_is_fast_here.restype = ctypes.c_bool
        library.rerank_accel_copied_bytes.restype = ctypes.c_size_t
        library.rerank_accel_configure.argtypes = [ctypes.c_bool] * 3
        built_for = library.rerank_accel_built_for().decode()
    except (OSError, AttributeError) as error:
        return None, f"{path} does not fit this llama-cpp-python ({error}): make accel"
    if built_for != llama_cpp.__version__:  # ggml's structures change from version to version
        return None, f"{path} is built for llama-cpp-python {built_for}, not {llama_cpp.__version__}: make accel"
    if not library.rerank_accel_is_fast_here():
        return None, "this CPU has no int8 dot products"
    if not ggml_backend_load(os.fsencode(path)):
        return None, f"ggml refuses {path}: make accel"
    return library, ""


def _loaded_accel() -> ctypes.CDLL | None:
    return load_accel(ACCEL_LIBRARY)[0] if load_accel.cache_info().currsize else None  # or nobody asked for it


def configure_accel(use: bool, strict: bool) -> None:
    """For the contexts that this thread opens next. Pages of the mapped file go once their weights are copied."""
    if library := _loaded_accel():
        library.rerank_accel_configure(use, strict, True)


def accel_bytes() -> int:
    """What the int8 engine holds of weights now."""
    library = _loaded_accel()
    return int(library.rerank_accel_copied_bytes()) if library else 0


def available_bytes() -> float:
    """What this process may still use: of the machine's memory, and of its cgroup's limit (docker run --memory)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
    return min(float(free), _cgroup_free_bytes(Path("/sys/fs/cgroup")))


def _cgroup_free_bytes(root: Path) -> float:
    """Of the group with the least left. Pages of files count as free: the kernel can drop them."""
    free = math.inf
    for folder in _cgroup_folders(root):
        try:
            limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text()
            pages = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        except OSError:
            continue
        if limit != "max":
            free = min(free, int(limit) - int(used) + (int(pages[1]) if pages else 0))
    return free


# ---------------------------------------------------------------------------------------------------------------------
# Model description: what scoring depends on, from rerank.* or, for a file from elsewhere, from what llama.cpp needs
# ---------------------------------------------------------------------------------------------------------------------

CROSS_ENCODER, YES_LOGIT, BI_ENCODER = "cross-encoder", "yes-logit", "bi-encoder"

GEMMA_PROMPT = (  # FlagEmbedding 1.4.2, FlagLLMReranker: the prompt that bge-reranker-v2-gemma was trained with
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
CHECK_MAX_LENGTH_TOKENS = 512  # rerank.check_ids were made at this max_length


@dataclass(frozen=True)
class PromptParts:
    query_prefix: str = "A: "
    passage_prefix: str = "B: "
    separator: str = "\n"
    prompt: str = GEMMA_PROMPT


@dataclass(frozen=True)
class ModelDescription:
    """What the server must know of a file; every field was checked against the file."""

    path: Path
    kind: str
    architecture: str
    quantization: str
    file_bytes: int
    max_tokens: int
    source: str = ""
    token_types: int = 1
    prompt: PromptParts = PromptParts()
    cosine_scale: float = 1.0
    cosine_bias: float = 0.0
    overlap_scale: float = 0.0
    first_piece_id: int = 0  # of the vocabulary's most frequent piece
    lowercase: bool = True
    strip_accents: bool = True
    fixes: tuple[str, ...] = ()  # what was wrong in the file and is set right while loading

    @property
    def name(self) -> str:
        return self.path.stem

    def max_length(self, settings: Settings) -> int:
        """Tokens of the longest pair: what is asked for, as far as the model takes it."""
        return min(self.max_tokens, settings.max_length)


def describe(gguf: GgufFile) -> ModelDescription:
    """Checks what scoring depends on. Raises ModelError with one line that says what is wrong."""
    architecture = gguf.require("general.architecture", str)
    kind = gguf.metadata.get("rerank.kind") or _infer_kind(gguf, architecture)
    if kind not in (CROSS_ENCODER, YES_LOGIT, BI_ENCODER):
        raise ModelError(f"{gguf.path}: rerank.kind is {kind!r}, which this version does not know")
    expected = "gemma" if kind == YES_LOGIT else "bert"
    if architecture != expected:
        raise ModelError(f"{gguf.path}: architecture {architecture!r} does not fit {kind} (expected {expected!r})")
    context = gguf.require(f"{architecture}.context_length", int)
    common: dict[str, Any] = {
        "path": gguf.path, "kind": kind, "architecture": architecture, "quantization": _quantization(gguf),
        "file_bytes": gguf.path.stat().st_size, "max_tokens": gguf.metadata.get("rerank.max_tokens", context),
        "source": gguf.metadata.get("rerank.source", gguf.metadata.get("general.name", "")),
    }  # fmt: skip
    return ModelDescription(**common, **_DESCRIBE[kind](gguf))


def _infer_kind(gguf: GgufFile, architecture: str) -> str:
    """A file that this project did not convert: what can it be used for?"""
    if architecture == "gemma":
        return YES_LOGIT
    if architecture == "bert" and "cls.output.weight" in gguf.tensors:
        return CROSS_ENCODER
    if architecture == "bert":
        raise ModelError(f"{gguf.path}: an embedding model, not a reranker: it has no classification head; {_MAKE} m3")
    raise ModelError(f"{gguf.path}: architecture {architecture!r} is not a reranker that is served here; {_MAKE} m3")


def _quantization(gguf: GgufFile) -> str:
    file_type = gguf.metadata.get("general.file_type")
    name = llama.llama_ftype_name(file_type) if file_type is not None else None
    return str(gguf.metadata.get("rerank.quantization") or (name.decode() if name else "unknown"))


def _describe_cross_encoder(gguf: GgufFile) -> dict[str, Any]:
    tokenizer = gguf.require("tokenizer.ggml.model", str)
    head = gguf.tensors.get("cls.output.weight")
    if head is None or head.shape not in ((1, head.shape[-1]), head.shape[-1:]):
        raise ModelError(f"{gguf.path}: no classification head with one output (cls.output.weight); {_MAKE} m3")
    if "cls.weight" not in gguf.tensors:  # the vendored converter drops BERT's pooler.dense
        raise ModelError(f"{gguf.path}: the head's first layer (cls.weight) is missing: scores would be wrong; {_MAKE}")
    if tokenizer == "t5":
        return _describe_xlm_roberta(gguf)
    if tokenizer != "bert":
        raise ModelError(f"{gguf.path}: tokenizer {tokenizer!r} is not known for a cross-encoder; {_MAKE}")
    types = gguf.tensors.get("token_types.weight")
    n_types = 1 if types is None or len(types.shape) == 1 else types.shape[0]
    return {"token_types": n_types, **_describe_word_piece(gguf)}


def _describe_xlm_roberta(gguf: GgufFile) -> dict[str, Any]:
    positions = gguf.tensors.get("position_embd.weight")
    if positions is None or (positions.shape[0] - 2).bit_count() == 1:  # 8,194 or 514: a power of two, and two
        raise ModelError(f"{gguf.path}: its position table still holds XLM-R's two unused rows; {_MAKE} m3")
    if "tokenizer.ggml.precompiled_charsmap" not in gguf.metadata:
        raise ModelError(f"{gguf.path}: no normalisation table (precompiled_charsmap) in it; {_MAKE} m3")
    if gguf.metadata.get("tokenizer.ggml.remove_extra_whitespaces") is not True:
        return {"fixes": ("tokenizer.ggml.remove_extra_whitespaces",)}
    return {}


def _describe_word_piece(gguf: GgufFile) -> dict[str, Any]:
    lowercase = gguf.metadata.get("tokenizer.ggml.normalizer.lowercase", True)
    strip = gguf.metadata.get("tokenizer.ggml.normalizer.strip_accents", lowercase)  # BERT strips where it lowercases
    return {"lowercase": lowercase, "strip_accents": strip}


def _describe_yes_logit(gguf: GgufFile) -> dict[str, Any]:
    default = PromptParts()
    parts = {
        field.name: gguf.metadata.get(f"rerank.{field.name}", getattr(default, field.name))
        for field in dataclasses.fields(PromptParts)
    }
    key = "tokenizer.ggml.add_space_prefix"  # llama.cpp's default is true, Gemma has none
    return {"prompt": PromptParts(**parts), "fixes": () if gguf.metadata.get(key) is False else (key,)}


def _describe_bi_encoder(gguf: GgufFile) -> dict[str, Any]:
    scale, bias = gguf.require("rerank.cosine_scale", float), gguf.require("rerank.cosine_bias", float)
    described = {"cosine_scale": scale, "cosine_bias": bias, **_describe_word_piece(gguf)}
    if "rerank.overlap_scale" in gguf.metadata:  # not in files of vocabularies that are in no order
        described["overlap_scale"] = gguf.require("rerank.overlap_scale", float)
        described["first_piece_id"] = gguf.require("rerank.first_piece_id", int)
    return described


_DESCRIBE: dict[str, Callable[[GgufFile], dict[str, Any]]] = {
    CROSS_ENCODER: _describe_cross_encoder, YES_LOGIT: _describe_yes_logit, BI_ENCODER: _describe_bi_encoder,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Engines: list of pairs in, list of logits out
# ---------------------------------------------------------------------------------------------------------------------

FloatArray = npt.NDArray[np.float32]


class Engine(Protocol):
    """Scores pairs. Owned by one thread once its scheduler runs."""

    description: ModelDescription
    pairs: Pairs
    max_batch_tokens: int  # what one decode should hold
    max_sequences: int  # pairs in one decode

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """The raw logit of each pair, in order; any number of pairs. Raises EngineError."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's text of each id. Any thread."""

    def close(self) -> None:
        """Frees the native memory. May be called twice."""


class LlamaModel:
    """Owns one llama_model and one llama_context, and frees each once."""

    def __init__(self, description: ModelDescription, settings: Settings) -> None:
        """Loads the weights, memory-mapped. Raises ModelError."""
        self._natives = contextlib.ExitStack()
        self.context: Any = None
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = settings.gpu_layers if settings.gpu_layers >= 0 else 1000
        parameters.load_mode = llama.LLAMA_LOAD_MODE_MMAP
        parameters.use_extra_bufts = settings.tuning.repack
        overrides = _overrides(description.fixes)
        parameters.kv_overrides = overrides
        progress = llama.llama_progress_callback(LoadProgress(description.name))
        parameters.progress_callback = progress
        with _captured_native_log() as lines:
            self.model = llama.llama_model_load_from_file(os.fsencode(description.path), parameters)
            if not self.model:
                raise ModelError(f"{description.path}: llama.cpp cannot load it ({lines.reason('no reason given')})")
        self._natives.callback(llama.llama_model_free, self.model)
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.accelerated = settings.tuning.accel and self._has_room(settings.accel)
        self._settings, self._path = settings, description.path

    def _has_room(self, wanted: str) -> bool:
        """Whether the int8 engine's copy of the layers, a byte for each weight, fits the memory."""
        n_vocab_weights = llama.llama_vocab_n_tokens(self.vocab) * llama.llama_model_n_embd(self.model)
        needed = llama.llama_model_n_params(self.model) - n_vocab_weights
        has_room = wanted == ON or needed + ACCEL_SPARE_BYTES < available_bytes()
        if not has_room:
            log.warning("the int8 engine is not used: its copy of the weights takes %.0f MB, and %.0f MB are free "
                        "(--accel on: try nevertheless)", needed / 1e6, available_bytes() / 1e6)  # fmt: skip
        return has_room

    def open_context(self, n_ubatch: int, n_ctx: int, n_sequences: int, pooling: int) -> None:
        """n_ubatch, n_ctx: tokens; n_sequences: in one decode, each with one result. Raises ModelError."""
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = n_ctx, n_ctx, n_ubatch
        is_encoder = pooling != llama.LLAMA_POOLING_TYPE_UNSPECIFIED
        parameters.n_seq_max = n_sequences
        parameters.n_outputs_max = 0 if is_encoder else n_sequences  # 0: every token, which pooling needs
        parameters.n_threads = parameters.n_threads_batch = self._settings.tuning.threads
        parameters.embeddings = is_encoder
        parameters.pooling_type = pooling
        flash_attention = self._settings.tuning.flash_attention
        parameters.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        configure_accel(self.accelerated, self._settings.accel_strict)
        parameters.kv_unified = True  # pairs of unequal length share one cache; separate streams are slower
        with _captured_native_log() as lines:
            self.context = llama.llama_init_from_model(self.model, parameters)
            if not self.context:
                raise ModelError(f"{self._path}: no context of {n_ctx} tokens ({lines.reason('out of memory?')})")
        self._natives.callback(llama.llama_free, self.context)

    def piece(self, token_id: int) -> str:
        return str(llama.llama_vocab_get_text(self.vocab, token_id).decode("utf-8", "replace"))

    def close(self) -> None:
        self._natives.close()


class LoadProgress:
    """Writes into the log, now and then, how far llama.cpp is with a file that takes long to load."""

    def __init__(self, name: str) -> None:
        self._name, self._next = name, time.monotonic() + PROGRESS_EVERY_S

    def __call__(self, part: float, user_data: Any) -> bool:
        """llama_progress_callback. False would end the loading."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_EVERY_S
            log.info("%s: loading, %.0f %%", self._name, 100 * part)
        return True


_Overrides = llama.llama_model_kv_override * 4
_FIXED_VALUES = {"tokenizer.ggml.remove_extra_whitespaces": True, "tokenizer.ggml.add_space_prefix": False}


def _overrides(keys: Sequence[str]) -> Any:
    """llama.cpp's list of overridden metadata, ended by an empty key."""
    overrides = _Overrides()
    for override, key in zip(overrides, keys, strict=False):
        override.tag, override.key = llama.LLAMA_KV_OVERRIDE_TYPE_BOOL, key.encode()
        override.value.val_bool = _FIXED_VALUES[key]
    return overrides


class Batch:
    """The arrays of one llama_batch. One token belongs to one sequence; sequences are numbered from first_sequence,
    and the positions in each count from first_position."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], first_position: int = 0, first_sequence: int = 0
    ) -> None:  # fmt: skip
        lengths = [len(sequence) for sequence in sequences]
        self.n_tokens = sum(lengths)
        self.ends = np.cumsum(lengths) - 1  # index of the last token of each sequence
        self._token = np.concatenate([np.asarray(sequence, dtype=np.int32) for sequence in sequences])
        self._position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]) + first_position
        self._n_sequences = np.ones(self.n_tokens, dtype=np.int32)
        self._sequence = np.repeat(np.arange(len(lengths), dtype=np.int32) + first_sequence, lengths)
        addresses = self._sequence.ctypes.data + 4 * np.arange(self.n_tokens, dtype=np.uint64)
        self._sequence_pointers = addresses.astype(np.uint64)
        self._output = np.zeros(self.n_tokens, dtype=np.int8)

    def clear_ids(self) -> None:
        self._token[:] = 0

    def native(self, output: slice | npt.NDArray[np.int64], embeddings: FloatArray | None = None) -> Any:
        """llama_batch that points into this object's arrays (keep it alive). output: tokens that get an output row."""
        self._output[output] = 1
        self._embeddings = embeddings
        return llama.llama_batch(
            n_tokens=self.n_tokens,
            token=None if embeddings is not None else self._pointer(self._token, ctypes.c_int32),
            embd=None if embeddings is None else self._pointer(embeddings, ctypes.c_float),
            pos=self._pointer(self._position, ctypes.c_int32),
            n_seq_id=self._pointer(self._n_sequences, ctypes.c_int32),
            seq_id=self._pointer(self._sequence_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=self._pointer(self._output, ctypes.c_int8),
        )

    @staticmethod
    def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
        return array.ctypes.data_as(ctypes.POINTER(kind))


class EncoderContext:
    """Encodes sequences with a BERT-type model and reads one pooled vector per sequence."""

    def __init__(self, model: LlamaModel, longest: int, ubatch: int, pooling: int) -> None:
        # An encoder needs a whole sequence in one ubatch, and a token for each, or llama.cpp aborts the process.
        self.n_ubatch = max(longest, ubatch, MAX_SEQUENCES)
        model.open_context(self.n_ubatch, self.n_ubatch, MAX_SEQUENCES, pooling)
        self._model = model
        self._reserve_outputs()

    def encode(self, batch: Batch, n_values: int, embeddings: FloatArray | None = None) -> FloatArray:
        """[len(batch), n_values] float32. Raises EngineError."""
        if not 0 < batch.n_tokens <= self.n_ubatch or len(batch.ends) > MAX_SEQUENCES:
            raise EngineError(f"a batch of {batch.n_tokens} tokens in {len(batch.ends)} sequences cannot be encoded")
        status = llama.llama_encode(self._model.context, batch.native(slice(None), embeddings))
        if status != 0:
            raise EngineError(f"llama.cpp failed to encode {batch.n_tokens} tokens (status {status})")
        rows = np.empty((len(batch.ends), n_values), dtype=np.float32)
        for index in range(len(batch.ends)):
            values = llama.llama_get_embeddings_seq(self._model.context, index)
            if not values:
                raise EngineError("llama.cpp returned no pooled output")
            rows[index] = values[:n_values]
        return rows

    def _reserve_outputs(self) -> None:
        """llama.cpp allocates and clears tokens x n_vocab floats of logits that an encoder never computes: 1 MB for
        each token of m3, anew whenever a batch is larger than all before. So the largest batch comes first, stopped
        before its first operation, and the pages of its logits are given back, already while they are cleared."""
        n_bytes = self.n_ubatch * llama.llama_vocab_n_tokens(self._model.vocab) * 4
        context, batch = self._model.context, Batch([range(self.n_ubatch)])
        batch.clear_ids()
        llama.llama_set_abort_callback(context, _stop_at_once, None)
        with _given_back_while_written(n_bytes):
            llama.llama_encode(context, batch.native(slice(None)))
        llama.llama_set_abort_callback(context, llama.ggml_abort_callback(), None)
        if address := ctypes.cast(llama.llama_get_logits(context), ctypes.c_void_p).value:
            _give_back_pages(address, n_bytes)


@llama.ggml_abort_callback  # type: ignore[untyped-decorator]
def _stop_at_once(user_data: Any) -> bool:
    return True


def _give_back_pages(address: int, n_bytes: int) -> None:
    """The whole pages inside the range become zeroes that cost nothing until they are written to."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + n_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _given_back_while_written(n_bytes: int) -> Iterator[None]:
    """A block of n_bytes that is allocated and filled with zeroes meanwhile never is in memory as a whole: a gigabyte
    for a moment is what a small container dies of. Nothing that is computed meanwhile may be used."""
    if n_bytes < _WORTH_WATCHING_BYTES or not sys.platform.startswith("linux"):
        yield
        return
    before, done = _mapped_ranges(), threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            for start, end in _mapped_ranges():
                start = max([start, *(old_end for old_start, old_end in before if old_start <= start < old_end)])
                if n_bytes <= end - start <= n_bytes * 1.05:  # the vectors lie behind the logits, in the same block
                    _give_back_pages(start + mmap.PAGESIZE, n_bytes - mmap.PAGESIZE)  # the first holds malloc's header

    watcher = threading.Thread(target=watch, name="memory", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


_WORTH_WATCHING_BYTES = 64 << 20
_WATCH_S = 0.002


def _mapped_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process's anonymous memory."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[4] == "0" and len(fields) == 5:  # no inode, no name
            start, end = fields[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


class LlamaEngine:
    """What the three engines share: packing any number of pairs into decodes, and freeing."""

    pairs: Pairs

    def __init__(self, description: ModelDescription, model: LlamaModel, settings: Settings) -> None:
        self.description, self._model = description, model
        self.max_batch_tokens, self.max_sequences = settings.tuning.ubatch, MAX_SEQUENCES

    @property
    def kind(self) -> str:
        return self.description.kind

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See Engine.score."""
        return self._in_batches(pairs, lambda pair: pair.n_new, self._score_batch)

    def _in_batches(
        self, items: Sequence[T], n_tokens: Callable[[T], int], work: Callable[[list[T]], list[Any]]
    ) -> list[Any]:
        waiting, results = deque(enumerate(items)), [None] * len(items)
        while waiting:
            batch = take_batch(waiting, lambda item: n_tokens(item[1]), self.max_batch_tokens, self.max_sequences)
            for (index, _), result in zip(batch, work([item for _, item in batch]), strict=True):
                results[index] = result
        return results

    def _score_batch(self, pairs: list[Pair]) -> list[float]:
        raise NotImplementedError

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's text of each id. Any thread."""
        return [self._model.piece(index) for index in ids]

    def close(self) -> None:
        self._model.close()


class RankPoolingEngine(LlamaEngine):
    """Cross-encoders: the logit of the classification head (llama.cpp's RANK pooling), one float for each pair."""

    def __init__(
        self, gguf: GgufFile, description: ModelDescription, model: LlamaModel, settings: Settings
    ) -> None:  # fmt: skip
        super().__init__(description, model, settings)
        limit = description.max_length(settings)
        self.pairs = _cross_encoder_pairs(model, description, limit)
        self._token_types = TokenTypeEmbeddings(gguf) if description.token_types > 1 else None
        self._encoder = EncoderContext(model, limit, settings.tuning.ubatch, llama.LLAMA_POOLING_TYPE_RANK)

    def _score_batch(self, pairs: list[Pair]) -> list[float]:
        embeddings = self._token_types(pairs) if self._token_types else None
        rows = self._encoder.encode(Batch([pair.ids for pair in pairs]), 1, embeddings)
        return [float(row[0]) for row in rows]


def _cross_encoder_pairs(model: LlamaModel, description: ModelDescription, max_length: int) -> CrossEncoderPairs:
    vocab = model.vocab
    if llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_WPM:
        first, last = _bert_frame(model, description)
        return CrossEncoderPairs(_word_piece(model, description), first, [last], last, max_length)
    first = _special(model, description, llama.llama_vocab_bos(vocab), "<s>")
    last = _special(model, description, llama.llama_vocab_eos(vocab), "</s>")
    return CrossEncoderPairs(XlmRobertaTokenizer(vocab), first, [last, last], last, max_length)


def _bert_frame(model: LlamaModel, description: ModelDescription) -> tuple[int, int]:
    first = _special(model, description, llama.llama_vocab_bos(model.vocab), "[CLS]")
    return first, _special(model, description, llama.llama_vocab_sep(model.vocab), "[SEP]")


def _special(model: LlamaModel, description: ModelDescription, token_id: int, text: str) -> int:
    """token_id, if it is what frames a pair. (The converter may store a control token under a longer spelling.)"""
    piece = model.piece(token_id) if token_id >= 0 else "nothing"
    if not piece.startswith(text):
        raise ModelError(f"{description.path}: its metadata names {piece!r} where {text!r} belongs; {_MAKE}")
    return token_id


def _word_piece(model: LlamaModel, description: ModelDescription) -> WordPieceTokenizer:
    pieces = [model.piece(token_id) for token_id in range(llama.llama_vocab_n_tokens(model.vocab))]
    unknown = pieces.index("[UNK]") if "[UNK]" in pieces else -1
    if unknown < 0:
        raise ModelError(f"{description.path}: no [UNK] in its vocabulary; {_MAKE}")
    return WordPieceTokenizer(pieces, unknown, description.lowercase, description.strip_accents)


class TokenTypeEmbeddings:
    """BERT's second token type, which llama.cpp cannot express: it adds token_types[0] to every token.

    So the engine feeds embeddings in place of ids: token_embd[id], plus token_types[1] - token_types[0] where the
    passage begins. Without this a BERT cross-encoder's scores are wrong without a word.
    """

    def __init__(self, gguf: GgufFile) -> None:
        """Maps the file's embedding table; rows are dequantised as they are used. Raises ModelError."""
        types = self._read(gguf, "token_types.weight")
        self._difference: FloatArray = types(np.array([1]))[0] - types(np.array([0]))[0]
        self._rows = self._read(gguf, "token_embd.weight")

    def __call__(self, pairs: Sequence[Pair]) -> FloatArray:
        """[n_tokens, n_embd] float32 for the pairs, one after the other."""
        rows = self._rows(np.concatenate([np.asarray(pair.ids) for pair in pairs]))
        start = 0
        for pair in pairs:
            rows[start + pair.passage_start : start + len(pair.ids)] += self._difference
            start += len(pair.ids)
        return rows

    @staticmethod
    def _read(gguf: GgufFile, name: str) -> Callable[[npt.NDArray[Any]], FloatArray]:
        info = gguf.tensors.get(name)
        if info is None:
            raise ModelError(f"{gguf.path}: tensor {name} is missing; {_MAKE}")
        n_rows, n_columns = info.shape
        table = np.memmap(gguf.path, np.uint8, "r", info.offset, (n_rows, info.n_bytes // n_rows))
        return lambda ids: dequantize(table[ids], info.type_id, n_columns)


def dequantize(rows: npt.NDArray[np.uint8], type_id: int, n_columns: int) -> FloatArray:
    """[n, bytes of a row] raw ggml rows -> [n, n_columns] float32, by ggml's own to_float of that type."""
    rows = np.ascontiguousarray(rows)
    to_float = ggml_get_type_traits(type_id).contents.to_float
    if not to_float:  # GGML_TYPE_F32
        return cast(FloatArray, rows.view(np.float32).copy())
    result: FloatArray = np.empty((len(rows), n_columns), dtype=np.float32)
    convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(to_float)
    convert(rows.ctypes.data, result.ctypes.data, result.size)
    return result


class YesLogitEngine(LlamaEngine):
    """bge-reranker-v2-gemma: the logit of "Yes" after the prompt. The logit of "No" plays no part."""

    def __init__(
        self, gguf: GgufFile, description: ModelDescription, model: LlamaModel, settings: Settings
    ) -> None:  # fmt: skip
        super().__init__(description, model, settings)
        tokenizer = VocabTokenizer(model.vocab)
        bos = _special(model, description, llama.llama_vocab_bos(model.vocab), "<bos>")
        limit = description.max_length(settings)
        self.pairs = PromptPairs(tokenizer, bos, description.prompt, limit)
        self._yes = _yes_token(gguf, tokenizer)
        (shortest,) = self.pairs.make("", [""])  # its length is the prompt's: fewer sequences, fewer logits kept
        self.max_sequences = min(MAX_SEQUENCES, max(1, settings.tuning.ubatch // shortest.n_new))
        n_ctx = self.pairs.longest + settings.tuning.ubatch  # the prefix, and a batch of what follows it
        model.open_context(settings.tuning.ubatch, n_ctx, self.max_sequences + 1, llama.LLAMA_POOLING_TYPE_UNSPECIFIED)
        self._n_ctx, self._memory = n_ctx, llama.llama_get_memory(model.context)
        self._prefix: tuple[int, ...] = ()  # what sequence 0 of the KV cache holds

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See Engine.score. The prefix `<bos> A: query \\n` is computed once for all pairs that begin with it."""
        logits = [math.nan] * len(pairs)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, pair in enumerate(pairs):
            groups.setdefault(pair.prefix, []).append(index)
        for prefix, indices in groups.items():
            self._hold(prefix)
            scored = super().score([pairs[index] for index in indices])
            for index, logit in zip(indices, scored, strict=True):
                logits[index] = logit
        return logits

    def _hold(self, prefix: tuple[int, ...]) -> None:
        if prefix == self._prefix:
            return
        self._prefix = ()
        llama.llama_memory_clear(self._memory, False)
        if prefix:
            self._decode(Batch([prefix]), slice(0))
        self._prefix = prefix

    def _score_batch(self, pairs: list[Pair]) -> list[float]:
        batch = Batch([pair.ids[pair.n_shared :] for pair in pairs], len(self._prefix), first_sequence=1)
        sequences = range(1, len(pairs) + 1)
        for sequence in sequences:  # marks the prefix's cells, copies nothing
            llama.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        try:
            self._decode(batch, batch.ends)
            return [self._yes_logit(int(end)) for end in batch.ends]
        finally:
            for sequence in sequences:
                llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def _decode(self, batch: Batch, output: slice | npt.NDArray[np.int64]) -> None:
        if not 0 < batch.n_tokens <= self._n_ctx - len(self._prefix):
            raise EngineError(f"a batch of {batch.n_tokens} tokens cannot be decoded")
        status = llama.llama_decode(self._model.context, batch.native(output))
        if status != 0:
            raise EngineError(f"llama.cpp failed to decode {batch.n_tokens} tokens (status {status})")

    def _yes_logit(self, index: int) -> float:
        logits = llama.llama_get_logits_ith(self._model.context, index)
        if not logits:
            raise EngineError("llama.cpp returned no logits")
        return float(logits[self._yes])


def _yes_token(gguf: GgufFile, tokenize: Tokenizer) -> int:
    """The first id of "Yes", as the reference takes it; the file's own record must agree. Raises ModelError."""
    yes = tokenize("Yes")
    recorded = gguf.metadata.get("rerank.yes_token_id", yes[0] if yes else None)
    if not yes or recorded != yes[0]:
        raise ModelError(f"{gguf.path}: its tokenizer makes {yes} of 'Yes', its metadata says {recorded}; {_MAKE}")
    return yes[0]


class EmbeddingEngine(LlamaEngine):
    """The mini model: a fitted line from the cosine of query's and passage's embeddings (mean of the last layer's
    states), and from how much of the query's words the passage holds, to a logit."""

    def __init__(
        self, gguf: GgufFile, description: ModelDescription, model: LlamaModel, settings: Settings
    ) -> None:  # fmt: skip
        super().__init__(description, model, settings)
        first, last = _bert_frame(model, description)
        limit = description.max_length(settings)
        self.pairs = TextPairs(_word_piece(model, description), first, last, limit)
        self._n_embd = llama.llama_model_n_embd(model.model)
        self._encoder = EncoderContext(model, limit, settings.tuning.ubatch, llama.LLAMA_POOLING_TYPE_MEAN)
        self._query_vectors: OrderedDict[tuple[int, ...], FloatArray] = OrderedDict()

    def score(self, pairs: Sequence[Pair]) -> list[float]:
        """See Engine.score."""
        known = self._query_vectors
        missing = [ids for ids in dict.fromkeys(pair.query_ids for pair in pairs) if ids not in known]
        known.update(zip(missing, self.embed(missing), strict=True))
        passages = self.embed([pair.ids for pair in pairs])
        logits = [self.logit(pair, known[pair.query_ids], vector) for pair, vector in zip(pairs, passages, strict=True)]
        while len(known) > QUERY_VECTORS_KEPT:
            known.popitem(last=False)
        return logits

    def logit(self, pair: Pair, query: FloatArray, passage: FloatArray) -> float:
        """query, passage: the pair's unit vectors. Any thread."""
        model = self.description
        logit = model.cosine_scale * float(query @ passage) + model.cosine_bias
        if model.overlap_scale:  # between [CLS] and [SEP]
            logit += model.overlap_scale * overlap(pair.query_ids[1:-1], pair.ids[1:-1], model.first_piece_id)
        return logit

    def embed(self, texts: Sequence[tuple[int, ...]]) -> list[FloatArray]:
        """Unit vectors, one for each sequence of ids. Only in the thread that owns the engine."""
        return self._in_batches(texts, len, self._embed_batch)

    def _embed_batch(self, texts: list[tuple[int, ...]]) -> list[FloatArray]:
        rows = self._encoder.encode(Batch(texts), self._n_embd)
        return list(rows / np.linalg.norm(rows, axis=1, keepdims=True))


ZIPF_OFFSET = 10  # the piece of rank r counts ln(1 + r / 10): the first few ("the", "of", "and") hardly count


def overlap(query_ids: Sequence[int], passage_ids: Sequence[int], first_piece_id: int) -> float:
    """The part of the query's pieces that the passage holds, each counted by how rare it is: 0 none, 1 all.

    How rare is read off the vocabulary, where BERT's pieces stand roughly in the order of their frequency: by Zipf's
    law that of rank r has a frequency in proportion to 1 / r, and what search engines weigh words by (inverse document
    frequency; Robertson and Zaragoza 2009) is the logarithm of its inverse.
    """
    weights = {token: math.log1p(max(0, token - first_piece_id) / ZIPF_OFFSET) for token in query_ids}
    held = weights.keys() & set(passage_ids)
    return math.fsum(weights[token] for token in held) / total if (total := math.fsum(weights.values())) else 0.0


_ENGINES: dict[str, Callable[[GgufFile, ModelDescription, LlamaModel, Settings], LlamaEngine]] = {
    CROSS_ENCODER: RankPoolingEngine, YES_LOGIT: YesLogitEngine, BI_ENCODER: EmbeddingEngine,
}  # fmt: skip


def load_engine(path: Path, settings: Settings) -> LlamaEngine:
    """Opens a GGUF file, checks it, and decides from its metadata which engine scores with it. Raises ModelError."""
    gguf = GgufFile.open(path)
    description = describe(gguf)
    if not gguf.header_is_intact() and IN_CHILD not in os.environ:
        _try_in_child(path)
    model = LlamaModel(description, settings)
    try:
        engine = _ENGINES[description.kind](gguf, description, model, settings)
        _check_known_pair(gguf, engine)
        if model.accelerated:
            engine.score(engine.pairs.make("warm", ["up"]))  # copies the weights and makes the kernels
    except BaseException:  # a file that is refused is asked for again with the next request: free it now
        model.close()
        raise
    return engine


IN_CHILD = "RERANK_IN_CHILD"  # set where the process may die: nobody is served by it


def _try_in_child(path: Path) -> None:
    """llama.cpp ends the process for some damaged files (GGML_ASSERT). So a file whose header is not known to be intact
    is loaded and scores a pair in a process of its own first. Raises ModelError with what that process said."""
    command = [sys.executable, str(Path(__file__).resolve()), "--check", str(path)]
    child = subprocess.run(command, env={**os.environ, IN_CHILD: "1"}, capture_output=True, text=True, errors="replace")
    if child.returncode == 0:
        return
    marks = ("GGML_ASSERT", "rerank_server.py:")
    lines = [line for line in child.stderr.splitlines() if any(mark in line for mark in marks)]
    said = lines[-1].removeprefix(f"rerank_server.py: {path}: ") if lines else f"exit status {child.returncode}"
    if child.returncode < 0:
        said = f"llama.cpp ends the process that loads it ({said.rpartition('/')[2]}); {_MAKE}"
    raise ModelError(f"{path}: {said}")


def _check_known_pair(gguf: GgufFile, engine: LlamaEngine) -> None:
    """The file carries the ids of one pair as the reference builds it; this build must make the same ones."""
    expected = gguf.metadata.get("rerank.check_ids")
    if not expected:
        return
    query, passage = gguf.require("rerank.check_query", str), gguf.require("rerank.check_passage", str)
    (pair,) = engine.pairs.make(query, [passage], CHECK_MAX_LENGTH_TOKENS)
    if not pair.truncated and list(pair.ids) != expected:
        raise ModelError(
            f"{gguf.path}: its tokenizer makes other ids than the reference of a known pair "
            f"({list(pair.ids)[:12]}... instead of {expected[:12]}...); {_MAKE}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def sigmoid(logit: float) -> float:
    """Stable for any finite logit. Raises EngineError for NaN and infinities: a failure is never a score."""
    if not math.isfinite(logit):
        raise EngineError(f"the model gave {logit} in place of a score")
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    return (exponential := math.exp(logit)) / (1.0 + exponential)


@dataclass(frozen=True)
class Calibration:
    """score = sigmoid(scale * logit + bias). As it is without a file: the plain sigmoid. The order of scores stays."""

    scale: float = 1.0
    bias: float = 0.0

    def score(self, logit: float) -> float:
        """Raises EngineError for NaN and infinities."""
        return sigmoid(self.scale * logit + self.bias)


def read_calibrations(path: Path, models: Sequence[ModelDescription]) -> dict[str, Calibration]:
    """From a file that bench.calibrate wrote: model's name -> its map, for those of `models` that it was fitted for.

    Raises SettingsError: not such a file, fitted for none of the models, or for another file of the same name.
    """
    try:
        entries = {entry["file"]: entry for entry in json.loads(path.read_bytes())["calibrations"]}
        found = {model.name: _calibration_of(entries[model.path.name], model) for model in models
                 if model.path.name in entries}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise SettingsError(f"--calibration {path}: not a file of `python -m bench.calibrate` ({error})") from None
    if not found:
        served = ", ".join(model.path.name for model in models)
        raise SettingsError(f"--calibration {path} was fitted for {', '.join(entries) or 'nothing'}, not for {served}")
    return found


def _calibration_of(entry: dict[str, Any], model: ModelDescription) -> Calibration:
    for name in ("kind", "quantization", "file_bytes"):
        if entry[name] != getattr(model, name):
            raise SettingsError(
                f"--calibration was fitted for another {model.path.name} (its {name} was {entry[name]!r}, that of this "
                f"file is {getattr(model, name)!r}): run `python -m bench.calibrate` with this one"
            )
    scale, bias = float(entry["scale"]), float(entry["bias"])
    if not (math.isfinite(scale) and math.isfinite(bias) and scale > 0):
        raise ValueError(f"scale {scale} and bias {bias} make no rising curve")
    return Calibration(scale, bias)


@dataclass(frozen=True)
class Scored:
    """One passage's result. model: the file that scored it."""

    index: int
    logit: float
    score: float
    model: str
    n_tokens: int
    truncated: bool
    characters_read: int | None = None  # where it was cut, if that was asked for


def best_first(results: Iterable[Scored]) -> list[Scored]:
    """By logit, since scores saturate at 1.0; equal ones in the order of the passages."""
    return sorted(results, key=lambda result: (-result.logit, result.index))


@dataclass(frozen=True)
class Ranking:
    """The answer before it is written. n_llm: how many of the first results are the second stage's."""

    results: tuple[Scored, ...]
    model: str  # as the client named it, else the file's name
    file: str  # of the last stage
    n_tokens: int
    n_llm: int = 0

    def shown(self, request: RerankRequest) -> list[Scored]:
        low = -math.inf if request.min_score is None else request.min_score
        return [result for result in self.results if value_of(result, request) >= low][: request.top_n]


def value_of(result: Scored, request: RerankRequest) -> float:
    return result.logit if request.raw_scores else result.score


# ---------------------------------------------------------------------------------------------------------------------
# Roles: which file serves use_llm false (m3) and true (gemma)
# ---------------------------------------------------------------------------------------------------------------------


class ScoreCache:
    """Logits of pairs seen before, the least recently used dropped first. Any thread."""

    ENTRY_BYTES = 256  # measured: key, float, and the ordered dictionary's share

    def __init__(self, max_bytes: int) -> None:
        self._max_entries = max_bytes // self.ENTRY_BYTES
        self._logits: OrderedDict[bytes, float] = OrderedDict()
        self.hits = self.misses = 0
        self._lock = threading.Lock()  # guards all of the above

    def take(self, keys: Iterable[bytes]) -> dict[bytes, float]:
        """The known ones among `keys`."""
        with self._lock:
            known = {key: self._logits[key] for key in keys if key in self._logits}
            for key in known:
                self._logits.move_to_end(key)
            return known

    def put(self, logits: dict[bytes, float], hits: int) -> None:
        """Keeps what was scored; `hits` of the same request came from here."""
        with self._lock:
            self.hits, self.misses = self.hits + hits, self.misses + len(logits)
            self._logits.update(logits)
            while len(self._logits) > self._max_entries:
                self._logits.popitem(last=False)

    def __len__(self) -> int:
        return len(self._logits)


class Role:
    """A file, its queue, and a scheduler with its engine while they are needed."""

    def __init__(
        self, name: str, description: ModelDescription, settings: Settings,
        load: Callable[[Path, Settings], Engine] = load_engine, calibration: Calibration | None = None,
    ) -> None:  # fmt: skip
        self.name, self.description, self._settings, self._load = name, description, settings, load
        self.calibration = calibration or Calibration()
        self._lock = threading.Lock()  # guards _scheduler, _n_users, _last_used and _closed
        self._scheduler: Scheduler | None = None
        self._n_users = 0
        self._last_used = 0.0  # time.monotonic()
        self._closed = False
        self.queue = Queue(settings.max_queue_tokens)
        self.cache = ScoreCache(settings.cache_mb * 1_000_000)
        self.metrics = Metrics()  # Roles gives all of them one

    @property
    def loaded(self) -> bool:
        return (scheduler := self._scheduler) is not None and scheduler.is_loaded

    def start(self) -> Future[Engine]:
        """Loads in the scheduler's thread, if nothing has. Raises UnavailableError once closed."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the server is stopping")
            if self._scheduler is None or self._scheduler.has_failed:
                self._last_used = time.monotonic()
                self._scheduler = Scheduler(self.name, self.queue, self._load_file, self._idle_s, self.metrics)
            return self._scheduler.engine

    def _load_file(self) -> Engine:
        started = time.perf_counter()
        log.info("%s: loading %s (%.0f MB)", self.name, self.description.name, self.description.file_bytes / 1e6)
        engine = self._load(self.description.path, self._settings)
        log.info("%s: %s loaded in %.1f s", self.name, self.description.name, time.perf_counter() - started)
        return engine

    def _idle_s(self, engine: Engine) -> float | None:
        """See Scheduler. gemma is given up after --unload-idle-s, but never while a request uses it."""
        unload_s = self._settings.unload_idle_s if self.name == "gemma" else 0
        if not unload_s:
            return math.inf
        with self._lock:
            left_s = unload_s if self._n_users else self._last_used + unload_s - time.monotonic()
            if left_s > 0:
                return left_s
            engine.close()
            self._scheduler = None  # the next request starts another
        log.info("%s: %s freed after %d s without a request", self.name, self.description.name, unload_s)
        return None

    @contextlib.contextmanager
    def engine(self, call: Call) -> Iterator[Engine]:
        """Loads on first use; it is not freed before the `with` ends. Raises ModelError and RequestError."""
        with self._lock:
            self._n_users += 1
        try:
            yield call.result(self.start())
        finally:
            with self._lock:
                self._n_users, self._last_used = self._n_users - 1, time.monotonic()

    @contextlib.contextmanager
    def admit(self, request: RerankRequest, n: int | None = None) -> Iterator[Group]:
        """Room in the queue for the n longest of a request's pairs (default: all). Nothing is tokenised for it. Raises
        OverloadedError and UnavailableError."""
        longest = self.description.max_length(self._settings)
        with self.queue.admit(request.estimate_tokens(longest, n)) as group:
            yield group

    def score(
        self, request: RerankRequest, indices: Sequence[int], call: Call | None = None, group: Group | None = None
    ) -> list[Scored]:
        """The passages of `indices`, in that order. group: from admit. Raises ModelError and RequestError."""
        if not indices:
            return []
        if group is None:
            with self.admit(request, len(indices)) as group:
                return self.score(request, indices, call, group)
        call = call or Call()
        windows: list[list[Pair]] = []
        with self.engine(call) as engine:
            slices = self._tokenised(request, engine.pairs, indices, call, windows)
            logits = iter(self._logits(slices, group, call))
            cut = [index for index, own in zip(indices, windows, strict=True) if any(pair.truncated for pair in own)]
            read = self._characters_read(request, engine.pairs, cut, call)
        self.metrics("tokenise_seconds", self.name).observe(call.tokenise_s)
        results = []
        for index, own in zip(indices, windows, strict=True):
            logit = max(itertools.islice(logits, len(own)))  # of windows the best counts
            n_tokens = sum(len(pair.ids) + len(pair.query_ids) for pair in own)
            score, truncated = self.calibration.score(logit), any(pair.truncated for pair in own)
            results.append(Scored(index, logit, score, self.description.name, n_tokens, truncated, read.get(index)))
        self.metrics("truncated_passages", self.name).inc(len(cut))
        return results

    @staticmethod
    def _tokenised(
        request: RerankRequest, pairs: Pairs, indices: Sequence[int], call: Call, windows: list[list[Pair]]
    ) -> Iterator[tuple[list[Pair], float]]:
        """Slice by slice: pairs, and which part of the request is still text. Fills windows, the pairs of each."""
        for start in range(0, len(indices), SLICE_PASSAGES):
            call.check()
            started = time.monotonic()
            made = pairs_of(request, pairs, indices[start : start + SLICE_PASSAGES])
            call.tokenise_s += time.monotonic() - started
            windows += made
            yield [pair for own in made for pair in own], 1 - min(1, (start + SLICE_PASSAGES) / len(indices))

    @staticmethod
    def _characters_read(request: RerankRequest, pairs: Pairs, cut: Sequence[int], call: Call) -> dict[int, int]:
        read: dict[int, int] = {}
        for index in cut if request.return_characters_read else ():
            call.check()
            read[index] = characters_read(request, pairs, index)
        return read

    def logits(self, pairs: Sequence[Pair], call: Call | None = None) -> list[float]:
        """Raw logits, in order. Raises ModelError and RequestError."""
        call = call or Call()
        with self.queue.admit(sum(pair.n_new for pair in pairs)) as group, self.engine(call):
            return self._logits([(pairs, 0.0)], group, call)

    def _logits(self, slices: Iterable[tuple[Sequence[Pair], float]], group: Group, call: Call) -> list[float]:
        """Raw logits, in order. Equal pairs are scored once, known ones not at all."""
        keys: list[bytes] = []
        known: dict[bytes, float] = {}
        n_estimated = group.n_estimated
        for pairs, part_left in slices:
            own = {pair.key: pair for pair in pairs}
            keys += [pair.key for pair in pairs]
            known |= self.cache.take(own.keys() - group.keys)
            missing = {key: pair for key, pair in own.items() if key not in known and key not in group.keys}
            self.queue.append(group, missing, int(n_estimated * part_left))
            call.n_tokens += sum(len(pair.ids) for pair in missing.values())
        scored = call.result(self.queue.complete(group))
        call.n_pairs, call.queue_s = call.n_pairs + len(keys), call.queue_s + group.queue_s
        call.inference_s += group.inference_s
        self.metrics("queue_seconds", self.name).observe(group.queue_s)
        self.metrics("inference_seconds", self.name).observe(group.inference_s)
        self.metrics("cache_hits", self.name).inc(len(known))
        self.cache.put(scored, hits=len(known))
        known |= scored
        return [known[key] for key in keys]

    def close(self, timeout_s: float | None = None) -> bool:
        """Answers what was submitted, then frees the model. False: that took longer than timeout_s."""
        with self._lock:
            self._closed = True
            scheduler = self._scheduler
        self.queue.close()
        return scheduler is None or scheduler.join(timeout_s)


class Roles:
    """The m3 role (always there) and the gemma role (perhaps)."""

    def __init__(self, m3: Role, gemma: Role | None, is_fallback: bool) -> None:
        self.m3, self.gemma, self.is_fallback = m3, gemma, is_fallback
        self.metrics = Metrics()
        for role in self.all():
            role.metrics = self.metrics
            self.metrics.add_role(role)

    @staticmethod
    def find(settings: Settings) -> Roles:
        """Takes the files named by flags, else those in the models folders. Raises ModelError when none serves m3."""
        found = {} if settings.m3 and settings.gemma else files_by_kind(settings.model_folders)
        m3 = _describe_for(settings.m3, CROSS_ENCODER, BI_ENCODER) or newest(found, CROSS_ENCODER)
        mini = None if m3 else newest(found, BI_ENCODER)
        gemma = _describe_for(settings.gemma, YES_LOGIT) or newest(found, YES_LOGIT)
        first = m3 or mini
        if first is None:
            raise ModelError(
                f"no model in {' or '.join(map(str, settings.model_folders))}: run `{MODEL_COMMANDS['m3']}` for "
                "bge-reranker-v2-m3, or `make mini` for the small one that needs no Hub"
            )
        models = [first, *([gemma] if gemma else [])]
        maps = read_calibrations(settings.calibration, models) if settings.calibration else {}
        return Roles(
            Role("m3", first, settings, calibration=maps.get(first.name)),
            Role("gemma", gemma, settings, calibration=maps.get(gemma.name)) if gemma else None,
            is_fallback=first.kind == BI_ENCODER,
        )

    def select(self, request: RerankRequest, strict: bool) -> Role:
        """By use_llm, else by the model's name. Raises UnavailableError that names the command which makes the missing
        file, and (strict) ModelNotFoundError for a name that is none of ours."""
        name = (request.model or "").rpartition("/")[2].lower()
        gemmas = ("gemma", "bge-reranker-v2-gemma", self._file_name(self.gemma))
        ours = ("mini", "all-minilm-l6-v2") if self.is_fallback else ("m3", "bge-reranker-v2-m3")
        if strict and name and name not in (*ours, *gemmas, self._file_name(self.m3)):
            raise ModelNotFoundError(f"there is no model {request.model!r} here; see GET /v1/models", "model")
        if not request.use_llm and name not in gemmas:
            return self.m3
        if self.gemma is None:
            param = "use_llm" if request.use_llm else "model"
            raise UnavailableError(
                f"no gemma model is here, as '{param}' asks for; on the server run: {MODEL_COMMANDS['gemma']}", param
            )
        return self.gemma

    @staticmethod
    def _file_name(role: Role | None) -> str | None:
        return role.description.name.lower() if role else None

    def all(self) -> list[Role]:
        return [role for role in (self.m3, self.gemma) if role is not None]


def _describe_for(path: Path | None, *kinds: str) -> ModelDescription | None:
    if path is None:
        return None
    description = describe(GgufFile.open(path))
    if description.kind not in kinds:
        raise ModelError(f"{path}: a {description.kind} model cannot serve this role (it takes {' or '.join(kinds)})")
    return description


def files_by_kind(folders: Iterable[Path]) -> dict[str, list[ModelDescription]]:
    """Every servable GGUF file, folder by folder, newest first; one that is not is named in the log and left alone."""
    found: dict[str, list[ModelDescription]] = {}
    for path in itertools.chain.from_iterable(map(_gguf_files, folders)):
        try:
            description = describe(GgufFile.open(path))
        except ModelError as error:
            log.warning("not served: %s", error)
            continue
        found.setdefault(description.kind, []).append(description)
    return found


def _gguf_files(folder: Path) -> list[Path]:
    files = [path for path in folder.glob("*.gguf") if path.is_file()]
    return sorted(files, key=lambda path: (-path.stat().st_mtime_ns, path.name))


def newest(found: dict[str, list[ModelDescription]], kind: str) -> ModelDescription | None:
    """The file that was made last, in the first folder that has one; a real m3 goes before other cross-encoders."""
    candidates = sorted(found.get(kind, []), key=lambda description: "reranker-v2-" not in description.name)
    return candidates[0] if candidates else None


# ---------------------------------------------------------------------------------------------------------------------
# Response: one writer for each contract
# ---------------------------------------------------------------------------------------------------------------------


def write_native(ranking: Ranking, request: RerankRequest, path: str) -> list[float]:
    """A float for each passage, in its order. After two stages the floats of the rest are multiplied by the lowest of
    the second stage, so that the array ranks as the stages do."""
    scores = {result.index: value_of(result, request) for result in ranking.results}
    if ranking.n_llm and not request.raw_scores:
        lowest = min(result.score for result in ranking.results[: ranking.n_llm])
        scores |= {result.index: lowest * result.score for result in ranking.results[ranking.n_llm :]}
    return [scores[index] for index in range(len(request.passages))]


def _result(result: Scored, request: RerankRequest, key: str, document: str, text: Any) -> dict[str, Any]:
    written: dict[str, Any] = {"index": result.index, key: value_of(result, request), "model": result.model}
    if request.return_documents:
        written[document] = text
    if request.ids is not None and request.ids[result.index] is not None:
        written["id"] = request.ids[result.index]
    if result.truncated:
        written["truncated"] = True
    if result.characters_read is not None:
        written["characters_read"] = result.characters_read
    return written


def write_tei(ranking: Ranking, request: RerankRequest, path: str) -> list[dict[str, Any]]:
    return [_result(result, request, "score", "text", request.passages[result.index])
            for result in ranking.shown(request)]  # fmt: skip


def write_cohere_and_jina(ranking: Ranking, request: RerankRequest, path: str) -> dict[str, Any]:
    results = [_result(result, request, "relevance_score", "document", {"text": request.passages[result.index]})
               for result in ranking.shown(request)]  # fmt: skip
    version = "2" if path.startswith("/v2") else "1"
    return {
        **_envelope(ranking, "rerank"), "results": results,
        "meta": {"api_version": {"version": version}, "billed_units": {"search_units": 1}},
    }  # fmt: skip


def write_voyage(ranking: Ranking, request: RerankRequest, path: str) -> dict[str, Any]:
    data = [_result(result, request, "relevance_score", "document", request.passages[result.index])
            for result in ranking.shown(request)]  # fmt: skip
    return {"object": "list", "data": data, "model": ranking.model, "usage": {"total_tokens": ranking.n_tokens}}


def write_score(ranking: Ranking, request: RerankRequest, path: str) -> dict[str, Any]:
    in_order = sorted(ranking.results, key=lambda result: result.index)
    data = [{**_result(result, request, "score", "document", request.passages[result.index]), "object": "score"}
            for result in in_order]  # fmt: skip
    return {**_envelope(ranking, "list"), "data": data}


def _envelope(ranking: Ranking, kind: str) -> dict[str, Any]:
    """kind: infinity's client knows no other `object` than "rerank" for a ranking."""
    usage = {"prompt_tokens": ranking.n_tokens, "total_tokens": ranking.n_tokens}
    return {"id": f"rerank-{uuid.uuid4().hex}", "object": kind, "model": ranking.model, "usage": usage}


_QUERY = "How long do cats sleep in a day?"
_TEXTS = ["Cats sleep between 12 and 16 hours a day.", "A cat needs fresh water every day.", "Stocks fell on Friday."]
_RERANK_ROUTES = ("/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking")
_SCORE_ROUTES = ("/score", "/v1/score")

_VOYAGE = {"top_k", "truncation"}


def _given(body: dict[str, Any], default: str = "") -> str:
    """Under which key a body brings its texts; one that is null counts where there is no other."""
    present = [name for name in ("passages", "texts", "documents") if name in body]
    return min(present, key=lambda name: body[name] is None, default=default)



CONTRACTS = (
    Contract("score", _SCORE_ROUTES, "text_2", lambda body, path: path in _SCORE_ROUTES, _read_score_texts,
             write_score, "vLLM's score: one text against many, or pair by pair, in input order",
             {"text_1": _QUERY, "text_2": _TEXTS}),
    Contract("tei", _RERANK_ROUTES, "texts", lambda body, path: _given(body) == "texts", _read_texts, write_tei,
             "text-embeddings-inference: LlamaIndex, Haystack, Dify, RAGFlow",
             {"query": _QUERY, "texts": _TEXTS, "return_text": True, "truncate": True}),
    Contract("voyage", _RERANK_ROUTES, "documents",
             lambda body, path: _given(body) == "documents" and "top_n" not in body and not _VOYAGE.isdisjoint(body),
             _read_texts, write_voyage, "Voyage: known by its top_k or truncation",
             {"query": _QUERY, "documents": _TEXTS, "model": "m3", "top_k": 2}),
    Contract("jina", _RERANK_ROUTES, "documents",
             lambda body, path: _given(body, "" if path == "/rerank" else "documents") == "documents", _read_texts,
             write_cohere_and_jina, "Cohere v1 and v2, Jina, and OpenAI-style servers: Open WebUI, Dify, LiteLLM",
             {"query": _QUERY, "documents": _TEXTS, "model": "m3", "top_n": 2, "return_documents": True},
             {"query": _QUERY, "documents": _TEXTS, "use_llm": True, "llm_top_n": 2}),
    Contract("native", _RERANK_ROUTES, "passages", lambda body, path: True, _read_texts, write_native,
             "an array of floats, in the passages' order", {"query": _QUERY, "passages": _TEXTS, "use_llm": False}),
)  # fmt: skip


# -- What is here: an OpenAPI document from the tables above, and a page that shows it ---------------------------------


def openapi_document(routes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """OpenAPI 3.1, from FIELDS and CONTRACTS, which also parse the requests."""
    paths = {path: {method.lower(): _operation(path, method) for method in methods} for path, methods in routes.items()}
    schemas: dict[str, Any] = {f"{contract.name}_request": _request_schema(contract) for contract in CONTRACTS}
    schemas |= {f"{name}_response": schema for name, schema in _RESPONSE_SCHEMAS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "rerank-server", "version": __version__, "description": "Relevance scores of passages."},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "error": _ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "only with --api-key"}},
        },
        "security": [{}, {"key": []}],
    }


def _request_schema(contract: Contract) -> Schema:
    document = _object_schema([], text=_STRING, id={"type": ["string", "integer", "null"]})
    text = _STRING if contract.name == "native" else {"anyOf": [_STRING, document]}
    texts: Schema = {"type": "array", "items": text}
    both: Schema = {"anyOf": [_STRING, texts]}
    schema: Schema = {"type": "object", "description": contract.help, "required": []}
    required: dict[str, Schema] = {}
    if contract.name == "score":
        schema["anyOf"] = [_object_schema(text_1=both, text_2=both), _object_schema(queries=both, documents=both)]
    else:
        required = {"query": _STRING, contract.texts: texts}
        schema["required"] = list(required)
    optional = {
        field.name: _nullable(field.schema) | {"description": field.help}
        for field in FIELDS if not field.contracts or contract.name in field.contracts
    }  # fmt: skip
    return {**schema, "properties": {**required, **optional}, "examples": list(contract.examples().values())}


def _nullable(schema: Schema) -> Schema:
    """null means: not given."""
    enum = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **enum, "type": [schema["type"], "null"]}


def _object_schema(required: Sequence[str] | None = None, **properties: Any) -> Schema:
    """An object whose properties are all required, unless `required` names those that are."""
    return {"type": "object", "properties": properties, "required": list(properties if required is None else required)}


def _results_schema(score: str, **document: Schema) -> Schema:
    cut = {"truncated": {"type": "boolean"}, "characters_read": _INTEGER}
    optional = {"id": {"type": ["string", "integer"]}, **cut, **document}
    properties = {"index": _INTEGER, score: _NUMBER, "model": _STRING, **optional}
    return {"type": "array", "items": _object_schema(["index", score, "model"], **properties)}


_NUMBER, _STRING, _INTEGER = {"type": "number"}, {"type": "string"}, {"type": "integer"}
_ERROR_SCHEMA = _object_schema(
    error={"anyOf": [_STRING, _object_schema(["message", "type", "code"], message=_STRING, type=_STRING, code=_INTEGER,
                                             param=_STRING)]},
    error_type=_STRING, message=_STRING, detail=_STRING,
)  # fmt: skip
_USAGE = _object_schema(prompt_tokens=_INTEGER, total_tokens=_INTEGER)
_META = _object_schema(api_version=_object_schema(version=_STRING), billed_units=_object_schema(search_units=_INTEGER))
_RESPONSE_SCHEMAS: dict[str, Schema] = {
    "native": {"type": "array", "items": _NUMBER},
    "tei": _results_schema("score", text=_STRING),
    "jina": _object_schema(id=_STRING, object=_STRING, model=_STRING, usage=_USAGE, meta=_META,
                           results=_results_schema("relevance_score", document=_object_schema(text=_STRING))),
    "voyage": _object_schema(object=_STRING, model=_STRING, usage=_object_schema(total_tokens=_INTEGER),
                             data=_results_schema("relevance_score", document=_STRING)),
    "score": _object_schema(id=_STRING, object=_STRING, model=_STRING, usage=_USAGE,
                            data=_results_schema("score", object=_STRING, document=_STRING)),
}  # fmt: skip
_OBJECT = {"type": "object"}
_ENDPOINTS = _object_schema(name=_STRING, version=_STRING, endpoints=_OBJECT)
_PAGES = {  # what each answers, and the media type and schema of the answer
    "/": ("a page to try it in a browser; the endpoints for a client that asks for JSON", "text/html", _STRING),
    "/health": ("alive, and which file serves which role", "application/json",
                _object_schema(status=_STRING, version=_STRING, models=_OBJECT, accel=_OBJECT)),
    "/ready": ("200 when requests are served, 503 while the model loads and when the server stops", "application/json",
               _object_schema(status=_STRING)),
    "/metrics": ("counters and histograms for Prometheus", "text/plain", _STRING),
    "/info": ("limits, as text-embeddings-inference gives them", "application/json",
              _object_schema(["model_id", "model_type", "max_input_length", "max_client_batch_size"], model_id=_STRING,
                             model_type=_object_schema(reranker=_OBJECT), max_input_length=_INTEGER,
                             max_client_batch_size=_INTEGER)),
    "/v1/models": ("the models that are here", "application/json",
                   _object_schema(object=_STRING, data={"type": "array", "items": _object_schema(["id"], id=_STRING)})),
    "/openapi.json": ("this document", "application/json", _object_schema(openapi=_STRING, paths=_OBJECT)),
    "/docs": ("this document as a page", "text/html", _STRING),
    "/debug/pair": ("the token ids that the model sees for one pair", "application/json",
                    _object_schema(["ids", "pieces", "logit", "score"], ids={"type": "array", "items": _INTEGER},
                                   pieces={"type": "array", "items": _STRING}, logit=_NUMBER, score=_NUMBER)),
}  # fmt: skip
_PAIR_SCHEMA = _object_schema(["query", "passage"], query=_STRING, passage=_STRING, use_llm={"type": "boolean"})
_STATUSES = {400: "a field is wrong; the message names it", 401: "the key is missing or wrong", 404: "no such model",
             408: "it took too long to arrive", 411: "no Content-Length", 413: "the body is too large",
             414: "the request line is too long", 415: "the body is compressed", 417: "an unknown expectation",
             429: "as many tokens wait as may: see Retry-After", 431: "the header is too large",
             500: "a pair could not be scored", 501: "an unknown transfer coding",
             503: "no model for this role, no room, or the server is stopping", 504: "the request's time is over",
             505: "not HTTP/1"}  # fmt: skip


def _operation(path: str, method: str) -> dict[str, Any]:
    here = [contract for contract in CONTRACTS if path in contract.routes]
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/error"}}}
    errors = {str(code): {"description": text, "content": error} for code, text in _STATUSES.items()}
    operation: dict[str, Any] = {"operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}")}
    if here:
        operation["summary"] = "; ".join(contract.help for contract in here)
        answer, kind = {"anyOf": [_reference(contract, "response") for contract in here]}, "application/json"
        asked = {"anyOf": [_reference(contract, "request") for contract in here]}
        examples = {name: {"value": value} for contract in here for name, value in contract.examples().items()}
    else:
        operation["summary"], kind, answer = _PAGES[path]
        asked, examples = _PAIR_SCHEMA, {"pair": {"value": {"query": _QUERY, "passage": _TEXTS[0]}}}
    if method == "POST":
        body = {"application/json": {"schema": asked, "examples": examples}}
        operation["requestBody"] = {"required": True, "content": body}
    content = {kind: {"schema": answer}, **({"application/json": {"schema": _ENDPOINTS}} if path == "/" else {})}
    good = {"description": "OK", "content": content}
    possible = {code: error for code, error in errors.items() if _may_answer(path, code)}
    return {**operation, "responses": {"200": good, **possible}}


def _may_answer(path: str, code: str) -> bool:
    return path not in OPEN_ROUTES or (path == "/ready" and code == "503")


def _reference(contract: Contract, kind: str) -> Schema:
    return {"$ref": f"#/components/schemas/{contract.name}_{kind}"}


def docs_page(routes: dict[str, dict[str, Any]]) -> str:
    """The same tables as a page that needs no script and no network."""

    def rows(cells: Iterable[Sequence[str]]) -> str:
        return "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)

    escape = html.escape
    fields = rows((f"<code>{field.name}</code>", escape(field.help), ", ".join(field.contracts)) for field in FIELDS)
    pages = rows((f"<code>{path}</code>", escape(_PAGES[path][0])) for path in routes if path in _PAGES)
    contracts = "".join(
        f"<h3>{contract.name}</h3><p>{escape(contract.help)}. <code>POST {', '.join(contract.routes)}</code></p>"
        + "".join(f"<pre>{escape(json.dumps(example, indent=2))}</pre>" for example in contract.examples().values())
        for contract in reversed(CONTRACTS)
    )  # fmt: skip
    style = (
        "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}:root{color-scheme:light dark}"
        "td{padding:.2rem 1rem .2rem 0;vertical-align:top}pre{background:#8882;padding:1rem;overflow:auto}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>rerank-server</title><style>{style}</style>'
        f"<h1>rerank-server {__version__}</h1><table>{pages}</table><h2>Contracts</h2>{contracts}"
        f"<h2>Optional fields</h2><table>{fields}</table></html>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    status: int
    body: Any  # JSON, or str for a page
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    page_type: str = "text/html; charset=utf-8"


Handler = Callable[[bytes, Call], Response]


def page_response(page: str) -> Response:
    """A page whose own script and style run, and nothing else: neither what a text brings along nor what the network
    has (Content Security Policy, level 3). Trusted types: not even its own script can turn a text into HTML."""
    policy = (
        f"default-src 'none'; script-src {_hashes(page, 'script')}; style-src {_hashes(page, 'style')}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return Response(200, page, {
        "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-cache",
    })  # fmt: skip


def _hashes(page: str, element: str) -> str:
    """Of what is inside each such element: CSP's source list."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


class Application:
    """What the routes do, without HTTP: raw body in, Response out. Any thread."""

    def __init__(self, roles: Roles, settings: Settings, page: Path = PAGE_FILE) -> None:
        self._roles, self._settings = roles, settings
        self._page = page.read_text(encoding="utf-8") if page.is_file() else None
        self.metrics = roles.metrics
        self.is_stopping = False
        self.routes: dict[str, dict[str, Handler]] = {
            path: {"POST": functools.partial(self.rerank, path=path)}  # the list of routes is the contracts'
            for path in dict.fromkeys(route for contract in CONTRACTS for route in contract.routes)
        }
        pages = {"/": self.page, "/health": self.health, "/ready": self.ready, "/metrics": self.metrics_page,
                 "/info": self.info, "/v1/models": self.models,
                 "/openapi.json": self.openapi, "/docs": self.docs}  # fmt: skip
        self.routes |= {path: {"GET": page} for path, page in pages.items()}
        if settings.debug:
            self.routes["/debug/pair"] = {"POST": self.debug_pair}

    def rerank(self, raw: bytes, call: Call, path: str = "/rerank") -> Response:
        request, contract = RerankRequest.parse(raw, path)
        ranking = self.rank(request, call)
        files = dict.fromkeys((ranking.file, *(result.model for result in ranking.results)))
        headers = {"X-Rerank-Model": ",".join(map(urllib.parse.quote, files))}  # a header holds no other alphabet
        if truncated := sorted(result.index for result in ranking.results if result.truncated):
            headers["X-Rerank-Truncated"] = truncated_header(truncated)
        return Response(200, contract.write(ranking, request, path), headers)

    def rank(self, request: RerankRequest, call: Call | None = None) -> Ranking:
        """Scores, best first. Two stages: m3 scores everything, gemma the best llm_top_n, and those come first."""
        call = call or Call()
        call.request = request
        call.timeout_s = min(call.timeout_s, request.timeout_s, self._settings.max_timeout_s)
        role = self._roles.select(request, self._settings.strict_model)
        if role is not self._roles.m3 and request.llm_top_n is not None:
            return self._rank_in_two_stages(request, request.llm_top_n, role, call)
        results = best_first(role.score(request, range(len(request.passages)), call))
        n_tokens = sum(result.n_tokens for result in results)
        return Ranking(tuple(results), self._shown(request, role), role.description.name, n_tokens)

    def _rank_in_two_stages(self, request: RerankRequest, n: int, role: Role, call: Call) -> Ranking:
        with role.admit(request, n) as group:  # now: not a refusal when the first stage is done
            first = best_first(self._roles.m3.score(request, range(len(request.passages)), call))
            second = best_first(role.score(request, [result.index for result in first[:n]], call, group))
        n_tokens = sum(result.n_tokens for result in (*first, *second))
        results = (*second, *first[n:])
        return Ranking(results, self._shown(request, role), role.description.name, n_tokens, n_llm=len(second))

    @staticmethod
    def _shown(request: RerankRequest, role: Role) -> str:
        return request.model or role.description.name

    def page(self, raw: bytes, call: Call) -> Response:
        """A page for people. The endpoints for a client that asks for JSON, and where there is no such file."""
        wants_json = "application/json" in call.accept and "text/html" not in call.accept
        if self._page is not None and not wants_json:
            return page_response(self._page)
        endpoints = {f"{method} {path}": _operation(path, method)["summary"]
                     for path, methods in self.routes.items() for method in methods}  # fmt: skip
        return Response(200, {"name": "rerank-server", "version": __version__, "endpoints": endpoints})

    def health(self, raw: bytes, call: Call) -> Response:
        models: dict[str, Any] = {"m3": None, "gemma": None}
        models |= {role.name: self._model_state(role) for role in self._roles.all()}
        tuning = self._settings.tuning
        accel = {"used": tuning.accel, "reason": tuning.accel_reason, "bytes": accel_bytes()}
        return Response(200, {"status": "ok", "version": __version__, "models": models, "accel": accel})

    def ready(self, raw: bytes, call: Call) -> Response:
        """Whether a load balancer should send requests. Raises UnavailableError."""
        if self.is_stopping:
            raise UnavailableError("the server is stopping")
        if not self._roles.m3.loaded:
            raise UnavailableError("the model is still loading")
        return Response(200, {"status": "ready"})

    def metrics_page(self, raw: bytes, call: Call) -> Response:
        return Response(200, self.metrics.text(), page_type=prometheus_client.CONTENT_TYPE_LATEST)

    def _model_state(self, role: Role) -> dict[str, Any]:
        description = role.description
        return {
            "file": description.path.name, "kind": description.kind, "architecture": description.architecture,
            "quantization": description.quantization, "file_bytes": description.file_bytes,
            "max_length": description.max_length(self._settings), "loaded": role.loaded,
            "is_fallback": role.name == "m3" and self._roles.is_fallback,
            "cache": {"entries": len(role.cache), "hits": role.cache.hits, "misses": role.cache.misses},
        }  # fmt: skip

    def info(self, raw: bytes, call: Call) -> Response:
        """TEI's GET /info, which its clients ask first, and every limit of this server."""
        labels, model = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}, self._roles.m3.description
        return Response(200, {
            "model_id": model.source or model.name, "model_sha": None, "model_dtype": model.quantization,
            "model_type": {"reranker": labels}, "max_concurrent_requests": _MANY,
            "max_input_length": model.max_length(self._settings), "max_batch_tokens": self._settings.tuning.ubatch,
            "max_client_batch_size": MAX_CLIENT_BATCH_SIZE, "auto_truncate": True,
            "max_body_bytes": self._settings.max_body_mb * 1_000_000,
            "tokenization_workers": self._settings.tuning.threads, "version": __version__,
        })  # fmt: skip

    def models(self, raw: bytes, call: Call) -> Response:
        """OpenAI's list of models: one for each role that has a file."""
        return Response(200, {"object": "list", "data": [
            {"id": role.description.name, "object": "model", "created": 0, "owned_by": role.description.source,
             "role": role.name, **self._model_state(role)}
            for role in self._roles.all()
        ]})  # fmt: skip

    def openapi(self, raw: bytes, call: Call) -> Response:
        return Response(200, openapi_document(self.routes))

    def docs(self, raw: bytes, call: Call) -> Response:
        return page_response(docs_page(self.routes))

    def debug_pair(self, raw: bytes, call: Call) -> Response:
        """One pair as the model sees it: {query, passage, use_llm} -> pieces, ids, where it was cut, logit, score."""
        body = parse_json_object(raw)
        query, passage = _text(body.get("query"), "query", body), _text(body.get("passage"), "passage", body)
        request = RerankRequest((query,), (passage,), _boolean(body.get("use_llm"), "use_llm"))
        role = self._roles.select(request, strict=False)
        with role.engine(call) as engine:
            ((pair,),) = pairs_of(request, engine.pairs, [0])
            (logit,) = role.logits([pair], call)
            sequences = {"ids": pair.ids, **({"query_ids": pair.query_ids} if pair.query_ids else {})}
            pieces = {name.replace("ids", "pieces"): engine.pieces(ids) for name, ids in sequences.items()}
        return Response(200, {
            "model": role.description.name, **sequences, **pieces, "passage_start": pair.passage_start,
            "n_dropped": pair.n_dropped, "logit": logit, "score": role.calibration.score(logit),
        })  # fmt: skip


def truncated_header(indices: Sequence[int]) -> str:
    """X-Rerank-Truncated: the passages that were cut, ascending, as in "0-4,9".

    Where that is longer than MAX_TRUNCATED_CHARACTERS, only how many: "count=14000". Clients and
    proxies bound the bytes of a header (http.client: 65,536; nginx: 4,096 for all of them).
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = ",".join(map(_span, runs))
    return named if len(named) <= MAX_TRUNCATED_CHARACTERS else f"count={len(indices)}"


def _span(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"


# -- What the server is given at its start ---------------------------------------------------------


def api_key_digests(settings: Settings) -> list[bytes]:
    """Empty: no key is asked for. Digests, since comparing strings of different lengths tells the
    length. Raises SettingsError."""
    keys = {"--api-key": settings.api_key} if settings.api_key else {}
    if settings.api_key_file is not None:
        keys |= _keys_of(settings.api_key_file)
    for source, key in keys.items():
        if not re.fullmatch(r"[!-~]+", key):
            raise SettingsError(f"{source}: a key holds visible ASCII characters only, no spaces")
    return [hashlib.sha256(key.encode()).digest() for key in keys.values()]


def _keys_of(path: Path) -> dict[str, str]:
    """By the place where each stands."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file: {path} cannot be read: {error}") from None
    keys = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            keys[f"--api-key-file: {path}, line {number}"] = line
    if not keys:
        raise SettingsError(f"--api-key-file: {path} holds no key")
    return keys


def allowed_origins(settings: Settings) -> frozenset[str]:
    """Raises SettingsError."""
    given = {origin.strip() for origin in settings.cors_origins.split(",")} - {""}
    for origin in given:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+", origin):
            example = "https://app.example.com"
            raise SettingsError(f"--cors-origins: {origin!r} is no origin, as {example} is")
    return frozenset(given)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """None: plain HTTP. Raises SettingsError."""
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


# -- Connections: who is let in, who makes room, how all of it stops -------------------------------


class RerankServer(http.server.ThreadingHTTPServer):
    """One thread for each connection, and at most --max-connections of them.

    It knows which connections are idle, that is, have no whole header: the longest idle one makes
    room for a new client when the server is full, and those without a byte are closed at the stop.
    """

    request_queue_size = 256  # prevents: a burst of clients is refused (the library has room for 5)

    def __init__(self, application: Application, settings: Settings) -> None:
        """Raises SettingsError for keys, origins or a certificate, OSError for the address."""
        self.application, self.settings = application, settings
        self.api_key_digests = api_key_digests(settings)
        self.allowed_origins = allowed_origins(settings)
        self.tls_context = tls_context(settings)
        self.bodies = ByteBudget(settings.max_bodies_mb * 1_000_000)
        self.draining = self.is_cut_off = False
        self._changed = threading.Condition()  # guards _idle, _open and draining
        self._idle: dict[RerankHandler, None] = {}  # the longest idle first
        self._open = 0  # connections
        self._turned_away: deque[socket.socket] = deque(maxlen=MAX_TURNED_AWAY)
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), RerankHandler)
        if self.tls_context is not None:  # each connection's own thread shakes hands
            self.socket = self.tls_context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

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
        if self._admit():
            super().process_request(request, client_address)
        else:
            self._turn_away(request)

    def _admit(self) -> bool:
        """Counts a new connection. When there is no room, the longest idle one has to leave; False
        when none is idle, or when too many that were told to leave are still there."""
        with self._changed:
            n_too_many = self._open - self.settings.max_connections
            if n_too_many >= 0:
                if not self._idle or n_too_many >= MAX_TURNED_AWAY:
                    return False
                longest = next(iter(self._idle))
                del self._idle[longest]
                longest.stop_reading()
            self._open += 1
            return True

    def _turn_away(self, connection: socket.socket) -> None:
        """503, without waiting for the client. The connection is held, its sending ended, until
        MAX_TURNED_AWAY later ones were turned away: closing it with unread bytes would destroy
        the answer."""
        refusal = BusyError("all connections are in use")
        body = json.dumps(refusal.body()).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nRetry-After: {refusal.headers['Retry-After']}\r\n"
            "Connection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            if self.tls_context is None:  # a handshake would have to be waited for
                connection.send(head.encode() + body)
            socket.socket.shutdown(connection, socket.SHUT_WR)
        self._turned_away.append(connection)

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
            if self.draining:
                handler.stop_reading()

    def becomes_busy(self, handler: RerankHandler) -> None:
        with self._changed:
            self._idle.pop(handler, None)

    def drain(self, timeout_s: float) -> bool:
        """Stops accepting, answers what has arrived, closes. False: some request was not done in
        time, and got 503."""
        self.shutdown()
        while select.select([self.socket], [], [], 0)[0]:  # closing would reset what waits there
            self.handle_request()
        self.server_close()
        with self._changed:
            self.draining = self.application.is_stopping = True
            for handler in self._idle:
                if handler.is_silent:
                    handler.stop_reading()
            is_done = self._changed.wait_for(self._is_empty, timeout_s)
            self.is_cut_off = not is_done
            if self.is_cut_off:
                self._changed.wait_for(self._is_empty, CUT_OFF_S)
        self._turned_away.clear()
        return is_done

    def _is_empty(self) -> bool:
        return self._open == 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prevents: a traceback printed beside the log."""
        log.error("connection failed: %s", traceback.format_exc())


class ByteBudget:
    """Bytes of request bodies in memory, over all connections. Any thread."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0
        self._lock = threading.Lock()  # guards _taken

    def take(self, n_bytes: int) -> None:
        """Raises BusyError when there is no room."""
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
_TARGET = re.compile(  # a path, or a URL
    r"(?:(?i:https?)://[^/?#@]+|(?=/))(/[^?#]*)?(?:\?[^#]*)?"
)
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_ONCE = ("host", "content-length", "transfer-encoding")  # RFC 9110, 8.6 and RFC 9112, 3.2
_TEI_KEY = re.compile(rb'"texts"[ \t\r\n]*:')
_POLL_FIN = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere only a reset is seen


class DeadlineStream(io.RawIOBase):
    """A connection's bytes, until a deadline. A socket's own time-out is for each read, and a
    client that sends a byte now and then never meets it. Its thread alone uses it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline, self._bytes_per_s = 0.0, math.inf

    def allow(self, seconds: float, bytes_per_s: float = math.inf) -> None:
        """From now on; and more for what arrives: a large body may take longer, not a slow one."""
        self._deadline, self._bytes_per_s = time.monotonic() + seconds, bytes_per_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """io.BufferedReader's hook. Raises HttpError 408 and ClientGoneError."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise HttpError("the request took too long to arrive", 408)
        try:
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
    and the writing of heads (send_response, send_header). The reading is replaced.
    """

    server: RerankServer
    rfile: io.BufferedReader
    wfile: io.BytesIO
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
        """Any thread. What has arrived is still read."""
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

    # -- One request -------------------------------------------------------------------------------

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
        self.headers, self.wfile = http.client.HTTPMessage(), io.BytesIO()
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
        """Reads a request and makes the answer. Whatever the application raises is answered: what
        befalls the connection itself is a ClientGoneError."""
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
        handler = self._handler()
        has_key = self._has_key()
        if not has_key and self._has_long_body():
            raise _unauthorized()
        self._body = b"".join(self._parts(is_counted=has_key))
        self._is_unread = False
        if not (has_key or self.path in OPEN_ROUTES or self.command == "OPTIONS"):
            raise _unauthorized()  # only now: the shape of the answer depends on the body
        self._call.timeout_s, self._call.accept = self._timeout_s(), self._field("accept")
        return handler(self._body, self._call)

    def _methods(self) -> dict[str, Handler]:
        """What the path takes. Raises HttpError 404."""
        routes = self.server.application.routes
        if self.path not in routes and self.path != "*":
            known = ", ".join(routes)
            message = f"there is no {self.path[:200]!r} here; the endpoints are {known}"
            raise HttpError(message, 404)
        return routes.get(self.path, {})

    def _handler(self) -> Handler:
        """Raises HttpError 404 and 405."""
        methods = self._methods()
        takes = [*methods, "HEAD"] if "GET" in methods else [*methods]
        allowed = ", ".join([*takes, "OPTIONS"])
        if self.command == "OPTIONS":
            return functools.partial(_answer_options, allowed)
        handler = methods.get("GET" if self.command == "HEAD" else self.command)
        if handler is None:
            message = f"{self.path} takes {allowed}, not {self.command[:20]}"
            raise HttpError(message, 405, {"Allow": allowed})
        return handler

    def _has_key(self) -> bool:
        """True where none is asked for. Compares with every key, so that the time does not tell
        which one was near."""
        scheme, _, given = self._field("authorization").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        keys = self.server.api_key_digests
        is_one_of_them = sum(hmac.compare_digest(digest, key) for key in keys) > 0
        return not keys or (is_one_of_them and scheme.lower() == "bearer")

    def _has_long_body(self) -> bool:
        """Longer than what is read, uncounted, from a client without a key."""
        is_announced = self._is_chunked or self._expects_continue()
        return is_announced or (self._length or 0) > MAX_UNAUTHORIZED_BODY_BYTES

    def _timeout_s(self) -> float:
        """X-Request-Timeout-Ms. Raises BadRequestError."""
        given = self.headers.get("x-request-timeout-ms", "3600000000")
        if not re.fullmatch(r"[0-9]{1,10}", given) or int(given) == 0:
            raise BadRequestError(
                "the X-Request-Timeout-Ms header must be a number of milliseconds, at least 1"
            )
        return int(given) / 1000

    def _refusal(self, error: Exception) -> Response:
        if isinstance(error, ModelError):
            log.error("%s", error)
            error = UnavailableError(f"the model could not be loaded: {error}")
        if not isinstance(error, RequestError):
            log.error("%s %s failed", self.command, self.path[:200], exc_info=error)
            error = EngineError("internal error; see the server's log")
        is_tei = _TEI_KEY.search(self._body) is not None
        return Response(error.status, error.body(is_tei), error.headers)

    # -- Reading -----------------------------------------------------------------------------------

    def parse_request(self) -> bool:
        """The head, by RFC 9112. Prevents: HTTP/0.9, bare LFs, folded and broken header lines, two
        lengths, an ignored Transfer-Encoding, 6 MB of headers. Raises HttpError."""
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
        self.path = self._path_of(target)
        self._find_length()
        wishes = [wish.strip() for wish in self._field("connection").lower().split(",")]
        self.close_connection = "close" in wishes or (minor == "0" and "keep-alive" not in wishes)
        return True

    def _path_of(self, target: str) -> str:
        """Without the query. Raises HttpError."""
        if target == "*" and self.command == "OPTIONS":
            return target
        parts = _TARGET.fullmatch(target)
        if parts is None:
            shown = repr(target[:40])
            raise HttpError(f"the request target must be a path or an http URL, not {shown}")
        return parts[1] or "/"

    def _find_length(self) -> None:
        """By RFC 9112, 6.1 to 6.3. Raises HttpError."""
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

    def _fields(self) -> http.client.HTTPMessage:
        """Header or trailer fields, up to the empty line. Raises HttpError."""
        fields, room = http.client.HTTPMessage(), MAX_HEADER_BYTES
        while line := self._line(room, 431):
            room -= len(line) + 2
            parts = _FIELD_LINE.fullmatch(line)
            if parts is None:
                must = "a header line must be one line, NAME: VALUE, without control characters"
                raise HttpError(f"{must}, not {line[:40].decode('latin-1')!r}")
            name = parts[1].decode()
            if name.lower() in _ONCE and name in fields:
                raise HttpError(f"the {name.lower()} header is there twice")
            fields[name] = parts[2].decode("latin-1").strip(" \t")
            if len(fields) > MAX_HEADERS:
                raise HttpError(f"there are more than {MAX_HEADERS} header lines", 431)
        return fields

    def _field(self, name: str) -> str:
        """Empty where there is none; repeated ones are joined by commas: RFC 9110, 5.3."""
        return ", ".join(self.headers.get_all(name, []))

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
        """Raises HttpError for an expectation that HTTP does not define."""
        expected = self._field("expect").lower()
        if self.request_version == "HTTP/1.0" or not expected:
            return False
        if expected != "100-continue":
            raise HttpError("the only expectation that can be met is 100-continue", 417)
        return self._is_chunked or bool(self._length)

    def _parts(self, is_counted: bool) -> Iterator[bytes]:
        """The body. is_counted: in the budget for bodies. Raises HttpError and BusyError."""
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
        """What is known before it arrives. Raises HttpError."""
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
        """RFC 9112, 7.1. Trailers are checked and ignored. Raises HttpError."""
        n_bytes = 0
        while size := self._chunk_size():
            n_bytes += size
            if n_bytes > limit:
                raise HttpError(f"the body has more than the {limit:,} bytes accepted", 413)
            yield from self._read(size)
            if self._line(MAX_CHUNK_LINE_BYTES):
                raise HttpError("a chunk is longer than its size says")
        trailer = self._fields()
        if any(name in trailer for name in _ONCE):
            raise HttpError("a trailer must not say how long the request is, or whom it is for")

    def _chunk_size(self) -> int:
        """Extensions are checked and ignored."""
        parts = _CHUNK_LINE.fullmatch(self._line(MAX_CHUNK_LINE_BYTES))
        if parts is None:
            raise HttpError("a chunk must begin with its size in hexadecimal digits")
        return int(parts[1], 16)

    def _read(self, n_bytes: int) -> Iterator[bytes]:
        """In parts, so that each is counted before the next one is read."""
        while n_bytes:
            part = self.rfile.read1(min(n_bytes, RECEIVE_BYTES))
            if not part:
                raise self._end()
            n_bytes -= len(part)
            yield part

    # -- Writing -----------------------------------------------------------------------------------

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
        headers |= self._connection_headers()
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)
        return self.wfile.getvalue()

    def _connection_headers(self) -> dict[str, str]:
        """A pool that knows the time does not reuse a connection that is about to close."""
        must_close = self._is_unread or self.is_stopped or self.server.draining
        if self.close_connection or must_close:
            return {"Connection": "close"}
        timeout = f"timeout={self.server.settings.keep_alive_s}"
        return {"Connection": "keep-alive", "Keep-Alive": timeout}

    def _write(self, data: bytes) -> None:
        """Prevents: a client that does not read its answer holds a thread. Raises
        ClientGoneError."""
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
        if not allowed:
            return {}
        if origin not in allowed and not (origin and "*" in allowed):
            return {"Vary": "Origin"}
        own = {"Vary": "Origin", "Access-Control-Allow-Origin": origin}
        own["Access-Control-Expose-Headers"] = ", ".join(headers)
        if self.command == "OPTIONS":
            own |= self._preflight_headers(headers.get("Allow", ""))
        return own

    def _preflight_headers(self, methods: str) -> dict[str, str]:
        asked = self._field("access-control-request-headers")
        own = {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": asked or "Authorization, Content-Type",
            "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
        }
        if self._field("access-control-request-private-network") == "true":  # a page from outside
            own["Access-Control-Allow-Private-Network"] = "true"
        return own

    def _request_id(self) -> str:
        """The client's, if it is printable and short."""
        if not re.fullmatch(r"[\x21-\x7e]{1,128}", self._field("x-request-id")):
            del self.headers["x-request-id"]
            self.headers["x-request-id"] = uuid.uuid4().hex
        return self._field("x-request-id")

    def _milliseconds(self) -> dict[str, float]:
        call = self._call
        seconds = {"queue": call.queue_s, "tokenise": call.tokenise_s}
        seconds |= {"inference": call.inference_s, "total": call.seconds}
        return {name: round(value * 1000, 1) for name, value in seconds.items()}

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """With each answer: one line in the log, and the metrics. Prevents: lines on stderr."""
        application, call, status = self.server.application, self._call, int(code)
        route = self.path if self.path in application.routes else "other"
        application.metrics("requests", route, str(status)).inc()
        application.metrics("request_seconds", route).observe(call.seconds)
        fields: dict[str, Any] = {"id": self._request_id(), "method": self.command or "?"}
        fields |= {"path": self.path[:200], "status": status}
        fields |= {"pairs": call.n_pairs, "tokens": call.n_tokens}
        fields |= {f"{name}_ms": value for name, value in self._milliseconds().items()}
        if self.server.settings.log_texts and call.request is not None:
            fields |= {"queries": call.request.queries, "passages": call.request.passages}
        shown = f"{fields['method']} {fields['path']} {status}"
        log.info("%s", shown, extra={"fields": fields})


def _unauthorized() -> HttpError:
    must = "the Authorization header must be: Bearer KEY, with a key of this server"
    return HttpError(must, 401, {"WWW-Authenticate": "Bearer"})


def _answer_options(allowed: str, raw: bytes, call: Call) -> Response:
    return Response(204, None, {"Allow": allowed})


def _payload(response: Response) -> bytes:
    if response.status == http.HTTPStatus.NO_CONTENT:
        return b""
    if isinstance(response.body, str):
        return response.body.encode("utf-8", "replace")
    return (json.dumps(response.body, ensure_ascii=False) + "\n").encode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# Start, check, stop
# ---------------------------------------------------------------------------------------------------------------------


def start_report(roles: Roles, settings: Settings, address: str) -> str:
    """What a person wants to know before the first request: files, limits, address, and a line to try."""
    lines = [f"rerank-server {__version__} (llama-cpp-python {llama_cpp.__version__})", ""]
    lines += _role_lines("use_llm false", roles.m3, settings)
    if roles.is_fallback:
        lines += ["    no m3 file found, so the small English model serves this role", _better("m3")]
    if roles.gemma:
        lines += _role_lines("use_llm true ", roles.gemma, settings)
        lines += ["    loaded on first use"]
    else:
        lines += ["  use_llm true   no model: answers 503", _better("gemma")]
    example = '{"query": "capital of France?", "passages": ["Paris is the capital of France.", "I like cheese."]}'
    lines += [
        "", f"  {settings.tuning}",
        f"  pairs of at most {settings.max_length} tokens, bodies of at most {settings.max_body_mb} MB",
        f"  listening on {address}", "", "  open it in a browser, or try it here:",
        f"  curl -s {address}/rerank -H 'Content-Type: application/json' -d '{example}'", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _role_lines(title: str, role: Role, settings: Settings) -> list[str]:
    model = role.description
    lines = [
        f"  {title}  {os.path.relpath(model.path)}",
        f"    {model.kind}, {model.architecture}, {model.quantization}, {model.file_bytes / 1e6:,.0f} MB, "
        f"at most {model.max_length(settings):,} tokens",
    ]
    if role.calibration != Calibration():
        lines.append(f"    calibrated: sigmoid({role.calibration.scale:.4g} x logit {role.calibration.bias:+.4g})")
    return lines + [f"    set right while loading: {key} = {_FIXED_VALUES[key]}" for key in model.fixes]


def _better(name: str) -> str:
    return f"    to get {name}: {MODEL_COMMANDS[name]}"


def serve(settings: Settings) -> int:
    """Runs until SIGTERM or Ctrl-C. Returns the exit status."""
    stop = StopSignals()
    _allow_files(settings.max_connections)
    _bound_heaps()
    roles = Roles.find(settings)
    try:
        server = RerankServer(Application(roles, settings), settings)
    except OSError as error:
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    host, port = server.server_address[0], server.server_address[1]
    scheme = "https" if server.tls_context else "http"
    host = f"[{host!s}]" if ":" in str(host) else {"0.0.0.0": "127.0.0.1"}.get(str(host), str(host))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="accept", daemon=True).start()
    loading = roles.m3.start()  # those who ask meanwhile wait for it, and GET /ready says 503
    loading.add_done_callback(lambda _: stop.wake())
    if not stop.wait():
        loading.result()
        print(start_report(roles, settings, f"{scheme}://{host}:{port}"), flush=True)
        stop.wait()
    log.info("stopping: requests in flight are answered first (at most %d s)", settings.drain_s)
    if not server.drain(settings.drain_s):
        log.warning("some requests were not done within %d s", settings.drain_s)
        os._exit(0)  # their threads hold the models
    if not all(role.close(HUNG_ENGINE_S) for role in roles.all()):
        os._exit(0)  # an engine that does not come back
    log.info("stopped")
    return 0


class StopSignals:
    """SIGTERM and SIGINT. The kernel may give them to any thread (one that is just being started, say), and that does
    not wake a main thread which waits for a lock. So the main thread reads what the C handler writes, in any thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # set_wakeup_fd asks for it
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # or they would end the process

    def wait(self) -> bool:
        """Until a signal came (True), or somebody woke it."""
        return self._reader.recv(1) != _WAKE

    def wake(self) -> None:
        """Any thread."""
        self._writer.send(_WAKE)


_WAKE = b"\0"  # no signal has this number


def _allow_files(max_connections: int) -> None:
    """Raises SettingsError when this process may not open that many connections, and what else it needs."""
    needed = max_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SettingsError(f"--max-connections {max_connections} needs {needed} open files: `ulimit -Hn` says {hard}")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _bound_heaps() -> None:
    """glibc gives its threads up to eight heaps for each core, and what was freed in one is of no use to another: under
    64 clients 110 MB became 174 in 80 s, and with two heaps 117. Python's threads allocate in turns anyway."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


_M_ARENA_MAX = -8  # malloc.h


def check(path: Path, pairs: str | None, settings: Settings) -> int:
    """--check: opens a file as the server would and says what it is; with pairs, scores them (one JSON line each)."""
    engine = load_engine(path, settings)
    try:
        if pairs is not None:
            with contextlib.nullcontext(sys.stdin) if pairs == "-" else Path(pairs).open(encoding="utf-8") as lines:
                return _score_lines(engine, lines)
        print(f"{path}: good\n" + "\n".join(_check_lines(engine)))
        return 0
    finally:
        engine.close()


def _check_lines(engine: LlamaEngine) -> Iterator[str]:
    model = engine.description
    yield f"  {model.kind}, {model.architecture}, {model.quantization}, {model.file_bytes / 1e6:,.0f} MB"
    yield f"  source {model.source or 'unknown'}, at most {model.max_tokens:,} tokens"
    for key in model.fixes:
        yield f"  set right while loading: {key} = {_FIXED_VALUES[key]}"
    passages = ["Paris is the capital of France.", "I like cheese."]
    logits = engine.score(engine.pairs.make("What is the capital of France?", passages))
    for passage, logit in zip(passages, logits, strict=True):
        yield f"  'What is the capital of France?' / {passage!r}: {sigmoid(logit):.4f}"


def _score_lines(engine: LlamaEngine, lines: Iterable[str]) -> int:
    pairs: list[Pair] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            body = parse_json_object(line.encode("utf-8", "surrogatepass"))
            query, passage = _text(body.get("query"), "query", body), _text(body.get("passage"), "passage", body)
        except BadRequestError as error:
            raise ModelError(f"--pairs, line {number}: {error.message}") from None
        pairs += engine.pairs.make(query, [passage], body.get("max_length"))
    started = time.perf_counter()
    logits = engine.score(pairs)
    seconds = time.perf_counter() - started
    for pair, logit in zip(pairs, logits, strict=True):
        print(json.dumps({"ids": pair.ids, "passage_start": pair.passage_start, "truncated": pair.truncated,
                          "logit": logit, "score": sigmoid(logit)}))  # fmt: skip
    print(json.dumps({"summary": {
        "kind": engine.kind, "quantization": engine.description.quantization, "n_pairs": len(pairs),
        "n_tokens": sum(len(pair.ids) for pair in pairs), "seconds": seconds, "rss_bytes": resident_bytes(),
    }}))  # fmt: skip
    return 0


def resident_bytes() -> int:
    """Resident memory of this process (Linux; elsewhere 0)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


class LogFormatter(logging.Formatter):
    """A record, and the `fields` that it brings, in one line: text (name=value) or JSON."""

    def __init__(self, kind: str) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._is_json = kind == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        if not self._is_json:
            values = (json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else value
                      for value in fields.values())  # fmt: skip
            named = zip(fields, values, strict=True)
            return " ".join([super().format(record), *(f"{k}={v}" for k, v in named if k not in _IN_MESSAGE)])
        time_utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        text = record.getMessage() + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")
        return json.dumps({"time": time_utc, "level": record.levelname.lower(), "message": text, **fields})


_IN_MESSAGE = ("method", "path", "status")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 stopped as asked, 1 a model cannot be served, 2 a setting is wrong."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments = settings_parser().parse_args(argv)
    try:
        settings = read_settings(arguments, dict(os.environ))
        logging.getLogger().handlers[0].setFormatter(LogFormatter(settings.log_format))
        return check(arguments.check, arguments.pairs, settings) if arguments.check else serve(settings)
    except (SettingsError, ModelError, EngineError, OSError) as error:
        print(f"rerank_server.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


if __name__ == "__main__":
    sys.exit(main())
