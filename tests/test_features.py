"""Feature maps from every family of image models: which stages, which layout, and a training step with every kind of vision term."""

from __future__ import annotations

import pytest
import torch
import vision_families as vision
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from training import Rows, arguments, pad, run

from hfdistill import DistillationTrainer, Term
from hfdistill.capture import Capture
from hfdistill.capture_plan import CapturePlan
from hfdistill.losses import CRDLoss, SoftTargetsLoss, VIDLoss
from hfdistill.models.stages import _listed_by_timm, feature_map, special_token_count, token_grid


# Heights and channels of the stages of `vision.build(family)`, from the configs and the papers' strides.
STAGES = {
    "vit": [(4, 16)] * 2,
    "deit": [(4, 16)] * 2,
    "beit": [(4, 16)] * 2,
    "dinov2": [(4, 16)] * 2,
    "dinov2_with_registers": [(4, 16)] * 2,
    "swin": [(8, 16), (4, 32), (4, 32)],
    "convnext": [(16, 8), (8, 16), (4, 24), (2, 32)],
    "convnextv2": [(16, 8), (8, 16), (4, 24), (2, 32)],
    "resnet": [(16, 8), (8, 16), (4, 24), (2, 32)],
    "regnet": [(16, 8), (8, 16), (4, 24), (2, 32)],
    "mobilenet_v2": [(16, 8), (8, 8), (4, 24), (2, 80)],
    "efficientnet": None,
    "pvt": [(16, 8), (8, 16), (4, 24), (2, 32)],
    "levit": [(2, 24), (1, 32), (1, 32)],
    "mobilevit": [(32, 8), (16, 8), (8, 16), (4, 16), (2, 16)],
}
ATTENTION = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers")
FAMILIES = sorted(vision.VISION)


def side_of(family: str) -> int:
    return vision.VISION[family][2]


def everything(capture: Capture, batch) -> dict:
    stages = range(len(capture.find_stages(batch)))
    return capture.require(CapturePlan(logits=False, features=frozenset(stages)), batch).features


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_every_family(family):
    capture, batch = Capture(vision.build(family), "student"), vision.batch(side_of(family))
    maps = everything(capture, batch)
    shapes = [(maps[k].size(2), maps[k].size(1)) for k in range(len(maps))]
    assert all(tensor.shape[0] == 4 and tensor.size(2) == tensor.size(3) for tensor in maps.values())
    if STAGES[family] is None:  # every block sequence of one resolution is a stage: resolutions fall from stage to stage
        assert len(shapes) >= 4 and [side for side, _ in shapes] == sorted({side for side, _ in shapes}, reverse=True)
    else:
        assert shapes == STAGES[family]


@pytest.mark.parametrize("family", ["resnet", "convnext", "swin", "mobilenet_v2"])
def test_maps_are_what_transformers_calls_hidden_states(family):
    model, batch = vision.build(family), vision.batch(side_of(family))
    maps = everything(Capture(model, "student"), batch)
    with torch.no_grad():
        output = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
    if family == "swin":
        states = [state.flatten(2) for state in output.reshaped_hidden_states[1:]]
        maps = {k: tensor.flatten(2) for k, tensor in maps.items()}
    elif family == "mobilenet_v2":  # one a block, and stages end where the resolution falls
        states = [output.hidden_states[k] for k in (1, 4, 11, 15)]
    else:
        states = output.hidden_states[1:]
    for k, state in enumerate(states):
        assert torch.equal(maps[k], state)


@pytest.mark.parametrize(("family", "front"), [("vit", 1), ("deit", 2), ("dinov2_with_registers", 3)])
def test_patch_tokens_lie_where_their_patches_lie(family, front):
    """A patch of the image that changes moves its own place on the map of the patch embedding's first block most; and the special
    tokens are not on it."""
    model = vision.build(family)
    blocks = [module for name, module in model.named_modules() if name.endswith(("layers.0", "layer.0"))]
    seen = {}
    handle = blocks[0].register_forward_hook(lambda _m, _a, out: seen.__setitem__("out", out))
    batch = vision.batch(32, rows=1)
    maps = everything(Capture(model, "student"), batch)
    handle.remove()
    tokens = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
    for row in range(4):
        for column in range(4):
            assert torch.equal(maps[0][0, :, row, column], tokens[0, front + 4 * row + column])


