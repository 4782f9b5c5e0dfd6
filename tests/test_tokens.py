"""tokens.py: published ids, hand-worked cases, training against a slow way, Viterbi against all spellings."""
import collections
import doctest
import gzip
import io
import json
import os
import random
import re
import unicodedata
from pathlib import Path

import pytest
import torch

import tokens

GOLDEN = Path(os.environ.get("GOLDEN") or Path(__file__).parent / "golden")
TEXTS = ["a dog runs on the grass", "A brown dog, running!", "two dogs & a cat's ball", "the dog is on the left",
         "하트가 별의 위에 있다", "빨간색 별과 원", "the 3 cats", "grass, more grass"] * 2
MERGES = ["l o", "lo w</w>", "lo w", "e r</w>", "low er</w>", "a a", "b c", "a b"]  # ids 512 to 519
CLIP = tokens.CLIPBPE.from_merges(line.split() for line in MERGES)
VOCAB = ("[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able ! cafe ##s dog ' s a ab ##b ##a 猫 , - 두 ##두 Dog é "
         "\u2028 \x85").split(" ")
PIECES = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -4], ["▁a", -2], ["▁do", -4], ["g", -3], ["dog", -4],
          ["▁dogs", -8], ["s", -2], ["a", -3], ["aa", -5], ["b", -3], ["ab", -6], ["ba", -6], ["▁b", -4], ["가", -4]]
UNIGRAM = tokens.Unigram(PIECES)  # the rarest piece has -8, an unknown character therefore -18


@pytest.mark.parametrize("name, kind, file, row", [
    ("bert", "wordpiece", "bert-base-uncased-vocab.txt", lambda ids: [101, *ids[:126], 102]),
    ("clips", "wordpiece-clips", "bert-base-uncased-vocab.txt", lambda ids: [*[1, *ids[:77], 2, *[0] * 77][:79], 101]),
    ("clip", "clip", "bpe_simple_vocab_16e6.txt.gz", lambda ids: [49406, *ids[:75], 49407]),
    ("unigram", "unigram", "unigram_tokenizer.json", lambda ids: [*ids[:63], *[1] * 64][:64])])
def test_golden_token_rows(name, kind, file, row):
    if kind != "unigram" and "VOCAB" not in os.environ:
        pytest.skip(f"set VOCAB to the folder with {file} to compare with the published token ids")
    tokenizer = tokens.read_vocabulary(kind, (GOLDEN if kind == "unigram" else Path(os.environ["VOCAB"])) / file)
    golden = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    for text, clean, ids in zip(golden["texts"], golden["canonical"], golden[name], strict=True):
        assert row(tokenizer.encode(text)) == row(tokenizer.encode(text)) == ids, text  # then from the words it keeps
        assert kind != "unigram" or tokenizer.clean(text) == clean


def merge_file(*lines):
    return gzip.compress("\n".join(["#version: 0.2", *lines, ""]).encode())


def json_file(**changes):
    return json.dumps({"model": {"type": "Unigram", "unk_id": 2, "vocab": PIECES} | changes}).encode()


@pytest.mark.parametrize("kind, content, text, ids", [
    ("clip", merge_file(*MERGES, *["q q"] * (48894 - 8), "not read"), "low lower<|endoftext|>", [513, 516, 49407]),
    ("unigram", json_file(unk_id=0, vocab=[["<unk>", 0], ["</s>", 0], ["▁", -1.5], ["a", -2]]), "aba", [2, 3, 0, 3]),
    ("wordpiece", "\r\n".join(VOCAB).encode(), "Dog é&#33;", [11, 1, 1, 1, 1, 1]),
    ("wordpiece-cased", "\n".join([*VOCAB, ""]).encode(), "Dog dog é É", [23, 11, 24, 1]),
    ("wordpiece-clips", "\n".join(VOCAB).encode(), "ＤＯＧ’s caf&eacute;s&#33; [S&#69;P]", [11, 12, 13, 9, 10, 8, 3])],
    ids=["clip", "unigram", "wordpiece", "wordpiece-cased", "wordpiece-clips"])
def test_published_vocabularies_are_read_from_their_files_and_kept_in_checkpoints(kind, content, text, ids, tmp_path):
    (tmp_path / "file").write_bytes(content)
    tokenizer = tokens.read_vocabulary(kind, tmp_path / "file")
    assert tokenizer.encode(text) == saved_and_loaded(tokenizer).encode(text) == ids
    assert len(tokenizer) in (49408, 4, len(VOCAB))


def saved_and_loaded(tokenizer):
    torch.save(tokenizer.state(), file := io.BytesIO())
    file.seek(0)
    again = tokens.from_state(torch.load(file, weights_only=True))  # plain types only
    assert all(getattr(again, name) == getattr(tokenizer, name) for name in ("pad_id", "start_id", "end_id"))
    assert again.state() == tokenizer.state() and len(again) == len(tokenizer)
    return again


