from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from nmoe_train.results.pages.render import FIGURES, render


def rendered(folder, body, **data):
    """What a template in a folder of its own makes of the data."""
    template = folder / "page.html"
    template.write_text(body)
    return render(template, **data)


def test_values_are_escaped_and_unprintable_characters_become_spaces(tmp_path):
    assert rendered(tmp_path, "{{ name }}", name='<b> & "\x00\n\ud800') == "&lt;b&gt; &amp; &#34;   "


def test_markup_is_not_escaped_again(tmp_path):
    assert rendered(tmp_path, "{{ chart }}", chart=Markup("<svg/>")) == "<svg/>"


def test_a_name_that_the_page_does_not_get_is_an_error(tmp_path):
    with pytest.raises(UndefinedError, match="'titel' is undefined"):
        rendered(tmp_path, "{{ titel }}", title="a page")


def test_a_template_elsewhere_uses_the_base_the_macros_and_the_filters(tmp_path):
    body = """{% extends "base.html" %}{% from "macros.html" import table %}
    {% block body %}{{ table(["", "size"], [["<extractor>", 1500 | size]]) }}{% endblock %}"""
    text = rendered(tmp_path, body, title="a page")
    assert "<title>a page</title>" in text
    assert "<tr><th>&lt;extractor&gt;</th><td>1.5 kB</td></tr>" in text


def test_a_section_without_content_is_left_out(tmp_path):
    body = """{% from "macros.html" import section %}
    {% call section("full") %}text{% endcall %}{% call section("empty") %}{% if false %}text{% endif %}{% endcall %}"""
    text = rendered(tmp_path, body)
    assert "<h2>full</h2>" in text
    assert "empty" not in text


def test_a_page_of_no_figures_is_a_page():
    assert "<h1>nothing</h1>" in render(FIGURES, title="nothing", figures=[])
