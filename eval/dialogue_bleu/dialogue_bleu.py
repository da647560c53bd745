"""Corpus BLEU of dialogue replies as an `evaluate` module; `modeling_vikdf.metrics` computes it."""

from collections.abc import Sequence

import datasets
import evaluate

from modeling_vikdf.metrics import bleu


CITATION = """\
@inproceedings{papineni-etal-2002-bleu,
  title = {{B}leu: a Method for Automatic Evaluation of Machine Translation},
  author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {Proceedings of the 40th Annual Meeting of the Association for Computational Linguistics},
  year = {2002},
  pages = {311--318},
}"""


class DialogueBleu(evaluate.Metric):
    """Corpus BLEU-1 to BLEU-4, see `modeling_vikdf.metrics.bleu`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU-1 to BLEU-4 of replies against one or several references each.",
            citation=CITATION,
            inputs_description=bleu.__doc__,
            features=[  # the first that matches is used, and a string also matches a list, of its letters
                datasets.Features(predictions=text, references=text),
                datasets.Features(predictions=text, references=datasets.List(text)),
            ],
            reference_urls=["https://aclanthology.org/P02-1040"],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenized: bool = False
    ) -> dict[str, float]:
        return bleu(predictions, references, tokenized)
