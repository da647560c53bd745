"""The Space of this metric; run it by `python app.py`."""

from pathlib import Path

import gradio as gr
from evaluate.utils.gradio import parse_readme

from modeling_vikdf.metrics import rouge_l


def compute(predictions: str, references: str) -> dict[str, float]:
    """Scores one item per line; several references of an item are separated by |."""
    return rouge_l(predictions.splitlines(), [line.split("|") for line in references.splitlines()])


demo = gr.Interface(
    compute,
    inputs=[
        gr.Textbox(label="Predictions", info="One per line", lines=4),
        gr.Textbox(label="References", info="One line per prediction; separate several by |", lines=4),
    ],
    outputs=gr.JSON(label="Scores"),
    examples=[["the dog runs on the beach", "the dog runs along the beach|the dog runs"]],
    title="Dialogue ROUGE-L",
    article=parse_readme(Path(__file__).with_name("README.md")),
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch(show_error=True)
