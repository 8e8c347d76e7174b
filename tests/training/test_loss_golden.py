# SPDX-License-Identifier: MIT
"""Losses and gradients of all three steps against the official ones (d_loss_*.npz).

The official losses are sums over the samples of a pass, ours are means: everything adversarial is compared after
multiplying ours by N. The official guidance term is a mean already, so its weight w at N samples is w * 8 / N in
our flag, which counts as the published runs do, with N = 8.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from torch_utils.stats import StatsCollector
from training.config import TrainConfig
from training.discriminator.projected import ProjectedDiscriminator
from training.draws import Draws
from training.loss import PAPER_MICROBATCH_SIZE, GuidanceClassifier, ProjectedGANLoss
from training.presets import stylegan_xl
from training.train_step import Batch, StepContext, discriminator_step, generator_step, path_length_step

DATA = Path(__file__).parents[1] / "data"
LITE0 = "tf_efficientnet_lite0"
NUM_WS, IMAGE_SHAPE = 4, (3, 16, 16)
Fill = Callable[[str, list], dict[str, torch.Tensor]]  # the fixture `filled`


# Networks with the golden files' weights.


def our_name(name: str) -> str:
    """Our name for an official feature_networks... or discriminators.<backbone>.mini_discs.<k>... of Lite0."""
    root, backbone, part, *rest = name.split(".")
    if root == "discriminators":
        level, head, *rest = rest
        if head in ("main", "last_layer"):
            tail = ".".join(["trunk", rest[0], *rest[2:]]) if "main" in rest else f"last.{rest[-1]}"
        else:
            tail = f"last.{'conv' if head == 'cls' else head}.{rest[-1]}"
        return f"heads.{backbone}.{level}.{tail}"
    if part == "scratch":  # layer2_ccm, layer2_csm.out_conv
        level, kind = rest[0].removeprefix("layer").split("_")
        return f"projectors.{backbone}.{kind}.{level}.{rest[-1]}"
    prefix = f"feature_networks.{backbone}.backbone"
    layer, index = int(rest[0].removeprefix("layer")), int(rest[1])
    if layer == 0 and index < 2:
        return f"{prefix}.{('conv_stem', 'bn1')[index]}.{rest[-1]}"
    stage = {0: -3, 1: 2, 2: 3, 3: 5}[layer] + index
    return f"{prefix}.blocks.{stage}." + ".".join(rest[2:])


def filled_discriminator(config: TrainConfig, values: dict[str, torch.Tensor], is_folded: bool):
    """D with the golden file's weights, loaded before the feature network's BatchNorm layers are merged."""
    D = ProjectedDiscriminator(config.discriminator, config.loss, pretrained=False)
    features = D.feature_networks[LITE0]
    features.backbone = timm.create_model(LITE0, features_only=True).requires_grad_(False).eval()
    missing, unexpected = D.load_state_dict(values, strict=False)
    assert not unexpected and all("num_batches_tracked" in name for name in missing)
    if is_folded:
        features.fold_batchnorm_()
    D.set_trainable_(False)
    return D


class ToyGenerator(nn.Module):
    """The golden files' generator: two matrices, a class table, tanh."""

    def __init__(self, golden: dict, is_conditional: bool) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.from_numpy(golden[f"cond/{name}"])) for name in "AB")
        self.E = nn.Parameter(torch.from_numpy(golden["cond/E"])) if is_conditional else None

    def styles_of(self, z, labels):
        w = z @ self.A.T if self.E is None else z @ self.A.T + self.E[labels]
        return w.unsqueeze(1).repeat(1, NUM_WS, 1)

    def synthesis(self, ws):
        mixed = sum((i + 1) / 10 * ws[:, i] for i in range(NUM_WS))
        return torch.tanh(mixed @ self.B.T).view(len(ws), *IMAGE_SHAPE)

    def update_w_avg_(self, w, ids, num_moves):
        """It has none."""


class GivenNoise(Draws):
    """Draws that are the golden file's."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__(0, np.arange(len(noise)))
        object.__setattr__(self, "noise", noise)

    def __getitem__(self, part):
        return GivenNoise(self.noise[part])

    def normal(self, purpose, *shape):
        assert purpose == "noise"
        return self.noise.view(-1, *shape).clone()


class RecordingStats(StatsCollector):
    """Keeps the reported values themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[torch.Tensor]] = {}

    def report(self, name, values):
        self.values.setdefault(name, []).append(torch.as_tensor(values).detach().clone())


