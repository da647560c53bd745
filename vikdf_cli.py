"""The command `vikdf`. Each sub-command is one function here that reads its arguments and calls the package."""

import argparse
import json
import os
import sys
from pathlib import Path


def chat(args: argparse.Namespace) -> None:
    """Talks in the terminal, or answers the given messages as successive user turns and ends."""
    from transformers import pipeline
    from transformers.utils import logging

    from . import DEFAULT_CHECKPOINT
    from .backbones import load_model

    logging.disable_progress_bar()
    source = args.model or DEFAULT_CHECKPOINT
    # loaded here, because `pipeline` buries the reason of a failure in its own
    model, processor = load_model(source)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor)
    messages = []

    def answer(text: str) -> None:
        messages.append({"role": "user", "content": text})
        reply = ""
        for piece in pipe.stream(messages, use_knowledge=not args.no_knowledge, max_new_tokens=args.max_new_tokens):
            print(piece, end="", flush=True)
            reply += piece
        print(flush=True)
        messages.append({"role": "assistant", "content": reply.strip() or "..."})

    for text in args.message:
        if args.interactive:
            print(f"you> {text}\nvikdf> ", end="", flush=True)
        answer(text)
    if args.message and not (args.interactive and sys.stdin.isatty()):
        return
    terminal = sys.stdin.isatty()
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
            messages.clear()
            print("(new dialogue)", file=sys.stderr)
        elif text:
            print("vikdf> " if terminal else "", end="", flush=True)
            try:
                answer(text)
            except KeyboardInterrupt:  # stops this reply, not the program
                del messages[-1]
                print()
            except ValueError as error:
                del messages[-1]
                print(error, file=sys.stderr)


def new(args: argparse.Namespace) -> None:
    """Builds an untrained model around pretrained backbones and writes model and processor to a folder."""
    from .backbones import new_model, short_greedy_replies

    model, processor = new_model(
        args.language_model,
        args.context_encoder,
        args.vision_encoder,
        num_knowledge_tokens=args.num_knowledge_tokens,
        system_prompt=args.system_prompt,
        iqformer_config={
            "num_hidden_layers": args.layers,
            "hidden_size": args.width,
            "intermediate_size": 4 * args.width,
            "num_attention_heads": args.heads,
            "cross_attention_frequency": 1,
        },
        base_text=args.base_text,
        project_inputs=True,
    )
    model.generation_config = short_greedy_replies(model.generation_config)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"Wrote an untrained model with {trained / 1e6:.1f} M trainable parameters to {args.output}")


def train(args: argparse.Namespace) -> None:
    """Runs a training stage from a recipe, or goes on with it where it was interrupted."""
    import yaml

    from .training import run_stage

    recipe = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{args.config} is no recipe: expected a YAML mapping with sections such as model and data.")
    for override in args.overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator:
            raise ValueError(f"{override!r} is no override: expected section.key=value, or key=value for training.")
        section, _, key = key.rpartition(".")
        recipe.setdefault(section or "training", {})[key] = yaml.safe_load(value)
    metrics = run_stage(args.stage, recipe)
    print(json.dumps(metrics, indent=2))


def convert(args: argparse.Namespace) -> None:
    """Turns a checkpoint of the authors' code into a self-contained VIKDF checkpoint."""
    from .conversion import convert_checkpoint

    convert_checkpoint(args.checkpoint).save_pretrained(args.output)
    print(f"Wrote {args.output}.")


def _tell(figures: dict, output: str | None) -> None:
    """Prints figures as JSON, and writes them to a file if there is one."""
    text = json.dumps(figures, indent=2)
    print(text)
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")


def shrink(args: argparse.Namespace) -> None:
    """Draws a model's knowledge towards its mean, as far as makes the replies of validation dialogues likeliest."""
    from .backbones import load_model
    from .data import load_dialogues
    from .evaluation import mean_knowledge, nll_by_share, save_shrunk

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # now, not after all the work
    model, processor = load_model(args.model)
    mean = mean_knowledge(model, processor, list(load_dialogues(args.data)))
    figures = nll_by_share(model, processor, list(load_dialogues(args.validation)), mean)
    share = min(figures, key=figures.get)
    model.shrink_knowledge(mean, share)
    data = {"train": Path(args.data).name, "validation": Path(args.validation).name}
    save_shrunk(model, processor, args.model, output, {"data": data, "share": share, "nll_by_share": figures})
    print(json.dumps({"nll_by_share": figures, "share": share}, indent=2))


def retrieve(args: argparse.Namespace) -> None:
    """Reports how often the matching head finds the right picture for a caption, and a right caption for a picture."""
    from .backbones import load_model
    from .data import SkipReport, load_image_text_pairs
    from .retrieval import evaluate_retrieval

    report = SkipReport()
    pairs = load_image_text_pairs(args.data, shuffle_buffer=0, report=report)
    model, processor = load_model(args.model)
    figures = evaluate_retrieval(model, processor, pairs, batch_size=args.batch_size, seed=args.seed)
    figures["skipped"] = report.counts()
    _tell(figures, args.output)
    print(report.summary(), file=sys.stderr)