def test_images_that_are_not_square():
    batch = vision.batch(64, width=32)
    maps = everything(Capture(vision.build("resnet"), "student"), batch)
    assert [tuple(maps[k].shape[-2:]) for k in range(4)] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    tall = vision.build("vit", image_size=(64, 32))
    assert everything(Capture(tall, "student"), batch)[0].shape[-2:] == (8, 4)


@pytest.mark.parametrize(
    ("length", "size", "special", "expected"),
    [
        (17, (32, 32), 1, (1, 4, 4)),
        (16, (32, 32), 1, (0, 4, 4)),
        (9, (64, 32), 1, (1, 4, 2)),
        (33, (32, 64), 1, (1, 4, 8)),
        (19, (32, 32), 3, (3, 4, 4)),
        (18, (32, 32), 1, None),
        (16, (31, 31), 0, (0, 4, 4)),
        (1 + 16 * 16, (224, 224), 1, (1, 16, 16)),
    ],
)
def test_token_grid(length, size, special, expected):
    assert token_grid(length, size, special) == expected


def test_a_map_is_found_in_what_a_module_returns():
    image = torch.randn(2, 3, 4, 5)
    assert feature_map((image, "more"), (8, 8), 0) is image
    assert feature_map(torch.randn(2, 7), (8, 8), 0) is None
    assert feature_map("text", (8, 8), 0) is None


TERMS = [
    Term("soft_targets", weight=0.5),
    Term("hint", weight=0.1),
    Term("attention_transfer", weight=10.0),
    Term("rkd_distance", weight=0.5),
    Term("similarity_preserving", weight=1.0, layer_map="-1:-1"),
    Term("task", weight=0.5),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_under_a_teacher_of_the_same_family(family, tmp_path):
    student, teacher = vision.build(family, 1, seed=1), vision.build(family, 2, seed=2)
    student.train()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher_before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    terms = [*TERMS]
    if family == "levit":  # its last stages have a single position here, whose attention is 1
        terms[2] = Term("attention_transfer", weight=10.0, layer_map="0:0")
    if family in ATTENTION:
        terms += [Term("attention_kl", weight=0.1, options={"heads": "mean"}), Term("cosine", weight=0.1)]
    data = Rows(vision.batch(side_of(family), rows=8))
    trainer, gradients = run(student, teacher, data, arguments(tmp_path, max_steps=1, learning_rate=0.01), objective=terms)
    log = trainer.state.log_history[0]
    for term in terms:
        assert log[term.name] >= -1e-6 and torch.isfinite(torch.tensor(log[term.name])), term.name
    assert log["hint"] > 0 and log["attention_transfer"] > 0 and log["rkd_distance"] > 0
    moved = [name for name, p in student.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.6 * len(before)
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in teacher.state_dict().items())
    adapters = {name for name, _ in trainer.objective.named_parameters()}
    assert adapters and all(f"adapter.{name}" in gradients[0] for name in adapters)
    assert student.state_dict().keys() == vision.build(family, 1).state_dict().keys()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("resnet", "vit"), ("vit", "resnet"), ("mobilenet_v2", "resnet"), ("vit", "swin"), ("swin", "convnext"), ("deit", "regnet")],
)
def test_a_step_across_families(student, teacher, tmp_path):
    """Maps of other height and width are pooled to the smaller; layer maps are named where the teacher has fewer stages."""
    student, teacher = (vision.build(name, image_size=64) if name in ("vit", "swin", "deit") else vision.build(name)
                        for name in (student, teacher))  # fmt: skip
    terms = [Term("soft_targets"), Term("hint", layer_map="-1:-1"), Term("attention_transfer", layer_map="0:0,-1:-1"), Term("pkt")]
    trainer, _ = run(student, teacher, Rows(vision.batch(64, rows=4)), arguments(tmp_path), objective=terms)
    assert all(trainer.state.log_history[0][term.name] > 0 for term in terms)


