"""Every contract over real sockets: what each family of clients may send, and what it gets back.

The engine is a fake that reads numbers: a passage's logit is the largest number in the part of it that is left after
truncation, so that an answer shows which tokens were seen. Pairs are cut by the server's own code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from golden.inputs import CUT_PAIRS, SCORED_PAIRS
from server_process import ServerProcess
from test_http import FakeEngine, Running, describe_fake, sigmoid

import rerank_server as server

MAX_LENGTH = 64
ROOM = MAX_LENGTH - 5  # tokens of a passage beside a query of one token and four specials
LOGIT_TOLERANCE = 1 / 400  # of the logits' range, as in tests/test_parity.py
NOTHING_READ = -9  # the logit of a passage without a number
LONG = "1 " * (ROOM + 11) + "5"  # 12 tokens too long, and its best number is the last one


def tokenize(text: str) -> list[int]:
    """One token for each word: 1000 + the number that it is, 0 when it is none."""
    return [1000 + int(word) if word.lstrip("-").isdigit() and word.isascii() else 0 for word in text.split()]


class NumberEngine(FakeEngine):
    """A pair's logit is `sign` times the largest number in its passage."""

    def __init__(self, sign: int, name: str) -> None:
        super().__init__()
        self.sign, self.description = sign, describe_fake(name)
        self.pairs = server.Pairs(tokenize, [1], [2], MAX_LENGTH, [2, 2])

    def score(self, pairs: Sequence[server.Pair]) -> list[float]:
        super().score(pairs)
        return [float(self.sign * max(self._numbers(pair), default=NOTHING_READ)) for pair in pairs]

    @staticmethod
    def _numbers(pair: server.Pair) -> list[int]:
        return [token - 1000 for token in pair.ids[pair.passage_start :] if token > 500]


class Served(Running):
    """m3 ranks by the largest number; gemma ranks the other way round."""

    def __init__(self, with_gemma: bool = True, **changes: Any) -> None:
        super().__init__(with_gemma, **changes)
        self.engine = NumberEngine(1, "fake-m3")

    @staticmethod
    def _load_gemma(path: Path, settings: server.Settings, is_alone: bool = False) -> Any:
        return NumberEngine(-1, "fake-gemma")


class Contract(NamedTuple):
    """How a family of clients writes a request, and where it looks for the results."""

    name: str
    route: str
    texts: str = "documents"
    score: str = "relevance_score"
    results: str | None = "results"  # None: the answer is the list
    top: str = "top_n"
    query: str = "query"
    document: str = "document"
    extra: tuple[tuple[str, Any], ...] = ()

    def body(self, texts: Sequence[Any], /, **fields: Any) -> dict[str, Any]:
        return {self.query: "q", self.texts: list(texts), **dict(self.extra), **fields}

    def read(self, answer: Any) -> list[dict[str, Any]]:
        found = answer if self.results is None else answer[self.results]
        return [{"index": n, "score": item} if isinstance(item, float) else item for n, item in enumerate(found)]


NATIVE = Contract("native", "/rerank", "passages", "score", None)
TEI = Contract("tei", "/rerank", "texts", "score", None, document="text")
JINA = Contract("jina", "/v1/rerank")
COHERE_1 = Contract("cohere v1", "/v1/rerank", extra=(("model", "rerank-v3.5"), ("max_chunks_per_doc", None)))
COHERE_2 = Contract("cohere v2", "/v2/rerank", extra=(("model", "rerank-v3.5"),))
VOYAGE = Contract("voyage", "/v1/rerank", results="data", top="top_k", extra=(("truncation", True),))
SCORE = Contract("score", "/score", "text_2", "score", "data", query="text_1")
SORTED = (TEI, JINA, COHERE_1, COHERE_2, VOYAGE)
ALL = (NATIVE, *SORTED, SCORE)
WITH_OBJECTS = (*SORTED, SCORE)  # native takes strings, nothing else, and answers floats

for_all = pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.name)
for_sorted = pytest.mark.parametrize("contract", SORTED, ids=lambda contract: contract.name)
for_objects = pytest.mark.parametrize("contract", WITH_OBJECTS, ids=lambda contract: contract.name)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    fixture = Served()
    yield fixture
    fixture.close()


