"""What nmoe-train prints: progress on stderr, tables of results, and rounds as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from nmoe_edge.common.progress import ProgressLine
from nmoe_train.results.pages.formats import METHOD_NAMES

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
        nothing = "no client took part" if state.lost else "nothing to train"
        line += f"  loss {state.loss:.3f}" if state.loss is not None else f"  {nothing}"
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


def json_line(finished: Round) -> None:
    """Print a round as one line of JSON on stdout."""
    click.echo(json.dumps(asdict(finished)))


def table(metrics: Mapping[str, Any], baselines: Mapping[str, Any] | None = None) -> str:
    """Accuracies of a run's methods, and of baselines if given: one line per method, one column per test set."""
    own = metrics["own"]
    iid = metrics["iid"]
    lines = [f"{'':<24}{'own distribution':>18}{'balanced':>10}"]
    lines += [_line(name, own[key], iid[key]) for key, name in METHOD_NAMES.items() if key in own]
    if baselines is not None:
        found = [(name, baselines[key]) for key, name in METHOD_NAMES.items() if key in baselines]
        lines += [_line(name, figures["own"], figures["iid"]) for name, figures in found]
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
