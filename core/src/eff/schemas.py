"""Everything that eff writes or reads as text, as pydantic models. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from eff.errors import DataError


class Schema(BaseModel):
    """Base of all: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="constants")


class ModelSpec(Schema):
    """Where an architecture comes from; enough to build it again without its weights."""

    source: str = Field(description="'zoo:digits_cnn', 'timm:NAME', 'hf:NAME', 'package.module:factory', 'pt2:PATH'.")
    options: dict[str, JsonValue] = Field({}, description="Keyword arguments of the source, e.g. num_classes.")

    @property
    def scheme(self) -> str:
        """The part of the source before the first colon."""
        return self.source.partition(":")[0]

    @property
    def name(self) -> str:
        """The part of the source after the first colon."""
        return self.source.partition(":")[2]


class TaskSpec(Schema):
    """A task by name with its options (classes, input shape, normalisation, ...), checked by the task."""

    name: str = "classification"
    options: dict[str, JsonValue] = {}


class DataSpec(Schema):
    """A data source as the user wrote it: `scheme:location?key=value&...`."""

    scheme: str = Field(description="corpus, csv, digits, folder, parquet, hf, npz, or an importable module.")
    location: str = Field("", description="Path, hub id or function name.")
    options: dict[str, str] = Field({}, description="What stood behind '?': train, test, seed, size, ...")

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """Read `digits`, `folder:PATH?train=5000&seed=0`, `PATH.parquet`, `PATH.npz`, `PATH.csv`, `hf:ID`, `module:function`.

        A path without a scheme is recognised by what lies there (see README, "Data").

        Raises:
            DataError: empty text, or a malformed option.
        """
        body, mark, query = text.rpartition("?") if "?" in text else (text, "", "")
        pairs = parse_qsl(query, keep_blank_values=True)
        if mark and (not pairs or any(not value for _, value in pairs)):
            raise DataError(f"data '{text}': write options as ?name=value&name=value, e.g. ?train=5000&seed=0")
        scheme, colon, location = body.partition(":")
        if not body or (colon and not location):
            raise DataError(f"data '{text}': nothing named; try 'digits' or 'folder:PATH'")
        if not colon or len(scheme) == 1:  # no scheme, or a Windows drive letter
            scheme, location = _guess_scheme(body)
        return cls(scheme=scheme, location=location, options=dict(pairs))

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        head = f"{self.scheme}:{self.location}" if self.location else self.scheme
        return head + (f"?{urlencode(self.options)}" if self.options else "")


def _guess_scheme(text: str) -> tuple[str, str]:
    if text == "digits":  # also where a run folder has that name; folder:digits is the folder
        return text, ""
    path = Path(text)
    if path.suffix in (".parquet", ".npz", ".csv"):
        return path.suffix[1:], text
    if path.is_dir():
        has_parquet = any(path.glob("*.parquet"))
        return ("parquet" if has_parquet else "folder"), text
    return text, ""


class TrainOptions(Schema):
    """How to train. None means: the method's recipe, else core's default (`CORE_TRAINING`)."""

    epochs: int | None = Field(None, ge=0, description="Passes over the training data; 0 trains nothing.")
    batch_size: int | None = Field(None, ge=1, description="Samples per batch, over all devices together.")
    accumulate: int | None = Field(None, ge=1, description="Batches whose gradients are averaged into one step.")
    lr: float | None = Field(None, ge=0, allow_inf_nan=False, description="Initial learning rate.")
    optimizer: str | None = Field(None, description="sgd, adam, adamw, or one an extension adds.")
    optimizer_options: dict[str, JsonValue] | None = Field(
        None, description="Further arguments of the optimizer's constructor, e.g. betas."
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="Momentum, for optimizers that take one.")
    weight_decay: float | None = Field(None, ge=0, description="Weight decay.")
    schedule: Literal["cosine", "constant"] | None = Field(None, description="Learning rate over the steps.")
    warmup: float | None = Field(None, ge=0, le=1, description="Share of the steps with a linear rise.")
    clip_norm: float | None = Field(None, ge=0, description="Largest gradient norm; 0 is off.")
    augment: bool | None = Field(None, description="The data's standard augmentations.")
    checkpoint_every: int | None = Field(None, ge=1, description="Steps between checkpoints; unset: each epoch.")

    def over(self, base: TrainOptions) -> TrainOptions:
        """Return `base` with every field that is set here put over it.

        `optimizer_options` belong to their optimizer: they are put over those of `base` one by one, or, where another
        optimizer is named here, instead of them.
        """
        changes = self.model_dump(exclude_none=True)
        if self.optimizer in (None, base.optimizer):
            options = (base.optimizer_options or {}) | (self.optimizer_options or {})
        else:
            options = self.optimizer_options or {}
        return base.model_copy(update={**changes, "optimizer_options": options or None})


CORE_TRAINING = TrainOptions(
    epochs=10, batch_size=64, accumulate=1, lr=0.05, optimizer="sgd", momentum=0.9, weight_decay=5e-4,
    schedule="cosine", warmup=0.0, clip_norm=0.0, augment=True,
)  # fmt: skip


class MethodUse(Schema):
    """One method of a run with the options that differ from its defaults."""

    name: str
    options: dict[str, JsonValue] = {}


Precision = Literal["fp32", "bf16", "fp16"]