@pytest.mark.parametrize("kind, content, message", [
    ("clip", None, "file: no such file"), ("wordpiece", None, "file: no such file"),
    ("clip", b"l o\n", "Not a gzipped file"), ("clip", merge_file()[:-9], "file is no clip"),
    ("clip", merge_file()[:10] + b"\xff" * 40, "file is no clip"), ("clip", merge_file("l o"), "48,894 or more"),
    ("clip", merge_file(*["[PAD] a"] * 48894), "file is no clip"), ("unigram", b"a piece\n", "file is no unigram"),
    ("unigram", b"[1, 2]", "file is no unigram"), ("unigram", json_file(type="BPE"), "a model BPE, expected Unigram"),
    ("wordpiece-cased", b"[PAD]\n", r"'\[UNK\]'"), ("wordpiece", b"\xff", "file is no wordpiece")],
    ids="missing,no file,no gzip,cut short,damaged,too few,other lines,no JSON,a list,BPE,no [UNK],no UTF-8".split(","))
def test_a_file_that_is_no_vocabulary_is_one_line_that_says_what_was_expected(kind, content, message, tmp_path):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(tokens.UserError, match=message) as error:
        tokens.read_vocabulary(kind, tmp_path / "file")
    assert "\n" not in str(error.value)


def test_doctests(monkeypatch):
    monkeypatch.chdir(os.environ.get("VOCAB", "."))
    results = [doctest.DocTestRunner().run(test) for test in doctest.DocTestFinder().find(tokens)
               if "VOCAB" in os.environ or test.name != "tokens.CLIPBPE"]  # its example reads the published merges
    assert sum(result.failed for result in results) == 0 and sum(result.attempted for result in results) >= 3


def slow_bpe(texts, vocab_size):
    """The merges and the texts' ids. Counts all pairs anew for every merge; of the most frequent the smallest wins."""
    words = [[4 + b for b in word.encode()] for text in texts for word in tokens.BPE.words(text)]
    merges = []
    while 260 + len(merges) < vocab_size:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts or max(counts.values()) < 2:
            break
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        for word in words:
            for i in range(len(word)):
                if tuple(word[i:i + 2]) == merges[-1]:
                    word[i:i + 2] = [259 + len(merges)]
    return merges, sum(words, [])


def test_bpe_hand_worked_merges():
    # ' ab' three times, ' abc' once: (' ', a) and (a, b) occur 4 times, the first has smaller ids; then (' a', b).
    space, a, b, c = (4 + byte for byte in b" abc")
    tokenizer = tokens.BPE.train(["ab AB", "ab  abc"], vocab_size=300)
    assert tokenizer.merges == [(space, a), (260, b)] and len(tokenizer) == 262
    assert tokenizer.encode("abc ab b") == [261, c, 261, space, b]
    assert "|".join(tokens.BPE.words("Two dogs, it's 24! 한 글_a")) == " two| dogs|,| it|'|s| 2|4|!| 한| 글|_|a"


def test_bpe_trains_and_encodes_as_the_slow_way_does():
    rng = random.Random(0)  # two letters: long runs and many ties
    ties = [["".join(rng.choices("ab ", (5, 3, 1), k=rng.randrange(40))) for _ in range(8)] for _ in range(20)]
    for texts, size in [(TEXTS, 264), (TEXTS, 10_000), ([], 300), *((texts, 290) for texts in ties)]:
        bpe = tokens.BPE.train(texts, size)
        assert (bpe.merges, [i for text in texts for i in bpe.encode(text)]) == slow_bpe(texts, size), texts


def test_every_text_comes_back_in_lower_case_with_single_spaces():
    rng, trained = random.Random(0), tokens.BPE.train([*TEXTS, "a \ud83d dog"], 400)  # with half an emoji
    again = saved_and_loaded(trained)
    assert again.decode(again.encode("a \ud83d dog")) == "a ? dog"
    texts = [[rng.randrange(rng.choice((0x80, 0x300, 0x3000, 0x110000))) for _ in range(30)] for _ in range(200)]
    texts = ["".join(chr(point) for point in points if not 0xD800 <= point < 0xE000) for points in texts]
    for text in [*texts, "", "a" * 5000, unicodedata.normalize("NFD", "하트와 café"), "emoji 👨\u200d👩\u200d👧 🇰🇷",
                 "½ ² Ⅷ _a__b", "İstanbul ß ŉ", "\x00\x07 e\u0301\u0323 \u0301 ａｂｃ、。"]:
        for bpe in (tokens.BPE([]), again):
            ids = bpe.encode(text)
            assert bpe.decode(ids) == " ".join(unicodedata.normalize("NFC", text).lower().split()), ascii(text)
            assert all(4 <= i < len(bpe) for i in ids)  # never pad, start, end or mask
        ids = CLIP.encode(text)  # without a mark for the spaces between words
        assert "".join(CLIP.decode(ids).split()) == "".join(tokens.basic_clean(text).lower().split()), ascii(text)
        assert all(0 <= i < CLIP.start_id for i in ids)


