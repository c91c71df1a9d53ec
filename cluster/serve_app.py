"""A Ray Serve application that answers as rerank_server.py does, from engines on many machines.

    serve run cluster/config.yaml

One request, from socket to floats:

    Serve's proxy -> Ingress -> rerank_server.RerankServer in the ingress's own process (reads, checks, parses, composes
    two stages, writes) -> RemoteRole.score -> a replica of M3 or Gemma: rerank_server.Role.score -> back the same way

So everything that a client can see is written by the single server's code, and a score comes out of the same engine.
The deployments are three because they scale apart: Ingress parses JSON, M3 and Gemma hold one model each. Which replica
takes a request, how many there are, and where they run is Ray Serve's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.requests import Request
from starlette.responses import Response

import rerank_server
from cluster.settings import Values, actor_settings, find_role, settings_of
from rerank_server import (
    BusyError,
    Call,
    ClientGoneError,
    Job,
    ModelError,
    RequestError,
    RerankRequest,
    Role,
    Roles,
    Scored,
    Settings,
    UnavailableError,
    find_roles,
)  # fmt: skip

# A socket's settings belong to Serve's own proxy (http_options), threads are what Ray reserves.
NOT_HERE = ("host", "port", "tls_cert", "tls_key", "threads", "drain_s", "log_format")
MAX_SCORINGS = 3  # of one request, each by another replica, when the replicas die that hold it
MAX_THREADS = 1024  # of an actor; Serve's max_ongoing_requests is lower
HOP_BY_HOP = ("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect")  # RFC 9110, 7.6.1
WRITTEN_BY_THE_PROXY = ("server", "date", "connection")


# -- Between the processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A RequestError on its way between processes: its constructor takes other arguments than pickle would give it."""

    kind: type[RequestError]
    state: dict[str, Any]

    @staticmethod
    def of(error: RequestError) -> Refusal:
        return Refusal(type(error), dict(vars(error)))

    def error(self) -> RequestError:
        error = self.kind.__new__(self.kind, self.state["message"])
        vars(error).update(self.state)
        return error


@dataclass(frozen=True)
class Scores:
    """A replica's answer, and what it measured for the ingress's call."""

    results: list[Scored]
    times: dict[str, float]
    n_pairs: int
    n_tokens: int


# -- Replicas: one engine each -----------------------------------------------------------------------------------------


class Scorer:
    """A replica of M3 or of Gemma: rerank_server's role with its queue, scheduler thread and engine."""

    def __init__(self, name: str, values: Values) -> None:
        """Opens the file that serves the role. Raises ModelError, and Serve says that the deployment is unhealthy."""
        self._role = find_role(name, actor_settings(values, NOT_HERE))
        self._role.start().result()
        self._threads = ThreadPoolExecutor(MAX_THREADS, f"{name}-request")

    async def score(self, request: RerankRequest, indices: Sequence[int], timeout_s: float) -> Scores | Refusal:
        """See Role.score. A request that Serve cancels is given up at its next look at the client."""
        gone = threading.Event()
        call = Call(gone.is_set, timeout_s=timeout_s)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._score, request, indices, call
            )
        finally:
            gone.set()

    def _score(self, request: RerankRequest, indices: Sequence[int], call: Call) -> Scores | Refusal:
        try:
            results = self._role.score(request, indices, call)
        except RequestError as error:
            return Refusal.of(error)
        return Scores(results, call.times, call.n_pairs, call.n_tokens)

    def check_health(self) -> None:
        if not self._role.is_loaded():
            raise ModelError(f"{self._role.name}: the engine is gone")


# -- Ingress: the single server, with roles whose engines are elsewhere ------------------------------------------------