class Case:
    """Networks, batch and golden arrays of one case."""

    def __init__(self, kind: str, name: str, filled: Fill, is_folded: bool = True) -> None:
        with np.load(DATA / f"d_loss_{kind}.npz") as data:
            self.all = {key: data[key] for key in data.files}
        self.golden = {k.removeprefix(name + "/"): v for k, v in self.all.items() if k.startswith(name + "/")}
        is_conditional = name == "cond"
        self.num_samples = len(self.golden["z"])
        self.config = make_config(kind, 10 if is_conditional else 0, self.num_samples)
        flag = float(self.golden["cls_weight"]) * PAPER_MICROBATCH_SIZE / self.num_samples
        self.config = replace(self.config, loss_terms=replace(self.config.loss_terms, cls_weight=flag))
        values = filled(f"pub.{kind}.lossD.{name}", json.loads(str(self.golden["D_names"])))
        self.D = filled_discriminator(self.config, {our_name(n): v for n, v in values.items()}, is_folded)
        self.G = ToyGenerator(self.all, is_conditional)
        guidance = None
        if is_conditional:
            guidance = make_classifier(filled("pub.cls", json.loads(str(self.golden["cls_names"]))))
        names = ("real_img", "real_ids", "z", "gen_ids")
        draws = Draws(0, np.arange(self.num_samples))
        self.batch = Batch(*(torch.from_numpy(self.golden[name]) for name in names), draws)
        self.context = StepContext(self.config, ProjectedGANLoss(self.config, guidance), RecordingStats())
        self.context.cur_nimg = int(self.golden["cur_nimg"])

    def run(self, step: Callable[..., None], network: nn.Module) -> dict[str, list[torch.Tensor]]:
        """Make one step that leaves the weights where they are; what it reported."""
        self.context.stats.values = {}
        step(self.G, self.D, standing_still(network), self.batch, self.context)
        return self.context.stats.values


def make_config(kind: str, c_dim: int, batch_size: int) -> TrainConfig:
    config = stylegan_xl(c_dim=c_dim, batch_size=batch_size, microbatch_size=batch_size)
    discriminator = replace(config.discriminator, backbones=(LITE0,), augment_policy="")
    return replace(config, loss=kind, discriminator=discriminator)


def standing_still(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=0.0)


def make_classifier(values: dict[str, torch.Tensor]) -> GuidanceClassifier:
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    model.load_state_dict(values)
    return GuidanceClassifier(model)


# Comparison.


def check(actual: torch.Tensor, expected: np.ndarray, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """rtol, plus atol relative to the largest expected value."""
    atol = atol * float(np.abs(expected).max())
    np.testing.assert_allclose(
        actual.detach().numpy().reshape(-1), expected.reshape(-1), rtol=rtol, atol=atol
    )


def subsampled(values: torch.Tensor, count: int) -> torch.Tensor:
    flat = values.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count]


def stored(golden: dict, key: str) -> np.ndarray:
    """An array that is stored whole or as a sample of it."""
    return golden[key] if key in golden else golden[key + "__sub"]


def check_stored(golden: dict, key: str, value: torch.Tensor) -> None:
    expected = stored(golden, key)
    check(subsampled(value, expected.size), expected)
    if key + "__stats" in golden:
        wide = value.detach().double()
        rms, largest = wide.square().mean().sqrt().item(), wide.abs().max().item()
        np.testing.assert_allclose([rms, largest], golden[key + "__stats"][1:], rtol=1e-3, atol=1e-6)


def check_behind_corners(golden: dict, key: str, value: torch.Tensor) -> None:
    """A gradient that has passed ReLU6 or leaky ReLU layers.

    Of a million activations, rounding carries a few across a corner, where gradients jump: hence the norm of the
    error, a bound for other flips than ours; the slow test below shows that nothing else differs.
    """
    expected = stored(golden, key).reshape(-1)
    error = subsampled(value, expected.size).numpy() - expected
    if np.abs(expected).max() < 1e-5:  # zero but for rounding: a bias before BatchNorm
        assert np.abs(error).max() < 1e-5
    else:
        assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(expected), key


CASES = [(kind, name) for kind in ("san", "gan") for name in ("uncond", "cond")]