@pytest.fixture(scope="module")
def without_gemma() -> Iterator[Served]:
    fixture = Served(with_gemma=False, strict_model=True, api_key="sesame")
    yield fixture
    fixture.close()


def send(served: Running, contract: Contract, texts: Sequence[Any], /, **fields: Any) -> tuple[int, Any, Any]:
    return served.request("POST", contract.route, json.dumps(contract.body(texts, **fields)).encode())


def ask(served: Running, contract: Contract, texts: Sequence[Any], /, **fields: Any) -> list[dict[str, Any]]:
    """The results of a request that must succeed."""
    status, answer, _ = send(served, contract, texts, **fields)
    assert status == 200, answer
    return contract.read(answer)


def refusal(served: Running, contract: Contract, texts: Sequence[Any], /, **fields: Any) -> tuple[int, str]:
    """Status and message of a request that must fail, in the contract's own error shape."""
    status, answer, _ = send(served, contract, texts, **fields)
    assert status >= 400, answer
    assert answer["message"] == answer["detail"]
    if contract is TEI:
        assert answer["error"] == answer["message"]
    else:
        assert (answer["error"]["message"], answer["error"]["code"]) == (answer["message"], status)
        assert answer["error"]["type"] == answer["error_type"]
    return status, answer["message"]


def order(results: Sequence[dict[str, Any]]) -> list[int]:
    return [result["index"] for result in results]


def scores(contract: Contract, results: Sequence[dict[str, Any]]) -> list[float]:
    return [result[contract.score] for result in results]


# -- The shapes --------------------------------------------------------------------------------------------------------

LOW, HIGH = sigmoid(-2), sigmoid(3)
M3 = {"model": "fake-m3"}
N_TOKENS = 2 * 6  # <s> q </s> </s> number </s>
USAGE = {"prompt_tokens": N_TOKENS, "total_tokens": N_TOKENS}
BEST_FIRST = [{"index": 1, "relevance_score": HIGH, **M3}, {"index": 0, "relevance_score": LOW, **M3}]


def cohere(version: str) -> dict[str, Any]:
    meta = {"api_version": {"version": version}, "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": N_TOKENS, "output_tokens": 0}}
    return {"object": "rerank", "usage": USAGE, "results": BEST_FIRST, "meta": meta}


SHAPES: dict[Contract, Any] = {
    NATIVE: [LOW, HIGH],
    TEI: [{"index": 1, "score": HIGH}, {"index": 0, "score": LOW}],
    JINA: {**cohere("1"), **M3},
    COHERE_1: {**cohere("1"), "model": "rerank-v3.5"},
    COHERE_2: {**cohere("2"), "model": "rerank-v3.5"},
    VOYAGE: {**cohere("1"), "object": "list", "data": BEST_FIRST, **M3},
    SCORE: {
        "object": "list", **M3, "usage": USAGE,
        "data": [
            {"index": 0, "object": "score", "score": LOW, **M3}, {"index": 1, "object": "score", "score": HIGH, **M3},
        ],
    },
}  # fmt: skip


@for_all
def test_the_answer_has_the_shape_that_the_clients_parse(served: Served, contract: Contract) -> None:
    status, answer, headers = send(served, contract, ["-2", "3"])
    if isinstance(answer, dict) and "id" in SHAPES[contract] | answer:
        assert isinstance(answer.pop("id"), str)
    assert (status, answer) == (200, SHAPES[contract])
    assert headers["X-Rerank-Model"] == "fake-m3"


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking"])
def test_the_keys_of_the_body_choose_the_contract_on_every_route(served: Served, route: str) -> None:
    for contract in (NATIVE, *SORTED):
        assert len(ask(served, contract._replace(route=route), ["-2", "3"])) == 2
    _, answer, _ = send(served, JINA._replace(route=route), ["1"])
    assert answer["meta"]["api_version"]["version"] == ("2" if "v2" in route else "1")


