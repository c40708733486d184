"""CompiledModel: forwards of fixed shape through compiled pieces and static buffers; CUDA graphs on a GPU.

Each set of buffers serves one sequence at a time. A forward is padded to the next width that has pieces. The padding
lies behind the last token, where no query attends to it.
Shapes: Q tokens of a forward, T slots that attention reads, V vocabulary.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipsearch.compiled.buffers import Buffers, Scores
from skipsearch.compiled.compile import Piece, compiler
from skipsearch.compiled.graphs import capture
from skipsearch.compiled.pieces import EXAMPLE_IDS, EXAMPLE_POSITIONS, Pieces
from skipsearch.compiled.products import products
from skipsearch.compiled.stack import Outside, Stack
from skipsearch.compiled.tracing import EXAMPLE_SLOTS
from skipsearch.errors import BackendError
from skipsearch.model.device import synchronize
from skipsearch.model.target import Target
from skipsearch.model.turns import one_at_a_time

# Forwards of a block: a plain step, and drafts with the token before them. 2 to 13 tokens take a GPU the same time.
WIDTHS = {"cpu": (1, 2, 4, 6, 9, 13), "cuda": (1, 13)}
GUESS = 3  # tokens that a draft reads in one forward beside its own last one
CHUNK = {"cpu": 64, "cuda": 256}  # tokens of a forward of the prefill
STEP = {"cpu": 64, "cuda": 256}  # attention reads slots in multiples of this; on a GPU each multiple is a graph
TIMED, FASTER = 5, 0.93  # runs of each width, of which the fastest counts; seconds over those of a narrower one
SLACK = 320  # slots behind the longest sequence, for the padding of a forward


class CompiledModel:
    """A model and its draft views, run through compiled pieces.

    Args:
        target: is not kept; its tensors are.

    Raises:
        BackendError: why this model or machine cannot.
    """

    def __init__(self, target: Target) -> None:
        if compiler() is None:
            raise BackendError("no C++ compiler was found, backend 'compiled' needs one; install g++")
        self.pieces = Pieces(target)
        self.device = self.pieces.device
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.chunk, self.step, self.widths = CHUNK[kind], STEP[kind], WIDTHS[kind]
        self._heads: dict[int, tuple[Piece, list[Tensor]]] = {}
        self._tails: dict[tuple[int, str], Piece] = {}
        self._padded_to: dict[int, int] = {}
        self._free: list[Buffers] = []

    # -- buffers -----------------------------------------------------------------------------------------------

    def acquire(self, capacity: int, owner: object) -> Buffers:
        """Buffers with room for so many tokens, free for others once given back or `owner` is garbage-collected."""
        size = -(-(capacity + SLACK) // self.step) * self.step
        with one_at_a_time:
            fitting = [b for b in self._free if b.ids.shape[1] >= size]
            buffers = min(fitting, key=lambda b: b.ids.shape[1]) if fitting else None
            if buffers is not None:
                self._free.remove(buffers)
            else:  # new ones serve in place of those not much smaller: longer and longer sequences must not leave all
                self._free[:] = [b for b in self._free if 2 * b.ids.shape[1] <= size]
        if buffers is not None:
            for layer in buffers.layers:
                for buffer in layer:
                    buffer.zero_()  # attention weights of 0 times NaN of an earlier sequence would be NaN
        else:
            buffers = Buffers.of(size, self.pieces.shapes, self.device)
        buffers.give_back = weakref.finalize(owner, self._free.append, buffers)
        return buffers

    def stack_of(self, model: nn.Module) -> Stack:
        """What the model, or a draft view of it, runs."""
        return self.pieces.stack_of(model)

    @property
    def packs(self) -> bool:
        return self.pieces.packed is not None

    def products(self, modules: Sequence[nn.Module], row: Tensor) -> Callable[[], Any]:
        """A function that multiplies a row [1, I] with each of some linear layers of one build."""
        run = products(self.pieces, modules, row)
        if self.device.type != "cuda":
            return run
        replay, _ = capture(run, self.device)

        def again(kept: object = run) -> None:  # `kept` holds what the graph reads
            replay()

        return again

    def fits(self) -> bool:
        """Whether the model's weights are still those that were packed, if any were."""
        return self.pieces.packed is None or self.pieces.packed.fits()

    # -- pieces ------------------------------------------------------------------------------------------------

    def width_for(self, tokens: int, stack: Stack | None = None) -> int:
        """The width of the forward that so many tokens take; without a stack, of the model itself."""
        width = next((w for w in self.widths if w >= tokens), self.chunk)
        # Products of quantised weights take a time for each row.
        return width if stack is not None and stack.quantised else self._padded_to.get(width, width)

    def guesses(self, stack: Stack) -> bool:
        """Whether a forward of several tokens costs about as much as one of one token."""
        return not stack.quantised

    def choose_widths(self, stack: Stack, buffers: Buffers) -> None:
        """Pad to a wider forward where that is faster: kernels for one or two rows can be the slowest."""
        slots = self.slots_for(max(self.widths))
        self.seek(buffers, 0, 0)
        seconds = {width: math.inf for width in self.widths}
        for width in self.widths * TIMED:
            synchronize(self.device)
            begin = time.perf_counter()
            self._replay(stack, buffers, width, slots)
            synchronize(self.device)
            seconds[width] = min(seconds[width], time.perf_counter() - begin)
        for width in self.widths:
            best = min((w for w in self.widths if w >= width), key=seconds.__getitem__)
            if seconds[best] < FASTER * seconds[width]:
                self._padded_to[width] = best

    def _head(self, width: int) -> tuple[Piece, list[Tensor]]:
        if width not in self._heads:
            head = self.pieces.head(width)
            options: dict[str, Any] = {"dtype": torch.long, "device": self.device}
            slots = torch.arange(EXAMPLE_SLOTS, device=self.device)
            ids, positions = torch.zeros(1, EXAMPLE_IDS, **options), torch.zeros(EXAMPLE_POSITIONS, **options)
            example = head(*self.pieces.outside.tensors, ids, positions, slots, torch.zeros(2, **options))
            self._heads[width] = head, list(example)
        return self._heads[width]

    def _tail(self, width: int, hidden: Tensor, outside: Outside) -> Piece:
        key = width, outside.build
        if key not in self._tails:
            self._tails[key] = self.pieces.tail(width, hidden, outside)
        return self._tails[key]

    def _program(self, stack: Stack, width: int) -> list[tuple[Piece, int, list[int], list[Tensor]]]:
        if width not in stack.programs:
            _, example = self._head(width)
            program = []
            for layer in stack.layers:
                leaves = self.pieces.layer_calls[layer.index].leaves
                extras = [leaf for leaf in leaves if type(leaf) is int]
                program.append((self.pieces.layer(layer, width, example), layer.index, extras, layer.tensors))
            stack.programs[width] = program
        return stack.programs[width]

    def warm(
        self, stack: Stack, widths: Sequence[int], progress: Callable[[str, int, int], None] | None = None
    ) -> None:  # fmt: skip
        """Compile what a stack needs at these widths, or read it from the disk."""
        for number, width in enumerate(widths):
            self._program(stack, width)
            self._tail(1 if width == self.chunk else width, self._head(width)[1][0], stack.outside)
            if progress is not None:
                progress("compile", number + 1, len(widths))

    # -- forwards ----------------------------------------------------------------------------------------------

    def run(
        self, stack: Stack, buffers: Buffers, at: Tensor, width: int, slots: int, last: int | None = None
    ) -> Scores:
        """One forward of `width` tokens in `buffers.ids`; with `last`, the scores behind that token alone."""
        tensors = self.pieces.outside.tensors
        out = self._head(width)[0](*tensors, buffers.ids, buffers.positions, buffers.slots[:slots], at)
        hidden, slots_Q = out[0], out[1]
        slices = buffers.first(slots)
        for piece, index, extras, tensors in self._program(stack, width):
            keys, values = slices[index]
            hidden = piece(hidden, slots_Q, keys, values, *[out[i] for i in extras], *tensors)[0]
        if last is not None:
            hidden = hidden[:, last : last + 1]
        return Scores(*self._tail(hidden.shape[1], hidden, stack.outside)(*stack.outside.tensors, hidden))

    def forward(
        self, stack: Stack, buffers: Buffers, start: int, place: int, tokens: int, keep_last: bool = False
    ) -> Scores:
        """The forward of `tokens` tokens from slot `start` on; scores of all of them, or of the last."""
        width = self.width_for(tokens, stack)
        last = tokens - 1 if keep_last and width == self.chunk else None
        slots = self.slots_for(start + width)
        self.seek(buffers, start, place)
        if last is not None:  # a part of the prefill: bound by arithmetic, so a graph would gain nothing
            return self.run(stack, buffers, buffers.at, width, slots, last)
        return self._replay(stack, buffers, width, slots)

    def _replay(self, stack: Stack, buffers: Buffers, width: int, slots: int) -> Scores:
        run = partial(self.run, stack, buffers, buffers.at, width, slots)
        scores: Scores = self.graph(stack, buffers, ("forward", width, slots), run)
        return scores

    def draft(self, stack: Stack, buffers: Buffers, start: int, place: int, steps: int) -> None:
        """Draft greedily so many tokens behind the one at `start` into ids; the host is not waited for in between."""
        width = self.width_for(1, stack)
        slots = self.slots_for(start + steps + width - 1)
        self.seek(buffers, start, place)

        def run() -> None:
            at = buffers.at
            for _ in range(steps):
                top = self.run(stack, buffers, at, width, slots).top
                at = at + 1
                buffers.ids.index_copy_(1, at[1:], top[:1, :1].long())

        self.graph(stack, buffers, ("draft", steps, slots), run)

    def slots_for(self, end: int) -> int:
        """How many slots attention reads if all tokens lie below slot `end`."""
        return -(-end // self.step) * self.step

    def seek(self, buffers: Buffers, start: int, place: int) -> None:
        """Choose where the next forward begins."""
        buffers.at.copy_(torch.tensor([start, place]), non_blocking=True)

    def graph(self, stack: Stack, buffers: Buffers, key: Any, run: Callable[[], Any]) -> Any:
        """Run a function; on a GPU replay its graph, captured at the first call. The next call overwrites it."""
        if self.device.type != "cuda":
            return run()
        if buffers.pool is None:
            buffers.pool = torch.cuda.graph_pool_handle()
        graphs = stack.graphs.setdefault(buffers, {})
        if key not in graphs:
            graphs[key] = capture(run, self.device, buffers.pool)
        replay, out = graphs[key]
        replay()
        return out
