"""A run as one page that opens anywhere: what it is worth, who asks whom, how it learned, what it cost.

The page holds its style and its pictures; it fetches nothing, runs nothing, and leaves out what was not measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nmoe_train.results.pages.charts import bars, curves, dots, escaped, figure, heat_map, measured, night

SETS = {"own": "own distribution", "iid": "balanced"}
MEASURES = {"accuracy": "accuracy", "macro_f1": "macro F1", "auc": "AUC"}
METHODS = {
    "networked": ("Networked", "the gate picks which expert answers"),
    "own_expert": ("Own expert alone", "the same devices without a network"),
    "fedce": ("FedCE classifier", "stage 1’s one classifier for all"),
    "local": ("Local classifier", "trained by each client alone"),
    "fedavg": ("FedAvg classifier", "one for all, averaged"),
    "centralised": ("Centralised mixture", "trained with all samples in one place"),
}
HEAD = {
    "data": "data.name",
    "clients": "data.clients",
    "split": "data.partition",
    "extractor": "extractor.method",
    "backbone": "extractor.backbone",
    "gate": "gate.method",
    "seed": "seed",
}

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2025; --soft: #59616b; --line: #d9dde2; --best: #e3eefb }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e7eaee; --soft: #a2abb6; --line: #363c45; --best: #1d3553 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1020px; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
p { max-width: 46rem; margin: .5rem 0 }
.head span { display: inline-block; margin-right: 1.25rem }
.head b { color: var(--ink); font-weight: 600 }
.head, figcaption, small { color: var(--soft) }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.25rem 2rem;
  margin: 1rem 0 }
figure { margin: .5rem 0; min-width: 0; break-inside: avoid }
figcaption { font-size: .875em; line-height: 1.4 }
svg { display: block; max-width: 100%; height: auto; margin-bottom: .4rem }
.box { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600 } th small { display: block; font-weight: 400 } th[colspan] { text-align: center }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper) }
.methods td:nth-child(5), .methods tr + tr th:nth-child(5) { border-left: 1px solid var(--line) }
@media (max-width: 600px) {
  th, td { padding: .3rem .4rem; font-size: .875rem } th:first-child { white-space: normal; min-width: 7.5rem }
}
.settings th { font-weight: 400 } .settings td { text-align: left; white-space: normal }
.best { background: var(--best); font-weight: 700; print-color-adjust: exact }
summary { cursor: pointer; margin-top: 2.5rem; font-size: 1.2rem; font-weight: 600 }
@media print { body { max-width: none; padding: 0; font-size: 13px } h2 { break-after: avoid }
  .pictures { grid-template-columns: 1fr 1fr } }
"""


def page(
    title: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    labels: Sequence[str],
    baselines: Mapping[str, Any] | None = None,
) -> str:
    """The whole page. `labels` name the classes; one that has no name goes by its number."""
    settings = dict(_flat(config))
    head = "".join(
        f"<span>{name} <b>{escaped(settings[key])}</b></span> " for name, key in HEAD.items() if key in settings
    )
    note = f"<p>{escaped(metrics['note'])}</p>" if metrics.get("note") else ""
    sections = {
        "What it is worth": _methods(metrics, baselines or {}) + _kept(metrics) + _devices(metrics),
        "Who asks whom": _routing(metrics),
        "How it learned": _learning(metrics.get("history") or ()),
        "Who has which samples": _samples(metrics.get("split") or {}, labels),
        "What it cost": _cost(metrics),
    }
    body = "".join(f"<section><h2>{heading}</h2>{text}</section>" for heading, text in sections.items() if text)
    rows = "".join(f"<tr><th>{escaped(key)}</th><td>{escaped(value)}</td></tr>" for key, value in settings.items())
    return document(
        title,
        f'<p class="head">{head}</p>{note}{body or "<p>Nothing was measured.</p>"}'
        "<details><summary>Every setting</summary>"
        f'<div class="box"><table class="settings">{rows}</table></div></details>',
    )


