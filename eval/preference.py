"""Which replies do people prefer? Replies of several arms to the same contexts, read in pairs by blind readers.

    write: arms of eval/preference.yaml, dialogues -> replies, FOLDER/DATA/ARM.json
    sheet: pairs of arms                              -> sheet.json for readers, key.json to be kept from them
    read:  a page on which a person judges the sheet  -> judgements
    tally: key and judgements of all readers          -> report: how often the first arm of a pair is preferred
    show:  arms                                       -> all their replies side by side
    grades: grades of candidates, dialogues           -> JSON Lines for `vikdf reward`

A reader, person or language model, sees the sheet alone: contexts and two replies to each, in random order, without a
word about where they come from.

Example run:
    python eval/preference.py write --arms default bare --data image_chat_validation.jsonl --contexts 150 \
        --output outputs/p
    python eval/preference.py sheet --pairs default:bare --data image_chat_validation.jsonl --replies outputs/p \
        --output outputs/p
    python eval/preference.py read outputs/p/sheet.json --reader "my name" --output outputs/p/judgements_1.json
    python eval/preference.py tally --key outputs/p/key.json --judgements outputs/p/judgements_*.json \
        --replies outputs/p --output report.json
"""

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from prepare_data import as_written
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import pipeline

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.data import load_dialogues
from modeling_vikdf.data.dialogues import as_messages
from modeling_vikdf.evaluation.journal import hash_file
from modeling_vikdf.evaluation.statistics import bootstrap_interval
from modeling_vikdf.metrics import distinct
from modeling_vikdf.modeling_candidates import mean_states


CRITERIA = (
    "Two people chat. You see what was said so far and two replies, A and B, to the last turn. Which of them would "
    "the person who wrote the last turn rather get? A good reply answers the last turn and fits what was said before; "
    "it is specific and engaging; it is natural, as a person writes in a chat. Judge the replies as they stand. "
    "Answer A or B; answer tie only where you would toss a coin."
)
VERDICTS = ("A", "B", "tie")
UNSURE = re.compile(r"(i'm|i am) not (really |quite )?sure|i (really )?(don't|do not) know", re.IGNORECASE)
BATCH = 8  # contexts at a time


# ---- write: replies of an arm ----


def draw_contexts(data: str | Path, count: int | None, seed: int) -> list[dict[str, Any]]:
    """`count` dialogues of a file without their last turn, drawn by the seed, with text as people write it."""
    dialogues = [each for each in load_dialogues(str(data)) if each["messages"][-2]["role"] == "user"]
    random.Random(seed).shuffle(dialogues)
    return [
        {
            "key": dialogue["key"],
            "messages": [{**turn, "content": as_written(turn["content"])} for turn in dialogue["messages"][:-1]],
            "human": as_written(dialogue["messages"][-1]["content"]),
        }
        for dialogue in dialogues[:count]
    ]


def write_replies(arm: dict[str, Any], contexts: list[dict[str, Any]], seed: int, name: str) -> tuple[list[str], int]:
    """
    The replies of an arm to contexts, and how many of them were cut at the longest length that was allowed.

    Args:
        arm: `model`, a folder or Hub id (default: the packaged one); `system_prompt`; `call`, arguments of the
            pipeline's call; `choice: similarity` where that returns several replies; or `human: true`, the replies
            that people gave.
        contexts: as [`draw_contexts`] gives them.
        seed: of all that is drawn.
        name: what the progress bar says.
    """
    if arm.get("human"):
        return [context["human"] for context in contexts], 0
    model, processor = load_model(arm.get("model", DEFAULT_CHECKPOINT))
    processor.system_prompt = arm.get("system_prompt", processor.system_prompt)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor, device=model.device)
    # those of similar length together
    order = sorted(range(len(contexts)), key=lambda i: sum(len(turn["content"]) for turn in contexts[i]["messages"]))
    replies = [""] * len(contexts)
    longest = arm.get("call", {}).get("max_new_tokens", model.generation_config.max_new_tokens)
    torch.manual_seed(seed)
    for start in tqdm(range(0, len(order), BATCH), desc=name, unit=" batches"):
        rows = order[start : start + BATCH]
        chats = [contexts[i]["messages"] for i in rows]
        outputs = pipe(chats, batch_size=BATCH, return_full_text=False, **arm.get("call", {}))
        for i, candidates in zip(rows, outputs, strict=True):
            texts = [candidate["generated_text"] for candidate in candidates]
            turn = contexts[i]["messages"][-1]["content"]
            replies[i] = most_similar(pipe, texts, turn, longest) if arm.get("choice") == "similarity" else texts[0]
    return replies, len(replies) - len(ended_by_themselves(processor, replies, longest))


