"""Real clients from PyPI against a real server process: `pip install -e .[clients]` installs them.

The models are tiny and random, so their ranking is arbitrary; it is compared with the native endpoint's scores, whose
correctness is the matter of tests/test_parity.py. Scored pairs are remembered, so the floats are exactly equal.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from conftest import ROOT, Gguf
from guard import needs_module
from server_process import ServerProcess

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched from GitHub at import

QUERY = "How long should dough rest?"
DOCUMENTS = [
    "The dough rests two hours.", "Paris is the capital of France.", "面团应该放多久", "An electric motor", "",
    "Der Teig ruht zwei Stunden.", "x", "Insurance covers damage by fire, storm and water. " * 30,
]  # fmt: skip
KEY = "sesame"


APART = {  # package -> its name on PyPI; they cannot live with the others' versions, or bring very much along
    "litellm": "litellm", "langchain_cohere": "langchain-cohere", "lightrag": "lightrag-hku",
    "langchain_nvidia_ai_endpoints": "langchain-nvidia-ai-endpoints",
}  # fmt: skip


def needs_client(name: str) -> Any:
    package = name.partition(".")[0]
    return needs_module(name, f"pip install {APART[package]}" if package in APART else "make clients")


class Ask(NamedTuple):
    """What a test wants from a client. model: "m3" or "gemma", where a client can say so."""

    url: str
    query: Any = QUERY
    documents: Sequence[str] = DOCUMENTS
    top_n: int | None = None
    model: str = "m3"
    key: str = "none"


Ranked = list[tuple[int, float]]  # index and score, in the client's order


def cohere_v1(ask: Ask) -> Ranked:
    cohere = needs_client("cohere")
    client = cohere.Client(ask.key, base_url=ask.url, max_retries=0)
    answer = client.rerank(model=ask.model, query=ask.query, documents=ask.documents, top_n=ask.top_n,
                           return_documents=True)  # fmt: skip
    assert [result.document.text for result in answer.results] == [ask.documents[r.index] for r in answer.results]
    assert answer.meta.api_version.version == "1"
    return [(result.index, result.relevance_score) for result in answer.results]


def cohere_v2(ask: Ask) -> Ranked:
    cohere = needs_client("cohere")
    client = cohere.ClientV2(ask.key, base_url=ask.url, max_retries=0)
    answer = client.rerank(model=ask.model, query=ask.query, documents=ask.documents, top_n=ask.top_n,
                           max_tokens_per_doc=None)  # fmt: skip
    assert answer.meta.api_version.version == "2"
    return [(result.index, result.relevance_score) for result in answer.results]


def llama_index_tei(ask: Ask) -> Ranked:
    tei = needs_client("llama_index.postprocessor.tei_rerank")
    schema = needs_client("llama_index.core.schema")
    reranker = tei.TextEmbeddingInference(
        base_url=ask.url, top_n=ask.top_n or len(ask.documents), auth_token=f"Bearer {ask.key}"
    )
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text, id_=str(n))) for n, text in enumerate(ask.documents)]
    ranked = reranker.postprocess_nodes(nodes, query_str=ask.query)
    return [(int(node.node.node_id), node.score) for node in ranked]


def haystack_tei(ask: Ask) -> Ranked:
    rankers = needs_client("haystack_integrations.components.rankers.huggingface_api")
    haystack = needs_client("haystack")
    ranker = rankers.HuggingFaceTEIRanker(
        url=ask.url, top_k=ask.top_n or len(ask.documents), max_retries=1,
        token=haystack.utils.Secret.from_token(ask.key),
    )  # fmt: skip
    documents = [haystack.Document(content=text, id=str(index)) for index, text in enumerate(ask.documents)]
    direction = rankers.ranker.TruncationDirection.RIGHT
    ranked = ranker.run(query=ask.query, documents=documents, truncation_direction=direction)["documents"]
    return [(int(document.id), document.score) for document in ranked]


def rerankers_of(provider: str, route: str) -> Callable[[Ask], Ranked]:
    def rank(ask: Ask) -> Ranked:
        rerankers = needs_client("rerankers")
        ranker = rerankers.Reranker(ask.model, model_type=provider, api_key=ask.key, url=f"{ask.url}{route}", verbose=0)
        ranked = ranker.rank(ask.query, list(ask.documents), doc_ids=list(range(len(ask.documents))))
        chosen = ranked.results if ask.top_n is None else ranked.top_k(ask.top_n)
        return [(result.doc_id, result.score) for result in chosen]

    return rank


def infinity(ask: Ask) -> Ranked:
    client_of = needs_client("infinity_client")
    models = needs_client("infinity_client.models")
    rerank = needs_client("infinity_client.api.default.rerank")
    client = client_of.AuthenticatedClient(base_url=ask.url, token=ask.key, raise_on_unexpected_status=True)
    body = models.RerankInput(query=ask.query, documents=list(ask.documents), top_n=ask.top_n, model=ask.model)
    answer = rerank.sync(client=client, body=body)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    return [(result.index, result.relevance_score) for result in answer.results]


def voyage(ask: Ask) -> Ranked:
    voyageai = needs_client("voyageai")
    client = voyageai.Client(api_key=ask.key, base_url=f"{ask.url}/v1")
    answer = client.rerank(ask.query, list(ask.documents), model=ask.model, top_k=ask.top_n)
    assert answer.total_tokens > 0
    return [(result.index, result.relevance_score) for result in answer.results]


def litellm_of(provider: str) -> Callable[[Ask], Ranked]:
    def rank(ask: Ask) -> Ranked:
        litellm = needs_client("litellm")
        answer = litellm.rerank(
            model=f"{provider}/{ask.model}", query=ask.query, documents=list(ask.documents), top_n=ask.top_n,
            api_base=ask.url, api_key=ask.key, max_retries=0,
        )  # fmt: skip
        return [(result["index"], result["relevance_score"]) for result in answer.results]

    return rank


def light_rag_of(function: str, route: str) -> Callable[[Ask], Ranked]:
    def rank(ask: Ask) -> Ranked:
        reranker = getattr(needs_client("lightrag.rerank"), function)
        answer = asyncio.run(reranker(
            query=ask.query, documents=list(ask.documents), top_n=ask.top_n, api_key=ask.key, model=ask.model,
            base_url=f"{ask.url}{route}",
        ))  # fmt: skip
        return [(result["index"], result["relevance_score"]) for result in answer]

    return rank


class Client(NamedTuple):
    """errors: the exception's type, by name, for each status that this client can get. says_why: it carries the message
    of the server. has_model: a request can name one. bad: what the client sends although it is wrong."""

    name: str
    rank: Callable[[Ask], Ranked]
    errors: dict[int, str]
    says_why: bool = True
    has_model: bool = True
    bad: str = "query"


COHERE = {400: "BadRequestError", 401: "UnauthorizedError", 503: "ServiceUnavailableError"}
VOYAGE = {400: "InvalidRequestError", 401: "AuthenticationError", 503: "ServiceUnavailableError"}
LITELLM = {400: "BadRequestError", 401: "AuthenticationError", 503: "ServiceUnavailableError"}
NO_RESULTS = {400: "KeyError", 401: "KeyError", 503: "KeyError"}  # rerankers does not look at the status
CLIENTS = [
    Client("cohere v1", cohere_v1, COHERE),
    Client("cohere v2", cohere_v2, COHERE),
    Client("llama-index TEI", llama_index_tei, {401: "AssertionError"}, False, False),
    Client("haystack TEI", haystack_tei, {400: "RuntimeError", 401: "RuntimeError"}, has_model=False),
    Client("rerankers cohere", rerankers_of("cohere", "/v1/rerank"), NO_RESULTS, False),
    Client("rerankers jina", rerankers_of("jina", "/v1/rerank"), NO_RESULTS, False),
    Client("rerankers voyage", rerankers_of("voyage", "/v1/rerank"), NO_RESULTS, False),
    Client("rerankers TEI", rerankers_of("text-embeddings-inference", "/rerank"),
           dict.fromkeys((400, 401, 503), "TypeError"), False),
    Client("infinity", infinity, dict.fromkeys((400, 401, 503), "UnexpectedStatus")),
    Client("voyage", voyage, VOYAGE),
    Client("litellm cohere", litellm_of("cohere"), LITELLM, bad="top_n"),
    Client("litellm jina", litellm_of("jina_ai"), LITELLM, bad="top_n"),
    Client("litellm vllm", litellm_of("hosted_vllm"), LITELLM, bad="top_n"),
    Client("litellm TEI", litellm_of("huggingface"), {400: "BadRequestError", 401: "AuthenticationError"},
           has_model=False, bad="top_n"),
    # LightRAG tries a refused request twice more, for 12 seconds: what it raises is not looked at.
    Client("LightRAG cohere", light_rag_of("cohere_rerank", "/v1/rerank"), {}),
    Client("LightRAG jina", light_rag_of("jina_rerank", "/v1/rerank"), {}),
    Client("LightRAG aliyun", light_rag_of("ali_rerank", "/api/v1/services/rerank/text-rerank/text-rerank"), {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def locked(gguf_of: Gguf) -> Iterator[str]:
    """URL of a server that wants a key and has no gemma."""
    server = ServerProcess("--m3", gguf_of("xlmr"), "--models", gguf_of("xlmr").parent, "--api-key", KEY)
    yield server.url
    assert server.stop() == 0


for_all = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
for_those_with_a_model = pytest.mark.parametrize(
    "client", [client for client in CLIENTS if client.has_model], ids=lambda client: client.name
)


def native(server: ServerProcess, use_llm: bool = False) -> Ranked:
    """The ranking that the native scores make; the scores are those of this server for any client."""
    status, scores, _ = server.rerank(query=QUERY, passages=DOCUMENTS, use_llm=use_llm)
    assert status == 200
    assert len(set(scores)) == len(DOCUMENTS), "a ranking with ties would prove little"
    return sorted(enumerate(scores), key=lambda pair: -pair[1])


@for_all
def test_a_client_gets_the_ranking(tiny_server: ServerProcess, client: Client) -> None:
    expected = native(tiny_server)
    assert [index for index, _ in expected] != list(range(len(DOCUMENTS)))
    assert client.rank(Ask(tiny_server.url)) == expected


@for_all
def test_a_client_gets_the_best_of_it(tiny_server: ServerProcess, client: Client) -> None:
    assert client.rank(Ask(tiny_server.url, top_n=3)) == native(tiny_server)[:3]
    assert client.rank(Ask(tiny_server.url, top_n=1000)) == native(tiny_server)


@for_all
def test_a_client_may_send_one_document(tiny_server: ServerProcess, client: Client) -> None:
    ((index, score),) = client.rank(Ask(tiny_server.url, documents=DOCUMENTS[:1]))
    assert (index, score) == (0, dict(native(tiny_server))[0])


@for_those_with_a_model
def test_the_models_name_reaches_gemma_from_a_client(tiny_server: ServerProcess, client: Client) -> None:
    expected = native(tiny_server, use_llm=True)
    assert expected != native(tiny_server)
    for name in ("gemma", "BAAI/bge-reranker-v2-gemma"):
        assert client.rank(Ask(tiny_server.url, model=name)) == expected


BAD: dict[str, Any] = {"query": None, "top_n": 0}
CAUSES: dict[int, tuple[dict[str, Any], str]] = {  # what brings it about, and words of the server's message
    401: ({"key": "wrong"}, "Authorization"),
    503: ({"model": "gemma"}, "make convert MODEL=gemma"),
}


@pytest.mark.parametrize(
    ("client", "status"), [(client, status) for client in CLIENTS for status in client.errors],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_a_refusal_is_the_clients_own_exception(locked: str, client: Client, status: int) -> None:
    changes, words = CAUSES.get(status, ({client.bad: BAD[client.bad]}, f"'{client.bad}'"))
    with pytest.raises(Exception) as caught:  # which one is checked below
        client.rank(Ask(locked, key=KEY)._replace(**changes))
    assert type(caught.value).__name__ == client.errors[status]
    if client.says_why:
        assert words in f"{caught.value} {getattr(caught.value, 'http_body', '')}"


@for_all
def test_the_right_key_opens(locked: str, client: Client) -> None:
    assert len(client.rank(Ask(locked, key=KEY))) == len(DOCUMENTS)


def test_fields_of_this_server_reach_it_through_the_clients(tiny_server: ServerProcess) -> None:
    """Two stages: gemma's choice first, each result says which model scored it, and what was cut."""
    cohere = needs_client("cohere")
    fields = {"use_llm": True, "llm_top_n": 2, "max_tokens_per_doc": 100}
    options = {"additional_body_parameters": fields}
    answer = cohere.ClientV2("any", base_url=tiny_server.url).rerank(
        model="m3", query=QUERY, documents=DOCUMENTS, request_options=options
    )
    assert ["gemma" in result.model for result in answer.results] == [True] * 2 + [False] * 6
    assert [result.index for result in answer.results if getattr(result, "truncated", False)] == [7]

    models = needs_client("infinity_client.models")
    body = models.RerankInput(query=QUERY, documents=DOCUMENTS)
    for name, value in fields.items():
        body[name] = value
    rerank = needs_client("infinity_client.api.default.rerank")
    client = needs_client("infinity_client").Client(base_url=tiny_server.url)
    results = rerank.sync(client=client, body=body).results
    assert [result.index for result in results] == [result.index for result in answer.results]
    assert "gemma" in results[0]["model"]


