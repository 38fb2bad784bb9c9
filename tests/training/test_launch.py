"""The launch configurations that come with the examples, read by accelerate's own parser."""

import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "examples" / "launch"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", DistributedType.MULTI_GPU), ("fsdp2", DistributedType.FSDP), ("deepspeed_zero2", DistributedType.DEEPSPEED)],
)
def test_accelerate_reads_the_launch_configurations(name, kind):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, 8, "bf16")
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "-m", "geneformer_hf", "pretrain"]))
    assert (arguments.module, arguments.training_script, arguments.training_script_args) == (True, "geneformer_hf", ["pretrain"])
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (name == "ddp", name == "fsdp2", name == "deepspeed_zero2")
    if name == "fsdp2":
        assert (str(arguments.fsdp_version), arguments.fsdp_transformer_layer_cls_to_wrap, arguments.fsdp_state_dict_type) == (
            "2",
            "BertLayer",
            "FULL_STATE_DICT",
        )
    if name == "deepspeed_zero2":
        assert str(arguments.zero_stage) == "2"


def test_every_configuration_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {"ddp", "fsdp2", "deepspeed_zero2"}
    assert all(yaml.safe_load(path.read_text())["num_machines"] == 1 for path in FOLDER.glob("*.yaml"))


def test_the_script_for_several_nodes_is_sound():
    assert subprocess.run(["bash", "-n", str(FOLDER / "torchrun_nodes.sh")], check=False).returncode == 0
