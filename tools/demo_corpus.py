"""Text and tokenizer of the demonstration model: which books it may see, and how they become tokens."""

import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HELD_OUT_BOOKS = ("olive-fairy-book.txt", "railway-children.txt", "wind-in-the-willows.txt")
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
VOCABULARY_SIZE = 4096

# Word boundaries as Qwen2 draws them: loaders that rebuild the tokenizer from its class agree with the file.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Headings closer together than this are signs, letters or songs inside a story, so they do not end it.
SHORTEST_DOCUMENT_CHARACTERS = 1500
LONGEST_HEADING_CHARACTERS = 80


def training_books(corpus: Path) -> list[Path]:
    """Every book but the held-out ones, sorted by name so that a seed means the same run everywhere."""
    books = [path for path in sorted(corpus.glob("*.txt")) if path.name not in HELD_OUT_BOOKS]
    if not books:
        raise FileNotFoundError(f"No training text in {corpus}: expected *.txt files, one book a file.")
    return books


def held_out_books(corpus: Path) -> list[Path]:
    """The books that measure the model; a missing one is an error, as the figure would not be comparable."""
    books = [corpus / name for name in HELD_OUT_BOOKS]
    missing = [path.name for path in books if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"Held-out books missing from {corpus}: {', '.join(missing)}.")
    return books


def is_heading(paragraph: str) -> bool:
    """Whether a paragraph is a title: one short line in capitals, in title case, or "Chapter ..."."""
    if "\n" in paragraph or len(paragraph) > LONGEST_HEADING_CHARACTERS or not paragraph[:1].isalnum():
        return False
    if re.match(r"(chapter|part) \w+", paragraph, re.IGNORECASE):
        return True
    if paragraph.upper() == paragraph and re.search(r"[A-Z]{2}", paragraph):
        return True
    words = re.findall(r"[A-Za-z]\S*", paragraph)
    capitalised = sum(word[0].isupper() for word in words)
    # Verse and speech end in punctuation; titles do not, and only their small words are in lower case.
    return bool(words) and words[0][0].isupper() and paragraph[-1].isalnum() and capitalised * 2 > len(words)


def split_documents(book: str) -> list[str]:
    """Cuts a book into stories or chapters, so that the model learns how to begin one and how to end it."""
    documents: list[list[str]] = [[]]
    characters = 0
    for paragraph in book.strip().split("\n\n"):
        if characters >= SHORTEST_DOCUMENT_CHARACTERS and is_heading(paragraph):
            documents.append([])
            characters = 0
        documents[-1].append(paragraph)
        characters += len(paragraph)
    return ["\n\n".join(paragraphs) for paragraphs in documents]


def train_tokenizer(corpus: Path) -> Tokenizer:
    """Byte-level BPE over the training books. It adds no token by itself: prompts start from plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True, normalized=False) for token in (END_OF_TEXT, PADDING)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=specials,  # first, hence ids 0 and 1
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # sorted: the file's ids must not vary
        show_progress=False,
    )
    books = (book.read_text("utf-8") for book in training_books(corpus))
    tokenizer.train_from_iterator((text for book in books for text in split_documents(book)), trainer)
    return tokenizer


def training_tokens(corpus: Path, tokenizer: Tokenizer) -> np.ndarray:
    """All training documents as one row of ids, each closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.array([end], dtype=np.uint16)]  # an end before the first document marks its beginning, too
    for book in training_books(corpus):
        for encoding in tokenizer.encode_batch(split_documents(book.read_text("utf-8"))):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces)
