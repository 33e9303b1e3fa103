"""What a reader wants to know of a method: its card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Site = Literal["attention", "cache", "tokens", "neurons", "weights", "adapters", "features", "mixer"]
Training = Literal["none", "calibration", "training"]


@dataclass(frozen=True)
class Card:
    """What a reader wants to know before using a method.

    Args:
        slug: the name used in specs; equals the file name with ``-`` for ``_``.
        title: the paper's title ("" for a control that no paper introduced).
        paper: where it stands, e.g. ``"arXiv 2502.20766, ICLR 2025"``.
        site: what the method makes sparse.
        training: what has to happen before it can be used.
        summary: one line for ``sparseland list``.
        claims: the paper's headline results, in its own numbers.
        deviations: where we differ from the paper or from its code, and why.
        limits: what the method is known not to do.
        control: a yardstick rather than a proposal; ``frontier`` runs it at a method's density and
            never recommends it.
    """

    slug: str
    title: str
    paper: str
    site: Site
    training: Training
    summary: str
    claims: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    control: bool = False
