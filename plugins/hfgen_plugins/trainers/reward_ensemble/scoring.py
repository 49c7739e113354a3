"""The mathematics of reward ensembles as pure functions: what K scores of one answer are made into, and the losses.

Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization" (arXiv:2310.02743): mean, worst-case optimisation
(WCO) and uncertainty-weighted optimisation (UWO) over members whose scores are standardised first. B answers, P pairs,
K members throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hfgen.kit import checks

AGGREGATIONS = ("mean", "wco", "uwo")


def standardize(scores: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(r_k - mu_k) / sigma_k: scores (B, K), mean and std (K,) of each member on the calibration set."""
    return (scores - mean) / std


def variance(scores: Tensor, unbiased: bool = False) -> Tensor:
    """Variance over members: (B, K) -> (B,). 1/K as in the paper, or 1/(K-1); 0 for a single member."""
    if scores.shape[1] == 1:
        return torch.zeros_like(scores[:, 0])
    return scores.var(dim=1, correction=int(unbiased))


def aggregate(scores: Tensor, how: str = "mean", uwo_lambda: float = 0.5, unbiased: bool = False) -> Tensor:
    """One reward per answer: (B, K) -> (B,).

    mean: 1/K sum_k r_k. wco: min_k r_k. uwo: mean - lambda Var_k(r); lambda 0 is the mean.

    Raises:
        ValueError: an unknown name, scores that are no matrix, or UWO of a single member.
    """
    checks.one_of("aggregate", "how", how, AGGREGATIONS)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores has the shape {tuple(scores.shape)}; give (answers, members)")
    if how == "uwo" and scores.shape[1] == 1:
        raise ValueError("uwo of 1 member has no variance to weigh; give at least 2 members, or use mean")
    if how == "wco":
        return scores.amin(dim=1)
    mean = scores.mean(dim=1)
    return mean - uwo_lambda * variance(scores, unbiased) if how == "uwo" and uwo_lambda else mean


def stack_scores(columns: list[Tensor]) -> Tensor:
    """K vectors (B,) of the members -> (B, K).

    Raises:
        ValueError: members with different numbers of scores, which cannot have scored the same answers.
    """
    sizes = [tuple(c.shape) for c in columns]
    if not columns or len(set(sizes)) != 1 or columns[0].ndim != 1:
        raise ValueError(
            f"the members' scores have the shapes {sizes}; every member must score the same answers, in one order"
        )
    return torch.stack(columns, dim=1)


def preference_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Bradley-Terry with margin, as trl's RewardTrainer: -log sigma(r+ - r- - m), mean over pairs: (P, K) -> (K,)."""
    gap = chosen - rejected
    return -logsigmoid(gap if margin is None else gap - margin).mean(dim=0)


def score_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r+^2 + r-^2) / 2, mean over pairs: (P, K) -> (K,). It pulls every score to 0.

    OpenAssistant's score regulariser. trl's `center_rewards_coefficient` weighs (r+ + r-)^2, which centres the sum and
    leaves the size of the scores alone: another term.
    """
    return ((chosen**2 + rejected**2) / 2).mean(dim=0)