@pytest.mark.parametrize("text, pieces", [
    ("low LOW lower slow lowlow", "low_ low_ lower_ s low_ low low_"), ("low,low!", "low_ ,_ low_ !_"),
    ("lo ere aaaaa", "l o_ e r e_ aa aa a_"),  # the last letter of a word is another symbol than the same letter inside
    ("abd abcd", "ab d_ a bc d_"), ("", "")])  # "b c" stands before "a b" in the list, so that "a b" comes too late
def test_clip_on_hand_worked_merges(text, pieces):
    assert [CLIP.symbols[i].decode().replace(" ", "_") for i in CLIP.encode(text)] == pieces.split()


def test_clip_ids_are_bytes_then_bytes_at_the_end_of_a_word_then_merges_then_the_two_marks():
    first = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as published: first what can be printed
    order = first + [byte for byte in range(256) if byte not in first]
    assert CLIP.symbols[:512] == [bytes([b]) for b in order] + [bytes([b]) + b" " for b in order]
    assert CLIP.encode("! bc é lower") == [256, 65, 66 + 256, 106 + 0xC3 - 174, 94 + 0xA9 - 161 + 256, 516]
    assert (len(CLIP), CLIP.pad_id, CLIP.start_id, CLIP.end_id) == (522, 0, 520, 521)
    assert CLIP.encode("low<|startoftext|>low <|EndOfText|>") == [513, 520, 513, 521]  # spelled out in a text
    assert CLIP.decode([520, 513, 521, 513]) == "low low" and CLIP.decode([]) == CLIP.decode([520, 521]) == ""


@pytest.mark.parametrize("text, words", [
    ("Two dogs,it's 2024! x² ½ ⅧⅨ① ٣٤", "two dogs , it 's 2 0 2 4 ! x ² ½ ⅷ ⅸ ① ٣ ٤"),  # numbers digit by digit
    ("don't I'll we've they're I'm he'd CAN'T", "don 't i 'll we 've they 're i 'm he 'd can 't"),
    ("o'clock 'tis dogs' 'sorry a_b __c", "o ' clock 't is dogs ' 's orry a _ b __ c"),  # an ending at a word's start
    ("한글을 猫が abc한글 hi😀👍! ❤️", "한글을 猫が abc한글 hi 😀👍! ❤️"),  # letters of any script are one word
    ("x\u0301y e\u0301 İ ß ΑΣ <|endoftext <|x|>", "x \u0301 y é i \u0307 ß ας <| endoftext <| x |>"),
    ("“it’s” ‘no’ ‛x‟ „y‚ ʼz «a» ‹b› `c´", "\" it 's \" ' no ' ' x \" \" y ' ' z « a » ‹ b › ` c ´"),
    ("ＡＢＣ＇ｓ　１２！ ｶﾞｰﾄﾞ ﾡ ﬁne ﬅﬆ Ĳ ǆ", "abc 's 1 2 ! ガード ᄀ fine ſtst ij dž"),
    ("&lt;c&gt; &quot;&eacute;&quot; &amp;amp;lt; it&#39;s it&amp;rsquo;s", '< c > " é " < it \'s it \'s'),
    ("&copy 2020 AT&T x&y &notaword; &;", "© 2 0 2 0 at & t x & y ¬ aword ; &;"),
    ("<b>it’s it&rsquo;s &amp;eacute;", "< b > it 's it ’ s é"),  # with tags: entities last and twice, quotes stay
    ("\ta\r\nb\x0bc\u2028d\u00a0g d\x00o\x07g\x7f \ufeffx\ufffc\u206a", "a bc d g dog x"),
    ("a\u200bb a\u00adb \ufffd", "a \u200b b a \u00ad b \ufffd")])  # zero-width space and soft hyphen stay
def test_clip_words_after_cleaning(text, words):
    assert CLIP.words(text) == words.split()


@pytest.mark.parametrize("text, pieces", [
    ("UNAFFABLE!Un dog's dog-dog,", "un ##aff ##able ! un dog ' s dog - dog ,"),  # lower case; punctuation is a word
    ("ab abb aab", "ab ab ##b a ##a ##b"),           # the longest piece first
    ("unx dog affable", "[UNK] dog [UNK]"),          # a rest that nothing matches; a ## piece starts no word
    ("Cafés cafe\u0301 猫猫dog 두두", "cafe ##s cafe 猫 猫 dog [UNK]"),  # accents go; 猫 is a word; NFD splits Hangul
    (" dog\t\ndog\u00a0dog\u3000 d\u200bo\u00adg\x00 \ufffd", "dog dog dog dog"),  # spaces; what is not seen
    ("[SEP] dog[MASK] [sep]", "[SEP] dog [MASK] [UNK] [UNK] [UNK]"),
    ("a" * 100, "a " + "##a " * 99), ("a" * 101, "[UNK]"), ("", "")])
