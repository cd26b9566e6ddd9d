"""What a training says on the terminal: progress on stderr, results for people, rounds for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from nmoe_train.stages.federation import Round


class Progress:
    """Where a training stands, on stderr: one line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        """The clock starts now."""
        self._stage, self._began, self._said = "", time.monotonic(), 0.0

    def __call__(self, told: Round) -> None:
        """After each round."""
        now = time.monotonic()
        if told.stage != self._stage:
            self._stage, self._first, self._began = told.stage, told.round, now
        line = f"{told.stage:<9} {told.round:>4}/{told.rounds}"
        line += f"  loss {told.loss:.3f}" if told.loss is not None else "  nobody took part"
        line += f"  accuracy {told.accuracy:.1%}" if told.accuracy is not None else ""
        line += f"  ε {told.epsilon:.3g}" if told.epsilon is not None else ""
        line += f"  without {', '.join(map(str, told.lost))}" if told.lost else ""
        terminal, last = sys.stderr.isatty(), told.round == told.rounds
        if told.round > self._first and not last:
            left = (now - self._began) / (told.round - self._first) * (told.rounds - told.round)
            line += f"  {left:.0f} s left" if left < 100 else f"  {left / 60:.0f} min left"
        if terminal:
            click.echo(f"\r\x1b[K{line}", err=True, nl=last)
        elif last or now - self._said > 5:
            click.echo(line, err=True)
            self._said = now


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
