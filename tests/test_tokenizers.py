"""The tokenizers: published ids of WordPiece, CLIP, ProLIP and CLIPS, hand-worked cases, a slow BPE, all spellings."""
import collections
import doctest
import gzip
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


def test_golden_token_ids_of_clips_wordpiece():
    if "VOCAB" not in os.environ:
        pytest.skip("set VOCAB to the folder with bert-base-uncased-vocab.txt to compare with the published token ids")
    golden = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    path = Path(os.environ["VOCAB"]) / "bert-base-uncased-vocab.txt"
    tokenizer, plain = data.read_vocabulary("wordpiece-clips", path), data.read_vocabulary("wordpiece", path)
    rows = [[1, *tokenizer.encode(text)[:77], 2] for text in golden["texts"]]
    rows = [row + [0] * (79 - len(row)) + [101] for row in rows]
    assert len(rows) > 60 and [row for row, ids in zip(rows, golden["clips"], strict=True) if row != ids] == []
    assert any(tokenizer.encode(text) != plain.encode(text) for text in golden["texts"])  # the cleaning is felt


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


def test_wordpiece_of_clips_cleans_before_all_else(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCAB, ""]), encoding="utf-8")
    tokenizer, plain = (data.read_vocabulary(kind, tmp_path / "vocab.txt") for kind in ("wordpiece-clips", "wordpiece"))
    for text, pieces in (("ＤＯＧ’s", "dog ' s"), ("caf&eacute;s&#33;", "cafe ##s !"), ("[S&#69;P] dog", "[SEP] dog")):
        again = data.tokenizer_from(tokenizer.state())
        assert [VOCAB[i] for i in tokenizer.encode(text)] == pieces.split() == [VOCAB[i] for i in again.encode(text)]
        assert plain.encode(text) != tokenizer.encode(text) and not plain.state()["clean"]
        older = {key: value for key, value in plain.state().items() if key != "clean"}  # as it was once
        assert data.tokenizer_from(older).encode(text) == plain.encode(text)


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


# === CLIP's byte-pair encoding =======================================================================================

def test_golden_token_ids_of_clip():
    if "VOCAB" not in os.environ:
        pytest.skip("set VOCAB to the folder with bpe_simple_vocab_16e6.txt.gz to compare with the published token ids")
    golden = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    tokenizer = data.CLIPBPE.from_file(Path(os.environ["VOCAB"]) / "bpe_simple_vocab_16e6.txt.gz")
    assert (len(tokenizer), tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)
    assert len(golden["texts"]) > 60
    wrong = [text for text, ids in zip(golden["texts"], golden["clip"], strict=True)
             if [tokenizer.start_id, *tokenizer.encode(text)[:75], tokenizer.end_id] != ids]
    assert wrong == []


MERGES = ["l o", "lo w</w>", "lo w", "e r</w>", "low er</w>", "a a", "b c", "a b"]  # ids 512 to 519
CLIP = data.CLIPBPE(MERGES)


@pytest.mark.parametrize("text, pieces", [
    ("low LOW", "low</w> low</w>"),
    ("lower slow", "lower</w> s low</w>"),
    ("lo", "l o</w>"),                     # the last letter of a word is another symbol than the same letter inside
    ("lowlow", "low low</w>"),
    ("er ere", "er</w> e r e</w>"),
    ("aaaa aaaaa", "aa a a</w> aa aa a</w>"),
    ("abd abcd", "ab d</w> a bc d</w>"),   # "b c" stands before "a b" in the list, so that "a b" comes too late
    ("low,low!", "low</w> ,</w> low</w> !</w>"),
    ("", ""),
])
def test_clip_on_hand_worked_merges(text, pieces):
    assert [CLIP.pieces[i] for i in CLIP.encode(text)] == pieces.split()
    assert CLIP.encode(text) == CLIP.encode(text)  # the second time from its cache of words


