"""The server as a process: what it prints at start, which files it takes, how it stops, what it refuses to start."""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Gguf
from golden.inputs import SCORED_PAIRS
from guard import needs
from server_process import ServerProcess
from test_http import sigmoid

import rerank_server
from bench import checkpoints as bench_checkpoints

START_TIMEOUT_S = 60
# A sigmoid's slope is at most 1/4, and tests/test_parity.py holds logits to 1/400 of their range, which is at most 6.
SCORE_TOLERANCE = 0.004


def run(*arguments: str | Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "rerank_server.py"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=START_TIMEOUT_S,
                          env={**os.environ, **environment})  # fmt: skip


@pytest.fixture(scope="module")
def models(gguf_of: Gguf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder as a user has it: m3 and gemma (tiny ones) under their usual names."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(gguf_of("xlmr"), folder / "bge-reranker-v2-m3-F32.gguf")
    shutil.copy(gguf_of("gemma"), folder / "bge-reranker-v2-gemma-F32.gguf")
    return folder


@pytest.fixture(scope="module")
def process(models: Path) -> Iterator[ServerProcess]:
    started = ServerProcess("--models", models, "--threads", "2")
    yield started
    assert started.stop() == 0


def test_the_report_says_which_file_serves_which_role(process: ServerProcess) -> None:
    for words in ("bge-reranker-v2-m3-F32.gguf", "cross-encoder", "F32", "bge-reranker-v2-gemma-F32.gguf", "2 threads",
                  "1024 tokens", "loaded on first use", f"curl -s {process.url}/rerank"):  # fmt: skip
        assert words in process.report


def test_what_the_machine_is_found_to_like_is_said_and_can_be_overruled(models: Path, process: ServerProcess) -> None:
    """Another ubatch and number of threads: other speeds, the same scores."""
    body: dict[str, Any] = {"query": SCORED_PAIRS[0].query, "passages": [pair.passage for pair in SCORED_PAIRS[:8]]}
    flags = ("--threads", "1", "--ubatch", "64")
    server = ServerProcess("--models", models, *flags)
    try:
        assert "1 threads, decodes of up to 64 tokens" in server.report
        assert server.rerank(**body)[1] == pytest.approx(process.rerank(**body)[1], abs=SCORE_TOLERANCE)
    finally:
        server.stop()


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1.5), ("10000 100000", 1.0), ("max 100000", math.inf)])
def test_a_cgroups_quota_bounds_the_threads(tmp_path: Path, quota: str, cores: float) -> None:
    """docker run --cpus=1.5 on a machine of 64: 64 threads would wait for each other all the time."""
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert rerank_server._cgroup_cpus(tmp_path) == cores


def test_the_line_that_the_report_offers_works_as_it_stands(process: ServerProcess) -> None:
    needs("curl")
    line = process.report[process.report.index("curl ") :].strip()
    scores = json.loads(subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60).stdout)
    assert len(scores) == 2
    assert all(0 <= score <= 1 for score in scores)


def test_thirty_passages_score_as_thirty_single_ones(process: ServerProcess) -> None:
    passages = [f"passage number {index} " * (1 + index % 9) for index in range(30)]
    for use_llm in (False, True):
        together = process.rerank(query="which number?", passages=passages, use_llm=use_llm)[1]
        single = [process.rerank(query="which number?", passages=[text], use_llm=use_llm)[1][0] for text in passages]
        assert together == pytest.approx(single, abs=2e-3), use_llm  # batch invariance: see tests/test_parity.py
        assert len(set(together)) > 5, "scores that hardly differ would hide a mix-up"


@pytest.mark.parametrize("name", ["xlmr", "bert", "gemma"])
def test_the_served_score_is_the_references(name: str, gguf_of: Gguf, golden: dict[str, Any]) -> None:
    """From the socket: float32 file of a tiny checkpoint against golden logits made once with transformers."""
    role = "--gemma" if name == "gemma" else "--m3"
    others: list[str | Path] = ["--m3", gguf_of("xlmr")] if name == "gemma" else []
    server = ServerProcess(role, gguf_of(name), *others, "--max-length", "512")
    pairs = [(pair, logit) for pair, logit in zip(SCORED_PAIRS, golden[name]["logits"], strict=True)
             if pair.max_length == 512]  # fmt: skip
    for query in {pair.query for pair, _ in pairs}:
        mine = [(pair.passage, logit) for pair, logit in pairs if pair.query == query]
        scores = server.rerank(query=query, passages=[text for text, _ in mine], use_llm=name == "gemma")[1]
        expected = [sigmoid(logit) for _, logit in mine]
        assert scores == pytest.approx(expected, abs=SCORE_TOLERANCE)
    assert server.stop() == 0


