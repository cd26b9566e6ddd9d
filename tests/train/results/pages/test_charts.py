from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from train.drawings import drawn_cells, hovers, pictures, points, texts

from nmoe_train.results.pages.charts import bars, curves, dots, figure, heat_map, stacks, table_bar
from nmoe_train.results.pages.render import FIGURES, render
from nmoe_train.results.pages.run_page import page
from nmoe_train.results.pages.svg import COLOURS


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


def test_larger_shares_are_darker_on_a_light_page():
    depths = [contrast(rect.get("fill"), "#ffffff") for rect, _ in drawn_cells(heat([[0, 0.005, 0.05, 0.3, 0.7, 1]]))]
    assert depths == sorted(depths)
    assert len(set(depths)) == 6


def test_numbers_in_cells_are_readable_on_light_and_dark_pages():
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


def test_series_have_contrast_on_light_and_dark_pages():
    dark = re.search(r"dark\) \{\s*:root \{ --paper: (#\w+)", page("", {}, {}, [])).group(1)
    assert all(contrast(colour, paper) >= 3 for colour in COLOURS for paper in ("#ffffff", dark))


@pytest.mark.parametrize(
    ("size", "share", "written"), [(2, 1, True), (16, 1, True), (40, 0, False), (40, 1, False), (100, 0.25, False)]
)
def test_a_heat_map_writes_numbers_only_where_they_fit(size, share, written):
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
def test_a_heat_map_accepts_empty_and_non_finite_values(matrix):
    assert len(drawn_cells(heat(matrix))) == sum(map(len, matrix))
    assert not any("nan" in text or "inf" in text for text in hovers(heat(matrix)))


def test_a_heat_map_of_counts_writes_counts():
    svg = heat([[0, 250], [31, 2]], largest=250)
    assert [text.text for _, text in drawn_cells(svg)] == ["0", "250", "31", "2"]
    assert texts(svg)[-1] == "250"  # the end of the legend
    assert len(drawn_cells(heat([[0, 0]], largest=0))) == 2


def test_long_column_names_are_shortened_and_turned():
    svg = ElementTree.fromstring(heat_map([[0.1] * 10], ["a"], ["a very long label indeed"] * 10, ""))
    shortened = [text for text in svg.iter("text") if text.text == "a very long l…"]
    assert len(shortened) == 10
    assert all(text.get("transform", "").startswith("rotate(-90") for text in shortened)


def test_bars_are_drawn_to_scale():
    svg = ElementTree.fromstring(bars([0.1, 0.6, 0.3], ["0", "1", "2"], "expert", ""))
    heights = [float(rect.get("height")) for rect in svg.iter("rect")]
    assert heights[1] == pytest.approx(6 * heights[0], abs=0.1)
    assert heights[2] == pytest.approx(3 * heights[0], abs=0.1)
    assert hovers(svg) == ["expert 0: 10.0 %", "expert 1: 60.0 %", "expert 2: 30.0 %"]
    feet = [float(rect.get("y")) + float(rect.get("height")) for rect in svg.iter("rect")]
    (equal,) = {y for _, y in points(svg.find("polyline"))}
    assert equal == pytest.approx(feet[0] - 10 / 3 * heights[0], abs=0.1)


def test_the_series_with_the_larger_share_is_drawn_higher():
    drawn = dots({"with": [0.9, 0.5], "alone": [0.8, 0.7]}, ["0", "1"], "device", "", span=(0.5, 0.9))
    svg = ElementTree.fromstring(drawn)
    first, second = [group for group in svg.iter("g") if group.find("title") is not None]
    heights = [[float(mark.get("cy")) for mark in group.iter("circle")] for group in (first, second)]
    assert heights[0][0] < heights[0][1]
    assert heights[1][0] > heights[1][1]
    assert heights[0][1] - heights[0][0] == pytest.approx((heights[1][0] - heights[1][1]) / 2, abs=0.2)
    assert hovers(svg) == ["device 0: with 90.0 %, alone 80.0 %", "device 1: with 50.0 %, alone 70.0 %"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_equal_dots_lie_inside_the_drawing(share):
    drawn = dots({"a": [share] * 3}, ["0", "1", "2"], "device", "", span=(share, share))
    svg = ElementTree.fromstring(drawn)
    height = float(svg.get("height"))
    assert all(0 < float(mark.get("cy")) < height - 40 for mark in svg.iter("circle"))
    assert not any(text[0] == "-" or text == "105" for text in texts(svg))


def test_a_curve_goes_through_its_points():
    svg = ElementTree.fromstring(curves({"loss": [(1, 4.0), (2, 2.0), (3, 1.0), (5, 3.0)]}, "round", "loss", ""))
    lines = [group.find("polyline") for group in svg.iter("g")]
    (x1, y1), (x2, y2), (x3, y3), (x5, y5) = points(lines[0])
    assert x1 < x2 < x3 < x5
    assert x5 - x3 == pytest.approx(2 * (x2 - x1), abs=0.2)
    assert y1 < y5 < y2 < y3  # y grows downwards
    assert y3 - y1 == pytest.approx(3 * (y5 - y1), abs=0.3)
    assert hovers(svg) == ["loss: 4 at 1, 3 at 5"]
    assert {"round", "loss", "1", "2", "3", "4", "5"} <= set(texts(svg))


def test_curves_differ_without_colour():
    series = {f"series {i}": [(0, i), (1, i + 1)] for i in range(6)}
    svg = ElementTree.fromstring(curves(series, "x", "y", ""))
    for key in ("stroke", "stroke-dasharray"):
        drawn = [group.find("polyline").get(key) for group in svg.iter("g")]
        assert len(set(drawn)) == 6
        assert drawn == [line.get(key) for line in svg.findall("polyline")]  # the legend's lines
    assert set(series) <= set(texts(svg))


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(1, math.nan), (math.inf, 2), (None, 3)]}])
def test_a_chart_without_points_says_so(series):
    assert texts(ElementTree.fromstring(curves(series, "x", "y", ""))) == ["no points"]


