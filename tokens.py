"""The tokenizers: what turns a text into the ids of its pieces.

    BPE         byte pairs, trained here on the captions at hand
    CLIPBPE     byte pairs, with CLIP's published merges
    WordPiece   BERT's: the longest piece that fits, again and again
    Unigram     SentencePiece's: the most probable of all ways to cut a word

Each has encode(text) -> ids, decode(ids) -> text, pad_id, start_id, end_id, len() and state(). The state is of plain
types and goes into every checkpoint, which so contains its vocabulary. The special tokens around the pieces are the
model files' business.

    tokenizer = read_vocabulary("clip", "bpe_simple_vocab_16e6.txt.gz")      # a published vocabulary
    tokenizer = from_state(checkpoint["tokenizer"])                          # the one of a checkpoint
"""
import collections
import functools
import gzip
import heapq
import html
import json
import math
import re
import string
import sys
import unicodedata
import zlib
from pathlib import Path

WORDS_KEPT = 250_000  # the words whose ids a tokenizer remembers: the web has more than fit into memory


class UserError(ValueError):
    """What the user gave does not work. The message is one line: what was found, what was expected, what to do."""


class Tokenizer:
    """What all four share: a text is cut into words, and the ids of each word are cached."""
    def __init__(self):
        self.cache = {}

    def encode(self, text):
        """The ids of a text's pieces, without special tokens around them."""
        ids = []
        for word in self.words(text):
            found = self.cache.get(word)
            if found is None:
                found = self.encode_word(word)
                if len(self.cache) < WORDS_KEPT:
                    self.cache[word] = found
            ids += found
        return ids


# --- byte-pair encoding ---------------------------------------------------------------------------------------------

class BPE(Tokenizer):
    """Byte-level byte-pair encoding, trained on the captions at hand: any language, no unknown characters.

    Text is lower-cased and split into words, each with the space before it. A word is its UTF-8 bytes. Training merges
    the most frequent pair of neighbours into a new symbol, and so on; encoding applies the merges in the same order.
    Ids: 0 pad, 1 start, 2 end, 3 mask (or class), 4 to 259 the bytes, then the merges.

    >>> t = BPE.train(["low lower lowest"] * 9, vocab_size=264)    # four merges: ' l', 'ow', ' low', ' lowe'
    >>> [t.decode([i]) for i in t.encode("Lowest slow")], t.encode("low")
    (['lowe', 's', 't', '', 's', 'l', 'ow'], [262])
    """
    kind, pad_id, start_id, end_id, mask_id = "bpe", 0, 1, 2, 3
    class_id = 3  # no model wants both a mask and a class token
    first_byte = 4
    alphabet = [b""] * 4 + [bytes([i]) for i in range(256)]  # what each id stands for, before any merge

    def __init__(self, merges):
        """merges: pairs of ids, the most frequent first; the n-th makes the id len(alphabet) + n."""
        super().__init__()
        self.merges = [tuple(pair) for pair in merges]
        self.merged = {pair: len(self.alphabet) + n for n, pair in enumerate(self.merges)}  # pair -> its id
        self.symbols = list(self.alphabet)
        for a, b in self.merges:
            self.symbols.append(self.symbols[a] + self.symbols[b])

    def __len__(self):
        return len(self.symbols)

    @staticmethod
    def words(text):
        text = " " + " ".join(unicodedata.normalize("NFC", text).lower().split())
        return re.findall(r" ?[^\W\d_]+| ?\d| ?(?:[^\w\s]|_)+| ", text)  # the last: an empty text is one space

    @classmethod
    def first_ids(cls, word):
        return [cls.first_byte + byte for byte in word.encode(errors="replace")]

    def encode_word(self, word):
        ids = self.first_ids(word)
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda p: self.merged.get(p, math.inf))  # the first in the list of merges
            if pair not in self.merged:
                break
            ids = merge(ids, pair, self.merged[pair])
        return ids

    def decode(self, ids):
        return b"".join(self.symbols[i] for i in ids).decode(errors="replace").strip()

    def state(self):
        return {"kind": self.kind, "merges": self.merges}

    @classmethod
    def train(cls, texts, vocab_size=8192):
        """Merge the most frequent pair until there are vocab_size ids, or no pair occurs twice.

        A heap holds the pairs by frequency. A pair whose frequency changes is pushed again; its older entries no
        longer agree with `pairs` and are skipped.
        """
        counts = collections.Counter(word for text in texts for word in cls.words(text))
        words, frequencies = [cls.first_ids(word) for word in counts], list(counts.values())
        pairs, where = collections.Counter(), collections.defaultdict(set)  # frequency, and in which words
        for i, (word, n) in enumerate(zip(words, frequencies)):
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                where[pair].add(i)
        heap = [(-n, pair) for pair, n in pairs.items()]
        heapq.heapify(heap)
        merges = []
        while heap and len(cls.alphabet) + len(merges) < vocab_size:
            n, pair = heapq.heappop(heap)
            if pairs[pair] != -n:
                continue
            if n > -2:
                break
            changed = set()
            for i in list(where[pair]):
                for p in zip(words[i], words[i][1:]):
                    pairs[p] -= frequencies[i]
                    changed.add(p)
                words[i] = merge(words[i], pair, len(cls.alphabet) + len(merges))
                for p in zip(words[i], words[i][1:]):
                    pairs[p] += frequencies[i]
                    where[p].add(i)
                    changed.add(p)
            merges.append(pair)
            for p in changed - {pair}:
                heapq.heappush(heap, (-pairs[p], p))
        return cls(merges)