def test_use_llm_is_served_by_the_gemma_file_and_loads_it_on_demand(models: Path) -> None:
    server = ServerProcess("--models", models)
    assert server.health()["models"]["gemma"]["loaded"] is False
    status, scores, headers = server.rerank(query="q", passages=["a", "b"], use_llm=True)
    assert (status, len(scores), headers["X-Rerank-Model"]) == (200, 2, "bge-reranker-v2-gemma-F32")
    assert server.health()["models"]["gemma"]["loaded"] is True
    assert server.rerank(query="q", passages=["a"])[2]["X-Rerank-Model"] == "bge-reranker-v2-m3-F32"
    assert server.stop() == 0


def test_a_pair_longer_than_max_length_is_cut_and_named(process: ServerProcess) -> None:
    status, scores, headers = process.rerank(query="q", passages=["short", "word " * 5000], use_llm=False)
    assert (status, len(scores), headers["X-Rerank-Truncated"]) == (200, 2, "1")


def test_pairs_beyond_the_ubatch_do_not_abort_the_process(models: Path) -> None:
    server = ServerProcess("--models", models, "--ubatch", "32", "--max-length", "2048")
    for use_llm in (False, True):
        status, scores, _ = server.rerank(query="q", passages=["word " * 3000, "", "x"] * 3, use_llm=use_llm)
        assert (status, len(scores)) == (200, 9)
    assert server.stop() == 0


def test_without_an_m3_file_the_mini_model_serves_and_everything_says_so(gguf_of: Gguf, tmp_path: Path) -> None:
    shutil.copy(gguf_of("bi"), tmp_path / "mini-F32.gguf")
    server = ServerProcess("--models", tmp_path)
    assert "no m3 file found" in server.report
    assert "make convert MODEL=m3" in server.report
    assert server.health()["models"]["m3"]["is_fallback"] is True
    assert server.rerank(query="q", passages=["a"])[2]["X-Rerank-Model"] == "mini-F32"
    assert server.rerank(query="q", passages=["a"], use_llm=True)[0] == 503
    assert server.stop() == 0


