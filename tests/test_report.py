"""Tables, summaries and results.json."""

from __future__ import annotations

import copy
import io
import json
import math
import os

import numpy as np
import pytest
import torch
from example_results import make_results

from hfdistill.report import format_value, print_table, results_rows, results_table, summarise, versions, write_results


def test_summarise():
    values = [0.1, 0.4, 0.7, 0.2]
    summary = summarise(np.array(values))
    assert summary["values"] == values and all(type(value) is float for value in [summary["mean"], summary["std"], *summary["values"]])
    assert summary["mean"] == pytest.approx(sum(values) / 4)
    assert summary["std"] == pytest.approx(math.sqrt(sum((v - 0.35) ** 2 for v in values) / 3))
    assert summarise([0.5]) == {"mean": 0.5, "std": 0.0, "values": [0.5]}
    with pytest.raises(ValueError, match="no value to summarise"):
        summarise([])


def test_versions_are_those_of_the_running_libraries():
    import accelerate
    import datasets
    import transformers

    import hfdistill

    found = versions()
    assert set(found) == {"python", "torch", "transformers", "datasets", "accelerate", "hfdistill"}
    for library in (torch, transformers, datasets, accelerate, hfdistill):
        assert found[library.__name__] == library.__version__


def test_results_are_written_as_plain_numbers(tmp_path):
    path = tmp_path / "new" / "results.json"
    written = write_results(make_results(), path)
    read = json.loads(path.read_text())
    assert read == written
    assert read["teacher"] == {"accuracy": 0.717, "parameters": 672902, "size_mb": 2.69, "latency_ms": 1.7}
    assert read["agreement"] == 0.5 and read["objective"][0]["layer_map"] == [[0, 1], [1, 3]]
    assert read["command"] == "accelerate launch recipes/text_classification.py --output_dir out --hub_token <hidden>"
    assert os.listdir(path.parent) == ["results.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_was_not_measured_may_be_none(tmp_path):
    results = make_results()
    results |= {"student_alone": None, "agreement": None, "gap_closed": None, "baselines": {}, "extra": 1}
    results["seconds"]["alone"] = None
    assert write_results(results, tmp_path / "results.json")["extra"] == 1


def broken(change):
    results = make_results()
    change(results)
    return results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r.pop("objective"), r.pop("seeds")), "'seeds' is missing; 'objective' is missing"),
        (lambda r: r["teacher"].pop("size_mb"), "'teacher.size_mb' is missing"),
        (lambda r: r["teacher"].pop("accuracy"), "'teacher.accuracy' is missing"),
        (lambda r: r.update(teacher=None), "'teacher.accuracy' is missing"),
        (lambda r: r.update(student_distilled=None), "'student_distilled.accuracy' is missing"),
        (lambda r: r["teacher"].update(accuracy=summarise([0.5])), "'teacher.accuracy' is {.*}, not a number"),
        (lambda r: r["student_distilled"].update(accuracy=0.5), "'student_distilled.accuracy' is 0.5, not the mean, std and values"),
        (lambda r: r.update(seeds=[0, 1]), r"'student_alone.accuracy' has 3 values for the seeds \[0, 1\]"),
        (lambda r: r.update(seeds=[]), r"'seeds' is \[\], not a list of at least one seed"),
        (lambda r: r["seconds"].pop("alone"), "'seconds.alone' is missing"),
        (lambda r: r.update(baselines=[0.5]), r"'baselines' is \[0.5\], not a mapping"),
        (lambda r: r.update(config_sha256=None), "'config_sha256' is None"),
        (lambda r: r.update(gap_closed=float("nan")), "'gap_closed' is nan, no finite number"),
        (lambda r: r["student_alone"]["accuracy"]["values"].__setitem__(1, math.inf), r"'student_alone.accuracy.values\[1\]' is inf"),
    ],
)
def test_broken_contracts_are_named_and_nothing_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"so nothing was written: .*{message}"):
        write_results(broken(change), tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(*args, **kwargs):
        args[1].write("{half")
        raise OSError("disk full")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="disk full"):
        write_results(make_results(), path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_the_argument_is_left_alone(tmp_path):
    results = make_results()
    before = copy.deepcopy(results)
    write_results(results, tmp_path / "results.json")
    assert results == before


def test_rows_and_table():
    results = make_results()
    table = results_table(results_rows(results)).splitlines()
    assert table == [
        "| model | accuracy | parameters | size (MB) | latency (ms) | agreement with teacher | gap closed |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| teacher | 0.717 | 672,902 | 2.69 | 1.70 | – | – |",
        "| student alone | 0.417 ± 0.015 | 233,350 | 0.93 | 0.81 | – | – |",
        "| student distilled | 0.640 ± 0.010 | 233,350 | 0.93 | 0.81 | 0.500 | 0.750 |",
        "| control: student on the teacher's labels | 0.693 ± 0.006 | 233,350 | 0.93 | 0.81 | – | – |",
        "| TF-IDF + logistic regression, student's labels | 0.555 | – | – | – | – | – |",
    ]
    results["agreements"] = {"alone": 0.25, "distilled": 0.5, "control": 0.625}
    assert [row["agreement with teacher"] for row in results_rows(results)] == [None, 0.25, 0.5, 0.625, None]
    results |= {"student_alone": None, "agreement": None, "gap_closed": None, "agreements": {}}
    header, _, *lines = results_table(results_rows(results)).splitlines()
    assert header == "| model | accuracy | parameters | size (MB) | latency (ms) |" and len(lines) == 4


def test_cells():
    assert results_table([{"a": "x|y\nz", "b": 1}, {"b": None, "c": 0.5}]).splitlines() == [
        "| a | b | c |",
        "| :--- | ---: | ---: |",
        r"| x\|y z | 1 | – |",
        "| – | – | 0.500 |",
    ]
    assert format_value(0.04, 1) == "0.040" and format_value(66.4, 1) == "66.4" and format_value(0.0, 2) == "0.00"
    assert format_value(summarise([0.5])) == "0.500" and format_value(np.float64(2.5)) == "2.50"


def test_printed_table_is_whole():
    file = io.StringIO()
    print_table(results_rows(make_results()), title="docs6 [bold]", file=file)
    text = file.getvalue()
    for part in ("docs6", "student distilled", "0.640 ± 0.010", "672,902", "agreement with teacher", "TF-IDF + logistic regression"):
        assert part in text, part