class Recipe(Schema):
    """One run, complete: `eff apply --recipe` repeats it."""

    version: Literal[1] = 1
    model: str = Field(description="A file, a run folder or a model source.")
    arch: str | None = Field(None, description="Architecture for a bare state dict, e.g. zoo:cifar_resnet20.")
    task: TaskSpec | None = Field(None, description="The task; unset: from the checkpoint or the data.")
    data: str | None = Field(None, description="Data source; unset: the one the checkpoint names.")
    methods: tuple[MethodUse, ...] = ()
    train: TrainOptions = TrainOptions()
    device: str = "auto"
    devices: int = Field(1, ge=1, description="Processes that train data-parallel, one device each.")
    precision: Precision = "fp32"
    seed: int = Field(0, ge=0, lt=2**31)
    export: tuple[str, ...] | None = Field(None, description="Formats; unset: the methods' own first formats.")
    trust_pickle: bool = False


class Metric(Schema):
    """One measured number."""

    value: float
    unit: str = Field("", description="%, dB, ms, bits, ... ; empty for a plain number.")
    better: Literal["higher", "lower", "neither"] = "neither"


TableRow = dict[str, JsonValue]


class Metrics(Schema):
    """Numbers by name, and tables of rows (per layer, per class) by name."""

    values: dict[str, Metric] = {}
    tables: dict[str, list[TableRow]] = {}

    @classmethod
    def of(cls, **values: Metric) -> Metrics:
        """Return metrics from keyword arguments."""
        return cls(values=values)

    @classmethod
    def merge(cls, parts: Iterable[tuple[str, Metrics]]) -> Metrics:
        """Return all parts as one; `parts` are (who reported it, metrics).

        Raises:
            PluginError: one name is reported twice; both reporters are named.
        """
        from eff.errors import PluginError

        values: dict[str, Metric] = {}
        tables: dict[str, list[TableRow]] = {}
        owner: dict[str, str] = {}
        for who, part in parts:
            for name in (*part.values, *part.tables):
                if name in owner:
                    raise PluginError(f"metric '{name}' is reported by {owner[name]} and by {who}; one must rename it")
                owner[name] = who
            values |= part.values
            tables |= part.tables
        return cls(values=values, tables=tables)


class ExportTarget(Schema):
    """What an export writes and where; the path is a temporary name beside the final one."""

    format: str
    path: Path


class Artifact(Schema):
    """A file that a run wrote for others to use."""

    path: Path
    format: str
    bytes: int = Field(ge=0)
    sha256: str
    details: dict[str, JsonValue] = {}


class AppliedMethod(Schema):
    """A method as it was applied, enough to rebuild its structure."""

    name: str
    version: str
    distribution: str
    config: dict[str, JsonValue]
    structure: dict[str, JsonValue] = {}


class CheckpointHeader(Schema):
    """What a model file says of itself, stored beside the tensors."""

    format: Literal["eff-checkpoint"] = "eff-checkpoint"
    version: Literal[1] = 1
    eff: str = Field(description="Version of eff-core that wrote it.")
    model: ModelSpec
    task: TaskSpec
    data: str | None = None
    methods: tuple[AppliedMethod, ...] = ()
    encoding: str | None = Field(None, description="Set where the tensors are packed; names the decoder.")
    encoding_details: dict[str, JsonValue] = {}


class Measurement(Schema):
    """A model measured: quality, size, speed."""

    metrics: Metrics
    parameters: int
    bytes: int = Field(description="Size of the file one would ship.")
    latency_ms: float | None = Field(None, description="Median of one forward pass with one sample.")
    latency_p90_ms: float | None = None


class TrainingSummary(Schema):
    """How the training went."""

    steps: int
    epochs: int
    seconds: float
    resumed_at: int | None = None
    loss: list[float] = Field([], description="Mean loss of each epoch.")


class Report(Schema):
    """What a run did and what came of it; `report.json`."""

    version: Literal[1] = 1
    recipe: Recipe
    methods: tuple[AppliedMethod, ...]
    before: Measurement | None
    after: Measurement | None
    training: TrainingSummary | None
    artifacts: tuple[Artifact, ...]
    warnings: tuple[str, ...]
    seed: int
    device: str
    data: str | None
    data_fingerprint: str | None
    versions: dict[str, str]
    started: str
    seconds: float
    peak_memory_bytes: int | None = Field(
        None, description="Most memory in use: of the process on a CPU, of the tensors on a GPU; None where unknown."
    )

    @field_validator("artifacts")
    @classmethod
    def _names_are_unique(cls, artifacts: tuple[Artifact, ...]) -> tuple[Artifact, ...]:
        paths = [artifact.path for artifact in artifacts]
        if len(set(paths)) != len(paths):
            raise ValueError("two artifacts have the same path")
        return artifacts


class CheckResult(Schema):
    """One comparison of a claim, measured."""

    check: str = Field(description="In words, e.g. 'lsq >= minmax + 1.0'.")
    left: float
    right: float
    gap: float
    spread: float | None = Field(None, description="Standard deviation of the paired differences over seeds.")
    holds: bool


class ClaimResult(Schema):
    """A claim after it ran."""

    plugin: str
    id: str
    statement: str
    paper: str
    unit: str
    units: dict[str, str] = {}
    seeds: tuple[int, ...]
    measured: dict[str, list[float]]
    checks: tuple[CheckResult, ...]
    holds: bool
    seconds: float

    def unit_of(self, setting: str) -> str:
        """Return the unit of one setting's values."""
        return next(
            (unit for name, unit in self.units.items() if setting == name or setting.endswith("_" + name)), self.unit
        )
