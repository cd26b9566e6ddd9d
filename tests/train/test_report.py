from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from nmoe_train.charts import COLOURS, bars, curves, dots, figure, heat_map, stacks
from nmoe_train.report import page

HEADINGS = ["What it is worth", "Who asks whom", "How it learned", "Who has which samples", "What it cost"]
MEASURES = ("accuracy", "macro_f1", "auc")
LABELS = ["plane", "car", "bird", "cat"]
CONFIG = {
    "seed": 7,
    "data": {"name": "digits", "clients": 3, "train_size": None},
    "gate": {"widths": [8, 4], "on": True},
}


def measured(accuracies, macro_f1, auc):
    figures = {"accuracy": sum(accuracies) / len(accuracies), "macro_f1": macro_f1, "auc": auc}
    return {**figures, "pooled": figures, "devices": accuracies}


def evaluated(devices, kept):
    others = (1 - kept) / max(devices - 1, 1)
    routing = [[kept if i == j else others for j in range(devices)] for i in range(devices)]
    alone = [0.5 + 0.01 * (i % 10) for i in range(devices)]
    return {
        "networked": measured([share + 0.25 for share in alone], 0.8125, 0.99),
        "own_expert": measured(alone, 0.71, None),
        "fedce": measured([0.625] * devices, 0.601, 0.812),
        "routing": routing,
        "kept_local": kept,
        "load": [(i + 1) / (devices * (devices + 1) / 2) for i in range(devices)],
    }


def metrics_of(devices=3, classes=4, rounds=5):
    history = [
        {"stage": stage, "round": i, "loss": 2 / i, "accuracy": None if stage == "experts" else 1 - 0.5 / i}
        for stage in ("extractor", "experts", "gate")
        for i in range(1, rounds + 1)
    ]
    for entry in history[:rounds]:
        entry["epsilon"] = 0.5 * entry["round"]
    train = [[10 * client + k for k in range(classes)] for client in range(devices)]
    return {
        "own": evaluated(devices, 0.75),
        "iid": evaluated(devices, 0.4),
        "history": history,
        "split": {"train": train, "held_out": [[1] * classes] * devices, "test": [[2] * classes] * devices},
        "bytes": {"extractor": {"up": 35_200_000, "down": 1_500}, "gate": {"up": 800_000, "down": 999}},
        "seconds": {"extractor": 6.42, "gate": 71.6, "evaluate": 0.8, "all": 3711.9},
        "privacy": {"epsilon": 7.5, "delta": 1e-5, "sigma": 0.0192, "releases": 200},
    }


class Parsed(HTMLParser):
    """A page as a reader gets it: its tags, which must close, its texts, its tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.headings, self.tables = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)
        if "small" not in self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text
        elif self.open[-1:] == ["h2"]:
            self.headings[-1] += text


def pictures(text):
    """Every <svg> by what it is said to show."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {svg.get("aria-label"): svg for svg in found}


def hovers(svg):
    return [title.text for title in svg.iter("title")]


def texts(svg):
    return [text.text for text in svg.iter("text")]


def points(line):
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


def cells(svg):
    """{(row, column): what hovers over it} of a heat map."""
    return {tuple(re.findall(r"\w+ (\w+)[,:]", text)): text.split(": ")[1] for text in hovers(svg)}


def drawn_cells(svg):
    """[(the rectangle, the number in it or None)] of a heat map."""
    return [(cell.find("rect"), cell.find("text")) for cell in svg.iter("g") if cell.find("title") is not None]


def heat(matrix, **options):
    names = [[str(i) for i in range(count)] for count in (len(matrix), len(matrix[0]) if matrix else 0)]
    return ElementTree.fromstring(heat_map(matrix, *names, "", **options))


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def without(metrics, *keys):
    metrics = copy.deepcopy(metrics)
    *path, last = keys
    inner = metrics
    for key in path:
        inner = inner[key]
    del inner[last]
    return metrics


@pytest.mark.parametrize(
    ("devices", "classes", "rounds"), [(1, 1, 1), (3, 2, 1), (10, 10, 20), (40, 100, 3), (100, 2, 900)]
)
def test_a_page_of_any_size_is_sound(devices, classes, rounds):
    text = page("a run", CONFIG, metrics_of(devices, classes, rounds), LABELS, {"own": {"local": None}})
    assert Parsed(text).headings == HEADINGS
    assert len(pictures(text)) == 13
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(Parsed(text).texts))


