"""A stretch of a fused forward as one call: the code of the operator `_graph` (csrc/graph).

What is known of a stretch before it is called are its instructions; which kernel each runs, and what that reads of the
weights, is decided for the sizes of the arguments. A stretch with a size or a type that has no instruction, or whose
weights cannot be kept, runs call by call. On CUDA the operator is one launch, and takes a chain of layers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, methodcaller
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING
from pyvision_kernels._op import declare, runs_cuda_kernels
from pyvision_kernels._packed import PLAIN, FoldedNorm, keeps, kept_by
from pyvision_kernels.convert import chain
from pyvision_kernels.convert.steps import Conv2dStep, LinearStep, NormStep
from pyvision_kernels.ops.conv2d.algorithm import DIRECT, TF32, TORCH
from pyvision_kernels.ops.conv2d.choice import precision_of
from pyvision_kernels.ops.conv2d.operator import decide_on_cpu
from pyvision_kernels.ops.linear import pack_for

# Numbers are those of csrc/graph: Kind, and MapOp behind it.
CONV2D, LINEAR, MEAN, MAX_POOL, SCALE, AFFINE, ACTIVATE, HARDSIGMOID, CONCATENATE, FLATTEN = range(10)
Size = tuple[int, ...]


class DoesNotFit(Exception):
    """An instruction is not for these sizes."""


def _pooled(size: int, kernel: int, stride: int, padding: int) -> int:
    if 2 * padding > kernel or size < 1 or size + 2 * padding < kernel:
        raise DoesNotFit
    return (size + 2 * padding - kernel) // stride + 1


def _fake(inputs, constants, outputs, code):
    numbers = iter(outputs)
    made = []
    for _, channels_last, rank in zip(numbers, numbers, numbers, strict=False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        size = [next(numbers) for _ in range(rank)]
        made.append(torch.empty(size, dtype=inputs[0].dtype, device=inputs[0].device, memory_format=layout))
    return made


# outputs: of each, the place of the value, whether it is channels_last, rank, sizes. code: the instructions.
graph_op = declare("_graph(Tensor[] inputs, Tensor[] constants, int[] outputs, Tensor code) -> Tensor[]", fake=_fake)


@dataclass(frozen=True)
class Instruction:
    """One call of a stretch, before sizes are known.

    Attributes:
        kind: Of the numbers above.
        inputs: Values that it reads, by their place among the arguments of the stretch and the results so far.
        step: Of a layer or a norm.
        numbers: The other operands of the kind.
        leaves: Whether a convolution's result has the layout that the caller asks for.
    """

    kind: int
    inputs: tuple[int, ...]
    step: Any = None
    numbers: tuple[int, ...] = ()
    leaves: bool = False


class Program:
    """A stretch for arguments of one size, dtype and layout, and the weights as they are.

    Attributes:
        code: As the operator takes it, thousands of numbers in a tensor; None: it is to be run call by call.
        outputs: As the operator takes them.
        constants: Tensors that the code names.
    """

    def __init__(self, stretch: Stretch, arguments: Sequence[Tensor], back: bool):
        self.constants: list[Tensor] = []
        self.outputs: list[int] = []
        self.code: Tensor | None = None
        steps = [instruction.step for instruction in stretch.instructions if instruction.step is not None]
        self.norms = [step.norm for step in steps if step.norm is not None]
        self.keepers = [*self.norms, *(step.packs for step in steps if type(step) is not NormStep)]
        places = [(step.parameters, name) for step in steps if type(step) is not NormStep for name in _OF_LAYERS]
        places += [place for norm in self.norms for place in norm.places()]
        self.holders, self.names = [held for held, _ in places], [name for _, name in places]
        self.tensors = list(map(dict.get, self.holders, self.names))
        self.present = [tensor for tensor in self.tensors if tensor is not None]
        # As of FoldedNorm, only identity, address and version of vectors are compared: what is looked at here is no
        # longer in a cache when a model is called again.
        self.weights = [tensor for tensor in self.present if tensor.dim() > 1]
        # Whether writes to all of them are; subclasses may have no memory of their own.
        self.counted = not any(type(tensor) not in PLAIN or tensor.is_inference() for tensor in self.present)
        self.seen: tuple[Any, ...] = ()
        self.kept: list[Any] = []
        if self.counted:
            self._assemble(stretch, arguments, back)

    def _assemble(self, stretch: Stretch, arguments: Sequence[Tensor], back: bool) -> None:
        self.seen = self._look()
        kind = _ChainAssembler if runs_cuda_kernels(arguments[0]) else _Assembler
        assembler = kind(self.constants, arguments, back)
        try:
            self.outputs, self.code = assembler.assemble(stretch)
        except DoesNotFit:
            self.constants.clear()
            assembler.made.clear()
        # Replaced when they are told to forget. Where another thread told one meanwhile, the program is out of date.
        self.kept = list(map(kept_by, self.keepers))
        self.counted = all(keeps(keeper, made) for keeper, made in assembler.made)

    def is_current(self) -> bool:
        """Whether the weights are those that it was made for, unchanged. Some tens of nanoseconds a tensor."""
        return (
            self.counted
            and all(map(is_, self.tensors, map(dict.get, self.holders, self.names)))
            and all(map(is_, self.kept, map(kept_by, self.keepers)))
            and self._look() == self.seen
        )

    def _look(self) -> tuple[Any, ...]:
        present = self.present
        return (
            list(map(_version_of, present)),
            list(map(_address_of, present)),
            list(map(_size_of, self.weights)),
            list(map(_strides_of, self.weights)),
            [norm.norm.eps for norm in self.norms],
        )


_OF_LAYERS = ("weight", "bias")
_version_of = attrgetter("_version")
_address_of = methodcaller("data_ptr")
_size_of = attrgetter("shape")
_strides_of = methodcaller("stride")


class _Assembler:
    """Writes the code of a stretch for sizes."""

    writers: ClassVar[dict[int, Callable[[Any, Instruction], tuple[Size, list[int]]]]]

    def __init__(self, constants: list[Tensor], arguments: Sequence[Tensor], back: bool):
        self.constants = constants
        self.made: list[tuple[Any, Tensor]] = []  # what keeps it, and a tensor that was made of weights
        self.arguments = arguments
        self.dtype, self.device = arguments[0].dtype, arguments[0].device
        self.back = back
        self.sizes: list[Size] = [tuple(argument.shape) for argument in arguments]
        self.channels_last = [
            argument.dim() == 4
            and argument.is_contiguous(memory_format=torch.channels_last)
            and not argument.is_contiguous()
            for argument in arguments
        ]

    def assemble(self, stretch: Stretch) -> tuple[list[int], Tensor]:
        code: list[int] = []
        for instruction, dying in zip(stretch.instructions, stretch.dying, strict=True):
            write = self.writers.get(instruction.kind)
            if write is None:
                raise DoesNotFit
            size, numbers = write(self, instruction)
            if min(size) < 1:
                raise DoesNotFit
            self.sizes.append(size)
            self.channels_last.append(len(size) == 4 and not (instruction.leaves and self.back))
            code += [instruction.kind, *numbers, len(dying), *dying]
        outputs: list[int] = []
        for value in stretch.outputs:
            size = self.sizes[value]
            outputs += [value, int(self.channels_last[value]), len(size), *size]
        return outputs, torch.tensor(code, device="cpu")

    def _constant(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        self.constants.append(tensor)
        return len(self.constants) - 1

    def _map(self, value: int) -> tuple[int, int, int, int]:
        size = self.sizes[value]
        if len(size) != 4 or min(size) < 1:
            raise DoesNotFit
        return size

    def _map_or_row(self, value: int) -> Size:
        """The size of a value [N, C, H, W], or [N, C], of any."""
        return self.sizes[value] if len(self.sizes[value]) == 2 else self._map(value)

    def _weight(self, step: Any) -> Tensor:
        weight = step.parameters["weight"]
        if weight.dtype is not self.dtype or weight.device != self.device:
            raise DoesNotFit
        return weight

    def _folded(self, norm: FoldedNorm) -> tuple[Tensor, Tensor]:
        scale, shift = norm.get()
        self.made.append((norm, scale))
        return scale, shift

    def conv2d(self, instruction: Instruction) -> tuple[Size, list[int]]:
        step, value = instruction.step, instruction.inputs[0]
        size, weight, geometry = self._map(value), self._weight(step), step.geometry
        rows, columns = geometry.output_size(size[2:], weight.shape[2:])
        result = (size[0], weight.shape[0], rows, columns)
        if size[1] != weight.shape[1] * geometry.groups or min(result) < 1:
            raise DoesNotFit
        residual = instruction.inputs[1] if len(instruction.inputs) > 1 else -1
        if residual != -1 and self.sizes[residual] != result:
            raise DoesNotFit
        flows = self.channels_last[value]
        kernel = decide_on_cpu(size, self.dtype, flows, weight, geometry)
        packed = None if kernel == TORCH else step.pack_for(weight, kernel, self.dtype)
        if packed is None:
            raise DoesNotFit
        self.made.append((step.packs, packed))
        scale, shift = (None, None) if step.norm is None else self._folded(step.norm)
        held = weight, step.parameters["bias"], scale, shift, packed
        options = step.number, int(step.pool), kernel
        if step.pool:
            result = (*result[:2], rows // 2, columns // 2)
        return result, [value, residual, *map(self._constant, held), *options, *geometry.numbers]

    def linear(self, instruction: Instruction) -> tuple[Size, list[int]]:
        step, value = instruction.step, instruction.inputs[0]
        size, weight = self.sizes[value], self._weight(step)
        if len(size) != 2 or size[1] != weight.shape[1]:
            raise DoesNotFit
        result = (size[0], weight.shape[0])
        residual = instruction.inputs[1] if len(instruction.inputs) > 1 else -1
        if residual != -1 and self.sizes[residual] != result:
            raise DoesNotFit
        packed = pack_for(weight, size[0], step.packs)
        if packed is not None:
            self.made.append((step.packs, packed))
        held = weight, step.parameters["bias"], packed
        return result, [value, residual, *map(self._constant, held), _activation.NUMBERS[step.activation]]

    def affine(self, instruction: Instruction) -> tuple[Size, list[int]]:
        value, norm = instruction.inputs[0], instruction.step.norm
        size = self._map(value)
        scale, shift = self._folded(norm)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if scale.dtype is not wide or scale.shape[0] != size[1] or norm.norm.running_mean.dtype is not self.dtype:
            raise DoesNotFit
        return size, [value, self._constant(scale), self._constant(shift), int(instruction.step.relu)]

    def mean(self, instruction: Instruction) -> tuple[Size, list[int]]:
        value = instruction.inputs[0]
        return (*self._map(value)[:2], 1, 1), [value]

    def max_pool(self, instruction: Instruction) -> tuple[Size, list[int]]:
        value, numbers = instruction.inputs[0], instruction.numbers
        images, channels, *pixels = self._map(value)
        pairs = numbers[:2], numbers[2:4], numbers[4:]
        return (images, channels, *map(_pooled, pixels, *pairs)), [value, *numbers]

    def scale(self, instruction: Instruction) -> tuple[Size, list[int]]:
        one, other = instruction.inputs
        if self._map_or_row(one)[2:] == (1, 1):
            one, other = other, one
        size = self._map_or_row(one)
        if self._map_or_row(other) != (*size[:2], *[1] * len(size[2:])):
            raise DoesNotFit
        return size, [one, other]

    def same(self, instruction: Instruction) -> tuple[Size, list[int]]:
        value = instruction.inputs[0]
        return self._map_or_row(value), [value, *instruction.numbers]

    def concatenate(self, instruction: Instruction) -> tuple[Size, list[int]]:
        maps = [self._map_or_row(value) for value in instruction.inputs]
        (images, _, *pixels), channels = maps[0], sum(size[1] for size in maps)
        if any(size[0] != images or list(size[2:]) != pixels for size in maps):
            raise DoesNotFit
        return (images, channels, *pixels), [len(maps), *instruction.inputs]

    def flatten(self, instruction: Instruction) -> tuple[Size, list[int]]:
        value = instruction.inputs[0]
        images, channels, rows, columns = self._map(value)
        return (images, channels * rows * columns), [value]


class _ChainAssembler(_Assembler):
    """Writes it for CUDA, where all layers are one launch."""

    def __init__(self, constants: list[Tensor], arguments: Sequence[Tensor], back: bool):
        super().__init__(constants, arguments, back)
        self.map: Size = self.sizes[0][1:]  # of the value so far, flattened or not
        self.bytes = self.products = 0
        self.tf32 = _allow_tf32(arguments[0])

    def assemble(self, stretch: Stretch) -> tuple[list[int], Tensor]:
        instructions = stretch.instructions
        in_turn = all(instruction.inputs == (place,) for place, instruction in enumerate(instructions))
        if not in_turn or stretch.outputs != [len(instructions)] or self.dtype is torch.float64:
            raise DoesNotFit
        outputs, code = super().assemble(stretch)
        if not chain.fits_op(list(self.arguments), self.constants, code):
            raise DoesNotFit
        return outputs, code

    def _pack(self, step: Any, size: Size, map_size: Size = ()) -> Tensor:
        weight = self._weight(step)
        self.bytes += weight.numel() * weight.element_size()
        self.products += weight.numel() * math.prod(size[2:])
        if self.bytes > chain.MOST_BYTES or self.products > chain.MOST_PRODUCTS:
            raise DoesNotFit
        packed = step.packs.get(weight, ("chain", map_size), lambda: chain.pack(weight, map_size))
        if packed is None:
            raise DoesNotFit
        self.made.append((step.packs, packed))
        return packed

    def conv2d(self, instruction: Instruction) -> tuple[Size, list[int]]:
        step, value = instruction.step, instruction.inputs[0]
        size, weight, geometry = self._map(value), self._weight(step), step.geometry
        rows, columns = geometry.output_size(size[2:], weight.shape[2:])
        result = (size[0], weight.shape[0], rows, columns)
        if size[1] != weight.shape[1] or geometry.groups != 1 or geometry.padding_mode != 0 or min(result) < 1:
            raise DoesNotFit
        packed = self._pack(step, result)
        scale, shift = (None, None) if step.norm is None else self._folded(step.norm)
        held = weight, step.parameters["bias"], scale, shift, packed
        options = step.number, int(step.pool), TF32 if self.tf32[0] else DIRECT
        if step.pool:
            result = (*result[:2], rows // 2, columns // 2)
        self.map = result[1:]
        return result, [value, -1, *map(self._constant, held), *options, *geometry.numbers]

    def linear(self, instruction: Instruction) -> tuple[Size, list[int]]:
        step, value = instruction.step, instruction.inputs[0]
        size, weight = self.sizes[value], self._weight(step)
        if len(size) != 2 or size[1] != weight.shape[1]:
            raise DoesNotFit
        result = (size[0], weight.shape[0])
        packed = self._pack(step, result, (*self.map, 1, 1)[:3])
        held = weight, step.parameters["bias"], packed
        self.map = result[1:]
        options = _activation.NUMBERS[step.activation], TF32 if self.tf32[1] else DIRECT
        return result, [value, -1, *map(self._constant, held), *options]


def _allow_tf32(argument: Tensor) -> tuple[bool, bool]:
    """Of convolutions, of linear layers."""
    kind = argument.dtype, argument.device.type
    return precision_of(*kind), precision_of(*kind, matmul=True)


_Assembler.writers = {
    CONV2D: _Assembler.conv2d,
    LINEAR: _Assembler.linear,
    MEAN: _Assembler.mean,
    MAX_POOL: _Assembler.max_pool,
    SCALE: _Assembler.scale,
    AFFINE: _Assembler.affine,
    ACTIVATE: _Assembler.same,
    HARDSIGMOID: _Assembler.same,
    CONCATENATE: _Assembler.concatenate,
    FLATTEN: _Assembler.flatten,
}
_ChainAssembler.writers = {
    CONV2D: _ChainAssembler.conv2d,
    LINEAR: _ChainAssembler.linear,
    FLATTEN: _Assembler.flatten,
}
KIND_OF_STEP = {Conv2dStep: CONV2D, LinearStep: LINEAR, NormStep: AFFINE}
_MOST = 256  # sizes of arguments of a stretch


def _someone_watches() -> bool:
    """Whether a profiler or a dispatch mode, such as a counter of FLOPs, is to see each layer."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled()