class RemoteRole(Role):
    """A role whose pairs are made and scored by a replica of a deployment. It admits everything: the replica has the
    queue, and Serve's max_queued_requests bounds what waits."""

    def __init__(self, role: Role, settings: Settings, handle: DeploymentHandle[Any]) -> None:
        super().__init__(role.name, role.description, settings)
        self._handle = handle

    def state(self) -> dict[str, Any]:
        return {}

    def admit(self, request: RerankRequest, n: int) -> contextlib.AbstractContextManager[Job]:
        return contextlib.nullcontext(Job(0))

    def is_loaded(self) -> bool:
        return bool(self._handle.running_replicas_populated())

    def score(
        self, request: RerankRequest, indices: Sequence[int], call: Call, job: Job | None = None
    ) -> list[Scored]:
        """See Role.score. Scoring has no effects, so what a dead replica held is asked of another one."""
        if not indices:
            return []
        for _ in range(MAX_SCORINGS):
            try:
                answer = self._ask(_only(request, indices), indices, call)
            except RayActorError:
                continue
            except BackPressureError:
                raise BusyError("as many requests as may wait for the model") from None
            except DeploymentUnavailableError:
                raise UnavailableError(f"no replica for {self.name} could be started; see Serve's log") from None
            if isinstance(answer, Refusal):
                raise answer.error()
            for name, seconds in answer.times.items():
                call.times[name] += seconds
            call.n_pairs, call.n_tokens = call.n_pairs + answer.n_pairs, call.n_tokens + answer.n_tokens
            return answer.results
        raise UnavailableError(f"{MAX_SCORINGS} replicas of the {self.name} role died with this request")

    def _ask(self, request: RerankRequest, indices: Sequence[int], call: Call) -> Scores | Refusal:
        """Raises DeadlineError and ClientGoneError, and then the replica stops too."""
        response = self._handle.score.remote(request, list(indices), call.timeout_s - call.seconds)
        try:
            answer: Scores | Refusal = _result(response, call)
            return answer
        except (rerank_server.DeadlineError, ClientGoneError):
            response.cancel()
            raise


def _only(request: RerankRequest, indices: Sequence[int]) -> RerankRequest:
    """Without the texts that are not asked about; those that are keep their place, which errors name."""
    asked = set(indices)
    passages = (text if index in asked else "" for index, text in enumerate(request.passages))
    return dataclasses.replace(request, passages=tuple(passages))


def _result(response: DeploymentResponse[Any], call: Call) -> Any:
    while True:
        left_s = call.timeout_s - call.seconds
        try:
            return response.result(timeout_s=max(0.0, min(left_s, rerank_server.HANG_UP_POLL_S)))
        except TimeoutError:
            call.check()


class Ingress:
    """Hands each request to a RerankServer of its own, on the loopback interface, and its answer back."""

    def __init__(self, values: Values, m3: DeploymentHandle[Any], gemma: DeploymentHandle[Any] | None) -> None:
        """Raises SettingsError and ModelError."""
        m3.check_health.remote()  # connects the handle, which then knows whether a replica runs (GET /ready)
        settings = settings_of(values, NOT_HERE, host="127.0.0.1", port=0)
        handles = [m3] if gemma is None else [m3, gemma]
        served = zip(find_roles(settings), handles, strict=False)
        roles = Roles(*(RemoteRole(role, settings, handle) for role, handle in served))
        self._server = rerank_server.RerankServer(rerank_server.Application(roles, settings), settings)
        threading.Thread(target=self._server.serve_forever, name="accept", daemon=True).start()
        self._url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._client: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        """Streams the body: the RerankServer's own limits hold, and the rest of a refused one is not read. When the
        client hangs up, Serve cancels this, the connection closes, and the RerankServer drops the request."""
        if self._client is None:  # made here, since it belongs to the loop that it is used in
            self._client = aiohttp.ClientSession(
                auto_decompress=False, timeout=aiohttp.ClientTimeout(), skip_auto_headers=("Accept", "Accept-Encoding",
                "Content-Type", "User-Agent"), connector=aiohttp.TCPConnector(limit=0), raise_for_status=False,
            )  # fmt: skip
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        async with self._client.request(
            request.method, self._url + request.url.path, headers=headers, data=request.stream() if has_body else None,
            allow_redirects=False,
        ) as answer:  # fmt: skip
            body = await answer.read()
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in WRITTEN_BY_THE_PROXY}
        return Response(body, answer.status, kept)


# Defaults; a config's `deployments` overrules them.
INGRESS = serve.deployment(name="Ingress", max_ongoing_requests=256)(Ingress)
SCORER = serve.deployment(max_ongoing_requests=8, max_queued_requests=256)(Scorer)


def app(values: dict[str, Any]) -> serve.Application:
    """The builder that a config names: import_path: cluster.serve_app:app. values: its `args`. Without a file for
    gemma there is no Gemma deployment. Raises SettingsError and ModelError."""
    has_gemma = len(find_roles(settings_of(values, NOT_HERE))) > 1
    gemma = SCORER.options(name="Gemma").bind("gemma", values) if has_gemma else None
    return INGRESS.bind(values, SCORER.options(name="M3").bind("m3", values), gemma)


def __getattr__(name: str) -> Any:
    """`serve build cluster.serve_app:default`: the application with every setting at its default."""
    if name == "default":
        return app({})
    raise AttributeError(name)
