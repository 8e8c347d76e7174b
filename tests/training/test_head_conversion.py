# SPDX-License-Identifier: MIT
"""A head of D rewritten as another kind of head: the same logits and the same gradients, or a reason why not."""

import itertools
from dataclasses import replace

import pytest
import torch

import san
from training.config import DiscriminatorConfig
from training.discriminator.heads import ProjectionHead, SpectralNormConv2d
from training.finetune.class_sources import ClassSources, mean_of_all, same_ids
from training.finetune.head_conversion import ConversionError, HeadForm, convert_head

NUM_CLASSES, ROWS = 4, 5  # one row more than classes
CHANNELS, START = 3, 16  # of the feature map that the head sees
CONDITIONAL = DiscriminatorConfig(
    img_resolution=16,
    c_dim=NUM_CLASSES,
    head_resolution=4,
    max_head_channels=7,
    class_dim=6,
    num_class_embeddings=ROWS,
    embedding_dim=9,
)
PLAIN = replace(CONDITIONAL, c_dim=0)
FORMS = {f"{kind} {word}": HeadForm(cfg, kind) for kind in ("san", "gan") for word, cfg in
         (("conditional", CONDITIONAL), ("unconditional", PLAIN))}  # fmt: skip
PAIRS = list(itertools.product(FORMS, FORMS))
ONE_CLASS = ClassSources(((2,),), NUM_CLASSES, "as listed")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def make_head(form: HeadForm, dtype: torch.dtype = torch.float64, start: int = START) -> ProjectionHead:
    """A head as training leaves it: BatchNorm, scales and power iterations are somewhere, not at their start."""
    head = ProjectionHead(form.cfg, form.kind, CHANNELS, start).to(dtype)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if not name.endswith(("weight_orig", "last.weight", "embed.weight", "embed_proj.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
        labels = torch.arange(3) % NUM_CLASSES
        for _ in range(3):  # running statistics, and vectors u and v that are not quite those of the weights
            head(torch.randn(3, CHANNELS, START, START, dtype=dtype), labels)
    return head.eval()


def sources(source: HeadForm, target: HeadForm) -> ClassSources | None:
    if not source.is_conditional:
        return None
    return same_ids(NUM_CLASSES, NUM_CLASSES) if target.is_conditional else ONE_CLASS


def converted_head(
    old: ProjectionHead, source: HeadForm, target: HeadForm, classes: ClassSources | None, start: int = START
) -> ProjectionHead:
    dtype = next(old.parameters()).dtype
    new = make_head(target, dtype, start)
    state = convert_head(old.state_dict(), new.state_dict(), source, target, classes)
    new.load_state_dict(state)  # strict: complete
    return new


def values_and_gradients(
    head: ProjectionHead, x: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    logits = head(x, labels).fun
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name.replace(" ", "-"))
def test_the_function_stays(source, target, dtype):
    source, target = FORMS[source], FORMS[target]
    old = make_head(source, dtype)
    new = converted_head(old, source, target, sources(source, target))
    x = torch.randn(NUM_CLASSES, CHANNELS, START, START, dtype=dtype)
    labels = torch.arange(NUM_CLASSES)
    # Between conditional and not, the one class that was chosen is compared.
    old_labels = labels if target.is_conditional else torch.full_like(labels, ONE_CLASS.ids[0][0])
    expected, expected_gradient = values_and_gradients(old, x, old_labels)
    actual, gradient = values_and_gradients(new, x, labels)
    assert expected.abs().min() > 1e-4 and expected_gradient.abs().max() > 1e-4  # something to compare
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    assert relative_error(gradient, expected_gradient) < TOLERANCE[dtype]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name.replace(" ", "-"))
def test_first_training_pass(source, target):
    """Training mode takes a power iteration first: equal once the stored vectors are those of the weights."""
    source, target = FORMS[source], FORMS[target]
    old = make_head(source).train()
    x, labels = (
        torch.randn(NUM_CLASSES, CHANNELS, START, START, dtype=torch.float64),
        torch.arange(NUM_CLASSES),
    )
    for layer in (m for m in old.modules() if isinstance(m, SpectralNormConv2d)):
        for _ in range(500):
            layer.inverse_sigma()
    new = converted_head(old, source, target, sources(source, target)).train()
    old_labels = labels if target.is_conditional else torch.full_like(labels, ONE_CLASS.ids[0][0])
    expected, expected_gradient = values_and_gradients(old, x, old_labels)
    actual, gradient = values_and_gradients(new, x, labels)
    assert relative_error(actual, expected) < 1e-9
    assert relative_error(gradient, expected_gradient) < 1e-9


def test_training_pass_after_an_optimizer_step_is_nearly_equal():
    """A plain unconditional head divides by a length that its next training pass corrects; SAN keeps the length."""
    source, target = FORMS["gan unconditional"], FORMS["san unconditional"]
    old = make_head(source).train()
    x = torch.randn(8, CHANNELS, START, START, dtype=torch.float64)
    with torch.no_grad():
        weight = old.last.weight_orig
        weight.add_(0.002 * torch.randn_like(weight).sign())  # one Adam step at D's learning rate
    new = converted_head(old, source, target, None).train()
    old.trunk.eval(), new.trunk.eval()
    error = relative_error(new(x).fun, old(x).fun)
    assert 0 < error < 1e-3


def test_there_and_back_is_the_identity():
    source, target = FORMS["gan conditional"], FORMS["san conditional"]
    old = make_head(source)
    classes = same_ids(NUM_CLASSES, NUM_CLASSES)
    back = converted_head(converted_head(old, source, target, classes), target, source, classes)
    x = torch.randn(ROWS, CHANNELS, START, START, dtype=torch.float64)
    for labels in (torch.arange(ROWS), torch.arange(ROWS).flip(0)):  # rows beyond the classes too
        torch.testing.assert_close(back(x, labels).fun, old(x, labels).fun, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_to_convert_leaves_every_bit(name):
    form = FORMS[name]
    old = make_head(form, torch.float32)
    classes = same_ids(NUM_CLASSES, NUM_CLASSES) if form.is_conditional else None
    state = old.state_dict()
    converted = convert_head(state, make_head(form, torch.float32).state_dict(), form, form, classes)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


# Classes.


@pytest.mark.parametrize(("source", "target"), list(itertools.product(("san", "gan"), repeat=2)))
def test_other_classes_take_the_logits_of_their_sources(source, target):
    other = HeadForm(replace(CONDITIONAL, c_dim=3), target)
    old = make_head(source_form := FORMS[f"{source} conditional"])
    new = converted_head(old, source_form, other, ClassSources(((3,), (0,), (3,)), NUM_CLASSES, "as listed"))
    x = torch.randn(3, CHANNELS, START, START, dtype=torch.float64)
    expected = old(x, torch.tensor([3, 0, 3])).fun
    torch.testing.assert_close(new(x, torch.arange(3)).fun, expected, rtol=1e-10, atol=1e-12)


def test_more_classes_than_rows():
    cfg = replace(CONDITIONAL, c_dim=8, num_class_embeddings=8)
    source, target = FORMS["gan conditional"], HeadForm(cfg, "san")
    old = make_head(source)
    new = converted_head(old, source, target, mean_of_all(NUM_CLASSES, 8))
    x = torch.randn(1, CHANNELS, START, START, dtype=torch.float64)
    mean = torch.stack([old(x, torch.tensor([k])).fun for k in range(NUM_CLASSES)]).mean(dim=0)
    for k in (0, 7):
        torch.testing.assert_close(new(x, torch.tensor([k])).fun, mean, rtol=1e-10, atol=1e-12)


def test_mean_of_classes_as_one_filter():
    source, target = FORMS["san conditional"], FORMS["gan unconditional"]
    old = make_head(source)
    new = converted_head(old, source, target, mean_of_all(NUM_CLASSES, 1))
    x = torch.randn(2, CHANNELS, START, START, dtype=torch.float64)
    mean = torch.stack([old(x, torch.full((2,), k)).fun for k in range(NUM_CLASSES)]).mean(dim=0)
    torch.testing.assert_close(new(x).fun, mean, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["san", "gan"])
def test_new_classes_can_come_apart(kind):
    """From one filter for all, gradients must tell classes apart: not all outputs may lie on one line."""
    source, target = FORMS["gan unconditional"], FORMS[f"{kind} conditional"]
    new = converted_head(make_head(source), source, target, None).train()
    x = torch.randn(8, CHANNELS, START, START, dtype=torch.float64)
    logits = new(x, torch.tensor([0, 1] * 4))
    (san.SANLogits.mean(logits).dir if kind == "san" else logits.fun.mean()).backward()
    gradient = new.last.embed.weight.grad
    assert gradient[:2].abs().max() > 1e-6
    assert relative_error(gradient[0], gradient[1]) > 1e-3
    weight = new.last.conv.weight_orig.flatten(1)
    assert torch.linalg.matrix_rank(weight) == CONDITIONAL.class_dim
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight), dtype=torch.float64))


