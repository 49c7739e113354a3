"""Reward-model ensembles against over-optimisation (Coste et al., arXiv:2310.02743).

K reward models on the same preferences, which differ in seed and order of rows, answer as one: by their mean, by the
lowest of them (WCO), or by their mean less a multiple of their variance (UWO), each standardised first.
"""

import lazy_loader

from hfgen.card import Claim, MethodCard, Paper

CARD = MethodCard(
    name="reward_ensemble",
    kind="trainers",
    summary="K reward models that answer as one (mean, worst case, or mean less variance), trained and used with trl.",
    target="hfgen_plugins.trainers.reward_ensemble.trainer:EnsembleRewardTrainer",
    exports=("EnsembleRewardTrainer", "EnsembleRewardConfig", "EnsembleRewardModel", "EnsembleReward", "flip_labels"),
    paper=Paper(
        title="Reward Model Ensembles Help Mitigate Overoptimization",
        id="arXiv:2310.02743",
        year=2023,
    ),
    needs=(
        "a decoder; a pad token that is not the eos token",
        "a calibration set of preference pairs for wco and uwo (or normalize=False)",
        "`from hfgen.trainers import EnsembleRewardModel` before transformers' Auto classes can load a saved ensemble",
    ),
    conflicts=(
        "peft_config and PeftModel: adapters for every member are backend='lora'",
        "DeepSpeed ZeRO-3 for the reward inside GRPO: make EnsembleReward before the training arguments",
        "streaming datasets, packed rows, images",
        "models whose sequence-classification head is not a linear `score` on the last token (encoders)",
    ),
    defaults=(
        "five members, learning rate 1e-5, 5 epochs, score regulariser 1e-3, uwo_lambda 0.5 (their best-of-n runs; their "
        "PPO has 0.1), variance with 1/K: the released code as our method sheet has it; all else is trl's RewardConfig"
    ),
    deviations=(
        "backends lora and heads, which the paper has not; heads disagrees less off the training distribution",
        "the members of lora are one K-wide layer of ours, not peft's adapters: switching adapters is undone by gradient "
        "checkpointing, which recomputes every member with the last one's (member(k) gives a merged stock model)",
        "the score regulariser is averaged over pairs; the released code averages inside each prompt's group first",
        "uwo_lambda 0 is the mean (the released helper takes 0 for 'use the default')",
        "calibration over a set of its own, not over the evaluation set",
    ),
    sources="none; the defaults are our method sheet's reading of tlc4418/llm_optimization",
    claims=(
        Claim(
            id="less-overoptimisation",
            statement=(
                "With 25 % label noise the gold reward of best-of-n by one reward model falls as n grows; by the mean, "
                "WCO and UWO of five it ends above that and falls less."
            ),
            experiment="hfgen_plugins.trainers.reward_ensemble.evidence:EXPERIMENT",
            paper_value=(
                "best-of-n: conservative objectives practically remove over-optimisation, up to 70 % better (abstract)"
            ),
        ),
        Claim(
            id="grpo",
            statement=(
                "With 25 % label noise GRPO and RLOO on the mean or WCO of five reward models end, at equal steps, with at "
                "least the gold reward of the same on one of them."
            ),
            experiment="hfgen_plugins.trainers.reward_ensemble.evidence_grpo:EXPERIMENT",
            paper_value=(
                "PPO: always less over-optimisation than one model; none with a small KL penalty, at no cost (abstract)"
            ),
        ),
    ),
    example="hfgen_plugins.trainers.reward_ensemble.trainer:example",
)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "trainer": ["EnsembleRewardTrainer"],
        "config": ["EnsembleRewardConfig"],
        "modeling": ["EnsembleRewardModel"],
        "reward": ["EnsembleReward"],
        "data": ["flip_labels"],
    },
)
