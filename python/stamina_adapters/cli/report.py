# SPDX-License-Identifier: Apache-2.0
"""What `stamina demo` reports: the figures, and what is expected of them."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

DENSITY_BOUNDS = (0.02, 0.7)


class ConceptReport(BaseModel):
    """One concept of the demo; accuracies are shares of its pictures told as its identity."""

    token: str
    identity: str
    family: str
    accuracy_base: float
    accuracy_ceiling: float
    accuracy_after_learning: float
    accuracy_final: float
    mask_density: dict[str, float]
    loss_sampled_masks: float
    loss_committed_masks: float
    seconds: float


class DemoReport(BaseModel):
    """`report.json`. Accuracies and densities are means over the concepts.

    accuracy_base      pictures of the family alone ("a photo of a face"), before customising
    accuracy_ceiling   K and V trained in full, with a token, on each concept alone
    identities         how many identities the encoder chooses among; chance is one over it
    mask_density       committed masks, by layer group: UNet block and projection
    saved_mib_*        saved for backward by the adapted projections of this run
    step_ms_*          their forward and backward in this run; *_sd15: at SD 1.5's K/V shapes
    """

    model_config = ConfigDict(extra="forbid")

    concepts: list[ConceptReport]
    identities: int
    pictures: int
    accuracy_base: float
    accuracy_ceiling: float
    accuracy_after_learning: float
    accuracy_final: float
    a_mmd: float
    f_mmd: float
    mask_density: dict[str, float]
    saved_mib_ours: float
    saved_mib_eager: float
    step_ms_ours: float
    step_ms_eager: float
    step_ms_ours_sd15: float
    step_ms_eager_sd15: float
    stock_pipeline_bit_identical: bool
    backend: str
    threads: int
    seed: int
    seconds: float

    def expectations(self) -> dict[str, bool]:
        """What a sound run shows, and whether this one does."""
        low, high = DENSITY_BOUNDS
        drop = self.accuracy_after_learning - self.accuracy_final
        return {
            "final accuracy is at least 0.85 of the ceiling": self.accuracy_final
            >= 0.85 * self.accuracy_ceiling,
            "final accuracy is within 0.1 of that right after learning": drop <= 0.1,
            f"every layer group's mask density is between {low} and {high}": all(
                low < density < high for density in self.mask_density.values()
            ),
            "at most a quarter of eager PyTorch's memory is saved for backward": (
                self.saved_mib_ours <= self.saved_mib_eager / 4
            ),
            "at SD 1.5's shapes a step takes less than half of eager PyTorch's time": (
                self.step_ms_ours_sd15 < self.step_ms_eager_sd15 / 2
            ),
            "the saved pipeline gives the same image bits with diffusers alone": (
                self.stock_pipeline_bit_identical
            ),
        }


def layer_groups(densities: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, float]:
    """Densities by UNet block and projection, such as "down_blocks.0 to_k".

    `densities` and `weights` (number of weights) are by module path; a group's density is the
    share of all its weights.
    """
    kept: dict[str, float] = {}
    total: dict[str, int] = {}
    for path, density in densities.items():
        block = path.split(".attentions.")[0]
        group = f"{block} {path.rsplit('.', 1)[-1]}"
        kept[group] = kept.get(group, 0.0) + density * weights[path]
        total[group] = total.get(group, 0) + weights[path]
    return {group: kept[group] / total[group] for group in kept}


def mean_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each key over rows that hold the same keys."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
