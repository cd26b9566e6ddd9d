from __future__ import annotations

import copy
import re
from html.parser import HTMLParser

import pytest
from train.drawings import cells, drawn_cells, hovers, pictures, texts

from nmoe_train.results.pages.run_page import page

HEADINGS = [
    "Accuracy",
    "Which expert answers which device",
    "Learning curves",
    "How the samples are split",
    "What the training cost",
]
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
    """A page as a browser sees it: tags (each must be closed), texts, headings and tables."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.texts = []
        self.headings = []
        self.tables = []
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


def sentences(*args):
    """The text of a page, with a single space between words."""
    return " ".join(page(*args).split())


def without(metrics, *keys):
    """A copy that lacks one nested key."""
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
def test_pages_of_any_size_are_valid(devices, classes, rounds):
    text = page("a run", CONFIG, metrics_of(devices, classes, rounds), LABELS, {"own": {"local": None}})
    assert Parsed(text).headings == HEADINGS
    assert len(pictures(text)) == 13
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(Parsed(text).texts))


def test_a_page_loads_nothing_and_runs_no_script():
    text = page("a run", CONFIG, metrics_of(), LABELS)
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert not {"script", "link", "img", "iframe", "object", "use"} & {tag for tag, _ in Parsed(text).tags}
    assert not {"src", "href"} & {name for _, attributes in Parsed(text).tags for name in attributes}


def test_markup_in_names_is_escaped():
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
    # title, heading, note, fact, stage in the table of costs; in the settings a key, its value and data.name
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
        stars = ["★ " if value == best else "" for value in known.values()]
        figures = ["–" if value is None else f"{100 * value:.1f}" for value in known.values()]
        assert [row[j] for row in rows] == [star + text for star, text in zip(stars, figures, strict=True)]
    assert rows[0][2] == rows[3][2] == "★ 81.2"  # a tie for the best


def test_the_only_method_is_not_marked_as_the_best():
    metrics = {"own": {"networked": measured([0.5], 0.5, 0.5)}}
    assert Parsed(page("a run", {}, metrics, [])).tables[0][2] == ["Networked", "50.0", "50.0", "50.0"]


def test_the_page_states_the_share_of_samples_answered_locally():
    text = sentences("a run", {}, metrics_of(), [])
    assert "75.0 % (own distribution) and 40.0 % (balanced) of their samples locally" in text
    text = sentences("", {}, without(metrics_of(), "iid"), [])
    assert "Devices answered 75.0 % (own distribution) of their samples locally" in text


def test_the_routing_is_drawn_cell_by_cell():
    metrics = metrics_of()
    metrics["own"]["routing"] = [[0.5, 0.25, 0.25], [0, 1, 0], [0.123, 0.877, 0]]
    text = page("a run", {}, metrics, [])
    svg = next(svg for caption, svg in pictures(text).items() if caption.startswith("Own distribution. Each row"))
    rows = enumerate(metrics["own"]["routing"])
    assert cells(svg) == {(str(i), str(j)): f"{100 * share:.4g} %" for i, row in rows for j, share in enumerate(row)}
    assert [text.text for _, text in drawn_cells(svg)] == ["50", "25", "25", "0", "100", "0", "12", "88", "0"]


def test_both_figures_of_devices_have_one_scale():
    metrics = metrics_of()
    metrics["iid"]["own_expert"]["devices"] = [0.2, 0.3, 0.4]
    svgs = [svg for caption, svg in pictures(page("", {}, metrics, [])).items() if "of each device" in caption]
    percents = [[text for text in texts(svg) if text.isdigit() and int(text) > 10] for svg in svgs]
    assert percents[0] == percents[1] == ["20", "40", "60", "80"]


def test_each_stage_has_a_curve_for_every_measured_figure():
    drawn = pictures(page("", {}, metrics_of(), []))
    captions = [caption for caption in drawn if "in each round" in caption or "ε" in caption]
    kinds = {}
    for stage in ("extractor", "experts", "gate"):
        kinds[stage] = [caption.split()[0] for caption in captions if f" {stage} stage" in caption]
    assert kinds == {"extractor": ["Loss", "Accuracy", "Privacy"], "experts": ["Loss"], "gate": ["Loss", "Accuracy"]}
    (gate,) = [svg for caption, svg in drawn.items() if "Accuracy of the gate" in caption]
    assert hovers(gate) == ["gate: 50 at 1, 90 at 5"]


def test_dropouts_are_summed_up_in_one_sentence():
    metrics = metrics_of()
    assert "dropped out" not in page("", {}, metrics, [])
    metrics["history"][1]["lost"] = [0, 2]
    metrics["history"][3]["lost"] = [2]
    text = sentences("", {}, metrics, [])
    assert "Clients dropped out 3 times, in 2 of 15 rounds, most often client 2 (2 times)" in text


def test_the_split_is_drawn_cell_by_cell():
    metrics = metrics_of(devices=3, classes=5)
    text = page("", {}, metrics, LABELS)  # the fifth class has no label
    svg = next(svg for caption, svg in pictures(text).items() if caption.startswith("Training samples"))
    names = [*LABELS, "4"]
    counts = enumerate(metrics["split"]["train"])
    assert cells(svg) == {(str(i), names[k]): str(count) for i, row in counts for k, count in enumerate(row)}
    assert set(names) <= set(texts(svg))
    text = sentences("", {}, metrics, LABELS)
    assert "180 training samples, 10 to 110 per client, 15 held out" in text
    assert "30 to test each device on its own distribution" in text


def test_costs_are_shown_in_readable_units():
    table = next(table for table in Parsed(page("", {}, metrics_of(), [])).tables if table[0][0] == "stage")
    assert table[1:] == [
        ["extractor", "35.2 MB", "1.5 kB", "6.4 s"],
        ["gate", "800.0 kB", "999 B", "1 min 12 s"],
        ["evaluate", "–", "–", "0.8 s"],
        ["total", "36.0 MB", "2.5 kB", "1 h 1 min"],
    ]
    metrics = without(without(metrics_of(), "bytes"), "seconds", "all")
    table = next(table for table in Parsed(page("", {}, metrics, [])).tables if table[0][0] == "stage")
    assert table[-1] == ["total", "–", "–", "1 min 19 s"]


def test_privacy_is_stated_with_its_figures_and_not_for_weights():
    text = sentences("", {}, metrics_of(), [])
    assert "released matrices 200 times, with noise of up to σ = 0.0192" in text
    assert "ε = 7.5 at δ = 1e-05" in text
    assert "The weights that clients sent are not covered" in text
    assert "Privacy:" not in page("", {}, without(metrics_of(), "privacy"), [])
    assert "ε = –" in page("", {}, {"privacy": {"epsilon": None, "delta": 1e-5}}, [])


def test_the_last_table_lists_every_setting():
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
def test_sections_without_measurements_are_left_out(gone, left):
    text = page("", {}, {key: value for key, value in metrics_of().items() if key not in gone}, LABELS)
    assert Parsed(text).headings == left
    assert ("Nothing was measured" in text) == (left == [])


@pytest.mark.parametrize("part", ["own", "iid"])
def test_any_single_measurement_may_be_missing(part):
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
    assert {"a run", "untrained", "Nothing was measured.", "All settings"} <= set(parsed.texts)


def test_a_round_in_which_all_clients_dropped_out_has_no_loss():
    metrics = {"history": [{"stage": "gate", "round": 1, "lost": [0]}, {"stage": "gate", "round": 2, "loss": 1.5}]}
    text = sentences("", {}, metrics, [])
    (svg,) = pictures(text).values()
    assert hovers(svg) == ["gate: 1.5 at 2"]
    assert "Clients dropped out once, in 1 of 2 rounds" in text


RESOURCES = {
    "networks": {"gate": {"forward": 5, "backward": 5}},
    "stages": {
        "extractor": {
            "multiply_adds": 3_000_000,
            "up": 300,
            "down": 30,
            "clients": {"multiply_adds": [1_000_000, 2_000_000], "up": [100, 200], "down": [10, 20]},
        },
        "gate": {
            "multiply_adds": 5,
            "up": 3,
            "down": 0,
            "clients": {"multiply_adds": [2, 3], "up": [1, 2], "down": [0, 0]},
        },
    },
    "fedavg": {"up": 4_000_000, "down": 5_000_000},
    "measured": {
        "extractor": {"seconds": 9.0, "peak_memory_bytes": 250_000_000, "energy_j": 12.34},
        "evaluate": {"seconds": 1.0, "peak_memory_bytes": 100_000_000},
    },
    "client_seconds": {"extractor": [3.0, 6.0], "gate": [1.0, 0.5]},
}


def test_resources_are_listed_by_stage_and_by_client_beside_those_of_fedavg():
    text = page("a run", CONFIG, metrics_of() | {"resources": RESOURCES}, LABELS)
    stages, clients = Parsed(text).tables[2:4]
    assert stages == [
        ["stage", "multiply-adds", "peak memory", "energy of the CPU"],
        ["extractor", "3.0 M", "250.0 MB", "12.3 J"],
        ["gate", "5", "–", "–"],
        ["evaluate", "–", "100.0 MB", "–"],
    ]
    assert clients[1:] == [["0", "1.0 M", "4.0 s", "101 B", "10 B"], ["1", "2.0 M", "6.5 s", "202 B", "20 B"]]
    assert "would send 4.0 MB from clients and 5.0 MB to them" in " ".join(text.split())
    assert "multiply-adds" not in page("a run", CONFIG, metrics_of(), LABELS)
