"""Cards of models, data sets and the Space: the facts of a run and its evaluations in the templates of hub_cards/."""

from .render import FIGURE, render_model_card


__all__ = ["FIGURE", "render_model_card"]
