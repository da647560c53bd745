"""Embedding similarity of dialogue replies as an `evaluate` module; `modeling_vikdf.metrics` computes it."""

from collections.abc import Sequence

import datasets
import evaluate

from modeling_vikdf.metrics import WordVectors, embedding_similarity


CITATION = """\
@inproceedings{forgues2014bootstrapping,
  title = {Bootstrapping Dialog Systems with Word Embeddings},
  author = {Forgues, Gabriel and Pineau, Joelle and Larchev{\\^e}que, Jean-Marie and Tremblay, R{\\'e}al},
  booktitle = {NIPS Workshop on Modern Machine Learning and Natural Language Processing},
  year = {2014},
}
@inproceedings{rus-lintean-2012-comparison,
  title = {A Comparison of Greedy and Optimal Assessment of Natural Language Student Input Using Word-to-Word
    Similarity Metrics},
  author = {Rus, Vasile and Lintean, Mihai},
  booktitle = {Proceedings of the Seventh Workshop on Building Educational Applications Using NLP},
  year = {2012},
  pages = {157--162},
}"""


class EmbeddingSimilarity(evaluate.Metric):
    """Average, Extrema and Greedy, see `modeling_vikdf.metrics.embedding_similarity`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Embedding Average, Vector Extrema and Greedy Matching of replies and references.",
            citation=CITATION,
            inputs_description=embedding_similarity.__doc__,
            features=[  # the first that matches is used, and a string also matches a list, of its letters
                datasets.Features(predictions=text, references=text),
                datasets.Features(predictions=text, references=datasets.List(text)),
            ],
            reference_urls=["https://aclanthology.org/W12-2018"],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        vectors: WordVectors,
        tokenized: bool = False,
    ) -> dict[str, float]:
        return embedding_similarity(predictions, references, vectors, tokenized)
