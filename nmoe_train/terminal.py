"""What a training says on the terminal: progress on stderr, results for people, rounds for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from nmoe_edge.common.progress import ProgressLine

if TYPE_CHECKING:
    from nmoe_train.stages.federation import Round


class Progress:
    """Shows each round of a training on stderr: one line rewritten in place, or in a log file a line every 5 s."""

    def __init__(self) -> None:
        self._line = ProgressLine(every_s=5.0)
        self._stage = ""
        self._first_round = 0
        self._began = time.monotonic()

    def __call__(self, state: Round) -> None:
        now = time.monotonic()
        if state.stage != self._stage:
            self._stage = state.stage
            self._first_round = state.round
            self._began = now
        last = state.round == state.rounds
        line = f"{state.stage:<9} {state.round:>4}/{state.rounds}"
        line += f"  loss {state.loss:.3f}" if state.loss is not None else "  no client took part"
        if state.accuracy is not None:
            line += f"  accuracy {state.accuracy:.1%}"
        if state.epsilon is not None:
            line += f"  ε {state.epsilon:.3g}"
        if state.lost:
            line += f"  without {', '.join(map(str, state.lost))}"
        rounds_timed = state.round - self._first_round
        if rounds_timed > 0 and not last:
            left_s = (now - self._began) / rounds_timed * (state.rounds - state.round)
            line += f"  {left_s:.0f} s left" if left_s < 100 else f"  {left_s / 60:.0f} min left"
        self._line.update(line, last)


def json_line(told: Round) -> None:
    """A round for machines, on stdout."""
    click.echo(json.dumps(asdict(told)))


def devices(count: int) -> str:
    """A count of them in words."""
    return f"{count} device" + "s" * (count != 1)


def table(metrics: Mapping[str, Any]) -> list[str]:
    """What a run is worth beside what it holds: accuracies, line by line."""
    lines = [f"{'':<24}{'own distribution':>18}{'balanced':>10}"]
    names = {"networked": "networked", "own_expert": "own expert alone", "fedce": "FedCE classifier"}
    for key, name in names.items():
        if key in metrics["own"]:
            own, iid = (metrics[part][key]["accuracy"] for part in ("own", "iid"))
            lines.append(f"{name:<24}{own:>18.1%}{iid:>10.1%}")
    return lines


def summary(metrics: Mapping[str, Any]) -> str:
    """The same, and how much was asked of others."""
    lines = table(metrics)
    asked = [metrics[part]["asked"] for part in ("own", "iid")]
    lines.append(
        f"{asked[0]:.1%} of the rows of a device's own mix asked another device, {asked[1]:.1%} of the balanced ones"
    )
    load = metrics["iid"]["load"]
    if len(load) > 2 and max(load) > max(0.25, 3 / len(load)):
        lines.append(
            f"note: expert {load.index(max(load))} answers {max(load):.0%} of the balanced rows;"
            " gate.load_loss spreads them"
        )
    privacy = metrics.get("privacy")
    if privacy:
        lines.append(
            f"privacy: ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:g} for a sample of FedSC's matrices;"
            " the weights that were sent are not covered"
        )
    return "\n".join(lines)