def merge(ids, pair, new):
    """[a, b, c, a, b] with (a, b) -> new: [new, c, new]."""
    merged, i = [], 0
    while i < len(ids):
        found = tuple(ids[i:i + 2]) == pair
        merged.append(new if found else ids[i])
        i += 2 if found else 1
    return merged


# CLIP's order of the bytes. In its file the printable ones stand for themselves, the others are chr(256), chr(257), ...
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CLIP_BYTES = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
CLIP_CHARACTERS = [*map(chr, PRINTABLE), *map(chr, range(256, 512 - len(PRINTABLE)))]


class CLIPBPE(BPE):
    """CLIP's tokenizer, from its published list of merges, bpe_simple_vocab_16e6.txt.gz.

    Byte-pair encoding again, with another alphabet: the last byte of a word is a symbol of its own, "</w>" in the file,
    so a word needs no space in front. Ids: 256 bytes, in CLIP's order; the same 256 as ends of words; 48,894 merges;
    start 49406, end 49407. Padding is 0, which also is "!": models look for the end, not for the padding.

    >>> CLIPBPE.from_file("bpe_simple_vocab_16e6.txt.gz").encode("A photo of a dog")
    [320, 1125, 539, 320, 1929]
    """
    kind, pad_id = "clip", 0
    alphabet = [bytes([byte]) for byte in CLIP_BYTES] + [bytes([byte]) + b" " for byte in CLIP_BYTES]

    def __init__(self, merges):
        super().__init__(merges)
        self.start_id, self.end_id = len(self.symbols), len(self.symbols) + 1
        self.symbols += [b"", b""]
        self.cache = {"<|startoftext|>": [self.start_id], "<|endoftext|>": [self.end_id]}  # written in a text
        numbers = more_numbers()
        self.word = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
                               rf"|[^\W\d_{numbers}]+|[\d{numbers}]|(?:[^\s\w\u0345]|_)+", re.IGNORECASE)

    @classmethod
    def from_file(cls, path):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1:49152 - 256 - 2 + 1]  # after a comment; CLIP does not use all of them
        if len(lines) != 48894:
            raise ValueError(f"{len(lines)} merges, expected 48,894 or more")
        return cls.from_merges(line.split() for line in lines)

    @classmethod
    def from_merges(cls, merges):
        """merges: pairs of symbols as the file has them, such as ("t", "he</w>")."""
        ids = {piece: i for i, piece in enumerate([*CLIP_CHARACTERS, *(c + "</w>" for c in CLIP_CHARACTERS)])}
        pairs = []
        for a, b in merges:
            pairs.append((ids[a], ids[b]))
            ids[a + b] = len(cls.alphabet) + len(pairs) - 1
        return cls(pairs)

    @classmethod
    def first_ids(cls, word):
        ids = [CLIP_BYTES.index(byte) for byte in word.encode(errors="replace")]
        return [*ids[:-1], 256 + ids[-1]]

    def words(self, text):
        return self.word.findall(" ".join(basic_clean(text).split()).lower())