def test_a_page_fetches_nothing_and_runs_nothing():
    text = page("a run", CONFIG, metrics_of(), LABELS)
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert not {"script", "link", "img", "iframe", "object", "use"} & {tag for tag, _ in Parsed(text).tags}
    assert not {"src", "href"} & {name for _, attributes in Parsed(text).tags for name in attributes}


def test_names_that_are_markup_stay_names():
    evil = "</title></svg><script>alert('1')</script>\"onload=x&\x00\ud800"
    metrics = metrics_of()
    metrics["history"] = [{"stage": evil, "round": i, "loss": 1 / i, "lost": [evil]} for i in (1, 2)]
    metrics["bytes"] = {evil: {"up": 1, "down": 2}}
    metrics["note"] = evil
    text = page(evil, {evil: evil, "data": {"name": evil}}, metrics, [evil] * 4)
    parsed = Parsed(text)
    assert len(pictures(text)) == 8
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert all(name != "onload" for _, attributes in parsed.tags for name in attributes)
    shown = evil.replace("\x00\ud800", "  ")
    # the tab, the heading, the note, the head's name, the stage of the table, key and value and name of the settings
    assert sum(shown in piece for piece in parsed.texts) >= 8
    assert text.encode()


def test_the_table_holds_the_figures_and_marks_the_best():
    metrics = metrics_of()
    baselines = {
        "own": {"fedavg": measured([0.9], 0.8125, 0.5), "centralised": measured([0.8], 0.1, 0.2)},
        "iid": {"centralised": measured([0.99], 0.98, 0.97)},
    }
    rows = Parsed(page("a run", CONFIG, metrics, LABELS, baselines)).tables[0][2:]
    found = {part: {**metrics[part], **baselines[part]} for part in ("own", "iid")}
    names = dict(
        zip(
            ["networked", "own_expert", "fedce", "fedavg", "centralised"],
            ["Networked", "Own expert alone", "FedCE classifier", "FedAvg classifier", "Centralised mixture"],
            strict=True,
        )
    )
    assert [row[0] for row in rows] == list(names.values())
    columns = [(part, measure) for part in ("own", "iid") for measure in MEASURES]
    for j, (part, measure) in enumerate(columns, start=1):
        known = {key: found[part].get(key, {}).get(measure) for key in names}
        best = max(value for value in known.values() if value is not None)
        due = ["–" if value is None else "★ " * (value == best) + f"{100 * value:.1f}" for value in known.values()]
        assert [row[j] for row in rows] == due
    assert rows[0][2] == rows[3][2] == "★ 81.2"  # two are best


def test_a_method_without_a_rival_is_not_called_the_best():
    metrics = {"own": {"networked": measured([0.5], 0.5, 0.5)}}
    assert Parsed(page("a run", {}, metrics, [])).tables[0][2] == ["Networked", "50.0", "50.0", "50.0"]


def test_what_stayed_at_home_is_said():
    text = page("a run", {}, metrics_of(), [])
    assert "75.0 % (own distribution) and 40.0 % (balanced) stayed at home" in text
    assert "Of a device’s samples 75.0 % (own distribution) stayed" in page("", {}, without(metrics_of(), "iid"), [])


def test_the_routing_is_drawn_cell_by_cell():
    metrics = metrics_of()
    metrics["own"]["routing"] = [[0.5, 0.25, 0.25], [0, 1, 0], [0.123, 0.877, 0]]
    text = page("a run", {}, metrics, [])
    svg = next(svg for caption, svg in pictures(text).items() if caption.startswith("Own distribution. Each row"))
    rows = enumerate(metrics["own"]["routing"])
    assert cells(svg) == {(str(i), str(j)): f"{100 * share:.4g} %" for i, row in rows for j, share in enumerate(row)}
    assert [text.text for _, text in drawn_cells(svg)] == ["50", "25", "25", "0", "100", "0", "12", "88", "0"]


def test_more_is_darker_by_day():
    depths = [contrast(rect.get("fill"), "#ffffff") for rect, _ in drawn_cells(heat([[0, 0.005, 0.05, 0.3, 0.7, 1]]))]
    assert depths == sorted(depths)
    assert len(set(depths)) == 6


