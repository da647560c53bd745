"""Real tokenizers of at most 512 tokens and a small image processor, built in memory.

llama_tokenizer()     Llama-2's way: [INST], <s> and </s>, no padding token, bytes for unknown characters
qwen_tokenizer()      ChatML: <|im_start|>, <|im_end|> ends a turn, <|endoftext|> pads
bert_tokenizer()      WordPiece, [CLS] and [SEP] around the text, 512 tokens
base_tokenizer()      a base LLM's, Gemma's way: no chat template, line breaks are tokens, bytes for the rest
clip_like_tokenizer() byte-level, lower-cased, <|startoftext|> and <|endoftext|> around the text, 77 tokens
"""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast


SENTENCES = [
    "You are a helpful assistant. Answer in one short sentence.",
    "I went to the beach yesterday and the water was so blue!",
    "What is your dog doing? He is running after a red ball in the park.",
    "My favourite food is pizza with cheese, tomatoes and olives.",
    "system user assistant",
    "It is snowing outside, we could build a snowman together.",
    "Look at the sky: the sun is going down behind the mountains.",
]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITH_GENERATION = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set dialogue = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set dialogue = messages %}{% set system = '' %}{% endif %}"
    "{% for message in dialogue %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set content = system + message['content'] if loop.first else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

# The block leaves the end of the turn outside, as many templates do.
LLAMA_WITH_GENERATION = LLAMA.replace(
    "{{ ' ' + content.strip() + ' ' + eos_token }}",
    "{{ ' ' }}{% generation %}{{ content.strip() }}{% endgeneration %}{{ ' ' + eos_token }}",
)

GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _byte_level(special_tokens: list[str], vocab_size: int, **kwargs) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def llama_tokenizer(chat_template: str = LLAMA) -> PreTrainedTokenizerFast:
    """Llama-2's way: pieces with a leading "▁", bytes for unknown characters, BOS and EOS but no padding token."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special_tokens = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special_tokens, show_progress=False)
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def qwen_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """Qwen's way: byte-level, ChatML, `<|im_end|>` ends a turn, `<|endoftext|>` pads, nothing begins a sequence."""
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level(
        special_tokens, 400, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's way: no system role, turns end with a token that is not EOS, `<unused0>` kept in reserve."""
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return _byte_level(special_tokens, 400, chat_template=GEMMA, **names)


def base_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma's way before it is taught to chat: no template, "\\n" and "\\n\\n" are tokens, bytes for the unknown."""
    state = json.loads(llama_tokenizer().backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["pre_tokenizer"] = state["post_processor"] = None
    state["decoder"]["decoders"].pop()  # a leading space stays
    lines = {"\n": len(state["model"]["vocab"]), "\n\n": len(state["model"]["vocab"]) + 1}
    state["model"]["vocab"] |= lines
    state["model"]["merges"].append(["\n", "\n"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    state["added_tokens"] += [{"id": id_, "content": text, **flags} for text, id_ in lines.items()]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's way: WordPiece, lower-cased, `[CLS] text [SEP]`, at most 512 tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special_tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def clip_like_tokenizer() -> PreTrainedTokenizerFast:
    """CLIP's way: lower-cased, `<|startoftext|> text <|endoftext|>`, padded with the latter, at most 77 tokens."""
    tokenizer = _byte_level(
        ["<|startoftext|>", "<|endoftext|>"],
        350,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    return tokenizer


def image_processor(size: int = 32) -> CLIPImageProcessorPil:
    """CLIP's image processor for pictures of `size` by `size` pixels."""
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