@functools.cache
def more_numbers():
    """Numbers beyond re's digits: Roman numerals, superscripts, fractions. CLIP takes them one by one, like digits."""
    return "".join(chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) in ("Nl", "No"))


def basic_clean(text):
    """What CLIP and ProLIP do first: ftfy (but broken encodings stay as they are), then HTML entities, twice."""
    tags, before = "<" in text, None  # as ftfy: a text with tags may be HTML, where entities mean themselves
    while text != before:  # what an entity stands for may itself need cleaning
        before = text
        if not tags:
            text = re.sub(r"&#?[0-9A-Za-z]{1,24};", lambda entity: html.unescape(entity[0]), text)
        text = unicodedata.normalize("NFC", text.translate(CLEANED))
    return html.unescape(html.unescape(text))


# What ftfy makes of some characters: straight quotes, ligatures and full-width letters as plain ones, no controls.
CLEANED = {code: unicodedata.normalize("NFKC", chr(code)) for code in (
    *range(0xFF01, 0xFFF0), *range(0xFB00, 0xFB07), 0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), 0x1F1, 0x1F2, 0x1F3)}
CLEANED |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
CLEANED |= {code: c for code in range(128, 160) for c in bytes([code]).decode("cp1252", "ignore")} | {0xFB05: "\u017ft"}
CLEANED |= dict.fromkeys((*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)))


# --- WordPiece ------------------------------------------------------------------------------------------------------

class WordPiece(Tokenizer):
    """BERT's tokenizer, from a published vocab.txt (one piece a line, the line number is the id).

    Split at spaces and punctuation. Then take from each word the longest piece in the vocabulary, again and again; a
    piece inside a word starts with ##. A word of over 100 characters, or with a rest that nothing matches, is [UNK].

    >>> WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "!"]).encode("Unaffable! Ugh")
    [4, 5, 6, 7, 1]
    """
    special = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")

    def __init__(self, vocab, lower=True, clean=False):
        """lower: whether to lower-case and to drop accents; clean: whether to call basic_clean first."""
        super().__init__()
        self.vocab, self.lower, self.clean = list(vocab), lower, clean
        self.ids = {piece: i for i, piece in enumerate(self.vocab)}
        self.pad_id, self.unk_id, self.start_id, self.end_id = (
            self.ids[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))

    def __len__(self):
        return len(self.vocab)

    def words(self, text):
        parts = self.special.split(basic_clean(text) if self.clean else text)
        for i, part in enumerate(parts):  # every second one is a [CLS] or the like, spelled out in the text
            yield from [part] if i % 2 else self.split(part)

    def split(self, text):
        """Words and punctuation marks, without control characters; each Chinese character is a word."""
        kept = []
        for c in text:
            if c in "\t\n\r" or unicodedata.category(c) == "Zs":
                kept.append(" ")
            elif unicodedata.category(c)[0] != "C" and c != "\ufffd":
                kept.append(f" {c} " if is_cjk(ord(c)) else c)
        text = "".join(kept)
        if self.lower:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn").lower()
        return "".join(f" {c} " if c in string.punctuation or unicodedata.category(c)[0] == "P" else c
                       for c in text).split()

    def encode_word(self, word):
        if self.special.fullmatch(word):
            return [self.ids.get(word, self.unk_id)]
        ids, start = [], 0
        while start < len(word) <= 100:
            ends = (end for end in range(len(word), start, -1) if ("##" if start else "") + word[start:end] in self.ids)
            end = next(ends, None)
            if end is None:
                return [self.unk_id]
            ids.append(self.ids[("##" if start else "") + word[start:end]])
            start = end
        return ids or [self.unk_id]

    def decode(self, ids):
        return " ".join(self.vocab[i] for i in ids if i != self.pad_id).replace(" ##", "")

    def state(self):
        return {"kind": "wordpiece", "vocab": self.vocab, "lower": self.lower, "clean": self.clean}


