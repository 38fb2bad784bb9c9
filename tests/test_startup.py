"""Quick to answer: what is imported for help, the version and a misspelt command; and that the Auto classes know us in any order of imports."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest

from geneformer_hf.cli.main import COMMANDS, main
from geneformer_hf.cli.parser import Parser

HEAVY = ("torch", "transformers", "numpy", "pandas", "anndata", "scipy", "datasets", "h5py", "yaml", "peft")


def run_fresh(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


QUICK = {
    "the_import": "import geneformer_hf",
    "help": "from geneformer_hf.cli.main import main; main(['--help'])",
    "help_of_a_command": "from geneformer_hf.cli.main import main; main(['embed', '--help'])",
    "version": "from geneformer_hf.cli.main import main; main(['--version'])",
    "misspelt_command": "from geneformer_hf.cli.main import main; main(['tokenise'])",
    "misspelt_option": "from geneformer_hf.cli.main import main; main(['embed', '--modle', 'x'])",
}


@pytest.mark.parametrize("name", QUICK)
def test_nothing_heavy_is_imported_for_a_quick_answer(name):
    code = f"import sys, contextlib, io\nwith contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n    {QUICK[name]}\nprint([m for m in {HEAVY} if m in sys.modules])"
    assert run_fresh(code) == "[]"


SHAPE = "num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8"
MODEL = f"from transformers import AutoConfig, AutoModel; print(type(AutoModel.from_config(AutoConfig.for_model('geneformer', {SHAPE}))).__name__)"
TOKENIZER = (
    "from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING as T; from geneformer_hf import GeneformerConfig as C; print(T[C].__name__)"
)
PIPELINE = "from transformers.pipelines import PIPELINE_REGISTRY as P; print('cell-embedding' in P.supported_tasks)"
ORDERS = {
    "ours_first": (f"import geneformer_hf; {MODEL}", "GeneformerModel"),
    "transformers_first": (f"from transformers import AutoModel; import geneformer_hf; {MODEL}", "GeneformerModel"),
    "transformers_first_and_empty": (f"import transformers; import geneformer_hf; {MODEL}", "GeneformerModel"),
    "another_model_between": (f"import geneformer_hf; from transformers import BertModel, Trainer; {MODEL}", "GeneformerModel"),
    "peft_first": (f"import peft; import geneformer_hf; {MODEL}", "GeneformerModel"),
    "peft_second": (f"import geneformer_hf, peft; {MODEL}", "GeneformerModel"),
    "a_class_of_ours_first": (f"from geneformer_hf import GeneformerForMaskedLM; {MODEL}", "GeneformerModel"),
    "a_module_of_ours_first": (f"import geneformer_hf.training.arguments; {MODEL}", "GeneformerModel"),
    "the_tokenizer": (f"from geneformer_hf import GeneformerTokenizer; {TOKENIZER}", "GeneformerTokenizer"),
    "the_tokenizer_of_transformers_first": (f"from transformers import AutoTokenizer; {TOKENIZER}", "GeneformerTokenizer"),
    "pipelines_second": (f"import geneformer_hf; {PIPELINE}", "True"),
    "pipelines_first": (f"from transformers import pipeline; import geneformer_hf; {PIPELINE}", "True"),
    "in_a_thread": (
        f"import threading, geneformer_hf\nt = threading.Thread(target=lambda: __import__('transformers.models.auto.modeling_auto'))\nt.start(); t.join()\n{MODEL}",
        "GeneformerModel",
    ),
}


QUICK_ORDERS = ("ours_first", "transformers_first", "pipelines_second")
"""Of the others, each takes some seconds as well."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK_ORDERS else pytest.mark.slow) for name in ORDERS])
def test_both_orders_of_the_imports_register(name):
    code, expected = ORDERS[name]
    assert run_fresh(code).splitlines()[-1] == expected


@pytest.mark.slow
def test_the_finder_goes_when_all_is_registered():
    code = "import geneformer_hf, sys; from geneformer_hf.registration import _AfterImport as A; from transformers import AutoModel, AutoTokenizer, pipeline; import peft; print([f for f in sys.meta_path if isinstance(f, A)])"
    assert run_fresh(code) == "[]"


