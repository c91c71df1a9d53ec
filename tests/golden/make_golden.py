"""Asks the reference implementations for token ids, pairs and logits; writes a JSON file for each architecture.

Run by hand, with torch, transformers, tokenizers, sentencepiece and protobuf (the `reference` extra); the JSON files
are committed, so the tests need none of these:

    python tests/golden/make_golden.py [xlmr|bert|bi|gemma|qwen3|qwen2|zerank|modernbert ...]

What the reference is:
- Token ids: the Hugging Face tokenizers of the real models, with one deliberate difference: a control string inside a
  text ("</s>", "<bos>", "[SEP]") is text (`encode_special_tokens`), because a passage must not steer the model.
- Pairs and logits: FlagEmbedding 1.4.2, `FlagReranker` and `FlagLLMReranker` (with transformers 4, where pairs are
  put together from ids; its fallback for transformers 5 decodes the ids and tokenises once more, which changes them).
  qwen3: the code of Qwen3-Reranker's model card. qwen2: mxbai_rerank 0.1.6. zerank: zerank-1-small's own
  modeling_zeranker.py, cut as sentence-transformers 6.2 does, which puts the chat template's last tokens back over the
  end of what it cut. modernbert: pairs as FlagReranker.
- Models: transformers, float32, eager attention, one pair at a time, so that neither padding nor the order matters.
"""
from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import generate_merges

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checkpoints import (  # noqa: E402
    make_bert,
    make_bi,
    make_gemma,
    make_modernbert,
    make_qwen2,
    make_qwen3,
    make_xlmr,
    make_zerank,
)

from golden.inputs import (  # noqa: E402
    CUT_PAIRS,
    MAX_LENGTHS,
    SCORED_PAIRS,
    TEXTS,
    ScoredPair,
    compact,
    fingerprint,
)

Encode = Callable[[str], list[int]]
BuildPair = Callable[[str, str, int], list[int]]  # query, passage, max_length
Score = Callable[[list[int], ScoredPair], float]

GEMMA_PROMPT = ("Given a query A and a passage B, determine whether the passage contains an answer to the query by "
                "providing a prediction of either 'Yes' or 'No'.")


