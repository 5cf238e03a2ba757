import copy
import json
import logging
import random

import families
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from torch import nn

from hfdistill.models.student import CopyReport, build_student, copy_weights


# Where the blocks of each family lie, written down here and not asked of the code under test.
BLOCKS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "mpnet": "mpnet.encoder.layer",
    "deberta_v2": "deberta.encoder.layer",
    "modernbert": "model.layers",
    "xlm_roberta": "roberta.encoder.layer",
    "camembert": "roberta.encoder.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "vit": "vit.layers",
    "deit": "deit.layers",
}


def logits(model, family, **options):
    with torch.no_grad():
        return model(**families.batch(family, **options)).logits


def scattered(family, layers, seed=0, **options):
    """A model without a single weight at its default: zero biases and unit norms would hide what was not copied."""
    model = families.build(family, layers, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def reload(model, folder):
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again


@pytest.mark.parametrize("family", families.FAMILIES)
def test_full_student_answers_as_the_teacher(family):
    teacher = scattered(family, 4)
    student = build_student(teacher, seed=7)
    assert type(student) is type(teacher) and not student.training
    assert torch.equal(logits(student, family), logits(teacher, family))
    count = sum(p.numel() for p in teacher.parameters())
    assert student.copy_report == CopyReport(count, 0, 0, [], [0, 1, 2, 3])
    assert student.config.distilled_from["width"] == "same"


@pytest.mark.parametrize("family", BLOCKS)
def test_each_block_comes_from_its_teacher_block(family):
    teacher = scattered(family, 4)
    student = build_student(teacher, 2, layer_map="0:0,1:2", seed=7)
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    ours, theirs = (list(model.get_submodule(BLOCKS[family])) for model in (student, teacher))
    assert len(ours) == 2
    for block, source in ((0, 0), (1, 2)):
        expected = theirs[source].state_dict()
        assert ours[block].state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours[block].state_dict().items())
        assert not {p.data_ptr() for p in ours[block].parameters()} & {p.data_ptr() for p in theirs[source].parameters()}
    outside = {name: p for name, p in teacher.state_dict().items() if not name.startswith(BLOCKS[family])}
    assert outside and all(torch.equal(student.state_dict()[name], p) for name, p in outside.items())
    assert student.copy_report.random == 0 and student.copy_report.layers == [0, 2]
    indices = [module.layer_idx for module in student.modules() if hasattr(module, "layer_idx")]
    assert indices == sorted(indices) and set(indices) <= {0, 1}


def test_shallow_student_equals_the_teacher_with_the_other_blocks_taken_out():
    for family in ("bert", "gpt2", "llama", "deberta_v2", "vit"):
        teacher = scattered(family, 4)
        student = build_student(teacher, 2, layer_map="last")
        pruned = copy.deepcopy(teacher)
        blocks = pruned.get_submodule(BLOCKS[family])
        del blocks[0], blocks[0]
        pruned.config.num_hidden_layers, pruned.config.use_cache = 2, False  # the cache goes by layer_idx
        assert torch.allclose(logits(student, family), logits(pruned, family), atol=1e-6)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_student_survives_saving_and_loading(family, tmp_path):
    teacher = families.build(family, 4)
    teacher.config._name_or_path = "org/teacher"
    student = build_student(teacher, 2)
    again = reload(student, tmp_path)
    assert torch.equal(logits(again, family), logits(student, family))
    assert again.config.distilled_from == {"name_or_path": "org/teacher", "layers": [1, 3], "width": "same"}
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["distilled_from"]["layers"] == [1, 3]
    assert again.config.num_hidden_layers == 2 and again.config.id2label == teacher.config.id2label
    auto = tf.AutoModelForImageClassification if family in families.IMAGE_FAMILIES else tf.AutoModelForSequenceClassification
    assert type(auto.from_pretrained(tmp_path)) is type(teacher)
    assert copy.deepcopy(student).copy_report == student.copy_report


