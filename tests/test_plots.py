"""The picture: its axes, its points and lines, and labels that do not overlap. The figure itself is looked at, not compared."""

from __future__ import annotations

import builtins
import itertools

import matplotlib.figure
import matplotlib.text
import pytest
from example_results import make_results

from hfdistill import plots
from hfdistill.plots import plot_results


LOGS = [
    {"step": step, "epoch": 0.1 * step, "loss": 2.0 / step, "grad_norm": 9.0, "learning_rate": 0.1, "kd_weight": 0.5}
    | {"task": 3.0 / step, "task_weighted": 1.5 / step, "kd": 1.0 / step, "kd_weighted": 0.5 / step}
    for step in (1, 2, 3, 4)
] + [{"step": 4, "eval_loss": 7.0, "eval_accuracy": 0.5}, {"step": 4, "train_loss": 8.0, "train_runtime": 3.0}]


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn last."""
    made = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kwargs: (made.append(self), original(self, *args, **kwargs))
    )
    return lambda: made[-1]


def test_two_panels(tmp_path, figure):
    path = plot_results(make_results(), tmp_path / "new" / "results.png", LOGS)
    assert path.read_bytes().startswith(b"\x89PNG")
    sizes, losses = figure().axes
    assert sizes.get_xlabel() == "size on disk (MB)" and sizes.get_ylabel() == "accuracy (students: mean ± sd of 3 seeds)"
    assert sizes.get_xscale() == "linear"
    assert losses.get_xlabel() == "optimizer step" and "loss" in losses.get_ylabel()
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.get_lines()}
    steps = [1, 2, 3, 4]
    assert drawn == {
        "loss": (steps, [2.0 / s for s in steps]),
        "task × weight": (steps, [1.5 / s for s in steps]),
        "kd × weight": (steps, [0.5 / s for s in steps]),
    }
    assert [text.get_text() for text in losses.get_legend().get_texts()] == list(drawn)


def test_a_run_in_stages_says_which_one_is_drawn(tmp_path, figure):
    plot_results({**make_results(), "stages": [{"name": "hints"}, {"name": "prediction"}]}, tmp_path / "a.png", LOGS)
    assert figure().axes[1].get_title() == "Loss parts of the distilled student, stage 'prediction'"
    plot_results(make_results(), tmp_path / "a.png", LOGS)
    assert figure().axes[1].get_title() == "Loss parts of the distilled student"


def test_points_error_bars_and_line(tmp_path, figure):
    results = make_results()
    plot_results(results, tmp_path / "a.png")
    (axis,) = figure().axes
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["teacher  0.717", "student alone  0.417", "student distilled  0.640", "control  0.693"]
    bars = {round(container[0].get_ydata()[0], 3): container for container in axis.containers}
    assert set(bars) == {0.717, 0.417, 0.64, 0.693}
    low, high = bars[0.64][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.63, 0.65))
    assert not bars[0.717][2]  # one teacher, no spread
    dashed = [
        line for line in axis.get_lines() if line.get_linestyle() == "--" and len(set(line.get_ydata())) == 1 and len(line.get_ydata())
    ]
    assert [line.get_ydata()[0] for line in dashed] == [0.555]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["TF-IDF + logistic regression, student's labels  0.555"]
    place = axis.transAxes.transform((bars[0.717][0].get_xdata()[0], 0))[0]
    assert axis.transData.inverted().transform((place, 0))[0] == pytest.approx(2.69)


def test_students_of_one_size_stand_side_by_side(tmp_path, figure):
    results = make_results()
    results["baselines"]["control"] = results["baselines"]["control"]["accuracy"]  # a number over seeds, without sizes
    plot_results(results, tmp_path / "a.png")
    places = {container[0].get_ydata()[0]: container[0].get_xdata()[0] for container in figure().axes[0].containers}
    assert len(places) == 4 and len(set(places.values())) == 4
    students = sorted(places.values())[:3]  # in shares of the panel
    assert students[2] - students[0] < 0.05


def test_parts_without_weighted_values(tmp_path, figure):
    logs = [{key: value for key, value in entry.items() if not key.endswith("weighted") and key != "kd_weight"} for entry in LOGS]
    plot_results(make_results(), tmp_path / "a.png", logs)
    assert [line.get_label() for line in figure().axes[1].get_lines()] == ["loss", "task", "kd"]


def test_wide_range_of_sizes_is_logarithmic(tmp_path, figure):
    results = make_results(seeds=1)
    results["teacher"]["size_mb"] = 438.0
    plot_results(results, tmp_path / "a.png")
    assert figure().axes[0].get_xscale() == "log" and figure().axes[0].get_ylabel() == "accuracy"


def crowded(teacher_size, spread):
    results = make_results()
    results["teacher"] |= {"accuracy": 0.70, "size_mb": teacher_size}
    for entry, shift in (
        (results["student_alone"], 0),
        (results["student_distilled"], spread),
        (results["baselines"]["control"], 2 * spread),
    ):
        entry["accuracy"] = {"mean": 0.70 + shift, "std": 0.01, "values": [0.7] * 3}
    results["baselines"]["majority"] = 0.238
    return results


@pytest.mark.parametrize(
    ("teacher_size", "spread", "logs"),
    [(0.934, 0.0, None), (1.1, 0.001, None), (1.1, -0.01, LOGS), (2.69, 0.0, LOGS), (438.0, 0.001, None), (438.0, -0.01, LOGS)],
)
def test_labels_do_not_overlap(tmp_path, figure, teacher_size, spread, logs):
    plot_results(crowded(teacher_size, spread), tmp_path / "a.png", logs)
    axis = figure().axes[0]
    renderer = figure().canvas.get_renderer()
    # `Text.get_window_extent`: that of an annotation would include its arrow
    boxes = {text.get_text(): matplotlib.text.Text.get_window_extent(text, renderer) for text in axis.texts}
    for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(second), (one, other)
    panel = axis.get_window_extent(renderer)
    for text, box in boxes.items():
        assert box.x0 > panel.x0 and box.x1 < figure().bbox.x1 and box.y0 > panel.y0 and box.y1 < panel.y1, text


def test_spread_keeps_order_and_distance():
    placed = plots._spread([0.5, 0.5, 0.99, 0.98, 0.1])
    ordered = [placed[i] for i in (4, 0, 1, 3, 2)]
    assert all(b - a > 0.9 * plots._LINE_HEIGHT for a, b in itertools.pairwise(ordered)) and 0 < min(placed) and max(placed) < 1
    assert placed[4] == 0.1 and plots._spread([]) == []


def test_without_matplotlib_the_run_goes_on(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert plot_results(make_results(), tmp_path / "a.png", LOGS) is None
    assert "pip install 'hfdistill[plots]'" in capsys.readouterr().out and not list(tmp_path.iterdir())