def test_score_pairs_texts_one_by_one_or_one_with_many(served: Served) -> None:
    def scored(**body: Any) -> Any:
        status, answer, _ = served.request("POST", "/v1/score", json.dumps({**body, "raw_scores": True}).encode())
        return [item["score"] for item in answer["data"]] if status == 200 else (status, answer["error"]["param"])

    assert scored(text_1="q", text_2="4") == [4]
    assert scored(text_1="q", text_2=["4", "6"]) == [4, 6]
    assert scored(text_1=["q", "r"], text_2=["4", "6"]) == [4, 6]
    assert scored(queries="q", documents=["4", {"text": "6"}]) == [4, 6]
    assert scored(queries=["q", "r"], documents=["4", "6"]) == [4, 6]
    assert scored(text_1=["q", "r"], text_2=["4"] * 3) == (400, "text_1")
    assert scored(text_1="q") == (400, "text_2")
    assert scored(documents=["4"])[0] == 400
    long_query = " ".join(["word"] * 20)  # beside it the passage's last number is cut off, beside "q" it is not
    assert scored(text_1=[long_query, "q"], text_2=["1 " * 45 + "5"] * 2) == [1, 5]


# -- Order -------------------------------------------------------------------------------------------------------------


@for_all
def test_a_thousand_documents_come_back_best_first_and_ties_in_input_order(served: Served, contract: Contract) -> None:
    values = [index * 7919 % 13 for index in range(1000)]
    results = ask(served, contract, [str(value) for value in values], raw_scores=True)
    best_first = sorted(range(1000), key=lambda index: (-values[index], index))
    assert order(results) == (best_first if contract in SORTED else list(range(1000)))
    assert scores(contract, results) == [values[index] for index in order(results)]


@for_sorted
def test_scores_that_saturate_still_rank_by_their_logits(served: Served, contract: Contract) -> None:
    results = ask(served, contract, ["40", "60", "50", "60"])
    assert scores(contract, results) == [1.0] * 4
    assert order(results) == [1, 3, 2, 0]


# -- Lenience ----------------------------------------------------------------------------------------------------------

OPTIONAL = (
    "model", "use_llm", "llm_top_n", "top_n", "top_k", "return_documents", "return_text", "raw_scores", "min_score",
    "ids", "max_length", "max_tokens_per_doc", "on_overflow", "truncate", "truncation", "truncation_direction",
    "rank_fields",
)  # fmt: skip


@for_all
def test_null_means_not_given(served: Served, contract: Contract) -> None:
    names = set(OPTIONAL) - ({"top_n"} if contract is VOYAGE else set())  # a top_n, even null, is not Voyage's
    given = dict.fromkeys(names - dict(contract.extra).keys())
    assert ask(served, contract, ["1", "3", "2"], **given) == ask(served, contract, ["1", "3", "2"])


@for_all
def test_unknown_fields_are_ignored(served: Served, contract: Contract) -> None:
    unknown = {"user": "me", "priority": 3, "relevant_spans": {"mode": "none"}, "overlap": 8, "": [], "input": {}}
    assert ask(served, contract, ["1", "3"], **unknown) == ask(served, contract, ["1", "3"])


@for_all
def test_booleans_may_be_strings(served: Served, contract: Contract) -> None:
    assert scores(contract, ask(served, contract, ["3"], raw_scores="true")) == [3]
    assert scores(contract, ask(served, contract, ["3"], raw_scores="False")) == [HIGH]
    assert scores(contract, ask(served, contract, ["3"], raw_scores=True, use_llm="True")) == [-3]
    assert refusal(served, contract, ["3"], raw_scores="yes")[0] == 400
    if contract is not NATIVE:
        assert contract.document in ask(served, contract, ["3"], return_documents="true")[0]
        assert contract.document not in ask(served, contract, ["3"], return_documents="false")[0]


@for_sorted
def test_top_n_may_be_larger_than_the_list_but_not_nonsense(served: Served, contract: Contract) -> None:
    texts = ["1", "3", "2"]
    for given, expected in [(2, [1, 2]), (2.0, [1, 2]), (3, [1, 2, 0]), (1000, [1, 2, 0]), (None, [1, 2, 0])]:
        assert order(ask(served, contract, texts, **{contract.top: given})) == expected
    assert order(ask(served, contract, texts, **{contract.top: "2"})) == [1, 2], "some clients send it as a string"
    for wrong in (0, -1, 1.5, "two", True, [2], 10**400):
        status, message = refusal(served, contract, texts, **{contract.top: wrong})
        assert status == 400, wrong
        assert f"'{contract.top}'" in message, wrong


