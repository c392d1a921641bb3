"""Source `corpus`: running text for language models, in windows of as many tokens.

Without a location it is the documentation of the Python language that ships with Python (`pydoc_data.topics`), so it
needs no file; its content differs a little between Python versions. `corpus:PATH` reads a UTF-8 file. The last 10 % of
the text is the test split: no window of it overlaps the training text.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from eff.data import Batch, Data
from eff.data.options import SampleOptions, read_options
from eff.data.text import LONGEST, read_text
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator
from eff.tokenizing import BYTES, load_tokenizer, pinned

LENGTH = 256
TEST_SHARE = 0.1


class CorpusOptions(SampleOptions):
    """Options of `corpus`."""

    tokenizer: str | None = Field(None, description="bytes, words:SIZE, file:PATH, package:NAME/PATH or hf:NAME")
    length: int | None = Field(None, ge=2, le=LONGEST, description=f"a whole number of tokens, 2 to {LONGEST}")


class Windows:
    """Windows of a text.

    Args:
        ids: (N, length) int64.
    """

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.ids)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return input_ids (N, length), int64, and attention_mask of ones."""
        ids = self.ids[torch.as_tensor(list(indices), dtype=torch.long)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fingerprint(self) -> str:
        """Return a hash of the ids."""
        return hashlib.blake2b(self.ids.numpy().tobytes(), digest_size=8).hexdigest()


def load_corpus(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the windows of a text.

    Raises:
        DataError: no such file, not UTF-8, too short, or the model reads other tokens or another length.
    """
    path = Path(spec.location) if spec.location else None
    options = read_options(spec, CorpusOptions, path)
    if task is not None and task.name != "language_modeling":
        raise DataError(f"data '{spec}' is running text; the model's task is {task.name}")
    kept = task.options if task is not None else {}
    tokenizer = pinned(str(kept.get("tokenizer") or options.tokenizer or BYTES))
    if options.tokenizer is not None and pinned(options.tokenizer) != tokenizer:
        raise DataError(
            f"data '{spec}': the model reads {tokenizer}, the data say {options.tokenizer}; leave ?tokenizer= out"
        )
    length = options.length or int(str(kept.get("length") or LENGTH))
    text = read_text(path) if path is not None else python_documentation()
    ids = torch.tensor(_encode(tokenizer, text))
    count = len(ids) // length
    test = max(1, round(TEST_SHARE * count))
    if count < 2:
        raise DataError(
            f"data '{spec}': {len(ids)} tokens are less than two windows of {length}; use a longer text or ?length="
        )
    windows = ids[: count * length].view(count, length)
    parts = {
        name: _subset(spec, name, part, wanted, options.seed)
        for name, part, wanted in (
            ("train", windows[:-test], options.train),
            ("test", windows[-test:], options.test),
        )
    }
    if parts["train"] is None and parts["test"] is None:
        raise DataError(f"data '{spec}': train=0 and test=0 leave nothing")
    made = {"tokenizer": tokenizer, "length": length}
    return Data(spec, TaskSpec(name="language_modeling", options=made), parts["train"], parts["test"])


def python_documentation() -> str:
    """Return the language reference that ships with Python, topic after topic, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@functools.lru_cache(maxsize=2)
def _encode(tokenizer: str, text: str) -> list[int]:
    return load_tokenizer(tokenizer).encode([text], 2**62)[0]


def _subset(spec: DataSpec, name: str, windows: Tensor, wanted: int | None, seed: int) -> Windows | None:
    if wanted == 0:
        return None
    if wanted is not None and wanted > len(windows):
        raise DataError(
            f"data '{spec}': {name}={wanted} asks for more than the {len(windows)} {name} windows there are"
        )
    if wanted is None:
        return Windows(windows)
    order = torch.randperm(len(windows), generator=named_generator(seed, f"data/{name}"))[:wanted]
    return Windows(windows[order.sort().values])