def document(title: str, body: str) -> str:
    """A page around a body of HTML."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}{night()}</style></head><body>"
        f"<h1>{escaped(title)}</h1>{body}</body></html>\n"
    )


def _methods(metrics: Mapping[str, Any], baselines: Mapping[str, Any]) -> str:
    found = {part: {**(baselines.get(part) or {}), **(metrics.get(part) or {})} for part in SETS}
    parts = [part for part in SETS if found[part].keys() & METHODS.keys()]
    columns = [(part, measure) for part in parts for measure in MEASURES]
    table = {
        key: [_percent((found[part].get(key) or {}).get(measure)) for part, measure in columns]
        for key in METHODS
        if any(found[part].get(key) for part in parts)
    }
    if not table:
        return ""
    rows = ""
    known = [[cell for cell in column if cell != "–"] for column in zip(*table.values(), strict=True)]
    best = [max(column, key=float) if len(column) > 1 else None for column in known]
    for key, cells in table.items():
        pairs = zip(cells, best, strict=True)
        marked = "".join(f'<td class="best">★ {c}</td>' if c == b else f"<td>{c}</td>" for c, b in pairs)
        rows += f"<tr><th>{METHODS[key][0]}<small>{METHODS[key][1]}</small></th>{marked}</tr>"
    head = "".join(f'<th colspan="{len(MEASURES)}">{SETS[part]}</th>' for part in parts)
    measures = "".join(f"<th>{MEASURES[measure]}</th>" for _, measure in columns)
    return (
        "<p>Percent, the mean over all devices; higher is better, ★ is the best of its column. <b>Own distribution</b>:"
        " each device on samples like its own client’s. <b>Balanced</b>: every device on the whole test set.</p>"
        f'<div class="box"><table class="methods"><tr><th></th>{head}</tr><tr><th></th>{measures}</tr>{rows}</table>'
        "</div>"
    )


def _kept(metrics: Mapping[str, Any]) -> str:
    shares = {name: measured((metrics.get(part) or {}).get("kept_local")) for part, name in SETS.items()}
    told = " and ".join(f"{_percent(share)} % ({name})" for name, share in shares.items() if share is not None)
    if not told:
        return ""
    return f"<p>Of a device’s samples {told} stayed at home: its own expert answered and nothing was sent.</p>"


def _devices(metrics: Mapping[str, Any]) -> str:
    found: dict[str, dict[str, Sequence[float]]] = {}
    for part in SETS:
        both = {METHODS[key][0]: (metrics.get(part) or {}).get(key) or {} for key in ("networked", "own_expert")}
        found[part] = {name: figures["devices"] for name, figures in both.items() if figures.get("devices")}
    every = [share for series in found.values() for shares in series.values() for share in shares]
    figures = []
    for part, series in found.items():
        if series:
            names = _numbers(max(map(len, series.values())))
            caption = f"Accuracy of each device, {SETS[part]}; higher is better. A dot above a ring: the network helps."
            span = min(every), max(every)
            figures.append(figure(dots, series, names, "device", caption=caption, span=span))
    return pictures(figures)


def _routing(metrics: Mapping[str, Any]) -> str:
    explained = {
        "own": "Own distribution. Each row is a device, each column an expert, each cell how much of the device’s "
        "samples that expert answered, in percent. The diagonal stayed at home: the stronger it is, the less was sent.",
        "iid": "Balanced test set, read in the same way. Here every device sees all classes, so it has more to ask.",
    }
    maps, loads = [], []
    for part, caption in explained.items():
        found = metrics.get(part) or {}
        if matrix := found.get("routing"):
            maps.append(figure(heat_map, matrix, _numbers(len(matrix)), _numbers(len(matrix[0])), caption=caption))
        if load := found.get("load"):
            caption = f"How much of all the work each expert did, {SETS[part]}. Dashed: if all did the same."
            loads.append(figure(bars, load, _numbers(len(load)), "expert", caption=caption))
    return pictures(maps) + pictures(loads)


def _learning(history: Sequence[Mapping[str, Any]]) -> str:
    measures = {
        "loss": (1, "loss", "Loss of the {} stage, round by round; lower is better."),
        "accuracy": (100, "percent", "Accuracy in the {} stage, round by round; higher is better."),
        "epsilon": (1, "epsilon", "Privacy spent in the {} stage so far, as ε; lower protects better."),
    }
    figures = []
    for stage in dict.fromkeys(str(entry.get("stage")) for entry in history):
        entries = [entry for entry in history if str(entry.get("stage")) == stage and measured(entry.get("round"))]
        for key, (unit, y_label, caption) in measures.items():
            points = [(entry["round"], unit * entry[key]) for entry in entries if measured(entry.get(key)) is not None]
            if points:
                figures.append(figure(curves, {stage: points}, "round", y_label, caption=caption.format(stage)))
    return pictures(figures) + _dropouts(history)


def _dropouts(history: Sequence[Mapping[str, Any]]) -> str:
    lost = [entry["lost"] for entry in history if entry.get("lost")]
    times = Counter(client for clients in lost for client in clients)
    if not times:
        return ""
    worst, count = times.most_common(1)[0]
    return (
        f"<p>Clients dropped out {_times(times.total())}, in {len(lost)} of {len(history)} rounds, most often client "
        f"{escaped(worst)} ({_times(count)}); those rounds went on without them.</p>"
    )


def _samples(split: Mapping[str, Any], labels: Sequence[str]) -> str:
    counts = split.get("train")
    if not counts:
        return ""
    classes = max(map(len, counts))
    names = [*labels[:classes], *_numbers(classes)[len(labels) :]]
    sizes = [sum(row) for row in counts]
    rest = {"held_out": "held out to choose thresholds on", "test": "for the devices’ own tests"}
    others = "".join(f", {sum(map(sum, split[part])):,} {what}" for part, what in rest.items() if split.get(part))
    caption = (
        "Training samples. Each row is a client, each column a class, each cell how many samples of that class the "
        "client has. Rows that differ are clients that see different worlds."
    )
    options = {"axes": ("client", "class"), "largest": max(map(max, counts))}
    chart = figure(heat_map, counts, _numbers(len(counts)), names, caption=caption, **options)
    each = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    return f"<p>{sum(sizes):,} training samples, {each} a client{others}.</p>{chart}"


def _cost(metrics: Mapping[str, Any]) -> str:
    sent, seconds = metrics.get("bytes") or {}, metrics.get("seconds") or {}
    ways = {way: {stage: both.get(way) or 0 for stage, both in sent.items()} for way in ("up", "down")}
    stages = [stage for stage in dict.fromkeys([*sent, *seconds]) if stage != "all"]
    rows = [(stage, *(ways[way].get(stage) for way in ways), seconds.get(stage)) for stage in stages]
    total = [sum(way.values()) if sent else None for way in ways.values()]
    rows.append(("in all", *total, seconds.get("all", sum(seconds.values()) if seconds else None)))
    cells = "".join(
        f"<tr><th>{escaped(stage)}</th><td>{_size(up)}</td><td>{_size(down)}</td><td>{_duration(time)}</td></tr>"
        for stage, up, down, time in rows
    )
    table = (
        '<div class="box"><table><tr><th>stage</th><th>sent by clients</th><th>sent to clients</th><th>time</th></tr>'
        f"{cells}</table></div><p>All clients and all rounds together; an evaluation sends nothing.</p>"
    )
    return (table if stages else "") + _privacy(metrics.get("privacy") or {})


def _privacy(spent: Mapping[str, Any]) -> str:
    if not spent:
        return ""
    figures = [measured(spent.get(key)) for key in ("releases", "sigma", "epsilon", "delta")]
    releases, sigma, epsilon, delta = ("–" if figure is None else f"{figure:.4g}" for figure in figures)
    return (
        f"<p>Privacy: the matrices of the extractor stage, {releases} releases with noise of up to σ = {sigma}, are "
        f"differentially private with ε = {epsilon} at δ = {delta}; a smaller ε protects better. Weights that were "
        "sent are not covered.</p>"
    )


def pictures(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    drawn = "".join(figures)
    return f'<div class="pictures">{drawn}</div>' if drawn else ""


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting under its dotted name."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _percent(share: Any) -> str:
    return "–" if measured(share) is None else f"{100 * share:.1f}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _size(count: float | None) -> str:
    """Bytes, for people."""
    if count is None:
        return "–"
    power = min(int(math.log10(max(count, 1)) / 3), 4)
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _duration(seconds: float | None) -> str:
    """Seconds, for people."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if round(seconds) < 60:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