def test_clip_ids_are_bytes_then_bytes_at_the_end_of_a_word_then_merges_then_the_two_marks():
    assert CLIP.encode("!a A bc") == [0 + 256, 97 - 33 + 256, 97 - 33 + 256, 98 - 33, 99 - 33 + 256]
    assert CLIP.encode("lower") == [512 + 4] and len(CLIP) == 512 + 8 + 2
    assert (CLIP.pad_id, CLIP.start_id, CLIP.end_id) == (0, 520, 521)
    empty = data.CLIPBPE([])
    assert (len(empty), empty.start_id, empty.end_id) == (514, 512, 513)


def test_clip_byte_alphabet():
    tokenizer = data.CLIPBPE([])
    itself = [byte for first, last in ((33, 126), (161, 172), (174, 255)) for byte in range(first, last + 1)]
    others = sorted(set(range(256)) - set(itself))
    assert tokenizer.pieces[:256] == [chr(i) for i in itself] + [chr(256 + i) for i in range(68)]
    assert tokenizer.pieces[256:512] == [piece + "</w>" for piece in tokenizer.pieces[:256]]
    assert [tokenizer.byte[piece] for piece in tokenizer.pieces[:256]] == itself + others
    assert tokenizer.encode("é") == [94 + 12 + 0xC3 - 174, 94 + 0xA9 - 161 + 256]  # UTF-8: C3 A9
    assert tokenizer.encode("한") == [106 + 0xED - 174, 188 + 34 + 0x95 - 128, 188 + 34 + 0x9C - 128 + 256]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("aé")] == ["a", "\ufffd", "\ufffd"]  # half a character each


@pytest.mark.parametrize("text, words", [
    ("Two dogs,it's 2024!", "two dogs , it 's 2 0 2 4 !"),             # numbers digit by digit
    ("x² 3½ ⅧⅨ① ٣٤", "x ² 3 ½ ⅷ ⅸ ① ٣ ٤"),
    ("don't I'll we've they're I'm he'd CAN'T", "don 't i 'll we 've they 're i 'm he 'd can 't"),
    ("o'clock 'tis dogs' 'sorry", "o ' clock 't is dogs ' 's orry"),   # an ending, even at the start of a word
    ("a_b __c (x.y) ...!?", "a _ b __ c ( x . y ) ...!?"),
    ("한글을 猫が abc한글", "한글을 猫が abc한글"),                        # letters of any script are one word
    ("hi😀👍! ❤️", "hi 😀👍! ❤️"),
    ("x\u0301y e\u0301", "x \u0301 y é"),                             # composed where there is such a letter
    ("İ ß ΑΣ", "i \u0307 ß ας"),
    ("<|endoftext <|x|>", "<| endoftext <| x |>"),
    # cleaning
    ("“it’s” ‘no’ ‛x‟ „y‚ ʼz", "\" it 's \" ' no ' ' x \" \" y ' ' z"),
    ("«a» ‹b› `c´ 5′ 6″", "« a » ‹ b › ` c ´ 5 ′ 6 ″"),                # no other quotes than the curly ones
    ("ＡＢＣ＇ｓ　１２！", "abc 's 1 2 !"),
    ("ｶﾞｰﾄﾞ ﾡ", "ガード ᄀ"),
    ("ﬁne ﬂuﬀ oﬃce waﬄe ﬆ Ĳ ǆ", "fine fluff office waffle st ij dž"),
    ("a &amp; b &lt;c&gt; &quot;&eacute;&quot;", 'a & b < c > " é "'),
    ("&amp;amp; &amp;lt; &amp;amp;lt;", "& < <"),
    ("it&#39;s it&#x2019;s it&rsquo;s &ldquo;", "it 's it 's it 's \""),
    ("&copy 2020 AT&T x&y &notaword; &;", "© 2 0 2 0 at & t x & y ¬ aword ; &;"),
    ("<b>it’s it&rsquo;s</b>", "< b > it 's it ’ s </ b >"),           # with tags: entities last, quotes stay
    ("\ta\r\nb\x0bc\u2028d\u2029e\u3000f\u00a0g ", "a bc d e f g"),
    ("d\x00o\x07g\x7f \ufeffx\ufffc\u206a", "dog x"),
    ("a\u200bb a\u00adb \ufffd", "a \u200b b a \u00ad b \ufffd"),    # zero-width space and soft hyphen stay
    (" \n ", ""),
])
def test_clip_words_after_cleaning(text, words):
    assert CLIP.decode(CLIP.encode(text)).split() == words.split()  # decoded, every word ends with a space