@pytest.mark.parametrize("y", [0.0, 1.0, -3.5, 1e30, 1e-30])
def test_a_curve_of_one_point_is_drawn_inside_the_drawing(y):
    svg = ElementTree.fromstring(curves({"a": [(1, y)], "b": []}, "round", "loss", ""))
    (left, high), (right, low) = points(next(svg.iter("g")).find("polyline"))
    assert 0 < left < right < float(svg.get("width"))
    assert 0 < high == low < float(svg.get("height"))
    assert texts(svg).count("1") >= 1
    assert hovers(svg) == [f"a: {y:.4g} at 1", "b: "]


def test_a_logarithmic_axis_has_equal_steps_for_powers_of_ten():
    line = [(0, 1.0), (1, 10.0), (2, 100.0), (3, 0.0), (4, None)]
    svg = ElementTree.fromstring(curves({"a": line}, "x", "y", "", log=True))
    (_, y1), (_, y10), (_, y100) = points(next(group for group in svg.iter("g")).find("polyline"))
    assert y1 - y10 == pytest.approx(y10 - y100, abs=0.1)
    assert {"1", "10", "100"} <= set(texts(svg))
    assert hovers(svg) == ["a: 1 at 0, 100 at 2"]


def test_a_band_covers_its_stretch_and_shows_its_name():
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


def test_empty_stacks_say_so():
    assert texts(ElementTree.fromstring(stacks({"a": [0, 0]}, ["0", "1"], "x", "y", ""))) == ["nothing to show"]


def test_thinning_many_points_keeps_the_peak():
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
    ("last", "expected"),
    [(1, ["1"]), (3, ["1", "2", "3"]), (20, ["5", "10", "15", "20"]), (4000, ["1000", "2000", "3000", "4000"])],
)
def test_rounds_have_whole_round_ticks(last, expected):
    svg = ElementTree.fromstring(curves({"a": [(i, 0.25) for i in range(1, last + 1)]}, "round", "loss", ""))
    floor = max(float(text.get("y")) for text in svg.iter("text") if text.text != "round")
    assert [text.text for text in svg.iter("text") if float(text.get("y")) == floor] == expected


def test_a_figure_shows_its_caption():
    page_ = render(FIGURES, title="charts", figures=[figure(curves, {}, "x", "y", caption="a < b")])
    assert "<figcaption>a &lt; b</figcaption></figure>" in page_
    assert list(pictures(page_)) == ["a < b"]


EVIL = """</title></svg><script>alert('1')</script>"onload=x&\x00\ud800"""


@pytest.mark.parametrize(
    "draw",
    [
        lambda: heat_map([[0.5]], [EVIL], [EVIL], EVIL, axes=(EVIL, EVIL)),
        lambda: curves({EVIL: [(0, 1), (1, 2)]}, EVIL, EVIL, EVIL, bands={EVIL: (0, 1)}),
        lambda: dots({EVIL: [0.5]}, [EVIL], EVIL, EVIL, span=(0, 1)),
        lambda: bars([0.5, 0.5], [EVIL, EVIL], EVIL, EVIL),
        lambda: stacks({EVIL: [1]}, [EVIL], EVIL, EVIL, EVIL),
    ],
    ids=["heat_map", "curves", "dots", "bars", "stacks"],
)
def test_markup_in_names_is_escaped_in_every_chart(draw):
    svg = ElementTree.fromstring(draw())
    assert svg.get("aria-label") == EVIL.replace("\x00\ud800", "  ")
    assert {part.tag for part in svg.iter()} <= {"svg", "g", "rect", "text", "title", "path", "polyline", "circle"}
    assert not any("onload" in key for part in svg.iter() for key in part.attrib)
    assert draw().encode()


def test_the_bar_of_a_table_is_drawn_to_scale():
    def length(value, largest):
        return int(ElementTree.fromstring(table_bar(value, largest)).find("rect").get("width"))

    assert length(1, 1) == 2 * length(0.5, 1)
    assert length(0, 1) == length(0, 0) == 1  # still visible