def index(args: argparse.Namespace) -> None:
    """Embeds pictures, or the thumbnails of an index anew, and writes them as a picture index."""
    from . import DEFAULT_CHECKPOINT
    from .backbones import load_model
    from .data import SkipReport
    from .picture_index import INDEX_NAME, PictureIndex, load_pictures

    source, report = args.model or DEFAULT_CHECKPOINT, SkipReport()
    Path(args.output).mkdir(parents=True, exist_ok=True)  # now, not after all the work
    old = PictureIndex.load(args.source) if Path(args.source, INDEX_NAME).exists() else None
    pictures, total = load_pictures(args.source, report) if old is None else (None, None)
    model, processor = load_model(source)
    if old is None:
        new = PictureIndex.build(model, processor, pictures, total=total)
    else:
        new = old.rebuild(model, processor)
    path = new.save(args.output)
    print(f"Wrote {len(new)} pictures to {path}")
    print(report.summary(), file=sys.stderr)


def evaluate(args: argparse.Namespace) -> None:
    """Measures the replies to dialogues: their likelihood, their rank among others, and what the model says itself."""
    from . import DEFAULT_CHECKPOINT
    from .evaluation import EvaluationSettings, evaluate_file

    settings = EvaluationSettings(
        knowledge="none" if args.baseline else args.knowledge,
        system_prompt=args.system_prompt,
        limit=args.limit,
        all_references=args.references == "all",
        ranking=not args.no_ranking,
        generation=not args.no_generation,
        visual_words=args.visual_words,
        word_vectors=args.word_vectors,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    report = evaluate_file(args.model or DEFAULT_CHECKPOINT, args.data, args.output, settings)
    names = ("num_dialogues", "skipped", "metrics", "confidence_95")
    print(json.dumps({name: report[name] for name in names}, indent=2))


def compare(args: argparse.Namespace) -> None:
    """Reports the paired differences of two systems that `evaluate` measured on the same data."""
    from .reports import compare as compare_reports

    if len(args.reports) == 2 and not (args.a or args.b):
        a, b = args.reports[:1], args.reports[1:]
    elif not args.reports and args.a and args.b:
        a, b = args.a, args.b
    else:
        raise ValueError("compare takes two reports, or the reports of several seeds: --a A1 A2 ... --b B1 B2 ...")
    _tell(compare_reports(a, b, seed=args.seed), args.output)


def probe(args: argparse.Namespace) -> None:
    """Asks what things look like, with the knowledge and without; prints the summary, writes every item's scores."""
    from . import DEFAULT_CHECKPOINT
    from .backbones import load_model
    from .probes import compare_probes, load_items, probe

    templates, against = (
        json.loads(Path(name).read_text(encoding="utf-8")) if name else None for name in (args.templates, args.against)
    )
    items = load_items(args.data, templates, args.limit)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)  # now, not after all the work
    source = args.model or DEFAULT_CHECKPOINT
    model, processor = load_model(source)
    figures = probe(model, processor, items, args.arms, batch_size=args.batch_size, seed=args.seed)
    output.write_text(json.dumps(figures) + "\n", encoding="utf-8")  # also if the other file does not fit
    if against is not None:
        figures["against"] = compare_probes(figures, against, args.seed)
        output.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    summary = {key: figures[key] for key in ("task", "subsets", "against") if key in figures}
    print(json.dumps(summary, indent=2))


def export(args: argparse.Namespace) -> None:
    """Writes a folder that is a whole Hub repository."""
    from . import DEFAULT_CHECKPOINT
    from .sharing import export

    export(args.model or DEFAULT_CHECKPOINT, args.output, args.include_backbones, args.results)
    print(f"Wrote {args.output}")


