"""The page at GET /, in a real headless Chromium, against real models where scores matter and fakes where faults do."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Gguf
from guard import find, needs
from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, expect, sync_playwright
from server_process import ServerProcess
from test_http import Running

import rerank_server as server

TIMEOUT_MS = 20_000  # an action or an expectation that takes longer has failed; none waits for a decode for so long
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
MIN_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA

browser_test = pytest.mark.browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with contextlib.ExitStack() as stack:
        playwright = stack.enter_context(sync_playwright())
        own = Path(playwright.chromium.executable_path)  # which Playwright may have installed
        if not own.exists():
            needs("chromium")
        chromium = playwright.chromium.launch(executable_path=find("chromium") or own)
        yield chromium
        chromium.close()


class Visit:
    """A tab on a server's page. Notes what must never happen: errors, dialogs, and requests to anywhere else."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context, self.url, self.wrong = context, url, list[str]()
        self.page = self.open()

    def open(self) -> Page:
        page = self.context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if self._is_own(request.url) else self.wrong.append(request.url))
        page.goto(self.url)
        expect(page.locator("#m3-file")).not_to_have_text("asking the server …")
        return page

    def _is_own(self, url: str) -> bool:
        return url.startswith((f"{self.url}/", "data:image/", f"blob:{self.url}/"))

    def fill(self, query: str, passages: str) -> None:
        self.page.get_by_label("Query").fill(query)
        self.page.get_by_label("Passages", exact=True).fill(passages)

    def rank(self) -> None:
        self.page.get_by_role("button", name="Rank", exact=False).first.click()
        self.wait()

    def wait(self) -> None:
        expect(self.page.locator("#answer")).to_have_attribute("aria-busy", "false", timeout=TIMEOUT_MS)

    @property
    def rows(self) -> Locator:
        return self.page.get_by_role("listitem")

    def texts(self) -> list[str]:
        return self.page.locator(".text").all_text_contents()

    def scores(self, model: str) -> list[float]:
        """As many digits as there are, from the title, in the order shown."""
        cells = self.page.locator(f".score[data-model={model}] .value")
        return [float(str(title)) for title in cells.evaluate_all("cells => cells.map((cell) => cell.title)")]

    def order_by(self, name: str) -> None:
        self.page.get_by_role("radio", name=name, exact=True).check(force=True)  # the input is behind its label

    def code(self, language: str) -> str:
        if not self.page.locator("#code").evaluate("details => details.open"):
            self.page.get_by_text("This request as code").click()
        self.page.get_by_role("radio", name=language).check(force=True)
        self.page.get_by_role("button", name="Copy").click()
        expect(self.page.get_by_text("Copied")).to_be_visible()
        return str(self.page.evaluate("navigator.clipboard.readText()"))


OpenPage = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser) -> Iterator[OpenPage]:
    """(url, errors that may be logged, options of the context) -> a tab. At the end: nothing else has gone wrong."""
    visits: list[tuple[Visit, str]] = []

    def open_page(url: str, may_log: str = "(?!)", **options: Any) -> Visit:
        context = browser.new_context(**{"viewport": WIDE, "accept_downloads": True, **options})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        visits.append((Visit(context, url), may_log))
        return visits[-1][0]

    yield open_page
    for one, may_log in visits:
        one.context.close()
        assert [text for text in one.wrong if not re.search(may_log, text)] == []


@pytest.fixture(scope="module")
def both(gguf_of: Gguf) -> Iterator[ServerProcess]:
    """A server with the tiny m3 and gemma, and pairs of at most 64 tokens."""
    files = ("--m3", gguf_of("xlmr"), "--gemma", gguf_of("gemma"))
    process = ServerProcess(*files, "--max-length", "64", "--threads", "1")
    yield process
    assert process.stop() == 0


@pytest.fixture
def keyed(gguf_of: Gguf) -> Iterator[ServerProcess]:
    """The same with an API key, k-1."""
    files = ("--m3", gguf_of("xlmr"), "--gemma", gguf_of("gemma"))
    process = ServerProcess(*files, "--threads", "1", RERANK_API_KEY="k-1")
    yield process
    assert process.stop() == 0


