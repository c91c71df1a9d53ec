"""Trains the five tiny tokenizers in tests/golden/tokenizers/ from corpus.txt (text written for this project).

Run once, by hand, with `sentencepiece`, `protobuf` and `tokenizers` installed; the files it writes are committed:

    python tests/golden/train_tokenizers.py

Each has the layout of the real one, so that a converter meets the same traps:

    xlmr/sentencepiece.bpe.model   unigram, nmt_nfkc; ids unk, <s>, </s> = 0, 1, 2, which Hugging Face realigns to
                                   <s> <pad> </s> <unk> = 0 1 2 3, the rest plus 1, <mask> last (fairseq's order)
    gemma/tokenizer.model          BPE, identity normalisation, no dummy prefix, byte fallback, digits split;
                                   pad, eos, bos, unk = 0 1 2 3 and the user-defined pieces of Gemma 1
    bert/vocab.txt                 WordPiece, lower case, accents stripped; [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102
    qwen/tokenizer.json            byte-level BPE after NFC and Qwen's regular expression; the added tokens of Qwen3, of
                                   which <think> and <tool_call> are not special
    modernbert/tokenizer.json      byte-level BPE after NFC and GPT-2's regular expression; runs of spaces are added
                                   tokens that are not special; [CLS] text [SEP]
"""
from __future__ import annotations

import collections
import io
import string
import unicodedata
from pathlib import Path

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
OUT = HERE / "tokenizers"
XLMR_PIECES = 1500
GEMMA_PIECES = 1900  # 256 bytes and about 200 user-defined pieces among them
BPE_TOKENS = 1000  # 256 bytes among them, without the added tokens
QWEN_SPLIT = (  # the pre-tokenizer of Qwen2's and Qwen3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the prompts of the models are made of, so that they are a few tokens here as well, and each answer is one.
PROMPT_LINES = [
    "system\nuser\nassistant\n\n<Instruct>: Given a web search query, retrieve relevant passages that "
    "answer the query",
    "\n<Query>: \n<Document>: yes no Yes No 1 0\nyes\nno\nYes\nNo\nquery: document: instruction: Relevance:",
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no". '
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a search relevance expert who evaluates how well documents match search queries. For "
    "each query-document pair, carefully analyze the semantic relationship between them, then provide "
    "your binary relevance judgment",
]


def corpus_lines() -> list[str]:
    return (HERE / "corpus.txt").read_text(encoding="utf-8").splitlines()


def train_xlmr() -> bytes:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_lines()), model_writer=model, model_type="unigram", vocab_size=XLMR_PIECES,
        hard_vocab_limit=False, character_coverage=1.0, normalization_rule_name="nmt_nfkc",
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    return without_trainer_paths(model.getvalue())


def gemma_user_pieces() -> list[str]:
    """Gemma 1's user-defined pieces, ids 4 to 216: control-like strings, runs of newlines and spaces, HTML tags."""
    tags = ["table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"]
    more = ["h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code"]
    return (["<mask>", "<2mass>", "[@BOS@]"] + [f"<unused{n}>" for n in range(99)]
            + ["<start_of_turn>", "<end_of_turn>"]
            + ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
            + [f"<{t}>" for t in tags] + [f"</{t}>" for t in tags]
            + [f"<{t}>" for t in more] + [f"</{t}>" for t in more])


def train_gemma() -> bytes:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_lines()), model_writer=model, model_type="bpe", vocab_size=GEMMA_PIECES,
        character_coverage=1.0, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        required_chars="".join(map(chr, range(33, 127))), user_defined_symbols=gemma_user_pieces(),
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", num_threads=1, minloglevel=2)
    return without_trainer_paths(model.getvalue())


def without_trainer_paths(model: bytes) -> bytes:
    """The same model without the file names of the training run: same bytes on any machine."""
    proto = spm_pb2.ModelProto.FromString(model)
    proto.trainer_spec.ClearField("input")
    proto.trainer_spec.ClearField("model_prefix")
    return bytes(proto.SerializeToString(deterministic=True))


def bert_words() -> collections.Counter[str]:
    """Words as BERT's basic tokenizer sees them: lower case, accents stripped, CJK ideographs alone."""
    text = unicodedata.normalize("NFD", " ".join(corpus_lines()).lower())
    text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if "一" <= c <= "鿿" or unicodedata.category(c).startswith("P") else c for c in text)
    return collections.Counter(spaced.split())


def bert_vocabulary() -> list[str]:
    """[PAD], unused and special entries at BERT's ids, then characters, whole words, common starts and endings."""
    words = bert_words()
    ascii_lower = {chr(n) for n in range(33, 127)} - set(string.ascii_uppercase)
    characters = sorted({c for word in words for c in word} | ascii_lower)
    starts = collections.Counter(w[:n] for w, k in words.items() for n in (2, 3, 4) if len(w) > n for _ in range(k))
    ends = collections.Counter(w[-n:] for w, k in words.items() for n in (2, 3, 4) if len(w) > n for _ in range(k))
    vocabulary = (["[PAD]"] + [f"[unused{n}]" for n in range(99)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
                  + characters + [f"##{c}" for c in characters]
                  + sorted(w for w in words if len(w) > 1)
                  + sorted(start for start, k in starts.items() if k >= 2)
                  + sorted(f"##{end}" for end, k in ends.items() if k >= 2))
    return list(dict.fromkeys(vocabulary))


def train_bpe(tokenizer: Tokenizer, added: list[AddedToken]) -> bytes:
    """Trains byte-level BPE in place; tokenizer has everything but its vocabulary. The added tokens come last."""
    trainer = trainers.BpeTrainer(vocab_size=BPE_TOKENS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus_lines() * 2 + PROMPT_LINES * 8, trainer)
    special, plain = ([token for token in added if token.special is wanted] for wanted in (True, False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    return (tokenizer.to_str(pretty=True) + "\n").encode()


def train_qwen() -> bytes:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
               "<|box_start|>", "<|box_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    plain = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
             "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    added = [AddedToken(text, special=True, normalized=False) for text in special]
    return train_bpe(tokenizer, added + [AddedToken(text, special=False, normalized=False) for text in plain])


def train_modernbert() -> bytes:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|padding|>", "<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    plain = ["|||IP_ADDRESS|||", *(" " * n for n in range(24, 1, -1)), "|||EMAIL_ADDRESS|||",
             *(f"[unused{n}]" for n in range(4))]
    added = [AddedToken(text, special=True, normalized=False) for text in special]
    added.append(AddedToken("[MASK]", special=True, normalized=False, lstrip=True))
    train_bpe(tokenizer, added + [AddedToken(text, special=False, normalized=True) for text in plain])
    cls, sep = (f"[{name}]" for name in ("CLS", "SEP"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in (cls, sep)])
    return (tokenizer.to_str(pretty=True) + "\n").encode()


def main() -> None:
    files = {
        "xlmr/sentencepiece.bpe.model": train_xlmr(),
        "gemma/tokenizer.model": train_gemma(),
        "bert/vocab.txt": ("\n".join(bert_vocabulary()) + "\n").encode(),
        "qwen/tokenizer.json": train_qwen(),
        "modernbert/tokenizer.json": train_modernbert(),
    }
    for name, content in files.items():
        path = OUT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        print(f"{path.relative_to(HERE)}: {len(content):,} bytes")


if __name__ == "__main__":
    main()