def test_every_cell_can_be_read_by_day_and_by_night():
    night = re.findall(r"\.k(\d+) \{ fill: (#\w+) \} \.k\1 \+ text \{ fill: (#\w+) \}", page("", {}, {}, []))
    by_night = {f"k{level}": (cell, ink) for level, cell, ink in night}
    seen = set()
    for part in range(0, 1001, 10):
        for rect, text in drawn_cells(heat([[i / 1000 for i in range(part, part + 10)]])):
            assert contrast(rect.get("fill"), text.get("fill")) >= 4.5
            assert contrast(*by_night[rect.get("class")]) >= 4.5
            seen.add(rect.get("class"))
    assert seen == set(by_night)
    depths = [contrast(cell, "#000000") for cell, _ in by_night.values()]
    assert depths == sorted(depths)


def test_series_are_seen_on_white_and_on_dark():
    dark = re.search(r"dark\) \{\s*:root \{ --paper: (#\w+)", page("", {}, {}, [])).group(1)
    assert all(contrast(colour, paper) >= 3 for colour in COLOURS for paper in ("#ffffff", dark))


@pytest.mark.parametrize(
    ("size", "share", "written"), [(2, 1, True), (16, 1, True), (40, 0, False), (40, 1, False), (100, 0.25, False)]
)
def test_a_heat_map_writes_numbers_only_where_there_is_room(size, share, written):
    svg = heat([[share] * size] * size)
    assert {text is not None for _, text in drawn_cells(heat([[share] * size] * 3))} == {written}
    assert len(drawn_cells(svg)) == size * size
    assert {text is not None for _, text in drawn_cells(svg)} == {written}
    width, height = map(float, svg.get("viewBox").split()[2:])
    for rect, _ in drawn_cells(svg):
        x, y, wide, high = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    assert width <= 470


@pytest.mark.parametrize("matrix", [[], [[]], [[0]], [[1.5, -1, math.nan, math.inf]], [[0.5], [0.25]]])
def test_a_heat_map_of_odd_numbers_is_drawn(matrix):
    assert len(drawn_cells(heat(matrix))) == sum(map(len, matrix))
    assert not any("nan" in text or "inf" in text for text in hovers(heat(matrix)))


def test_a_heat_map_of_counts_writes_counts():
    svg = heat([[0, 250], [31, 2]], largest=250)
    assert [text.text for _, text in drawn_cells(svg)] == ["0", "250", "31", "2"]
    assert texts(svg)[-1] == "250"  # the end of the legend
    assert len(drawn_cells(heat([[0, 0]], largest=0))) == 2


def test_long_names_of_columns_stand_and_are_shortened():
    svg = ElementTree.fromstring(heat_map([[0.1] * 10], ["a"], ["a very long label indeed"] * 10, ""))
    shortened = [text for text in svg.iter("text") if text.text == "a very long l…"]
    assert len(shortened) == 10
    assert all(text.get("transform", "").startswith("rotate(-90") for text in shortened)


def test_the_load_is_drawn_to_scale():
    svg = ElementTree.fromstring(bars([0.1, 0.6, 0.3], ["0", "1", "2"], "expert", ""))
    heights = [float(rect.get("height")) for rect in svg.iter("rect")]
    assert heights[1] == pytest.approx(6 * heights[0], abs=0.1)
    assert heights[2] == pytest.approx(3 * heights[0], abs=0.1)
    assert hovers(svg) == ["expert 0: 10.0 %", "expert 1: 60.0 %", "expert 2: 30.0 %"]
    feet = [float(rect.get("y")) + float(rect.get("height")) for rect in svg.iter("rect")]
    (equal,) = {y for _, y in points(svg.find("polyline"))}
    assert equal == pytest.approx(feet[0] - 10 / 3 * heights[0], abs=0.1)