def test_clip_marks_spelled_out_in_the_text():
    low, start, end = 513, CLIP.start_id, CLIP.end_id
    assert CLIP.encode("low<|startoftext|>low <|EndOfText|>") == [low, start, low, end]
    assert CLIP.decode([start, low, end, low]) == "low low"
    assert start not in CLIP.encode("<start_of_text> <| startoftext |>")


def test_clip_decoding_gives_lower_case_words():
    assert CLIP.decode(CLIP.encode("A lower slow-down, 한글 😀: it's ½!")) == "a lower slow - down , 한글 😀: it 's ½ !"
    assert CLIP.decode([]) == CLIP.decode([CLIP.start_id, CLIP.end_id]) == ""


def test_clip_gives_random_unicode_back_but_for_the_spaces():
    rng = random.Random(0)
    for _ in range(200):
        points = [rng.randrange(rng.choice((0x80, 0x300, 0x3000, 0xD800, 0x110000))) for _ in range(30)]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)  # all but surrogates
        ids = CLIP.encode(text)
        assert "".join(CLIP.decode(ids).split()) == "".join(CLIP.clean(text).split()), ascii(text)
        assert all(0 <= i < CLIP.start_id for i in ids)


def test_clip_takes_as_many_merges_from_the_file_as_the_published_models(tmp_path):
    lines = ["#version: 0.2", *MERGES, *["q q"] * (48894 - len(MERGES)), "not read any more", ""]
    (tmp_path / "merges.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    tokenizer = data.read_vocabulary("clip", tmp_path / "merges.gz")
    assert (len(tokenizer), tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)
    assert tokenizer.merges == lines[1:48895] and tokenizer.encode("low lower") == [513, 516]


@pytest.mark.parametrize("content, message", [
    (None, r"merges\.gz: no such file"),
    (b"#version: 0.2\nl o\n", r"merges\.gz is no CLIP vocabulary \(expected bpe_simple_vocab_16e6\.txt\.gz\)"),
    (gzip.compress(b"#version: 0.2\nl o\n" * 9)[:-9], "expected bpe_simple_vocab_16e6"),  # cut short
    (gzip.compress(b"\xff\xfe" * 9), "expected bpe_simple_vocab_16e6"),
    (gzip.compress(b""), "expected a comment and at least 48,894 merges of two"),
    (gzip.compress(b"#version: 0.2\n" + b"l o\n" * 48893), "at least 48,894 merges of two"),
    (gzip.compress(b"#version: 0.2\n" + b"l o\n" * 48893 + b"l o w\n"), "at least 48,894 merges of two"),
    (gzip.compress(b"[PAD]\n" * 50000), "at least 48,894 merges of two"),
], ids=["missing", "no gzip", "cut short", "no UTF-8", "empty", "too few", "three parts", "another vocabulary"])
def test_wrong_clip_vocabulary_file_is_named_as_such(tmp_path, content, message):
    if content is not None:
        (tmp_path / "merges.gz").write_bytes(content)
    with pytest.raises(data.UserError, match=message):
        data.CLIPBPE.from_file(tmp_path / "merges.gz")


# === Unigram =========================================================================================================

def test_golden_token_ids_of_prolips_unigram():
    golden = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    tokenizer = data.read_vocabulary("unigram", GOLDEN / "unigram_tokenizer.json")
    assert (len(tokenizer), tokenizer.start_id, tokenizer.pad_id, tokenizer.end_id) == (2000, None, 1, 1)
    assert len(golden["texts"]) > 60 and any(2 in row for row in golden["unigram"])
    for text, canonical, row in zip(golden["texts"], golden["canonical"], golden["unigram"], strict=True):
        assert tokenizer.clean(text) == canonical
        ids = [*tokenizer.encode(text)[:63], 1]
        assert ids + [1] * (64 - len(ids)) == row, text
        assert tokenizer.encode(text) == tokenizer.encode(text)  # the second time from its cache of words


# The rarest piece has -8, an unknown character therefore -18.
PIECES = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -4], ["▁a", -2], ["▁do", -4], ["g", -3], ["dog", -4],
          ["▁dogs", -8], ["s", -2], ["a", -3], ["aa", -5], ["b", -3], ["ab", -6], ["ba", -6], ["▁b", -4], ["가", -4]]
