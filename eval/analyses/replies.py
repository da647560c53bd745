"""What the arms of a study reply to the same ten beginnings, all of them, not a selection: eval/results/replies.md.

Example run:
    python eval/analyses/replies.py --study outputs/study --steps vikdf caption_only soft_prompt
"""

import argparse
import json
from io import StringIO
from pathlib import Path

from transformers import pipeline

from modeling_vikdf.building import load_model
from modeling_vikdf.data.dialogues import as_messages
from modeling_vikdf.evaluation.dialogues import DECODING


HERE = Path(__file__).parent


def main() -> None:
    """Writes a table for each beginning: the arms and their replies (beam search as in `vikdf evaluate`)."""
    parser = argparse.ArgumentParser(description="Replies of a study's arms side by side.")
    parser.add_argument("--study", type=Path, default=Path("outputs/study"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="+", required=True, help="arms; the first one's LLM also replies alone")
    parser.add_argument("--dialogues", type=Path, default=HERE / "replies.jsonl")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "replies.md")
    args = parser.parse_args()

    chats = []
    for line in StringIO(args.dialogues.read_text(encoding="utf-8")):
        chats.append(as_messages(json.loads(line)["turns"], "user"))
    replies = {}
    for name in args.steps:
        model, processor = load_model(args.study / f"seed{args.seed}" / name)
        pipe = pipeline("vikdf-dialogue", model=model, processor=processor)
        settings = {**DECODING, "return_full_text": False}
        replies[name] = [reply["generated_text"] for [reply] in pipe(chats, **settings)]
        if name == args.steps[0]:
            alone = pipe(chats, use_knowledge=False, **settings)
            replies["language model alone"] = [reply["generated_text"] for [reply] in alone]
    blocks = []
    for i, chat in enumerate(chats):
        said = "\n".join(f"> **{message['role']}:** {message['content']}  " for message in chat)
        rows = "\n".join(f"| {name} | {arm[i]} |" for name, arm in replies.items())
        blocks.append(f"{said}\n\n| arm | reply |\n|---|---|\n{rows}\n")
    args.output.write_text("\n".join(blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
