"""The tokenizers: the published WordPiece's ids, hand-worked vocabularies and merges, a slow BPE that recounts all."""
import collections
import doctest
import io
import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import data

GOLDEN = Path(os.environ.get("GOLDEN") or Path(__file__).parent / "golden")
TEXTS = ["a dog runs on the grass", "A brown dog, running!", "two dogs & a cat's ball", "the dog is on the left",
         "하트가 별의 위에 있다",
         "빨간색 별과 원", "the 3 cats", "grass, more grass"] * 2


def normal(text):
    """What byte-level BPE promises to give back."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


# === WordPiece =======================================================================================================

def test_golden_token_ids_of_bert_wordpiece():
    if "VOCAB" not in os.environ:
        pytest.skip("set VOCAB to the folder with bert-base-uncased-vocab.txt to compare with the published token ids")
    golden = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    tokenizer = data.WordPiece.from_file(Path(os.environ["VOCAB"]) / "bert-base-uncased-vocab.txt")
    assert len(tokenizer) == 30522 and len(golden["texts"]) > 60
    wrong = [text for text, ids in zip(golden["texts"], golden["bert"], strict=True)
             if [tokenizer.start_id, *tokenizer.encode(text)[:126], tokenizer.end_id] != ids]
    assert wrong == []


VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "!", "cafe", "##s", "dog", "'", "s",
         "a", "ab",
         "##b", "##a", "猫", ",", "-", "두", "##두"]


@pytest.mark.parametrize("text, pieces", [
    ("unaffable", "un ##aff ##able"),
    ("UNAFFABLE!Un", "un ##aff ##able ! un"),        # lower case; punctuation is a word of its own
    ("dog's dog-dog,", "dog ' s dog - dog ,"),
    ("dogs", "dog ##s"),
    ("ab abb aab", "ab ab ##b a ##a ##b"),           # the longest piece first
    ("unx dog", "[UNK] dog"),                        # a rest that nothing matches spoils the whole word
    ("affable", "[UNK]"),                            # a ## piece starts no word
    ("Cafés cafe\u0301", "cafe ##s cafe"),           # accents go, composed or not
    ("猫猫dog", "猫 猫 dog"),                          # Chinese characters stand alone
    (unicodedata.normalize("NFC", "두두"), "[UNK]"),  # NFD takes Hangul apart, as BERT does, for good
    (" dog\t\ndog\u00a0dog\u3000", "dog dog dog"),
    ("d\u200bo\u00adg\x00 \ufffd", "dog"),           # zero-width, soft hyphen, NUL, replacement character
    ("[SEP] dog[MASK]", "[SEP] dog [MASK]"),
    ("[sep]", "[UNK] [UNK] [UNK]"),
    ("a" * 100, "a " + "##a " * 99),
    ("a" * 101, "[UNK]"),
    ("", ""),
])
def test_wordpiece_on_hand_worked_cases(text, pieces):
    tokenizer = data.WordPiece(VOCAB)
    assert [VOCAB[i] for i in tokenizer.encode(text)] == pieces.split()
    assert tokenizer.encode(text) == tokenizer.encode(text)  # the second time from its cache of words


def test_wordpiece_special_ids_and_decoding():
    tokenizer = data.WordPiece(VOCAB[::-1])
    last = len(VOCAB) - 1
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.start_id, tokenizer.end_id) == (last, last - 1, last - 2,
                                                                                          last - 3)
    assert tokenizer.decode(tokenizer.encode("Dogs unaffable") + [tokenizer.pad_id] * 2) == "dogs unaffable"


def test_cased_wordpiece_keeps_case_and_accents():
    tokenizer = data.WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Dog", "é"], lower=False)
    assert tokenizer.encode("Dog dog é É") == [4, 1, 5, 1]
    assert data.tokenizer_from(tokenizer.state()).encode("Dog dog é É") == [4, 1, 5, 1]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_wordpiece_reads_a_vocabulary_file_line_by_line(tmp_path, newline):
    lines = VOCAB + ["\u2028", "\x85", "ü"]  # line separators that only splitlines() would split at
    (tmp_path / "vocab.txt").write_bytes(newline.join([*lines, ""]).encode())
    tokenizer = data.WordPiece.from_file(tmp_path / "vocab.txt")
    assert tokenizer.vocab == lines


def test_wrong_vocabulary_file_is_named_as_such(tmp_path):
    (tmp_path / "vocab.txt").write_text("#version: 0.2\ni n\nt h\n[PAD]\n")
    with pytest.raises(data.UserError, match=r"no WordPiece vocabulary: \[UNK\], \[CLS\], \[SEP\] not among its 4"):
        data.WordPiece.from_file(tmp_path / "vocab.txt")


# === byte-pair encoding ==============================================================================================

def slow_train(texts, vocab_size):
    """Count all pairs anew for every merge; the most frequent wins, of several the smallest."""
    words = [[4 + b for b in word.encode()] for text in texts for word in data.BPE.words(text)]
    merges = []
    while 260 + len(merges) < vocab_size:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [replaced(word, best, 260 + len(merges)) for word in words]
        merges.append(best)
    return merges


def replaced(word, pair, new):
    out = []
    for symbol in word:
        out.append(symbol)
        while tuple(out[-2:]) == pair:
            out[-2:] = [new]
    return out


def test_bpe_hand_worked_merges():
    # ' ab' three times, ' abc' once: (' ', a) and (a, b) both 4 times, of which the pair of smaller ids first; then
    # (' a', b); (' ab', c) occurs only once and is not learnt.
    space, a, b, c = (4 + byte for byte in b" abc")
    tokenizer = data.BPE.train(["ab AB", "ab  abc"], vocab_size=300)
    assert tokenizer.merges == [(space, a), (260, b)] and len(tokenizer) == 262
    assert tokenizer.encode("abc ab b") == [261, c, 261, space, b]
    assert tokenizer.symbols[260:] == [b" a", b" ab"]


def test_bpe_merge_of_a_run_of_equal_symbols():
    assert data.merge([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]
    assert data.merge([1, 2, 3, 1, 2], (1, 2), 9) == [9, 3, 9]
    assert data.merge([], (1, 2), 9) == []


def test_bpe_words_split_letters_digits_and_punctuation():
    assert data.BPE.words("Two dogs, it's 2024!") == [" two", " dogs", ",", " it", "'", "s", " 2", "0", "2", "4", "!"]
    assert data.BPE.words("한 글_a") == [" 한", " 글", "_", "a"]


@pytest.mark.parametrize("vocab_size", [264, 290, 10_000])
def test_bpe_training_finds_the_merges_of_the_slow_way(vocab_size):
    assert data.BPE.train(TEXTS, vocab_size).merges == slow_train(TEXTS, vocab_size)


def test_bpe_training_finds_the_merges_of_the_slow_way_on_random_words():
    rng = random.Random(0)
    for _ in range(20):  # two letters: long runs and many ties
        texts = ["".join(rng.choices("ab ", (5, 3, 1), k=rng.randrange(40))) for _ in range(8)]
        assert data.BPE.train(texts, 290).merges == slow_train(texts, 290), texts


def test_bpe_encoding_applies_the_merges_in_their_order():
    tokenizer = data.BPE.train(TEXTS, 330)
    for text in TEXTS + ["an unseen doggy grassland 하트별", "aaaa bbb gras ss"]:
        expected = []
        for word in tokenizer.words(text):
            symbols = [4 + byte for byte in word.encode()]
            for rank, pair in enumerate(tokenizer.merges):
                symbols = data.merge(symbols, pair, 260 + rank)
            expected += symbols
        assert tokenizer.encode(text) == expected == tokenizer.encode(text)


def test_bpe_vocabulary_size_is_exact_or_what_the_text_gives():
    assert len(data.BPE.train(TEXTS, 300)) == 300
    assert len(data.BPE.train([], 300)) == 260
    tokenizer = data.BPE.train(TEXTS, 300)
    assert max(max(tokenizer.encode(text)) for text in TEXTS) == 299


@pytest.mark.parametrize("text", [
    "a dog runs", "  Spaces\t and\nLINES ", "한국어 문장도 된다: 하트가 별의 위에 있다.", unicodedata.normalize("NFD", "하트와 café"),
    "emoji 😀 👨\u200d👩\u200d👧 🇰🇷", "½ ² Ⅷ ① ʰ ª", "_under__score_ a_b", "İstanbul ß ŉ", "\x00\x07\x7f",
    "e\u0301\u0323 \u0301", "ａｂｃ、。",
    "", " ", "a" * 5000])
def test_bpe_gives_every_text_back(text):
    for tokenizer in (data.BPE([]), data.BPE.train(TEXTS, 400)):
        assert tokenizer.decode(tokenizer.encode(text)) == normal(text)


def test_bpe_gives_random_unicode_back():
    rng, tokenizer = random.Random(0), data.BPE.train(TEXTS, 400)
    for _ in range(200):
        points = [rng.randrange(rng.choice((0x80, 0x3000, 0xD800, 0x110000))) for _ in range(30)]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)  # all but surrogates
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == normal(text), ascii(text)
        assert all(4 <= i < len(tokenizer) for i in ids)  # never pad, start, end or mask


def test_bpe_training_is_the_same_in_a_process_with_another_hash_seed():
    code = ("import sys, json; sys.path.insert(0, sys.argv[1]); import data; "
            "print(json.dumps(data.BPE.train(json.loads(sys.argv[2]), 400).merges))")
    root = str(Path(data.__file__).parent)
    seed = "4321" if os.environ.get("PYTHONHASHSEED") != "4321" else "1"
    out = subprocess.run([sys.executable, "-c", code, root, json.dumps(TEXTS)], env=os.environ
                         | {"PYTHONHASHSEED": seed},
                         check=True, capture_output=True, text=True).stdout
    assert [tuple(pair) for pair in json.loads(out)] == data.BPE.train(TEXTS, 400).merges


# === both ============================================================================================================

@pytest.mark.parametrize("tokenizer", [data.BPE.train(TEXTS, 300), data.WordPiece(VOCAB)], ids=["bpe", "wordpiece"])
def test_tokenizer_comes_back_from_its_state_in_a_checkpoint(tokenizer):
    file = io.BytesIO()
    torch.save(tokenizer.state(), file)
    file.seek(0)
    again = data.tokenizer_from(torch.load(file, weights_only=True))  # plain types only
    assert type(again) is type(tokenizer) and len(again) == len(tokenizer) and again.state() == tokenizer.state()
    assert (again.pad_id, again.start_id, again.end_id) == (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_unknown_kind_of_tokenizer_lists_the_known():
    with pytest.raises(data.UserError, match="'unigram'; known: bpe, wordpiece"):
        data.tokenizer_from({"kind": "unigram"})


def test_doctests_of_data():
    result = doctest.testmod(data)
    assert result.failed == 0 and result.attempted >= 3
