"""What is special to softmax_cross_entropy: PyTorch's samples, labels, layouts, autocast, gradients of gradients."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.ops import softmax_cross_entropy
from tests.errors import assert_as_good

with warnings.catch_warnings():  # of packages that these would like to have
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

by_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_samples_of_op_db(dtype, device):
    entry = next(entry for entry in op_db if entry.name == "nn.functional.cross_entropy")
    samples = list(entry.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) > 20
    for sample in samples:
        (target,) = sample.args
        weight = sample.kwargs.pop("weight", None)
        double = [x.detach().double() if x is not None and x.is_floating_point() else x for x in (target, weight)]
        leaf = sample.input.detach().double().requires_grad_()
        exact = F.cross_entropy(leaf, *double, **sample.kwargs)
        weight = None if weight is None else weight.detach()
        results = [
            function(sample.input, target.detach(), weight, **sample.kwargs)
            for function in (softmax_cross_entropy, F.cross_entropy)
        ]
        assert_as_good(*(result.detach() for result in results), exact.detach(), sample)
        grad = torch.randn_like(results[0])
        grads = [torch.autograd.grad(result, sample.input, grad)[0] for result in results]
        assert_as_good(*grads, torch.autograd.grad(exact, leaf, grad.double())[0], sample)


def test_samples_of_module_db(device):
    entry = next(entry for entry in module_db if entry.module_cls is torch.nn.CrossEntropyLoss)
    samples = list(entry.module_inputs_func(entry, device, torch.float32, requires_grad=False, training=True))
    assert len(samples) > 50
    for sample in samples:
        made, (input, target) = sample.constructor_input, sample.forward_input.args
        ours, stock = (cls(*made.args, **made.kwargs) for cls in (pvk.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss))
        theirs = stock(input, target)
        double = target.double() if target.is_floating_point() else target
        found, exact = ours(input, target), stock.double()(input.double(), double)
        largest = 0.0
        if exact.dim() == 0:  # "probabilities" and weights are of both signs, and so are the losses that are summed
            stock.reduction = "none"
            losses = stock(input.double(), double)
            largest = (exact * losses.abs().sum() / losses.sum()).abs().item()
        assert_as_good(found, theirs, exact, sample, largest)


def test_error_inputs_of_module_db():
    entry = next(entry for entry in module_db if entry.module_cls is torch.nn.CrossEntropyLoss)
    errors = entry.module_error_inputs_func or (lambda *args, **options: ())  # PyTorch 2.11 has none
    for wrong in errors(entry, "cpu", torch.float32, requires_grad=False, training=True):
        made, given = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            pvk.nn.CrossEntropyLoss(*made.args, **made.kwargs)(*given.args, **given.kwargs)


@pytest.mark.parametrize("size", [(5, 7), (3, 600), (2, 7, 3, 5)])
@pytest.mark.parametrize("wrong", [-1, -101, 2**40, -(2**40), "C"])
def test_label_that_is_no_class(size, wrong, device):
    input = torch.randn(size, device=device, requires_grad=True)
    target = torch.zeros(size[:1] + size[2:], dtype=torch.int64, device=device)
    target.flatten()[2] = size[1] if wrong == "C" else wrong
    if device == "cpu" and not pvk._simt.options():
        with pytest.raises(
            RuntimeError, match=rf"expected target to be in \[0, {size[1]}\) or ignore_index, -100, but"
        ):
            softmax_cross_entropy(input, target)
        return
    loss = softmax_cross_entropy(input, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), input)
    is_wrong = target.flatten() == target.flatten()[2]
    assert torch.equal(loss.flatten().isnan(), is_wrong)
    grad = grad.movedim(1, -1).flatten(0, -2)
    assert grad[is_wrong].isnan().all()
    assert not grad[~is_wrong].isnan().any()


def test_the_backward_operator_takes_labels_that_are_no_class():
    stats = torch.zeros(9)
    target = torch.tensor([1, 2**40, -7, 5])
    arguments = torch.ones(4), torch.randn(4, 5), target, None, stats, -100, 0, 0.0, True, False
    by_input, _ = torch.ops.pvk._softmax_cross_entropy_backward(*arguments)
    assert by_input[0].isfinite().all()


@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 255, -(2**40)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_ignored_positions_count_for_nothing(ignore_index, label_smoothing, device):
    input = torch.randn(6, 5, device=device)
    target = torch.tensor([1, ignore_index, 2, 4, ignore_index, 1], device=device)
    kept = target != ignore_index
    input[~kept] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0], device=device)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    leaf = input.clone().requires_grad_()
    loss = softmax_cross_entropy(leaf, target, **options)
    alone = softmax_cross_entropy(input[kept], target[kept], **options)
    torch.testing.assert_close(loss, alone)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert (grad[~kept] == 0).all()
    assert grad[kept].isfinite().all()
    nothing = torch.full_like(target, ignore_index)
    assert softmax_cross_entropy(input, nothing, **options).isnan()
    assert softmax_cross_entropy(input, nothing, **options, reduction="sum") == 0
    assert (softmax_cross_entropy(input, nothing, **options, reduction="none") == 0).all()


@pytest.mark.parametrize("classes", [3, 40, 700])
def test_logits_that_are_not_finite(classes, device):
    rows = torch.zeros(8, classes, device=device)
    rows[0, 1] = math.nan
    rows[1, 1] = math.inf
    rows[2, 1] = -math.inf
    rows[3, 0] = -math.inf
    rows[4] = -math.inf
    rows[5, :2] = -math.inf
    rows[6, 0] = math.inf
    rows[7, 2] = -math.inf
    target = torch.zeros(8, dtype=torch.int64, device=device)
    for smoothing in (0.0, 0.1):
        for input in (rows, rows.t().contiguous()[None].expand(1, classes, 8).contiguous()):
            labels = target if input.dim() == 2 else target[None]
            ours = softmax_cross_entropy(input, labels, reduction="none", label_smoothing=smoothing)
            theirs = F.cross_entropy(input, labels, reduction="none", label_smoothing=smoothing)
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_large_logits_lose_no_digits(device):
    input = (torch.randn(50, 20, dtype=torch.float64).float() + 3e4).to(device)
    target = torch.arange(50, device=device) % 20
    for values, labels in ((input, target), (input.t()[None].contiguous(), target[None])):
        ours, theirs = (function(values, labels) for function in (softmax_cross_entropy, F.cross_entropy))
        assert_as_good(ours, theirs, F.cross_entropy(values.double(), labels), "large")


@by_reduction
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("size", [(3, 4), (2, 3, 2), (5,)])
def test_gradcheck_and_gradgradcheck(reduction, soft, label_smoothing, size, device):
    classes = size[0] if len(size) == 1 else size[1]
    input = torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.rand(classes, dtype=torch.float64, device=device) + 0.5
    if soft:
        target = torch.rand(size, dtype=torch.float64, device=device, requires_grad=True)
    else:
        target = torch.randint(0, classes, size[:1] + size[2:] if len(size) > 1 else (), device=device)
        if target.dim():
            target.flatten()[0] = -100

    def loss(input, target):
        return softmax_cross_entropy(input, target, weight, -100, reduction, label_smoothing)

    torch.autograd.gradcheck(loss, (input, target))
    torch.autograd.gradgradcheck(loss, (input, target))


def test_layouts_give_the_same_loss_and_keep_theirs(device):
    input = torch.randn(2, 21, 7, 9, device=device)
    target = torch.randint(0, 21, (2, 7, 9), device=device)
    expected = softmax_cross_entropy(input, target, reduction="none")
    for given in (input.to(memory_format=torch.channels_last), input.mT.contiguous().mT, input.flip(0).flip(0)):
        leaf = given.detach().requires_grad_()
        ours = softmax_cross_entropy(leaf, target.mT.contiguous().mT, reduction="none")
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(ours.sum(), leaf)
        if given.is_contiguous(memory_format=torch.channels_last):
            assert grad.is_contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(3, 5, 200, device=device)
    labels = torch.randint(0, 200, (3, 5), device=device)
    torch.testing.assert_close(
        softmax_cross_entropy(tokens.transpose(1, 2), labels), F.cross_entropy(tokens.transpose(1, 2), labels)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_float32_without_a_copy(dtype):
    input = torch.randn(9, 30).to(dtype).requires_grad_()
    target = torch.randint(0, 30, (9,))
    weight = torch.rand(30)
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = (function(input, target, weight) for function in (softmax_cross_entropy, F.cross_entropy))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, input)[0] for loss in (ours, theirs)]
    assert grads[0].dtype == dtype
    torch.testing.assert_close(*grads)


def test_dtypes_of_probabilities_are_promoted(device):
    input = torch.randn(4, 6, device=device).bfloat16()
    target = torch.rand(4, 6, device=device)
    ours = softmax_cross_entropy(input, target)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, softmax_cross_entropy(input.float(), target))
    labels = torch.arange(4, device=device)
    bytes_ = labels.to(torch.uint8)
    assert torch.equal(softmax_cross_entropy(input, labels), softmax_cross_entropy(input, bytes_))


def test_number_of_threads_does_not_change_a_bit():
    threads = torch.get_num_threads()
    input, target = torch.randn(2, 21, 101, 97), torch.randint(0, 21, (2, 101, 97))
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(softmax_cross_entropy(input, target))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@by_reduction
def test_vmap_equals_a_loop(reduction):
    input, target = torch.randn(3, 4, 5), torch.randint(0, 5, (3, 4))
    weight = torch.rand(5)

    def loss(input, target):
        return softmax_cross_entropy(input, target, weight, reduction=reduction)

    def grad(input, target):
        return torch.func.grad(lambda x: loss(x, target).sum())(input)

    for function in (loss, grad):
        looped = torch.stack([function(*pair) for pair in zip(input, target, strict=True)])
        torch.testing.assert_close(torch.func.vmap(function)(input, target), looped)


def test_compiles_in_one_graph():
    layer = pvk.nn.CrossEntropyLoss(label_smoothing=0.1)
    input, target = torch.randn(6, 10, requires_grad=True), torch.randint(0, 10, (6,))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    loss = compiled(input, target)
    torch.testing.assert_close(loss, layer(input, target))
    torch.testing.assert_close(torch.autograd.grad(loss, input)[0], torch.autograd.grad(layer(input, target), input)[0])


def test_torch_is_called_where_asked_for():
    input, target = torch.randn(6, 10), torch.randint(0, 10, (6,))
    with pvk.backend("torch"):
        assert torch.equal(softmax_cross_entropy(input, target), F.cross_entropy(input, target))


def test_convert_takes_the_loss():
    model = torch.nn.ModuleDict({"loss": torch.nn.CrossEntropyLoss(weight=torch.rand(3), ignore_index=1)})
    pvk.convert(model)
    assert type(model["loss"]) is pvk.nn.CrossEntropyLoss
    input, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(
        model["loss"](input, target), F.cross_entropy(input, target, model["loss"].weight, ignore_index=1)
    )


def test_equal_logits_of_many_classes(device):
    for size in ((8, 127), (8, 64), (1, 127, 8)):
        input, target = torch.zeros(size, device=device), torch.zeros(size[:1] + size[2:], dtype=torch.int64)
        target = target.to(device)
        ours, theirs = (
            function(input, target, label_smoothing=1.0) for function in (softmax_cross_entropy, F.cross_entropy)
        )
        assert_as_good(ours, theirs, F.cross_entropy(input.double(), target, label_smoothing=1.0), size)


def test_many_classes_that_lie_apart():
    input, target = torch.randn(1, 5000, 3, requires_grad=True), torch.tensor([[1, 4999, 0]])
    ours, theirs = (function(input, target) for function in (softmax_cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, input)[0] for loss in (ours, theirs)))
