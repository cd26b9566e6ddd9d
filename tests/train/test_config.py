from __future__ import annotations

import pytest

from nmoe_train.config import Config
from nmoe_train.errors import ConfigError
from nmoe_train.recipes import configure, configure_from
from nmoe_train.settings import as_toml, parse_setting


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"sed": 1}, "unknown key 'sed' .did you mean 'seed'"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"extractor": {"rounds": 0}}, "extractor: rounds is 0"),
        ({"extractor": {"rate": -1.0}}, "extractor: rate is -1.0"),
        ({"extractor": {"batch": 0}}, "extractor: batch is 0"),
        ({"extractor": {"dim": 0}}, "extractor: dim is 0"),
        ({"extractor": {"share": 7.0}}, "extractor: share is 7.0"),
        ({"experts": {"widths": [0]}}, "experts: widths"),
        ({"experts": {"epochs": -1}}, "experts: epochs is -1"),
        ({"experts": {"epochs": 0, "start": "fresh"}}, "epochs = 0 would leave fresh experts untrained"),
        ({"gate": {"rounds": -5}}, "gate: rounds is -5"),
        ({"gate": {"share": 0.0}}, "gate: share is 0.0"),
        ({"gate": {"lap": 1}}, "unknown key 'gate.lap'"),
        ({"data": {"clients": 0}}, "clients is 0"),
        ({"data": {"held_out": 1.0}}, "held_out is 1.0"),
        ({"inference": {"top_k": 11}}, "top_k is 11; it must be in 1..10"),
        ({"experts": {"loss": "plain"}, "inference": {"calibrate": False}}, "adapt needs"),
        ({"extractor": {"head": "linear"}}, "needs extractor.method = 'fedce' and extractor.head = 'expert'"),
        ({"extractor": {"method": "fedsc"}, "experts": {"start": "head"}}, "needs extractor.method"),
        ({"extractor": {"drop": 1.0}}, "drop is 1.0"),
        ({"extractor": {"correction": "scaffold", "heads": "local"}}, "correction = 'scaffold' needs"),
        ({"extractor": {"correction": "scaffold", "method": "fedsc"}}, "correction = 'scaffold' needs"),
        ({"extractor": {"arguments": {"width": float("nan")}}}, "must be JSON values"),
        ({"extractor": {"arguments": {"day": __import__("datetime").date(2020, 1, 1)}}}, "must be JSON values"),
        ({"fedsc": {"epsilon": 0.0}}, "fedsc: epsilon is 0.0"),
        ({"fedsc": {"delta": 1.0}}, "fedsc: delta is 1.0"),
        ({"gate": {"shares": [0.5, 0.5]}}, "2 numbers for 10 experts"),
        ({"gate": {"shares": [0.5, 0.6]}}, "sum to 1"),
        ({"gate": {"widths": [8], "own": "weights"}}, "needs a linear gate"),
        ({"gate": {"method": "statgate", "own": "bias"}}, "StatGate trains nothing; set own = 'nothing'"),
        ({"gate": {"method": "fedgate", "train_top_k": 1}}, "gate: train_top_k is 1"),
        ({"gate": {"method": "rollgate"}, "data": {"clients": 1}}, "needs two clients"),
        ({"gate": {"method": "softgate"}}, "expected one of 'rangate', 'rollgate', 'fedgate'"),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(flags, text):
    with pytest.raises(ConfigError, match=text):
        configure(flags=flags)


def test_flags_override_the_file_which_overrides_the_recipe(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 4\n[gate]\nrounds = 7\nload_loss = 0.5\n")
    config = configure("paper", file, {"gate": {"rounds": 9}})
    assert (config.seed, config.gate.rounds, config.gate.load_loss, config.gate.loss) == (4, 9, 0.5, "outputs")
    assert configure("best") == Config()
    with pytest.raises(ConfigError, match="unknown recipe 'worst'"):
        configure("worst")
    file.write_text("seed = ")
    with pytest.raises(ConfigError, match="mine.toml"):
        configure(file=file)
    with pytest.raises(ConfigError, match="No such file"):
        configure(file=tmp_path / "nowhere.toml")


def test_defaults_of_data_and_method_are_overridden_by_file_and_flags(tmp_path):
    assert configure(flags={"data": {"name": "cifar10"}}).extractor.views == "light"
    fedsc = configure(flags={"extractor": {"method": "fedsc"}})
    assert (fedsc.experts.start, fedsc.extractor.local_epochs) == ("fresh", 5)
    file = tmp_path / "mine.toml"
    file.write_text('[extractor]\nmethod = "fedsc"\nlocal_epochs = 2\n')
    assert configure(file=file).extractor.local_epochs == 2
    assert configure(file=file, flags={"extractor": {"local_epochs": 3}}).extractor.local_epochs == 3


@pytest.mark.parametrize("recipe", ["best", "paper"])
def test_every_setting_survives_a_round_trip_through_toml(tmp_path, recipe):
    config = configure(
        recipe, flags={"data": {"name": "cifar10"}, "extractor": {"arguments": {"norm": "none", "x": [1]}}}
    )
    (tmp_path / "all.toml").write_text(as_toml(config))
    assert configure(file=tmp_path / "all.toml") == config


def test_a_run_json_can_serve_as_a_file_of_settings(golden, tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 1, "config": {"seed": 7}}')
    assert configure(file=tmp_path / "run.json").seed == 7
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a run.json"):
        configure(file=tmp_path / "other.json")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("gate.rate=0.1", "gate.rate", 0.1),
        ("experts.loss=plain", "experts.loss", "plain"),
        ('experts.loss="plain"', "experts.loss", "plain"),
        ("experts.widths=[8, 4]", "experts.widths", [8, 4]),
        ("inference.adapt=false", "inference.adapt", False),
        ("seed=3", "seed", 3),
        ("data.name=npz:a=b.npz", "data.name", "npz:a=b.npz"),
    ],
)
def test_a_setting_is_toml_or_plain_text(text, name, value):
    assert parse_setting(text) == (name, value)


@pytest.mark.parametrize("text", ["gate.rate", "=3", "gate..rate=1", "gate rate=1"])
def test_a_setting_without_name_or_value_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match="section.name=value"):
        parse_setting(text)


def test_a_configuration_with_some_settings_changed_keeps_the_rest():
    changed = configure_from(configure("paper"), {"gate": {"rate": 0.5}})
    assert (changed.gate.rate, changed.gate.loss) == (0.5, "outputs")
    with_bias = configure(flags={"gate": {"method": "fedgate", "own": "bias"}})
    assert configure_from(with_bias, {"gate": {"rate": 0.5}}).gate.own == "bias"
    assert configure_from(with_bias, {"gate": {"method": "statgate"}}).gate.own == "nothing"
    with pytest.raises(ConfigError, match="unknown key 'gate.rat'"):
        configure_from(Config(), {"gate": {"rat": 0.5}})
