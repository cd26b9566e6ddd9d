"""The page of a training run: accuracy, routing, learning curves, the split, and what the training cost.

This module turns metrics.json into figures and table rows; templates/run.html holds the text around them. A part that
was not measured is left out of the page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nmoe_train.results.pages.charts import Figure, bars, curves, dots, figure, finite_number, heat_map
from nmoe_train.results.pages.formats import METHOD_NAMES, MISSING, percentage
from nmoe_train.results.pages.render import TEMPLATES, render
from nmoe_train.results.pages.resource_tables import CLIENT_COLUMNS, STAGE_COLUMNS, resource_tables

TEMPLATE = TEMPLATES / "run.html"
SETS = {"own": "own distribution", "iid": "balanced"}
MEASURES = {"accuracy": "accuracy", "macro_f1": "macro F1", "auc": "AUC"}
EXPLANATIONS = {
    "networked": "the gate chooses which expert answers",
    "own_expert": "the same devices without a network",
    "fedce": "stage 1’s classifier",
    "local": "trained by each client alone",
    "fedavg": "one shared classifier, averaged over all clients",
    "fedavg_prior": "answers times the client’s class mix; on balanced rows, a mix estimated from unlabelled rows",
    "fedavg_tuned": "trained further by each client alone",
    "fedrep": "lower layers averaged, upper layers per client",
    "ditto": "a classifier per client, pulled towards the average",
    "lda": "class means and one covariance of the extractor’s latents, sent once",
    "lda_prior": "the same, with a class mix as for FedAvg",
    "centralised": "trained on all samples in one place",
}
"""What each method of METHOD_NAMES is."""
MIX_KEYS = ("without_class_mix", "with_class_mix")
FACTS = {
    "data": "data.name",
    "clients": "data.clients",
    "split": "data.partition",
    "extractor": "extractor.method",
    "backbone": "extractor.backbone",
    "gate": "gate.method",
    "seed": "seed",
}
"""Short name -> setting, for the line under the title."""
CURVES = {
    "loss": (1, "loss", "Loss of the {} stage in each round. Lower is better."),
    "accuracy": (100, "percent", "Accuracy of the {} stage in each round. Higher is better."),
    "epsilon": (1, "epsilon", "Privacy spent by the {} stage so far, as ε. Lower protects better."),
}
"""Key of the history -> scale, y label and caption."""
ROUTING_CAPTIONS = {
    "own": "Own distribution. Each row is a device, each column an expert, each cell the percentage of the device’s"
    " samples that this expert answered. Samples on the diagonal were answered locally: the stronger the diagonal, the"
    " less was sent.",
    "iid": "Balanced test set, to be read in the same way. Here every device sees every class, so it asks its peers"
    " more often.",
}
SPLIT_CAPTION = (
    "Training samples. Each row is a client, each column a class, each cell the number of samples of that class that"
    " the client has. The more the rows differ, the more the clients differ."
)


def page(
    title: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    labels: Sequence[str],
    baselines: Mapping[str, Any] | None = None,
) -> str:
    """The whole page.

    labels: the names of classes; a class without one is shown by its number
    baselines: method -> figures, for each test set
    """
    settings = dict(_flat(config))
    history = metrics.get("history") or ()
    return render(
        TEMPLATE,
        title=title,
        facts=[(name, settings[key]) for name, key in FACTS.items() if key in settings],
        note=metrics.get("note"),
        comparison=_comparison(metrics, baselines or {}),
        class_mix=_class_mix(metrics, baselines or {}),
        kept_local=_kept_local(metrics),
        unseen=_unseen(metrics),
        calibration=metrics.get("calibration") or {},
        uneven=_uneven(metrics.get("split") or {}),
        device_figures=_device_figures(metrics),
        routing_figures=_routing_figures(metrics),
        load_figures=_load_figures(metrics),
        learning_figures=_learning_figures(history),
        dropouts=_dropouts(history),
        split=_split(metrics.get("split") or {}, labels),
        cost=_cost(metrics.get("bytes") or {}, metrics.get("seconds") or {}),
        resources=resource_tables(metrics.get("resources") or {}),
        resource_columns=(STAGE_COLUMNS, CLIENT_COLUMNS),
        privacy=_privacy(metrics.get("privacy") or {}),
        settings=settings,
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """The table of methods: a column for each measure of each test set."""

    parts: list[str]
    measures: list[str]
    rows: list[tuple[str, str, list[tuple[str, bool]]]]
    """Name, explanation, and for each column the percentage and whether it is the best of the column."""


def _comparison(metrics: Mapping[str, Any], baselines: Mapping[str, Any]) -> Comparison | None:
    """None where no method was measured."""
    found = {part: {**(baselines.get(part) or {}), **(metrics.get(part) or {})} for part in SETS}
    parts = [part for part in SETS if found[part].keys() & METHOD_NAMES.keys()]
    columns = [(part, measure) for part in parts for measure in MEASURES]
    methods = [method for method in METHOD_NAMES if any(found[part].get(method) for part in parts)]
    if not methods:
        return None
    shares = {}
    for method in methods:
        figures = {part: found[part].get(method) or {} for part in parts}
        shares[method] = [finite_number(figures[part].get(measure)) for part, measure in columns]
    best = [_best(column) for column in zip(*shares.values(), strict=True)]
    rows = []
    for method in methods:
        texts = [percentage(share) for share in shares[method]]
        cells = [(text, text == top) for text, top in zip(texts, best, strict=True)]
        rows.append((METHOD_NAMES[method], EXPLANATIONS[method], cells))
    return Comparison([SETS[part] for part in parts], [MEASURES[measure] for _, measure in columns], rows)


def _best(column: Sequence[float | None]) -> str | None:
    """The largest percentage as the table shows it; None where at most one method has a figure."""
    known = [share for share in column if share is not None]
    return percentage(max(known)) if len(known) > 1 else None


@dataclass(frozen=True, slots=True)
class WithMix:
    """The table of accuracies without and with the class mix: two columns for each test set."""

    used: bool
    """Whether devices use it."""
    parts: list[str]
    rows: list[tuple[str, list[str]]]


def _class_mix(metrics: Mapping[str, Any], baselines: Mapping[str, Any]) -> WithMix | None:
    """None where nothing was measured both ways: in old runs, and where answers carry a prior of their own."""
    found = {part: {**(baselines.get(part) or {}), **(metrics.get(part) or {})} for part in SETS}
    rows = []
    for method, name in METHOD_NAMES.items():
        figures = [(found[part].get(method) or {}).get(key) or {} for part in SETS for key in MIX_KEYS]
        shares = [finite_number(one.get("accuracy")) for one in figures]
        if any(share is not None for share in shares):
            rows.append((name, [percentage(share) for share in shares]))
    if not rows:
        return None
    used = (((metrics.get("own") or {}).get("networked") or {}).get("class_mix")) is True
    return WithMix(used, list(SETS.values()), rows)


def _unseen(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the local exit does with balanced samples of classes that the device's client has never seen."""
    unseen = (metrics.get("iid") or {}).get("unseen") or {}
    return unseen if finite_number(unseen.get("kept")) is not None else None


