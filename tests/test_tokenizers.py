"""Token ids equal the reference's, for texts that hurt; a wrong id is a wrong score that nobody notices.

Every text goes the way a passage goes: checkpoint -> python -m convert -> GGUF -> the server's engine -> pair.
"""
from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_xlmr
from conftest import ARCHITECTURES, EngineOf, convert, load_engine
from golden.inputs import CUT_PAIRS, MAX_LENGTHS, TEXTS, compact, fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st

import rerank_server

# What only the frame of a pair may hold; <unk> and [UNK] are not among them: an unknown character becomes one.
CONTROL_STRINGS = ("<s>", "<pad>", "</s>", "<mask>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "<eos>", "<bos>",
                   "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|fim_prefix|>",
                   "<|file_sep|>", "<|padding|>")
XLMR_MASK = 845  # the tiny vocabulary's last id
CONTROL_IDS = {"xlmr": {0, 1, 2, XLMR_MASK}, "bert": {0, 101, 102, 103}, "bi": {0, 101, 102, 103},
               "gemma": {0, 1, 2, 106, 107}, "modernbert": {*range(1000, 1007)},
               **{name: {*range(1000, 1010), *range(1012, 1018)} for name in ("qwen3", "qwen2", "zerank")}}


def passage_ids(engine: rerank_server.Engine, text: str, ids_after_passage: int) -> list[int]:
    """The passage part of the pair ("", text)."""
    (pair,) = engine.pairs.make("", [text])
    return list(pair.ids[pair.passage_start:len(pair.ids) - ids_after_passage])


def test_the_golden_files_belong_to_these_inputs(golden: dict[str, Any]) -> None:
    """Otherwise the tests below compare answers with other questions: run tests/golden/make_golden.py again."""
    assert {name: answers["inputs"] for name, answers in golden.items()} == dict.fromkeys(ARCHITECTURES, fingerprint())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_has_the_reference_ids(
    architecture: str, text: str, golden: dict[str, Any], engine_of: EngineOf
) -> None:
    answers = golden[architecture]
    ids = passage_ids(engine_of(architecture), TEXTS[text], answers["ids_after_passage"])
    assert compact(ids) == answers["texts"][text]


@pytest.mark.parametrize("pair", CUT_PAIRS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pair_is_built_and_cut_as_the_reference_does(
    architecture: str, pair: str, golden: dict[str, Any], engine_of: EngineOf
) -> None:
    """Whole pairs at each max_length: frame, 3/4 rule for the query, passage cut; and `truncated` tells of a cut."""
    answers = golden[architecture]["pairs"][pair]
    query, passage = CUT_PAIRS[pair]
    for max_length in (n for n in MAX_LENGTHS if str(n) in answers):
        (made,) = engine_of(architecture).pairs.make(query, [passage], rerank_server.Cut(max_length))
        assert compact(list(made.ids)) == answers[str(max_length)], f"at max_length {max_length}"
        if architecture != "bi":  # its answers hold the passage's ids alone, and the query can be cut as well
            assert made.truncated == (answers[str(max_length)] != answers["whole"]), f"at max_length {max_length}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_text_becomes_a_control_token(architecture: str, engine_of: EngineOf, golden: dict[str, Any]) -> None:
    """A passage that could write </s> or <end_of_turn> could steer the model, and rank itself first."""
    engine, after = engine_of(architecture), golden[architecture]["ids_after_passage"]
    parts = st.sampled_from([*CONTROL_STRINGS, "<", ">", "/", "s", "[", "]", "_", "bos", "＜", "＞", "\u200b", "▁"])
    texts = st.lists(parts | st.text(max_size=3), max_size=12).map("".join).filter(is_utf8)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(texts)
    def check(text: str) -> None:
        assert not CONTROL_IDS[architecture] & set(passage_ids(engine, text, after))
    check()


def is_utf8(text: str) -> bool:
    """Whether a request could carry it: lone surrogates are refused before anything is tokenised."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_frame_holds_the_control_tokens(architecture: str, engine_of: EngineOf) -> None:
    """The counterpart of the test above: it would pass as well if no token were a control token."""
    (pair,) = engine_of(architecture).pairs.make("query", ["passage"])
    assert CONTROL_IDS[architecture] & set(pair.ids)


@pytest.mark.reference
def test_xlmr_real_vocabulary_has_the_reference_ids(tmp_path: Path) -> None:
    """720 texts in 12 languages with XLM-R's own 250,002 entries, behind tiny weights.

    RERANK_XLMR_TOKENIZER names a directory with sentencepiece.bpe.model (of XLM-RoBERTa or bge-reranker-v2-m3) and
    golden-12-languages.jsonl.gz, lines of {"lang", "text", "ids"}: ids by Hugging Face tokenizers, no specials.
    """
    given_directory = os.environ.get("RERANK_XLMR_TOKENIZER")
    if not given_directory:
        pytest.skip("RERANK_XLMR_TOKENIZER does not name a directory with XLM-R's vocabulary and golden ids")
    directory = Path(given_directory)
    checkpoint = make_xlmr(tmp_path / "checkpoint", hidden_size=64, layers=1, tokenizer_dir=directory, dtype="float16")
    (file,) = convert(checkpoint, tmp_path / "out", "F16")
    engine = load_engine(file, max_length=4096, ubatch=32)
    with gzip.open(directory / "golden-12-languages.jsonl.gz", "rt", encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    different = [sample for sample in samples if passage_ids(engine, sample["text"], 1) != sample["ids"]]
    engine.close()
    assert len(samples) == 720
    assert not different, f"{len(different)} texts differ, the first in {different[0]['lang']}: {different[0]['text']}"


def kept_bytes(action: Callable[[], object]) -> int:
    """Memory that is still there after it."""
    tracemalloc.start()
    action()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept


def test_wordpiece_keeps_no_long_words() -> None:
    """Would break: thirty words of 3 MB, and the server has 100 MB less."""
    tokenize = rerank_server.WordPieceTokenizer(["[UNK]", "▁a", "a"], 0, True, True)
    assert kept_bytes(lambda: [tokenize(f"{n}" + "a" * 300_000) for n in range(30)]) < 500_000


def test_wordpiece_keeps_a_bounded_number_of_words_and_characters() -> None:
    """Would break: every word and every code point that was ever seen stays in memory."""
    tokenize = rerank_server.WordPieceTokenizer(["[UNK]", "▁a", "a"], 0, True, True)
    words = [f"{n:x}".rjust(100, "a") for n in range(40_000)]
    assert kept_bytes(lambda: [tokenize(word) for word in words]) < 30_000_000
    every = [chr(code) for code in range(0x20, 0x110000) if not 0xD800 <= code < 0xE000]
    assert kept_bytes(lambda: [tokenize("".join(every[n : n + 1000])) for n in range(0, len(every), 1000)]) < 10_000_000
    assert tokenize("a aa") == [1, 1, 2], "and the words are still right"
