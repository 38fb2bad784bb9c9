"""Settings from Python, YAML and the command line; recipes; what contradicts itself."""

from functools import partial
from pathlib import Path

import pytest

from geneformer_hf import GeneformerConfig, GeneformerPretrainingArguments
from geneformer_hf.errors import SettingError
from geneformer_hf.training import arguments as arguments_module
from geneformer_hf.training import configs
from geneformer_hf.training.configs import resolved, write_config

parse_arguments = partial(configs.parse_arguments, GeneformerPretrainingArguments)
read_config = partial(configs.read_config, kind=GeneformerPretrainingArguments)
recipe_names = partial(configs.recipe_names, GeneformerPretrainingArguments)
describe_settings = partial(configs.describe_settings, GeneformerPretrainingArguments)

BASE = {"output_dir": "out", "shape": "gf-6L-30M-i2048", "tokenizer": "t", "train_data": ["tokens"]}


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: out\nlearning_rate: 1e-3\nseed: 5\nlr_scheduler_type: cosine\nshape_overrides: {hidden_size: 64}\n")
    arguments = parse_arguments(read_config(tmp_path / "run.yaml"), ["--seed", "9", "--shape", "gf-6L-30M-i2048", "--train_data", "a", "b"])
    assert (arguments.seed, arguments.learning_rate, str(arguments.lr_scheduler_type.value), arguments.weight_decay) == (9, 1e-3, "cosine", 0.0)
    assert arguments.train_data == ["a", "b"]
    assert arguments.shape_overrides == {"hidden_size": 64}


def test_what_is_written_is_read_back(tmp_path):
    given = BASE | {"learning_rate": 3e-4, "bf16": True, "warmup_steps": 0.1, "train_weights": [1.0], "shape_overrides": {"hidden_size": 64}, "max_tokens_per_batch": 999,
                    "report_to": ["tensorboard"], "save_total_limit": 7, "eval_strategy": "steps", "eval_steps": 5, "use_cpu": True}  # fmt: skip
    arguments = parse_arguments(given)
    write_config(arguments, tmp_path / "run.yaml")
    again = parse_arguments(read_config(tmp_path / "run.yaml"))
    assert again.to_dict() == arguments.to_dict()
    assert {name: resolved(arguments)[name] for name in given} == given


def test_what_is_off_or_zero_is_written_too():
    settings = resolved(parse_arguments(BASE | {"batch_layout": "padded", "group_by_length": False, "data_seed": 0}))
    assert (settings["group_by_length"], settings["data_seed"]) == (False, 0)


def test_what_is_for_one_call_alone_is_not_written():
    assert set(resolved(parse_arguments(BASE | {"overwrite": True, "resume_from_checkpoint": True}))) == set(BASE)


@pytest.mark.parametrize("given", ['{"hidden_size": 32}', "{hidden_size: 32}"])
def test_overrides_may_be_json_or_yaml(given):
    assert parse_arguments(BASE, ["--shape_overrides", given]).shape_overrides == {"hidden_size": 32}


def test_one_dataset_needs_no_list():
    assert parse_arguments(BASE | {"train_data": "/abs/path", "eval_data": "other"}).train_data == ["/abs/path"]
    assert GeneformerPretrainingArguments(output_dir="o", train_data="/abs/path").train_data == ["/abs/path"]


def test_secrets_and_the_machine_are_not_written(tmp_path):
    settings = resolved(parse_arguments(BASE | {"hub_token": "secret"}))
    assert set(settings) == set(BASE)


def test_datasets_with_names_and_weights(tmp_path):
    (tmp_path / "run.yaml").write_text("train_data:\n- {path: /a, name: new, weight: 0.9}\n- {path: /b, name: old, weight: 0.1}\n")
    assert read_config(tmp_path / "run.yaml") == {"train_data": ["/a", "/b"], "train_names": ["new", "old"], "train_weights": [0.9, 0.1]}


@pytest.mark.parametrize("name", ["geneformer-v1-10m", "geneformer-v2-104m", "continual-cancer", "laptop"])
def test_recipes_parse_and_name_their_sources(name):
    assert name in recipe_names()
    settings = read_config(name)
    start = {"from_checkpoint": "m"} if "shape" not in settings else {}
    data = ["new", "old"] if "train_weights" in settings else ["tokens"]
    arguments = parse_arguments(settings | start | {"output_dir": "out", "train_data": data})
    assert arguments.seed == 42
    assert (Path(arguments_module.__file__).parent / "recipes" / "pretrain" / f"{name}.yaml").read_text().startswith("# ")