def test_a_dot_lies_above_its_ring_where_the_network_helps():
    drawn = dots({"with": [0.9, 0.5], "alone": [0.8, 0.7]}, ["0", "1"], "device", "", span=(0.5, 0.9))
    svg = ElementTree.fromstring(drawn)
    first, second = [group for group in svg.iter("g") if group.find("title") is not None]
    heights = [[float(mark.get("cy")) for mark in group.iter("circle")] for group in (first, second)]
    assert heights[0][0] < heights[0][1]
    assert heights[1][0] > heights[1][1]
    assert heights[0][1] - heights[0][0] == pytest.approx((heights[1][0] - heights[1][1]) / 2, abs=0.2)
    assert hovers(svg) == ["device 0: with 90.0 %, alone 80.0 %", "device 1: with 50.0 %, alone 70.0 %"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_devices_that_are_all_alike_lie_inside_the_picture(share):
    drawn = dots({"a": [share] * 3}, ["0", "1", "2"], "device", "", span=(share, share))
    svg = ElementTree.fromstring(drawn)
    height = float(svg.get("height"))
    assert all(0 < float(mark.get("cy")) < height - 40 for mark in svg.iter("circle"))
    assert not any(text[0] == "-" or text == "105" for text in texts(svg))


def test_both_pictures_of_devices_have_one_scale():
    metrics = metrics_of()
    metrics["iid"]["own_expert"]["devices"] = [0.2, 0.3, 0.4]
    svgs = [svg for caption, svg in pictures(page("", {}, metrics, [])).items() if "of each device" in caption]
    percents = [[text for text in texts(svg) if text.isdigit() and int(text) > 10] for svg in svgs]
    assert percents[0] == percents[1] == ["20", "40", "60", "80"]


def test_a_curve_goes_through_its_points():
    svg = ElementTree.fromstring(curves({"loss": [(1, 4.0), (2, 2.0), (3, 1.0), (5, 3.0)]}, "round", "loss", ""))
    lines = [group.find("polyline") for group in svg.iter("g")]
    (x1, y1), (x2, y2), (x3, y3), (x5, y5) = points(lines[0])
    assert x1 < x2 < x3 < x5
    assert x5 - x3 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert y1 < y5 < y2 < y3  # down is up
    assert y3 - y1 == pytest.approx(3 * (y5 - y1), abs=0.3)
    assert hovers(svg) == ["loss: 4 at 1, 3 at 5"]
    assert {"round", "loss", "1", "2", "3", "4", "5"} <= set(texts(svg))


def test_curves_are_told_apart_without_colour():
    series = {f"series {i}": [(0, i), (1, i + 1)] for i in range(6)}
    svg = ElementTree.fromstring(curves(series, "x", "y", ""))
    for key in ("stroke", "stroke-dasharray"):
        drawn = [group.find("polyline").get(key) for group in svg.iter("g")]
        assert len(set(drawn)) == 6
        assert drawn == [line.get(key) for line in svg.findall("polyline")]  # the legend's
    assert set(series) <= set(texts(svg))


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, math.nan), (math.inf, 2), (None, 3)]}])
def test_curves_without_points_say_so(series):
    assert texts(ElementTree.fromstring(curves(series, "x", "y", ""))) == ["no points"]


@pytest.mark.parametrize("y", [0.0, 1.0, -3.5, 1e30, 1e-30])
def test_a_curve_of_one_point_is_drawn_inside_the_picture(y):
    svg = ElementTree.fromstring(curves({"a": [(1, y)], "b": []}, "round", "loss", ""))
    (left, high), (right, low) = points(next(svg.iter("g")).find("polyline"))
    assert 0 < left < right < float(svg.get("width"))
    assert 0 < high == low < float(svg.get("height"))
    assert texts(svg).count("1") >= 1
    assert hovers(svg) == [f"a: {y:.4g} at 1", "b: "]


def test_a_step_up_on_a_curve_of_powers_is_ten_times_as_much():
    line = [(0, 1.0), (1, 10.0), (2, 100.0), (3, 0.0), (4, None)]
    svg = ElementTree.fromstring(curves({"a": line}, "x", "y", "", log=True))
    (_, y1), (_, y10), (_, y100) = points(next(group for group in svg.iter("g")).find("polyline"))
    assert y1 - y10 == pytest.approx(y10 - y100, abs=0.1)
    assert {"1", "10", "100"} <= set(texts(svg))
    assert hovers(svg) == ["a: 1 at 0, 100 at 2"]


def test_a_band_covers_its_stretch_and_bears_its_name():
    svg = ElementTree.fromstring(curves({"a": [(0, 1), (10, 2)]}, "x", "y", "", bands={"dead": (2, 7)}))
    (band,) = [rect for rect in svg.iter("rect") if rect.get("fill") == "currentColor"]
    (start, _), (end, _) = points(next(group for group in svg.iter("g")).find("polyline"))
    assert float(band.get("x")) == pytest.approx(start + 0.2 * (end - start), abs=0.1)
    assert float(band.get("width")) == pytest.approx(0.5 * (end - start), abs=0.1)
    assert "dead" in texts(svg)