GPT2 = dict(n_embd=32, n_head=4, n_inner=48, n_positions=40, vocab_size=64, bos_token_id=1, eos_token_id=2)
HEADS = {
    "bert": lambda: families.build("bert", 4, head="MaskedLM"),
    "albert": lambda: families.build("albert", 4, head="MaskedLM"),
    "electra": lambda: families.build("electra", 4, head="MaskedLM"),
    "distilbert": lambda: families.build("distilbert", 4, head="MaskedLM"),
    "modernbert": lambda: families.build("modernbert", 4, head="MaskedLM"),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=4, **GPT2)).eval(),
    "llama": lambda: families.build("llama", 4, head="CausalLM", tie_word_embeddings=True),
    "llama untied": lambda: families.build("llama", 4, head="CausalLM"),
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_language_model_heads_stay_tied(name, narrow, tmp_path):
    teacher, family = HEADS[name](), name.split()[0]
    width = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24) if narrow else {}
    student = build_student(teacher, 2, width="norm", **width)
    tied = teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight
    assert tied == (name != "llama untied")
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) == tied
    report = student.copy_report
    assert report.copied + report.sliced == sum(p.numel() for p in student.parameters()) and report.random == 0
    again = reload(student, tmp_path)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    inputs = families.batch(family, labels=False)
    assert torch.equal(again(**inputs).logits, student(**inputs).logits)
    if not narrow:
        full = build_student(teacher)
        assert torch.equal(full(**inputs).logits, teacher(**inputs).logits)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering", "MultipleChoice", "ForPreTraining"])
def test_other_heads_are_copied_too(head):
    teacher = families.build("bert", 4, head=head.removeprefix("For"))
    student = build_student(teacher, 2, hidden_size=16)
    assert student.copy_report.random == 0 and type(student) is type(teacher)


def test_bare_models():
    for family, cls in (("bert", tf.BertModel), ("llama", tf.LlamaModel), ("vit", tf.ViTModel)):
        teacher = cls(families.build(family, 4).config)
        student = build_student(teacher, 2)
        assert type(student) is type(teacher) and student.copy_report.random == 0


def test_albert_runs_its_shared_block_less_often():
    teacher = scattered("albert", 4)
    student = build_student(teacher, 2)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in teacher.state_dict().items())
    shorter = copy.deepcopy(teacher)
    shorter.config.num_hidden_layers = 2
    assert torch.equal(logits(student, "albert"), logits(shorter, "albert"))
    assert student.copy_report.layers == [1, 3]


def test_albert_groups():
    path = "albert.encoder.albert_layer_groups"
    teacher = scattered("albert", 4, num_hidden_groups=4)
    student = build_student(teacher, 2, layer_map="0:1,1:2")
    for k, t in ((0, 1), (1, 2)):
        expected = teacher.get_submodule(f"{path}.{t}").state_dict()
        assert all(torch.equal(v, expected[n]) for n, v in student.get_submodule(f"{path}.{k}").state_dict().items())
    assert student.config.num_hidden_groups == 2
    logits(student, "albert")
    two = scattered("albert", 4, num_hidden_groups=2)
    assert build_student(two, 2).config.num_hidden_groups == 2
    assert build_student(two, 1).config.num_hidden_groups == 1


def test_teacher_is_left_as_it_was():
    teacher = families.build("qwen3", 4).train()
    config, state = teacher.config.to_dict(), {name: value.clone() for name, value in teacher.state_dict().items()}
    student = build_student(teacher, 2, hidden_size=16, num_attention_heads=2)
    assert teacher.config.to_dict() == config and teacher.training
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())


def test_random_weights_follow_the_seed_and_no_global_generator_moves():
    teacher = families.build("bert", 4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    one, two, other = (build_student(teacher, 2, copy_weights=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], teacher.state_dict()[weight])
    assert one.config.distilled_from["layers"] is None
    report = one.copy_report
    assert (report.copied, report.sliced, report.random) == (0, 0, sum(p.numel() for p in one.parameters()))


def test_random_student_may_be_larger():
    student = build_student(families.build("bert", 2), 3, hidden_size=64, copy_weights=False)
    assert student.config.num_hidden_layers == 3 and student.bert.pooler.dense.weight.shape == (64, 64)


def test_dtype_and_gradients():
    teacher = scattered("llama", 4).to(torch.bfloat16).requires_grad_(False)
    student = build_student(teacher, 2)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in student.parameters())
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight)
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32, "rounded frequencies would not be those of the reloaded student"
    assert build_student(scattered("bert", 2).double(), 1).dtype == torch.float64


