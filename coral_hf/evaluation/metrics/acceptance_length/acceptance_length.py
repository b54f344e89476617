"""Acceptance length (tau) as an `evaluate` module.

Loadable with `evaluate.load(path)` without a network, where path is this file's folder.
"""

from dataclasses import fields

import datasets
import evaluate

from coral_hf.generation.statistics import DraftStats


_DESCRIPTION = """
Tokens per forward pass of the target, including the bonus token: tau = 1 + accepted / steps, pooled over all verification
steps of all answers (taus of answers are never averaged). Also, for each depth, the share of the steps that reached it and
accepted it.
"""
_KWARGS_DESCRIPTION = """
Args:
    steps (`list[int]`): verification steps of every answer.
    n_accepted (`list[int]`): accepted drafted tokens of every answer, without bonus tokens.
    drafted_per_depth (`list[list[int]]`): steps of an answer that drafted to depth 1, 2, ...
    accepted_per_depth (`list[list[int]]`): steps of an answer that accepted depth 1, 2, ...
    reached_per_depth (`list[list[int]]`): steps of an answer that drafted to depth 1, 2, ... and accepted those before it.
Returns:
    acceptance_length (`float`), acceptance_per_depth (`list[float]`), steps (`int`).
Examples:
    >>> import coral_hf, evaluate
    >>> metric = evaluate.load(coral_hf.__path__[0] + "/evaluation/metrics/acceptance_length")
    >>> answer = target.generate(**inputs, assistant_model=drafter, max_new_tokens=32)
    >>> metric.add(**vars(drafter.last_stats))
    >>> tau = metric.compute()["acceptance_length"]
"""
_CITATION = """
@article{leviathan2023fast,
  title  = {Fast Inference from Transformers via Speculative Decoding},
  author = {Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  year   = {2023}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptanceLength(evaluate.Metric):
    """One row per answer: the fields of [`DraftStats`]."""

    def _info(self):
        count = datasets.Value("int64")
        per_depth = datasets.Sequence(count)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "steps": count,
                    "n_accepted": count,
                    "drafted_per_depth": per_depth,
                    "accepted_per_depth": per_depth,
                    "reached_per_depth": per_depth,
                }
            ),
        )

    def _compute(self, **columns):
        names = [field.name for field in fields(DraftStats)]
        pooled = DraftStats()
        for values in zip(*(columns[name] for name in names), strict=True):
            stats = DraftStats(*values)
            lengths = {len(getattr(stats, name)) for name in names if name.endswith("_per_depth")}
            if stats.steps < 0 or not 0 <= stats.n_accepted == sum(stats.accepted_per_depth) or len(lengths) > 1:
                raise ValueError(
                    f"{stats} are not the statistics of an answer: n_accepted must be the sum of accepted_per_depth, the counts per "
                    "depth must have equal lengths, and none may be negative. Pass the unchanged fields of drafter.last_stats."
                )
            pooled = pooled.merge(stats)
        return {
            "acceptance_length": pooled.acceptance_length,
            "acceptance_per_depth": pooled.acceptance_per_depth,
            "steps": pooled.steps,
        }
