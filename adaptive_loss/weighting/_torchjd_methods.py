"""What is known of TorchJD's rules without TorchJD: their pages are there whether it is installed or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One of TorchJD's rules.

    Args:
        summary: what it does, in one line.
        maths: the weights w it gives for the Gramian G of K terms.
        reference: where it is from.
        choose: when to choose it.
        options: what :func:`~adaptive_loss.weighting.torchjd.torchjd_rule` takes for it, with the defaults here.
    """

    summary: str
    maths: str
    reference: str
    choose: str
    options: str = ""


METHODS: Mapping[str, Method] = {
    "AlignedMTL": Method(
        "Gives the principal components of the gradients one length, so that none dominates.",
        "w = √λ_min·V·Λ^(−½)·Vᵀ·p with G = V·Λ·Vᵀ and p the preference, 1/K each.",
        'Senushkin, Patakin, Kuznetsov & Konushin, "Independent Component Alignment for Multi-Task Learning", CVPR '
        "2023.",
        "the terms' gradients differ much in length and some are nearly the same",
        'pref_vector=None, scale_mode="min"',
    ),
    "CAGrad": Method(
        "Takes the update near the mean gradient that improves the worst term most.",
        "w = 1/K + c·‖g₀‖·z/‖Σ zⱼgⱼ‖ with g₀ the mean gradient and z on the simplex least in "
        "⟨Σ zⱼgⱼ, g₀⟩ + c·‖g₀‖·‖Σ zⱼgⱼ‖.",
        'Liu, Liu, Jin, Stone & Liu, "Conflict-Averse Gradient Descent for Multi-Task Learning", NeurIPS 2021.',
        "the mean of the losses is what counts, but no term should pay for it",
        "c=0.5, norm_eps=0.0001",
    ),
    "DualProj": Method(
        "Projects the mean gradient onto the directions that raise no term.",
        "w = argmin vᵀGv over v ≥ p, p the preference, 1/K each.",
        'Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, eq. 11.',
        "the mean gradient is right as long as it raises no term, to first order",
        "pref_vector=None, projector=None",
    ),
    "FairGrad": Method(
        "Shares the improvement out fairly: from its sum (α = 0) to the least one's (α → ∞).",
        "G·w = w^(−1/α), elementwise.",
        'Ban & Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024.',
        "you want to say how fair is fair; α = 1 is Nash-MTL's",
        "alpha=1.0, max_iters=None",
    ),
    "GradVac": Method(
        "Lifts the cosine of each pair of gradients to its running mean, where it is below.",
        "gᵢ ← gᵢ + c·gⱼ over the others in random order, c from cos(gᵢ, gⱼ) and its mean; w adds up the results.",
        'Wang, Tsvetkov, Firat & Cao, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in '
        'Massively Multilingual Models", ICLR 2021.',
        "terms are more or less alike, and should stay as alike as they usually are",
        "beta=0.5, eps=1e-08",
    ),
    "IMTLG": Method(
        "Makes the update equally long along every gradient's own direction.",
        "w ∝ G⁻¹d with dᵢ = ‖gᵢ‖, Σw = 1.",
        'Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, the gradient balance (IMTL-G).',
        "no term should gain more than another, whatever their scales",
    ),
    "MGDA": Method(
        "Takes the shortest mix of the gradients, which lowers every term as long as one can.",
        "w = argmin vᵀGv over the simplex.",
        'Désidéri, "Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization", Comptes Rendus '
        'Mathématique 2012; Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018.',
        "a stop at the Pareto front is wanted; it favours the terms with short gradients",
        "epsilon=0.001, max_iters=100",
    ),
    "NashMTL": Method(
        "Bargains between the terms after Nash: relative improvements, whatever the scales.",
        "G·w = 1/w, elementwise; then ‖Σ wᵢgᵢ‖ at most max_norm.",
        'Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.',
        "the terms' scales mean nothing and time is no matter: it is the slowest of all rules",
        "max_norm=1.0, update_weights_every=1, optim_niter=20",
    ),
    "PCD": Method(
        "Follows the base's gradient as closely as a share of progress for every auxiliary allows.",
        "d nearest to g̃_base with ⟨g̃ᵢ, d⟩ ≥ τ·‖g̃ᵢ‖² for every auxiliary, g̃ᵢ = gᵢ over its running length; then d at "
        "‖g_base‖.",
        '"Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective '
        'Optimization", TMLR 2026.',
        "one term is what you want and the others must not be hurt",
        "tau=0.02, beta=0.999, eps=1e-08",
    ),
    "PCGrad": Method(
        "Takes away from each gradient what points against another one, and adds them up.",
        "gᵢ ← gᵢ − min(0, ⟨gᵢ, gⱼ⟩)/‖gⱼ‖²·gⱼ over the others in random order; w adds up the results.",
        'Yu, Kumar, Gupta, Levine, Hausman & Finn, "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.',
        "conflicts are few and a simple remedy will do",
    ),
    "UPGrad": Method(
        "Projects each gradient onto the directions that raise no term, and takes their mean.",
        "w = Σᵢ pᵢ·argmin vᵀGv over v ≥ eᵢ, p the preference, 1/K each.",
        'Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024.',
        "terms conflict, none should rise, and each should fall in proportion to its own gradient",
        "pref_vector=None, projector=None",
    ),
}
