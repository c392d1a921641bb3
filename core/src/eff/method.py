"""What a plugin author imports: `Method`, `MethodConfig`, `Card`, `Claim`, `Sample`, `Extension`, `hookimpl`.

Imports no torch, so that options can be checked and cards shown quickly.

    class LSQConfig(MethodConfig):
        weight_bits: int = Field(4, ge=2, le=8, description="Bit width of the weights.")

    class LSQ(Method[LSQConfig]):
        card = Card(title="Learned Step Size Quantization", paper="arXiv:1902.08153", ...)

        @hookimpl
        def transform(self, model, run): ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from eff.hookspecs import CONTRACT, hookimpl
from eff.schemas import Schema, TrainOptions

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run

__all__ = ["Card", "Check", "Claim", "Extension", "Field", "Method", "MethodConfig", "Sample", "hookimpl"]

Need = Literal["train_data", "calibration_data", "test_data", "gpu"]


class MethodConfig(BaseModel):
    """Base of a method's options: frozen, unknown options are errors, defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Check(Schema):
    """One comparison of a claim: the mean of `left` is at least the mean of `right` plus `margin`.

    `left` and `right` name settings that the claim's function measures; `right` may be a number.
    """

    left: str
    right: str | float
    margin: float = 0.0
    relation: Literal["at_least", "at_most"] = Field(
        "at_least", description="at_most: left <= right + margin (a negative margin asks for a gap)."
    )


class Claim(Schema):
    """What the paper promises, as something that runs at desk scale.

    `run` names a function "package.module:function" that takes a `ClaimRun` (seeds, data folder,
    progress) and returns `{setting: [one value per seed]}`. Core computes the verdict from `checks`,
    so a plugin cannot state it.
    """

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    statement: str
    run: str = Field(pattern=r"^[\w.]+:\w+$")
    checks: tuple[Check, ...] = Field(min_length=1)
    paper: str = Field(description="The paper's own figures and where they stand.")
    unit: str = Field("", description="Unit of all settings that `units` does not name.")
    units: dict[str, str] = Field({}, description="Units by name of a setting or its last word, e.g. {'norm': ''}.")
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    minutes: float = Field(description="Expected duration on two CPU cores.")


class Card(Schema):
    """Who proposed the method, what it needs and what it goes with; shown by `eff info`."""

    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    paper: str = Field(description="Identifier, e.g. arXiv:1902.08153.")
    url: str
    tasks: tuple[str, ...] = Field(("classification",), description="Tasks by name; 'any' for all of them.")
    needs: tuple[Need, ...] = ()
    formats: tuple[str, ...] = Field((), description="Export formats that the method writes itself.")
    composes_with: tuple[str, ...] = Field((), description="Families or plugins, in words a user knows.")
    conflicts_with: tuple[str, ...] = Field((), description="Plugins or families ('quant_*') refused in one run.")
    notes: str = ""

    @property
    def trains(self) -> bool:
        """Whether `eff apply` trains after `transform`."""
        return "train_data" in self.needs

    @property
    def needs_data(self) -> bool:
        """Whether a run cannot do without data."""
        return any(need.endswith("_data") for need in self.needs)

    def is_for(self, task: str) -> bool:
        """Whether the method works on models of this task; "any" in `tasks` takes all."""
        return "any" in self.tasks or task in self.tasks