@functools.cache
def steps(kind: str, name: str, filled: Fill) -> dict:
    """The case after both steps, what each reported, and the gradients that the generator's step left."""
    case = Case(kind, name, filled)
    result = {"case": case, "G": case.run(generator_step, case.G)}
    result["G_gradients"] = {n: p.grad.clone() for n, p in case.G.named_parameters()}
    result["D_gradients_of_G_step"] = [n for n, p in case.D.named_parameters() if p.grad is not None]
    return result | {"D": case.run(discriminator_step, case.D)}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_generator_step_matches_official(kind, name, filled):
    result = steps(kind, name, filled)
    case, golden, stats = result["case"], result["case"].golden, result["G"]
    N = case.num_samples
    check(torch.cat(stats["Loss/scores/fake"]), golden["Gmain/Loss/scores/fake"])
    check(N * stats["Loss/G/loss"][0], golden["Gmain/Loss/G/loss"])
    if name == "cond":
        check(stats["Loss/G/guidance_loss"][0], golden["Gmain/Loss/G/guidance_loss"], rtol=1e-4, atol=0)
    assert set(result["G_gradients"]) == ({"A", "B", "E"} if name == "cond" else {"A", "B"})
    for matrix, gradient in result["G_gradients"].items():
        check_behind_corners(golden, f"Gmain/grad_G/{matrix}", N * gradient)
    assert not golden["Gmain/D_has_grad"] and not result["D_gradients_of_G_step"]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_discriminator_step_matches_official(kind, name, filled):
    result = steps(kind, name, filled)
    case, golden, stats = result["case"], result["case"].golden, result["D"]
    N = case.num_samples
    check(torch.cat(stats["Loss/scores/fake"]), golden["Dmain/Loss/scores/fake"])
    check(torch.cat(stats["Loss/scores/real"]), golden["Dmain/Loss/scores/real"])
    check(N * stats["Loss/D/loss"][0], golden["Dmain/Loss/D/loss"])
    official = {our_name(n) for n in json.loads(str(golden["Dmain/params_with_grad"]))}
    assert {n for n, p in case.D.named_parameters() if p.grad is not None} == official
    gradients = official_gradients(golden)
    assert len(gradients) >= 15
    for key, name_in_D in gradients.items():
        gradient = N * case.D.get_parameter(name_in_D).grad
        if f"{key}__nonzero_rows" in golden:  # an embedding: only rows of classes in the batch
            assert int(gradient.flatten(1).any(dim=1).sum()) == golden[f"{key}__nonzero_rows"]
            gradient = gradient[torch.from_numpy(golden["Dmain/embed_rows"])]
        (check_behind_corners if ".trunk." in name_in_D else check_stored)(golden, key, gradient)


def official_gradients(golden: dict) -> dict[str, str]:
    """{key of a stored gradient of D: our name of the parameter}."""
    prefix = "Dmain/grad_D/"
    keys = {k.removesuffix("__sub") for k in golden if k.startswith(prefix)}
    keys = {k for k in keys if not k.endswith(("__stats", "__nonzero_rows"))}
    return {key: our_name(key.removeprefix(prefix)) for key in sorted(keys)}


