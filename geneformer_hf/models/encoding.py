"""Hidden states of many cells: passes of bounded size over packed cells, on whatever device there is.

On a CPU several passes run side by side, each on its own thread: the matrices of one pass are too small to share among cores
without waiting for each other. On an accelerator passes follow each other, cells of one length together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from ..device import run_with_backoff
from ..errors import SettingError
from .attention import encode_packed

T = TypeVar("T")
R = TypeVar("R")

TOKENS_PER_PASS = 65_536
TOKENS_PER_PASS_ON_CPU = 2048


@dataclass(frozen=True)
class EncodedPass:
    """The hidden states of the cells of one pass, packed."""

    cells: np.ndarray
    """int64 of shape `(b,)`: which cells of the chunk these are."""
    input_ids: torch.Tensor
    """int64 of shape `(t,)`, on the CPU."""
    lengths: list[int]
    hidden: torch.Tensor
    """`(t, e)`, on the device."""


class PackedEncoder:
    """A model made ready to give hidden states.

    Args:
        model (`PreTrainedModel`): any Geneformer.
        n_layers (`int`): layers to run; the result is `hidden_states[n_layers]`.
        device (`torch.device`)
        dtype (`torch.dtype`, *optional*): compute in this type by autocast.
        batch_size (`int`, *optional*): most cells in one pass, beside the bound on tokens.
    """

    def __init__(self, model: Any, *, n_layers: int, device: torch.device, dtype: torch.dtype | None = None, batch_size: int | None = None) -> None:
        stored = next(model.parameters()).dtype
        if dtype is not None and stored not in (torch.float32, dtype):
            msg = f"dtype {dtype} was asked for, but the weights are {stored}, whose precision is lost already. Leave dtype out, or load the model with dtype=torch.float32."
            raise SettingError(msg)
        self._model, self._n_layers, self._device, self._batch_size = model, n_layers, device, batch_size
        self._dtype = dtype if dtype != stored else None
        self.tokens_per_pass = TOKENS_PER_PASS_ON_CPU if device.type == "cpu" else TOKENS_PER_PASS
        self._pool: ThreadPoolExecutor | None = None
        self._n_workers = 1

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that is computed in, where it is not the model's own."""
        return self._dtype

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Put the model on the device in eval mode, and leave it, and torch's threads, as they were."""
        training, home = self._model.training, next(self._model.parameters()).device
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            if self._device.type == "cpu" and threads > 1:
                # Taken over by the workers, which are started later.
                torch.set_num_threads(1)
                stack.callback(torch.set_num_threads, threads)
                self._n_workers = threads
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
                stack.callback(self._pool.shutdown, cancel_futures=True)
            self._model.eval()
            stack.callback(self._model.train, training)
            if home != self._device:
                self._model.to(self._device)
                stack.callback(self._model.to, home)
            try:
                yield
            finally:
                self._n_workers = 1

    def encode(self, input_ids: np.ndarray, offsets: np.ndarray, cells: np.ndarray) -> Iterator[EncodedPass]:
        """Yield the hidden states of some cells of a chunk; call it within `ready()`.

        Args:
            input_ids (int of shape `(t,)`), offsets (int64 of shape `(n + 1,)`): the chunk, cells end to end.
            cells (int64 of shape `(b,)`): which cells to encode; none of them empty.
        """
        lengths = np.diff(offsets)
        if self._device.type != "cpu":
            cells = cells[np.argsort(-lengths[cells], kind="stable")]
        for passes in self.beside(lambda group: self._run(input_ids, offsets, group), self._groups(cells, lengths)):
            yield from passes

    def beside(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield what a function of the model makes of each item, in order, on a CPU several side by side; call it within `ready()`."""
        if self._pool is None or self._n_workers == 1:
            yield from map(function, items)
            return
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(self._pool.submit(function, item))
            if len(pending) > 2 * self._n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _groups(self, cells: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Cut cells into passes; the bound is read anew each time, because it shrinks when memory runs out."""
        while len(cells):
            if self._device.type == "cpu":
                tokens = np.cumsum(lengths[cells])
            else:
                # Attention is padded to the longest, which is the first.
                tokens = lengths[cells[0]] * np.arange(1, len(cells) + 1)
            n = max(1, int(np.searchsorted(tokens, self.tokens_per_pass, side="right")))
            n = min(n, self._batch_size or n)
            yield cells[:n]
            cells = cells[n:]

    def _run(self, input_ids: np.ndarray, offsets: np.ndarray, cells: np.ndarray) -> list[EncodedPass]:
        parts = run_with_backoff(lambda some: self._run_pass(input_ids, offsets, some), cells)
        if len(parts) > 1:
            self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
        return parts

    def _run_pass(self, input_ids: np.ndarray, offsets: np.ndarray, cells: np.ndarray) -> EncodedPass:
        arrays = [input_ids[offsets[i] : offsets[i + 1]] for i in cells]
        ids = torch.from_numpy(np.concatenate(arrays).astype(np.int64))
        lengths = [len(a) for a in arrays]
        with self._computing():
            hidden = encode_packed(self._model.base_model, ids.to(self._device), lengths, self._n_layers)
        return EncodedPass(cells, ids, lengths, hidden)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute without gradients, in the number type asked for; what holds on one thread says nothing of others."""
        lower = self._dtype in (torch.bfloat16, torch.float16)
        with torch.inference_mode(), torch.autocast(self._device.type, dtype=self._dtype if lower else torch.bfloat16, enabled=lower):
            yield
