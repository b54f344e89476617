"""Speedup over plain `generate` as an `evaluate` module.

Loadable with `evaluate.load(path)` without a network, where path is this file's folder.
"""

import datasets
import evaluate

from coral_hf.evaluation.benchmark import paired_speedup


_DESCRIPTION = """
The speedup of speculative decoding over plain decoding: the median over answers of the paired ratios of tokens per second,
and their quartiles. Measure each pair side by side, so that a drift of the machine affects both.
"""
_KWARGS_DESCRIPTION = """
Args:
    plain_tokens, plain_seconds (`list[int]`, `list[float]`): new tokens of every plain answer, and its time.
    tokens, seconds (`list[int]`, `list[float]`): the same for the compared answers.
Returns:
    speedup (`float`): median; speedup_quartiles (`list[float]`); tokens_per_second, plain_tokens_per_second (`float`): pooled.
Examples:
    >>> import coral_hf, evaluate
    >>> metric = evaluate.load(coral_hf.__path__[0] + "/evaluation/metrics/speculative_speedup")
    >>> metric.compute(plain_tokens=[100], plain_seconds=[5.0], tokens=[100], seconds=[2.5])["speedup"]
    2.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SpeculativeSpeedup(evaluate.Metric):
    """One row per prompt: a plain answer and the compared answer."""

    def _info(self):
        count, seconds = datasets.Value("int64"), datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"plain_tokens": count, "plain_seconds": seconds, "tokens": count, "seconds": seconds}
            ),
        )

    def _compute(self, plain_tokens, plain_seconds, tokens, seconds):
        pairs = zip(plain_tokens, plain_seconds, tokens, seconds, strict=True)
        if (bad := next((pair for pair in pairs if min(pair) <= 0), None)) is not None:
            raise ValueError(
                f"plain_tokens, plain_seconds, tokens, seconds = {bad}: an answer without tokens, or in no time, has no "
                "speed. Leave the pair out."
            )
        plain = [count / time for count, time in zip(plain_tokens, plain_seconds, strict=True)]
        other = [count / time for count, time in zip(tokens, seconds, strict=True)]
        return {
            **paired_speedup(plain, other),
            "tokens_per_second": sum(tokens) / sum(seconds),
            "plain_tokens_per_second": sum(plain_tokens) / sum(plain_seconds),
        }
