"""Source `csv:PATH`: texts with classes, one per row, in a UTF-8 file with a header.

PATH is a file, split 80/20 by seed, or a folder with train.csv, test.csv or both. The columns are `text`
and `label`, or those that `?text=` and `?label=` name; labels are class names or whole numbers. The
tokenizer is the model's, else the one that `?tokenizer=` names, else hashed words.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from eff.data import Batch, Data
from eff.data.labelled import Found, Labelled, check, split, with_model_classes
from eff.data.labels import from_names
from eff.data.options import SampleOptions, read_options
from eff.errors import DataError, did_you_mean
from eff.schemas import DataSpec, TaskSpec
from eff.tokenizing import DEFAULT, load_tokenizer, pinned

MAX_LENGTH = 128
LONGEST = 2**20


class TextOptions(SampleOptions):
    """Options of all text sources."""

    tokenizer: str | None = Field(None, description="bytes, words:SIZE, file:PATH, package:NAME/PATH or hf:NAME")
    max_length: int | None = Field(None, ge=1, le=LONGEST, description=f"a whole number of tokens, 1 to {LONGEST}")


class CsvOptions(TextOptions):
    """Options of `csv:PATH`."""

    text: str = Field("text", description="the name of the text column")
    label: str = Field("label", description="the name of the label column")


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise DataError(f"{path}: cannot be read as text ({reason})") from error
    if not text.strip():
        raise DataError(f"{path}: is empty; a text needs at least one word")
    return text


class TextStore:
    """Texts in memory."""

    def __init__(self, texts: Sequence[str]):
        self.texts = tuple(texts)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> TextStore:
        """Return a store of these texts only."""
        return TextStore([self.texts[index] for index in indices])


class TextSplit:
    """Labelled texts as padded ids.

    Args:
        texts: the samples.
        labels: (N,) int64.
        tokenizer: by name.
        max_length: ids of a text at most.
    """

    def __init__(self, texts: Sequence[str], labels: Tensor, tokenizer: str, max_length: int):
        self.texts = tuple(texts)
        self.labels = labels
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return input_ids and attention_mask (N, longest text), int64, and label (N,), int64."""
        ids = [self._ids[index] for index in indices]
        padded = pad(ids, load_tokenizer(self.tokenizer).pad)
        return {**padded, "label": self.labels[torch.as_tensor(indices, dtype=torch.long)]}

    @functools.cached_property
    def _ids(self) -> list[list[int]]:
        return load_tokenizer(self.tokenizer).encode(self.texts, self.max_length)

    def fingerprint(self) -> str:
        """Return a hash of texts, labels and tokenisation."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.texts, self.labels.tolist(), self.tokenizer, self.max_length)).encode())
        return digest.hexdigest()


def pad(ids: Sequence[Sequence[int]], fill: int) -> Batch:
    """Return input_ids and attention_mask (N, longest), int64."""
    rows = [torch.tensor(row, dtype=torch.long) for row in ids]
    length = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    mask = (torch.arange(padded.shape[1]) < length[:, None]).long()
    return {"input_ids": padded, "attention_mask": mask}


def encode(texts: Sequence[str], tokenizer: str, max_length: int) -> Batch:
    """Return texts as one batch without labels."""
    chosen = load_tokenizer(tokenizer)
    return pad(chosen.encode(texts, max_length), chosen.pad)


def make_text_data(spec: DataSpec, options: TextOptions, task: TaskSpec | None, found: Found) -> Data:
    """Return the data that found texts, the options and the model's task make together.

    Args:
        spec: the source as the user wrote it.
        options: its options, checked.
        task: the task of a model that is already there: its tokenizer, length and classes are kept.
        found: labelled `TextStore`s.

    Raises:
        DataError: labels and texts do not fit each other, the options or the task.
    """
    if task is not None and task.name != "text_classification":
        raise DataError(f"data '{spec}' has texts with classes; the model's task is {task.name}")
    wanted = task.options if task is not None else {}
    check(spec, found)
    found = with_model_classes(spec, found, wanted.get("classes"))
    train, test = split(spec, options, found)
    tokenizer = pinned(str(wanted.get("tokenizer") or options.tokenizer or DEFAULT))
    max_length = int(str(wanted.get("max_length") or options.max_length or MAX_LENGTH))
    for name, told, kept in (
        ("tokenizer", options.tokenizer, tokenizer),
        ("max_length", options.max_length, max_length),
    ):
        if told is not None and str(kept) not in (str(told), pinned(told) if isinstance(told, str) else ""):
            raise DataError(f"data '{spec}': the model has {name} {kept}, the data say {told}; leave ?{name}= out")
    train_split, test_split = (
        None if part is None else TextSplit(part.items.texts, part.labels, tokenizer, max_length)
        for part in (train, test)
    )
    made = {"classes": list(found.classes), "tokenizer": tokenizer, "max_length": max_length}
    return Data(spec, TaskSpec(name="text_classification", options=made), train_split, test_split)


def load_csv(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the texts of CSV files.

    Raises:
        DataError: no such file, no such column, an empty text or label, or not UTF-8.
    """
    path = Path(spec.location)
    options = read_options(spec, CsvOptions, path)
    if path.is_dir():
        files = {name: path / f"{name}.csv" for name in ("train", "test") if (path / f"{name}.csv").is_file()}
        if not files:
            raise DataError(f"{path}: has neither train.csv nor test.csv")
    else:
        files = {"whole": path}
    rows = {name: _read(file, options) for name, file in files.items()}
    names = [label for part in rows.values() for _, label in part]
    classes, indices = from_names(names)
    parts: dict[str, Labelled] = {}
    for (name, part), labels in zip(
        rows.items(), torch.split(indices, [len(part) for part in rows.values()]), strict=True
    ):
        parts[name] = Labelled(TextStore([text for text, _ in part]), labels)
    found = Found(classes, parts.get("train"), parts.get("test"), parts.get("whole"), noun="texts")
    return make_text_data(spec, options, task, found)


def _read(path: Path, options: CsvOptions) -> list[tuple[str, str]]:
    """Return (text, label) of each row."""
    rows: list[tuple[str, str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            for column in (options.text, options.label):
                if column not in columns:
                    raise DataError(
                        f"{path}: has no column '{column}'{did_you_mean(column, columns)}; columns are "
                        f"{', '.join(columns) or 'none'}; name it with ?text=NAME and ?label=NAME"
                    )
            for row in reader:
                text, label = (row[options.text] or "").strip(), (row[options.label] or "").strip()
                if not text or not label:
                    missing = options.text if not text else options.label
                    raise DataError(
                        f"{path}, line {reader.line_num}: column '{missing}' is empty; fill or remove the row"
                    )
                rows.append((text, label))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV file that can be read ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not rows:
        raise DataError(f"{path}: has no rows below its header")
    return rows
