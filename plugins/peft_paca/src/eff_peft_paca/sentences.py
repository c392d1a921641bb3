"""Six kinds of sentences, generated: `--data eff_peft_paca.sentences:sentences`.

A sentence reports, asks or requests something, which happens or does not: three speech acts, each plain or
negated, are the six classes. Each class has paraphrases ("did not", "never", "failed to", ...) with slots for a
person, an action and a time. Neither the paraphrases nor the persons, actions and times of the test sentences
occur in training. 600 sentences
train and 600 test, 100 of each class; `?train=`, `?test=` and `?seed=` work as for other sources.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from eff.data import Data
from eff.data.labelled import Found, Labelled
from eff.data.options import read_options
from eff.data.text import TextOptions, TextStore, make_text_data
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import derive_seed

PER_CLASS = 100

# Actions ("what") stand as (base form, past, object).
Slots = Mapping[str, Sequence[Any]]
TRAIN: Slots = {
    "who": ("the plumber", "my aunt", "Maria", "the new clerk", "our neighbour", "the pilot", "Tom", "the choir"),
    "what": (
        ("repair", "repaired", "the kitchen tap"), ("sell", "sold", "the old piano"), ("paint", "painted", "the fence"),
        ("water", "watered", "the tomatoes"), ("sign", "signed", "the contract"), ("bake", "baked", "two loaves"),
        ("book", "booked", "the ferry tickets"), ("feed", "fed", "the rabbits"), ("copy", "copied", "the minutes"),
        ("wash", "washed", "the curtains"),
    ),
    "when": ("on Monday", "before lunch", "last spring", "in the morning", "after the meeting", "this week"),
}  # fmt: skip
TEST: Slots = {
    "who": ("the surgeon", "his cousin", "Ahmed", "the landlord", "their coach", "the tailor", "Yuki", "the crew"),
    "what": (
        ("clean", "cleaned", "the fish tank"), ("rent", "rented", "a small van"), ("fold", "folded", "the blankets"),
        ("test", "tested", "the alarm"), ("ship", "shipped", "the spare parts"), ("grill", "grilled", "the peppers"),
        ("print", "printed", "the posters"), ("train", "trained", "the puppy"), ("count", "counted", "the votes"),
        ("move", "moved", "the wardrobe"),
    ),
    "when": ("on Friday", "at noon", "two years ago", "late at night", "during the storm", "over the holidays"),
}  # fmt: skip
# Paraphrases of each class: those to train on, those to test on.
TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "report": (
        ("{who} {did} {it} {when}.", "{when}, {who} {did} {it}.", "it was {who} that {did} {it} {when}."),
        ("{who} managed to {do} {it} {when}.", "I heard that {who} {did} {it} {when}."),
    ),
    "report_negated": (
        ("{who} did not {do} {it} {when}.", "{who} never {did} {it} {when}.", "{when}, {who} refused to {do} {it}."),
        ("{who} failed to {do} {it} {when}.", "I heard that {who} forgot to {do} {it} {when}."),
    ),
    "question": (
        ("did {who} {do} {it} {when}?", "do you know whether {who} {did} {it} {when}", "was it {who} that {did} {it} {when}?"),
        ("I wonder if {who} {did} {it} {when}.", "has anyone heard whether {who} managed to {do} {it} {when}?"),
    ),
    "question_negated": (
        ("didn't {who} {do} {it} {when}?", "why did {who} not {do} {it} {when}", "do you know why {who} never {did} {it} {when}?"),
        ("I wonder why {who} failed to {do} {it} {when}.", "has anyone heard why {who} refused to {do} {it} {when}?"),
    ),
    "request": (
        ("please have {who} {do} {it} {when}.", "{who} should {do} {it} {when}, please.", "make sure that {who} will {do} {it} {when}."),
        ("I would like {who} to {do} {it} {when}.", "could you ask {who} to {do} {it} {when}?"),
    ),
    "request_negated": (
        ("please do not let {who} {do} {it} {when}.", "{who} should not {do} {it} {when}, please.", "make sure that {who} will not {do} {it} {when}."),
        ("I would rather {who} did not {do} {it} {when}.", "could you keep {who} from having to {do} {it} {when}?"),
    ),
}  # fmt: skip


def make_sentences(slots: Slots, part: int, per_class: int, generator: random.Random) -> tuple[list[str], list[int]]:
    """Return different sentences and the index of their class, `per_class` of each.

    Args:
        slots: what fills the templates.
        part: 0 for the paraphrases to train on, 1 for those to test on.
        per_class: how many of each class.
        generator: the randomness.
    """
    texts: list[str] = []
    labels: list[int] = []
    for label, paraphrases in enumerate(TEMPLATES.values()):
        made: dict[str, None] = {}
        while len(made) < per_class:
            do, did, it = generator.choice(slots["what"])
            who, when = generator.choice(slots["who"]), generator.choice(slots["when"])
            text = generator.choice(paraphrases[part]).format(who=who, when=when, do=do, did=did, it=it)
            made[text[0].upper() + text[1:]] = None
        texts += made
        labels += [label] * per_class
    return texts, labels


def sentences(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the sentences as data; the same seed gives the same sentences."""
    options = read_options(spec, TextOptions)
    parts = []
    for part, (name, slots) in enumerate((("train", TRAIN), ("test", TEST))):
        texts, labels = make_sentences(
            slots, part, PER_CLASS, random.Random(derive_seed(options.seed, f"sentences/{name}"))
        )
        parts.append(Labelled(TextStore(texts), torch.tensor(labels)))
    found = Found(tuple(TEMPLATES), train=parts[0], test=parts[1], noun="texts")
    return make_text_data(spec, options, task, found)
