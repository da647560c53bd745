"""The Space of this metric; run it by `python app.py`."""

from pathlib import Path

import gradio as gr
from evaluate.utils.gradio import parse_readme

from modeling_vikdf.metrics import embedding_similarity


def compute(predictions: str, references: str, vectors: str) -> dict[str, float]:
    """Scores one item per line, several references separated by |; vectors in GloVe's text format."""
    rows = [line.split() for line in vectors.splitlines()]
    return embedding_similarity(
        predictions.splitlines(),
        [line.split("|") for line in references.splitlines()],
        {word: list(map(float, values)) for word, *values in rows},
    )


demo = gr.Interface(
    compute,
    inputs=[
        gr.Textbox(label="Predictions", info="One per line", lines=4),
        gr.Textbox(label="References", info="One line per prediction; separate several by |", lines=4),
        gr.Textbox(label="Word vectors", info="One word per line with its numbers, as in GloVe's files", lines=4),
    ],
    outputs=gr.JSON(label="Scores"),
    examples=[["the cat runs", "the dog runs", "dog 1 0\ncat 0.8 0.6\nruns 0 -1"]],
    title="Embedding similarity",
    article=parse_readme(Path(__file__).with_name("README.md")),
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch(show_error=True)
