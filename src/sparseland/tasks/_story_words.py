"""What the stories are made of: names, places, things, and sentences around them."""

from __future__ import annotations

import random

HEROES = ("Mira", "Tomas", "Ines", "Oskar", "Leila", "Anton")
FIRST = (
    "Ada", "Bela", "Carl", "Dora", "Elif", "Femi", "Gita", "Hugo", "Ivan", "Jana", "Kofi", "Lena",
    "Marc", "Nora", "Omar", "Petra", "Ravi", "Sara", "Theo", "Ursa", "Vera", "Wim", "Yara", "Zeno",
)  # fmt: skip
LAST = (
    "Adler", "Brook", "Costa", "Dunn", "Ekman", "Frost", "Gray", "Hale", "Ito", "Jensen", "King", "Lund",
    "Moss", "Novak", "Olsen", "Park", "Quist", "Reed", "Silva", "Toth", "Vance", "Weber", "York", "Zorn",
)  # fmt: skip
# Invented, so that a model can't guess them.
PLACE_HEAD = (
    "Alder", "Bram", "Corn", "Dun", "Elm", "Fal", "Green", "Hazel", "Iron", "Kings", "Lark", "Mar",
    "North", "Oak", "Pine", "Quarry", "Raven", "Stone", "Thorn", "Under", "Vale", "West", "Yew", "Ash",
)  # fmt: skip
PLACE_TAIL = (
    "bridge", "bury", "dale", "field", "ford", "gate", "ham", "haven", "hill", "hurst", "ley", "mere",
    "mouth", "port", "ridge", "stead", "ton", "well", "wick", "wood",
)  # fmt: skip
MAKES = (
    "amber", "brass", "cedar", "clay", "copper", "coral", "crystal", "ebony", "glass", "golden", "iron",
    "ivory", "jade", "leather", "linen", "marble", "oak", "painted", "pearl", "silk", "silver", "stone",
    "velvet", "woven",
)  # fmt: skip
THINGS = (
    "basket", "bell", "blanket", "bowl", "box", "bracelet", "brush", "candle", "chain", "chair", "clock",
    "compass", "cup", "drum", "fan", "flute", "hat", "kettle", "key", "lamp", "mask", "mirror", "ring",
    "vase",
)  # fmt: skip
TRADES = (
    "a baker", "a boatman", "a clerk", "a doctor", "a farmer", "a gardener", "a judge", "a miller",
    "a painter", "a sailor", "a singer", "a teacher",
)  # fmt: skip
REASONS = (
    "to deliver a letter", "to rest after a long week", "to see the old library", "to repair a wheel",
    "to visit a cousin", "to hear the choir", "to look for work", "to escape the rain",
    "to study the maps in the town hall", "to taste the famous bread",
)  # fmt: skip
EVENTS = (
    "a storm breaks two windows of the inn", "the bells ring for the whole evening",
    "a goat runs through the market", "the bridge is closed for an hour", "a fire is put out in time",
    "the river rises by a foot", "a wedding fills the square", "the lights go out before midnight",
    "a stranger wins the chess game", "the last boat leaves without its captain",
)  # fmt: skip
IDLE = (
    "The stalls are open until dusk, but the purse stays shut.",
    "Nothing on the market is worth its price that day.",
    "There is no time to look at the shops.",
)
PROLOGUE = (
    "Every journey in this book began with a map that nobody had finished.",
    "The roads were dry that spring, and the inns were full of talk.",
    "People said that a traveller should carry little and remember much.",
    "Some of what follows was written down on the way, some of it years later.",
    "The order of the chapters is the order of the days.",
    "The weather was kind in the mornings and unkind at night.",
    "Letters from home came seldom, and they were short.",
    "What was paid for the things in this book is not told.",
    "Many of the towns have changed since, and a few are gone.",
    "A good pair of boots mattered more than a good horse.",
)  # fmt: skip


def places(count: int, rng: random.Random) -> list[str]:
    """Different invented towns."""
    return rng.sample([head + tail for head in PLACE_HEAD for tail in PLACE_TAIL], count)


def people(count: int, rng: random.Random) -> list[str]:
    """Different full names."""
    return rng.sample([f"{first} {last}" for first in FIRST for last in LAST], count)


def items(count: int, rng: random.Random) -> list[str]:
    """Different things."""
    return rng.sample([f"{make} {thing}" for make in MAKES for thing in THINGS], count)


def prologue(size: int, rng: random.Random) -> str:
    """At least ``size`` characters of sentences that answer no question."""
    said: list[str] = []
    while sum(map(len, said)) < size:
        said += rng.sample(PROLOGUE, len(PROLOGUE))
    return " ".join(said)
