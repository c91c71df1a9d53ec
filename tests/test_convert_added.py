"""A token that a fine-tune added has its id in the server, or its checkpoint is refused by name.

Left out, it makes other ids of every text that holds it, and every such score is wrong without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import add_token, make_bert, make_gemma, make_xlmr, write_json, write_tokenizer_json
from conftest import convert, load_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.errors import ConvertError
from convert.gguf_file import GgufFile
from convert.job import Job

MAKERS: dict[str, Callable[..., Path]] = {"xlmr": make_xlmr, "gemma": make_gemma, "bert": make_bert}
WORDS = ["covidx", "<doc>", "C++x"]


@pytest.mark.parametrize("architecture", ["xlmr", "gemma"])
@pytest.mark.parametrize("has_sentencepiece", [True, False])
def test_an_added_token_has_the_references_id(architecture: str, has_sentencepiece: bool, tmp_path: Path) -> None:
    """With tokenizer.json alone, and beside the file of the base model, which does not hold the token."""
    checkpoint = MAKERS[architecture](tmp_path / "tiny")
    added = [add_token(checkpoint, word) for word in WORDS]
    if not has_sentencepiece:
        (next(iter(checkpoint.glob("*.model")))).unlink()
    encode = Job.open(checkpoint).pairs.encode
    (file,) = convert(checkpoint, tmp_path / "out", "F32")
    engine = load_engine(file, 512)
    texts = ["about covidx today", "covidx", "covidxcovidx", "xcovidxy,covidx.", " covidx  <doc>\tCOVIDX", "covid x",
             "<doc>Größe, 東京</doc>", "C++x C++ <doc"]  # fmt: skip
    made = st.lists(st.sampled_from([*WORDS, "covid", "<", "doc", ">", " ", "  ", "C", "+", "é", "東"]) |
                    st.text(st.characters(max_codepoint=0x7E, min_codepoint=0x20), max_size=4), max_size=9)

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(made)
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        assert engine.pairs._tokenize(text) == encode(text)

    try:
        for text in texts:
            assert engine.pairs._tokenize(text) == encode(text), text
        assert added[0] in encode("about covidx today")
        check()
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ["xlmr", "gemma"])
def test_the_check_pairs_hold_the_added_tokens(architecture: str, tmp_path: Path) -> None:
    """The pair that the server checks when it opens a file, and those that are compared at conversion: otherwise a
    file whose tokenizer lost such a token passes as "24/24 ids equal"."""
    checkpoint = MAKERS[architecture](tmp_path / "tiny")
    added = {add_token(checkpoint, word) for word in WORDS}
    (file,) = convert(checkpoint, tmp_path / "out", "Q8_0")
    metadata = GgufFile.open(file).metadata
    assert added <= set(metadata["rerank.check_ids"])
    verification = json.loads(metadata["rerank.verification"])
    assert verification["token_ids_equal"] == verification["pairs"] > 24


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "BERT": ("bert", {}, "would not be found"),
    "BERT, special": ("bert", {"special": True}, "would not be found"),
    "special": ("xlmr", {"special": True}, "is special"),
    "special, Gemma": ("gemma", {"special": True}, "is special"),
    "normalised": ("xlmr", {"normalized": True}, "normalised text"),
    "lstrip": ("xlmr", {"lstrip": True}, "lstrip"),
    "rstrip": ("gemma", {"rstrip": True}, "rstrip"),
    "whole words": ("gemma", {"single_word": True}, "single_word"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_do_with_a_token_is_refused_by_name(name: str, tmp_path: Path) -> None:
    architecture, flags, reason = REFUSED[name]
    checkpoint = MAKERS[architecture](tmp_path / "tiny")
    add_token(checkpoint, "covidx", **flags)
    with pytest.raises(ConvertError, match=f"added token 'covidx' .*{reason}"):
        Job.open(checkpoint)


@pytest.mark.parametrize("architecture", MAKERS)
def test_a_token_is_not_lost_in_another_file(architecture: str, tmp_path: Path) -> None:
    """Older versions of transformers write added_tokens.json, newer ones tokenizer_config.json."""
    checkpoint = MAKERS[architecture](tmp_path / "tiny")
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    write_json(checkpoint / "added_tokens.json", {"covidx": size})
    with pytest.raises(ConvertError, match=r"added_tokens\.json: the added token 'covidx'"):
        Job.open(checkpoint)
    (checkpoint / "added_tokens.json").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | {str(size): {"content": "covidx"}}
    write_json(checkpoint / "tokenizer_config.json", config)
    with pytest.raises(ConvertError, match=r"tokenizer_config\.json: the added token 'covidx'"):
        Job.open(checkpoint)
    del config["added_tokens_decoder"]
    write_json(checkpoint / "tokenizer_config.json", config | {"additional_special_tokens": ["covidx"]})
    with pytest.raises(ConvertError, match=r"tokenizer_config\.json: the added token 'covidx'"):
        Job.open(checkpoint)


def test_tokens_that_may_overlap_are_refused(tmp_path: Path) -> None:
    """tokenizers cuts "abcd" at the token that comes first, llama.cpp at the longer one."""
    checkpoint = make_xlmr(tmp_path / "tiny")
    add_token(checkpoint, "ab")
    add_token(checkpoint, "bcd")
    with pytest.raises(ConvertError, match="'ab' and 'bcd' may overlap"):
        Job.open(checkpoint)


def test_an_ordinary_piece_that_is_also_an_added_token_is_found_inside_words(tmp_path: Path) -> None:
    """add_tokens() of a word that the vocabulary has gives no new id, but the reference then cuts words at it."""
    checkpoint = make_gemma(tmp_path / "tiny")
    write_tokenizer_json(checkpoint)
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    piece = next(piece for piece in vocabulary if len(piece) == 3 and piece.isalpha() and piece.isascii())
    content["added_tokens"] = [{"id": vocabulary[piece], "content": piece, "single_word": False, "lstrip": False,
                                "rstrip": False, "normalized": False, "special": False}]  # fmt: skip
    write_json(checkpoint / "tokenizer.json", content)
    job = Job.open(checkpoint)
    (file,) = convert(checkpoint, tmp_path / "out", "F32")
    engine = load_engine(file, 512)
    for text in (piece, f"a{piece}b", f"a {piece}{piece} b"):
        assert engine.pairs._tokenize(text) == job.pairs.encode(text)
    engine.close()


def test_a_token_whose_id_is_another_ones_is_refused(tmp_path: Path) -> None:
    checkpoint = make_xlmr(tmp_path / "tiny")
    add_token(checkpoint, "covidx")
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["added_tokens"][0]["id"] = 700
    write_json(checkpoint / "tokenizer.json", content)
    with pytest.raises(ConvertError, match="'covidx' has id 700, which is"):
        Job.open(checkpoint)
