"""The Space of this metric; run it by `python app.py`."""

from pathlib import Path

import gradio as gr
from evaluate.utils.gradio import parse_readme

from modeling_vikdf.metrics import distinct


def compute(predictions: str) -> dict[str, float]:
    """Scores one item per line."""
    return distinct(predictions.splitlines())


demo = gr.Interface(
    compute,
    inputs=gr.Textbox(label="Predictions", info="One per line", lines=4),
    outputs=gr.JSON(label="Scores"),
    examples=[["I love the beach!\nI love my dog."]],
    title="Distinct-n",
    article=parse_readme(Path(__file__).with_name("README.md")),
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.launch(show_error=True)