def test_wordpiece_on_hand_worked_cases(text, pieces):
    tokenizer = tokens.WordPiece(VOCAB[::-1])
    ids = tokenizer.encode(text)
    assert [tokenizer.vocab[i] for i in ids] == pieces.split()
    assert tokenizer.decode([*ids, tokenizer.pad_id]) == pieces.replace(" ##", "").strip()


@pytest.mark.parametrize("text, pieces", [
    ("a dog", "▁a ▁do g"),                   # -9; ▁ dog has -10
    ("dogs aaa", "▁dogs ▁a aa"),             # -8, ▁do g s has -9; then -7, ▁a a a has -8 and ▁ aa a has -12
    ("A-DOG!  a_b\n\t", "▁a dog ▁a ▁b"),     # lower case; nothing for a hyphen, a space for an underline
    ("cde cadde c", "▁ <unk> ▁ <unk> a <unk> ▁ <unk>"),  # a run of unknown characters is one <unk>, within a word
    ("가 나 " + unicodedata.normalize("NFD", "가"), "▁ 가 ▁ <unk> ▁ 가"),
    ("<unk> </s> <pad>", "▁ <unk> ▁ s ▁ <unk> a <unk>"),  # these are no marks in a text, only letters
    ("ａ＿ｂ &amp;a &lt;b&gt; a▁b", "▁a ▁b ▁a ▁b ▁a ▁b"),  # full width; entities; the sign for a space, spelled out
    ("a\ufe63b b\u00b4a", "▁a <unk> b ▁b ▁ <unk> a"),  # NFKC: a hyphen, too late; a space with an accent above
    ("▁", "▁"), (" \n ?!_", "")])
def test_unigram_on_hand_worked_cases(text, pieces):
    assert [PIECES[i][0] for i in UNIGRAM.encode(text)] == pieces.split()
    assert UNIGRAM.decode([*UNIGRAM.encode(text), 1, 1]) == pieces.replace(" ", "").replace("▁", " ").strip()


def spellings(word, vocabulary):
    """All ways to spell a word in pieces; a character that is no piece by itself may stand as "?"."""
    if not word:
        yield []
    for n in range(1, len(word) + 1):
        piece = word[:n] if word[:n] in vocabulary else "?"
        if piece != "?" or n == 1:
            yield from ([piece, *rest] for rest in spellings(word[n:], vocabulary))


@pytest.mark.parametrize("letters, seed", [(letters, seed) for letters in ("abc", "ab", "abcdx") for seed in range(3)])
def test_unigram_finds_the_best_of_all_spellings(letters, seed):
    rng, known = random.Random(f"{letters} {seed}"), letters.replace("x", "")  # "x" is in no piece
    longer = {rng.choice(["▁", ""]) + "".join(rng.choices(known, k=rng.randrange(1, 5))) for _ in range(25)}
    vocabulary = {piece: -rng.randrange(1, 12) for piece in sorted({"▁", *rng.sample(known, 2), *longer})}
    tokenizer = tokens.Unigram([["<pad>", 0], ["</s>", 0], ["<unk>", 0], *vocabulary.items()])
    scores = vocabulary | {"?": min(vocabulary.values()) - 10}

    def goodness(pieces):  # of several with the same sum, the one with the longest last piece, and so on
        return sum(scores[piece] for piece in pieces), [len(piece) for piece in pieces[::-1]]
    for _ in range(150):
        word = "".join(rng.choices(letters, k=rng.randrange(1, 8)))
        best = " ".join(max(spellings("▁" + word, vocabulary), key=goodness))
        expected = re.sub(r"\?( \?)*", "<unk>", best).split()
        assert [tokenizer.pieces[i][0] for i in tokenizer.encode(word)] == expected, word


@pytest.mark.parametrize("score, pieces", [(-10.5, "▁ a bc"), (-11.5, "▁ ab <unk>")])  # -1 - 20 + score, or -1 - 1 - 30
def test_unigram_an_unknown_character_costs_ten_more_than_the_rarest_piece(score, pieces):
    vocabulary = [["<unk>", 0], ["</s>", 0], ["▁", -1], ["a", -20], ["ab", -1], ["bc", score]]
    assert [vocabulary[i][0] for i in tokens.Unigram(vocabulary, unk_id=0).encode("abc")] == pieces.split()