def test_the_larger_map_is_pooled_and_the_adapter_is_a_convolution(tmp_path):
    """The logged value against the same by hand: hint between a 16x16 map of 8 channels and a 4x4 map of 24."""
    student, teacher, batch = vision.build("resnet", seed=1), vision.build("resnet", seed=2), vision.batch(64, rows=4)
    term = Term("hint", layer_map={0: 2})
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=Rows(batch), objective=[term])
    adapter = trainer.objective.terms["hint"].adapters[0]
    assert isinstance(adapter, nn.Conv2d) and adapter.weight.shape == (24, 8, 1, 1)
    weight, bias = (p.detach().clone() for p in adapter.parameters())
    student.eval()
    with torch.no_grad():
        s = student(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[1]
        t = teacher(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[3]
    expected = (adaptive_avg_pool2d(torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], s) + bias[:, None, None], 4) - t).square().mean()
    signals = [capture(batch, CapturePlan(logits=False, features=frozenset({k})))
               for capture, k in ((trainer.student, 0), (trainer.teacher.capture, 2))]  # fmt: skip
    (part,) = trainer.objective(*signals, None, 0.0, trainer.objective.pairs_at(0))
    assert part.value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_rows_of_a_map_are_its_positions(tmp_path):
    """A loss on vectors reads a map position by position: cosine over channels, mean over samples and positions."""
    student, teacher, batch = vision.build("resnet", seed=1), vision.build("resnet", seed=2), vision.batch(64, rows=4)
    term = Term("cosine", signal="features", layer_map="1:1")
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=Rows(batch), objective=[term])
    student.eval()
    with torch.no_grad():
        s, t = (model(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[2] for model in (student, teacher))
    signals = [capture(batch, CapturePlan(logits=False, features=frozenset({1}))) for capture in (trainer.student, trainer.teacher.capture)]
    (part,) = trainer.objective(*signals, None, 0.0, trainer.objective.pairs_at(0))
    cosine = (s * t).sum(1) / (s.square().sum(1).sqrt() * t.square().sum(1).sqrt())
    assert part.value.item() == pytest.approx((1 - cosine).mean().item(), rel=1e-5)
    assert part.counts.item() == 4 * 8 * 8


def test_modules_by_name(tmp_path):
    student, teacher, batch = vision.build("resnet", seed=1), vision.build("vit", image_size=64), vision.batch(64, rows=4)
    names = {"resnet.encoder.stages.1.layers.0": "vit.layers.1", "encoder.stages.2": 0}
    term = Term("attention_transfer", layer_map=names)
    trainer, _ = run(student, teacher, Rows(batch), arguments(tmp_path), objective=[term])
    assert trainer.objective.terms["attention_transfer"].pairs == [
        ("resnet.encoder.stages.1.layers.0", "vit.layers.1"),
        ("encoder.stages.2", 0),
    ]
    assert "| encoder.stages.2 | 0 |" in trainer.layer_map_tables()["attention_transfer"]
    text = Term("attention_transfer", layer_map="encoder.stages.1:vit.layers.1")
    trainer, _ = run(student, teacher, Rows(batch), arguments(tmp_path), objective=[text])
    assert trainer.objective.terms["attention_transfer"].pairs == [("encoder.stages.1", "vit.layers.1")]


def test_a_network_without_a_list_of_stages_by_name(tmp_path):
    """A torch module of two convolutions side by side has no stages to count; its modules can be named."""

    class Plain(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.low, self.high = nn.Conv2d(3, channels, 3, 2), nn.Conv2d(channels, channels, 3, 2)
            self.head = nn.Linear(channels, 3)

        def forward(self, pixel_values):
            return self.head(self.high(self.low(pixel_values).relu()).mean((2, 3)))

    batch = vision.batch(32, rows=4)
    trainer, _ = run(Plain(4), Plain(8), Rows(batch), arguments(tmp_path), objective=[Term("hint", layer_map={"low": "low"})])
    assert trainer.state.log_history[0]["hint"] > 0
    with pytest.raises(ValueError, match="No stages found in Plain.* Name the modules in the layer map"):
        run(Plain(4), Plain(8), Rows(batch), arguments(tmp_path), objective=[Term("hint")])


def test_similar_stages(tmp_path):
    student, teacher = vision.build("resnet", seed=1), vision.build("resnet", seed=1)
    term = Term("attention_transfer", layer_map="similar")
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, train_dataset=Rows(vision.batch(64, rows=8)), objective=[term]
    )
    assert trainer.objective.terms["attention_transfer"].pairs == [(k, k) for k in range(4)]


REFUSED = {
    "no such module": (dict(layer_map="encoder.stage.1:0"), "names the module 'encoder.stage.1' of the student .*Did you mean"),
    "no such stage": (dict(layer_map="4:0"), "the student has 4 stages: 0 to 3.* the stem is not a stage"),
    "no map": (dict(layer_map="classifier:0"), "gave neither a map nor patch tokens"),
    "random": (dict(layer_map="random"), "cannot draw its layer map anew each step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            vision.build("resnet", seed=1),
            arguments(tmp_path),
            teacher=vision.build("resnet", seed=2),
            train_dataset=Rows(vision.batch(64)),
            objective=[Term("attention_transfer", **options)],
        )


def test_text_models_have_no_feature_maps(tmp_path):
    import families

    with pytest.raises(ValueError, match="takes no images .* Use signal 'hidden_states' or 'pooled'"):
        DistillationTrainer(
            families.build("bert", 2),
            arguments(tmp_path),
            teacher=families.build("bert", 2),
            train_dataset=Rows(families.batch("bert")),
            data_collator=pad,
            objective=[Term("attention_transfer")],
        )


@pytest.mark.parametrize(
    ("student", "teacher", "term", "message"),
    [
        ("resnet", "resnet", "attention_kl", "has no attention that can be read"),
        ("swin", "swin", "attention_kl", "windowed or cross attention cannot be compared|attentions for"),
        ("resnet", "resnet", "hidden_mse", "For the maps of convolutional networks use signal 'features'"),
        ("dinov2", "dinov2_with_registers", "hidden_mse", "use signal 'features', which leaves special tokens out"),
    ],
)
def test_signals_that_do_not_exist_are_refused(student, teacher, term, message, tmp_path):
    side = side_of(student)
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(
            vision.build(student),
            arguments(tmp_path),
            teacher=vision.build(teacher),
            train_dataset=Rows(vision.batch(side)),
            objective=[Term(term, layer_map="0:0")],
        )


def test_capture_of_features_changes_nothing(tmp_path):
    """The hooks are gone after the pass, and the logits are those without them."""
    model, batch = vision.build("resnet"), vision.batch(64)
    capture = Capture(model, "student")
    capture.require(CapturePlan(features=frozenset({0, 3})), batch)
    with torch.no_grad():
        with_hooks = capture(batch, CapturePlan(features=frozenset({0, 3}))).logits
        assert torch.equal(with_hooks, model(pixel_values=batch["pixel_values"]).logits)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_cutting_the_batch_does_not_change_the_gradient_of_maps(accumulation, tmp_path):
    """Hint and AT are sums over samples (a ViT has no batch norm, which alone would couple them)."""
    terms = [Term("hint", layer_map="1:2"), Term("attention_transfer", layer_map="1:2"), Term("cosine", signal="features", layer_map="0:0")]
    flat = []
    for steps in (1, accumulation):
        student, teacher = vision.build("vit", 1, seed=1), vision.build("vit", 2, seed=2)
        args = arguments(tmp_path / str(steps), per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)
        _, gradients = run(student, teacher, Rows(vision.batch(32, rows=8)), args, objective=terms)
        flat.append(torch.cat([gradients[0][name].flatten() for name in sorted(gradients[0])]))
    torch.testing.assert_close(flat[1], flat[0], rtol=1e-4, atol=1e-6)


def test_pooled_features_are_the_means_over_space(tmp_path):
    """Hidden MSE between the means of stage 1 and of a module by name; widths are brought together by a linear map."""
    student, teacher, batch = vision.build("resnet", seed=1), vision.build("resnet", 2, seed=2), vision.batch(64, rows=4)
    term = Term("hidden_mse", signal="pooled_features", layer_map={1: "encoder.stages.2"})
    trainer = DistillationTrainer(student, arguments(tmp_path), teacher=teacher, train_dataset=Rows(batch), objective=[term])
    adapter = trainer.objective.terms["hidden_mse"].adapters[0]
    assert isinstance(adapter, nn.Linear) and (adapter.in_features, adapter.out_features) == (16, 48)
    student.eval()
    with torch.no_grad():
        s = student(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[2].mean((2, 3))
        t = teacher(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states[3].mean((2, 3))
        expected = (s @ adapter.weight.T + adapter.bias - t).square().mean()
    plans = trainer.objective.plans(trainer.objective.pairs_at(0), 0.0)
    signals = [capture(batch, plan) for capture, plan in zip((trainer.student, trainer.teacher.capture), plans)]
    (part,) = trainer.objective(*signals, None, 0.0, trainer.objective.pairs_at(0))
    assert part.value.item() == pytest.approx(expected.item(), rel=1e-6) and part.counts.item() == 4


def test_relations_of_tokens_are_between_the_means_of_real_tokens(tmp_path):
    """A loss on samples reads hidden states as one vector a text; padding changes nothing."""
    import families

    student, teacher, batch = families.build("bert", 2, seed=1), families.build("bert", 4, seed=2), families.batch("bert", rows=4)
    term = Term("rkd_distance", signal="hidden_states", layer_map="-1:-1")
    trainer = DistillationTrainer(
        student, arguments(tmp_path), teacher=teacher, train_dataset=Rows(batch), data_collator=pad, objective=[term]
    )
    means = []
    for model, block in ((student, 1), (teacher, 3)):
        model.eval()
        with torch.no_grad():
            states = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[block + 1]
        means.append([row[mask.bool()].mean(0) for row, mask in zip(states, batch["attention_mask"])])
    tables = []
    for own in means:
        table = torch.stack([torch.stack([(a - b).square().sum().sqrt() for b in own]) for a in own])
        tables.append(table / table[table > 0].mean())
    difference = (tables[0] - tables[1]).abs()
    expected = torch.where(difference < 1, difference.square() / 2, difference - 0.5).mean()
    plans = trainer.objective.plans(trainer.objective.pairs_at(0), 0.0)
    signals = [capture(batch, plan) for capture, plan in zip((trainer.student, trainer.teacher.capture), plans)]
    (part,) = trainer.objective(*signals, None, 0.0, trainer.objective.pairs_at(0))
    assert part.value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_joint_losses_see_all_their_layers(tmp_path):
    """ReviewKD and FSP take the whole layer map at once, and their parameters are trained, saved and resumed with the run."""
    terms = [Term("review", layer_map="0:0,1:1,2:2"), Term("fsp", layer_map="0:0,1:1,2:2"), Term("vid", layer_map="0:0,1:1")]

    def go(folder, resume=None):
        student, teacher = vision.build("resnet", seed=1), vision.build("resnet", seed=2)
        args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=4)
        return run(student, teacher, Rows(vision.batch(64, rows=8)), args, objective=terms, resume=resume)

    (whole, gradients), (resumed, _) = go(tmp_path / "a"), go(tmp_path / "b", str(tmp_path / "a/checkpoint-2"))
    own = {name for name, _ in whole.objective.named_parameters()}
    assert {name.split(".")[1] for name in own} == {"review", "vid"}
    assert len(whole.objective.terms["vid"].losses) == 2 and len(whole.objective.terms["review"].losses) == 1
    assert all(gradients[0][f"adapter.{name}"].abs().sum() > 0 for name in own if "bias" not in name and ".2.weight" not in name)
    for ours, theirs in ((whole.model, resumed.model), (whole.objective, resumed.objective)):
        for key, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[key]), key
    assert all(whole.state.log_history[0][term.name] != 0 for term in terms)


def test_losses_that_remember_examples_have_no_part_in_evaluation(tmp_path):
    terms = [Term("task"), Term("soft_targets"), Term("crd", options={"dim": 4, "negatives": 3})]
    student, teacher, data = vision.build("vit", 1), vision.build("vit", 2, seed=2), Rows(vision.batch(32, rows=8))
    trainer, _ = run(student, teacher, data, arguments(tmp_path, eval_with_teacher=True), objective=terms)
    banks = {key: tensor.clone() for key, tensor in trainer.objective.state_dict().items()}
    metrics = trainer.evaluate(data)
    assert {"eval_task", "eval_soft_targets"} <= metrics.keys() and "eval_crd" not in metrics
    assert all(torch.equal(tensor, trainer.objective.state_dict()[key]) for key, tensor in banks.items())


RELATIONS_BY_STAGE = [Term("rkd_distance", signal="pooled_features", layer_map="-1:-1") if t.name == "rkd_distance" else t for t in TERMS]


class Net(nn.Module):
    """As timm's ResNets are made: a stem `act1`, stages `layer1`, `layer2`, no list of them, `feature_info`, logits and nothing else."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU()
        self.layer1, self.layer2 = nn.Conv2d(channels, channels, 3, 2, 1), nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.fc = nn.Linear(2 * channels, 3)
        self.feature_info = [{"module": "act1"}, {"module": "layer1"}, {"module": "layer2"}]

    def forward(self, pixels):
        return self.fc(self.layer2(self.layer1(self.act1(self.conv1(pixels))).relu()).mean((2, 3)))


class Wrapper(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.timm_model = Net(channels)

    def forward(self, pixel_values):
        return {"logits": self.timm_model(pixel_values)}


def test_stages_as_timm_lists_them_without_its_stem(tmp_path):
    trainer, _ = run(Wrapper(4), Wrapper(8), Rows(vision.batch(64, rows=4)), arguments(tmp_path), objective=RELATIONS_BY_STAGE)
    assert trainer.student.find_stages(vision.batch(64)).names == ["timm_model.layer1", "timm_model.layer2"]
    assert all(trainer.state.log_history[0][term.name] >= 0 for term in TERMS)


def test_a_timm_model_through_the_wrapper_of_transformers(tmp_path):
    pytest.importorskip("timm")  # needs torchvision, which has no build beside the torch of the test machines
    import transformers

    models = [transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig("resnet10t", num_labels=3)) for _ in range(2)]
    trainer, _ = run(*models, Rows(vision.batch(64, rows=4)), arguments(tmp_path), objective=RELATIONS_BY_STAGE)
    assert all(term.name in trainer.state.log_history[0] for term in TERMS)


def test_class_tokens_of_clip_are_not_patches():
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    model = transformers.CLIPVisionModel(config).eval()
    assert special_token_count(model) == 1
    assert [tuple(m.shape[1:]) for m in everything(Capture(model, "student"), vision.batch(32)).values()] == [(16, 4, 4)] * 6


def test_attention_of_a_single_position_is_refused(tmp_path):
    """It is 1 whatever the model does: a loss that never moves anything."""
    for loss in ("attention_transfer", "factor_transfer"):
        with pytest.raises(ValueError, match="a mapped layer has a single position .* Map earlier stages"):
            run(
                vision.build("levit", 1), vision.build("levit", 2), Rows(vision.batch(64, rows=4)), arguments(tmp_path),
                objective=[Term(loss, layer_map="-1:-1")],
            )  # fmt: skip


def test_relations_of_models_with_other_numbers_of_tokens(tmp_path):
    """A ViT has 17 tokens, a DeiT 18: one vector a sample each, so they can be compared."""
    term = Term("rkd_distance", signal="hidden_states", layer_map="0:0")
    trainer, _ = run(vision.build("vit", 1), vision.build("deit", 2), Rows(vision.batch(32, rows=4)), arguments(tmp_path), objective=[term])
    assert trainer.state.log_history[0]["rkd_distance"] > 0


def test_features_under_reentrant_checkpointing_are_refused(tmp_path):
    args = arguments(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant activation checkpointing loses the gradient"):
        run(vision.build("vit", 1), vision.build("vit", 2), Rows(vision.batch(32)), args, objective=[Term("hint", layer_map="0:0")])


def test_a_loss_given_as_an_object_is_copied_for_each_run(tmp_path):
    """Two trainers of one list of terms (two seeds) start from the same memory, and one object in two terms is two losses."""
    crd, vid = CRDLoss(dim=4, negatives=3), VIDLoss()
    terms = [Term(crd), Term(vid, name="low", layer_map="0:0"), Term(vid, name="high", layer_map="1:2")]
    draws = []
    for seed in (1, 2):
        args = arguments(tmp_path / str(seed), save_strategy="steps", save_steps=1)
        trainer, _ = run(vision.build("vit", 1, seed=seed), vision.build("vit", 2), Rows(vision.batch(32, rows=8)), args, objective=terms)
        draws.append(int(trainer.objective.terms["CRDLoss"].loss.draws))
    assert draws == [1, 1] and crd.examples is None and not list(vid.parameters())


TIMM_LISTS = {
    "resnet": (["act1", "layer1", "layer2", "layer3"], ["layer1", "layer2", "layer3"]),
    "vit": (["blocks.0", "blocks.1"], ["blocks.0", "blocks.1"]),
    "convnext": (["stages.0", "stages.1"], ["stages.0", "stages.1"]),
    "xception": (["act2", "block2.rep.0", "block12.rep.0", "act4"], ["act2", "block2.rep.0", "block12.rep.0", "act4"]),
    "densenet": (["features.norm0", "features.denseblock1", "features.norm5"], ["features.denseblock1", "features.norm5"]),
    "vgg-like": (["stem.conv1", "blocks.0", "norm"], ["blocks.0", "norm"]),
}


@pytest.mark.parametrize("name", TIMM_LISTS)
def test_only_the_stem_is_left_out_of_timms_lists(name):
    listed, expected = TIMM_LISTS[name]
    model = nn.Module()
    model.timm_model = nn.Module()
    model.timm_model.feature_info = [{"module": path} for path in listed]
    for path in listed:
        parent = model.timm_model
        for part in path.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(path.split(".")[-1], nn.Conv2d(1, 1, 1))
    assert [path.removeprefix("timm_model.") for path, _ in _listed_by_timm(model)] == expected


def test_soft_targets_as_an_object_are_refused_for_several_labels(tmp_path):
    """The name becomes the binary form there; an object stays what it is."""
    batch = {**vision.batch(32), "labels": torch.ones(4, 3)}
    models = [vision.build("vit", scale, problem_type="multi_label_classification") for scale in (1, 2)]
    with pytest.raises(ValueError, match="compares one class a row, but the student is trained for multi_label"):
        run(*models, Rows(batch), arguments(tmp_path), objective=[Term(SoftTargetsLoss(2.0))])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("loss", ["hard_targets", "dist", "standardized_soft_targets", "decoupled", "margin_mse"])
def test_a_softmax_over_labels_that_do_not_exclude_each_other_is_refused(loss, problem, tmp_path):
    batch = vision.batch(32)
    batch["labels"] = torch.ones(4, 3)
    models = [vision.build("vit", scale, problem_type=problem) for scale in (1, 2)]
    with pytest.raises(ValueError, match=f"compares one class a row, but the student is trained for {problem}. Use soft_targets"):
        run(*models, Rows(batch), arguments(tmp_path), objective=[Term(loss)])


def test_an_objective_that_only_remembers_is_evaluated_by_its_task_loss(tmp_path):
    student, data = vision.build("vit", 1), Rows(vision.batch(32, rows=8))
    args = arguments(tmp_path, eval_with_teacher=True)
    crd = Term("crd", options={"dim": 4, "negatives": 3})
    trainer, _ = run(student, vision.build("vit", 2), data, args, objective=[crd])
    assert trainer.evaluate(data)["eval_loss"] > 0
    fading = Term("task", weight={"type": "linear", "start": 1.0, "end": 0.0})  # at the end of training only the memory is left
    trainer, _ = run(student, vision.build("vit", 2), data, args, objective=[fading, crd])
    assert trainer.evaluate(data)["eval_loss"] > 0


def test_temperatures_of_another_kind_keep_their_default(tmp_path):
    """The run's temperature is that of soft targets: cosines and memories have one of their own."""
    terms = [Term("soft_targets"), Term("decoupled"), Term("similarity_kl"), Term("dist")]
    student, teacher = vision.build("vit", 1), vision.build("vit", 2)
    trainer = DistillationTrainer(
        student, arguments(tmp_path, temperature=7.0), teacher=teacher, train_dataset=Rows(vision.batch(32)), objective=terms
    )
    described = {row["name"]: row.get("temperature") for row in trainer.objective.describe()}
    assert described["soft_targets"] == described["decoupled"] == 7.0
    assert trainer.objective.terms["similarity_kl"].loss.temperature == 0.1 and trainer.objective.terms["dist"].loss.temperature == 1.0