@pytest.fixture
def faked() -> Iterator[Running]:
    """A server with a fake m3, which scores by the number of words, and a gemma that cannot be loaded."""
    running = Running(with_gemma=True)
    yield running
    running.close()


def url_of(running: Running) -> str:
    return f"http://127.0.0.1:{running.port}"


PASSAGES = ["one two three", "a text", "sky and sea", "another text about something", "five"]


def ranks_of(scores: list[float]) -> list[int]:
    """Indices, best first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


# -- The page itself ---------------------------------------------------------------------------------------------------


def get(url: str, **headers: str) -> tuple[str, Any, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        raw = answer.read().decode()
        kind = answer.headers.get_content_type()
        return kind, json.loads(raw) if kind == "application/json" else raw, answer.headers


def test_the_page_is_for_people_and_the_endpoints_for_programs(faked: Running) -> None:
    for accept in ("*/*", "text/html,application/xhtml+xml,*/*;q=0.8", "text/html, application/json"):
        assert get(url_of(faked), Accept=accept)[0] == "text/html", accept
    kind, answer, _ = get(url_of(faked), Accept="application/json")
    assert kind == "application/json"
    routes = {f"{method} {path}" for path, ways in faked.server.application.routes.items() for method in ways}
    assert set(answer["endpoints"]) == routes


def test_without_the_file_the_endpoints_are_shown(faked: Running, tmp_path: Path) -> None:
    application = server.Application(faked.roles, server.Settings(), web=tmp_path)
    answer = application.routes["/"]["GET"](b"", server.Call(accept="text/html"))
    assert "POST /rerank" in answer.body["endpoints"]


def test_a_page_needs_no_key_and_no_other_host() -> None:
    """Would break: a browser cannot send a key with the first request; and a page that loads from elsewhere tells
    others who uses this server."""
    running = Running(api_key="secret")
    page = get(url_of(running))[1]
    running.close()
    links = re.findall(r"""(?:src|href|url\(|from|import)\s*[=(]?\s*["'(]?((?:https?:)?//[^"')\s]+)""", page)
    assert links == []
    assert "<script>" in page


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_policy_allows_no_script_but_the_pages_own(faked: Running, path: str) -> None:
    _, page, headers = get(url_of(faked) + path)
    assert headers["X-Frame-Options"] == "DENY"
    (text,) = re.findall('<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
    assert page.index(text) < page.index("<style>")
    policy = dict(part.strip().split(" ", 1) for part in text.split(";"))
    for element in ("script", "style"):
        for code in re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[f"{element}-src"], "it was changed: make openapi"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert policy["script-src"].count("sha256-") == page.count("<script>")
    assert policy["style-src"].count("sha256-") == page.count("<style>") == 1
    assert not re.search(r"<[^>]+\s(?:style|on\w+)=", page), "the policy would forbid it"


# -- The whole flow ----------------------------------------------------------------------------------------------------


@browser_test
def test_the_sample_is_ranked_by_both_models(both: ServerProcess, visit: OpenPage) -> None:
    """Would break: anything between the button and the scores."""
    tab = visit(both.url)
    query = tab.page.get_by_label("Query").input_value()
    passages = tab.page.get_by_label("Passages", exact=True).input_value().splitlines()
    assert (len(query) > 5, len(passages) >= 5) == (True, True)
    expect(tab.page.locator("#found")).to_have_text(f"{len(passages)} passages, one a line")
    tab.rank()
    expect(tab.rows).to_have_count(len(passages))
    for model, use_llm in (("m3", False), ("gemma", True)):
        tab.order_by(model)
        _, scores, _ = both.rerank(query=query, passages=passages, use_llm=use_llm)
        assert tab.scores(model) == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        _, answer, _ = both.rerank("/v1/rerank", query=query, documents=passages, use_llm=use_llm)
        total = tab.page.locator(f".total[data-model={model}]")
        expect(total).to_contain_text(f"{answer['usage']['total_tokens']:,} tokens")
        expect(total).to_contain_text(re.compile(r"\d s"))
        shown = [int(index or -1) for index in (row.get_attribute("data-index") for row in tab.rows.all())]
        assert shown == [result["index"] for result in answer["results"]]


@browser_test
def test_changes_of_rank_are_those_between_the_two_models(both: ServerProcess, visit: OpenPage) -> None:
    tab = visit(both.url)
    tab.fill("sky", "\n".join(PASSAGES))
    tab.rank()
    m3, gemma = (ranks_of(both.rerank(query="sky", passages=PASSAGES, use_llm=use)[1]) for use in (False, True))
    rises = [m3.index(index) - gemma.index(index) for index in range(len(PASSAGES))]
    assert any(rises), "the example shows nothing"
    for index, rise in enumerate(rises):
        said = tab.page.locator(f".row[data-index='{index}'] .score[data-model=gemma] .change").text_content() or ""
        assert said.split()[0] == f"#{gemma.index(index) + 1}"
        assert (f"▲{rise}" if rise > 0 else f"▼{-rise}" if rise < 0 else "#") in said
        assert rise == 0 or f"{abs(rise)} {'higher' if rise > 0 else 'lower'} than m3" in said
    tab.order_by("rank change")
    order = [int(row.get_attribute("data-index") or -1) for row in tab.rows.all()]
    assert [abs(rises[index]) for index in order] == sorted(map(abs, rises), reverse=True)
    tab.order_by("as given")
    assert tab.texts() == PASSAGES


@browser_test
def test_a_passage_that_was_cut_says_so(both: ServerProcess, visit: OpenPage) -> None:
    """A low score is then no verdict on the rest of it."""
    passage = "sea 😀 and sky, " * 60
    tab = visit(both.url)
    tab.fill("sky", f"short\n{passage}")
    tab.page.get_by_role("checkbox", name="gemma").uncheck()
    tab.rank()
    row = tab.page.locator(".row[data-index='1']")
    expect(row).to_contain_text("too long for m3, cut")
    row.get_by_role("button", name="Show all").click()
    assert row.locator(".text").text_content() == passage
    expect(tab.page.locator(".row[data-index='0'] .note-cut")).to_have_count(0)
    expect(tab.page.locator(".total")).to_contain_text("1 cut")


# -- Queries and passages, pasted, opened or dropped -------------------------------------------------------------------

FORMATS = {
    "lines": ("a.txt", "first one\n\n  second\r\nthird, or 3\n", ["first one", "  second", "third, or 3"]),
    "array": ("a.json", '["first\\nline", "second"]', ["first\nline", "second"]),
    "request": ("a.json", '{"query": "asked", "documents": [{"text": "one", "id": 7}, "two"]}', ["one", "two"]),
    "json lines": ("a.jsonl", '{"_id": "a", "title": "t", "text": "one"}\n"two"\n', ["one", "two"]),
    "csv": ("a.csv", 'id,text\r\n1,"""quoted"", and\na line"\r\n2,two\r\n', ['"quoted", and\na line', "two"]),
    "semicolons": ("a.csv", "3;short\n4;the longest column is taken\n", ["short", "the longest column is taken"]),
    "tabs": ("a.tsv", "query\tpassage\nasked\tone\nasked\ttwo\n", ["one", "two"]),
    "bracket": ("a.txt", "[1] a footnote\n[2] another", ["[1] a footnote", "[2] another"]),
}  # fmt: skip
PASTED = sorted(FORMATS.keys() - {"semicolons"})  # nothing tells those from text


@browser_test
def test_every_format_is_read(faked: Running, visit: OpenPage) -> None:
    tab = visit(url_of(faked))
    tab.page.get_by_role("checkbox", name="gemma").uncheck()
    for name, (file, content, expected) in FORMATS.items():
        for way in ("open", "drop", *(["paste"] if name in PASTED else [])):
            tab.fill("q", "")
            tab.page.locator("#format").select_option("auto")
            if way == "paste":
                tab.page.get_by_label("Passages", exact=True).fill(content)
            elif way == "open":
                payload: Any = {"name": file, "mimeType": "text/plain", "buffer": content.encode()}
                tab.page.locator("#file").set_input_files(payload)
            else:
                drop(tab.page, file, content)
            expect(tab.page.locator("#found")).to_contain_text(f"{len(expected)} passages", timeout=TIMEOUT_MS)
            tab.rank()
            tab.order_by("as given")
            assert tab.texts() == expected, (name, way)
            if "asked" in content:
                expect(tab.page.get_by_label("Query")).to_have_value("asked")
    expect(tab.page.locator("#error")).to_be_hidden()


def drop(page: Page, name: str, content: str) -> None:
    page.evaluate(
        """([name, content]) => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([content], name));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
        }""", [name, content])  # fmt: skip


@browser_test
def test_what_cannot_be_read_is_said_with_its_place(faked: Running, visit: OpenPage) -> None:
    tab = visit(url_of(faked))
    n_before = faked.engine.n_scored
    for content, format_, said in (
        ('["one", ', "auto", "This is not JSON"), ('{"text": "one"}\n{"text": ', "auto", "Line 2 is not JSON"),
        ('["one", 2]', "auto", 'Entry 2 is neither a string nor an object with a "text"'),
        ('a,"b\nc', "csv", "A quotation mark in row 1 of the CSV is never closed"),
        ("", "auto", "There are no passages"),
    ):  # fmt: skip
        tab.fill("q", content)
        tab.page.locator("#format").select_option(format_)
        tab.page.get_by_role("button", name="Rank", exact=False).first.click()
        expect(tab.page.get_by_role("alert")).to_contain_text(said)
    assert faked.engine.n_scored == n_before


# -- Faults, long lists, hostile texts ---------------------------------------------------------------------------------


@browser_test
def test_a_refusal_shows_the_servers_words_and_no_scores(faked: Running, visit: OpenPage) -> None:
    tab = visit(url_of(faked), may_log="Failed to load resource")
    faked.engine.fail = server.EngineError("the matrix was singular")
    tab.rank()
    expect(tab.page.get_by_role("alert")).to_have_text("m3: the matrix was singular (status 500)")
    expect(tab.rows).to_have_count(0)
    faked.engine.fail = None
    tab.rank()  # m3 scores, and gemma's file cannot be loaded: what is there is shown
    expect(tab.page.get_by_role("alert")).to_contain_text("gemma: the model could not be loaded: fake-gemma.gguf")
    assert len(tab.scores("m3")) == 8
    assert tab.scores("gemma") == []
    tab.page.get_by_role("checkbox", name="gemma").uncheck()
    tab.rank()
    expect(tab.page.locator("#error")).to_be_hidden()


@browser_test
def test_a_server_that_has_gone_is_said(visit: OpenPage) -> None:
    running = Running()
    tab = visit(url_of(running), may_log="ERR_CONNECTION|Failed to load")
    expect(tab.page.get_by_role("checkbox", name="gemma")).to_be_disabled()
    expect(tab.page.locator("#gemma-file")).to_contain_text("make convert MODEL=gemma")
    running.close()
    tab.rank()
    expect(tab.page.get_by_role("alert")).to_contain_text("The server cannot be reached")


@browser_test
def test_500_passages_with_progress_and_a_way_to_stop(faked: Running, visit: OpenPage) -> None:
    passages = [f"passage {number}" + " word" * (number % 17) for number in range(500)]
    tab = visit(url_of(faked))
    tab.fill("q", "\n".join(passages))
    tab.page.get_by_role("checkbox", name="gemma").uncheck()
    faked.engine.block.clear()
    tab.page.get_by_role("button", name="Rank", exact=False).first.click()
    expect(tab.page.get_by_role("progressbar")).to_be_visible()
    expect(tab.page.locator("#working-text")).to_contain_text("m3: 0 of 500 passages")
    expect(tab.page.locator("#answer")).to_have_attribute("aria-busy", "true")
    tab.page.get_by_role("button", name="Stop").click()
    tab.wait()
    expect(tab.page.get_by_role("alert")).to_contain_text("Stopped")
    expect(tab.rows).to_have_count(0)
    faked.engine.block.set()
    seen: list[str] = []
    tab.page.expose_function("seen", lambda text: seen.append(text))
    tab.page.evaluate("""() => new MutationObserver(() => seen(document.querySelector("#working-text").textContent))
        .observe(document.querySelector("#working-text"), { childList: true })""")
    tab.rank()
    expect(tab.rows).to_have_count(500)
    done = [int(match[1]) for text in seen if (match := re.match(r"m3: (\d+) of 500 passages", text))]
    assert len(done) >= 3
    assert done == sorted(set(done))
    scores = faked.rerank({"query": "q", "passages": passages})[1]
    assert tab.scores("m3") == sorted(scores, reverse=True)
    assert tab.texts() == [passages[index] for index in ranks_of(scores)]


@browser_test
def test_more_than_500_are_shown_on_demand(faked: Running, visit: OpenPage) -> None:
    tab = visit(url_of(faked))
    tab.fill("q", "\n".join(map(str, range(501))))
    tab.page.get_by_role("checkbox", name="gemma").uncheck()
    tab.rank()
    expect(tab.rows).to_have_count(500)
    tab.page.get_by_role("button", name="Show 1 more of 1").click()
    expect(tab.rows).to_have_count(501)


HOSTILE = [
    "<script>window.hit = 1</script>", '<img src=x onerror="window.hit = 2">', "</textarea></script><svg onload=hit=3>",
    "<style>body { display: none }</style>", "<b>bold</b> &lt;&amp; &#x41;", "{{7*7}} ${hit = 4} javascript:hit=5",
    "\u202eright to left override", "=HYPERLINK(\"http://attacker.invalid\")", "'; window.hit = 6; '", "a" * 3000,
]  # fmt: skip


@browser_test
def test_a_hostile_passage_is_only_text(both: ServerProcess, visit: OpenPage) -> None:
    """Would break: whoever gets a passage into an index runs script in the browser of whoever looks at it."""
    tab = visit(both.url, may_log="^This document requires 'TrustedHTML' assignment")
    lines = [json.dumps({"id": text, "text": text}) for text in HOSTILE]
    tab.fill(HOSTILE[0], "\n".join(lines))
    tab.rank()
    tab.order_by("as given")
    for button in tab.page.get_by_role("button", name="Show all").all():
        button.click()
    expect(tab.rows).to_have_count(len(HOSTILE))
    shown = tab.page.locator(".text").evaluate_all(
        "places => places.map((place) => place.textContent)"
    )
    assert shown == HOSTILE
    for language in ("curl", "Python", "JSON"):
        assert "window.hit = 1" in tab.code(language)
    assert tab.page.locator("#answer :is(script, img, svg, style, a)").count() == 0
    assert tab.page.evaluate("window.hit === undefined")
    with pytest.raises(Error, match="TrustedHTML"):  # and if a later change of the page did try
        tab.page.evaluate("document.body.innerHTML = '<img src=x onerror=\"window.hit = 7\">'")
    assert tab.page.evaluate("window.hit === undefined")


# -- Threshold, download, code -----------------------------------------------------------------------------------------


@browser_test
def test_the_threshold_keeps_what_min_score_would(both: ServerProcess, visit: OpenPage) -> None:
    tab = visit(both.url)
    tab.fill("sky", "\n".join(PASSAGES))
    tab.rank()
    _, scores, _ = both.rerank(query="sky", passages=PASSAGES)
    for threshold in (0, round(sorted(scores)[2], 2), 1):
        tab.page.get_by_label("Threshold").fill(str(threshold))
        _, answer, _ = both.rerank("/v1/rerank", query="sky", documents=PASSAGES, min_score=threshold)
        n_kept = len(answer["results"])
        expect(tab.page.locator("#kept")).to_have_text(f"{threshold:.2f} keeps {n_kept} of 5 by m3")
        expect(tab.page.locator(".row.below")).to_have_count(5 - n_kept)


@browser_test
def test_a_ranking_can_be_downloaded(both: ServerProcess, visit: OpenPage, tmp_path: Path) -> None:
    texts = ["one, \"two\"\nthree", "=1+1", "sea 😀"]
    tab = visit(both.url)
    tab.fill("sky", json.dumps([{"id": f"d{n}", "text": text} for n, text in enumerate(texts)]))
    tab.rank()
    scores = {use_llm: both.rerank(query="sky", passages=texts, use_llm=use_llm)[1] for use_llm in (False, True)}
    for name in ("CSV", "JSON lines"):
        with tab.page.expect_download() as download:
            tab.page.get_by_role("button", name=name, exact=True).click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        text = file.read_bytes().decode()
        rows: list[dict[str, Any]]
        rows = list(csv.DictReader(io.StringIO(text))) if name == "CSV" else list(map(json.loads, text.splitlines()))
        assert [int(row["index"]) for row in rows] == ranks_of(scores[False])
        for rank, row in enumerate(rows, 1):
            index = int(row["index"])
            assert int(row["m3_rank"]) == rank
            assert row["id"] == f"d{index}"
            assert float(row["m3_score"]) == pytest.approx(scores[False][index], abs=1e-5)
            assert float(row["gemma_score"]) == pytest.approx(scores[True][index], abs=1e-5)
            assert str(row["m3_truncated"]).lower() == "false"
            escaped = "'" if name == "CSV" and texts[index].startswith("=") else ""  # no formula in a spreadsheet
            assert row["text"] == escaped + texts[index]


@browser_test
def test_the_copied_code_runs_and_gives_the_scores(keyed: ServerProcess, visit: OpenPage) -> None:
    """Quotation marks, backslashes and $ of a passage must survive a shell and Python."""
    texts = ["it's \"quoted\" \\n $HOME `id`", "line\nend \u2028 and 😀", "plain"]
    tab = visit(keyed.url)
    tab.page.get_by_text("API key", exact=False).first.click()
    tab.page.get_by_label("API key").fill("k-1")
    tab.fill("what's up?", json.dumps(texts))
    tab.rank()
    request = urllib.request.Request(
        f"{keyed.url}/rerank", json.dumps({"query": "what's up?", "passages": texts, "use_llm": True}).encode(),
        {"Authorization": "Bearer k-1"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as answer:
        scores = json.load(answer)
    tab.order_by("gemma")
    commands = {"curl": ["bash", "-c", tab.code("curl")], "Python": [sys.executable, "-c", tab.code("Python")]}
    for name, command in commands.items():
        if name == "curl" and find("curl") is None:
            continue
        assert "k-1" not in command[2], "a key is not for the clipboard"
        done = subprocess.run(
            command, env={**os.environ, "RERANK_API_KEY": "k-1"}, capture_output=True, text=True, check=True, timeout=60
        )
        if name == "curl":
            assert json.loads(done.stdout) == pytest.approx(scores, abs=1e-5)
        else:
            assert done.stdout.startswith(f"{max(scores):.4f}  {texts[ranks_of(scores)[0]]}")
    assert json.loads(tab.code("JSON")) == {"query": "what's up?", "passages": texts, "use_llm": True}


# -- The key, the keyboard, small screens, the dark --------------------------------------------------------------------


@browser_test
def test_the_key_is_asked_for_and_stays_in_the_tab(visit: OpenPage) -> None:
    running = Running(api_key="secret-1")
    tab = visit(url_of(running), may_log="Failed to load resource")
    tab.rank()
    expect(tab.page.get_by_role("alert")).to_contain_text("Bearer KEY")
    expect(tab.page.get_by_label("API key")).to_be_focused()
    tab.page.keyboard.type("secret-1")
    tab.page.keyboard.press("Enter")
    tab.wait()
    expect(tab.rows).to_have_count(8)
    assert tab.page.evaluate("[localStorage.length, document.cookie, location.href]") == [0, "", f"{tab.url}/"]
    assert "secret-1" not in tab.page.content()
    tab.page.reload()
    expect(tab.page.locator("#key")).to_have_value("secret-1")
    expect(tab.open().locator("#key")).to_have_value("")  # another tab of the same browser
    running.close()


@browser_test
def test_everything_can_be_done_with_the_keyboard(faked: Running, visit: OpenPage) -> None:
    tab = visit(url_of(faked))
    keys = tab.page.keyboard
    focused = "document.activeElement.id || document.activeElement.value || document.activeElement.textContent.trim()"
    reached: list[str] = []
    for _ in range(40):
        keys.press("Tab")
        reached.append(str(tab.page.evaluate(focused)))
        if reached[-1] == "run":
            break
    assert [name for name in reached if name in ("query", "passages", "open", "m3", "gemma", "run")] == [
        "query", "passages", "open", "m3", "gemma", "run"
    ]  # fmt: skip
    tab.page.get_by_role("checkbox", name="gemma").focus()
    keys.press("Space")
    tab.page.get_by_label("Passages", exact=True).focus()
    keys.press("Control+Enter")
    tab.wait()
    expect(tab.rows).to_have_count(8)
    expect(tab.page.locator("#spoken")).to_contain_text("8 passages ranked by m3")
    tab.page.get_by_label("Threshold").focus()
    keys.press("End")
    expect(tab.page.locator("#kept")).to_contain_text("1.00 keeps")
    keys.press("Home")
    tab.page.get_by_role("radio", name="m3").focus()
    keys.press("ArrowRight")
    expect(tab.page.get_by_role("radio", name="as given")).to_be_checked()
    outline = "getComputedStyle(document.activeElement.closest('label')).outlineStyle"
    assert tab.page.evaluate(outline) == "solid", "who uses the keyboard sees where they are"
    faked.engine.block.clear()
    tab.fill("another query", "text")
    keys.press("Control+Enter")
    expect(tab.page.get_by_role("progressbar")).to_be_visible()
    keys.press("Escape")
    expect(tab.page.get_by_role("alert")).to_contain_text("Stopped")


@browser_test
def test_every_control_has_a_name(faked: Running, visit: OpenPage) -> None:
    """Would break: a screen reader says "button" and no more."""
    tab = visit(url_of(faked), may_log="Failed to load resource")
    tab.rank()
    tab.page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    nameless = re.findall(
        r"^\s*- (?:button|textbox|checkbox|radio|slider|combobox|link|progressbar|list)(?: \[.*\])?:?$",
        tab.page.locator("body").aria_snapshot(), re.MULTILINE,
    )  # fmt: skip
    assert [line.strip() for line in nameless if "list" not in line] == []
    assert tab.page.locator("h1").count() == 1


@browser_test
def test_a_narrow_screen_needs_no_sideways_scrolling(both: ServerProcess, visit: OpenPage) -> None:
    tab = visit(both.url, viewport=NARROW, has_touch=True, is_mobile=True)
    tab.fill("sky", "\n".join(["x" * 400, "a sea and a sky " * 40, "third"]))
    tab.rank()
    tab.page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    assert tab.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    expect(tab.page.locator("#result")).to_be_in_viewport()  # and not only after a search for it
    for button in tab.page.get_by_role("button").all():
        if button.is_visible():
            button.scroll_into_view_if_needed()
            box = button.bounding_box()
            assert box, "a button without a place"
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
    bar = tab.page.locator(".bar").first.bounding_box()
    assert bar
    assert bar["width"] > 60


CONTRASTS = """() => {
  const channels = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, n) => sum + value * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = channels(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const isShown = (node) => node.checkVisibility() && !node.closest("button:disabled, .unseen, .skip")
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  return [...document.querySelectorAll("body *")].filter(isShown).map((node) => {
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), node.className || node.tagName, node.textContent.slice(0, 30)];
  });
}"""


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_the_light_and_in_the_dark(both: ServerProcess, visit: OpenPage, scheme: str) -> None:
    tab = visit(both.url, color_scheme=scheme)
    tab.fill("sky", "a sea and a sky " * 40 + "\nsecond\nthird")
    tab.rank()
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) is (scheme == "dark")
    contrasts = tab.page.evaluate(CONTRASTS)
    assert len(contrasts) > 30
    assert [one for one in contrasts if one[0] < MIN_CONTRAST] == []