@pytest.mark.parametrize("contract", [NATIVE, SCORE], ids=lambda contract: contract.name)
def test_top_n_and_min_score_take_nothing_from_an_array_in_input_order(served: Served, contract: Contract) -> None:
    assert order(ask(served, contract, ["1", "3"], top_n=1, min_score=0.9)) == [0, 1]


@for_all
def test_an_empty_list_is_an_empty_answer(served: Served, contract: Contract) -> None:
    assert ask(served, contract, [], ids=[], **{contract.top: 3}) == []
    assert ask(served, contract, [], use_llm=True, llm_top_n=2) == []
    assert ask(served, contract, [], **{contract.top: 0}) == [], "some clients send the length of the list"


@for_all
def test_an_empty_document_is_scored_like_any_other(served: Served, contract: Contract) -> None:
    assert ask(served, contract, ["1", "", "3"]) != []
    by_index = {result["index"]: result for result in ask(served, contract, ["1", "", " \n"], raw_scores=True)}
    assert [by_index[index][contract.score] for index in range(3)] == [1, NOTHING_READ, NOTHING_READ]
    assert scores(contract, ask(served, contract, [""], raw_scores=True)) == [NOTHING_READ]


@for_objects
def test_documents_may_be_objects_with_a_text(served: Served, contract: Contract) -> None:
    mixed = [{"text": "1", "title": "9"}, "3", {"text": "2"}]
    assert ask(served, contract, mixed) == ask(served, contract, ["1", "3", "2"])
    results = ask(served, contract, mixed, return_documents=True)
    shown = {result["index"]: result[contract.document] for result in results}
    is_object = contract in (JINA, COHERE_1, COHERE_2)  # their clients read document.text
    texts: list[Any] = ["1", "3", "2"]
    assert shown == dict(enumerate([{"text": text} for text in texts] if is_object else texts)) | (
        {0: mixed[0]} if is_object else {}
    )


def test_rank_fields_name_the_fields_of_a_document_that_count(served: Served) -> None:
    documents = [{"title": "9", "text": "1"}, {"title": "2", "text": "3"}]
    assert order(ask(served, COHERE_1, documents, rank_fields=["title", "text"])) == [0, 1]
    assert order(ask(served, COHERE_1, documents, rank_fields=["text"])) == [1, 0]
    status, message = refusal(served, COHERE_1, documents, rank_fields=["body"])
    assert (status, "documents[0]" in message) == (400, True)


BAD_DOCUMENTS = [3, None, True, ["a"], {"title": "x"}, {"text": 5}, {"text": None}, {}]


@for_all
@pytest.mark.parametrize("bad", BAD_DOCUMENTS, ids=repr)
def test_one_bad_document_is_named_and_nothing_is_scored(served: Served, contract: Contract, bad: Any) -> None:
    before = served.engine.n_scored
    status, message = refusal(served, contract, ["fresh", bad, "ones"])
    assert status == 400
    assert f"{contract.texts}[1]" in message
    assert served.engine.n_scored == before


@for_all
def test_a_missing_or_wrong_query_is_named(served: Served, contract: Contract) -> None:
    for wrong in (None, 3, {"title": "q"}):
        status, message = refusal(served, contract, ["1"], **{contract.query: wrong})
        assert (status, f"'{contract.query}'" in message) == (400, True), wrong


@for_all
def test_texts_that_are_no_list_are_named(served: Served, contract: Contract) -> None:
    for texts in (None, {"0": "1"}, 3, *(() if contract is SCORE else ("1",))):  # /score takes a single text
        status, message = refusal(served, contract, [], **{contract.texts: texts})
        assert (status, f"'{contract.texts}'" in message) == (400, True), texts


