# SPDX-License-Identifier: MIT
"""Every number of a run, as frozen dataclasses that check themselves and read and write JSON.

`presets/` fills them in, `cli.py` overrides them with flags, `training_options.json` and every network
file store them. Nothing rescales a value later: what is written here is what the code uses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch_utils.errors import UserError
from training.dcgan_config import AutoencoderConfig, DCGANDiscriminatorConfig, DCGANGeneratorConfig

T = TypeVar("T")
Precision = Literal["paper", "fp32", "bf16", "fp16"]
FeaturePrecision = Literal["paper", "tf32", "bf16"]


class ConfigError(UserError):
    """A configuration that breaks a rule; the message names the values, the rule and the fix."""


@dataclass(frozen=True, kw_only=True)
class MappingConfig:
    """Mapping network of StyleGAN-XL: latent and class embedding to style vectors."""

    z_dim: int = 64  # width of the latent z, and of the projected class embedding
    w_dim: int = 512  # width of one style vector w
    c_dim: int = 0  # number of classes; 0 = unconditional
    num_layers: int = 2  # fully connected layers after the class embedding
    num_embeddings: int = 1000  # rows of the class embedding table; at least c_dim. Official tables have 1000
    embedding_dim: int = 320  # width of one row: pooled last-stage channels of EfficientNet-Lite0
    lr_multiplier: float = 0.01  # learning rate of the fully connected layers relative to the optimizer's
    w_avg_beta: float = 0.998  # decay per update of the running mean of w, used for truncation


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """Alias-free synthesis network of StyleGAN3. Frequencies in cycles per image width."""

    img_resolution: int  # side of the square output, pixels
    img_channels: int = 3  # channels of the output
    channel_base: int = 65536  # feature maps of a layer = channel_base / 2 / cutoff ...
    channel_max: int = 1024  # ... but at most this many
    num_layers: int = 14  # layers before ToRGB
    num_critical: int = 2  # critically sampled layers before ToRGB
    first_cutoff: float = 2.0  # f_c of the first layer
    first_stopband: float = 2**2.1  # f_t of the first layer
    last_stopband_rel: float = 2**0.3  # f_t of the last layer, relative to its cutoff
    margin_size: int = 10  # pixels kept beyond every border of the feature maps
    output_scale: float = 0.25  # factor on the output of ToRGB
    conv_kernel: int = 3  # 3 for stylegan3-t, 1 for stylegan3-r
    use_radial_filters: bool = False  # radially symmetric downsampling filters (stylegan3-r)
    filter_size: int = 6  # taps of a low-pass filter per unit of the resampling factor
    lrelu_upsampling: int = 2  # oversampling inside the filtered leaky ReLU
    conv_clamp: float | None = 256.0  # bound on activations inside the filtered leaky ReLU; None = no bound
    num_fp16_res: int = 4  # layers of the N highest sampling rates run in fp16 on CUDA; 0 = none
    magnitude_ema_beta: float = 0.999  # decay of the running input magnitude, per update


@dataclass(frozen=True, kw_only=True)
class SuperresConfig:
    """One super-resolution stage: the last layers below it go, a head of new layers comes (StyleGAN-XL).

    What is not here, such as channels and margins, the head takes from the stem's SynthesisConfig.
    """

    up_factor: int  # new resolution relative to the one below: 2, 4, 8 or 16
    head_layers: int  # new layers before ToRGB
    conv_kernel: int = 3  # 3 for stylegan3-t, 1 for stylegan3-r; may differ from the stem's
    use_radial_filters: bool = False  # radially symmetric downsampling filters (stylegan3-r)
    conv_clamp: float | None = 256.0  # bound on activations in the head, whatever the stem's
    magnitude_ema_beta: float = 0.999  # decay of the head's running input magnitude, per update


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Everything needed to build a generator; stored in every network file."""

    mapping: MappingConfig = field(default_factory=MappingConfig)  # latent -> style vectors
    synthesis: SynthesisConfig  # style vectors -> images, of the stem
    superres: tuple[SuperresConfig, ...] = ()  # super-resolution stages on top of the stem, in order

    @property
    def img_resolution(self) -> int:
        """Side of the final images, pixels."""
        return self.synthesis.img_resolution * math.prod(stage.up_factor for stage in self.superres)

    @property
    def c_dim(self) -> int:
        """Number of classes; 0 = unconditional."""
        return self.mapping.c_dim


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Projected discriminator: frozen feature networks, frozen random projections, trained heads."""

    img_resolution: int  # side of the images it sees, pixels
    c_dim: int = 0  # number of classes; 0 = unconditional
    backbones: tuple[str, ...] = (
        "deit_base_distilled_patch16_224",
        "tf_efficientnet_lite0",
    )  # timm names, in order
    feature_resolution: int | None = 224  # side images are resized to (ViTs always 224); None = as they are
    nominal_resolution: int = 256  # side that the heads' depth is planned for; the official code fixes 256
    projected_channels: int = 64  # of the finest projected level; coarser ones have 1, 2, 4 times as many
    num_levels: int = 4  # feature levels that get a head, from the finest
    head_resolution: int = 8  # heads halve their (nominal) input until this side, then classify 4x4 patches
    max_head_channels: int = 512  # bound on the channels inside a head
    class_dim: int = 64  # width of the conditional projection
    num_class_embeddings: int = 1000  # rows of a conditional head's class table; at least c_dim
    embedding_dim: int = 320  # width of a row of that table in plain GAN heads; SAN heads use class_dim
    augment_policy: str = "color,translation,cutout"  # DiffAugment operations; empty = none
    official_batchnorm_statistics: bool = False  # repeat the official shift of the CNN's statistics


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms beside the adversarial loss, and the image blur."""

    blur_init_sigma_px: float = 2.0  # standard deviation (base-2 Gaussian) of the blur before D at the start
    blur_fade_kimg: float = 300.0  # the blur reaches zero after so many thousand images; 0 = no blur
    pl_weight: float = 2.0  # weight of the path-length penalty; 0 = off
    pl_start_kimg: float = 1000.0  # path length starts after so many thousand images
    pl_decay: float = 0.01  # step of the running mean of path lengths, per 64 images
    pl_batch_shrink: int = 2  # path length uses 1/N of a batch
    style_mixing_prob: float = 0.0  # probability of crossing over to a second latent
    cls_weight: float = 0.0  # classifier guidance as the paper's flag counts it; 0 = off


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How `--cfg dcgan` trains D beside its loss: steps, constraints, and what single objectives add."""

    num_steps: int = 1  # updates of D per update of G, each on a batch of its own
    weight_clip: float = 0.0  # D's weights stay within +- this bound (WGAN); 0 = free
    penalty: Literal["none", "wgan_gp", "dragan", "r1_r2"] = "none"  # see training/penalties.py
    penalty_weight: float = 0.0  # of the mean penalty, as its paper writes it (r1_r2: gamma / 2)
    curriculum_kimg: float = 0.0  # thousands of images until only the strongest critic counts
    categorical_weight: float = 1.0  # lambda of InfoGAN's categorical code
    continuous_weight: float = 0.1  # lambda of InfoGAN's continuous codes
    began_gamma: float = 0.5  # BEGAN's diversity ratio, wanted E[L(G(z))] / E[L(x)]
    began_k_lr: float = 0.001  # BEGAN's lambda_k, step of its equilibrium k


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam or RMSProp, with the values before the correction for lazy regularisation (see `adjusted`)."""

    kind: Literal["adam", "rmsprop"] = "adam"  # rmsprop decays its one moment by the second beta
    lr: float  # learning rate
    betas: tuple[float, float] = (0.0, 0.99)  # decays of the moments
    eps: float = 1e-8  # added to the denominator
    reg_interval: int = 0  # the regularisation step runs every N iterations; 0 = never and no correction

    def adjusted(self) -> tuple[float, tuple[float, float]]:
        """Learning rate and betas after StyleGAN2's correction for lazy regularisation (arXiv:1912.04958, App. B)."""
        if self.reg_interval == 0:
            return self.lr, self.betas
        ratio = self.reg_interval / (self.reg_interval + 1)
        return self.lr * ratio, (self.betas[0] ** ratio, self.betas[1] ** ratio)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training images."""

    path: str  # zip, folder, or the name of a built-in set ("digits")
    use_labels: bool = False  # condition on dataset.json's labels
    mirror: bool = False  # add every image flipped left to right
    max_size: int | None = None  # use a random subset of so many images; None = all
    seed: int = 0  # of the subset and of the order
    num_workers: int = 3  # loader processes; 0 = load in the training process


AnyGeneratorConfig = GeneratorConfig | DCGANGeneratorConfig
AnyDiscriminatorConfig = DiscriminatorConfig | DCGANDiscriminatorConfig | AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    loss: Literal["san", "gan"] = "san"  # SAN heads and objective, or plain ones
    normalizes_san_weights: bool = False  # SAN's weights r_J have mean 1 in every real or fake batch
    objective: str = "hinge"  # in san.OBJECTIVES; with --cfg dcgan also in PAIRED_OBJECTIVES, and "began"
    data: DataConfig  # training images
    generator: AnyGeneratorConfig  # G and G_ema
    discriminator: AnyDiscriminatorConfig  # D
    loss_terms: LossConfig = field(default_factory=LossConfig)  # blur, path length, guidance
    critic: CriticConfig = field(default_factory=CriticConfig)  # steps and constraints of D, with --cfg dcgan
    generator_optimizer: OptimizerConfig  # of G
    discriminator_optimizer: OptimizerConfig  # of D
    embedding_source: str = "random"  # rows: "random", "data" (class means), a file, "stem", "checkpoint"
    batch_size: int  # images per optimizer step, all processes together
    microbatch_size: int  # images per forward pass of one process
    sync_batchnorm: bool = False  # D's BatchNorm is over all processes, not over its own micro-batch
    total_kimg: float = 25000.0  # length of the run, thousands of real images
    tick_kimg: float = 4.0  # progress is reported every so many thousand images
    san_diagnostics_interval: int = 32  # SAN/* in the log every N steps of D; 0 = never
    snapshot_ticks: int = 50  # images, network file and metrics every N ticks; 0 = at the end only
    metrics: tuple[str, ...] = ()  # names in metrics.names, "name:5" for every fifth snapshot
    best_by: str | None = None  # result that picks best_model; None = the first of the first metric
    evaluate_at_start: bool = False  # also compute the metrics before the first step
    ema_halflife_kimg: float  # half-life of G_ema's weights, thousands of images
    ema_rampup: float | None = 0.05  # half-life at most this fraction of the images seen; None = no limit
    seed: int = 0  # of weights, latents and augmentation
    resume: str | None = None  # network file to start from
    classes_from: str = "auto"  # with resume: "same", "names", "nearest", "mean", a list, or a file
    frozen_head_blocks: int = 0  # first blocks of every head of D that stay as they are; 0 = none
    path_stem: str | None = None  # network file under the last super-resolution stage; None = trains a stem
    trains_stem_input: bool = False  # a stage also trains the stem's Fourier features, as officially
    benchmark: bool = True  # let cuDNN pick kernels by timing them
    checkpoint_activations: bool = False  # backward passes compute activations again instead of keeping them
    precision: Precision = "paper"  # of G while it trains; paper: fp16 on CUDA as num_fp16_res says
    feature_precision: FeaturePrecision = "paper"  # of D's frozen networks; paper: float32 without TF32

    @property
    def trains_head_only(self) -> bool:
        """True in a super-resolution stage on a stem of its own: G is trained in the last stage's layers only."""
        return self.path_stem is not None

    @property
    def is_dcgan(self) -> bool:
        """True for the small networks of `--cfg dcgan`, False for StyleGAN-XL's."""
        return isinstance(self.generator, DCGANGeneratorConfig)

    @property
    def nimg_per_iteration(self) -> int:
        """Real images that one iteration takes: a batch for every step of D."""
        return self.batch_size * self.critic.num_steps

    def validate(self, world_size: int = 1) -> None:
        """Raise ConfigError for values that contradict each other."""
        images_per_pass = self.microbatch_size * world_size
        if self.batch_size < 1 or self.microbatch_size < 1:
            raise ConfigError(
                f"--batch {self.batch_size} and --batch-gpu {self.microbatch_size} must be at least 1"
            )
        if self.batch_size % images_per_pass:
            raise ConfigError(
                f"--batch {self.batch_size} is not a multiple of --batch-gpu x processes = "
                f"{self.microbatch_size} x {world_size} = {images_per_pass}"
            )
        if self.san_diagnostics_interval < 0:
            raise ConfigError(
                f"san_diagnostics_interval={self.san_diagnostics_interval} is negative; 0 switches it off"
            )
        if self.frozen_head_blocks and self.resume is None:
            raise ConfigError(
                f"--freezed {self.frozen_head_blocks} without --resume would freeze random weights; add --resume FILE"
            )
        if self.checkpoint_activations and self.is_dcgan:
            raise ConfigError(
                "--checkpoint-activations 1 is for StyleGAN-XL's networks; --cfg dcgan's are small, so leave it out"
            )
        if self.trains_head_only and (self.is_dcgan or not self.generator.superres):
            raise ConfigError(
                f"--path_stem {self.path_stem} belongs to a super-resolution stage; add --superres, or leave it out"
            )
        if self.trains_head_only and self.loss_terms.pl_weight:
            raise ConfigError(
                f"pl_weight={self.loss_terms.pl_weight} needs a mapping network that is trained, and a "
                "super-resolution stage freezes it; set it to 0"
            )


