import random

import numpy as np
import pytest
import torch

from hfdistill.models.layer_map import LAYER_MAPS, layer_map_table, resolve_layer_map


PUBLISHED = [
    ("uniform", 12, 4, [2, 5, 8, 11]),
    ("uniform", 12, 6, [1, 3, 5, 7, 9, 11]),
    ("uniform", 24, 6, [3, 7, 11, 15, 19, 23]),
    ("uniform", 24, 12, list(range(1, 24, 2))),
    ("uniform", 12, 3, [3, 7, 11]),
    ("uniform", 12, 1, [11]),
    ("uniform", 12, 12, list(range(12))),
    ("uniform", 12, 5, [1, 4, 6, 9, 11]),
    ("uniform", 12, 8, [1, 2, 4, 5, 7, 8, 10, 11]),
    ("spread", 12, 6, [0, 2, 4, 7, 9, 11]),
    ("spread", 32, 2, [0, 31]),
    ("spread", 12, 3, [0, 6, 11]),
    ("spread", 12, 1, [11]),
    ("spread", 7, 7, list(range(7))),
    ("last", 12, 4, [8, 9, 10, 11]),
    ("first", 12, 4, [0, 1, 2, 3]),
]


@pytest.mark.parametrize("name, teacher, student, blocks", PUBLISHED)
def test_published_maps(name, teacher, student, blocks):
    assert resolve_layer_map(name, student, teacher) == list(zip(range(student), blocks, strict=True))
    assert LAYER_MAPS[name](student, teacher) == list(zip(range(student), blocks, strict=True))


def test_skip_leaves_the_last_student_block_to_the_logits():
    assert resolve_layer_map("skip", 6, 12) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]
    with pytest.raises(ValueError, match="student of 1 block.*Use 'uniform'"):
        resolve_layer_map("skip", 1, 12)


@pytest.mark.parametrize("name", LAYER_MAPS)
def test_every_strategy_is_increasing_and_in_range_at_every_depth(name):
    for teacher in range(1, 33):
        for student in range(2 if name == "skip" else 1, teacher + 1):
            pairs = LAYER_MAPS[name](student, teacher) if student <= teacher else []
            targets = [t for _, t in pairs]
            assert [s for s, _ in pairs] == list(range(student - (name == "skip")))
            assert targets == sorted(set(targets)) and targets[0] >= 0 and targets[-1] < teacher
            assert name not in ("uniform", "spread", "last") or targets[-1] == teacher - 1
            assert not (name == "spread" and student > 1) or targets[0] == 0


def test_random_depends_on_seed_and_step_alone():
    def draw(seed, step):
        return resolve_layer_map("random", 4, 12, seed=seed, step=step)

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [draw(0, step) for step in range(20)]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert first == [draw(0, step) for step in range(20)]
    assert len(set(map(tuple, first))) > 10, "a new map each step"
    assert first != [draw(1, step) for step in range(20)]
    assert draw(1, 11) != draw(11, 1)
    random.setstate(states[0]), torch.set_rng_state(states[2])
    draw(5, 5)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])


def test_random_reaches_every_block_equally_often():
    counts = np.bincount([t for step in range(3000) for _, t in LAYER_MAPS["random"](3, 6, 0, step)], minlength=6)
    assert np.all(abs(counts - 1500) < 5 * np.sqrt(3000 * 0.25))


@pytest.mark.parametrize(
    "spec, pairs",
    [
        ("0:1,1:3", [(0, 1), (1, 3)]),
        (" 0 : 1 , 1:3, ", [(0, 1), (1, 3)]),
        ("-1:-1", [(2, 5)]),
        ("0:0,0:1,1:3", [(0, 0), (0, 1), (1, 3)]),
        ("2:5,0:1", [(0, 1), (2, 5)]),
        ([(0, 1), [1, 3]], [(0, 1), (1, 3)]),
        (((0, 1), (-1, -2)), [(0, 1), (2, 4)]),
        ({0: 1}, [(0, 1)]),
        ({0: [0, 1], 2: 5}, [(0, 0), (0, 1), (2, 5)]),
        ({"0": 1}, [(0, 1)]),
    ],
)
def test_explicit_pairs(spec, pairs):
    assert resolve_layer_map(spec, 3, 6) == pairs