def is_cjk(code):
    """Whether it is a Chinese character: there are no spaces between words of them. (Hangul and kana are not meant.)"""
    return any(first <= code <= last for first, last in ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF),
               (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


# --- Unigram --------------------------------------------------------------------------------------------------------

class Unigram(Tokenizer):
    """SentencePiece's Unigram model as ProLIP uses it (with T5's vocabulary), from a published tokenizer.json.

    Clean; write each space as ▁, and put one in front; cut before each ▁. Of all ways to cut such a word into pieces,
    take the one with the largest sum of scores, which are log probabilities. A character that no piece has costs ten
    more than the rarest piece, and a run of them is one <unk>. Id 1 ends a text and pads it; there is no start.

    >>> pieces = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["▁", -5], ["▁a", -2], ["▁do", -4], ["g", -3], ["dog", -3]]
    >>> Unigram(pieces).encode("A dog!")    # ▁do g has -7, ▁ dog has -8
    [4, 5, 6]
    """
    start_id, pad_id, end_id = None, 1, 1

    def __init__(self, pieces, unk_id=2):
        super().__init__()
        self.pieces, self.unk_id = [(piece, float(score)) for piece, score in pieces], unk_id
        self.ids = {piece: i for i, (piece, _) in enumerate(self.pieces)}
        self.longest = max(map(len, self.ids))
        self.unknown = min(score for _, score in self.pieces) - 10

    @classmethod
    def from_file(cls, path):
        model = json.loads(Path(path).read_text(encoding="utf-8"))["model"]
        if model["type"] != "Unigram" or model.get("byte_fallback"):
            raise ValueError(f"a model {model['type']}, expected Unigram without byte_fallback")
        return cls(model["vocab"], model["unk_id"])

    def __len__(self):
        return len(self.pieces)

    @staticmethod
    def clean(text):
        """ProLIP's `canonical`: basic_clean, no punctuation, lower case, single spaces."""
        text = basic_clean(text).strip().replace("_", " ").translate(str.maketrans("", "", string.punctuation))
        return " ".join(text.lower().split())

    def words(self, text):
        text = unicodedata.normalize("NFKC", self.clean(text)).replace(" ", "▁")
        return re.findall("▁?[^▁]+|▁", text if not text or text[0] == "▁" else "▁" + text)

    def encode_word(self, word):
        """Viterbi: the best way to cut word[:end] is the best one to cut word[:start], for some start, and a piece."""
        best = [(0.0, None, None)] + [(-math.inf, None, None)] * len(word)  # for each end: score, start, id
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                i = self.ids.get(word[start:end])
                if i is None and end > start + 1:
                    continue
                score = best[start][0] + (self.unknown if i is None else self.pieces[i][1])
                if score > best[end][0]:
                    best[end] = score, start, self.unk_id if i is None else i
        ids, end = [], len(word)
        while end:
            _, end, i = best[end]
            if i != self.unk_id or ids[-1:] != [i]:
                ids.append(i)
        return ids[::-1]

    def decode(self, ids):
        return "".join(self.pieces[i][0] for i in ids if i != self.pad_id).replace("▁", " ").strip()

    def state(self):
        return {"kind": "unigram", "pieces": self.pieces, "unk_id": self.unk_id}


# --- from a file, from a checkpoint ---------------------------------------------------------------------------------

def read_vocabulary(kind, path):
    """The tokenizer of a published vocabulary: "clip" (merges), "unigram" (T5's), "wordpiece" (BERT's, in lower case),
    "wordpiece-clips" (BERT's, for CLIPS), "wordpiece-cased" (KLUE's).
    """
    try:
        if kind == "clip":
            return CLIPBPE.from_file(path)
        if kind == "unigram":
            return Unigram.from_file(path)
        vocab = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return WordPiece(vocab, lower=kind != "wordpiece-cased", clean=kind == "wordpiece-clips")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, LookupError, TypeError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is no {kind} vocabulary ({error}); expected CLIP's bpe_simple_vocab_16e6.txt.gz, a "
                        "tokenizer.json with a Unigram model, or a vocab.txt with [PAD], [UNK], [CLS], [SEP]") from None


def from_state(state):
    """The tokenizer that returned this from state()."""
    make = {"bpe": BPE, "clip": CLIPBPE, "wordpiece": WordPiece, "unigram": Unigram}[state["kind"]]
    return make(**{name: value for name, value in state.items() if name != "kind"})