UNICODE = ["日本語の文書", "🏳️‍🌈 e\u0301 ﷽", "שלום \u202e עולם", "nul \u0000 tab \t line \n", "\U0010ffff", "नमस्ते 3"]


@for_all
def test_text_in_any_script_comes_back_as_it_was(served: Served, contract: Contract) -> None:
    results = ask(served, contract, UNICODE, return_documents=True, raw_scores=True)
    assert sorted(order(results)) == list(range(len(UNICODE)))
    if contract is not NATIVE:
        for result in results:
            shown = result[contract.document]
            assert (shown["text"] if isinstance(shown, dict) else shown) == UNICODE[result["index"]]
    assert max(scores(contract, results)) == 3


# -- What this server adds ---------------------------------------------------------------------------------------------


@for_objects
def test_ids_are_passed_through(served: Served, contract: Contract) -> None:
    if contract is TEI:
        pytest.skip("its results hold three keys, whatever is asked: test_elastic_is_told_nothing_that_it_refuses")
    ids = ["a", 7, "ключ \U0001f511"]
    for given in (
        ask(served, contract, ["1", "3", "2"], ids=ids),
        ask(served, contract, [{"text": text, "id": id} for text, id in zip(("1", "3", "2"), ids, strict=True)]),
    ):
        assert [result["id"] for result in given] == [ids[result["index"]] for result in given]
    assert all("id" not in result for result in ask(served, contract, ["1", "2"]))


@for_objects
def test_a_document_without_an_id_takes_none_from_the_others(served: Served, contract: Contract) -> None:
    results = ask(served, contract, [{"text": "1", "id": "a"}, "3", {"text": "2", "id": None}])
    if contract is TEI:
        assert all(set(result) == {"index", "score"} for result in results)
        return
    assert {result["index"]: result.get("id") for result in results} == {0: "a", 1: None, 2: None}


@for_all
@pytest.mark.parametrize("ids", [["a"], ["a", "b", "c"], "ab", {"a": 1}, ["a", None], ["a", ["b"]], ["a", True],
                                 ["a", "\ud800"]], ids=repr)  # fmt: skip
def test_wrong_ids_are_refused_before_anything_is_scored(served: Served, contract: Contract, ids: Any) -> None:
    status, message = refusal(served, contract, ["1", "2"], ids=ids)
    assert (status, "'ids" in message) == (400, True)


@for_sorted
def test_min_score_is_a_threshold_on_what_is_returned(served: Served, contract: Contract) -> None:
    texts = ["-1", "0", "3", "1"]
    assert order(ask(served, contract, texts, min_score=0.5)) == [2, 3, 1]
    assert order(ask(served, contract, texts, min_score=0.5, **{contract.top: 2})) == [2, 3]
    assert order(ask(served, contract, texts, min_score=0.5, raw_scores=True)) == [2, 3]
    assert ask(served, contract, texts, min_score=1.1) == []
    for wrong in ("half", True, float("nan"), float("inf"), 10**400):
        assert refusal(served, contract, texts, min_score=wrong)[0] == 400, wrong


@for_all
def test_a_cut_document_is_marked(served: Served, contract: Contract) -> None:
    status, answer, headers = send(served, contract, ["0", LONG, "2", LONG], raw_scores=True, on_overflow="truncate")
    assert (status, headers["X-Rerank-Truncated"]) == (200, "1,3")
    results = contract.read(answer)
    assert {result["index"]: result[contract.score] for result in results} == {0: 0, 1: 1, 2: 2, 3: 1}
    if contract not in (NATIVE, TEI):
        assert {result["index"] for result in results if result.get("truncated")} == {1, 3}
        assert all(result["truncated"] is True for result in results if "truncated" in result)


@for_all
def test_a_document_may_be_limited_to_some_of_its_tokens(served: Served, contract: Contract) -> None:
    for limit, expected in ((1, [1, 5]), (3, [7, 5]), (10_000, [7, 5]), ("1", [1, 5]), (0, [7, 5]), (-1, [7, 5])):
        results = ask(served, contract, ["1 1 7", "5"], max_tokens_per_doc=limit, raw_scores=True)
        assert {result["index"]: result[contract.score] for result in results} == dict(enumerate(expected)), limit
    for wrong in (-2, 1.5, "3 words"):
        assert refusal(served, contract, ["1"], max_tokens_per_doc=wrong)[0] == 400, wrong