def _uneven(split: Mapping[str, Any]) -> tuple[int, int] | None:
    """Smallest and largest class of the whole test set, where they differ by more than a half."""
    counts = split.get("whole_test")
    if not counts or 2 * max(counts[0]) <= 3 * min(counts[0]):
        return None
    return min(counts[0]), max(counts[0])


def _kept_local(metrics: Mapping[str, Any]) -> list[tuple[float, str]]:
    """(share of samples answered locally, name of the test set)"""
    shares = [(finite_number((metrics.get(part) or {}).get("kept_local")), name) for part, name in SETS.items()]
    return [(share, name) for share, name in shares if share is not None]


def _device_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    found: dict[str, dict[str, Sequence[float]]] = {}
    for part in SETS:
        found[part] = {}
        for method in ("networked", "own_expert"):
            accuracies = ((metrics.get(part) or {}).get(method) or {}).get("devices")
            if accuracies:
                found[part][METHOD_NAMES[method]] = accuracies
    every = [share for series in found.values() for shares in series.values() for share in shares]
    figures = []
    for part, series in found.items():
        if series:
            names = _numbers(max(map(len, series.values())))
            caption = f"Accuracy of each device, {SETS[part]}. A dot above its ring: the network helps this device."
            span = min(every), max(every)
            figures.append(figure(dots, series, names, "device", caption=caption, span=span))
    return figures