def test_per_block_kinds_of_attention_follow_the_map(tmp_path):
    teacher = families.build("qwen3", 4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert teacher.config.layer_types == kinds
    student = build_student(teacher, 2, layer_map="0:0,1:3")
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.sliding_window for layer in student.model.layers] == [None, 4]
    assert reload(student, tmp_path).config.layer_types == student.config.layer_types
    assert build_student(teacher, 2, layer_types=["full_attention"] * 2).config.layer_types == ["full_attention"] * 2


def test_modernbert_pattern_stays_true_or_goes(tmp_path):
    teacher = families.build("modernbert", 6, global_attn_every_n_layers=3)
    full, local = "full_attention", "sliding_attention"
    assert teacher.config.layer_types == [full, local, local] * 2
    for layer_map, kinds, every in (
        ("0:0,1:1,2:2", [full, local, local], 3),
        ("0:0,1:3", [full, full], 1),
        ("0:0,1:1,2:3", [full, local, full], 2),
        ("uniform", [local, local], None),
    ):
        student = build_student(teacher, len(kinds), layer_map=layer_map)
        assert student.config.layer_types == kinds
        assert getattr(student.config, "global_attn_every_n_layers", None) == every
    assert reload(student, tmp_path).config.layer_types == [local, local]


def test_modernbert_first_block_has_no_norm():
    teacher = scattered("modernbert", 4)
    swapped = build_student(teacher, 2, layer_map="0:2,1:0")
    name = "model.layers.1.attn_norm.weight"
    assert swapped.copy_report.names_random == [name] and swapped.copy_report.random == 32
    assert torch.equal(swapped.state_dict()[name], torch.ones(32)), "a norm without a source stays as initialised"
    assert swapped.copy_report.unused == ["model.layers.2.attn_norm.weight"]
    assert "1 at random" not in str(swapped.copy_report) and name in str(swapped.copy_report)


def test_similar_takes_the_blocks_that_represent_the_teacher():
    # Blocks 1, 2 and 4 are made to do nothing, so the states of 0-2 and of 3-4 are the same: two groups.
    teacher = scattered("bert", 5, seed=3)
    with torch.no_grad():
        for block in (teacher.bert.encoder.layer[k] for k in (1, 2, 4)):
            for part in (block.attention.output, block.output):
                part.dense.weight.zero_(), part.dense.bias.zero_()
                part.LayerNorm.weight.fill_(1.0), part.LayerNorm.bias.zero_()
        for k in (0, 3):
            teacher.bert.encoder.layer[k].output.LayerNorm.weight.fill_(1.0), teacher.bert.encoder.layer[k].output.LayerNorm.bias.zero_()
            for part in (teacher.bert.encoder.layer[k].attention.output, teacher.bert.encoder.layer[k].output):
                part.dense.weight.mul_(5.0)
    batch = families.batch("bert", rows=12)
    teacher.train()
    student = build_student(teacher, 2, layer_map="similar", calibration_batch=batch)
    assert teacher.training
    layers = student.config.distilled_from["layers"]
    assert layers[0] in (0, 1, 2) and layers[1] in (3, 4)
    # What padding holds must not matter.
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)}
    assert build_student(teacher, 2, layer_map="similar", calibration_batch=other).config.distilled_from["layers"] == layers
    for family in ("albert", "vit", "gpt2"):
        small = build_student(families.build(family, 4), 2, layer_map="similar", calibration_batch=families.batch(family))
        assert len(small.config.distilled_from["layers"]) == 2


