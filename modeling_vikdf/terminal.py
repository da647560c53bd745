"""Chat in the terminal: `vikdf chat` with lines that are typed, piped in or passed as messages.

Knows standard input and output; the pipeline generates the replies.
"""

import io
import re
import sys
from collections.abc import Sequence
from typing import Any

from .pipeline_vikdf import VikdfDialoguePipeline


UNDECODED = re.compile("[\udc80-\udcff]")  # how "surrogateescape" reads bytes that are not in the encoding


class Dialogue:
    """
    A dialogue whose replies are printed as they are generated.

    Args:
        pipe: generates the replies.
        settings: arguments of its `stream`.
    """

    def __init__(self, pipe: VikdfDialoguePipeline, **settings: Any):
        self.pipe, self.settings = pipe, settings
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str) -> None:
        """
        Prints the reply to a user turn. A turn without reply leaves the dialogue unchanged.

        Raises:
            ValueError: for a turn that the processor refuses.
            KeyboardInterrupt: if the user stops the reply.
        """
        self.messages.append({"role": "user", "content": text})
        reply = ""
        try:
            for piece in self.pipe.stream(self.messages, **self.settings):
                print(piece, end="", flush=True)
                reply += piece
        except (ValueError, KeyboardInterrupt):
            del self.messages[-1]
            raise
        print(flush=True)
        self.messages.append({"role": "assistant", "content": reply.strip()})


def answer_messages(dialogue: Dialogue, texts: Sequence[str], echo: bool) -> None:
    """Answers successive user turns, which are printed, too, if `echo`."""
    for text in texts:
        if echo:
            print(f"you> {text}\nvikdf> ", end="", flush=True)
        dialogue.answer(text)


def answer_lines(dialogue: Dialogue) -> None:
    """Answers lines of standard input until its end or /exit."""
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no text must not end the dialogue
        sys.stdin.reconfigure(errors="surrogateescape")
    if terminal:
        print("Type a message; /reset starts a new dialogue, /exit ends.", file=sys.stderr)
    while True:
        try:
            text = input("you> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            break
        if text == "/exit":
            break
        if text == "/reset":
            dialogue.messages.clear()
            print("(new dialogue)", file=sys.stderr)
        elif UNDECODED.search(text):
            print(f"This line is not {sys.stdin.encoding}, so it is not answered; send it again.", file=sys.stderr)
        elif text:
            print("vikdf> " if terminal else "", end="", flush=True)
            try:
                dialogue.answer(text)
            except KeyboardInterrupt:  # stops this reply, not the program
                print()
            except ValueError as error:
                print(error, file=sys.stderr)


__all__ = ["Dialogue", "answer_lines", "answer_messages"]