def test_a_process_that_unpickles_needs_no_import_of_ours(model, tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = f"import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb')); print(type(model).__name__); {MODEL}"
    assert run_fresh(code, str(tmp_path / "model.pkl")).split() == ["GeneformerForMaskedLM", "GeneformerModel"]


def test_checkpoints_open_through_the_auto_classes_in_a_fresh_process(model_folder):
    code = "import geneformer_hf, json, sys; from transformers import AutoModel, AutoTokenizer; print(json.dumps([type(c.from_pretrained(sys.argv[1])).__name__ for c in (AutoModel, AutoTokenizer)]))"
    assert json.loads(run_fresh(code, str(model_folder)).splitlines()[-1]) == ["GeneformerModel", "GeneformerTokenizer"]


WRONG_WORDS = {
    "command": (["tokenise"], "unknown command 'tokenise'. Did you mean tokenize? Commands: demo, info"),
    "command_like_nothing": (["xyzzy"], "unknown command 'xyzzy'. Commands: demo, info"),
    "option_before_the_command": (["--versoin"], "unknown option --versoin. Did you mean --version?"),
    "option_before_what_is_missing": (["embed", "--modle", "x"], "unknown option --modle. Did you mean --model?"),
    "option_with_its_value": (["embed", "x", "--modle=x"], "unknown option --modle. Did you mean --model?"),
    "abbreviation": (["embed", "x", "--mod", "m", "--output", "o"], "unknown option --mod. Did you mean --model?"),
    "short_option": (["embed", "-x"], "unknown option -x."),
    "choice": (["perturb", "x", "--model", "m", "--output", "o", "--kind", "delte"], "invalid choice: 'delte'"),
    "missing": (["embed"], "the following arguments are required: input, --model, --output"),
}


@pytest.mark.parametrize("name", WRONG_WORDS)
def test_what_is_misspelt_is_named_with_what_was_meant(name, capsys):
    words, message = WRONG_WORDS[name]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_misspelt_choice_is_proposed(capsys):
    with pytest.raises(SystemExit):
        main(["perturb", "x", "--model", "m", "--output", "o", "--kind", "delte"])
    assert "Did you mean delete?" in capsys.readouterr().err


def test_negative_numbers_are_values(capsys):
    assert main(["embed", "nothing.h5ad", "--model", "nothing", "--output", "o.h5ad", "--layer", "-2"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_every_command_has_our_parser():
    from geneformer_hf.cli.main import _build

    parser, commands = _build()
    assert [*commands] == [command.name for command in COMMANDS]
    assert all(isinstance(one, Parser) and not one.allow_abbrev for one in (parser, *commands.values()))


def test_every_option_in_the_help_is_known():
    from geneformer_hf.cli.main import _build

    for name, parser in _build()[1].items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", parser.format_usage()))
        assert named
        assert named <= parser.options, name


def test_presets_and_names_of_python_are_proposed(capsys):
    import geneformer_hf
    from geneformer_hf import GeneformerConfig

    with pytest.raises(AttributeError, match=r"has no attribute 'embed_cell'\. Did you mean embed_cells\?"):
        geneformer_hf.embed_cell  # noqa: B018
    with pytest.raises(ValueError, match=r"'gf-12L-30M-i2049' is not a published shape. Did you mean gf-12L-30M-i2048\?"):
        GeneformerConfig.from_preset("gf-12L-30M-i2049")
    assert main(["info", "Geneformer-V2-104MM"]) == 1
    assert "Did you mean Geneformer-V2-104M?" in capsys.readouterr().err


def test_the_command_is_the_same_by_both_entries():
    for words in (["-m", "geneformer_hf"], [os.path.join(os.path.dirname(sys.executable), "geneformer-hf")]):  # noqa: PTH118, PTH120 - as a shell has it
        command = [sys.executable, *words] if words[0] == "-m" else words
        assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout.startswith("geneformer-hf ")


@pytest.mark.slow
def test_bars_in_a_log_are_a_line_in_half_a_minute():
    code = "from geneformer_hf.cli.main import _quieten; _quieten()\nimport time\nfrom tqdm.auto import tqdm\nfor i in tqdm(range(300)): time.sleep(0.01)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert sum("/300" in line for line in done.stderr.splitlines()) == 2