UNIGRAM = data.Unigram(PIECES)


@pytest.mark.parametrize("text, pieces", [
    ("a dog", "▁a ▁do g"),                   # -7; ▁ dog has -8
    ("dogs", "▁dogs"),                       # -8; ▁do g s has -9
    ("A DOG!", "▁a ▁do g"),                  # lower case, no punctuation
    ("a-b a_b", "▁a b ▁a ▁b"),               # nothing for a hyphen, a space for an underline
    ("aaa", "▁a aa"),                        # -7; ▁a a a has -8, ▁ aa a -12
    ("  a \n\t b ", "▁a ▁b"),
    ("c", "▁ <unk>"),
    ("cde", "▁ <unk>"),                      # a run of unknown characters is one <unk>
    ("cadde", "▁ <unk> a <unk>"),
    ("c c", "▁ <unk> ▁ <unk>"),              # but not across words
    ("xyzs猫猫g", "▁ <unk> s <unk> g"),
    ("가 나", "▁ 가 ▁ <unk>"),
    (unicodedata.normalize("NFD", "가"), "▁ 가"),
    ("<unk> </s> <pad>", "▁ <unk> ▁ s ▁ <unk> a <unk>"),  # these are no marks in a text, only letters
    ("ａ＿ｂ", "▁a ▁b"),                      # full width
    ("a\ufe63b", "▁a <unk> b"),               # a small hyphen is no ASCII punctuation until NFKC makes it so, too late
    ("b\u00b4a", "▁b ▁ <unk> a"),            # NFKC makes of an acute a space with an accent above
    ("a▁b", "▁a ▁b"),                        # the sign for a space, spelled out
    ("▁", "▁"),
    ("&amp;a &lt;b&gt;", "▁a ▁b"),
    ("", ""), (" \n ", ""), ("?!", ""), ("_", ""),
])
def test_unigram_on_hand_worked_cases(text, pieces):
    assert [PIECES[i][0] for i in UNIGRAM.encode(text)] == pieces.split()


def spellings(word, vocabulary):
    """All ways to spell a word in pieces; a character that is no piece by itself may stand as None."""
    if not word:
        yield []
    for n in range(1, len(word) + 1):
        piece = word[:n]
        if piece in vocabulary or n == 1:
            for rest in spellings(word[n:], vocabulary):
                yield [piece if piece in vocabulary else None, *rest]