def test_amounts_are_stacked_to_scale():
    svg = ElementTree.fromstring(
        stacks({"a": [1, 0], "b": [3, 0]}, ["0", "1"], "second", "rows", "", bands={"x": (0, 1)})
    )
    low, high = [rect for group in svg.iter("g") for rect in group.iter("rect")]
    assert float(high.get("height")) == pytest.approx(3 * float(low.get("height")), abs=0.1)
    assert float(high.get("y")) + float(high.get("height")) == pytest.approx(float(low.get("y")), abs=0.1)
    assert hovers(svg) == ["second 0: a 1, b 3"]
    assert {"a", "b", "rows", "second", "x"} <= set(texts(svg))


def test_stacks_of_nothing_say_so():
    assert texts(ElementTree.fromstring(stacks({"a": [0, 0]}, ["0", "1"], "x", "y", ""))) == ["nothing to show"]


def test_many_points_are_thinned_and_their_peak_is_kept():
    line = [(float(i), math.sin(i / 500)) for i in range(20_000)]
    line[7_777] = (7_777.0, 9.0)
    svg = ElementTree.fromstring(curves({"a": line}, "x", "y", ""))
    drawn = points(next(svg.iter("g")).find("polyline"))
    assert 300 < len(drawn) < 450
    assert drawn == sorted(drawn, key=lambda point: point[0])
    top = min(drawn, key=lambda point: point[1])
    assert (top[0] - drawn[0][0]) / (drawn[-1][0] - drawn[0][0]) == pytest.approx(7_777 / 19_999, abs=1e-3)
    assert hovers(svg) == [f"a: 0 at 0, {line[-1][1]:.4g} at 19999"]


@pytest.mark.parametrize(
    ("last", "due"),
    [(1, ["1"]), (3, ["1", "2", "3"]), (20, ["5", "10", "15", "20"]), (4000, ["1000", "2000", "3000", "4000"])],
)
def test_rounds_have_round_and_whole_ticks(last, due):
    svg = ElementTree.fromstring(curves({"a": [(i, 0.25) for i in range(1, last + 1)]}, "round", "loss", ""))
    floor = max(float(text.get("y")) for text in svg.iter("text") if text.text != "round")
    assert [text.text for text in svg.iter("text") if float(text.get("y")) == floor] == due


def test_a_stage_has_the_curves_that_it_told():
    captions = [
        caption for caption in pictures(page("", {}, metrics_of(), [])) if "round by round" in caption or "ε" in caption
    ]
    kinds = {
        stage: [c.split()[0] for c in captions if f" {stage} stage" in c] for stage in ("extractor", "experts", "gate")
    }
    assert kinds == {"extractor": ["Loss", "Accuracy", "Privacy"], "experts": ["Loss"], "gate": ["Loss", "Accuracy"]}
    (gate,) = [
        s for caption, s in pictures(page("", {}, metrics_of(), [])).items() if "Accuracy in the gate" in caption
    ]
    assert hovers(gate) == ["gate: 50 at 1, 90 at 5"]


def test_who_dropped_out_is_said_in_one_sentence():
    metrics = metrics_of()
    assert "dropped out" not in page("", {}, metrics, [])
    metrics["history"][1]["lost"] = [0, 2]
    metrics["history"][3]["lost"] = [2]
    text = page("", {}, metrics, [])
    assert "Clients dropped out 3 times, in 2 of 15 rounds, most often client 2 (2 times)" in text


def test_the_split_is_drawn_cell_by_cell():
    metrics = metrics_of(devices=3, classes=5)
    text = page("", {}, metrics, LABELS)  # of the fifth class nobody told the name
    svg = next(svg for caption, svg in pictures(text).items() if caption.startswith("Training samples"))
    names = [*LABELS, "4"]
    counts = enumerate(metrics["split"]["train"])
    assert cells(svg) == {(str(i), names[k]): str(count) for i, row in counts for k, count in enumerate(row)}
    assert set(names) <= set(texts(svg))
    assert "180 training samples, 10 to 110 a client, 15 held out" in text
    assert "30 for the devices’ own tests" in text