def push(args: argparse.Namespace) -> None:
    """Commits a model to the Hub, with the token of `hf auth login` or of the environment."""
    from . import DEFAULT_CHECKPOINT
    from .sharing import push_to_hub

    commit = push_to_hub(
        args.repo_id,
        model=args.model or DEFAULT_CHECKPOINT,
        include_backbones=args.include_backbones,
        results=args.results,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    print(commit.pr_url or commit.commit_url)


def benchmark(args: argparse.Namespace) -> None:
    """Measures, prints and writes figures of speed and memory, as ratios wherever machines differ."""
    from .benchmark import benchmark_generation, benchmark_training

    if args.what == "generation":
        figures = benchmark_generation(args.model, repeats=args.repeats)
    else:
        figures = benchmark_training(repeats=args.repeats)
    _tell(figures, args.output)


def serve(args: argparse.Namespace) -> None:
    """Answers over HTTP, as OpenAI's chat API does, until it is told to end."""
    from .server import serve

    key = os.environ.get("VIKDF_API_KEY") if args.api_key is None else args.api_key
    limits = {"max_batch": args.max_batch, "max_queue": args.max_queue, "timeout": args.timeout}
    serve(args.model, args.host, args.port, key, **limits)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script `vikdf`."""
    parser = argparse.ArgumentParser(prog="vikdf", description="Visual common sense for a frozen chat LLM.")
    parser.set_defaults(extra=None)  # the extra of setup.py that a command needs
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    sub = commands.add_parser("chat", help="talk in the terminal")
    sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
    sub.add_argument("--message", action="append", default=[], help="a user turn to answer; may be repeated")
    sub.add_argument("--interactive", action="store_true", help="after --message go on in the terminal")
    sub.add_argument("--no-knowledge", action="store_true", help="ask the bare language model")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="longest reply in tokens (default: 64)")
    sub.set_defaults(run=chat)

    sub = commands.add_parser("new", help="build an untrained model around pretrained backbones")
    sub.add_argument("--language-model", required=True, help="folder or Hub id of a chat LLM")
    sub.add_argument("--context-encoder", required=True, help="folder or Hub id of a text encoder")
    sub.add_argument("--vision-encoder", help="folder or Hub id of a vision encoder")
    sub.add_argument("--output", required=True, help="folder to write")
    sub.add_argument("--num-knowledge-tokens", type=int, default=32, help="number of queries (default: 32)")
    sub.add_argument("--layers", type=int, default=12, help="layers of the IQ-Former (default: 12)")
    sub.add_argument("--width", type=int, default=768, help="width of the IQ-Former (default: 768)")
    sub.add_argument("--heads", type=int, default=12, help="attention heads of the IQ-Former (default: 12)")
    sub.add_argument("--system-prompt", help="system message of chats that bring none")
    sub.add_argument("--base-text", help="start with silent knowledge: a harmless sentence in its place")
    sub.set_defaults(run=new)

    for stage, text in (
        ("distill", "stage 1: learn from image-text pairs which knowledge a text evokes"),
        ("integrate", "stage 2: teach the LLM to use knowledge, on image-text pairs"),
        ("tune", "tune the knowledge on text dialogues"),
    ):
        sub = commands.add_parser(stage, help=text)
        sub.add_argument("--config", required=True, help="recipe (YAML); see configs/")
        sub.add_argument(
            "overrides",
            nargs="*",
            metavar="KEY=VALUE",
            help="settings in place of the recipe's: learning_rate=1e-4, data.train=pairs.tar, model.checkpoint=DIR",
        )
        sub.set_defaults(run=train, stage=stage, extra="train")

    sub = commands.add_parser(
        "shrink", help="draw a tuned model's knowledge towards its mean, by validation dialogues"
    )
    sub.add_argument("--model", required=True, help="folder or Hub id of a VIKDF model")
    sub.add_argument("--data", required=True, help="dialogues, JSON Lines, to take the mean of")
    sub.add_argument("--validation", required=True, help="dialogues, JSON Lines, whose replies are to be likely")
    sub.add_argument("--output", required=True, help="folder to write the model to")
    sub.set_defaults(run=shrink, extra="eval")

    sub = commands.add_parser("retrieve", help="measure text-image retrieval")
    sub.add_argument("--data", required=True, nargs="+", help="webdataset shards, image folders or Hub datasets")
    sub.add_argument("--model", required=True, help="folder or Hub id of a VIKDF model with a vision encoder")
    sub.add_argument("--output", help="JSON file to write")
    sub.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: 64)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the bootstrap intervals (default: 0)")
    sub.set_defaults(run=retrieve, extra="eval")

    sub = commands.add_parser("index", help="embed pictures for the Space to compare knowledge with")
    sub.add_argument("source", help="folder of pictures, webdataset shards, Hub dataset; or an index, to embed anew")
    sub.add_argument("--output", required=True, help="folder to write index.safetensors to")
    sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
    sub.set_defaults(run=index, extra="demo")

    sub = commands.add_parser("evaluate", help="measure replies to dialogues: likelihood, ranking, generation")
    sub.add_argument("--data", required=True, help="dialogues, JSON Lines: turns, messages, or turns and references")
    sub.add_argument("--output", required=True, help="JSON file to write; an interrupted run is continued")
    sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
    arms = sub.add_mutually_exclusive_group()
    arms.add_argument("--baseline", choices=["language-model"], help="the same language model without knowledge")
    arms.add_argument(
        "--knowledge",
        choices=["own", "shuffled", "mean"],
        default="own",
        help="the dialogue's own knowledge, another's, or the mean (default: own)",
    )
    sub.add_argument("--system-prompt", help="system message of chats that bring none (default: the model's)")
    sub.add_argument("--limit", type=int, help="dialogues to evaluate (default: all)")
    sub.add_argument(
        "--references", choices=["first", "all"], default="first", help="whose perplexity to measure (default: first)"
    )
    sub.add_argument("--no-ranking", action="store_true", help="leave out the ranking among other replies")
    sub.add_argument("--no-generation", action="store_true", help="leave out the generation of replies")
    sub.add_argument("--visual-words", help="file with a word a line, whose likelihood is reported apart")
    sub.add_argument("--word-vectors", help="file with 'word v1 v2 ...' a line, for the embedding metrics")
    sub.add_argument("--batch-size", type=int, default=16, help="dialogues, or candidates, in a batch (default: 16)")
    sub.add_argument("--seed", type=int, default=0, help="seed of distractors, shuffling, intervals (default: 0)")
    sub.set_defaults(run=evaluate, extra="eval")

    sub = commands.add_parser("compare", help="paired differences of two systems that were evaluated")
    sub.add_argument("reports", nargs="*", metavar="REPORT", help="two JSON files that evaluate wrote, A and B")
    sub.add_argument("--a", nargs="+", metavar="A", help="instead: reports of A, one for each training seed")
    sub.add_argument("--b", nargs="+", metavar="B", help="and of B")
    sub.add_argument("--output", help="JSON file to write")
    sub.add_argument("--seed", type=int, default=0, help="seed of intervals and p-values (default: 0)")
    sub.set_defaults(run=compare, extra="eval")

    sub = commands.add_parser("probe", help="ask what things look like, with and without knowledge")
    sub.add_argument("--data", required=True, help="items, JSON Lines; see modeling_vikdf/probes.py")
    sub.add_argument("--output", required=True, help="JSON file to write, with the scores of every item")
    sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
    sub.add_argument(
        "--arms",
        nargs="+",
        choices=["own", "shuffled", "mean", "none"],
        default=["own", "shuffled", "mean", "none"],
        help="the item's own knowledge, another's, the mean, or the bare language model (default: all)",
    )
    sub.add_argument("--against", help="JSON file that this command wrote for another model on the same items")
    sub.add_argument("--templates", help="JSON file of questions in place of the built-in ones")
    sub.add_argument("--limit", type=int, help="items to ask (default: all)")
    sub.add_argument("--batch-size", type=int, default=32, help="prompts at a time (default: 32)")
    sub.add_argument("--seed", type=int, default=0, help="seed of shuffled knowledge and statistics (default: 0)")
    sub.set_defaults(run=probe, extra="eval")

    sub = commands.add_parser("convert", help="convert a checkpoint of the authors' code")
    sub.add_argument("checkpoint", help="folder with config.json and a safetensors file")
    sub.add_argument("--output", required=True, help="folder to write")
    sub.set_defaults(run=convert)

    export_parser = commands.add_parser("export", help="write a folder that is a whole Hub repository")
    export_parser.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    export_parser.set_defaults(run=export)
    push_parser = commands.add_parser("push", help="commit a model to the Hub")
    push_parser.add_argument("--repo-id", required=True, help="ORG/NAME; created if it does not exist")
    push_parser.add_argument("--private", action="store_true", help="make a new repository private")
    push_parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push_parser.add_argument("--revision", help="branch to commit to (default: main)")
    push_parser.set_defaults(run=push)
    for sub in (export_parser, push_parser):
        sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
        sub.add_argument("--include-backbones", action="store_true", help="with the weights of the frozen backbones")
        sub.add_argument("--results", nargs="+", default=[], help="reports of evaluate, retrieve, probe for the card")

    sub = commands.add_parser("benchmark", help="measure speed and memory")
    sub.add_argument("what", choices=["generation", "training"])
    sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
    sub.add_argument("--output", help="JSON file to write")
    sub.add_argument("--repeats", type=int, default=7, help="timed runs of each arm (default: 7)")
    sub.set_defaults(run=benchmark)

    sub = commands.add_parser("serve", help="answer over HTTP, as OpenAI's chat API does")
    sub.add_argument("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    sub.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    sub.add_argument("--api-key", help="what clients must send (default: environment variable VIKDF_API_KEY)")
    sub.add_argument("--max-batch", type=int, default=16, help="replies generated together (default: 16)")
    sub.add_argument("--max-queue", type=int, default=64, help="requests that wait before more get 429 (default: 64)")
    sub.add_argument("--timeout", type=float, default=60, help="seconds for an answer (default: 60)")
    sub.set_defaults(run=serve, extra="serve")

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        if args.extra is None:
            raise  # no extra brings it
        sys.exit(
            f"vikdf: {args.command!r} needs {error.name!r}, which is not installed. It comes with: "
            f'pip install "modeling_vikdf[{args.extra}]"'
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"vikdf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