@for_all
def test_a_request_may_shorten_its_pairs_but_not_lengthen_them(served: Served, contract: Contract) -> None:
    passage = "1 " * 27 + "5"  # one token more than beside the query in a pair of 32
    for max_length, expected in ((32, 1), (33, 5), (8192, 5)):
        assert scores(contract, ask(served, contract, [passage], max_length=max_length, raw_scores=True)) == [expected]
    assert scores(contract, ask(served, contract, [LONG], max_length=8192, raw_scores=True)) == [1]
    for wrong in (31, 8193, "long"):
        assert refusal(served, contract, ["1"], max_length=wrong)[0] == 400, wrong


@for_all
def test_a_document_that_is_too_long_is_refused_when_asked_for(served: Served, contract: Contract) -> None:
    status, message = refusal(served, contract, ["3", LONG], on_overflow="error")
    assert status == 400
    assert f"{contract.texts}[1]" in message
    assert "12 tokens" in message
    own = ask(served, contract, ["3", "4"], on_overflow="error")
    assert scores(contract, own) == scores(contract, ask(served, contract, ["3", "4"]))
    assert refusal(served, contract, ["3"], on_overflow="explode")[0] == 400


@for_all
def test_chunks_score_the_best_window_of_the_whole_document(served: Served, contract: Contract) -> None:
    status, answer, headers = send(served, contract, ["3", LONG, "1 " * 500 + "4 " + "1 " * 500], on_overflow="chunk",
                                   raw_scores=True)  # fmt: skip
    assert (status, headers["X-Rerank-Truncated"]) == (200, None)
    results = contract.read(answer)
    assert {result["index"]: result[contract.score] for result in results} == {0: 3, 1: 5, 2: 4}
    assert not any("truncated" in result for result in results)


@for_all
def test_chunks_stay_within_the_tokens_of_a_document_that_may_be_read(served: Served, contract: Contract) -> None:
    results = ask(served, contract, ["1 " * 200 + "5"], on_overflow="chunk", max_tokens_per_doc=100, raw_scores=True)
    assert scores(contract, results) == [1]


def test_tei_and_voyage_say_in_their_own_words_that_nothing_may_be_cut(served: Served) -> None:
    assert refusal(served, TEI, ["3", LONG], truncate=False)[0] == 400
    assert refusal(served, VOYAGE, ["3", LONG], truncation=False)[0] == 400
    assert scores(TEI, ask(served, TEI, [LONG], raw_scores=True, truncate=True)) == [1]
    assert scores(TEI, ask(served, TEI, [LONG], raw_scores=True, truncation_direction="Right")) == [1]
    assert scores(TEI, ask(served, TEI, [LONG], raw_scores=True, truncation_direction="Left")) == [5]
    assert refusal(served, TEI, ["3"], truncation_direction="Up")[0] == 400
    assert ask(served, TEI, ["3"], return_text="true")[0]["text"] == "3"


@pytest.mark.parametrize("use_llm", [False, True], ids=["m3", "gemma"])
def test_a_shortened_pair_has_the_references_logit_and_its_token_count(
    tiny_server: ServerProcess, golden: dict[str, Any], use_llm: bool
) -> None:
    """The models' own: golden logits of pairs cut at several lengths, and golden ids to count."""
    own = golden["gemma" if use_llm else "xlmr"]
    spread = max(own["logits"]) - min(own["logits"])
    for pair, logit in zip(SCORED_PAIRS, own["logits"], strict=True):
        if pair.max_length > 1024:
            continue  # slow, and tests/test_parity.py has it
        body = {"query": pair.query, "documents": [pair.passage], "max_length": pair.max_length, "raw_scores": True}
        status, answer, _ = tiny_server.rerank("/v2/rerank", **body, use_llm=use_llm)
        assert status == 200
        assert answer["results"][0]["relevance_score"] == pytest.approx(logit, abs=LOGIT_TOLERANCE * spread)
    for name, (query, passage) in CUT_PAIRS.items():
        ids = own["pairs"][name]["64"]
        body = {"query": query, "texts": [passage], "documents": [passage], "max_length": 64}
        _, answer, _ = tiny_server.rerank("/score", text_1=query, text_2=passage, max_length=64, use_llm=use_llm)
        assert answer["usage"]["total_tokens"] == (ids["n"] if isinstance(ids, dict) else len(ids)), name


