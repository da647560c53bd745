"""ROUGE-L of dialogue replies as an `evaluate` module; `modeling_vikdf.metrics` computes it."""

from collections.abc import Sequence

import datasets
import evaluate

from modeling_vikdf.metrics import rouge_l


CITATION = """\
@inproceedings{lin-2004-rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004},
  pages = {74--81},
}"""


class DialogueRouge(evaluate.Metric):
    """ROUGE-L, see `modeling_vikdf.metrics.rouge_l`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-L, with beta 1.2, of replies against one or several references each.",
            citation=CITATION,
            inputs_description=rouge_l.__doc__,
            features=[  # the first that matches is used, and a string also matches a list, of its letters
                datasets.Features(predictions=text, references=text),
                datasets.Features(predictions=text, references=datasets.List(text)),
            ],
            reference_urls=["https://aclanthology.org/W04-1013"],
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]], tokenized: bool = False
    ) -> dict[str, float]:
        return rouge_l(predictions, references, tokenized)
