"""Distinct-1 and Distinct-2 of dialogue replies as an `evaluate` module; `modeling_vikdf.metrics` computes them."""

from collections.abc import Sequence

import datasets
import evaluate

from modeling_vikdf.metrics import distinct


CITATION = """\
@inproceedings{li-etal-2016-diversity,
  title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
  author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle = {Proceedings of the 2016 Conference of the North American Chapter of the Association for Computational
    Linguistics: Human Language Technologies},
  year = {2016},
  pages = {110--119},
}"""


class DistinctN(evaluate.Metric):
    """Distinct-1 and Distinct-2, see `modeling_vikdf.metrics.distinct`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Distinct-1 and Distinct-2: the fraction of replies' unigrams and bigrams that are distinct.",
            citation=CITATION,
            inputs_description=distinct.__doc__,
            features=datasets.Features(predictions=datasets.Value("string")),
            reference_urls=["https://aclanthology.org/N16-1014"],
        )

    def _compute(self, predictions: Sequence[str], tokenized: bool = False) -> dict[str, float]:
        return distinct(predictions, tokenized)