def test_similar_reads_the_outputs_of_the_blocks():
    from hfdistill.models.similarity import representative_blocks

    for family in ("bert", "vit", "albert"):
        teacher = scattered(family, 6)
        batch = families.batch(family, rows=6)
        states = teacher(**batch, output_hidden_states=True).hidden_states[1:]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(states[0].shape[:2], dtype=torch.bool)
        expected = representative_blocks([state[mask] for state in states], 3)
        assert build_student(teacher, 3, layer_map="similar", calibration_batch=batch).config.distilled_from["layers"] == expected


def test_random_map_follows_the_seed():
    teacher = families.build("bert", 8)
    maps = [build_student(teacher, 3, layer_map="random", seed=seed).config.distilled_from["layers"] for seed in (0, 0, 1, 2, 3)]
    assert maps[0] == maps[1] and len({tuple(m) for m in maps}) > 1


def test_deeper_student_by_explicit_pairs():
    student = build_student(families.build("bert", 2), 4, layer_map="0:0,1:0,2:1,3:1")
    assert student.copy_report.layers == [0, 0, 1, 1] and student.copy_report.random == 0


def test_config_records_no_local_path(tmp_path):
    teacher = families.build("bert", 2)
    for name, recorded in (("/models/private/my-teacher/", "my-teacher"), ("org/name", "org/name"), ("", "")):
        teacher.config._name_or_path = name
        student = build_student(teacher, 1)
        assert student.config.distilled_from["name_or_path"] == recorded
        assert student.config._name_or_path == "", "the student was not loaded from there"
        student.save_pretrained(tmp_path)
        assert "/models" not in (tmp_path / "config.json").read_text()


def test_overrides_and_native_names():
    student = build_student(families.build("gpt2", 4), n_layer=2, n_inner=24, resid_pdrop=0.3)
    assert (student.config.n_layer, student.config.n_inner, student.config.resid_pdrop) == (2, 24, 0.3)
    assert student.copy_report.layers == [1, 3]
    student = build_student(families.build("distilbert", 4), n_layers=2, hidden_dim=24)
    assert student.config.distilled_from["width"] == "slice"
    more = build_student(families.build("bert", 4), 2, num_labels=5)
    assert more.copy_report.names_random == ["classifier.weight", "classifier.bias"] and more.copy_report.random == 5 * 33


def test_report_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="hfdistill"):
        student = build_student(families.build("bert", 4), 2)
    assert f"{student.num_parameters():,} parameters copied, 0 cut" in caplog.text and "[1, 3]" in caplog.text


def test_generation_settings_are_kept():
    teacher = HEADS["gpt2"]()
    teacher.generation_config.max_new_tokens = 17
    student = build_student(teacher, 2)
    assert student.generation_config.max_new_tokens == 17 and student.generation_config is not teacher.generation_config


def test_copy_weights_between_different_heads(tmp_path):
    teacher = scattered("bert", 4, head="MaskedLM")
    student = families.build("bert", 2, seed=5)
    classifier = student.classifier.weight.clone()
    report = copy_weights(student, teacher, "first")
    assert torch.equal(student.bert.encoder.layer[1].output.dense.weight, teacher.bert.encoder.layer[1].output.dense.weight)
    assert torch.equal(student.classifier.weight, classifier)
    assert report.names_random == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert "cls.predictions.transform.dense.weight" in report.unused
    bare = families.build("bert", 2, seed=6).base_model
    assert copy_weights(bare, teacher).layers == [1, 3]
    assert torch.equal(bare.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)