def to_json(config: Any) -> str:
    """Indented JSON of a configuration; `from_json` reads it back unchanged."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(cls: type[T], text: str) -> T:
    """Rebuild `cls` from `to_json`'s text. Raises ConfigError for unknown or missing fields."""
    return from_dict(cls, json.loads(text))


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild a nested frozen dataclass, or the one of a union that `values["kind"]` names, from dicts and lists."""
    cls = _pick_member(cls, values)
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ConfigError(
            f"{cls.__name__} has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}"
        )
    kwargs = {}
    for name, value in values.items():
        hint = hints[name]
        items = typing.get_args(hint)  # of tuple[SuperresConfig, ...]: the dataclass and an ellipsis
        is_union = isinstance(hint, types.UnionType) and dataclasses.is_dataclass(items[0])
        if is_union or dataclasses.is_dataclass(hint):
            value = from_dict(hint, value)
        elif isinstance(value, list):
            is_nested = bool(items) and dataclasses.is_dataclass(items[0])
            value = tuple(from_dict(items[0], item) if is_nested else item for item in value)
        kwargs[name] = value
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


def _pick_member(hint: Any, values: dict[str, Any]) -> Any:
    """The dataclass of a union that `values` are for, by its field `kind`; StyleGAN-XL's, the first, has none."""
    if not isinstance(hint, types.UnionType):
        return hint
    kinds = {getattr(member, "kind", None): member for member in typing.get_args(hint)}
    if (kind := values.get("kind")) not in kinds:
        known = ", ".join(repr(name) for name in kinds if name is not None)
        raise ConfigError(f"networks of kind {kind!r} are unknown here; this code knows {known}")
    return kinds[kind]
