"""Which score chooses best among candidates? What readers' grades of validation replies say, in contexts held out.

For each of the scores below: the mean grade of the reply that it chooses, its gain over the mean of all candidates,
and how long and how varied the chosen replies are. The reward of a context is that of a head which was fitted without
it (5 folds). The last eighth to end is left out, as when replies are sampled.

Example run:
    python eval/preference.py grades --output grades.jsonl \
        --data image_chat_validation.jsonl dailydialog_validation.jsonl
    python eval/analyses/candidate_weights.py --grades grades.jsonl
"""

import argparse
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.evaluation.statistics import bootstrap_interval
from modeling_vikdf.metrics import distinct
from modeling_vikdf.modeling_candidates import score_replies
from modeling_vikdf.training.rewarding import cross_validate, load_graded, reply_states


SCORES = {
    "any": {},
    "likelihood": {"likelihood": 1.0},
    "mutual information": {"likelihood": 1.0, "alone": -0.5},
    "match": {"match": 1.0},
    "mutual information, match": {"likelihood": 1.0, "alone": -0.5, "match": 2.0},
    "reward": {"reward": 1.0},
    "reward, length": {"reward": 1.0, "length": 0.5},
    "reward, mutual information": {"reward": 1.0, "likelihood": 0.3, "alone": -0.3},
    "reward, match": {"reward": 1.0, "match": 1.0},
    "reward, match, length": {"reward": 1.0, "match": 1.0, "length": 0.5},
}
TERMS = ("likelihood", "alone", "match", "length")  # what does not depend on the fold


@torch.no_grad()
def terms(model: Any, processor: Any, example: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Each term of the score of an example's replies, [replies], and their lengths in tokens, "tokens"."""
    end = torch.tensor([model.generation_config.eos_token_id]).flatten()[:1]
    rows = [
        torch.cat([torch.tensor(processor.text_tokenizer(reply, add_special_tokens=False)["input_ids"]), end])
        for reply in example["replies"]
    ]
    replies = pad_sequence(rows, batch_first=True)[None]  # [1, R, T]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)[None]
    inputs = processor([example["messages"]])
    knowledge = model.get_knowledge(inputs["context_input_ids"], inputs["context_attention_mask"])
    prompt = model.embed_prompt(inputs["input_ids"], knowledge).expand(len(rows), -1, -1)  # [R, P, d_llm]
    embeds = torch.cat([prompt, model.get_input_embeddings()(replies[0, :, :-1])], dim=1)
    reads = torch.cat([mask.new_ones(prompt.shape[:2]), mask[0, :, :-1]], dim=1)
    logits = model.language_model(
        inputs_embeds=embeds, attention_mask=reads, logits_to_keep=replies.shape[2]
    ).logits.float()  # [R, T, vocabulary]
    chosen = logits.log_softmax(-1).gather(2, replies[0, ..., None])[..., 0] * mask[0]  # [R, T]
    given = {"likelihood": chosen.sum(1)[None], "knowledge": knowledge}
    scores = {term: score_replies(model, processor, replies, mask, weights={term: 1.0}, **given)[0] for term in TERMS}
    return {**scores, "tokens": mask[0].sum(1)}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Compare scores of candidates by readers' grades.")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id (default: the packaged one)")
    parser.add_argument("--grades", required=True, help="graded replies (JSON Lines)")
    parser.add_argument("--layer", type=int, default=20, help="whose states the reward head reads")
    args = parser.parse_args()

    examples = load_graded(args.grades)
    model, processor = load_model(args.model)
    grades = [torch.tensor(example["grades"], dtype=torch.float64) for example in examples]
    rewards = cross_validate(reply_states(model, processor, examples, args.layer), grades, penalty=1000.0)
    parts = [terms(model, processor, example) for example in tqdm(examples, desc="Terms", unit=" contexts")]
    print(f"{len(examples)} contexts, {sum(map(len, grades))} graded replies")
    for name, weights in SCORES.items():
        best, replies = [], []
        for example, values, reward, grade in zip(examples, parts, rewards, grades, strict=True):
            score = sum((weight * {**values, "reward": reward}[term] for term, weight in weights.items()), 0 * reward)
            late = values["tokens"].argsort(stable=True)[len(score) - len(score) // 8 :]
            score[late] = -torch.inf
            best.append(grade[score == score.max()].mean())
            replies.append(example["replies"][int(score.argmax())])
        gains = torch.stack(best) - torch.stack([grade.mean() for grade in grades])
        low, high = bootstrap_interval(gains)
        words = sum(len(reply.split()) for reply in replies) / len(replies)
        print(
            f"{name:<28} grade {torch.stack(best).mean():.2f}, gain {gains.mean():.2f} [{low:.2f}, {high:.2f}]; "
            f"{words:.1f} words, Distinct-2 {distinct(replies)['distinct_2']:.3f}"
        )


if __name__ == "__main__":
    main()