def test_copy_weights_copies_saved_buffers_of_plain_modules():
    def model(blocks):
        return nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(blocks)])

    teacher, student = model(4), model(2)
    for block in teacher:
        nn.init.normal_(block.weight), block.running_mean.normal_()
    report = copy_weights(student, teacher)
    assert report.layers == [1, 3] and report.copied == 12
    assert torch.equal(student[0].running_mean, teacher[1].running_mean) and torch.equal(student[1].weight, teacher[3].weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_hidden_layers=2, layer_map="skip"), "'skip' gives 0 teacher blocks to student block 1.*use this map for the losses"),
        (dict(num_hidden_layers=2, layer_map="0:0,0:1,1:2"), "gives 2 teacher blocks to student block 0"),
        (dict(num_hidden_layers=2, layer_map="1:2"), "gives 0 teacher blocks to student block 0"),
        (dict(num_hidden_layers=2, layer_map="original"), "cannot build one. Use 'uniform'"),
        (dict(num_hidden_layers=2, layer_map="similar"), "build_student takes calibration_batch"),
        (dict(num_hidden_layers=5), "student has 5 blocks and the teacher 4"),
        (dict(num_hidden_layers=2, layer_map="0:0,1:4"), "teacher block 4, but the teacher has 4 blocks"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be a positive integer, got 0"),
        (dict(hidden_size=16.0), "hidden_size must be a positive integer, got 16.0"),
        (dict(num_attention_heads=True), "num_attention_heads must be a positive integer, got True"),
        (
            dict(hidden_size=18),
            r"hidden_size=18 cannot be divided among num_attention_heads=4. Choose num_attention_heads from \[1, 2, 3\]",
        ),
        (dict(hidden_size=64), "hidden_size 64 exceeds the teacher's 32.*copy_weights=False"),
        (dict(intermediate_size=96), "intermediate_size 96 exceeds the teacher's 48"),
        (dict(num_attention_heads=8), "heads 8 exceeds the teacher's 4"),
        (dict(num_attention_heads=2), "head_dim 16 exceeds the teacher's 8.*smaller hidden_size"),
        (dict(num_key_value_heads=2), "BertConfig has no num_key_value_heads"),
        (dict(width="slcie"), "Unknown width 'slcie'. Did you mean 'slice'"),
        (dict(intermedaite_size=3), "BertConfig has no entry 'intermedaite_size'.*Did you mean 'intermediate_size'"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_student(families.build("bert", 4), **arguments)


def test_bad_grouped_heads():
    teacher = families.build("llama", 2)
    with pytest.raises(ValueError, match=r"num_attention_heads=4 cannot be divided among num_key_value_heads=3.*\[1, 2, 4\]"):
        build_student(teacher, num_key_value_heads=3)
    with pytest.raises(ValueError, match="4 query heads for each key-value head and the teacher 2"):
        build_student(teacher, num_key_value_heads=1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by PEFT itself
def test_bad_teachers():
    with pytest.raises(ValueError, match=r"takes a loaded model, got 'org/teacher'.*AutoModelForSequenceClassification.from_pretrained"):
        build_student("org/teacher", 2)
    with pytest.raises(ValueError, match="takes a PreTrainedModel, got Linear"):
        build_student(nn.Linear(2, 2), 2)
    for wrapped in (
        peft.get_peft_model(families.build("bert", 2), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])),
        families.build("bert", 2),
    ):
        if not isinstance(wrapped, peft.PeftModel):
            wrapped.add_adapter(peft.LoraConfig(target_modules=["query"]))
        with pytest.raises(ValueError, match="PEFT adapters.*merge_and_unload"):
            build_student(wrapped, 1)
        with pytest.raises(ValueError, match="merge_and_unload"):
            copy_weights(families.build("bert", 1), wrapped)
    tiny = tf.BartConfig(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1, vocab_size=9)
    with pytest.raises(ValueError, match="made of several models"):
        build_student(tf.BartModel(tiny), 1)


def test_copy_weights_refuses_strangers():
    with pytest.raises(ValueError, match="No weight of DistilBertForSequenceClassification.*of one architecture"):
        copy_weights(families.build("distilbert", 1, dim=16), nn.ModuleDict({"x": nn.ModuleList([nn.Linear(2, 2)] * 2)}))
    with pytest.raises(ValueError, match="hidden_size 32 exceeds the teacher's 16"):
        copy_weights(families.build("bert", 1), families.build("bert", 1, hidden_size=16))
    with pytest.raises(ValueError, match="Unknown width"):
        copy_weights(families.build("bert", 1), families.build("bert", 2), width="best")


def test_depth_that_the_architecture_does_not_take_from_num_hidden_layers():
    config = tf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=2)
    with pytest.raises(ValueError, match="num_hidden_layers=2 was asked for, but SwinModel built 3 blocks"):
        build_student(tf.SwinModel(config), 2, layer_map="first")