@pytest.mark.parametrize("name", ["uncond", "cond"])
def test_directions_after_the_step_match_official(name, filled):
    case = steps("san", name, filled)["case"]
    last = case.D.heads[LITE0][0].last
    if name == "cond":
        rows = torch.from_numpy(case.golden["normalized_weight_disc0"])
        torch.testing.assert_close(last.embed.weight.detach()[: len(rows)], rows, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(last.embed.weight.norm(dim=1), torch.ones(1000))
    else:
        check_stored(case.golden, "normalized_weight_disc0", last.weight)


@pytest.fixture
def path_length():
    """Golden arrays, generator, batch of five latents and context; the noise is the golden one."""
    with np.load(DATA / "d_loss_san.npz") as data:
        golden = {key: data[key] for key in data.files if key.startswith(("pl/", "cond/"))}
    raw_noise = torch.from_numpy(golden["pl/noise"])
    labels = torch.tensor([1, 2, 3, 4, 5])
    z = torch.from_numpy(golden["pl/z"])
    batch = Batch(torch.zeros(5, 3, 16, 16), labels, z, labels, GivenNoise(raw_noise))
    config = make_config("san", 10, 5)
    context = StepContext(config, ProjectedGANLoss(config), RecordingStats())
    return golden, ToyGenerator(golden, is_conditional=True), batch, context


def test_path_length_matches_official(path_length):
    golden, G, batch, context = path_length
    mean = torch.tensor(float(golden["pl/pl_mean_before"]))
    mean = path_length_step(G, standing_still(G), batch, mean, context)
    check(context.stats.values["Loss/pl_penalty"][0], golden["pl/Loss/pl_penalty"])
    check(context.stats.values["Loss/G/reg"][0], golden["pl/Loss/G/reg"].mean())
    np.testing.assert_allclose(mean.item(), golden["pl/pl_mean_after"], rtol=1e-6)
    assert not mean.requires_grad
    for matrix, parameter in G.named_parameters():
        # Ours is a share of 1/8, as the adversarial terms are means here and were sums of 8 in the published runs.
        check_stored(golden, f"pl/grad/{matrix}", parameter.grad * PAPER_MICROBATCH_SIZE)


# Nothing but corners.


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gradients_differ_at_corners_only(kind, name, filled):
    """Moving a few activations that lie within rounding of a corner across it gives the official gradients."""
    case = Case(kind, name, filled, is_folded=False)
    golden, labels = case.golden, case.batch.fake_labels
    corners = Corners(case.D)
    images = case.G.synthesis(case.G.styles_of(case.batch.z, labels))
    loss = case.context.loss
    clock = (case.context.cur_nimg, case.context.stats)
    parts = {f"Gmain/grad_G/{n}": p for n, p in case.G.named_parameters()}
    corners.explain(case, parts, loss.generator_loss(case.D, images, case.batch, *clock))

    case.D.set_trainable_(True)
    fake = loss.fake_loss(case.D, images.detach(), case.batch, *clock)
    real = loss.real_loss(case.D, case.batch, *clock)
    parts = {k: case.D.get_parameter(n) for k, n in official_gradients(golden).items() if ".trunk." in n}
    parts = {k: p for k, p in parts.items() if np.abs(stored(golden, k)).max() > 1e-5}
    corners.explain(case, parts, fake + real)


class Corners:
    """Records what goes into and comes out of all ReLU6 and leaky ReLU layers of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.recorded: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        for module in network.modules():
            if isinstance(module, (nn.LeakyReLU, nn.ReLU6)):
                module.inplace = False
                module.register_forward_hook(self.record)

    def record(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            self.recorded.append((module, inputs[0], output))

    def explain(self, case: Case, parts: dict[str, nn.Parameter], mean_loss: torch.Tensor) -> None:
        """Assert that `parts` have their official gradients after crossing few corners, best ones first."""
        (case.num_samples * mean_loss).backward(retain_graph=True)
        expected = [stored(case.golden, key).reshape(-1) for key in parts]
        tolerance = np.concatenate([1e-4 * np.abs(x).max() + 1e-3 * np.abs(x) for x in expected])

        def scaled(gradients: list[torch.Tensor]) -> np.ndarray:
            sampled = [subsampled(g, len(x)).numpy() for g, x in zip(gradients, expected, strict=True)]
            return np.concatenate(sampled) / tolerance

        error = np.concatenate(expected) / tolerance - scaled([p.grad for p in parts.values()])
        effects = [
            scaled(effect) for entry in self.recorded for effect in crossings(*entry, [*parts.values()])
        ]
        num_crossings = 0
        while (np.abs(error) > 1).any():
            best = min((error - effect for effect in effects), key=np.linalg.norm)
            assert np.linalg.norm(best) < 0.95 * np.linalg.norm(error), "no crossing explains the rest"
            error, num_crossings = best, num_crossings + 1
        assert num_crossings < 20
        self.recorded.clear()


def crossings(
    module: nn.Module, before: torch.Tensor, after: torch.Tensor, parameters: list[nn.Parameter]
) -> list[list[torch.Tensor]]:
    """What the gradients gain if one activation near a corner were on its other side, for each such one."""
    effects = []
    flat, gradient = before.reshape(-1), after.grad.reshape(-1)
    is_leaky = isinstance(module, nn.LeakyReLU)
    for corner in (0.0,) if is_leaky else (0.0, 6.0):
        near = (flat.detach() - corner).abs() < 2e-6 * flat.detach().abs().max()
        for index in near.nonzero().flatten().tolist():
            is_open = flat[index] > 0 if is_leaky else 0 < flat[index] < 6
            jump = (1 - module.negative_slope) if is_leaky else 1.0
            step = gradient[index] * (-jump if is_open else jump)
            gains = torch.autograd.grad(flat[index], parameters, retain_graph=True, allow_unused=True)
            effects.append(
                [
                    torch.zeros_like(p) if g is None else g * step
                    for g, p in zip(gains, parameters, strict=True)
                ]
            )
    return effects