def test_a_file_name_in_another_alphabet_is_served(gguf_of: Gguf, tmp_path: Path) -> None:
    """Its name goes into a header, which holds Latin letters only: the connection would close without an answer."""
    shutil.copy(gguf_of("xlmr"), tmp_path / "модель.gguf")
    server = ServerProcess("--models", tmp_path)
    status, _, headers = server.rerank(query="q", passages=["a"])
    assert (status, headers["X-Rerank-Model"]) == (200, "%D0%BC%D0%BE%D0%B4%D0%B5%D0%BB%D1%8C")
    assert server.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_under_load_answers_what_is_in_flight(models: Path, number: int) -> None:
    server = ServerProcess("--models", models)
    answers: list[int] = []
    passages = ["a rather long passage of text that takes a while " * 15] * 60

    def ask() -> None:
        status, scores, _ = server.rerank(query="q", passages=passages)
        answers.append(status if len(scores) == 60 else -1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.5)
    assert server.stop(number) == 0
    for thread in threads:
        thread.join()
    assert answers == [200] * 4
    assert "Traceback" not in server.log


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill() of a thread's id is Linux's")
def test_a_stop_is_heard_whichever_thread_the_kernel_gives_the_signal_to(models: Path) -> None:
    """Would break: under load, now and then, SIGTERM is not heard, and the server is killed with requests in flight."""
    server = ServerProcess("--models", models, "--threads", "1")
    others = {int(task.name) for task in Path(f"/proc/{server.pid}/task").iterdir()} - {server.pid}
    os.kill(max(others), signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.parametrize("delay_s", [0.4, 0.6])
def test_a_stop_while_the_model_is_loaded_ends_the_process(models: Path, delay_s: float) -> None:
    """Would break: a container that is stopped while a large model is read hangs until it is killed."""
    command = [sys.executable, str(ROOT / "rerank_server.py"), "--port", "0", "--models", str(models)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay_s)
    process.terminate()
    assert process.wait(10) in (0, -signal.SIGTERM)  # before it listens to signals, they end it


def test_signals_may_interrupt_each_other(models: Path) -> None:
    """Under `make run` the terminal and make both send Ctrl-C: a server whose handler took a lock hung now and then,
    and could only be killed."""
    server = ServerProcess("--models", models, "--threads", "1")
    end = time.monotonic() + 20
    while time.monotonic() < end and server.is_running():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(server.pid, number)
    assert server.wait() in (0, -signal.SIGTERM, -signal.SIGINT)  # Python's own handlers end before the process does


def test_no_model_at_all_ends_with_one_line_that_says_what_to_run(tmp_path: Path) -> None:
    done = run("--models", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "make convert MODEL=m3" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "70000"], {}, "--port must be between 0 and 65535"),
        (["--port", "x"], {}, "--port must be a whole number"),
        ([], {"RERANK_MAX_LENGTH": "9000"}, "--max-length must be between 32 and 8192"),
        ([], {"RERANK_UBATCH": "many"}, "RERANK_UBATCH must be a whole number"),
        ([], {"RERANK_STRICT_MODEL": "perhaps"}, "RERANK_STRICT_MODEL must be true or false"),
        (["--accel", "maybe"], {}, "--accel must be auto, int8, bf16, off, on, not 'maybe'"),
        (["--ubatch", "8"], {}, "--ubatch must be 0 or at least 32"),
        (["--m3", "nowhere.gguf"], {}, "--m3: there is no file nowhere.gguf"),
        ([], {"RERANK_GEMMA": "nowhere.gguf"}, "--gemma: there is no file nowhere.gguf"),
    ],
)
def test_a_wrong_setting_is_refused_at_start_and_named(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], words: str
) -> None:
    done = run("--models", tmp_path, *arguments, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_a_port_in_use_is_said_in_one_line(process: ServerProcess, models: Path) -> None:
    done = run("--models", models, "--port", process.url.rpartition(":")[2])
    assert done.returncode == 2
    assert "cannot listen on" in done.stderr


def test_environment_variables_set_what_flags_set(models: Path) -> None:
    changes = {"RERANK_MAX_LENGTH": "64", "RERANK_THREADS": "1", "RERANK_STRICT_MODEL": "true"}
    server = ServerProcess(RERANK_MODELS=str(models), **changes)
    assert server.health()["models"]["m3"]["max_length"] == 64
    assert "1 threads" in server.report
    assert server.stop() == 0


def test_a_file_of_the_wrong_kind_is_refused_for_a_role(gguf_of: Gguf, tmp_path: Path) -> None:
    done = run("--models", tmp_path, "--m3", gguf_of("gemma"))
    assert done.returncode == 1
    assert "yes-logit" in done.stderr


def test_check_says_what_a_good_file_is(gguf_of: Gguf) -> None:
    done = run("--check", gguf_of("xlmr"))
    assert done.returncode == 0, done.stderr
    assert "good" in done.stdout
    assert "cross-encoder, bert, F32" in done.stdout


def test_check_scores_pairs_from_standard_input(gguf_of: Gguf) -> None:
    lines = [{"query": "q", "passage": "a"}, {"query": "q", "passage": "word " * 99, "max_length": 32}]
    done = run("--check", gguf_of("xlmr"), "--pairs", "-", stdin="\n".join(map(json.dumps, lines)) + "\n")
    assert done.returncode == 0, done.stderr
    first, second, last = map(json.loads, done.stdout.splitlines())
    assert first["score"] == pytest.approx(sigmoid(first["logit"]))
    assert (first["truncated"], second["truncated"], len(second["ids"])) == (False, True, 32)
    assert last["summary"]["n_pairs"] == 2


@pytest.mark.parametrize("max_length", [512, 1024])
def test_the_logits_that_an_encoder_never_computes_take_no_memory(tmp_path: Path, max_length: int) -> None:
    """llama.cpp clears 250,000 floats for each token of the longest pair: 512 MB here, which would not fit beside the
    model in a small container, not even for a moment."""
    checkpoint = bench_checkpoints.make_checkpoint("m3", tmp_path / "wide", hidden=256, layers=1, vocabulary=250_002)
    command = [sys.executable, "-m", "convert", str(checkpoint), "--quant", "Q8_0", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    server = ServerProcess("--m3", tmp_path / "wide-Q8_0.gguf", "--max-length", str(max_length))
    try:
        status, scores, _ = server.rerank(query="q", passages=["a long passage " * 300, "a short one"])
        assert (status, len(scores)) == (200, 2)
        assert server.peak_bytes() < (tmp_path / "wide-Q8_0.gguf").stat().st_size + 250_000_000
    finally:
        server.stop()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_new_memory_is_known_from_old_wherever_the_kernel_joins_them() -> None:
    """Would break: a gigabyte of logits that lies beside another block is not seen, and a small container dies."""
    n_bytes, blocks = 16 << 20, []
    for _ in range(5):
        before = rerank_server._anonymous_ranges()
        blocks.append(mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        assert n_bytes in [end - start for start, end in rerank_server._new_ranges(before)]
    for block in blocks:
        block.close()
