"""python docs/openapi.py [--check]: web/openapi.json and web/docs.html, from the server's tables.

What exists is read from rerank_server: ENDPOINTS, FIELDS with their readers, CONTRACTS, the keys of
texts, the errors. What each is for stands here, once; an entry that is missing or left over is an
error. --check writes nothing: exit status 1 where the committed files are others.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rerank_server as server  # noqa: E402

Schema = dict[str, Any]

FIELD_HELP = {
    "model": "m3, gemma, mini, a file's name or a Hub name; any other gets the default",
    "use_llm": "score with the gemma role",
    "llm_top_n": "with use_llm: m3 scores all, gemma only the best so many, which rank first",
    "k": "the same as top_n",
    "top_k": "the same as top_n",
    "top_n": "how many results to return; all when it is larger",
    "return_documents": "put the text into each result",
    "return_text": "the same as return_documents",
    "raw_scores": "logits in place of scores between 0 and 1",
    "min_score": "leave out results below (a logit with raw_scores)",
    "ids": "an id for each document, returned with its result",
    "instruction": "what the query is after, for a model whose prompt has a place for it; else 400",
    "truncate_prompt_tokens": "the same as max_length; 0 or -1: the server's",
    "max_length": "longest pair in tokens, at most the server's",
    "max_tokens_per_query": "tokens of the query that are read; 0 or -1: no limit",
    "max_tokens_per_doc": "tokens of each document that are read; 0 or -1: no limit",
    "max_chunks_per_doc": "windows of a long document that are scored; sets on_overflow chunk",
    "overlap_tokens": "tokens that two windows share; sets on_overflow chunk",
    "truncate": "false: refuse texts that are too long",
    "truncation": "false: refuse texts that are too long",
    "on_overflow": "a document that is too long is cut (truncate), refused (error), or scored in "
                   "overlapping windows of which the best counts (chunk)",
    "truncation_direction": "the end of a document that is cut",
    "truncation_side": "the end of a document that is cut",
    "timeout": "seconds after which the answer is 504 and the rest is not scored",
}  # fmt: skip
RANK_FIELDS = "names of the keys of an object whose texts count, joined by line ends (Cohere v1)"

CONTRACT_HELP = {
    "native": "an array of floats, in the passages' order",
    "jina": "Cohere v1 and v2, Jina, and their kin: Open WebUI, Dify, LiteLLM",
    "tei": "text-embeddings-inference: LlamaIndex, Haystack, Dify, RAGFlow",
    "voyage": "Voyage: known by its top_k or truncation, without top_n",
    "score": "vLLM: one query for all texts, or one for each",
    "nvidia": "NVIDIA's NIM, which asks /v1/ranking: a query that is an object",
    "weaviate": "Weaviate's reranker module: known by its property",
    "dashscope": "DashScope: texts in input, fields in parameters",
    "khoj": "khoj: a native body in inputs",
}
_QUERY = "How long do cats sleep in a day?"
_TEXTS = ["Cats sleep between 12 and 16 hours a day.", "The stock market closed lower."]
_JINA = {"query": _QUERY, "documents": _TEXTS}
EXAMPLES: dict[str, tuple[Schema, ...]] = {
    "native": ({"query": _QUERY, "passages": _TEXTS, "use_llm": False},),
    "jina": ({**_JINA, "model": "m3", "top_n": 2, "return_documents": True},
             {**_JINA, "use_llm": True, "llm_top_n": 1}),
    "tei": ({"query": _QUERY, "texts": _TEXTS, "return_text": True, "truncate": True},),
    "voyage": ({**_JINA, "model": "m3", "top_k": 2},),
    "score": ({"text_1": _QUERY, "text_2": _TEXTS},),
    "nvidia": ({"query": {"text": _QUERY}, "passages": [{"text": text} for text in _TEXTS]},),
    "weaviate": ({**_JINA, "property": "content"},),
    "dashscope": ({"model": "m3", "input": _JINA, "parameters": {"top_n": 1}},),
    "khoj": ({"inputs": {"query": _QUERY, "passages": _TEXTS}},),
}  # fmt: skip

# Clients append their own path to a base URL: these are the usual ones of each endpoint.
PATHS = {server.RERANK: ("/rerank", "/v1/rerank", "/v2/rerank"),
         server.SCORE: ("/score", "/v1/score")}  # fmt: skip

STATUS_HELP = {
    400: "a field is wrong; the message names it", 401: "the key is missing or wrong",
    404: "no such model", 408: "it took too long to arrive", 411: "no Content-Length",
    413: "the body is too large", 414: "the request line is too long",
    415: "the body is compressed", 417: "an unknown expectation",
    429: "as many tokens wait as may: see Retry-After", 431: "the header is too large",
    500: "a pair could not be scored", 501: "an unknown transfer coding",
    503: "no model for this role, no room, or the server is stopping",
    504: "the request's time is over", 505: "not HTTP/1",
}  # fmt: skip
HEADER_HELP = {
    "X-Rerank-Model": "the files that scored",
    "X-Rerank-Truncated": "the passages that were cut: 0-4,9 or count=N",
    "X-Request-Id": "the client's own, or one made here",
    "Server-Timing": "queue, tokenise, inference and total, in milliseconds",
}

# -- Schemas ---------------------------------------------------------------------------------------


def _object(required: Sequence[str] | None = None, /, **properties: Any) -> Schema:
    """All properties are required, unless `required` names those that are."""
    names = list(properties if required is None else required)
    return {"type": "object", "properties": properties, "required": names}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


_NUMBER, _STRING, _INTEGER = {"type": "number"}, {"type": "string"}, {"type": "integer"}
_NULL, _OBJECT, _BOOLEAN = {"type": "null"}, {"type": "object"}, {"type": "boolean"}


def _text_object() -> Schema:
    """An object that stands for a text: the first of TEXT_KEYS that it has, and is not null."""
    kinds, before = [], dict[str, Schema]()
    for key in server.TEXT_KEYS:
        kinds.append(_object([key], **before, **{key: _STRING}))
        before[key] = _NULL
    return _any(*kinds)


_PARTS = {**_list(_text_object()), "minItems": 1}
_TEXT = {"$ref": "#/components/schemas/text"}
_SEVERAL = _any(_STRING, _list(_TEXT))


def _number_schema(number: server.Number) -> Schema:
    limits = {name: int(value) if value == int(value) else value
              for name, value in (("minimum", number.low), ("maximum", number.high))
              if abs(value) < sys.float_info.max}  # fmt: skip
    kinds: list[Schema] = [{"type": "integer" if number.kind is int else "number", **limits}]
    kinds += [{"enum": list(number.unlimited)}] if number.unlimited else []
    return _any(*kinds, {"type": "string", "pattern": _digits(number)})


def _digits(number: server.Number) -> str:
    """Numbers that are strings: those of as many digits as are in the range whatever they are."""
    fits = [n for n in range(1, 10) if number.low <= 10 ** (n - 1) and 10**n - 1 <= number.high]
    return f"^[1-9][0-9]{{{fits[0] - 1},{fits[-1] - 1}}}$"


def _choice_schema(choice: server.Choice) -> Schema:
    words = ("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in choice.meanings)
    of_words = {"type": "string", "pattern": f"^({'|'.join(words)})$"}
    return _any(_BOOLEAN, of_words) if "true" in choice.meanings else of_words


_READERS: dict[Callable[[Any, str], Any], Schema] = {
    server.read_string: _STRING, server._text_of: _TEXT,
    server.read_ids: _list({"type": ["string", "integer"]}),
}  # fmt: skip


def field_schema(field: server.Field) -> Schema:
    """What its reader takes, or null. Raises KeyError for a reader that is not known here."""
    if isinstance(field.read, server.Number):
        schema = _number_schema(field.read)
    elif isinstance(field.read, server.Choice):
        schema = _choice_schema(field.read)
    else:
        schema = _READERS[field.read]
    return _any(*schema.get("anyOf", [schema]), _NULL)


def field_schemas() -> dict[str, Schema]:
    """field_NAME -> what it may hold."""
    found = {f"field_{field.name}": field_schema(field) for field in server.FIELDS}
    return {**found, "field_rank_fields": _any(_list(_STRING), _NULL)}


def _optional(contract: str) -> dict[str, Schema]:
    known = {one.name: FIELD_HELP[one.name] for one in server.FIELDS
             if not one.contracts or contract in one.contracts}  # fmt: skip
    return {
        name: {"$ref": f"#/components/schemas/field_{name}", "description": text}
        for name, text in {**known, "rank_fields": RANK_FIELDS}.items()
    }


def _also(schema: Schema, names: Sequence[str], name: str) -> Schema:
    others = ", ".join(other for other in names if other != name)
    return {**_any(schema), "description": f"other servers' words for it are read too: {others}"}


_JINA_KEYS = [key for key in server.PASSAGE_KEYS if key not in ("texts", "passages")]
_DOCUMENTS = {"query": _also(_TEXT, server.QUERY_KEYS, "query"),
              "documents": _also(_list(_TEXT), _JINA_KEYS, "documents")}  # fmt: skip
_NATIVE = {"query": _any(_STRING, _PARTS), "passages": _list(_TEXT)}
_TEXTS_OF: dict[str, dict[str, Schema]] = {
    "native": _NATIVE, "jina": _DOCUMENTS, "voyage": _DOCUMENTS,
    "tei": {"query": _TEXT, "texts": _list(_TEXT)},
    "nvidia": {"query": _text_object(), "passages": _list(_TEXT)},
    "weaviate": {**_DOCUMENTS, "property": {}},
}  # fmt: skip


def request_schema(contract: str) -> Schema:
    optional = _optional(contract)
    about = {"description": CONTRACT_HELP[contract], "examples": list(EXAMPLES[contract])}
    if contract == "score":
        forms = (("text_1", "text_2"), ("queries", "documents"))
        texts = (_object(**dict.fromkeys(form, _SEVERAL)) for form in forms)
        return {**_object([], **optional), **_any(*texts), **about}
    if contract == "dashscope":
        texts_in = _object(["query", "documents"], **_DOCUMENTS)
        fields = _any(_object([], **optional), _NULL)
        return {**_object(["input"], input=texts_in, parameters=fields, **optional), **about}
    if contract == "khoj":
        return {**_object(["inputs"], inputs=_object(**_NATIVE), **optional), **about}
    texts_of = _TEXTS_OF[contract]
    return {**_object(list(texts_of), **texts_of, **optional), **about}


def _results(score: str, **document: Schema) -> Schema:
    optional = {"model": _STRING, "id": {}, "truncated": _BOOLEAN, **document}
    return _list(_object(["index", score, "model"], index=_INTEGER, **{score: _NUMBER}, **optional))


def response_schemas() -> dict[str, Schema]:
    usage = _object(prompt_tokens=_INTEGER, total_tokens=_INTEGER)
    envelope = {"id": _STRING, "object": _STRING, "model": _STRING, "usage": usage}
    meta = _object(
        api_version=_object(version=_STRING), billed_units=_object(search_units=_INTEGER),
        tokens=_object(input_tokens=_INTEGER, output_tokens=_INTEGER))  # fmt: skip
    results = _results("relevance_score", document=_object(text=_STRING))
    of_voyage = _results("relevance_score", document=_STRING)
    floats = _list(_NUMBER)
    return {
        "native": floats,
        "jina": _object(**envelope, results=results, meta=meta),
        "tei": _list(_object(["index", "score"], index=_INTEGER, score=_NUMBER, text=_STRING)),
        "voyage": _object(**envelope, results=results, meta=meta, data=of_voyage),
        "score": _object(**envelope, data=_results("score", object=_STRING, document=_STRING)),
        "nvidia": _object(rankings=_list(_object(index=_INTEGER, logit=_NUMBER))),
        "weaviate": _object(scores=_list(_object(document=_STRING, score=_NUMBER))),
        "dashscope": _object(output=_object(results=results), usage=usage, request_id=_STRING),
        "khoj": _object(scores=floats),
    }


_ERROR = _object(
    error=_any(_STRING, _object(["message", "type", "code"], message=_STRING, type=_STRING,
                                code=_INTEGER, param=_STRING)),
    error_type=_STRING, message=_STRING, detail=_STRING)  # fmt: skip
_JSON, _HTML = "application/json", "text/html"
_INFO = _object(["model_id", "model_type", "max_input_length", "max_client_batch_size"],
                model_id=_STRING, model_type=_object(reranker=_OBJECT), max_input_length=_INTEGER,
                max_client_batch_size=_INTEGER)  # fmt: skip
PAGES: dict[str, tuple[str, str, Schema]] = {  # what it answers, and its media type and schema
    "/": ("a page to try it in a browser; the endpoints for a client that asks for JSON", _HTML,
          _STRING),
    "/health": ("alive, and which file serves which role", _JSON,
                _object(status=_STRING, version=_STRING, models=_OBJECT, accel=_OBJECT)),
    "/ready": ("200 when requests are served, 503 when the server stops", _JSON,
               _object(status=_STRING)),
    "/metrics": ("counters and histograms for Prometheus", "text/plain", _STRING),
    "/info": ("limits, as text-embeddings-inference gives them", _JSON, _INFO),
    "/v1/models": ("the models that are here; /v1/models/NAME: one of them", _JSON,
                   _object(object=_STRING, data=_list(_object(["id"], id=_STRING)))),
    "/openapi.json": ("this document", _JSON, _object(openapi=_STRING, paths=_OBJECT)),
    "/docs": ("this document as a page", _HTML, _STRING),
}  # fmt: skip

# -- The document ----------------------------------------------------------------------------------


def contracts_at(endpoint: str) -> list[str]:
    return [name for name in server.CONTRACTS if (name == "score") == (endpoint == server.SCORE)]


def _examples(contracts: Iterable[str]) -> dict[str, Schema]:
    return {
        f"{name} {number}" if number else name: {"value": value}
        for name in contracts for number, value in enumerate(EXAMPLES[name])
    }  # fmt: skip


def _references(contracts: Iterable[str], kind: str) -> Schema:
    return _any(*({"$ref": f"#/components/schemas/{name}_{kind}"} for name in contracts))


def _errors(codes: Iterable[int]) -> dict[str, Schema]:
    content = {_JSON: {"schema": {"$ref": "#/components/schemas/error"}}}
    return {str(code): {"description": STATUS_HELP[code], "content": content} for code in codes}


def _operation(path: str, method: str, **about: Any) -> dict[str, Schema]:
    return {method: {"operationId": re.sub(r"\W+", "_", f"{method}{path}"), **about}}


def _post(endpoint: str, path: str) -> dict[str, Schema]:
    here = contracts_at(endpoint)
    body = {"schema": _references(here, "request"), "examples": _examples(here)}
    headers = {name: {"description": text, "schema": _STRING} for name, text in HEADER_HELP.items()}
    good = {"description": "OK", "headers": headers,
            "content": {_JSON: {"schema": _references(here, "response")}}}  # fmt: skip
    return _operation(
        path, "post", summary="; ".join(CONTRACT_HELP[name] for name in here),
        requestBody={"required": True, "content": {_JSON: body}},
        responses={"200": good, **_errors(STATUS_HELP)})  # fmt: skip


def _get(path: str) -> dict[str, Schema]:
    summary, kind, schema = PAGES[path]
    content: Schema = {kind: {"schema": schema}}
    if path == "/":
        listed = _object(name=_STRING, version=_STRING, endpoints=_list(_STRING))
        content[_JSON] = {"schema": listed}
    codes = [503] if path == "/ready" else [] if path in server.OPEN_ENDPOINTS else STATUS_HELP
    good = {"description": "OK", "content": content}
    return _operation(path, "get", summary=summary, responses={"200": good, **_errors(codes)})


def document() -> Schema:
    """OpenAPI 3.1. Raises SystemExit where a table of the server has no words here, or the other
    way round."""
    check_words()
    paths = {path: _post(endpoint, path) for endpoint, given in PATHS.items() for path in given}
    schemas = {f"{name}_request": request_schema(name) for name in server.CONTRACTS}
    schemas |= {f"{name}_response": schema for name, schema in response_schemas().items()}
    schemas |= {**field_schemas(), "text": _any(_STRING, _text_object(), _PARTS), "error": _ERROR}
    key = {"type": "http", "scheme": "bearer", "description": "only with --api-key"}
    about = ("Relevance scores of passages. The last segment of a path decides, so these paths may "
             "stand behind any base path. Numbers may be strings of digits.")  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "rerank-server", "version": server.__version__, "description": about},
        "paths": {**paths, **{path: _get(path) for path in PAGES}},
        "components": {"schemas": schemas, "securitySchemes": {"key": key}},
        "security": [{}, {"key": []}],
    }


def _statuses(error: type[server.RequestError]) -> set[int]:
    return {error.status}.union(*map(_statuses, error.__subclasses__()))


def check_words() -> None:
    never_sent = {server.ClientGoneError.status}
    sent = (_statuses(server.RequestError) | set(server.HTTP_ERROR_TYPES)) - never_sent - {405}
    endpoints = {*server.ENDPOINTS, "/"}
    _same("FIELD_HELP", FIELD_HELP, {field.name for field in server.FIELDS})
    _same("CONTRACT_HELP", CONTRACT_HELP, server.CONTRACTS)
    _same("EXAMPLES", EXAMPLES, server.CONTRACTS)
    _same("response_schemas", response_schemas(), server.CONTRACTS)
    _same("PATHS and PAGES", {**PATHS, **PAGES}, endpoints)
    _same("STATUS_HELP", STATUS_HELP, sent | set(STATUS_HELP))


def _same(name: str, words: Mapping[Any, Any], things: Iterable[Any]) -> None:
    wrong = sorted(map(str, set(words) ^ set(things)))
    if wrong:
        raise SystemExit(f"docs/openapi.py: {name} and rerank_server.py differ: {', '.join(wrong)}")


# -- The page --------------------------------------------------------------------------------------

_STYLE = (
    "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    ":root{color-scheme:light dark}td{padding:.2rem 1rem .2rem 0;vertical-align:top}"
    "pre{background:#8882;padding:1rem;overflow:auto}"
)


def _table(rows: Iterable[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return "<table>\n" + "".join(f"<tr>{row}</tr>\n" for row in cells) + "</table>\n"


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _contract_html(name: str) -> str:
    paths = ", ".join(PATHS[server.SCORE if name == "score" else server.RERANK])
    shown = (html.escape(json.dumps(value, indent=2)) for value in EXAMPLES[name])
    examples = "".join(f"<pre>{example}</pre>\n" for example in shown)
    about = f"{html.escape(CONTRACT_HELP[name])}. {_code(f'POST {paths}')}"
    return f"<h3>{name}</h3>\n<p>{about}</p>\n{examples}"


def page() -> str:
    """The same tables as a page that needs no script and no network."""
    pages = _table((_code(f"GET {path}"), html.escape(about[0])) for path, about in PAGES.items())
    contracts = "".join(map(_contract_html, server.CONTRACTS))
    own = {field.name: ", ".join(field.contracts) for field in server.FIELDS}
    helps = {**FIELD_HELP, "rank_fields": RANK_FIELDS}
    fields = _table((_code(name), html.escape(helps[name]), own.get(name, "")) for name in helps)
    keys = "".join(
        f"<p>{what}: {', '.join(map(_code, names))}</p>\n"
        for what, names in (("A query", server.QUERY_KEYS), ("Texts", server.PASSAGE_KEYS),
                            ("The text of an object", server.TEXT_KEYS)))  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en">{_CHARSET}\n<title>rerank-server</title>\n'
        f"<style>{_STYLE}</style>\n<h1>rerank-server {server.__version__}</h1>\n{pages}"
        "<h2>Contracts</h2>\n<p>The last segment of a path decides; what is before it does not "
        f"count.</p>\n{contracts}<h2>Keys</h2>\n{keys}<h2>Optional fields</h2>\n{fields}</html>\n"
    )


_CHARSET = '<meta charset="utf-8">'
_POLICY = '<meta http-equiv="Content-Security-Policy" content="'


def with_policy(page: str) -> str:
    """The page with a policy by which its own script and style run, and nothing that a text brings along or the network
    has (Content Security Policy, level 3). Trusted types: no script can turn a text into HTML."""
    lines = [line for line in page.splitlines(keepends=True) if not line.startswith(_POLICY)]
    page = "".join(lines)
    policy = (
        f"default-src 'none'; script-src {_hashes(page, 'script')}; style-src {_hashes(page, 'style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'")  # fmt: skip
    return page.replace(_CHARSET + "\n", f'{_CHARSET}\n{_POLICY}{policy}">\n', 1)


def _hashes(page: str, element: str) -> str:
    """Of what is inside each such element: the policy's source list."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="docs/openapi.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args(argv)
    made = {"openapi.json": json.dumps(document(), indent=1) + "\n", "docs.html": with_policy(page()),
            "index.html": with_policy((ROOT / "web" / "index.html").read_text(encoding="utf-8"))}  # fmt: skip
    for name, text in made.items():
        path = ROOT / "web" / name
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"{path} is not what the code makes: run make openapi", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