def test_the_cost_is_in_units_that_people_read():
    table = next(table for table in Parsed(page("", {}, metrics_of(), [])).tables if table[0][0] == "stage")
    assert table[1:] == [
        ["extractor", "35.2 MB", "1.5 kB", "6.4 s"],
        ["gate", "800.0 kB", "999 B", "1 min 12 s"],
        ["evaluate", "–", "–", "0.8 s"],
        ["in all", "36.0 MB", "2.5 kB", "1 h 1 min"],
    ]
    metrics = without(without(metrics_of(), "bytes"), "seconds", "all")
    table = next(table for table in Parsed(page("", {}, metrics, [])).tables if table[0][0] == "stage")
    assert table[-1] == ["in all", "–", "–", "1 min 19 s"]


def test_privacy_is_claimed_with_its_figures_and_not_for_weights():
    text = page("", {}, metrics_of(), [])
    assert "200 releases with noise of up to σ = 0.0192" in text
    assert "ε = 7.5 at δ = 1e-05" in text
    assert "Weights that were sent are not covered" in text
    assert "Privacy:" not in page("", {}, without(metrics_of(), "privacy"), [])
    assert "ε = –" in page("", {}, {"privacy": {"epsilon": None, "delta": 1e-5}}, [])


def test_every_setting_stands_in_the_last_table():
    text = page("", {**CONFIG, "extractor": {"arguments": {}}}, {}, [])
    assert Parsed(text).tables[-1] == [
        ["seed", "7"],
        ["data.name", "digits"],
        ["data.clients", "3"],
        ["data.train_size", "null"],
        ["gate.widths", "[8, 4]"],
        ["gate.on", "true"],
        ["extractor.arguments", "{}"],
    ]
    assert "<span>data <b>digits</b></span> <span>clients <b>3</b></span> <span>seed <b>7</b></span>" in text


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ((), HEADINGS),
        (("own", "iid"), HEADINGS[2:]),
        (("history",), [*HEADINGS[:2], *HEADINGS[3:]]),
        (("split",), [*HEADINGS[:3], HEADINGS[4]]),
        (("bytes", "seconds", "privacy"), HEADINGS[:4]),
        (("bytes",), HEADINGS),
        (("own",), HEADINGS),
        (("own", "iid", "history", "split", "bytes", "seconds", "privacy"), []),
    ],
)
def test_what_was_not_measured_is_left_out(gone, left):
    text = page("", {}, {key: value for key, value in metrics_of().items() if key not in gone}, LABELS)
    assert Parsed(text).headings == left
    assert ("Nothing was measured" in text) == (left == [])


@pytest.mark.parametrize("part", ["own", "iid"])
def test_any_figure_of_a_test_may_be_missing(part):
    for key in metrics_of()[part]:
        assert Parsed(page("", {}, without(metrics_of(), part, key), [])).headings == HEADINGS
        assert Parsed(page("", {}, {part: {key: metrics_of()[part][key]}}, [])).headings
    for key in ("devices", "auc", "accuracy", "pooled"):
        assert Parsed(page("", {}, without(metrics_of(), part, "networked", key), [])).headings == HEADINGS
    columns = Parsed(page("", {}, {part: metrics_of()[part]}, [])).tables[0][0]
    assert columns == ["", {"own": "own distribution", "iid": "balanced"}[part]]


def test_an_untrained_run_has_a_page():
    parsed = Parsed(page("a run", CONFIG, {"note": "untrained"}, []))
    assert parsed.headings == []
    assert {"a run", "untrained", "Nothing was measured.", "Every setting"} <= set(parsed.texts)


def test_a_round_in_which_everybody_dropped_out_has_no_loss():
    metrics = {"history": [{"stage": "gate", "round": 1, "lost": [0]}, {"stage": "gate", "round": 2, "loss": 1.5}]}
    text = page("", {}, metrics, [])
    (svg,) = pictures(text).values()
    assert hovers(svg) == ["gate: 1.5 at 2"]
    assert "Clients dropped out once, in 1 of 2 rounds" in text


def test_a_figure_says_what_it_shows():
    drawn = figure(curves, {}, "x", "y", caption="a < b")
    assert drawn.endswith("<figcaption>a &lt; b</figcaption></figure>")
    assert list(pictures(drawn)) == ["a < b"]
