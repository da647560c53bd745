"""Tunes a model on your dialogues; prints the loss of their replies before and after, in nats per token.

The file has one dialogue per line, {"messages": [...]} ending in a reply; without a file the model overfits eight
copies of one dialogue. The tuned model is written to OUTPUT and loads with pipeline("vikdf-dialogue", model=OUTPUT).

Example run:
    python examples/fine_tune.py OUTPUT [DIALOGUES.jsonl [MODEL]]
"""

import sys

from datasets import Dataset

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.data import DialogueCollator
from modeling_vikdf.training import VikdfTrainer, VikdfTrainingArguments


output, *rest = sys.argv[1:]
model, processor = load_model(rest[1] if len(rest) > 1 else DEFAULT_CHECKPOINT)
chat = [{"role": "user", "content": "What did you see?"}, {"role": "assistant", "content": "A red boat on the lake."}]
dialogues = Dataset.from_json(rest[0]) if rest else Dataset.from_list([{"messages": chat}] * 8)
trainer = VikdfTrainer(
    model=model,
    args=VikdfTrainingArguments(
        output_dir=output, max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none"
    ),
    train_dataset=dialogues,
    eval_dataset=dialogues,
    data_collator=DialogueCollator(processor),
    processing_class=processor,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"before: {before:.2f}, after: {trainer.evaluate()['eval_loss']:.2f}")
trainer.save_model()