class Sample(Schema):
    """The smallest run of a method that shows it at work, in seconds; what the contract suite runs."""

    model: str
    data: str | None = None
    options: dict[str, JsonValue] = {}
    train: TrainOptions = TrainOptions(epochs=1, batch_size=64)


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Method(Generic[ConfigT]):
    """One published method. A run makes its own instance with the validated configuration.

    What must be remembered between hooks lives on `self`; what must survive a resume is returned by
    `state_dict`; what `transform` found in data and a checkpoint needs to rebuild the structure goes
    into `self.structure` (JSON values), which is set again before a restoring `transform`.

    Subclasses set `card`, optionally `claims`, and mark the hooks they implement with `@hookimpl`.
    """

    contract: ClassVar[int] = CONTRACT
    card: ClassVar[Card]
    claims: ClassVar[tuple[Claim, ...]] = ()
    sample: ClassVar[Sample | None] = None
    """What the contract suite runs; None: the tiny classifier of `eff.testing.samples`."""

    config: ConfigT

    def __init__(self, config: ConfigT | None = None):
        self.config = config if config is not None else self.config_type()()
        self.structure: dict[str, JsonValue] = {}

    @classmethod
    def config_type(cls) -> type[ConfigT]:
        """Return the class named in `Method[...]`."""
        for klass in cls.__mro__:
            for base in klass.__dict__.get("__orig_bases__", ()):
                for argument in get_args(base):
                    if isinstance(argument, type) and issubclass(argument, BaseModel):
                        return argument  # type: ignore[return-value]
        raise TypeError(f"{cls.__name__} names no configuration; write class {cls.__name__}(Method[YourConfig])")

    @property
    def trains(self) -> bool:
        """Whether `eff apply` takes train steps after `transform`: on training data, or steps the method counts itself."""
        return self.card.trains or type(self).step_count is not Method.step_count

    def training(self) -> TrainOptions:
        """Return the method's training recipe for this configuration; unset fields fall to core's."""
        return TrainOptions()

    def parameter_options(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Return optimiser options that differ for one parameter, e.g. `{"weight_decay": 0.0}`."""
        return {}

    def check(self, model: nn.Module, run: Run) -> None:
        """Raise a RequestError where the method cannot work on this model and data; nothing is written yet.

        For what only the opened model tells and `transform`, which comes before anything is written, does
        not: methods that only measure.
        """

    def step_count(self, run: Run) -> int | None:
        """Return how many steps the training has, where a step is not one batch of core's loader.

        For federated rounds and the like: `train_step` then gets an empty batch and no optimizer, takes
        its data from `run`, and core still does progress, checkpoints, resume and Ctrl-C around it.
        None (the default): one step per batch.
        """
        return None

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Return the model to measure and ship; called once after training, in order of application.

        Discretise, merge or fold here. Not called when a checkpoint is restored: what `transform` needs
        to rebuild the finished structure goes into `self.structure`.
        """
        return model

    def switch(self, model: nn.Module, settings: Mapping[str, JsonValue]) -> None:
        """Change what a finished model computes with, e.g. its bits; for `eff evaluate --bits` and `eff export --bits`.

        Only for methods whose stored model holds several settings.

        Raises:
            RequestError: a setting is unknown, or not among those that the model holds.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model's weights (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class Extension:
    """An always-on plugin (entry-point group `eff.extensions`): sources, tasks, optimisers, formats.

    Values are "package.module:attribute" and are imported when used, so an extension costs a run
    nothing it does not need. An extension may also implement hooks; `build_model` answers the
    schemes it owns.
    """

    contract: ClassVar[int] = CONTRACT
    schemes: ClassVar[tuple[str, ...]] = ()
    """Prefixes of model sources that `build_model` answers, e.g. ("zoo",)."""
    models: ClassVar[Mapping[str, str]] = {}
    """Model sources by full name with a one-line description, for listings and suggestions."""
    data_sources: ClassVar[Mapping[str, str]] = {}
    """Scheme -> function(spec: DataSpec, task: TaskSpec | None) -> Data."""
    tasks: ClassVar[Mapping[str, str]] = {}
    """Name -> subclass of eff.tasks.Task."""
    optimizers: ClassVar[Mapping[str, str]] = {}
    """Name -> torch.optim.Optimizer subclass."""
    encodings: ClassVar[Mapping[str, str]] = {}
    """Name -> function(tensors, details) -> state dict, for packed weight files."""
    hookspecs: ClassVar[tuple[str, ...]] = ()
    """Modules or classes with hook specifications of a family, with the family's prefix."""
