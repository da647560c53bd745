"""The Space of this metric. Example run: `python app.py`."""

from pathlib import Path

import gradio as gr
from evaluate.utils.gradio import parse_readme

from modeling_vikdf.metrics import bleu


def compute(predictions: str, references: str) -> dict[str, float]:
    """A line an item; several references of an item are parted by |."""
    return bleu(predictions.splitlines(), [line.split("|") for line in references.splitlines()])


demo = gr.Interface(
    compute,
    inputs=[
        gr.Textbox(label="Predictions", info="One a line", lines=4),
        gr.Textbox(label="References", info="A line for each prediction; several parted by |", lines=4),
    ],
    outputs=gr.JSON(label="Scores"),
    examples=[["the dog runs on the beach", "the dog runs along the beach|the dog runs"]],
    title="Dialogue BLEU",
    article=parse_readme(Path(__file__).with_name("README.md")),
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch(show_error=True)
