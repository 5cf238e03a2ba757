"""What a run says at its end: a table, `results.json` and a picture."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .redaction import shareable


MODEL_NAMES = {"teacher": "teacher", "student_alone": "student alone", "student_distilled": "student distilled"}
BASELINE_NAMES = {
    "control": "control: student on the teacher's labels",
    "kd_alone": "soft targets alone: no earlier stage",
    "tfidf_logreg": "TF-IDF + logistic regression, student's labels",
    "tfidf_logreg_teacher_labels": "TF-IDF + logistic regression, teacher's labels",
    "pixel_logreg": "logistic regression on pixels, student's labels",
    "pixel_logreg_teacher_labels": "logistic regression on pixels, teacher's labels",
    "window_logreg": "logistic regression on neighbouring words, student's labels",
    "window_logreg_teacher_labels": "logistic regression on neighbouring words, teacher's labels",
    "majority": "majority class of the held-out part",
    "tfidf_cosine": "cosine of TF-IDF word vectors",
    "chance": "random order",
    "word_overlap": "sentence that shares most words with the question",
    "first_sentence": "first sentence of the context",
    "most_frequent": "most frequent token",
    "left_bigram": "left bigram",
    "trigram": "trigram with back-off, neighbours as the models see them",
    "trigram_told": "trigram with back-off, told the masked neighbours",
}
_KEYS = (
    "task", "metric", "seeds", "teacher", "student_alone", "student_distilled", "baselines", "agreement", "gap_closed", "objective",
    "versions", "config_sha256", "command", "seconds",
)  # fmt: skip
_ARMS = {"alone": "student_alone", "distilled": "student_distilled"}
_MEASURED = ("parameters", "size_mb", "latency_ms")
_MAY_BE_MISSING = ("student_alone", "agreement", "gap_closed")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    from . import __version__

    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    return {"python": platform.python_version(), **libraries, "hfdistill": __version__}


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (divided by n - 1) over seeds. One value has a deviation of 0: it says nothing of the spread.

    Raises:
        ValueError: for no values.

    Example:
        >>> summarise([0.5, 0.75, 1.0])
        {'mean': 0.75, 'std': 0.25, 'values': [0.5, 0.75, 1.0]}
    """
    values = [float(value) for value in values]
    if not values:
        raise ValueError("There is no value to summarise. Run at least one seed.")
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0, "values": values}