def text_only(tokenizer: Tokenizer) -> Encode:
    """The ids of a text without specials, control strings in it taken as text."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def cut_second(first: int, second: list[int], max_length: int) -> list[int]:
    """transformers' truncation="only_second": `second` shortened so that first + len(second) <= max_length.

    It refuses to remove all of `second` (the pair stays too long); no input here gets there.
    """
    excess = max(0, first + len(second) - max_length)
    assert excess == 0 or excess < len(second)
    return second[:len(second) - excess]


def encoder_pair(encode: Encode, cls: int, middle: list[int], sep: int) -> BuildPair:
    """FlagReranker: the query cut to 3/4 of max_length, the passage to max_length, then only the passage."""
    def build(query: str, passage: str, max_length: int) -> list[int]:
        q, p = encode(query)[:max_length * 3 // 4], encode(passage)[:max_length]
        p = cut_second(len(q) + len(middle) + 2, p, max_length)
        return [cls, *q, *middle, *p, sep]
    return build


def gemma_pair(encode: Encode, bos: int) -> BuildPair:
    """FlagLLMReranker: five parts tokenised separately; separator and prompt are appended after the cut."""
    def build(query: str, passage: str, max_length: int) -> list[int]:
        sep, prompt = encode("\n"), encode(GEMMA_PROMPT)
        first = [bos, *encode("A: " + query)[:max_length * 3 // 4]]
        second = sep + encode("B: " + passage)[:max_length]
        return first + cut_second(len(first), second, max_length + len(sep) + len(prompt)) + sep + prompt
    return build


def write_golden(name: str, passage_ids: Encode, build: BuildPair, max_tokens: int, score: Score,
                 ids_after_passage: int = 1) -> None:
    """texts: the ids of each text's passage part, which `ids_after_passage` more follow in a pair.
    pairs: whole pairs at each max_length, "whole" without a limit."""
    lengths = {str(n): n for n in MAX_LENGTHS if n <= max_tokens} | {"whole": 10**6}
    logits = []
    for pair in SCORED_PAIRS:
        ids = build(pair.query, pair.passage, min(pair.max_length, max_tokens))
        logits.append(round(score(ids, pair), 6))
    golden = {
        "inputs": fingerprint(),
        "made_with": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers, sentencepiece)},
        "ids_after_passage": ids_after_passage,
        "texts": {key: compact(passage_ids(text)) for key, text in TEXTS.items()},
        "pairs": {key: {name: compact(build(query, passage, n)) for name, n in lengths.items()}
                  for key, (query, passage) in CUT_PAIRS.items()},
        "logits": logits,
    }
    save(name, golden)
    print(f"{name}: {len(TEXTS)} texts, logits {min(logits):.2f} to {max(logits):.2f}, "
          f"standard deviation {torch.tensor(logits).std():.2f}")


def save(name: str, golden: dict[str, Any]) -> None:
    """One line for each text, pair and length: compact, and a change can be read in a diff."""
    lines = []
    for key, value in golden.items():
        if isinstance(value, dict) and key in ("texts", "pairs"):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def eager(model_class: Any, directory: Path) -> Any:
    return model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def sentencepiece_encode(model: Path) -> Encode:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return lambda text: list(processor.encode(text))


@functools.cache
def report_once(line: str) -> None:
    print(line)


def report_difference(name: str, text: str, ids: list[int], own: list[int]) -> None:
    report_once(f"{name}: tokenizers and sentencepiece differ for {text[:60]!r}\n  {ids[:40]}\n  {own[:40]}")


def xlmr(directory: Path) -> None:
    make_xlmr(directory)
    encode = xlmr_encode(directory)
    model = eager(transformers.XLMRobertaForSequenceClassification, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    write_golden("xlmr", encode, encoder_pair(encode, 0, [2, 2], 2), 8192, score)


def xlmr_encode(directory: Path) -> Encode:
    """The Hugging Face tokenizer, except where it finds a control token inside a text.

    Its Unigram model looks up every piece of the vocabulary in a text, "</s>" among them, even with
    `encode_special_tokens`; sentencepiece itself never does, so its ids (plus 1: fairseq's order) are taken there.
    """
    fast = text_only(transformers.XLMRobertaTokenizer.from_pretrained(directory).backend_tokenizer)
    plain = sentencepiece_encode(directory / "sentencepiece.bpe.model")
    mask = json.loads((directory / "config.json").read_text())["vocab_size"] - 1

    def encode(text: str) -> list[int]:
        ids, own = fast(text), [3 if n == 0 else n + 1 for n in plain(text)]
        if ids != own:
            report_difference("xlmr", text, ids, own)
        return own if {0, 1, 2, mask} & set(ids) else ids
    return encode


def bert(directory: Path) -> None:
    make_bert(directory)
    encode = text_only(transformers.BertTokenizer.from_pretrained(directory).backend_tokenizer)
    model = eager(transformers.BertForSequenceClassification, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        start = ids.index(102) + 1  # the passage part: token type 1
        types = torch.tensor([[int(n >= start) for n in range(len(ids))]])
        return float(model(input_ids=torch.tensor([ids]), token_type_ids=types).logits[0, 0])

    write_golden("bert", encode, encoder_pair(encode, 101, [102], 102), 512, score)


def bi(directory: Path) -> None:
    """all-MiniLM-L6-v2's recipe (sentence-transformers): each text alone, cut to max_seq_length with its specials."""
    make_bi(directory)
    encode = text_only(transformers.BertTokenizer.from_pretrained(directory).backend_tokenizer)
    model = eager(transformers.BertModel, directory)

    def build(_query: str, passage: str, max_length: int) -> list[int]:
        return [101, *encode(passage)[:min(max_length, 128) - 2], 102]

    def embed(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)

    def score(ids: list[int], pair: ScoredPair) -> float:
        return float(torch.cosine_similarity(embed(build("", pair.query, 128)), embed(ids), dim=0))

    write_golden("bi", lambda text: encode(text)[:126], build, 128, score)


def gemma(directory: Path) -> None:
    make_gemma(directory)
    encode = gemma_encode(directory)
    yes = encode("Yes")[0]
    model = eager(transformers.GemmaForCausalLM, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        return float(model(input_ids=torch.tensor([ids])).logits[0, -1, yes])

    write_golden("gemma", lambda text: encode("B: " + text), gemma_pair(encode, bos=2), 8192, score,
                 ids_after_passage=len(encode("\n") + encode(GEMMA_PROMPT)))


def gemma_encode(directory: Path) -> Encode:
    """Gemma 1's tokenizer.json, made from tokenizer.model: BPE with byte fallback, spaces as U+2581.

    Its only added tokens are <pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn>; the user-defined pieces (newlines,
    spaces, tags, <unused5>) are ordinary entries, found by merges or not at all.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    scores = [(processor.id_to_piece(n), processor.get_score(n)) for n in range(processor.get_piece_size())]
    ids = {piece: n for n, (piece, _) in enumerate(scores)}
    if "\t" not in ids:  # as transformers' GemmaConverter does: the tab takes the place of its byte
        scores[ids["<0x09>"]] = ("\t", 0.0)
        ids["\t"] = ids.pop("<0x09>")
    merges = generate_merges(ids, scores)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast, plain = text_only(tokenizer), sentencepiece_encode(directory / "tokenizer.model")

    def encode(text: str) -> list[int]:
        if fast(text) != plain(text):
            report_difference("gemma", text, fast(text), plain(text))
        return fast(text)
    return encode


def bpe_encode(directory: Path) -> tuple[Encode, Encode]:
    """(ids of a text, ids of the prompt's own words, in which special tokens are read).

    <|fim_prefix|> and its like are not special in Qwen's tokenizer.json, but they steer a model as the others do, so
    here they are: a passage that holds one of them holds its letters.
    """
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] |= token["content"].startswith("<|")
    template = Tokenizer.from_str(json.dumps(content))
    return text_only(Tokenizer.from_str(json.dumps(content))), \
        lambda text: list(template.encode(text, add_special_tokens=False).ids)


def qwen3(directory: Path) -> None:
    """The model card of Qwen/Qwen3-Reranker-0.6B: format_instruction, process_inputs, compute_logits."""
    make_qwen3(directory)
    encode, template = bpe_encode(directory)
    prefix = template(
        '<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and '
        'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        '<|im_start|>user\n')
    suffix = template("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    task = "Given a web search query, retrieve relevant passages that answer the query"

    def build(query: str, passage: str, max_length: int) -> list[int]:
        body = encode(f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {passage}")
        whole = prefix + body
        return whole[:max(0, max_length - len(suffix))] + suffix

    yes, no = template("yes")[0], template("no")[0]
    model = eager(transformers.Qwen3ForCausalLM, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        return float(logits[yes] - logits[no])

    write_golden("qwen3", lambda text: encode(" " + text), build, 32768, score, ids_after_passage=len(suffix))


def qwen2(directory: Path) -> None:
    """mxbai_rerank 0.1.6, MxbaiRerankV2: prepare_predefined_inputs, prepare_inputs, forward."""
    make_qwen2(directory)
    encode, template = bpe_encode(directory)
    sep = template("\n")
    prefix = template("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
                      "You are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    task = template(
        "You are a search relevance expert who evaluates how well documents match search queries. For "
        "each query-document pair, carefully analyze the semantic relationship between them, then provide "
        "your binary relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:")
    suffix = template("<|im_end|>\n<|im_start|>assistant\n")

    def build(query: str, passage: str, max_length: int) -> list[int]:
        first = encode(f"query: {query}")[:max_length * 3 // 4]
        second = sep + encode(f"document: {passage}")[:max_length]
        return [*prefix, *first, *cut_second(len(first), second, max_length), *sep, *task, *suffix]

    yes, no = template("1")[0], template("0")[0]
    model = eager(transformers.Qwen2ForCausalLM, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        return float(logits[yes] - logits[no])

    write_golden("qwen2", lambda text: encode("document: " + text), build, 32768, score,
                 ids_after_passage=len(sep + task + suffix))


def zerank(directory: Path) -> None:
    """zeroentropy/zerank-1-small: query and passage are the system's and the user's message of Qwen's chat template."""
    directory = make_zerank(directory)
    encode, template = bpe_encode(directory)
    start, middle = template("<|im_start|>"), template("<|im_end|>\n<|im_start|>")
    suffix = template("<|im_end|>\n<|im_start|>assistant\n")

    def build(query: str, passage: str, max_length: int) -> list[int]:
        asked, told = encode(f"system\n{query.strip()}"), encode(f"user\n{passage.strip()}")
        rendered = [*start, *asked, *middle, *told]
        return rendered[:max(0, max_length - len(suffix))] + suffix

    yes = template("Yes")[0]
    model = eager(transformers.Qwen3ForCausalLM, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        return float(model(input_ids=torch.tensor([ids])).logits[0, -1, yes]) / 5.0

    write_golden("zerank", lambda text: encode(f"user\n{text.strip()}")[1:], build, 32768, score,
                 ids_after_passage=len(suffix))


def modernbert(directory: Path) -> None:
    make_modernbert(directory)
    encode, template = bpe_encode(directory)
    (cls,), (sep,) = template("[CLS]"), template("[SEP]")
    model = eager(transformers.ModernBertForSequenceClassification, directory)

    def score(ids: list[int], _pair: ScoredPair) -> float:
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    write_golden("modernbert", encode, encoder_pair(encode, cls, [sep], sep), 8192, score)


def main(names: list[str]) -> None:
    for make in (xlmr, bert, bi, gemma, qwen3, qwen2, zerank, modernbert):
        if not names or make.__name__ in names:
            with tempfile.TemporaryDirectory() as directory, torch.no_grad():
                make(Path(directory))


if __name__ == "__main__":
    main(sys.argv[1:])
