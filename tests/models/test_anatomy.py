import families
import peft
import pytest
import torch
import transformers as tf
from torch import nn

from hfdistill.models.anatomy import find_blocks, hidden_size, problem_type_of, task_of, unwrap_peft, vocabulary_size


PATHS = {
    "bert": "bert.encoder.layer",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "albert": "albert.encoder.albert_layer_groups",
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


def test_every_family_is_covered():
    assert set(PATHS) == set(families.FAMILIES)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_blocks_of_head_and_base_models(family, depth):
    model = families.build(family, depth)
    blocks = find_blocks(model)
    assert (blocks.path, blocks.depth) == (PATHS[family], depth)
    assert blocks.shared == (family == "albert" and depth > 1)
    assert blocks.modules == list(model.get_submodule(blocks.path))
    base = find_blocks(model.base_model)
    assert base.path == PATHS[family].split(".", 1)[1] and base.modules == blocks.modules

    calls = []
    for module in set(blocks.modules):
        module.register_forward_hook(lambda *_: calls.append(1))
    model(**families.batch(family))
    assert len(calls) == depth


def test_albert_with_as_many_groups_as_blocks_shares_nothing():
    blocks = find_blocks(families.build("albert", 4, num_hidden_groups=4))
    assert (blocks.depth, len(blocks.modules), blocks.shared) == (4, 4, False)
    blocks = find_blocks(families.build("albert", 4, num_hidden_groups=2))
    assert (blocks.depth, len(blocks.modules), blocks.shared) == (4, 2, True)


def test_depth_is_not_confused_with_other_lists_of_that_length():
    model = families.build("bert", 2)
    model.extra = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_blocks(model).path == "bert.encoder.layer"


def test_stages_are_found_although_their_layers_make_a_longer_list():
    config = tf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 6], num_heads=[1, 1, 1], window_size=2)
    assert find_blocks(tf.SwinModel(config)).path == "encoder.layers"
    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 6, 1], layer_type="basic")
    blocks = find_blocks(tf.ResNetForImageClassification(config))
    assert (blocks.path, blocks.depth) == ("resnet.encoder.stages", 4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # read by PEFT itself
def test_peft_wrappers_are_seen_through():
    for family in ("bert", "llama"):
        inner = families.build(family, 3)
        target = "query" if family == "bert" else "q_proj"
        model = peft.get_peft_model(inner, peft.LoraConfig(task_type="SEQ_CLS", target_modules=[target]))
        blocks = find_blocks(model)
        assert blocks.path == f"base_model.model.{PATHS[family]}"
        assert blocks.modules == list(model.get_submodule(blocks.path)) and blocks.depth == 3
        assert unwrap_peft(model) is inner
        assert task_of(model) == "sequence" and hidden_size(model) == 32 and vocabulary_size(model) == families.VOCAB
        assert problem_type_of(model) == "single_label_classification"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2) for _ in range(5)])


class Unknown(nn.Module):
    def __init__(self, container, count):
        super().__init__()
        self.mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.body = nn.Module()
        blocks = [Block() for _ in range(count)]
        self.body.steps = container(blocks) if container is nn.ModuleList else container(*blocks)


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_unknown_modules_by_their_longest_outer_list(container):
    blocks = find_blocks(Unknown(container, 3))
    assert (blocks.path, blocks.depth, blocks.shared) == ("body.steps", 3, False)


def test_sequential_of_blocks_without_any_module_list():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
            self.body = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])

    assert find_blocks(Plain()).path == "body" and find_blocks(Plain()).depth == 4


def test_one_module_listed_several_times_is_shared():
    layer = nn.Linear(2, 2)
    blocks = find_blocks(nn.ModuleDict({"stack": nn.ModuleList([layer] * 4)}))
    assert (blocks.depth, blocks.shared) == (4, True)


def test_no_blocks_says_what_was_looked_for_and_what_to_do():
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    with pytest.raises(ValueError, match="No blocks found in ModuleDict.*nn.ModuleList.*Use terms on logits only"):
        find_blocks(model)


def test_widths_and_vocabularies():
    for family in families.FAMILIES:
        model = families.build(family, 1)
        assert hidden_size(model) == 32
        assert vocabulary_size(model) == (None if family in families.IMAGE_FAMILIES else families.VOCAB)
    resnet = tf.ResNetModel(tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]))
    assert hidden_size(resnet) == 8
    with pytest.raises(ValueError, match="Linear is not known.*config.hidden_size"):
        hidden_size(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "family, head, task",
    [
        *[(family, "SequenceClassification", "sequence") for family in families.FAMILIES if family not in families.IMAGE_FAMILIES],
        ("vit", "ImageClassification", "sequence"),
        ("deit", "ImageClassification", "sequence"),
        ("deit", "ImageClassificationWithTeacher", "other"),
        ("deit", "MaskedImageModeling", "other"),
        ("bert", "TokenClassification", "token"),
        ("gpt2", "TokenClassification", "token"),
        ("bert", "MaskedLM", "masked_lm"),
        ("modernbert", "MaskedLM", "masked_lm"),
        ("distilbert", "MaskedLM", "masked_lm"),
        ("llama", "CausalLM", "causal_lm"),
        ("qwen3", "CausalLM", "causal_lm"),
        ("roberta", "QuestionAnswering", "question_answering"),
        ("bert", "MultipleChoice", "other"),
    ],
)
def test_task_by_class(family, head, task):
    model = families.build(family, 1, head=head)
    assert task_of(model) == task
    assert task_of(model.base_model) == "other"


def test_task_of_own_classes():
    class Mine(tf.BertForTokenClassification):
        pass

    class BertForSequenceClassification(nn.Module):
        """Called like one of Transformers, but answers otherwise for all we know."""

    assert task_of(Mine(families.build("bert", 1).config)) == "token"
    assert task_of(BertForSequenceClassification()) == "other"
    tiny = tf.BartConfig(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1, vocab_size=9)
    assert task_of(tf.BartForConditionalGeneration(tiny)) == "other"
    assert task_of(tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))) == "causal_lm"


@pytest.mark.parametrize("dtype", [None, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("configured", [None, "regression"])
def test_problem_type_follows_transformers(configured, labels, dtype):
    model = families.build("bert", 1, num_labels=labels, problem_type=configured)
    target = torch.zeros(2, labels) if labels > 1 and (dtype or torch.int64).is_floating_point else torch.zeros(2)
    if configured is None and dtype not in (torch.bfloat16, None):
        # Transformers writes its decision into the config; ours must be the same one.
        reference = families.build("bert", 1, num_labels=labels)
        reference(input_ids=torch.ones(2, 3, dtype=torch.int64), labels=target.to(dtype))
        assert problem_type_of(model, dtype) == reference.config.problem_type
    expected = configured or ("regression" if labels == 1 else None)
    if expected is None:
        floating = dtype is not None and dtype.is_floating_point
        expected = "multi_label_classification" if floating else "single_label_classification"
    assert problem_type_of(model, dtype) == expected
    assert model.config.problem_type == configured