def ended_by_themselves(processor: Any, replies: list[str], longest: int) -> list[str]:
    """Those of fewer tokens than were allowed: what ends by itself has an end of turn besides."""
    lengths = [len(ids) for ids in processor.text_tokenizer(replies, add_special_tokens=False)["input_ids"]]
    return [reply for reply, length in zip(replies, lengths, strict=True) if length < longest]


@torch.no_grad()
def most_similar(pipe: Any, replies: list[str], turn: str, longest: int) -> str:
    """Of replies that ended by themselves the one closest to a turn, as the text encoder finds without IQ-Former."""
    ended = ended_by_themselves(pipe.processor, replies, longest) or replies
    read = pipe.processor([[{"role": "user", "content": text or "..."}] for text in (turn, *ended)])
    read = read.to(pipe.model.device)
    mask = read["context_attention_mask"]
    states = pipe.model.encode_context(read["context_input_ids"], mask)  # [1 + n, T, d_text]
    vectors = F.normalize(mean_states(states, mask), dim=-1)  # [1 + n, d_text]
    return ended[int((vectors[1:] @ vectors[0]).argmax())]


def write(args: argparse.Namespace) -> None:
    """Writes the replies of each arm to each file's contexts, unless they are there."""
    arms = yaml.safe_load(args.config.read_text(encoding="utf-8"))["arms"]
    if unknown := sorted(set(args.arms) - set(arms)):
        raise SystemExit(f"unknown arms {unknown}; {args.config} has {sorted(arms)}")
    for data, name in itertools.product(args.data, args.arms):
        output = args.output / data.stem / f"{name}.json"
        settings = {"arm": name, "settings": arms[name], "seed": args.seed, "contexts": args.contexts}
        settings |= {"data": data.name, "data_sha256": hash_file(data)}
        if output.is_file():
            existing = json.loads(output.read_text(encoding="utf-8"))
            if {key: existing[key] for key in settings} != settings:
                raise SystemExit(f"{output} holds replies under other settings: choose another --output, or remove it")
            continue
        contexts = draw_contexts(data, args.contexts, args.seed)
        replies, cut = write_replies(arms[name], contexts, args.seed, f"{name}, {data.stem}")
        output.parent.mkdir(parents=True, exist_ok=True)
        by_key = {context["key"]: reply for context, reply in zip(contexts, replies, strict=True)}
        text = json.dumps({**settings, "cut": cut, "replies": by_key}, indent=1, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")


# ---- sheet: what readers see ----


def make_sheet(
    pairs: list[tuple[str, str]], files: dict[str, tuple[dict[str, list], dict[str, dict[str, str]]]], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    The sheet, and the key to it. Equal replies are ties that nobody need read; they stand in the key alone.

    Args:
        pairs: names of two arms each.
        files: name of the data -> context key -> messages, and arm -> context key -> reply.
        seed: of the order of the items, and of the two replies in each.
    """
    rng, items, key = random.Random(seed), [], []
    for (data, (contexts, replies)), (first, second) in itertools.product(files.items(), pairs):
        for context, messages in contexts.items():
            texts = replies[first][context], replies[second][context]
            swapped = rng.random() < 0.5
            entry = {"data": data, "pair": f"{first}:{second}", "context": context}
            equal = texts[0] == texts[1]
            key.append({**entry, "verdict": "tie"} if equal else {**entry, "first": "B" if swapped else "A"})
            items.append(None if equal else (messages, texts[swapped], texts[not swapped]))
    order = rng.sample(range(len(key)), len(key))
    numbers = {place: number for number, place in enumerate((i for i in order if items[i] is not None), 1)}
    for place, number in numbers.items():
        key[place]["item"] = number
    sheet = [
        {"item": number, "chat": [turn["content"] for turn in items[i][0]], "A": items[i][1], "B": items[i][2]}
        for i, number in numbers.items()
    ]
    return {"criteria": CRITERIA, "items": sheet}, key


def sheet(args: argparse.Namespace) -> None:
    """Writes sheet.json and key.json for pairs of arms whose replies were written."""
    pairs = [tuple(pair.split(":")) for pair in args.pairs]
    if wrong := [pair for pair in args.pairs if pair.count(":") != 1]:
        raise SystemExit(f"expected pairs FIRST:SECOND of arms, got {wrong}")
    files = {}
    for data in args.data:
        replies = {}
        for arm in dict.fromkeys(itertools.chain(*pairs)):
            record = json.loads((args.replies / data.stem / f"{arm}.json").read_text(encoding="utf-8"))
            replies[arm] = record["replies"]
        contexts = draw_contexts(data, record["contexts"], record["seed"])
        files[data.stem] = {context["key"]: context["messages"] for context in contexts}, replies
    content, key = make_sheet(pairs, files, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, value in (("sheet", content), ("key", key)):
        (args.output / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{len(content['items'])} items to read in {args.output / 'sheet.json'}; keep key.json from the readers")


# ---- read: a page for people ----


def read(args: argparse.Namespace) -> None:
    """Serves a page on which a person judges the items of a sheet; each verdict is written at once."""
    import gradio as gr

    content = json.loads(args.sheet.read_text(encoding="utf-8"))
    judged = json.loads(args.output.read_text(encoding="utf-8"))["verdicts"] if args.output.is_file() else {}

    def show() -> tuple[str, list[dict[str, str]], str, str]:
        left = [item for item in content["items"] if str(item["item"]) not in judged]
        progress = f"{len(judged)} of {len(content['items'])} judged"
        if not left:
            return f"**{progress}.** Thank you!", [], "", ""
        chat = as_messages(left[0]["chat"], "user")
        return f"{content['criteria']}\n\n**{progress}**", chat, left[0]["A"], left[0]["B"]

    def judge(verdict: str) -> tuple:
        left = [item for item in content["items"] if str(item["item"]) not in judged]
        if left:
            judged[str(left[0]["item"])] = verdict
            record = {"reader": args.reader, "verdicts": judged}
            args.output.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return show()

    with gr.Blocks(title="Which reply is better?") as page:
        task, chat = gr.Markdown(), gr.Chatbot(label="So far", sanitize_html=True, render_markdown=False)
        with gr.Row():
            shown = [gr.Textbox(label=name, interactive=False) for name in "AB"]
        with gr.Row():
            for verdict in VERDICTS:
                gr.Button(verdict).click(lambda verdict=verdict: judge(verdict), outputs=[task, chat, *shown])
        page.load(show, outputs=[task, chat, *shown])
    page.launch(server_name="127.0.0.1", server_port=args.port)


# ---- tally: what the readers say ----


def tally(key: list[dict[str, Any]], readers: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """
    How often the first arm of each pair is preferred, a tie counted half, a mean over contexts and readers.

    Args:
        key: from [`make_sheet`].
        readers: `{"reader": who, "verdicts": {item: "A", "B" or "tie"}}` each; every reader judged every item.
        seed: of the resamples.

    Returns:
        For each data and pair: `preferred` with `confidence_95` (bootstrap over contexts), by `readers`, `contexts`,
        and `agreement`: the share of read items on which two readers give the same verdict.

    Raises:
        ValueError: if a reader left items out, judged others, or gave another verdict.
    """
    items = {str(entry["item"]) for entry in key if "item" in entry}
    for reader in readers:
        if wrong := items ^ set(reader["verdicts"]):
            raise ValueError(f"{reader['reader']} and the key differ in items {sorted(wrong, key=int)[:10]}.")
        if wrong := set(reader["verdicts"].values()) - {*VERDICTS}:
            raise ValueError(f"{reader['reader']} gives {sorted(wrong)}; a verdict is one of {', '.join(VERDICTS)}.")
    results = []
    for data, pair in dict.fromkeys((entry["data"], entry["pair"]) for entry in key):
        entries = [entry for entry in key if (entry["data"], entry["pair"]) == (data, pair)]
        scores = torch.tensor([[_score(entry, reader["verdicts"]) for reader in readers] for entry in entries])
        # [N, R], contexts and readers
        read_items = [str(entry["item"]) for entry in entries if "item" in entry]
        results.append(
            {
                "data": data,
                "pair": pair,
                "contexts": len(entries),
                "equal": len(entries) - len(read_items),
                "preferred": scores.mean().item(),
                "confidence_95": list(bootstrap_interval(scores.mean(1), seed=seed)),
                "readers": [score.mean().item() for score in scores.unbind(1)],
                "agreement": _agreement(readers, read_items),
            }
        )
    return results


def _score(entry: dict[str, Any], verdicts: dict[str, str]) -> float:
    """1 if the first arm of the pair is preferred, 0 if the second is, 0.5 for a tie."""
    verdict = verdicts[str(entry["item"])] if "item" in entry else entry["verdict"]
    return 0.5 if verdict == "tie" else float(verdict == entry["first"])


def _agreement(readers: list[dict[str, Any]], items: list[str]) -> float | None:
    """The share of items on which two readers give the same verdict, over all pairs of readers; `None` for one."""
    pairs = list(itertools.combinations(readers, 2))
    same = [one["verdicts"][item] == other["verdicts"][item] for one, other in pairs for item in items]
    return sum(same) / len(same) if same else None


def describe(replies: list[str], cut: int) -> dict[str, float]:
    """
    What can be said of an arm's replies without reading them.

    Args:
        replies: texts.
        cut: how many of them were cut at the longest length that was allowed.

    Returns:
        Shares of replies that begin unsure (`unsure`), and that were `cut`; Distinct-2; the mean number of words.
    """
    return {
        "unsure": sum(bool(UNSURE.match(reply)) for reply in replies) / len(replies),
        "cut": cut / len(replies),
        "distinct_2": distinct(replies)["distinct_2"],
        "words": sum(len(reply.split()) for reply in replies) / len(replies),
    }


def report(args: argparse.Namespace) -> None:
    """Writes the report of all readers."""
    key = json.loads(args.key.read_text(encoding="utf-8"))
    readers = [json.loads(path.read_text(encoding="utf-8")) for path in args.judgements]
    content = {
        "kind": "preference",
        "version": 1,
        "criteria": CRITERIA,
        "readers": [reader["reader"] for reader in readers],
        "pairs": tally(key, readers, args.seed),
        "replies": describe_files(args.replies),
    }
    args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(content))


def table(content: dict[str, Any]) -> str:
    """A report as Markdown: a row for each pair, and one for what can be said of each arm without reading."""
    lines = ["| contexts | replies | against | preferred | readers | agreement |", "|---|---|---|---|---|---|"]
    for result in content["pairs"]:
        first, second = result["pair"].split(":")
        low, high = result["confidence_95"]
        readers = ", ".join(f"{value:.2f}" for value in result["readers"])
        agreement = "-" if result["agreement"] is None else f"{100 * result['agreement']:.0f} %"
        preferred = f"**{result['preferred']:.2f}** [{low:.2f}, {high:.2f}]"
        lines.append(
            f"| {result['data']}, {result['contexts']} | {first} | {second} | {preferred} | {readers} | {agreement} |"
        )
    lines += ["", "| contexts | replies | words | Distinct-2 | begin unsure | cut |", "|---|---|---|---|---|---|"]
    for data, arms in content["replies"].items():
        for arm, figures in arms.items():
            shares = " | ".join(f"{100 * figures[name]:.1f} %" for name in ("unsure", "cut"))
            lines.append(f"| {data} | {arm} | {figures['words']:.1f} | {figures['distinct_2']:.3f} | {shares} |")
    return "\n".join(lines)


def describe_files(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What [`describe`] says of the replies that were written below a folder: data -> arm -> figures."""
    described: dict[str, dict[str, dict[str, float]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        figures = describe(list(record["replies"].values()), record["cut"])
        described.setdefault(path.parent.name, {})[path.stem] = figures
    return described


# ---- grades: what a reward head is fitted to ----


def join_grades(graded: dict[str, dict[str, float]], dialogues: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Grades of replies beside what was said before.

    Args:
        graded: context key -> reply -> grade.
        dialogues: as [`draw_contexts`] gives them.

    Returns:
        `turns`, `replies` and `grades` of each graded context.

    Raises:
        ValueError: if a graded context is in none of the dialogues.
    """
    messages = {dialogue["key"]: dialogue["messages"] for dialogue in dialogues}
    if missing := sorted(graded.keys() - messages.keys()):
        raise ValueError(f"{len(missing)} graded contexts are not in the dialogues: {missing[:3]} ...")
    return [
        {
            "turns": [turn["content"] for turn in messages[key]],
            "replies": list(replies),
            "grades": list(replies.values()),
        }
        for key, replies in graded.items()
    ]


def write_grades(args: argparse.Namespace) -> None:
    """Writes graded replies with their contexts, which the file of grades names by their keys alone."""
    graded = json.loads(args.grades.read_text(encoding="utf-8"))["data"]
    files = {data.stem: data for data in args.data}
    if missing := sorted(graded.keys() - files.keys()):
        raise SystemExit(f"{args.grades} has grades of {missing}: name these files, too, with --data")
    lines = []
    for name, contexts in graded.items():
        lines += join_grades(contexts, draw_contexts(files[name], None, 0))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    args.output.write_text(text, encoding="utf-8")
    print(f"{len(lines)} contexts, {sum(len(line['grades']) for line in lines)} graded replies")


# ---- show: replies side by side ----


def show(args: argparse.Namespace) -> None:
    """Writes all replies of arms to a file's contexts side by side, as Markdown."""
    records = [json.loads((args.replies / args.data.stem / f"{arm}.json").read_text("utf-8")) for arm in args.arms]
    lines = [f"| message | {' | '.join(args.arms)} |", "|---" * (1 + len(args.arms)) + "|"]
    for context in load_dialogues(str(args.data)):
        if context["key"] not in records[0]["replies"]:
            continue
        said = " / ".join(turn["content"] for turn in context["messages"][:-1])
        replies = [" ".join(record["replies"][context["key"]].split()) for record in records]
        lines.append(f"| {' | '.join(text.replace('|', '/') for text in (said, *replies))} |")
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Runs one of the steps."""
    parser = argparse.ArgumentParser(description="Which replies do people prefer?")
    steps = parser.add_subparsers(required=True)
    seed = argparse.ArgumentParser(add_help=False)
    seed.add_argument("--seed", type=int, default=0)

    step = steps.add_parser("write", help="write the replies of arms", parents=[seed])
    arms = Path(__file__).with_name("preference.yaml")
    step.add_argument("--config", type=Path, default=arms, help="the arms (YAML)")
    step.add_argument("--arms", nargs="+", required=True)
    step.add_argument("--data", nargs="+", type=Path, required=True, help="files of dialogues")
    step.add_argument("--contexts", type=int, help="dialogues of each file (default: all)")
    step.add_argument("--output", type=Path, required=True, help="folder: DATA/ARM.json")
    step.set_defaults(run=write)

    step = steps.add_parser("sheet", help="pair replies for readers", parents=[seed])
    step.add_argument("--pairs", nargs="+", required=True, help="FIRST:SECOND, names of arms")
    step.add_argument("--data", nargs="+", type=Path, required=True, help="files of dialogues")
    step.add_argument("--replies", type=Path, required=True, help="the folder that `write` wrote")
    step.add_argument("--output", type=Path, required=True, help="folder of sheet.json and key.json")
    step.set_defaults(run=sheet)

    step = steps.add_parser("read", help="judge a sheet in the browser")
    step.add_argument("sheet", type=Path)
    step.add_argument("--reader", required=True, help="who judges; a language model is called one")
    step.add_argument("--output", type=Path, required=True, help="file of verdicts; an existing one is continued")
    step.add_argument("--port", type=int, default=7861)
    step.set_defaults(run=read)

    step = steps.add_parser("tally", help="count what all readers say", parents=[seed])
    step.add_argument("--key", type=Path, required=True)
    step.add_argument("--judgements", nargs="+", type=Path, required=True)
    step.add_argument("--replies", type=Path, required=True, help="the folder that `write` wrote")
    step.add_argument("--output", type=Path, required=True)
    step.set_defaults(run=report)

    step = steps.add_parser("grades", help="put graded replies beside their contexts, for `vikdf reward`")
    step.add_argument("--grades", type=Path, default=Path("eval/results/preference/grades.json"))
    step.add_argument("--data", nargs="+", type=Path, required=True, help="the files of dialogues that were graded")
    step.add_argument("--output", type=Path, required=True, help="JSON Lines to write")
    step.set_defaults(run=write_grades)

    step = steps.add_parser("show", help="show all replies of arms side by side")
    step.add_argument("--arms", nargs="+", required=True)
    step.add_argument("--data", type=Path, required=True, help="file of dialogues")
    step.add_argument("--replies", type=Path, required=True, help="the folder that `write` wrote")
    step.add_argument("--output", type=Path, required=True, help="Markdown to write")
    step.set_defaults(run=show)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
