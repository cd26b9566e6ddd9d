"""What nmoe-train prints: progress on stderr, tables of results, and rounds as JSON."""

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

METHODS = {"networked": "networked", "own_expert": "own expert alone", "fedce": "FedCE classifier"}
"""Methods of metrics.json, as the table names them."""
BASELINES = {"local": "local classifiers", "fedavg": "FedAvg classifier", "centralised": "centralised mixture"}
"""Methods of baselines.json, as the table names them."""


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


def json_line(finished: Round) -> None:
    """Print a round as one line of JSON on stdout."""
    click.echo(json.dumps(asdict(finished)))


def table(metrics: Mapping[str, Any], baselines: Mapping[str, Any] | None = None) -> str:
    """Accuracies of a run's methods, and of baselines if given: one line per method, one column per test set."""
    own = metrics["own"]
    iid = metrics["iid"]
    lines = [f"{'':<24}{'own distribution':>18}{'balanced':>10}"]
    lines += [_line(name, own[key], iid[key]) for key, name in METHODS.items() if key in own]
    if baselines is not None:
        lines += [_line(name, baselines[key]["own"], baselines[key]["iid"]) for key, name in BASELINES.items()]
    return "\n".join(lines)


def _line(name: str, own: Mapping[str, Any], iid: Mapping[str, Any]) -> str:
    return f"{name:<24}{own['accuracy']:>18.1%}{iid['accuracy']:>10.1%}"


def summary(metrics: Mapping[str, Any]) -> str:
    """The table of a run, the share of rows that asked another device, and notes on load and privacy."""
    lines = [
        table(metrics),
        f"asked another device: {metrics['own']['asked']:.1%} of the rows of a device's own distribution,"
        f" {metrics['iid']['asked']:.1%} of the balanced rows",
    ]
    load = metrics["iid"]["load"]
    busiest = max(load)
    if len(load) > 2 and busiest > max(0.25, 3 / len(load)):
        lines.append(
            f"note: expert {load.index(busiest)} answers {busiest:.0%} of the balanced rows;"
            " raise gate.load_loss to spread them over more experts"
        )
    privacy = metrics.get("privacy")
    if privacy:
        lines.append(
            f"privacy: ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:g} for one sample in FedSC's matrices;"
            " the weights that clients send are not protected"
        )
    return "\n".join(lines)