@pytest.mark.parametrize("letters", ["abc", "ab", "abcdx"])
@pytest.mark.parametrize("seed", range(3))
def test_unigram_finds_the_best_of_all_spellings(letters, seed):
    """Of all spellings of every short word, none has a larger sum of scores: random vocabularies, "x" never known."""
    rng = random.Random(f"{letters} {seed}")
    known = letters.replace("x", "")
    longer = {"".join(rng.choices("▁" + known, k=rng.randrange(1, 5))) for _ in range(25)}
    longer = {piece for piece in longer if "▁" not in piece[1:]}
    # multiples of 1/1024, so that sums are exact and those that ought to be equal are
    vocabulary = {piece: -rng.randrange(1024, 12 * 1024) / 1024
                  for piece in sorted({"▁", *rng.sample(known, 2), *longer})}
    tokenizer = data.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], *vocabulary.items()])
    scores = vocabulary | {None: min(vocabulary.values()) - 10}

    def goodness(pieces):  # of several with the same sum, the one with the longest last piece, and so on
        return sum(scores[piece] for piece in pieces), [len(piece or "x") for piece in pieces[::-1]]
    for _ in range(150):
        word = "".join(rng.choices(letters, k=rng.randrange(1, 8)))
        merged = []
        for piece in max(spellings("▁" + word, vocabulary), key=goodness):
            if piece or merged[-1:] != ["<unk>"]:
                merged.append(piece or "<unk>")
        assert [tokenizer.pieces[i][0] for i in tokenizer.encode(word)] == merged, word


def test_unigram_of_equal_sums_takes_the_longest_last_piece():
    for order in (1, -1):  # whatever their order in the file
        scores = [["▁do", -4], ["g", -3], ["▁", -4], ["dog", -3], ["▁b", -4], ["a", -3], ["b", -3], ["ab", -6]][::order]
        tokenizer = data.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], *scores])
        assert [tokenizer.pieces[i][0] for i in tokenizer.encode("dog")] == ["▁", "dog"]  # -7; and so has ▁do g
        assert [tokenizer.pieces[i][0] for i in tokenizer.encode("bab")] == ["▁b", "ab"]  # -10; and so has ▁b a b


@pytest.mark.parametrize("score, pieces", [(-10.5, "▁ a bc"), (-11.5, "▁ ab <unk>")])
def test_unigram_an_unknown_character_costs_ten_more_than_the_rarest_piece(score, pieces):
    tokenizer = data.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -1], ["a", -20], ["ab", -1], ["bc", score]])
    # -1 - 20 + score, or -1 - 1 - 30
    assert [tokenizer.pieces[i][0] for i in tokenizer.encode("abc")] == pieces.split()


def test_unigram_pieces_are_found_however_long():
    tokenizer = data.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁" + "a" * 30, -9], ["▁", -1], ["a", -1]])
    assert tokenizer.encode("a" * 30) == [3] and tokenizer.encode("a" * 31) == [3, 5]
    assert tokenizer.encode("a" * 6) == [4] + [5] * 6


def test_unigram_decoding():
    assert UNIGRAM.decode(UNIGRAM.encode("A dog, dogs  a-b")) == "a dog dogs ab"
    assert UNIGRAM.decode([*UNIGRAM.encode("a dog"), 1, 1, 1]) == "a dog"  # the end is padding
    assert UNIGRAM.decode(UNIGRAM.encode("a cat")) == "a <unk>a<unk>"
    assert UNIGRAM.decode([]) == UNIGRAM.decode([1]) == ""


def test_unigram_gives_cleaned_text_of_known_letters_back():
    rng, letters = random.Random(0), "abgs가 _-."
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randrange(20)))
        expected = " ".join("".join(c for c in text.replace("_", " ") if c not in "-.").split())
        assert UNIGRAM.decode(UNIGRAM.encode(text)) == expected
        assert all(2 < i < len(PIECES) for i in UNIGRAM.encode(text))


@pytest.mark.parametrize("text, clean", [
    ("A Girl, dancing!", "a girl dancing"), ("it's \u201cit\u2019s\u201d", "its its"), ("x_y__z", "x y z"),
    ("#1 (50%) a+b=c", "1 50 abc"), ("ÉÀ Straße İ", "éà straße i\u0307"), ("&eacute;&amp;amp; &copy;", "é ©"),
    ("<b> &amp;eacute; &amp;amp;eacute;", "b é eacute"),  # with tags: entities twice, and no more
    ("a\u00a0b\u3000c\u2028d", "a b c d"), ("naïve—dash «q» ¿", "naïve—dash «q» ¿"),  # ASCII punctuation alone goes
    ("ﬁ Ａ½", "fi a½"),
])
def test_unigram_cleaning(text, clean):
    assert data.Unigram.clean(text) == clean


