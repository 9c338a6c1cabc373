"""On-policy distillation of language models that does not collapse.

Here are the nouns, the contracts and the recipe of the paper; every other component is in the package of its kind
(`stable_opd.divergences`, `stable_opd.constraints`, ...) and is found by its short name in YAML.
"""

from stable_opd.constraints import Constraint, ReferenceKL, WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.data import PromptDataModule
from stable_opd.divergences import (
    AdvantageBaseline,
    AdvantageDivergence,
    AdvantageTransform,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    TeacherTopK,
)
from stable_opd.engines import InProcessEngine, LoopStop, RolloutEngine, TransformersEngine
from stable_opd.look import Look
from stable_opd.mixtures import GoldenMixture, Mixture, StudentOnly, WeightedMixture
from stable_opd.module import OPDModule
from stable_opd.policies import Policies
from stable_opd.references import Reference
from stable_opd.registry import Component, build, components
from stable_opd.repetition import PeriodicSuffix, RepetitionDetector, ZlibRepetition
from stable_opd.samplers import Sampler, Temperature, TopP
from stable_opd.schedules import Cosine, Linear, Schedule
from stable_opd.scoring import LogprobError, logprob_error
from stable_opd.sources import Columns, EvaluationSet, Source
from stable_opd.strategy import ShardedStrategy
from stable_opd.students import LoRA
from stable_opd.tasks import ExactMatch, MathVerify, ModularChains, Task
from stable_opd.teachers import LocalTeacher, Teacher
from stable_opd.terminal import SemanticClass, TerminalPolicy
from stable_opd.types import Author, Evidence, Finish, Plan, Prompts, Repetition, Rollout, Scores, TokenLoss
from stable_opd.weightings import Weighting

__all__ = [
    "AdvantageBaseline",
    "AdvantageDivergence",
    "AdvantageTransform",
    "Author",
    "Columns",
    "Component",
    "Constraint",
    "Controller",
    "Cosine",
    "Divergence",
    "EvaluationSet",
    "Evidence",
    "ExactMatch",
    "Finish",
    "ForwardKL",
    "GoldenMixture",
    "InProcessEngine",
    "JensenShannon",
    "Linear",
    "LoRA",
    "LocalTeacher",
    "LogprobError",
    "Look",
    "LoopStop",
    "MathVerify",
    "Mixture",
    "ModularChains",
    "OPDModule",
    "PeriodicSuffix",
    "Plan",
    "Policies",
    "PromptDataModule",
    "Prompts",
    "Reference",
    "ReferenceKL",
    "Repetition",
    "RepetitionDetector",
    "ReverseKL",
    "Rollout",
    "RolloutEngine",
    "SampledReverseKL",
    "Sampler",
    "Schedule",
    "Scores",
    "SemanticClass",
    "ShardedStrategy",
    "Source",
    "StudentOnly",
    "Task",
    "Teacher",
    "TeacherTopK",
    "Temperature",
    "TerminalPolicy",
    "TokenLoss",
    "TopP",
    "TransformersEngine",
    "WeightedConstraint",
    "WeightedMixture",
    "Weighting",
    "ZlibRepetition",
    "build",
    "components",
    "logprob_error",
]