def test_langchain_nvidia_ranks_by_the_logits(tiny_server: ServerProcess, locked: str) -> None:
    """A NIM's clients get logits and no error for their names; a refusal is theirs."""
    nvidia = needs_client("langchain_nvidia_ai_endpoints")
    documents = needs_client("langchain_core.documents")
    texts = [text for text in DOCUMENTS if text]

    def rank(url: str, key: str, **given: Any) -> list[tuple[str, float]]:
        ranker = nvidia.NVIDIARerank(base_url=f"{url}/v1", api_key=key, **given)
        found = ranker.compress_documents([documents.Document(page_content=text) for text in texts], QUERY)
        return [(found.page_content, found.metadata["relevance_score"]) for found in found]

    for name in ("m3", "gemma"):
        expected = [DOCUMENTS[index] for index, _ in native(tiny_server, use_llm=name == "gemma") if DOCUMENTS[index]]
        ranked = rank(tiny_server.url, "any", model=name, top_n=3, truncate="END")
        assert [text for text, _ in ranked] == expected[:3]
        assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    with pytest.raises(Exception, match="Authorization"):
        rank(locked, "wrong", model="m3")


# -- The table of docs/clients.md --------------------------------------------------------------------------------------

HERE = "http://127.0.0.1:8000"
TABLE = re.findall(r"\| `(.+?)`<br>`(.+?)` \|", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"))
MODULES = {  # name in the lines of that table -> module that has it
    "cohere": "cohere", "voyageai": "voyageai", "litellm": "litellm", "Reranker": "rerankers",
    "CohereRerank": "langchain_cohere", "TextEmbeddingInference": "llama_index.postprocessor.tei_rerank",
    "XinferenceRerank": "llama_index.postprocessor.xinference_rerank",
    "JinaRerank": "llama_index.postprocessor.jinaai_rerank",
    "HuggingFaceTEIRanker": "haystack_integrations.components.rankers.huggingface_api",
    "Client": "infinity_client", "RerankInput": "infinity_client.models",
    "rerank": "infinity_client.api.default.rerank",
    "NVIDIARerank": "langchain_nvidia_ai_endpoints", "asyncio": "asyncio", "cohere_rerank": "lightrag.rerank",
    "nodes": "llama_index.core.schema", "docs": "haystack", "pages": "langchain_core.documents",
}  # fmt: skip


def value_of(name: str) -> Any:
    module = needs_client(MODULES[name])
    if name == "nodes":
        return [module.NodeWithScore(node=module.TextNode(text=text)) for text in DOCUMENTS]
    if name == "pages":
        return [module.Document(page_content=text) for text in DOCUMENTS if text]
    if name == "docs":
        return [module.Document(content=text) for text in DOCUMENTS]
    return module if MODULES[name].endswith(name) else getattr(module, name)


@pytest.mark.parametrize(("first", "second"), TABLE)
def test_the_tables_lines_work_as_they_stand(tiny_server: ServerProcess, first: str, second: str) -> None:
    lines = [line.replace(HERE, tiny_server.url) for line in (first, second)]
    assert lines != [first, second], "a line must say where this server is"
    names = set(re.findall(r"(?<![\w.\"])[A-Za-z_]+(?!=)\b", " ".join(lines))) & MODULES.keys()
    space: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS, **{name: value_of(name) for name in names}}
    exec(lines[0], space)
    assert eval(lines[1], space), "no results"
