"""Prints the replies to a batch of three chats, two of which show a picture.

The packaged checkpoint's vision encoder, facebook/dinov2-small, comes from the Hub, or from a folder in the
environment variable VIKDF_BACKBONES. Pass two files to show your own pictures.

Example run:
    python examples/pictures.py [MODEL [PICTURE PICTURE]]
"""

import sys

from PIL import Image
from transformers import pipeline

import modeling_vikdf  # registers "vikdf-dialogue"


chat = pipeline("vikdf-dialogue", model=sys.argv[1] if len(sys.argv) > 1 else modeling_vikdf.DEFAULT_CHECKPOINT)
if len(sys.argv) == 4:
    first, second = (Image.open(path) for path in sys.argv[2:])
else:  # a sky over sand, and a lawn
    first, second = Image.new("RGB", (224, 224), "skyblue"), Image.new("RGB", (224, 224), "green")
    first.paste("sandybrown", (0, 140, 224, 224))
chats = [
    [{"role": "user", "content": "Look what I saw today!"}],
    [{"role": "user", "content": "This is where we had lunch."}],
    [{"role": "user", "content": "I have no picture to show."}],
]
replies = chat(chats, images=[first, second, None], batch_size=3, return_full_text=False, max_new_tokens=40)
for [message], [reply] in zip(chats, replies, strict=True):
    print(f"you> {message['content']}\nvikdf> {reply['generated_text']}")
