"""Options that all models of the zoo share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ClassifierOptions(BaseModel):
    """What every classifier needs to know; unknown options are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    num_classes: int = Field(10, ge=1, description="Number of outputs; unset: the task's.")


class ZooOptions(ClassifierOptions):
    """What every classifier of images needs to know."""

    in_channels: int = Field(3, ge=1, description="Channels of the images; unset: the task's.")