def test_explicit_pairs_allow_a_deeper_student():
    assert resolve_layer_map("0:0,3:1", 4, 2) == [(0, 0), (3, 1)]


def test_original_is_the_recorded_map():
    assert resolve_layer_map("original", 3, 6, recorded=[0, 2, 5]) == [(0, 0), (1, 2), (2, 5)]
    with pytest.raises(ValueError, match="records none.*build_student"):
        resolve_layer_map("original", 3, 6)
    with pytest.raises(ValueError, match="recorded for 2 blocks, but the student has 3"):
        resolve_layer_map("original", 3, 6, recorded=[0, 2])
    with pytest.raises(ValueError, match="teacher block 7, but the teacher has 6 blocks: 0 to 5"):
        resolve_layer_map("original", 3, 6, recorded=[0, 2, 7])


def test_similar_needs_a_similarity():
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.1, 0.2, 0.3, 0.8]])
    assert resolve_layer_map("similar", 2, 4, similarity=similarity) == [(0, 1), (1, 3)]
    with pytest.raises(ValueError, match="calibration batch.*trainer supplies it"):
        resolve_layer_map("similar", 2, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 4\), but the student has 2 blocks and the teacher 5"):
        resolve_layer_map("similar", 2, 5, similarity=similarity)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("unifrom", "Unknown layer_map 'unifrom'. Did you mean 'uniform'.*Use one of uniform, spread"),
        ("orignal", "Did you mean 'original'"),
        ("", "Unknown layer_map ''"),
        ("0:1,1", "'0:1,1' cannot be read.*'0:1,1:3'"),
        ("0:1:2", "cannot be read"),
        ("0:x", "has 'x' where the number of a teacher block belongs"),
        ("a:0", "has 'a' where the number of a student block belongs"),
        ("0:", "where the number of a teacher block belongs"),
        ("3:0", "names student block 3, but the student has 3 blocks: 0 to 2, or -1 to -3"),
        ("0:6", "names teacher block 6, but the teacher has 6 blocks: 0 to 5, or -1 to -6"),
        ("0:-7", "names teacher block -7"),
        ("0:1,0:1", "names the pair 0:1 twice"),
        ("-1:5,2:-1", "names the pair 2:5 twice"),
        ([], "is empty, so no block would be matched"),
        ({}, "is empty"),
        ({0: []}, "is empty"),
        ([(0, 1, 2)], "cannot be read"),
        ([0, 1], "cannot be read"),
        ([(0, 1.5)], "has 1.5 where the number of a teacher block belongs"),
        ([(True, 1)], "has True where the number of a student block belongs"),
        (None, "cannot be read"),
        (3, "cannot be read"),
    ],
)
def test_bad_maps_say_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_layer_map(spec, 3, 6)


@pytest.mark.parametrize("name", [*LAYER_MAPS, "similar"])
def test_strategies_refuse_a_deeper_student(name):
    with pytest.raises(ValueError, match=f"layer_map='{name}'.*student has 6 blocks and the teacher 3.*Name the pairs yourself"):
        resolve_layer_map(name, 6, 3)


def test_table_shows_every_student_block_and_names_unused_teacher_blocks():
    assert layer_map_table([(0, 0), (0, 1), (2, 4)], 3, 5).splitlines() == [
        "| student block | teacher block |",
        "|---|---|",
        "| 0 | 0, 1 |",
        "| 1 | - |",
        "| 2 | 4 |",
        "",
        "Teacher blocks not used: 2, 3.",
    ]
    assert "not used" not in layer_map_table([(0, 0), (1, 1)], 2, 2)
