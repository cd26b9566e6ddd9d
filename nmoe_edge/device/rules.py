"""How a device answers: what a user may set, and what holds once the bundle has filled in the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nmoe_edge.bundle.manifest import Manifest
from nmoe_edge.common.limits import MAX_ANSWERED
from nmoe_edge.errors import ModelError

LatentType = Literal["int8", "float16", "float32"]

GATE_ALONE = 1.0
"""`local_first` that no confidence exceeds: every row goes where the gate sends it."""
_MAX_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Rules:
    """What a user may set about how a device answers. None means: as the bundle says.

    Raises ModelError when a value is out of range.

        Node("bundles/digits/device-00", "bundles/digits/fleet.toml", rules=Rules(top_k=2, deadline_s=0.2))
    """

    top_k: int | None = None
    """Experts that a row is sent to, 1 or more; the bundle limits it (see `resolve`)."""
    local_first: float | None = None
    """0 to 1. A row is answered locally if the own expert's confidence is higher; 1: the gate alone decides.

    Where the bundle has statistics of familiar latents, the latent must also be familiar."""
    adapt: bool | None = None
    """Whether to estimate the device's class mix from its answers and weight answers with it."""
    latents: LatentType | None = None
    """The type in which latents travel to peers."""
    deadline_s: float = 1.0
    """Seconds that a request may take at most; a client may ask for less. Over 0, at most 3600."""
    prefer_near: float = 0.0
    """Gate score that a peer loses per millisecond of its usual answering time; 0 or more."""
    hedge: bool = True
    """Whether to ask another expert as well when one is later than usual."""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s <= _MAX_DEADLINE_S:
            raise ModelError(
                f"a deadline of {self.deadline_s} s is out of range: it must be over 0 and at most an hour"
            )
        if self.local_first is not None and not 0 <= self.local_first <= 1:
            raise ModelError(f"local-first is {self.local_first}; it must be a number from 0 to 1")
        if not 0 <= self.prefer_near < float("inf"):
            raise ModelError(f"prefer-near is {self.prefer_near}; it must be a finite number, 0 or more")

    def resolve(self, manifest: Manifest) -> ResolvedRules:
        """These rules with the bundle's values where they say None.

        Raises ModelError when the bundle does not allow them: a top-k beyond its experts (or beyond 64, the most
        that a message holds), or `adapt` although its answers already contain a class prior.
        """
        routing = manifest.routing
        top_k = routing.top_k if self.top_k is None else self.top_k
        max_top_k = min(manifest.experts, MAX_ANSWERED)
        if not 1 <= top_k <= max_top_k:
            raise ModelError(
                f"top-k {top_k} is not in 1..{max_top_k}, what this bundle's {manifest.experts} experts allow"
            )
        if self.adapt and manifest.answers_carry_prior:
            raise ModelError("adapt needs answers that carry no prior, and these do")
        local_first = routing.local_first if self.local_first is None else self.local_first
        return ResolvedRules(
            top_k=top_k,
            local_first=GATE_ALONE if local_first is None else local_first,
            familiar=routing.familiar,
            adapt=routing.adapt if self.adapt is None else self.adapt,
            latents=manifest.latent.dtype if self.latents is None else self.latents,
            deadline_s=self.deadline_s,
            prefer_near=self.prefer_near,
            hedge=self.hedge,
        )


@dataclass(frozen=True, slots=True)
class ResolvedRules:
    """The rules of one device and one bundle; nothing is left open. The fields mean what they mean in Rules."""

    top_k: int
    local_first: float
    """From 0 to GATE_ALONE."""
    familiar: float | None
    """The largest distance of a latent that local-first answers; the bundle says it, and None: not tested."""
    adapt: bool
    latents: LatentType
    deadline_s: float
    prefer_near: float
    hedge: bool