def test_gemmas_prompt_is_whole_around_every_part_of_a_passage() -> None:
    """Whichever tokens of the passage are read, "B: " stands before them, as in every prompt it was trained on."""
    parts = server.PromptParts("1", "2 ", "3", "4 4")
    pairs = server.PromptPairs(tokenize, tokenize, [9], parts, 40)
    passage = " ".join(str(number) for number in range(100, 200))
    windows = pairs.windows("7", passage)
    changes: list[dict[str, Any]] = [{}, {"keep_end": True}, {"max_passage": 5}]
    cut = [pairs.make("7", [passage], server.Cut(**changed))[0] for changed in changes]
    for pair in (*windows, *cut):
        assert tuple(pair.ids[:4]) == (9, 1017, 1003, 1002), "the query's part, the separator, the passage's prefix"
        assert tuple(pair.ids[-3:]) == (1003, 1004, 1004)
    read = {token - 1000 for pair in windows for token in pair.ids}
    assert read >= set(range(100, 200)), "windows hold all of the passage"
    assert cut[1].ids[-4] == 1199, "the end was kept"


# -- Models ------------------------------------------------------------------------------------------------------------


@for_all
def test_two_stages_rank_the_second_models_choice_above_the_rest(served: Served, contract: Contract) -> None:
    """m3 takes the 5 and the 4; gemma, which likes small numbers, puts the 4 before the 5; then m3's order goes on."""
    status, answer, headers = send(served, contract, ["1", "5", "3", "4", "2"], use_llm=True, llm_top_n=2)
    assert (status, set(headers["X-Rerank-Model"].split(","))) == (200, {"fake-m3", "fake-gemma"})
    results = contract.read(answer)
    if contract is SCORE:
        assert order(results) == [0, 1, 2, 3, 4]
    else:
        by_score = sorted(results, key=lambda result: -result[contract.score]) if contract is NATIVE else results
        assert order(by_score) == [3, 1, 2, 4, 0]
    if contract not in (NATIVE, TEI):
        models = {result["index"]: result["model"] for result in results}
        assert models == {index: "fake-gemma" if index in (1, 3) else "fake-m3" for index in range(5)}


def test_two_stages_in_the_native_array_scale_the_rest_below_the_second_stage(served: Served) -> None:
    answer = ask(served, NATIVE, ["1", "5", "3"], use_llm=True, llm_top_n=1)
    lowest = sigmoid(-5)
    expected = [lowest * sigmoid(1), lowest, lowest * sigmoid(3)]
    assert [result["score"] for result in answer] == pytest.approx(expected)


@for_all
def test_the_second_stage_may_take_everything(served: Served, contract: Contract) -> None:
    for n in (3, 1000):
        assert ask(served, contract, ["1", "3", "2"], use_llm=True, llm_top_n=n) == ask(
            served, contract, ["1", "3", "2"], use_llm=True
        )
    for wrong in (0, -1, "all"):
        assert refusal(served, contract, ["1"], use_llm=True, llm_top_n=wrong)[0] == 400, wrong
    alone = ask(served, contract, ["1", "3"], llm_top_n=1)
    assert scores(contract, alone) == scores(contract, ask(served, contract, ["1", "3"])), "without use_llm"


MODELS = [("m3", 1), ("bge-reranker-v2-m3", 1), ("BAAI/bge-reranker-v2-m3", 1), ("fake-m3", 1), ("gemma", -1),
          ("bge-reranker-v2-gemma", -1), ("BAAI/bge-reranker-v2-gemma", -1), ("fake-gemma", -1),
          ("rerank-v3.5", 1)]  # fmt: skip