def _routing_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for part, caption in ROUTING_CAPTIONS.items():
        matrix = (metrics.get(part) or {}).get("routing")
        if matrix:
            devices = _numbers(len(matrix))
            experts = _numbers(len(matrix[0]))
            figures.append(figure(heat_map, matrix, devices, experts, caption=caption))
    return figures


def _load_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for part, name in SETS.items():
        load = (metrics.get(part) or {}).get("load")
        if load:
            caption = f"Share of all samples that each expert answered, {name}. Dashed line: equal shares."
            figures.append(figure(bars, load, _numbers(len(load)), "expert", caption=caption))
    return figures


def _learning_figures(history: Sequence[Mapping[str, Any]]) -> list[Figure]:
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for entry in history:
        by_stage.setdefault(str(entry.get("stage")), []).append(entry)
    figures = []
    for stage, entries in by_stage.items():
        rounds = [entry for entry in entries if finite_number(entry.get("round"))]
        for key, (scale, y_label, caption) in CURVES.items():
            points = [
                (entry["round"], scale * entry[key]) for entry in rounds if finite_number(entry.get(key)) is not None
            ]
            if points:
                series = {stage: points}
                figures.append(figure(curves, series, "round", y_label, caption=caption.format(stage)))
    return figures


@dataclass(frozen=True, slots=True)
class Dropouts:
    times: int
    rounds: int
    """Rounds with at least one dropout."""
    all_rounds: int
    worst: str
    """The client that dropped out most often."""
    worst_times: int


def _dropouts(history: Sequence[Mapping[str, Any]]) -> Dropouts | None:
    lost = [entry["lost"] for entry in history if entry.get("lost")]
    if not lost:
        return None
    times = Counter(client for clients in lost for client in clients)
    worst, worst_times = times.most_common(1)[0]
    return Dropouts(sum(times.values()), len(lost), len(history), worst, worst_times)


@dataclass(frozen=True, slots=True)
class Split:
    """Numbers of samples over all clients, except smallest and largest."""

    train: int
    smallest: int
    """Training samples of the client with the fewest."""
    largest: int
    """Training samples of the client with the most."""
    held_out: int
    test: int
    figure: Figure


def _split(split: Mapping[str, Any], labels: Sequence[str]) -> Split | None:
    counts = split.get("train")
    if not counts:
        return None
    classes = max(map(len, counts))
    names = [*labels[:classes], *_numbers(classes)[len(labels) :]]
    clients = _numbers(len(counts))
    largest_cell = max(map(max, counts))
    axes = ("client", "class")
    chart = figure(heat_map, counts, clients, names, caption=SPLIT_CAPTION, axes=axes, largest=largest_cell)
    sizes = [sum(row) for row in counts]
    held_out = sum(map(sum, split.get("held_out") or ()))
    test = sum(map(sum, split.get("test") or ()))
    return Split(sum(sizes), min(sizes), max(sizes), held_out, test, chart)


Cost = tuple[str, float | None, float | None, float | None]
"""Stage, bytes sent by clients, bytes sent to clients, seconds."""


def _cost(sent: Mapping[str, Any], seconds: Mapping[str, float]) -> list[Cost]:
    """A row for each stage and one for the total; empty where nothing was measured."""
    stages = [stage for stage in dict.fromkeys([*sent, *seconds]) if stage != "all"]
    if not stages:
        return []
    rows: list[Cost] = []
    for stage in stages:
        up = (sent[stage].get("up") or 0) if stage in sent else None
        down = (sent[stage].get("down") or 0) if stage in sent else None
        rows.append((stage, up, down, seconds.get(stage)))
    all_up = _total(up for _, up, _, _ in rows)
    all_down = _total(down for _, _, down, _ in rows)
    rows.append(("total", all_up, all_down, seconds.get("all", _total(seconds.values()))))
    return rows


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _privacy(spent: Mapping[str, Any]) -> dict[str, str] | None:
    """Four significant digits of each figure."""
    if not spent:
        return None
    figures = {key: finite_number(spent.get(key)) for key in ("releases", "sigma", "epsilon", "delta")}
    return {key: MISSING if value is None else f"{value:.4g}" for key, value in figures.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its dotted name."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]
