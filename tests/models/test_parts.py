"""Parts of a model by name: frozen, or with a learning rate of their own."""

import families
import pytest
import torch
from training import arguments, ragged, run, state

from hfdistill.models.parts import freeze_parts, names_of_part, scale_learning_rates


TOKEN_FAMILIES = ["bert", "distilbert", "roberta", "electra", "deberta_v2", "mpnet", "gpt2", "llama", "modernbert", "vit"]


@pytest.mark.parametrize("family", [name for name in TOKEN_FAMILIES if name in families.FAMILIES])
def test_parts_are_disjoint_and_together_the_whole_model(family):
    model = families.build(family, 3)
    parts = [names_of_part(model, part) for part in ("embeddings", "blocks.0", "blocks.1", "blocks.-1", "head")]
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert names_of_part(model, "blocks") == [name for part in parts[1:4] for name in part]
    assert any("embed" in name or name.split(".")[-2] in ("wte", "wpe") for name in parts[0])


def test_numbers_patterns_and_what_does_not_exist():
    model = families.build("bert", 4)
    assert {name.split(".")[3] for name in names_of_part(model, "blocks.1-2")} == {"1", "2"}
    assert names_of_part(model, "blocks.-4") == names_of_part(model, "blocks.0")
    assert names_of_part(model, "*.bias") == [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    for wrong, words in {
        "blocks.4": "blocks 0 to 3",
        "blocks.2-1": "blocks 0 to 3",
        "classifer": "No parameter",
        "blocks.x": "No parameter",
    }.items():
        with pytest.raises(ValueError, match=words):
            names_of_part(model, wrong)
    with pytest.raises(ValueError, match="nothing left to train"):
        freeze_parts(model, ["embeddings", "blocks", "head"])
    with pytest.raises(ValueError, match="share their weights"):
        names_of_part(families.build("albert", 3), "blocks.0")


def test_scales_are_factors_of_each_groups_rate_and_the_last_named_wins():
    model = families.build("bert", 3)
    named = dict(model.named_parameters())
    first, second = list(named)[: len(named) // 2], list(named)[len(named) // 2 :]
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in first], "lr": 0.1, "weight_decay": 0.3}, {"params": [named[n] for n in second], "lr": 0.01}]
    )
    scale_learning_rates(optimizer, model, {"blocks": 0.5, "blocks.1": 0.2})
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate.keys() == {id(p) for p in named.values()}
    for name, p in named.items():
        factor = 1.0 if ".layer." not in name else 0.2 if ".layer.1." in name else 0.5
        assert rate[id(p)] == pytest.approx((0.1 if name in first else 0.01) * factor), name
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decay[id(named[name])] == 0.3 for name in first)


def test_training_leaves_frozen_parts_alone_and_scales_the_steps_of_others(tmp_path):
    """With SGD a step is the learning rate times the gradient, so the factor shows in how far the weights moved."""
    options = dict(optim="sgd", learning_rate=0.1, kd_weight=0.0, task_weight=1.0)
    moved = {}
    for name, extra in {"plain": {}, "parts": {"frozen_parts": ["embeddings", "head"], "learning_rate_scales": {"blocks.0": 0.25}}}.items():
        student = families.build("bert", 2, seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        before = state(student)
        run(student, None, ragged("bert"), arguments(tmp_path / name, **options, **extra))
        moved[name] = {key: student.state_dict()[key] - value for key, value in before.items()}
    for key, plain in moved["plain"].items():
        factor = 0.25 if ".layer.0." in key else 1.0 if ".layer.1." in key else 0.0
        assert torch.allclose(moved["parts"][key], factor * plain, atol=1e-7), key
    assert moved["plain"]["bert.encoder.layer.0.output.dense.weight"].abs().max() > 1e-5