@for_all
@pytest.mark.parametrize(("model", "sign"), MODELS)
def test_the_models_name_selects_the_role(served: Served, contract: Contract, model: str, sign: int) -> None:
    status, answer, headers = send(served, contract, ["3"], model=model, raw_scores=True)
    assert (status, scores(contract, contract.read(answer))) == (200, [3 * sign])
    assert headers["X-Rerank-Model"] == ("fake-m3" if sign == 1 else "fake-gemma")
    if isinstance(answer, dict):
        assert answer["model"] == model, "the client's own name for it is echoed"


@for_all
def test_an_unknown_model_is_not_found_when_the_server_is_strict(without_gemma: Served, contract: Contract) -> None:
    def sent(model: str) -> tuple[int, Any]:
        body = json.dumps(contract.body(["3"], model=model)).encode()
        return without_gemma.request("POST", contract.route, body, Authorization="Bearer sesame")[:2]

    status, answer = sent("rerank-v9")
    assert (status, answer["error_type"]) == (404, "model_not_found")
    assert "rerank-v9" in answer["message"]
    assert sent("BAAI/bge-reranker-v2-m3")[0] == 200
    status, answer = sent("gemma")
    assert (status, answer["error_type"]) == (503, "model_unavailable")
    assert "make convert MODEL=gemma" in answer["message"]


@for_all
def test_the_key_is_asked_for_when_there_is_one(without_gemma: Served, contract: Contract) -> None:
    body = json.dumps({**contract.body(["3"]), "model": None}).encode()
    for given in (None, "Bearer wrong", "Bearer None", "Bearer", "sésame"):
        headers = {} if given is None else {"Authorization": given}
        status, answer, _ = without_gemma.request("POST", contract.route, body, **headers)
        assert (status, answer["error_type"]) == (401, "unauthorized"), given
        assert isinstance(answer["error"], str if contract is TEI else dict)
        assert "sesame" not in json.dumps(answer)
    for scheme in ("Bearer", "bearer"):  # RFC 9110: the scheme's name is case-insensitive
        assert without_gemma.request("POST", contract.route, body, Authorization=f"{scheme} sesame")[0] == 200
    assert without_gemma.request("GET", "/health")[0] == 200


@for_all
def test_without_a_key_any_authorization_will_do(served: Served, contract: Contract) -> None:
    body = json.dumps(contract.body(["3"])).encode()
    for value in ("Bearer None", "Bearer ", "Basic eDp5", "nonsense"):
        assert served.request("POST", contract.route, body, Authorization=value)[0] == 200


def test_an_error_is_written_for_the_request_that_it_answers(served: Served) -> None:
    """On one connection: TEI's clients need `error` to be a string, but that says nothing about the next request."""
    tei = json.dumps(TEI.body([3])).encode()
    one = b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(tei), tei)
    answers = served.raw(one + b"GET /nothing HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").decode()
    first, second = (json.loads(line) for line in answers.split("\n") if line.startswith("{"))
    assert isinstance(first["error"], str)
    assert isinstance(second["error"], dict)


# -- Discovery ---------------------------------------------------------------------------------------------------------


def test_info_has_what_teis_clients_read_first(served: Served) -> None:
    status, answer, _ = served.request("GET", "/info")
    assert status == 200
    assert list(answer["model_type"]) == ["reranker"]
    assert answer["model_id"]
    assert answer["max_input_length"] == 1024  # what the fake's description and the settings allow
    assert answer["max_client_batch_size"] >= 1000


def test_the_models_are_listed_by_names_that_select_them(served: Served) -> None:
    status, answer, _ = served.request("GET", "/v1/models")
    assert (status, answer["object"]) == (200, "list")
    assert [model["id"] for model in answer["data"]] == ["fake-m3", "fake-gemma"]
    assert {model["object"] for model in answer["data"]} == {"model"}
    for model in answer["data"]:
        assert ask(served, JINA, ["1"], model=model["id"])[0]["model"] == model["id"]


def test_a_null_key_of_another_contract_is_as_if_it_were_not_there(served: Served) -> None:
    status, answer, _ = served.request("POST", "/rerank", b'{"query": "q", "documents": ["1"], "texts": null}')
    assert status == 200, answer
    assert answer["results"][0]["index"] == 0
