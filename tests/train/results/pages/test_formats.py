from __future__ import annotations

import inspect

import pytest

from nmoe_train.results.pages import formats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.count(1234567), "1,234,567"),
        (formats.times(1), "once"),
        (formats.times(1200), "1,200 times"),
        (formats.percent(0.1234), "12.3 %"),
        (formats.percentage(1), "100.0"),
        (formats.decimals(2.3456, 2), "2.35"),
        (formats.ratio(2.5), "2.50 ×"),
        (formats.size(0), "0 B"),
        (formats.size(999), "999 B"),
        (formats.size(1_500), "1.5 kB"),
        (formats.size(35_200_000), "35.2 MB"),
        (formats.size(2e15), "2000.0 TB"),
        (formats.operations(0), "0"),
        (formats.operations(999), "999"),
        (formats.operations(1234567), "1.2 M"),
        (formats.operations(3e17), "300.0 P"),
        (formats.energy(1234.56), "1,234.6 J"),
        (formats.seconds(0.25), "0.25 s"),
        (formats.seconds(12, 1), "12.0 s"),
        (formats.duration(6.42), "6.4 s"),
        (formats.duration(59.9), "1 min 0 s"),
        (formats.duration(71.6), "1 min 12 s"),
        (formats.duration(3711.9), "1 h 1 min"),
        (formats.milliseconds(3.456), "3.46 ms"),
        (formats.milliseconds(34.56), "35 ms"),
        (formats.microseconds(0.0115), "11.5 µs"),
    ],
)
def test_numbers_are_written_for_people(text, expected):
    assert text == expected


def test_a_missing_number_becomes_a_dash():
    functions = [function for _, function in inspect.getmembers(formats, inspect.isfunction)]
    for function in functions:
        if function is not formats.times:
            digits = (2,) if function is formats.decimals else ()
            assert function(None, *digits) == "–"