def write_results(results: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Check `results` against the contract and write them as JSON, all at once or not at all.

    Keys: `task`, `metric`, `seeds`, `teacher` (`<metric>`, `parameters`, `size_mb`, `latency_ms`), `student_alone` and
    `student_distilled` (the same, with `<metric>` as in [`summarise`]), `baselines` (name to a number, or to an entry like one of
    the former, such as `tfidf_logreg` and `control`), `agreement`, `gap_closed`, `objective`, `versions`, `config_sha256`,
    `command` and `seconds` (`teacher`, `alone`, `distilled`). `student_alone`, `agreement`, `gap_closed` and any of the seconds
    may be `None`: not measured, or not defined. Further keys are kept. Absolute paths and tokens are removed.

    Returns:
        `dict`: what was written.

    Raises:
        ValueError: naming everything that is missing or is no finite number.
    """
    plain = shareable(_plain(results))
    problems = _problems(plain)
    if problems:
        raise ValueError(f"These results do not keep the contract of results.json, so nothing was written: {'; '.join(problems)}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f"_{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(plain, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        # mkstemp keeps everyone else out; results are as readable as any other file of the run.
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return plain


def _plain(value: Any) -> Any:
    """Only what JSON knows: numpy and torch scalars become numbers, arrays and tuples lists, paths text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return str(value)


def _problems(results: dict[str, Any]) -> list[str]:
    problems = [f"'{key}' is missing" for key in _KEYS if key not in results]
    if problems:
        return problems
    metric, seeds = results["metric"], results["seeds"]
    if not isinstance(seeds, list) or not seeds:
        problems.append(f"'seeds' is {seeds!r}, not a list of at least one seed")
    for name in MODEL_NAMES:
        entry = results[name]
        if entry is None and name in _MAY_BE_MISSING:
            continue
        for key in (metric, *_MEASURED):
            if not isinstance(entry, dict) or key not in entry:
                problems.append(f"'{name}.{key}' is missing")
        if isinstance(entry, dict) and metric in entry:
            problems += _metric_problems(f"{name}.{metric}", entry[metric], None if name == "teacher" else seeds)
    if not isinstance(results["baselines"], dict):
        problems.append(f"'baselines' is {results['baselines']!r}, not a mapping")
    seconds = results["seconds"] if isinstance(results["seconds"], dict) else {}
    problems += [f"'seconds.{key}' is missing" for key in ("teacher", "alone", "distilled") if key not in seconds]
    problems += [f"'{key}' is None" for key in _KEYS if results[key] is None and key not in _MAY_BE_MISSING]
    return problems + [f"'{place}' is {value}, no finite number" for place, value in _not_finite(results)]


def _metric_problems(place: str, value: Any, seeds: list | None) -> list[str]:
    if seeds is None:
        return [] if isinstance(value, (int, float)) else [f"'{place}' is {value!r}, not a number"]
    if not isinstance(value, dict) or set(value) != {"mean", "std", "values"}:
        return [f"'{place}' is {value!r}, not the mean, std and values that summarise() gives"]
    if not isinstance(seeds, list) or len(value["values"]) != len(seeds):
        return [f"'{place}' has {len(value['values'])} values for the seeds {seeds}"]
    return []


def _not_finite(value: Any, place: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for key, entry in value.items() for found in _not_finite(entry, f"{place}.{key}" if place else key)]
    if isinstance(value, list):
        return [found for i, entry in enumerate(value) for found in _not_finite(entry, f"{place}[{i}]")]
    return [(place, value)] if isinstance(value, float) and not math.isfinite(value) else []


def results_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`results.json` as rows of a table: teacher, student alone, student distilled, then every baseline.

    `agreements` (arm to number), where `results` has it, fills that column for the other arms too, and each of `further_metrics`
    (name to arm to value, as in `student_distilled`) is a column of its own.
    """
    metric = results["metric"]
    rows = {key: _row(name, metric, results[key]) for key, name in MODEL_NAMES.items() if results.get(key) is not None}
    for key, entry in results["baselines"].items():
        whole = isinstance(entry, Mapping) and "mean" not in entry
        rows[key] = _row(BASELINE_NAMES.get(key, key), metric, entry if whole else {metric: entry})
    agreements = {"student_distilled": results["agreement"], **{_ARMS.get(k, k): v for k, v in results.get("agreements", {}).items()}}
    for key, row in rows.items():
        for name, entries in results.get("further_metrics", {}).items():
            row[name.replace("_", " ")] = entries.get(key)
        row["agreement with teacher"] = agreements.get(key)
        row["gap closed"] = results["gap_closed"] if key == "student_distilled" else None
    return list(rows.values())


def _row(name: str, metric: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"parameters": "parameters", "size (MB)": "size_mb", "latency (ms)": "latency_ms"}
    return {"model": name, metric: entry.get(metric), **{title: entry.get(key) for title, key in sizes.items()}}


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table. Columns are the keys of all rows in the order in which they first occur.

    Numbers are rounded, what [`summarise`] gives becomes mean ± standard deviation, and `None` a dash.

    Example:
        >>> print(results_table([{"model": "a|b", "accuracy": 0.5}, {"model": "c", "parameters": 12345}]))
        | model | accuracy | parameters |
        | :--- | ---: | ---: |
        | a\\|b | 0.500 | – |
        | c | – | 12,345 |
    """
    columns, cells, numeric = _cells(rows)
    lines = [columns, ["---:" if column in numeric else ":---" for column in columns]]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in [*lines, *cells])


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None, file: Any = None) -> None:
    """The same table for a terminal, through rich; `file` is where it goes, standard output by default."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns, cells, numeric = _cells(rows)
    table = Table(title=title)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in numeric else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    console = Console(file=file)
    if not console.is_terminal:
        console = Console(file=file, width=140)  # in a log file rich would assume 80 columns and break words
    console.print(table)


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], set[str]]:
    """Column names, formatted cells, and which columns hold numbers."""
    rows = [_plain(row) for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if column == columns[0] or any(row.get(column) is not None for row in rows)]
    numeric = {column for column in columns if all(not isinstance(row.get(column), str) for row in rows)}
    digits = {}
    for column in numeric:
        floats = [value for value in (_mean(row.get(column)) for row in rows) if isinstance(value, float)]
        digits[column] = min(map(_digits, floats), default=None)
    return columns, [[format_value(row.get(column), digits.get(column)) for column in columns] for row in rows], numeric


def format_value(value: Any, digits: int | None = None) -> str:
    """A number as people read it, with as many decimal places as its size asks for, or `digits`.

    Example:
        >>> [format_value(value) for value in (None, 672902, 0.6384, 2.6931, 123.456, summarise([0.5, 0.7]), True)]
        ['–', '672,902', '0.638', '2.69', '123.5', '0.600 ± 0.141', 'True']
    """
    value = _plain(value)
    if value is None:
        return "–"
    if digits is None or abs(_mean(value) or 1) < 0.1:
        digits = _digits(_mean(value))
    if isinstance(value, Mapping):
        spread = f" ± {value['std']:.{digits}f}" if len(value.get("values", (0, 0))) > 1 else ""
        return f"{value['mean']:.{digits}f}{spread}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _mean(value: Any) -> float | int | None:
    value = value["mean"] if isinstance(value, Mapping) else value
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _digits(value: float | None) -> int:
    return 3 if value is None else 3 if abs(value) <= 1 else 2 if abs(value) < 100 else 1
