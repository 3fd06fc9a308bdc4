"""The parts of a node that its extractions share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from headrace_extractor.extractions.estimates import RowCounter
from headrace_extractor.extractions.ports import Corpora, Models
from headrace_extractor.extractions.records import Records
from headrace_extractor.node.node import Node
from headrace_extractor.node.ports import Runner
from headrace_extractor.node.turns import Turns
from headrace_extractor.sets.keeper import SetKeeper


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Made once by `Extractions`, and handed to every job and every set's passes."""

    models: Models
    node: Node
    corpora: Corpora
    keeper: SetKeeper
    counter: RowCounter
    records: Records
    # Set whenever a set loses a holder: a deletion may wait for just that, so the registry is told soon.
    holder_left: asyncio.Event = field(default_factory=asyncio.Event)
    # Sets that need the same runner take turns on it; a runner's turns go with it.
    turns: WeakKeyDictionary[Runner, Turns] = field(default_factory=WeakKeyDictionary)
