"""Options of eval_filter_db. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from eff.method import Field, MethodConfig

PAPER_KERNEL = 3


class FilterDBConfig(MethodConfig):
    """Options of eval_filter_db; the defaults are the paper's where it states one."""

    kernel: int = Field(
        PAPER_KERNEL,
        ge=2,
        le=31,
        description="Side of the filters; T(n), and so the flag 'random', is known for 3 only.",
    )
    others: tuple[str, ...] = Field(
        (),
        description="Models to compare with: files, run folders, sources, or filter data bases (filters.parquet); "
        "tag=SOURCE tags one, weights.th?arch=ARCH says what bare weights are of.",
    )
    group_by: Literal["model", "layer", "depth", "tag"] = Field("model", description="What the drift is between.")
    label: str = Field("", description="Name of the measured model in tables and figures; empty: its source.")
    tag: str = Field("", description="Tag of the measured model (task, kind of data, ...), for group_by=tag.")
    bins: int = Field(70, ge=2, description="Bins of each coefficient's histogram.")
    depth_bins: int = Field(10, ge=1, description="Parts of the normalised depth, for the profile and group_by=depth.")
    min_filters: int = Field(64, ge=9, description="Groups with fewer filters are left out of the drift.")
    scale: bool = Field(True, description="Divide each filter by its largest absolute weight before the PCA.")
    sparsity_eps: float = Field(
        0.01, gt=0, lt=1, description="A filter is sparse below this share of the layer's largest absolute weight."
    )
    sparse_share: float = Field(
        0.5, gt=0, le=1, description="Flag 'sparse' from this share of sparse filters on (not in the paper)."
    )
    low_entropy: float = Field(
        0.5, gt=0, lt=0.95, description="Flag 'low diversity' below this variance entropy (inferred)."
    )
    dtype: Literal["float64", "float32"] = Field("float64", description="Precision of all sums.")
    figures: bool = Field(True, description="Draw PNGs into the run folder; needs matplotlib.")

    @model_validator(mode="after")
    def _a_group_by_tag_has_tags(self) -> FilterDBConfig:
        if self.group_by == "tag" and not self.tag:
            raise ValueError("group_by=tag needs the measured model's tag; add -o tag=NAME")
        return self