# Awkward values.


def test_class_vectors_of_length_zero_and_negative_scales():
    source, target = FORMS["san conditional"], FORMS["gan conditional"]
    old = make_head(source)
    with torch.no_grad():
        old.last.embed.scale[0], old.last.embed.scale[1] = 0, -2.5
    classes = same_ids(NUM_CLASSES, NUM_CLASSES)
    plain = converted_head(old, source, target, classes)
    back = converted_head(plain, target, source, classes)
    x, labels = torch.randn(4, CHANNELS, START, START, dtype=torch.float64), torch.tensor([0, 1, 1, 2])
    expected = old(x, labels).fun
    assert expected[0].abs().max() == 0 and expected[1:].abs().min() > 0
    for head in (plain, back):
        torch.testing.assert_close(head(x, labels).fun, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.last.embed.weight.norm(dim=1), torch.ones(ROWS, dtype=torch.float64))


def test_a_zero_class_vector_becomes_a_unit_direction_of_scale_zero():
    source, target = FORMS["gan conditional"], FORMS["san conditional"]
    old = make_head(source)
    with torch.no_grad():  # leaky ReLU of zero is zero
        old.last.embed_proj.bias.zero_()
        old.last.embed.weight[1] = 0
    new = converted_head(old, source, target, same_ids(NUM_CLASSES, NUM_CLASSES))
    assert new.last.embed.scale[1] == 0
    torch.testing.assert_close(new.last.embed.weight.norm(dim=1), torch.ones(ROWS, dtype=torch.float64))


