"""Geneformer made known to transformers and peft: now, where they are loaded, or as soon as they are.

Importing transformers and torch takes seconds, so `import geneformer_hf` leaves them alone. Each module in `PARTS`
has something to be registered with, as soon as it has been imported; both orders of the imports give the same.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _config() -> None:
    from transformers import AutoConfig

    from .models.configuration_geneformer import GeneformerConfig

    AutoConfig.register(GeneformerConfig.model_type, GeneformerConfig, exist_ok=True)


def _tokenizer() -> None:
    from transformers import AutoTokenizer

    from .models.configuration_geneformer import GeneformerConfig
    from .models.tokenization_geneformer import GeneformerTokenizer

    AutoTokenizer.register(GeneformerConfig, tokenizer_class=GeneformerTokenizer, exist_ok=True)


def _models() -> None:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoModelForTokenClassification

    from .models import modeling_geneformer as ours
    from .models.configuration_geneformer import GeneformerConfig

    AutoModel.register(GeneformerConfig, ours.GeneformerModel, exist_ok=True)
    AutoModelForMaskedLM.register(GeneformerConfig, ours.GeneformerForMaskedLM, exist_ok=True)
    AutoModelForPreTraining.register(GeneformerConfig, ours.GeneformerForMaskedLM, exist_ok=True)
    AutoModelForTokenClassification.register(GeneformerConfig, ours.GeneformerForTokenClassification, exist_ok=True)
    # One Auto class, two models: transformers picks by the `architectures` of the checkpoint, the first where there is none.
    both: Any = (ours.GeneformerForSequenceClassification, ours.GeneformerForMultiTaskClassification)
    AutoModelForSequenceClassification.register(GeneformerConfig, both, exist_ok=True)


def _pipelines() -> None:
    from .pipelines import register

    register()


def _adapters() -> None:
    from .models.adapters import name_default_layers

    name_default_layers()


PARTS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _config,
    "transformers.models.auto.tokenization_auto": _tokenizer,
    "transformers.models.auto.modeling_auto": _models,
    "transformers.pipelines": _pipelines,
    "peft.utils.constants": _adapters,
}


_WATCHED = ("transformers", "peft", __package__)
_state = threading.local()
_done: set[str] = set()


class _AfterImport(MetaPathFinder):
    """Finds nothing by itself: lets the others find the modules of transformers, peft and this package, and registers when an import is over.

    That is, when no module of either is half imported: until then, ours could not be loaded by the one that asks for them.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec that the other finders give, with a loader that registers afterwards."""
        if name.split(".", 1)[0] not in _WATCHED:
            return None
        spec = next((found for finder in sys.meta_path if finder is not self and (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            _state.depth = getattr(_state, "depth", 0) + 1
            try:
                run(module)
            finally:
                _state.depth -= 1
            if not _state.depth:
                _register_what_is_loaded()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_what_is_loaded() -> None:
    """Register with the modules of `PARTS` that are there; called where none of them is half imported."""
    while waiting := [name for name in PARTS if name in sys.modules and name not in _done]:
        _done.add(waiting[0])
        _state.depth = getattr(_state, "depth", 0) + 1
        try:
            PARTS[waiting[0]]()
        except BaseException:
            _done.discard(waiting[0])
            raise
        finally:
            _state.depth -= 1
    if len(_done) == len(PARTS):
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]


def register() -> None:
    """Register Geneformer with what is loaded of transformers, and arrange for the rest; once is enough."""
    if len(_done) < len(PARTS) and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    if not getattr(_state, "depth", 0):
        _register_what_is_loaded()