def tokenizer_json(**changes):
    return {"version": "1.0", "model": {"type": "Unigram", "unk_id": 2, "vocab": PIECES} | changes}


def test_unigram_reads_its_file(tmp_path):
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["▁", -1.5], ["a", -2.0]]
    for more in ({}, {"byte_fallback": False}):
        content = tokenizer_json(unk_id=0, vocab=pieces, **more)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        tokenizer = data.Unigram.from_file(tmp_path / "tokenizer.json")
        for one in (tokenizer, data.tokenizer_from(tokenizer.state())):
            assert one.encode("aba") == [2, 3, 0, 3] and len(one) == 4 and one.unk_id == 0


@pytest.mark.parametrize("content, message", [
    (None, r"tokenizer\.json: no such file"),
    (b"", r"tokenizer\.json is no tokenizer\.json with a Unigram model"),
    (b"a piece\na line\n", "is no tokenizer.json with a Unigram model"),
    (b"\xff\xfe", "is no tokenizer.json with a Unigram model"),
    (b"[1, 2]", "is no tokenizer.json with a Unigram model"),
    ({"version": "1.0"}, "is no tokenizer.json with a Unigram model"),
    ({"model": ["Unigram"]}, "is no tokenizer.json with a Unigram model"),
    (tokenizer_json(vocab={"a": 1}), "is no tokenizer.json with a Unigram model"),
    (tokenizer_json(vocab=[]), "is no tokenizer.json with a Unigram model"),
    (tokenizer_json(vocab=[["a", "often"]]), "is no tokenizer.json with a Unigram model"),
    (tokenizer_json(vocab=[[1, 2.0]]), "is no tokenizer.json with a Unigram model"),
    (tokenizer_json(type="BPE", vocab={"a": 0}, merges=[]), "expected a Unigram model .*found BPE"),
    (tokenizer_json(byte_fallback=True), "without byte_fallback"),
], ids=["missing", "empty", "no JSON", "no UTF-8", "list", "no model", "model a list", "vocab a table", "no pieces",
        "no score", "no text", "BPE", "byte fallback"])
def test_wrong_unigram_file_is_named_as_such(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else
                                                  json.dumps(content).encode())
    with pytest.raises(data.UserError, match=message) as error:
        data.Unigram.from_file(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value) and "tokenizer.json" in str(error.value)


# === all =============================================================================================================

@pytest.mark.parametrize("tokenizer", [data.BPE.train(TEXTS, 300), data.WordPiece(VOCAB), CLIP, UNIGRAM,
                                       data.WordPiece(VOCAB, clean=True)],
                         ids=["bpe", "wordpiece", "clip", "unigram", "wordpiece-clips"])
def test_tokenizer_comes_back_from_its_state_in_a_checkpoint(tokenizer):
    file = io.BytesIO()
    torch.save(tokenizer.state(), file)
    file.seek(0)
    again = data.tokenizer_from(torch.load(file, weights_only=True))  # plain types only
    assert type(again) is type(tokenizer) and len(again) == len(tokenizer) and again.state() == tokenizer.state()
    assert (again.pad_id, again.start_id, again.end_id) == (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_unknown_kind_of_tokenizer_lists_the_known():
    with pytest.raises(data.UserError, match="'sentencepiece'; known: bpe, clip, unigram, wordpiece"):
        data.tokenizer_from({"kind": "sentencepiece"})


def test_doctests_of_data(monkeypatch):
    monkeypatch.chdir(os.environ.get("VOCAB", "."))
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(data):
        if "VOCAB" in os.environ or test.name != "data.CLIPBPE":  # its example reads the published list of merges
            runner.run(test)
    assert runner.failures == 0 and runner.tries >= 3