def test_negative_scale_of_an_unconditional_head():
    source, target = FORMS["san unconditional"], FORMS["gan unconditional"]
    old = make_head(source)
    with torch.no_grad():
        old.last.scale.fill_(-3.7)
    new = converted_head(old, source, target, None)
    x = torch.randn(2, CHANNELS, START, START, dtype=torch.float64)
    torch.testing.assert_close(new(x).fun, old(x).fun, rtol=1e-10, atol=1e-12)
    assert (new.last.weight_orig * new.last.inverse_sigma()).norm().item() == pytest.approx(1)


# Reasons why not.


def test_a_scale_needs_a_batchnorm_to_hold_it():
    source, target = FORMS["san unconditional"], FORMS["gan unconditional"]
    old = make_head(source, start=4)
    assert len(old.trunk) == 0
    with pytest.raises(ConversionError, match="no BatchNorm comes before"):
        converted_head(old, source, target, None, start=4)
    converted_head(
        make_head(target, start=4), target, source, None, start=4
    )  # the other way there is no such limit


def test_rows_too_narrow_for_the_class_vectors():
    cfg = replace(CONDITIONAL, embedding_dim=5)
    source, target = FORMS["san conditional"], HeadForm(cfg, "gan")
    with pytest.raises(ConversionError, match="width 5 cannot hold class vectors of 6"):
        converted_head(make_head(source), source, target, same_ids(NUM_CLASSES, NUM_CLASSES))


def test_more_class_channels_than_weights():
    cfg = replace(CONDITIONAL, class_dim=7 * 16 + 1, embedding_dim=200)
    with pytest.raises(ConversionError, match="113 orthogonal filters do not fit 112 weights"):
        converted_head(make_head(source := FORMS["san unconditional"]), source, HeadForm(cfg, "san"), None)


def test_a_filter_of_zeros_has_no_direction():
    source, target = FORMS["san unconditional"], FORMS["gan unconditional"]
    old = make_head(source)
    with torch.no_grad():
        old.last.scale.zero_()
    with pytest.raises(ConversionError, match="filter is zero"):
        converted_head(old, source, target, None)