class Stretch:
    """Instructions that follow each other, called with the values that they read and `back`.

    Args:
        arguments: How many values it reads.
        instructions: In order.
        outputs: Values that are read outside, by their places.
        call_by_call: The same, without the operator.
    """

    def __init__(
        self, arguments: int, instructions: list[Instruction], outputs: list[int], call_by_call: Callable[..., Any]
    ):
        self.instructions, self.outputs, self.call_by_call = instructions, outputs, call_by_call
        self.operator: Callable[..., Any] = graph_op
        self.programs: dict[Any, Program] = {}
        last = {value: place for place, instruction in enumerate(instructions) for value in instruction.inputs}
        self.dying: list[list[int]] = [[] for _ in instructions]
        for value, place in last.items():
            if value >= arguments and value not in outputs:
                self.dying[place].append(value)

    def __call__(self, *arguments: Tensor, back: bool) -> Any:
        program = self._program(arguments, back)
        if program is None or program.code is None:
            return self.call_by_call(*arguments, back)
        results = self.operator(list(arguments), program.constants, program.outputs, program.code)
        return results[0] if len(results) == 1 else results

    def _program(self, arguments: tuple[Tensor, ...], back: bool) -> Program | None:
        if _someone_watches():
            return None
        first, grad = arguments[0], torch.is_grad_enabled()
        for argument in arguments:  # a factor may be a number
            plain = type(argument) is Tensor and argument.device == first.device and argument.dtype is first.dtype
            if not plain or (grad and argument.requires_grad):
                return None
        dtype = first.dtype
        if dtype not in FLOATING or not (first.is_cpu or first.is_cuda):
            return None
        how = (first.device, *_allow_tf32(first)) if runs_cuda_kernels(first) else None
        key = back, CHOICE.key, how, dtype, *[(argument.shape, argument.stride()) for argument in arguments]
        program = self.programs.get(key)
        if program is not None and program.is_current():
            return program
        if program is not None or len(self.programs) > _MOST:
            self.forget()  # the others read the same weights
        program = self.programs[key] = Program(self, arguments, back)
        return program

    def forget(self) -> None:
        """Drops the programs, which hold weights and what was made of them."""
        self.programs = {}