def test_the_recipes_have_the_published_hyperparameters():
    v1, v2 = (parse_arguments(read_config(name) | {"output_dir": "o"}) for name in ("geneformer-v1-10m", "geneformer-v2-104m"))
    assert (v1.learning_rate, v1.warmup_steps, v1.num_train_epochs, v1.weight_decay, v1.lr_scheduler_type.value) == (1e-3, 10_000, 3, 0.001, "linear")
    assert v1.per_device_train_batch_size * v1.gradient_accumulation_steps == 144
    assert (v2.learning_rate, v2.warmup_steps, v2.num_train_epochs, v2.lr_scheduler_type.value) == (2e-4, 0.007, 3, "cosine")
    assert v2.per_device_train_batch_size * v2.gradient_accumulation_steps == 18 * 13
    assert GeneformerConfig.from_preset(v1.shape).attention_probs_dropout_prob == 0.02
    assert GeneformerConfig.from_preset(v2.shape).attention_probs_dropout_prob == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", r"unknown setting learning_rte \(did you mean 'learning_rate'\?\)"),
        ("a: b: c", "is not valid YAML: mapping values are not allowed here"),
        ("- 1", "holds a list; expected lines of `name: value`"),
        ("train_data: [{path: a, name: x}, {path: b}]", "1 of 2 datasets have a name; give all of them one, or none"),
        ("train_data: [{pth: a}]", "train_data is a list of paths, or of"),
        ("train_data: [{path: a, weight: 1}]\ntrain_weights: [1]", "names and weights are given twice"),
    ],
)
def test_yaml_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SettingError, match=message):
        read_config(tmp_path / "run.yaml")


def test_a_config_that_is_not_there_lists_the_recipes():
    with pytest.raises(
        SettingError, match=r"geneformer-v1-10 does not exist, and is not one of the recipes continual-cancer, .*\(did you mean 'geneformer-v1-10m'\?\)"
    ):
        read_config("geneformer-v1-10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"from_checkpoint": "m"}, "shape makes a new model and from_checkpoint goes on from one; give one of them"),
        ({"shape": None, "shape_overrides": {"hidden_size": 8}}, "shape_overrides changes a new model; give shape as well"),
        ({"shape": "gf-6L-30M-i204"}, r"shape 'gf-6L-30M-i204' is not one of .*\(did you mean 'gf-6L-30M-i2048'\?\)"),
        ({"batch_layout": "flat"}, "batch_layout 'flat' is not one of auto, padded, packed"),
        ({"group_by_length": True}, "group_by_length is for batch_layout 'padded'"),
        ({"group_by_length": False, "max_tokens_per_batch": 100, "batch_layout": "padded"}, "always grouped by length"),
        ({"held_out": -1}, r"held_out is -1"),
        ({"held_out": 1.5}, r"held_out is 1\.5; expected a share below 1, or a whole number"),
        ({"seed": 1.5}, r"--seed: invalid int value: '1\.5'"),
        ({"seed": 5_000_000_000}, "expected less than 2"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected a whole number above 0"),
        ({"per_device_eval_batch_size": 0, "max_steps": 0}, "per_device_eval_batch_size is 0; .*max_steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"mask_share": float("nan")}, "mask_share is nan"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"train_weights": ["a"]}, "train-weights: invalid float value: 'a'"),
        ({"train_data": [None]}, "None stands in a list"),
        ({"shape_overrides": "hidden_size=32"}, "expected names and values, as --shape_overrides"),
        ({"ignore_data_skip": True}, "ignore_data_skip would show the same cells again"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha scales noise by the length of a row"),
        ({"push_to_hub": True}, "push_to_hub would publish checkpoints"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "this lr_scheduler_type follows evaluations"),
        ({"save_strategy": "best"}, "save_strategy 'best' needs metric_for_best_model"),
        ({"metric_for_best_model": "foo"}, "metric_for_best_model 'foo' is not one of loss"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers needs"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size would change the batch size of the recipe"),
        ({"remove_unused_columns": True}, "remove_unused_columns would remove the keys of cells"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor needs all logits"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be on"),
        ({"train_sampling_strategy": "group_by_length"}, "use batch_layout and group_by_length"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last is not needed"),
        ({"save_only_model": True}, "leaves out what resuming needs"),
        ({"mask_share": 0.95, "random_share": 0.1}, r"mask_share is 0\.95 and random_share 0\.1"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
        ({"eval_strategy": "often"}, "often is not a valid IntervalStrategy"),
    ],
)
def test_settings_that_contradict_each_other(change, message):
    with pytest.raises(SettingError, match=message):
        parse_arguments(BASE | change)


def test_several_contradictions_are_told_at_once():
    with pytest.raises(SettingError, match=r"auto_find_batch_size .*; remove_unused_columns"):
        GeneformerPretrainingArguments(output_dir="o", auto_find_batch_size=True, remove_unused_columns=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rte", "3"], r"command line: unknown setting learning_rte \(did you mean 'learning_rate'\?\)"),
        (["--seed", "many"], "--seed: invalid int value: 'many'"),
        (["stray"], "cannot make sense of stray"),
    ],
)
def test_options_that_cannot_be_used(argv, message):
    with pytest.raises(SettingError, match=message):
        parse_arguments(BASE, argv)


def test_every_setting_of_ours_is_described():
    ours, everything = describe_settings(), describe_settings(inherited=True)
    assert "--mask_probability" in ours
    assert "--adam_beta1" not in ours
    assert "--adam_beta1" in everything
