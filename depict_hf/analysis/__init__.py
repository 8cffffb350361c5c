"""Instruments that show how a model came to its masks: they read a forward pass and never change one of its numbers.

`analyze` runs a photograph, or `record` prepared pixels, once and keeps the tokens between the layers. All other
functions work on that record and on the model's weights. Attention maps and contributions are computed anew from
those tokens, in float64, so that the model itself runs as it always does and only the maps that are looked at ever
exist. A record belongs to the weights that made it: within an intervention, make a new one.

Symbols, as in the papers:

    Z        tokens, one per row here, `(count, dim)`; the papers have one per column
    P_h      projection of head h, `(head_dim, dim)`; the papers' U_k transposed
    s        step size of a layer
    epsilon  allowed distortion
    R        coding rate of tokens, in nats
    R^c      sum over the heads of the rates of the projected tokens, in nats
    A        attention weights

Sources:
    Yu et al., "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding Rate
    Reduction", NeurIPS 2020 (R, and its sum over groups).
    Yu et al., "White-Box Transformers via Sparse Rate Reduction", NeurIPS 2023 (R^c, subspace self-attention).
    Wen and Li, "Rethinking Decoders for Transformer-based Semantic Segmentation: A Compression Perspective",
    NeurIPS 2024 (class tokens as bases of a principal subspace); Wen et al., NeurIPS 2025 (CBSA).
"""

from .attribution import forward_for_attribution
from .interventions import (
    head_removed,
    layer_removed,
    orthonormalized,
    rotate_heads,
    rotated_across_heads,
    step_size_removed,
    step_size_scaled,
)
from .maps import attention, attention_map, rollout
from .rates import RateCurves, coding_rate, compression, rate_curves
from .recording import Recording, analyze, record
from .steps import projections, read_out, step_sizes
from .subspaces import (
    ClassSubspace,
    SubspaceStatistics,
    class_gram,
    class_subspaces,
    deviation_from_identity,
    effective_rank,
    energy_shares,
    head_gram,
    overlaps,
    principal_angles,
    principal_colors,
    principal_subspace,
    subspace_statistics,
)
from .terms import Contributions, Term, contributions, lens, source_contributions

__all__ = [
    "ClassSubspace",
    "Contributions",
    "RateCurves",
    "Recording",
    "SubspaceStatistics",
    "Term",
    "analyze",
    "attention",
    "attention_map",
    "class_gram",
    "class_subspaces",
    "coding_rate",
    "compression",
    "contributions",
    "deviation_from_identity",
    "effective_rank",
    "energy_shares",
    "forward_for_attribution",
    "head_gram",
    "head_removed",
    "layer_removed",
    "lens",
    "orthonormalized",
    "overlaps",
    "principal_angles",
    "principal_colors",
    "principal_subspace",
    "projections",
    "rate_curves",
    "read_out",
    "record",
    "rollout",
    "rotate_heads",
    "rotated_across_heads",
    "source_contributions",
    "step_size_removed",
    "step_size_scaled",
    "step_sizes",
    "subspace_statistics",
]
